"""Multi-head self-attention that knows how many patches a token stands for."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tomevit import private
from tomevit.config import Config
from tomevit.layers import backends
from tomevit.layers.packed import PackedLinear
from tomevit.layers.rotary import rotate
from tomevit.layers.uninitialised import layer_norm, linear


def attend(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Fused attention; with sizes, proportional attention: softmax(q kᵀ / √d + log size) v (ToMe, equation 1).

    Args:
        q: (B, H, Q, d).
        k, v: (B, H, N, d).
        size: (B, N, 1) float32, how many initial tokens each key stands for; None: all the same.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, H, Q, d)
    """
    bias = None if size is None else _log(size, backends.at_least_float32(q.dtype)).to(q.dtype)
    return backends.without_emulation(partial(F.scaled_dot_product_attention, dropout_p=dropout), q, k, v, bias)


def importance(q: Tensor, k: Tensor, size: Tensor | None = None) -> Tensor:
    """How much of one query's attention each token has, averaged over the heads: (B, N) float32 or float64.

    One row of scores, computed beside the fused kernel, which does not show its own.

    Args:
        q: (B, H, 1, d).
        k: (B, H, N, d).
        size: as `attend`.
    """
    dtype = backends.at_least_float32(q.dtype)
    q, k = q.detach().to(dtype), k.detach().to(dtype)
    with backends.without_autocast(q):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    if size is not None:
        scores = scores + _log(size, dtype)
    return scores.softmax(-1).mean(1).squeeze(1)


def _log(size: Tensor, dtype: torch.dtype) -> Tensor:
    return rearrange(size.to(dtype).log(), "b n 1 -> b 1 1 n")


class Attended(NamedTuple):
    """What attention answers, and what matchings look at."""

    x: Tensor  # (B, N or num_read, D)
    key: Tensor  # (B, H, N, d), not rotated
    importance: Tensor | None  # (B, N) float32 or float64, where it was asked for


class Attention(nn.Module):
    """Self-attention over all tokens, or for the first `num_read` of them only."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, head_dim = config.embed_dim, config.embed_dim // config.num_heads
        self.head_dim = head_dim
        self.qkv = linear(dim, 3 * dim, bias=config.qkv_bias)
        self.q_norm = layer_norm(head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = layer_norm(head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.rotate = partial(rotate, kind=config.rope or "")
        self.norm = layer_norm(dim, config.norm_eps) if config.attn_norm else nn.Identity()
        self.proj = linear(dim, dim)
        self.dropout = nn.Dropout(config.dropout)
        self.attn_dropout = config.attn_dropout

    def forward(
        self,
        x: Tensor,
        size: Tensor | None = None,
        num_read: int | None = None,
        rope: Tensor | None = None,
        *,
        with_importance: bool = False,
    ) -> Attended:
        """
        Args:
            x: (B, N, D).
            size: (B, N, 1) float32 for proportional attention, None for the plain one.
            num_read: if only the first tokens of the result are wanted, how many.
            rope: (B or 1, N, d) float32, where the positions are rotations.
            with_importance: say how important each token is to the first, the class token.
        """
        q, k, v = self._qkv(x) if num_read is None else self._qkv_read(x, num_read)
        q, k = self.q_norm(q), self.k_norm(k)
        turned, key = (q, k) if rope is None else (self.rotate(q, rope[:, :num_read]), self.rotate(k, rope))
        x = attend(turned, key, v, size, self.attn_dropout if self.training else 0.0)
        x = self.norm(rearrange(x, "b h n d -> b n (h d)"))
        row = importance(turned[:, :, :1], key, size) if with_importance else None
        return Attended(self.dropout(backends.call(self.proj, x)), k, row)

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = backends.call(self.qkv, x)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, d=self.head_dim).unbind()
        return q, k, v

    def _qkv_read(self, x: Tensor, num_read: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the first tokens alone. Whatever else is put in the place of the layer is called, and sees all.

        So is the layer itself in a program, whose quantisers know no part of a weight.
        """
        if backends.is_recorded() or not private.is_plain(self.qkv, nn.Linear, PackedLinear):
            q, k, v = self._qkv(x)
            return q[:, :, :num_read], k, v
        dim, weight, bias = x.shape[2], self.qkv.weight, self.qkv.bias
        q = backends.without_emulation(F.linear, x[:, :num_read], weight[:dim], None if bias is None else bias[:dim])
        kv = backends.without_emulation(F.linear, x, weight[dim:], None if bias is None else bias[dim:])
        k, v = rearrange(kv, "b n (two h d) -> two b h n d", two=2, d=self.head_dim).unbind()
        return rearrange(q, "b n (h d) -> b h n d", d=self.head_dim), k, v
