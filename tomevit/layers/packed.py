"""Linear layers that multiply by a weight which lies in memory as the processor's product wants it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from tomevit import private
from tomevit.layers import backends

#: Beyond, putting the weight in order takes no share of a product that would be worth saving on every processor.
MOST_ROWS = 1023


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has products with packed weights for this device and type here."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in {torch.float32, torch.bfloat16} - backends.EMULATED
        and not private.is_wrapped(weight)
        and not weight.is_inference()  # it would not tell when others are written into it
        and private.has_onednn()
        and platform.machine() in {"x86_64", "AMD64"}
    )


class PackedLinear(nn.Linear):
    """A linear layer for inference, with a second copy of its weight in oneDNN's order.

    The copy serves where it is faster and can: up to `most_rows`, no gradient, no autocast, a device and a type that
    have such products, and the very weight that it was made of. Everywhere else, and to whoever saves, copies, compiles
    or counts its operators, this is a plain layer. Only what is written through `weight.data` goes unnoticed.
    """

    def __init__(self, layer: nn.Linear, most_rows: float = MOST_ROWS) -> None:
        _take_over(self, layer)
        self.most_rows = most_rows
        self._pack()

    def forward(self, x: Tensor) -> Tensor:
        if (
            torch.compiler.is_compiling()
            or private.is_watched()  # a FLOP counter knows torch's product alone
            or self._packed is None
            or x.numel() > self.most_rows * self.in_features
            or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, self.weight, self.bias)))
            or torch.is_autocast_enabled("cpu")
            or self._packed_of[0] is not self.weight
            or self._packed_of[1] != private.times_written(self.weight)
        ):
            return super().forward(x)
        return private.multiply_packed(x, self._packed, self.bias)

    def unpacked(self) -> nn.Linear:
        """The plain layer, on the same weight."""
        layer = nn.Linear.__new__(nn.Linear)
        _take_over(layer, self)
        del layer.most_rows, layer._packed, layer._packed_of
        return layer

    def _pack(self) -> None:
        weight = self.weight.detach()
        # No buffer: torch cannot copy, move or save such a tensor.
        self._packed: Tensor | None = private.pack_weight(weight) if can_pack(weight) else None
        self._packed_of = self.weight, private.times_written(self.weight)  # a tuple: no parameter of this module's

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._pack()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._pack()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None, "_packed_of": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack()


def _take_over(layer: nn.Module, other: nn.Module) -> None:
    """Have a new module be what another is, its hooks and the attributes that were hung on it among that."""
    nn.Module.__init__(layer)
    vars(layer).update({name: copy(value) if isinstance(value, dict) else value for name, value in vars(other).items()})
