"""Which implementation runs where: all choices by device, dtype or compiler. None changes a result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tomevit import private

#: Half-precision types that this processor has no instructions for.
EMULATED = private.emulated_dtypes()

#: torch 2.6 does not tell exporting from compiling.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def is_traced() -> bool:
    """Whether torch.jit.trace records a call."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def is_recorded() -> bool:
    """Whether a call becomes a program, by torch.export or torch.jit.trace, of operators that all runtimes have."""
    return is_exporting() or is_traced()


def can_look_at(x: Tensor) -> bool:
    """Whether values can be read, to be checked, without waiting for a device or entering into a program."""
    return x.device.type == "cpu" and not (torch.compiler.is_compiling() or is_traced())


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """In which a sum over many values of that floating dtype is computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merges_by_index(x: Tensor) -> bool:
    """Whether groups are averaged by indexed copies, which cost least on a CPU, or by a product.

    On a GPU indexed additions are not deterministic; the runtimes that programs are exported to have fast products
    everywhere and scatters hardly anywhere.
    """
    return x.device.type == "cpu" and not is_recorded()


def hides_merging(x: Tensor) -> bool:
    """Whether torch.compile sees matching and merging as one operator each.

    On a CPU it has nothing to gain from looking inside, and with dynamic shapes it would spend a minute on doing so.
    """
    return merges_by_index(x) and torch.compiler.is_compiling()


def may_overwrite(x: Tensor) -> bool:
    """Whether an operation on a tensor that nobody else holds had better be done in place; compilers see to it."""
    return not (torch.is_grad_enabled() or x.requires_grad or torch.compiler.is_compiling() or is_traced())


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Operations on tensors like x have the types that are asked for."""
    kind = x.device.type
    # The meta device has none; and where it is off anyway, exported programs are to have no trace of it.
    off = not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind)
    return nullcontext() if off else torch.autocast(kind, enabled=False)


def call(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x); of a plain product, as `without_emulation` has it."""
    if _emulated(x) is None or not private.is_plain(layer, nn.Linear, nn.Conv2d):
        return layer(x)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    return without_emulation(
        lambda x, *values: functional_call(layer, dict(zip(names, values, strict=True)), (x,)), x, *parameters
    )


def without_emulation(function: Callable[..., Tensor], x: Tensor, *others: Tensor | None) -> Tensor:
    """function(x, *others), in float32 where this processor has no instructions for the half-precision type asked for.

    Such types are emulated there, several times slower than float32 and with no other result than float32's, rounded:
    products of half precision are summed in float32 everywhere. What is asked for is the type of x, or autocast's.
    """
    if (dtype := _emulated(x)) is None:
        return function(x, *others)
    with torch.autocast("cpu", enabled=False):
        return function(x.float(), *(other if other is None else other.float() for other in others)).to(dtype)


def _emulated(x: Tensor) -> torch.dtype | None:
    if x.device.type != "cpu" or is_recorded():
        return None
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast and x.dtype != torch.float64 else x.dtype
    return dtype if dtype in EMULATED else None
