"""Linear layers whose weights lie in memory as the processor's matrix products want them."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tomevit.layers import backends


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has products with packed weights for this device and type here."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in {torch.float32, torch.bfloat16} - backends.EMULATED
        and torch._C._has_mkldnn
        and platform.machine() in {"x86_64", "AMD64"}
    )


class PackedLinear(nn.Module):
    """A linear layer for inference, with its weight in oneDNN's order: it need not be put in order in every call.

    Such a product has no gradient and does not follow autocast: there the weight is unpacked and multiplied as ever,
    and on another device or in a type without such products it is a plain one. Saved, copied and pickled it is plain
    too, to the bit.
    """

    _packed: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        self.weight = layer.weight.detach()  # a parameter would be registered as one

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features), unpacked at each call."""
        return self._packed.to_dense()

    @weight.setter
    def weight(self, weight: Tensor) -> None:
        # No parameter, and no buffer: torch cannot copy, move or save such a tensor.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight) if can_pack(weight) else weight

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the compiler cannot look into such a tensor
    def forward(self, x: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and x.requires_grad
        if learns or torch.is_autocast_enabled("cpu") or not self._packed.is_mkldnn:
            return backends.widened(F.linear, x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        *_, errors = args
        if f"{prefix}weight" in state_dict:
            errors.append(f"{prefix}weight is packed: load into the model itself, and optimize it then")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": self.weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.weight = self._packed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        self.weight = fn(self.weight)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
