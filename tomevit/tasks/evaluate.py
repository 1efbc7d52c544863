"""Accuracy and throughput of a model at several r, in one pass over labelled images.

Every image has a place of its own in a table of answers, from which all figures are counted at the end. So nothing can
count twice, whoever computes it and however often a run is interrupted: a place that is empty is still to be done.

In processes that torchrun started, with a process group, each does its share of the batches, and all get the result.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import tomevit
from tomevit.config import Card
from tomevit.data.distributed import of_first, processes, require_same
from tomevit.data.images import reading, stream
from tomevit.flops import flops
from tomevit.measure import timing
from tomevit.measure.bench import out_of_memory
from tomevit.measure.timing import Quartiles
from tomevit.models import VisionTransformer
from tomevit.output import new_file
from tomevit.schedule import Schedule
from tomevit.transform import transform
from tomevit.weights import checkpoint

SCHEMA = 1
SAVE_EVERY = 30.0  # seconds
Z = NormalDist().inv_cdf(0.975)  # of an interval of 95 %

#: What stands in the table of answers in place of a class, in this order: what is known is larger than what is not.
WAITING, UNREADABLE, NOT_FINITE = -3, -2, -1


# ------------------------------------------------------------------------------------------------------------- results


class Share(NamedTuple):
    """Per cent of the images, or a difference of two such in points, and where it lies with a confidence of 95 %."""

    value: float
    lower: float
    upper: float


class Row(NamedTuple):
    """What was found at one r."""

    r: Schedule
    tokens: int  # leaving the last block
    gflops: float  # multiply-adds per image, in 10⁹, as the paper counts them
    flop_ratio: float  # r = 0 over this r, as they are computed
    top1: Share
    top5: Share
    difference: Share | None  # top-1 less that of r = 0 on the same images; None: r = 0 was not evaluated, or is this
    agreement: Share | None  # images with the same answer as at r = 0
    seconds: Quartiles | None  # of the forward pass on a batch; None: no batch was whole
    images_per_second: float | None  # by the median: of the forward pass alone, in one process
    speed_up: float | None  # over r = 0 in this run
    not_finite: int  # images whose logits were not finite; they count as wrong


class Evaluation(NamedTuple):
    """What was found at all r."""

    rows: list[Row]
    images: int  # that there are
    evaluated: int  # that were read and classified; all shares are of these
    unreadable: list[tuple[str, str]]  # files and reasons
    batch: int
    rate: float | None  # images per second of this run, reading them and all r included
    resumed: int  # images that an earlier run had done
    interrupted: bool  # from the keyboard; there may be images that are not done

    @property
    def complete(self) -> bool:
        """Every image was evaluated, or is known to be unreadable."""
        return self.evaluated + len(self.unreadable) == self.images


def wilson(count: int, total: int) -> Share:
    """A share with Wilson's score interval (1927), which holds near 0 and 100 per cent too.

    Args:
        count: of total, which is 1 or more.
    """
    share, spread = count / total, Z * Z / total
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    # At the ends the interval ends there too, and rounding must not leave the end out.
    lower, upper = centre - half if count else 0.0, centre + half if count < total else 1.0
    return Share(100 * count / total, 100 * lower, 100 * upper)


def paired(gained: int, lost: int, total: int) -> Share:
    """The difference of two shares of the same images, with the adjusted Wald interval of Bonett and Price (2012).

    Args:
        gained: images that count in the first share alone.
        lost: in the second alone.
        total: of all images, which is 1 or more.
    """
    more, less = (gained + 1) / (total + 2), (lost + 1) / (total + 2)
    half = Z * math.sqrt((more + less - (more - less) ** 2) / (total + 2))
    return Share(100 * (gained - lost) / total, 100 * (more - less - half), 100 * (more - less + half))


class Expected(NamedTuple):
    """A top-1 accuracy that was measured elsewhere."""

    r: Schedule
    top1: float  # per cent
    source: str


class Verdict(NamedTuple):
    """What was expected, and whether it lies within the interval of what was measured."""

    r: Schedule
    expected: float
    source: str
    measured: Share
    within: bool


def published(card: Card) -> list[Expected]:
    """What a card has of its weights' accuracy."""
    return [Expected(figure.r, figure.top1, figure.source) for figure in card.figures]


