"""The design of ToMe's published patch, rebuilt on our weights: what tomevit is compared with, besides timm."""

from __future__ import annotations

import math
from unittest import mock

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tomevit import VisionTransformer
from tomevit.layers import Block, add_prefix_and_positions, backends


def reference(model: VisionTransformer, images: Tensor, r: int) -> Tensor:
    """What the published patch of ToMe computes (facebookresearch/ToMe, tome/patch and tome/merge.py), on our weights.

    Attention is written out, merging gathers and scatters sums of tokens times sizes, sizes have the tokens' dtype, and
    products are computed in it.
    """
    with mock.patch.object(backends, "EMULATED", frozenset()):
        return _forward(model, images, r)


def _forward(model: VisionTransformer, images: Tensor, r: int) -> Tensor:
    config = model.config
    assert model.cls_token is not None
    x = add_prefix_and_positions(model.patch_embed(images), [model.cls_token], model.pos_embed, config.pos_embed_prefix)
    x, size = model.norm_pre(x), None
    for block, merged in zip(model.blocks, model.schedule(r), strict=True):
        assert isinstance(block, Block)
        if model.grad_checkpointing:
            x, size = checkpoint(reference_block, block, x, size, merged, use_reentrant=False)
        else:
            x, size = reference_block(block, x, size, merged)
    x = model.norm(x)
    if config.pool == "token":
        x = x[:, 0]
    elif size is None:
        x = x[:, 1:].mean(1)
    else:
        x = (x * size)[:, 1:].sum(1) / config.num_patches
    return model.head(model.fc_norm(x))


def reference_block(block: Block, x: Tensor, size: Tensor | None, r: int) -> tuple[Tensor, Tensor | None]:
    attn = block.attn
    q, k, v = rearrange(attn.qkv(block.norm1(x)), "b n (three h d) -> three b h n d", three=3, d=attn.head_dim)
    q, k = attn.q_norm(q), attn.k_norm(k)
    scores = q * attn.head_dim**-0.5 @ k.mT
    if size is not None and block.prop_attn:
        scores = scores + rearrange(size.log(), "b n 1 -> b 1 1 n")
    x = x + block.ls1(attn.proj(rearrange(scores.softmax(-1) @ v, "b h n d -> b n (h d)")))
    if r > 0:
        size = torch.ones_like(x[..., :1]) if size is None else size
        found = reference_matching(k.mean(1), r)
        x, size = reference_sums(x * size, *found), reference_sums(size, *found)
        x = x / size
    return x + block.ls2(block.mlp(block.norm2(x))), size


@torch.no_grad()
def reference_matching(key: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Among the even tokens those that stay (B, S) and those that join (B, r), and which odd ones they join (B, r)."""
    key = key / key.norm(dim=-1, keepdim=True)
    scores = key[:, ::2] @ key[:, 1::2].mT
    scores[:, 0] = -math.inf  # the class token
    best, partner = scores.max(-1)
    order = best.argsort(-1, descending=True)
    joins, stays = order[:, :r], order[:, r:].sort(-1).values
    return stays, joins, partner.gather(1, joins)


def reference_sums(x: Tensor, stays: Tensor, joins: Tensor, partner: Tensor) -> Tensor:
    even, odd = x[:, ::2], x[:, 1::2]
    stays, joins, partner = (i[..., None].expand(-1, -1, x.shape[2]) for i in (stays, joins, partner))
    odd = odd.scatter_reduce(1, partner, even.gather(1, joins), reduce="sum")
    return torch.cat([even.gather(1, stays), odd], 1)
