"""The MLP, and the two small modules that stand on a block's residual branches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tomevit import private
from tomevit.config import Config
from tomevit.layers import backends
from tomevit.layers.uninitialised import linear


class GELU(nn.GELU):
    """torch's, in place if asked."""

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        gelu = torch.ops.aten.gelu_ if inplace else torch.ops.aten.gelu
        return gelu(x, approximate=self.approximate)


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the GELU of OpenAI's CLIP."""

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        gate = torch.sigmoid(1.702 * x)
        return x.mul_(gate) if inplace else x * gate


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": GELU,
    "gelu_tanh": lambda: GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
}


INPLACE = (GELU, QuickGELU)


class Mlp(nn.Module):
    """Two linear layers with an activation between: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = linear(config.embed_dim, hidden)
        self.act = ACTIVATIONS[config.act]()
        self.fc2 = linear(hidden, config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        # A second tensor of this size would cost more than the activation; a hook may have kept the first.
        if (
            isinstance(self.act, INPLACE)
            and backends.may_overwrite(hidden)
            and not private.has_hooks(self.fc1, self.act)
        ):
            hidden = self.act(hidden, inplace=True)
        else:
            hidden = self.act(hidden)
        return self.dropout(self.fc2(self.dropout(hidden)))


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (CaiT, arXiv:2103.17239, section 2)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert config.layer_scale is not None
        self.init_value = config.layer_scale
        self.gamma = nn.Parameter(torch.empty(config.embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): in training, drops a branch for whole images, and scales up the others."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.drops = probability > 0

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.drops):
            return x
        # F.dropout would compare the probability with 0 and 1, and so have the compiler make a program for each block.
        kept = torch.rand(x.shape[0], 1, 1, device=x.device, dtype=torch.float32) >= self.probability
        return x * (kept.to(x.dtype) / (1 - self.probability))

    def extra_repr(self) -> str:
        return f"probability={self.probability:.3f}"