def judge(rows: Iterable[Row], expected: Iterable[Expected]) -> list[Verdict]:
    """Each expectation beside the row of its r; one whose r was not evaluated is left out."""
    measured = {str(row.r): row.top1 for row in rows}
    return [
        Verdict(each.r, each.top1, each.source, found, found.lower <= each.top1 <= found.upper)
        for each in expected
        if (found := measured.get(str(each.r))) is not None
    ]


def as_json(setting: Mapping[str, Any], evaluation: Evaluation, verdicts: Iterable[Verdict] = ()) -> dict[str, Any]:
    """Everything, as JSON takes it.

    schema       1; it changes when a field changes its meaning or goes
    command      "eval"
    …            the setting: model, weights, data, labels, limit, img_size, dtype, device, threads, workers, processes,
                 versions
    images, evaluated, batch, resumed, complete
    unreadable   one {file, reason} for each
    images_per_second   of this run, reading and all r included; or null
    rows         one for each r: the fields of Row; shares are {value, lower, upper} in per cent or points
    expected     one for each expectation: the fields of Verdict
    """
    rows = [{name: _plain(value) for name, value in row._asdict().items()} for row in evaluation.rows]
    return {"schema": SCHEMA, "command": "eval", **setting} | {
        "images": evaluation.images,
        "evaluated": evaluation.evaluated,
        "batch": evaluation.batch,
        "resumed": evaluation.resumed,
        "complete": evaluation.complete,
        "unreadable": [{"file": file, "reason": reason} for file, reason in evaluation.unreadable],
        "images_per_second": evaluation.rate,
        "rows": rows,
        "expected": [{name: _plain(value) for name, value in each._asdict().items()} for each in verdicts],
    }


def _plain(value: Any) -> Any:
    return value._asdict() if isinstance(value, Share | Quartiles) else value


# ---------------------------------------------------------------------------------------------------------- evaluation


class Step(NamedTuple):
    """How far a process is with its share."""

    done: int  # images
    images: int  # in its share
    unreadable: int  # among those done
    resumed: int  # in all shares, that an earlier run had done


class Board(NamedTuple):
    """What is known so far: a place for every image, at every r."""

    answers: Tensor  # (N, R) int32, the class, or WAITING, UNREADABLE or NOT_FINITE
    among5: Tensor  # (N, R) bool, whether the right class is among the five likeliest
    seconds: Tensor  # (batches, R) float32, of the forward pass; nan where the batch was not whole
    unreadable: dict[int, str]  # the reason for each


