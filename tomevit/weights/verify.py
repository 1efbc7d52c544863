"""Whether a file of ours is whole, and whether it holds what its source does."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tomevit.cards import Card
from tomevit.config import Config
from tomevit.errors import AmbiguousCheckpointError, CheckpointError, check_path
from tomevit.flops import count_parameters, flops
from tomevit.schedule import Schedule
from tomevit.weights import checkpoint, convert, shards, sources
from tomevit.weights.reading import explain_lack_of_memory
from tomevit.weights.rules import enumerate_names

#: Values of an image, and of what is computed of it at once, with which a forward pass is tried: a file of a few MB can
#: describe a model for images of any size.
MOST_VALUES = 2**24
#: Multiply-adds that are tried; and more for each parameter, which takes part once for each of a few hundred tokens.
MOST_FLOPS, FLOPS_PER_PARAMETER = 2**36, 2000


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    passed: bool
    found: str


def verify(
    path: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    key: str | None = None,
    prefix: str | None = None,
) -> tuple[Check, ...]:
    """Look at all that can be wrong with a file of tomevit's own.

    Checks, in order: that it describes itself and can be read; names and shapes of its tensors; that its tensors have
    the digest that it records; that all values are finite; a forward pass at r = 0, and at the r that the weights were
    trained with. What depends on a failed check is not done.

    Args:
        path: the file.
        against: a source, as `tomevit.convert` takes it, that every tensor must agree with.
        key: where in that source the state dict lies, if it holds several.
        prefix: what the model's names begin with there, if it holds several models.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError, DownloadError: the source to compare with cannot be read.
    """
    check_path("path", path)
    return tuple(_run_checks(Path(path), against, key, prefix))


def _run_checks(
    path: Path, against: str | os.PathLike[str] | None, key: str | None, prefix: str | None
) -> Iterator[Check]:
    try:
        with checkpoint.open_own_file(path) as file:
            (card, recorded), tensors = checkpoint.read_open(file, fitting=False)
            sha256, size = shards.OpenFiles(path, file).sha256(), file.tell()
    except CheckpointError as error:
        yield Check("file", False, str(error))
        return
    yield Check("file", True, f"{card.full_name or 'unnamed'}, {size} bytes, sha256 {sha256}")

    try:
        checkpoint.check_structure(card.config, tensors, path)
    except CheckpointError as error:
        yield Check("structure", False, str(error))
        return
    parameters = sum(tensor.numel() for tensor in tensors.values())
    yield Check("structure", True, f"{len(tensors)} tensors, {parameters} parameters: names and shapes as they must be")

    found = checkpoint.digest_of(tensors)
    if recorded is None:
        yield Check("digest", True, "none recorded, the file is of format version 1")
    else:
        differ = f"the tensors have {found}, and had {recorded} when they were written: the file was damaged or changed"
        yield Check("digest", found == recorded, f"sha256 {found}" if found == recorded else differ)

    bad = [name for name, tensor in tensors.items() if not convert.is_finite(tensor)]
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}))
    yield Check("values", not bad, f"NaN or infinity in {enumerate_names(bad)}" if bad else f"{dtypes}, all finite")
    if bad:
        return

    if (why := _explain_cost(card.config)) is not None:
        yield Check("forward", False, f"{why}: too many to try")
        return
    model = checkpoint.assemble(card, tensors, path).float()
    generator = torch.Generator().manual_seed(0)
    shape = (1, card.config.in_chans, *card.config.img_size)
    images = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    for r in [0] if card.r == 0 else [0, card.r]:
        yield _check_forward(model, images, r)

    if against is not None:
        yield _compare_with_source(card, tensors, against, key, prefix)


def _explain_cost(config: Config) -> str | None:
    """What a forward pass has too much of to be tried; None: nothing."""
    values = math.prod(config.img_size) * config.in_chans
    if values > MOST_VALUES:
        return f"an image of its size has {values:,} values"
    hidden = config.num_tokens * int(config.embed_dim * max(3, config.mlp_ratio))
    if hidden > MOST_VALUES or config.num_tokens**2 > 4 * MOST_VALUES:
        return f"an image of its size has {config.num_tokens:,} tokens"
    if (cost := flops(config)) > MOST_FLOPS + FLOPS_PER_PARAMETER * count_parameters(config):
        return f"an image of its size takes {cost:,} multiply-adds"
    return None


def _check_forward(model: torch.nn.Module, images: Tensor, r: Schedule) -> Check:
    with explain_lack_of_memory("what a forward pass takes"), torch.inference_mode():
        answer = model(images, r)
    found = f"{tuple(answer.shape)}, from {answer.min():.4g} to {answer.max():.4g}"
    return Check(f"forward at r = {r}", convert.is_finite(answer), found)


def _compare_with_source(
    card: Card, tensors: dict[str, Tensor], against: str | os.PathLike[str], key: str | None, prefix: str | None
) -> Check:
    with sources.locate(against) as located:
        read = partial(convert.read_weights, located, model=card, key=key, prefix=prefix, img_size=card.config.img_size)
        try:
            theirs = read()
        except AmbiguousCheckpointError as error:
            if error.option != "format":
                raise
            theirs = read(format=error.choices[0])  # as good as any: they differ in how they resample
    source = {
        name: tensor.to(tensors[name].dtype) if name in tensors else tensor for name, tensor in theirs.tensors.items()
    }
    differ, values = [], []
    for name in sorted(tensors.keys() | source.keys()):
        if name not in tensors or name not in source:
            differ.append(f"{name} is only in {'the source' if name in source else 'the file'}")
        elif tensors[name].shape != source[name].shape:
            differ.append(f"{name} is {tuple(tensors[name].shape)}, and {tuple(source[name].shape)} in the source")
        elif not torch.equal(tensors[name], source[name]):
            largest = (tensors[name].double() - source[name].double()).abs().max().item()
            values.append(f"{name} differs by up to {largest:.3g}")
    if differ := differ + values:
        more = f"; and {len(differ) - 6} more" if len(differ) > 6 else ""
        return Check("source", False, "; ".join(differ[:6]) + more)
    stored, given = (next(iter(each.values())).dtype for each in (tensors, theirs.tensors))
    rounded = "" if stored == given else " once rounded"
    return Check("source", True, f"all {len(tensors)} tensors agree with {os.fspath(against)} to the bit{rounded}")
