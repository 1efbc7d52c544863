"""From tokens to one vector. Every pooling counts a token as often as the patches that it stands for."""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn

from tomevit.config import Config
from tomevit.layers import backends
from tomevit.layers.attention import Attention, attend
from tomevit.layers.merge import Tokens
from tomevit.layers.mlp import Mlp
from tomevit.layers.uninitialised import layer_norm


def mean_patch(tokens: Tokens, num_prefix: int) -> Tensor:
    """The mean over the initial patches, (B, D): each token counts as often as the patches it stands for."""
    x, size = tokens.x, tokens.size if tokens.weight is None else tokens.weight
    if num_prefix:
        x, size = x[:, num_prefix:], None if size is None else size[:, num_prefix:]
    if size is None:
        return x.mean(1)
    size = size.to(backends.at_least_float32(x.dtype))
    # Weights that sum to one; the sum of the sizes is the initial number of patches (tome.patch.mae divides by it).
    return (x * (size / size.sum(1, keepdim=True))).sum(1).to(x.dtype)


def token_beside_mean(tokens: Tokens, num_prefix: int) -> Tensor:
    """The class token and the mean patch, (B, 2D), as DINOv2's linear heads read them; registers are in neither."""
    return torch.cat([tokens.x[:, 0], mean_patch(tokens, num_prefix)], -1)


def pool(tokens: Tokens, config: Config) -> Tensor:
    """The vector of each image by a pooling without weights: (B, config.num_pooled)."""
    if config.pool == "token":
        return tokens.x[:, 0]
    return (mean_patch if config.pool == "avg" else token_beside_mean)(tokens, config.num_prefix)


class AttentionPool(Attention):
    """Attention of one learned query to all tokens, and an MLP: Tokens to (B, D).

    As SigLIP has it (google-research/big_vision, models/vit.py, `MAPHead`). The log of the sizes is added to the scores
    always: without it a merged token would count as one patch.
    """

    def __init__(self, config: Config) -> None:
        heads, ratio = config.pool_heads or config.num_heads, config.pool_mlp_ratio or config.mlp_ratio
        config = replace(config, rope=None, qkv_bias=True, qk_norm=False, attn_norm=False)
        config = replace(config, num_heads=heads, mlp_ratio=ratio, mlp="mlp", mlp_norm=False)
        super().__init__(config)
        self.latent = nn.Parameter(torch.empty(1, 1, config.embed_dim))
        self.norm = layer_norm(config.embed_dim, config.norm_eps)
        self.mlp = Mlp(config)

    def forward(self, tokens: Tokens) -> Tensor:  # type: ignore[override]
        latent = self.latent.expand(tokens.x.shape[0], -1, -1)
        q, k, v = self._qkv_read(torch.cat([latent, tokens.x], 1), 1)
        x = attend(q, k[:, :, 1:], v[:, :, 1:], tokens.size if tokens.weight is None else tokens.weight)
        x = backends.call(self.proj, rearrange(x, "b h n d -> b n (h d)"))
        return (x + self.mlp(self.norm(x)))[:, 0]
