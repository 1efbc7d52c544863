"""The MLP, and the two small modules that stand on a block's residual branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tomevit import private
from tomevit.config import Config
from tomevit.layers import backends
from tomevit.layers.packed import PackedLinear
from tomevit.layers.uninitialised import layer_norm, linear


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the GELU of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
}

#: What each activation does in place.
IN_PLACE: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    nn.GELU: lambda act, x: torch.ops.aten.gelu_(x, approximate=act.approximate),
    QuickGELU: lambda _, x: x.mul_(torch.sigmoid(1.702 * x)),
}


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
        hidden = backends.call(self.fc1, x)
        # A second tensor of this size would cost more than the activation; of other layers somebody may hold the first.
        if (
            backends.may_overwrite(hidden)
            and private.is_plain(self.act, *IN_PLACE)
            and private.is_plain(self.fc1, nn.Linear, PackedLinear)
        ):
            hidden = IN_PLACE[type(self.act)](self.act, hidden)
        else:
            hidden = self.act(hidden)
        return self.dropout(backends.call(self.fc2, self.dropout(hidden)))


class SwiGLU(nn.Module):
    """Two linear layers between which one half of the channels gates the other: (B, N, D) -> (B, N, D).

    arXiv:2002.05202; in EVA-02 with a norm before the second layer (arXiv:2303.11331).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = linear(config.embed_dim, 2 * hidden)  # the gate's rows first
        self.act = nn.SiLU()
        self.norm = layer_norm(hidden, config.norm_eps) if config.mlp_norm else nn.Identity()
        self.fc2 = linear(hidden, config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = backends.call(self.fc1, x).chunk(2, -1)
        hidden = self.norm(self.act(gate) * value)
        return self.dropout(backends.call(self.fc2, self.dropout(hidden)))


MLPS: dict[str, Callable[[Config], Mlp | SwiGLU]] = {"mlp": Mlp, "swiglu": SwiGLU}


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
