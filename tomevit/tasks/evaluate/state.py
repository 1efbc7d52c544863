"""The table of answers of an evaluation, and the file that keeps it while the evaluation runs.

Of several processes each has a file of its own beside that of the first, named alike: what they know is put together
when a run begins and when it ends.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tomevit.data.distributed import broadcast_from_rank0, processes, require_same
from tomevit.models import VisionTransformer
from tomevit.opening import open_file
from tomevit.output import new_file
from tomevit.schedule import Schedule, format_schedule
from tomevit.transform import transform
from tomevit.version import __version__
from tomevit.weights import checkpoint

#: What stands in the table of answers in place of a class, in this order: what is known is larger than what is not.
WAITING, UNREADABLE, NOT_FINITE = -3, -2, -1


class AnswerTable(NamedTuple):
    """What is known so far: a place for every image, at every r."""

    answers: Tensor  # (N, R) int32, the class, or WAITING, UNREADABLE or NOT_FINITE
    among5: Tensor  # (N, R) bool, whether the right class is among the five likeliest
    seconds: Tensor  # (batches, R) float32, of the forward pass; nan where the batch was not whole
    unreadable: dict[int, str]  # the reason for each


def blank_table(images: int, r_values: int, batch: int) -> AnswerTable:
    return AnswerTable(
        answers=torch.full((images, r_values), WAITING, dtype=torch.int32, device="cpu"),
        among5=torch.zeros(images, r_values, dtype=torch.bool, device="cpu"),
        seconds=torch.full((math.ceil(images / batch), r_values), math.nan, dtype=torch.float32, device="cpu"),
        unreadable={},
    )


def count_done(table: AnswerTable) -> int:
    """How many images were evaluated, or are known to be unreadable."""
    return int((table.answers[:, 0] != WAITING).sum())


def unreadable_images(table: AnswerTable) -> list[tuple[int, str]]:
    """The places of the images that could not be read, in order, each with the reason."""
    return [(place, table.unreadable[place]) for place in _unreadable_places(table)]


def _unreadable_places(table: AnswerTable) -> list[int]:
    places: list[int] = (table.answers[:, 0] == UNREADABLE).nonzero().flatten().tolist()
    return places


def _merge(tables: Iterable[AnswerTable]) -> AnswerTable:
    """One table of what several processes know, each of other images."""
    first, *others = tables
    for other in others:
        first = AnswerTable(
            torch.maximum(first.answers, other.answers),
            first.among5 | other.among5,
            torch.fmax(first.seconds, other.seconds),
            first.unreadable | other.unreadable,
        )
    return first


def resume(state: Path | None, key: Mapping[str, str], blank: AnswerTable) -> AnswerTable:
    """What earlier runs of the same evaluation have found, the same in all processes.

    Args:
        state: the file; None: there is none.
        key: what the evaluation is of (`evaluation_key`).
        blank: the table without answers.

    Raises:
        ValueError, OSError: the state is damaged, or of another evaluation, or this is, in another process.
    """
    require_same(key)
    return broadcast_from_rank0(lambda: _join_parts(state, key, blank))


def _join_parts(state: Path | None, key: Mapping[str, str], blank: AnswerTable) -> AnswerTable:
    """What earlier runs wrote, put together in one file."""
    parts = [] if state is None else _parts(state)
    table = _merge([blank, *(_read(part, key, blank) for part in parts)])
    if state is not None and parts:
        _write(state, key, table)
        for part in parts:
            if part != state:
                part.unlink()
    return table


def _own_part(state: Path) -> Path:
    """The file of this process."""
    rank, _ = processes()
    return state.with_name(f"{state.name}.{rank}") if rank else state


def _parts(state: Path) -> list[Path]:
    """The files of all processes that there are."""
    if not state.parent.is_dir():
        return []
    name = re.compile(re.escape(state.name) + r"(\.\d+)?")
    return sorted(path for path in state.parent.iterdir() if name.fullmatch(path.name))


def save_own_part(state: Path, key: Mapping[str, str], table: AnswerTable) -> None:
    """Write what this process knows."""
    _write(_own_part(state), key, table)


def forget(state: str | os.PathLike[str]) -> None:
    """Remove the state of an evaluation, if there is one, with those of its other processes."""
    for part in _parts(Path(state)):
        part.unlink()


def _write(path: Path, key: Mapping[str, str], table: AnswerTable) -> None:
    """Write what is known: the file is whole at any time."""
    tensors = {"answers": table.answers, "among5": table.among5, "seconds": table.seconds}
    metadata = {"evaluation": json.dumps(key), "unreadable": json.dumps(table.unreadable)}
    with new_file(path) as draft:
        save_file(tensors, draft, metadata)


def _read(path: Path, key: Mapping[str, str], blank: AnswerTable) -> AnswerTable:
    """What was known.

    Raises:
        ValueError: the file is damaged, or of another evaluation; the message says of which.
    """
    try:
        with open_file(path), torch.device("cpu"), safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("answers", "among5", "seconds")}
            metadata = file.metadata() or {}
        # Those that went through the images as they are listed did not say so.
        was = {"order": "as listed"} | json.loads(metadata["evaluation"])
        unreadable = {int(i): str(reason) for i, reason in json.loads(metadata["unreadable"]).items()}
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no state of an evaluation, or damaged: remove it to begin anew") from error
    if other := [f"{name} {was.get(name)}, not {now}" for name, now in key.items() if was.get(name) != now]:
        raise ValueError(
            f"{path} is of an evaluation with {' and '.join(other)}; go on with the same, or remove it to begin anew"
        )
    table = AnswerTable(**tensors, unreadable=unreadable)
    if _forms(table) != _forms(blank) or any(place not in unreadable for place in _unreadable_places(table)):
        raise ValueError(f"{path} is damaged: remove it to begin anew")
    return table


def _forms(table: AnswerTable) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in table[:3]]


def gather(
    state: Path | None, key: Mapping[str, str], table: AnswerTable, taken: float, interrupted: bool
) -> tuple[AnswerTable, float]:
    """What all processes know, and the time that the slowest took."""
    _, world = processes()
    if world == 1:
        return table, taken
    if interrupted:  # the others may be gone
        parts = [] if state is None else _parts(state)
        return _merge([table, *(_read(part, key, table) for part in parts)]), taken
    found: list[Any] = [None] * world
    dist.all_gather_object(found, (table, taken))
    return _merge(other for other, _ in found), max(other for _, other in found)


def evaluation_key(
    model: VisionTransformer, files: Sequence[str], labels: Sequence[int], r_values: Sequence[Schedule], batch: int
) -> dict[str, str]:
    """What an evaluation is of, so that none is gone on from with other images or weights."""
    above = len(os.path.dirname(os.path.commonprefix(files)))  # noqa: PTH120, RUF071  # the set may be moved
    images = "\n".join(f"{label} {file[above:]}" for file, label in zip(files, labels, strict=True))
    return {
        "weights": checkpoint.digest_of(model.state_dict())[:12],
        "model": _digest(repr(model.config)),
        "preprocessing": _digest(repr(transform(model))),
        "images": _digest(images),
        "order": "by chance",  # in which they stand in the table, the same for as many images
        "r": ", ".join(map(format_schedule, r_values)),
        "batch": str(batch),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "tomevit": __version__,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]
