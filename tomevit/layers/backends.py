"""Which implementation runs where: all choices by device, dtype or compiler. None changes a result."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tomevit import private

#: Half-precision types that this processor has no instructions for.
EMULATED = private.emulated_dtypes()

#: torch 2.6 does not tell exporting from compiling.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def merges_by_index(x: Tensor) -> bool:
    """Whether groups are averaged by indexed copies, which cost least on a CPU, or by a product.

    On a GPU indexed additions are not deterministic; the runtimes that programs are exported to have fast products
    everywhere and scatters hardly anywhere.
    """
    return x.device.type == "cpu" and not is_exporting()


def hides_merging(x: Tensor) -> bool:
    """Whether torch.compile sees matching and merging as one operator each.

    On a CPU it has nothing to gain from looking inside, and with dynamic shapes it would spend a minute on doing so.
    """
    return merges_by_index(x) and torch.compiler.is_compiling()


def may_overwrite(x: Tensor) -> bool:
    """Whether an operation on a tensor that nobody else holds had better be done in place; compilers see to it."""
    return not (torch.is_grad_enabled() or x.requires_grad or torch.compiler.is_compiling())


def without_emulation(function: Callable[..., Tensor], x: Tensor, *others: Tensor | None) -> Tensor:
    """function(x, *others), in float32 where this processor has no instructions for the half-precision type asked for.

    Such types are emulated there, several times slower than float32 and with no other result than float32's, rounded:
    products of half precision are summed in float32 everywhere. What is asked for is the type of x, or autocast's.
    """
    if x.device.type != "cpu" or is_exporting():
        return function(x, *others)
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast and x.dtype != torch.float64 else x.dtype
    if dtype not in EMULATED:
        return function(x, *others)
    with torch.autocast("cpu", enabled=False):
        return function(x.float(), *(other if other is None else other.float() for other in others)).to(dtype)
