"""Accuracy and throughput of a model at several r, in one pass over labelled images.

Every image has a place of its own in a table of answers, from which all figures are counted at the end. So nothing can
count twice, whoever computes it and however often a run is interrupted: a place that is empty is still to be done.

In processes that torchrun started, with a process group, each does its share of the batches, and all get the result.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tomevit.data.distributed import processes
from tomevit.data.images import Batch, reading, stream
from tomevit.measure.memory import explain_out_of_memory
from tomevit.measure.published import Expected
from tomevit.measure.timing import Quartiles
from tomevit.models import VisionTransformer, unwrap_replicas
from tomevit.schedule import Schedule, distinct_schedules, schedule_to_json
from tomevit.tasks.evaluate.state import (
    NOT_FINITE,
    UNREADABLE,
    WAITING,
    AnswerTable,
    blank_table,
    count_done,
    evaluation_key,
    forget,
    gather,
    resume,
    save_own_part,
    unreadable_images,
)
from tomevit.tasks.evaluate.statistics import (
    Row,
    Share,
    Verdict,
    count_rows,
    distinct_plain,
    judge,
    paired,
    wilson,
)
from tomevit.tasks.launching import batches_in_flight, launch_ahead, launch_timed, read_back, to_device
from tomevit.transform import transform

__all__ = [
    "Evaluation",
    "Expected",
    "Row",
    "Share",
    "Step",
    "Verdict",
    "as_json",
    "evaluate",
    "forget",
    "judge",
    "paired",
    "wilson",
]

SCHEMA = 1
SAVE_EVERY = 30.0  # seconds


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


def as_json(setting: Mapping[str, Any], evaluation: Evaluation, verdicts: Iterable[Verdict] = ()) -> dict[str, Any]:
    """Everything, as JSON takes it.

    schema       1; it changes when a field changes its meaning or goes
    command      "eval"
    …            the setting: model, weights, data, labels, limit, img_size, dtype, device, threads, workers, processes,
                 versions
    images, evaluated, batch, resumed, complete
    unreadable   one {file, reason} for each
    images_per_second   of this run, reading and all r included; or null
    rows         one for each r: the fields of Row; shares are {value, lower, upper} in per cent or points; r is as it
                 was asked for and plain as `model.r`, but (r, inflection) is {"mean": r, "inflection": inflection}
    expected     one for each expectation: the fields of Verdict
    """
    return {"schema": SCHEMA, "command": "eval", **setting} | {
        "images": evaluation.images,
        "evaluated": evaluation.evaluated,
        "batch": evaluation.batch,
        "resumed": evaluation.resumed,
        "complete": evaluation.complete,
        "unreadable": [{"file": file, "reason": reason} for file, reason in evaluation.unreadable],
        "images_per_second": evaluation.rate,
        "rows": [_fields_as_json(row) for row in evaluation.rows],
        "expected": [_fields_as_json(verdict) for verdict in verdicts],
    }


def _fields_as_json(found: Row | Verdict) -> dict[str, Any]:
    fields: dict[str, Any] = {
        name: value._asdict() if isinstance(value, Share | Quartiles) else value
        for name, value in found._asdict().items()
    }
    return fields | {name: schedule_to_json(fields[name]) for name in ("r", "plain") if name in fields}


class Step(NamedTuple):
    """How far a process is with its share."""

    done: int  # images
    images: int  # in its share
    unreadable: int  # among those done
    resumed: int  # in all shares, that an earlier run had done


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

    Images come in an order that is drawn by chance, always the same, so that what an interrupted run has done is a
    sample of all. They are prepared as the weights were evaluated (`tomevit.transform`). A file that cannot be read is
    named in the result, and is not among the images that shares are of. Each batch is classified at one r after the
    other, in another order each time; the forward passes are timed, as they are while other processes read.

    An interrupt from the keyboard ends it with what is known until then.

    Args:
        model: on the device and in the dtype to evaluate in.
        files: images (`tomevit.data.labelled_images.labelled`); one that comes twice counts twice.
        labels: the class of each, an output of the model.
        r_values: in the order of the rows; one that comes twice is evaluated once, and has one row. Those that only
            mean the same, as "2x" and an int may, are evaluated once too, and have a row each.
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
    model, r_values = unwrap_replicas(model), distinct_schedules(r_values)
    _check_arguments(model, files, labels, r_values, batch)
    columns = distinct_plain(model, r_values)
    batch, state = min(batch, len(files)), None if state is None else Path(state)
    _, world = processes()
    key = evaluation_key(model, files, labels, columns, batch) if state is not None or world > 1 else {}
    table = resume(state, key, blank_table(len(files), len(columns), batch))
    # From here on the place of an image is the one in an order of chance, which is the same whenever a run goes on.
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0), device="cpu").tolist()
    files, labels = [files[i] for i in order], [labels[i] for i in order]
    resumed, interrupted = count_done(table), False
    started = saved = time.perf_counter()
    try:
        with reading(), closing(_fill_table(model, files, labels, columns, table, batch, workers)) as steps:
            for step in steps:
                if progress is not None:
                    progress(step)
                if state is not None and time.perf_counter() - saved >= every:
                    save_own_part(state, key, table)
                    saved = time.perf_counter()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if state is not None and count_done(table):
            save_own_part(state, key, table)
    table, taken = gather(state, key, table, time.perf_counter() - started, interrupted)
    done = count_done(table) - resumed
    unreadable = sorted(unreadable_images(table), key=lambda found: order[found[0]])  # as they are listed
    return Evaluation(
        rows=count_rows(model, r_values, labels, table, batch),
        images=len(files),
        evaluated=int((table.answers[:, 0] >= NOT_FINITE).sum()),
        unreadable=[(files[i], reason) for i, reason in unreadable],
        batch=batch,
        rate=done / taken if done else None,
        resumed=resumed,
        interrupted=interrupted,
    )


def _check_arguments(
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


def _fill_table(
    model: VisionTransformer,
    files: Sequence[str],
    labels: Sequence[int],
    r_values: Sequence[Schedule],
    table: AnswerTable,
    batch: int,
    workers: int,
) -> Generator[Step]:
    """Do this process's share of what is waiting, into the table."""
    rank, world = processes()
    # In whole batches, always the same ones: the same images meet in a product however often a run is interrupted.
    waiting = (table.answers[:, 0] == WAITING).nonzero().flatten()
    chunks = sorted({i // batch for i in waiting.tolist()})[rank::world]
    mine = [i for chunk in chunks for i in range(chunk * batch, min((chunk + 1) * batch, len(files)))]
    truth, device, resumed = torch.tensor(labels, device="cpu"), model.device, len(files) - len(waiting)
    done = unreadable = 0
    yield Step(done, len(mine), unreadable, resumed)
    turns = itertools.count()

    def launch(read: Batch) -> Callable[[], tuple[Batch, _BatchAnswers | None]]:
        places, images, _ = read
        turn, without_images = next(turns), read._replace(images=torch.empty(0, device="cpu"))
        if not len(places):
            return lambda: (without_images, None)
        images = to_device(images, device)
        if turn == 0:
            _launch_batch(model, images, truth[places], r_values)()  # the first calls take longer than all others
        wait = _launch_batch(model, images, truth[places], r_values, turn)
        return lambda: (without_images, wait())

    with closing(stream(files, transform(model), batch=batch, workers=workers, indices=mine)) as batches:
        in_flight = batches_in_flight(device)
        for (places, _, broken), found in launch_ahead(batches, launch, in_flight=in_flight):
            if found is not None:
                if len(places) == batch:
                    table.seconds[places[0] // batch] = found.seconds
                table.among5[places] = found.among5
                table.answers[places] = found.answers  # written last: an image with an answer counts as done
            for i, reason in broken:
                table.unreadable[i] = reason
                table.answers[i] = UNREADABLE
            done, unreadable = done + len(places) + len(broken), unreadable + len(broken)
            yield Step(done, len(mine), unreadable, resumed)


class _BatchAnswers(NamedTuple):
    answers: Tensor  # (B, R) int32
    among5: Tensor  # (B, R) bool
    seconds: Tensor  # (R,) float32


@torch.inference_mode()
def _launch_batch(
    model: VisionTransformer, images: Tensor, labels: Tensor, r_values: Sequence[Schedule], turn: int = 0
) -> Callable[[], _BatchAnswers]:
    """Classify a batch at every r, in an order that shifts by one with each turn; what is returned waits for it."""
    count = len(r_values)
    five: dict[int, Tensor] = {}  # (B, 5) classes at each r; where they are not finite, no class
    taken: dict[int, Callable[[], float]] = {}
    with explain_out_of_memory(len(images), images.device):
        for i in ((step + turn) % count for step in range(count)):
            logits, taken[i] = launch_timed(partial(model, images, r_values[i]), images.device)
            likeliest = logits.float().topk(min(5, logits.shape[1])).indices
            five[i] = torch.where(logits.isfinite().all(1, keepdim=True), likeliest, NOT_FINITE)
        copied = read_back(torch.stack([five[i] for i in range(count)], 1))

    def read() -> _BatchAnswers:
        (likeliest,) = copied()  # (B, R, 5)
        among5 = (likeliest == labels[:, None, None]).any(-1)
        seconds = torch.tensor([taken[i]() for i in range(count)], dtype=torch.float32, device="cpu")
        return _BatchAnswers(likeliest[..., 0].to(torch.int32), among5, seconds)

    return read
