"""Linear layers that multiply few rows by a weight which lies in memory as the processor's product wants it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tomevit.layers import backends
from tomevit.layers.bare import Linear

#: With this many rows, putting the weight in order takes no share of a product that would be worth saving.
MANY_ROWS = 1024


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has products with packed weights for this device and type here."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in {torch.float32, torch.bfloat16} - backends.EMULATED
        and torch._C._has_mkldnn
        and platform.machine() in {"x86_64", "AMD64"}
    )


class PackedLinear(Linear):
    """A linear layer for inference, with a second copy of its weight in oneDNN's order.

    The copy serves where it is faster and can: few rows, no gradient, no autocast, a device and a type that have such
    products. Everywhere else, and to whoever saves, copies or compiles it, this is a plain layer. What is written to
    the weight in place goes unnoticed.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self._pack()

    def forward(self, x: Tensor) -> Tensor:
        if (
            torch.compiler.is_compiling()
            or self._packed is None
            or x.numel() >= MANY_ROWS * self.in_features
            or (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad))
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")

    def _pack(self) -> None:
        weight = self.weight.detach()
        # No buffer: torch cannot copy, move or save such a tensor.
        self._packed: Tensor | None = torch.ops.mkldnn._reorder_linear_weight(weight) if can_pack(weight) else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._pack()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._pack()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack()