def evaluate(
    model: VisionTransformer,
    files: Sequence[str],
    labels: Sequence[int],
    r_values: Sequence[Schedule] = (0,),
    *,
    batch: int = 32,
    workers: int = 0,
    state: str | os.PathLike[str] | None = None,
    every: float = SAVE_EVERY,
    progress: Callable[[Step], object] | None = None,
) -> Evaluation:
    """Classify every image at every r, reading it once.

    Images are prepared as the weights were evaluated (`tomevit.transform`). A file that cannot be read is named in the
    result, and is not among the images that shares are of. Each batch is classified at one r after the other, in
    another order each time; the forward passes are timed, as they are while other processes read.

    An interrupt from the keyboard ends it with what is known until then.

    Args:
        model: on the device and in the dtype to evaluate in.
        files: images (`tomevit.data.labelled_images.labelled`); one that comes twice counts twice.
        labels: the class of each, an output of the model.
        r_values: in the order of the rows; one that comes twice is evaluated once.
        batch: images per call.
        workers: processes that read, for each process that evaluates.
        state: a file for what is known so far, in its own directory with those of other processes, named alike. If it
            is there, it is gone on from; it stays until `forget` removes it. None: an interrupted run begins anew.
        every: seconds from one writing of it to the next.
        progress: called at the start and after every batch.

    Raises:
        ValueError: there is nothing to evaluate; a label or r that the model does not have; the batch does not fit
            into memory; the state is of another evaluation.
        OSError: the state cannot be read or written, or a reading process died.
    """
    r_values = list({str(r): r for r in r_values}.values())
    _check(model, files, labels, r_values, batch)
    batch, state = min(batch, len(files)), None if state is None else Path(state)
    _, world = processes()
    key = _key(model, files, labels, r_values, batch) if state is not None or world > 1 else {}
    board = _begin(state, key, _blank(len(files), len(r_values), batch))
    resumed, interrupted = _done(board), False
    started = saved = time.perf_counter()
    try:
        with reading(), closing(_classify(model, files, labels, r_values, board, batch, workers)) as steps:
            for step in steps:
                if progress is not None:
                    progress(step)
                if state is not None and time.perf_counter() - saved >= every:
                    _save(_part(state), key, board)
                    saved = time.perf_counter()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if state is not None and _done(board):
            _save(_part(state), key, board)
    taken = time.perf_counter() - started
    board, taken = _together(state, key, board, taken, interrupted)
    return Evaluation(
        rows=_rows(model, r_values, labels, board, batch),
        images=len(files),
        evaluated=int((board.answers[:, 0] >= NOT_FINITE).sum()),
        unreadable=[
            (files[i], board.unreadable[i]) for i in (board.answers[:, 0] == UNREADABLE).nonzero().flatten().tolist()
        ],
        batch=batch,
        rate=(_done(board) - resumed) / taken if _done(board) > resumed else None,
        resumed=resumed,
        interrupted=interrupted,
    )


def forget(state: str | os.PathLike[str]) -> None:
    """Remove the state of an evaluation, if there is one, with those of its other processes."""
    for part in _parts(Path(state)):
        part.unlink()


def _check(
    model: VisionTransformer, files: Sequence[str], labels: Sequence[int], r_values: Sequence[Schedule], batch: int
) -> None:
    classes = model.config.num_classes
    if len(files) != len(labels) or not files:
        raise ValueError(f"there are {len(files)} images and {len(labels)} labels; there must be one for each")
    if not r_values or batch < 1:
        raise ValueError(f"there are {len(r_values)} r, in batches of {batch}; both must be at least 1")
    if wrong := [label for label in labels if not 0 <= label < classes]:
        raise ValueError(f"a label is {wrong[0]}, and the model has {classes} classes, from 0")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    for r in r_values:
        model.schedule(r)


# ---------------------------------------------------------------------------------------------------------- one pass


def _classify(
    model: VisionTransformer,
    files: Sequence[str],
    labels: Sequence[int],
    r_values: Sequence[Schedule],
    board: Board,
    batch: int,
    workers: int,
) -> Generator[Step]:
    """Do this process's share of what is waiting, into the board."""
    rank, world = processes()
    # In whole batches, always the same ones: the same images meet in a product however often a run is interrupted.
    waiting = (board.answers[:, 0] == WAITING).nonzero().flatten()
    chunks = sorted({i // batch for i in waiting.tolist()})[rank::world]
    mine = [i for chunk in chunks for i in range(chunk * batch, min((chunk + 1) * batch, len(files)))]
    truth, device, resumed = torch.tensor(labels), model.pos_embed.device, len(files) - len(waiting)
    done = unreadable = 0
    yield Step(done, len(mine), unreadable, resumed)
    with closing(stream(files, transform(model), batch=batch, workers=workers, indices=mine)) as batches:
        for turn, (places, images, broken) in enumerate(batches):
            if len(places):
                images = images.to(device)
                if turn == 0:
                    _answer(model, images, truth[places], r_values)  # the first calls take longer than all others
                found = _answer(model, images, truth[places], r_values, turn)
                if len(places) == batch:
                    board.seconds[places[0] // batch] = found.seconds
                board.among5[places] = found.among5
                board.answers[places] = found.answers  # at last: what is here is done
            for i, reason in broken:
                board.unreadable[i] = reason
                board.answers[i] = UNREADABLE
            done, unreadable = done + len(places) + len(broken), unreadable + len(broken)
            yield Step(done, len(mine), unreadable, resumed)


class _Answers(NamedTuple):
    answers: Tensor  # (B, R) int32
    among5: Tensor  # (B, R) bool
    seconds: Tensor  # (R,) float32


@torch.inference_mode()
def _answer(
    model: VisionTransformer, images: Tensor, labels: Tensor, r_values: Sequence[Schedule], turn: int = 0
) -> _Answers:
    """Classify a batch at every r, in an order that shifts by one with each turn."""
    found = _Answers(
        torch.empty(len(images), len(r_values), dtype=torch.int32),
        torch.empty(len(images), len(r_values), dtype=torch.bool),
        torch.empty(len(r_values)),
    )
    try:
        for step in range(len(r_values)):
            i = (step + turn) % len(r_values)
            logits, found.seconds[i] = timing.timed(partial(model, images, r_values[i]), images.device)
            likeliest = logits.float().topk(min(5, logits.shape[1])).indices.cpu()
            finite = logits.isfinite().all(1).cpu()
            found.answers[:, i] = torch.where(finite, likeliest[:, 0], NOT_FINITE)
            found.among5[:, i] = (likeliest == labels[:, None]).any(1) & finite
    except RuntimeError as error:
        if out_of_memory(error):
            raise ValueError(f"a batch of {len(images)} does not fit into the memory of {images.device}") from error
        raise
    return found


def _rows(
    model: VisionTransformer, r_values: Sequence[Schedule], labels: Sequence[int], board: Board, batch: int
) -> list[Row]:
    """The figures; none if no image could be read."""
    known = board.answers[:, 0] >= NOT_FINITE
    answers, total = board.answers[known], int(known.sum())
    if total == 0:
        return []
    right = answers == torch.tensor(labels)[known, None]
    times = [column[~column.isnan()].tolist() for column in board.seconds.T]
    seconds = [Quartiles.of(column) if column else None for column in times]
    zero = next((i for i, r in enumerate(r_values) if not any(model.schedule(r))), None)
    plain = None if zero is None else seconds[zero]
    config, rows = model.config, []
    for i, r in enumerate(r_values):
        difference = agreement = None
        if zero is not None and i != zero:
            gained, lost = (right[:, i] & ~right[:, zero]).sum(), (right[:, zero] & ~right[:, i]).sum()
            difference = paired(int(gained), int(lost), total)
            agreement = wilson(int((answers[:, i] == answers[:, zero]).sum()), total)
        taken = seconds[i]
        rows.append(
            Row(
                r=r,
                tokens=model.token_counts(r)[-1],
                gflops=flops(config, r) / 1e9,
                flop_ratio=flops(config, computed=True) / flops(config, r, computed=True),
                top1=wilson(int(right[:, i].sum()), total),
                top5=wilson(int(board.among5[known, i].sum()), total),
                difference=difference,
                agreement=agreement,
                seconds=taken,
                images_per_second=None if taken is None else batch / taken.median,
                speed_up=None if taken is None or plain is None else plain.median / taken.median,
                not_finite=int((answers[:, i] == NOT_FINITE).sum()),
            )
        )
    return rows


# --------------------------------------------------------------------------------------------------------------- state


def _blank(images: int, r_values: int, batch: int) -> Board:
    return Board(
        answers=torch.full((images, r_values), WAITING, dtype=torch.int32),
        among5=torch.zeros(images, r_values, dtype=torch.bool),
        seconds=torch.full((math.ceil(images / batch), r_values), math.nan),
        unreadable={},
    )


def _done(board: Board) -> int:
    """How many images were evaluated, or are known to be unreadable."""
    return int((board.answers[:, 0] != WAITING).sum())


def _merged(boards: Iterable[Board]) -> Board:
    """What several processes know, each of other images."""
    first, *others = boards
    for other in others:
        first = Board(
            torch.maximum(first.answers, other.answers),
            first.among5 | other.among5,
            torch.fmax(first.seconds, other.seconds),
            first.unreadable | other.unreadable,
        )
    return first


def _begin(state: Path | None, key: Mapping[str, str], blank: Board) -> Board:
    """What is known at the start, the same in all processes.

    Raises:
        ValueError, OSError: the state is damaged, or of another evaluation, or this is, in another process.
    """
    require_same(key)
    return of_first(lambda: _gone_on_from(state, key, blank))


def _gone_on_from(state: Path | None, key: Mapping[str, str], blank: Board) -> Board:
    """What earlier runs wrote, put together in one file."""
    parts = [] if state is None else _parts(state)
    board = _merged([blank, *(_load(part, key, blank) for part in parts)])
    if state is not None and parts:
        _save(state, key, board)
        for part in parts:
            if part != state:
                part.unlink()
    return board


def _part(state: Path) -> Path:
    """The file of this process."""
    rank, _ = processes()
    return state.with_name(f"{state.name}.{rank}") if rank else state


def _parts(state: Path) -> list[Path]:
    """The files of all processes that there are."""
    if not state.parent.is_dir():
        return []
    name = re.compile(re.escape(state.name) + r"(\.\d+)?")
    return sorted(path for path in state.parent.iterdir() if name.fullmatch(path.name))


def _save(path: Path, key: Mapping[str, str], board: Board) -> None:
    """Write what is known: the file is whole at any time."""
    tensors = {"answers": board.answers, "among5": board.among5, "seconds": board.seconds}
    metadata = {"evaluation": json.dumps(key), "unreadable": json.dumps(board.unreadable)}
    with new_file(path) as unfinished:
        save_file(tensors, unfinished, metadata)


def _load(path: Path, key: Mapping[str, str], blank: Board) -> Board:
    """What was known.

    Raises:
        ValueError: the file is damaged, or of another evaluation; the message says of which.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("answers", "among5", "seconds")}
            metadata = file.metadata() or {}
        was = json.loads(metadata["evaluation"])
        unreadable = {int(i): reason for i, reason in json.loads(metadata["unreadable"]).items()}
    except (SafetensorError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no state of an evaluation, or damaged: remove it to begin anew") from error
    if other := [f"{name} {was.get(name)}, not {now}" for name, now in key.items() if was.get(name) != now]:
        raise ValueError(
            f"{path} is of an evaluation with {' and '.join(other)}; go on with the same, or remove it to begin anew"
        )
    board = Board(**tensors, unreadable=unreadable)
    if [tensor.shape for tensor in board[:3]] != [tensor.shape for tensor in blank[:3]]:
        raise ValueError(f"{path} is damaged: remove it to begin anew")
    return board


def _together(
    state: Path | None, key: Mapping[str, str], board: Board, taken: float, interrupted: bool
) -> tuple[Board, float]:
    """What all processes know, and the time that the slowest took."""
    _, world = processes()
    if world == 1:
        return board, taken
    if interrupted:  # the others may be gone
        parts = [] if state is None else _parts(state)
        return _merged([board, *(_load(part, key, board) for part in parts)]), taken
    found: list[Any] = [None] * world
    dist.all_gather_object(found, (board, taken))
    return _merged(other for other, _ in found), max(other for _, other in found)


def _key(
    model: VisionTransformer, files: Sequence[str], labels: Sequence[int], r_values: Sequence[Schedule], batch: int
) -> dict[str, str]:
    """What an evaluation is of, so that none is gone on from with other images or weights."""
    weights = ((name, tensor.detach().cpu().contiguous()) for name, tensor in checkpoint.in_order(model.state_dict()))
    above = len(os.path.dirname(os.path.commonprefix(files)))  # noqa: PTH120, RUF071  # the set may be moved
    images = "\n".join(f"{label} {file[above:]}" for file, label in zip(files, labels, strict=True))
    return {
        "weights": checkpoint.digest(weights)[:12],
        "model": _digest(repr(model.config)),
        "preprocessing": _digest(repr(transform(model))),
        "images": _digest(images),
        "r": ", ".join(map(str, r_values)),
        "batch": str(batch),
        "dtype": str(model.pos_embed.dtype).removeprefix("torch."),
        "device": model.pos_embed.device.type,
        "tomevit": tomevit.__version__,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]
