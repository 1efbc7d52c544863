"""The transformer block, with a merge between attention and MLP."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tomevit.config import Config
from tomevit.layers.attention import Attended, Attention
from tomevit.layers.matching import (
    MATCHINGS,
    Matching,
    bipartite_soft_matching,
    check_merge,
    find_matching,
    needs_of,
    unlikeness,
)
from tomevit.layers.merge import Tokens, merge_tokens
from tomevit.layers.mlp import MLPS, DropPath, LayerScale
from tomevit.layers.uninitialised import layer_norm
from tomevit.schedule import Step

MatchAndMerge = Callable[[Tokens, Tensor, int, int], Tokens]


def match_and_merge(matching: Matching, tokens: Tokens, attended: Attended, step: Step, num_prefix: int) -> Tokens:
    """Take away as many tokens as a step says, those that the matching finds in what it needs to look at.

    Raises:
        ValueError: a matching of the user's own takes away other tokens than so many of those that it was given.
    """
    merge = matching(
        *(_look(need, tokens, attended, step, num_prefix) for need in needs_of(matching)), step.merge, num_prefix
    )
    if matching not in MATCHINGS.values():
        check_merge(merge, matching, tokens.x.shape[1], step.merge, num_prefix)
    return merge_tokens(tokens, merge)


def _look(need: str, tokens: Tokens, attended: Attended, step: Step, num_prefix: int) -> object:
    """What `tomevit.layers.NEEDS` has by that name."""
    if need == "key":
        return attended.key.mean(1)
    if need == "importance":
        return unlikeness(tokens.x, num_prefix) if attended.importance is None else attended.importance
    if need == "size" and tokens.size is None:
        return torch.ones_like(tokens.x[:, :, :1], dtype=torch.float32)
    return getattr(tokens if need in ("x", "size") else step, need)


class Block(nn.Module):
    """Attention, merge, MLP (ToMe, figure 1)."""

    def __init__(self, config: Config, drop_path: float = 0.0) -> None:
        super().__init__()
        self.num_prefix = config.num_prefix
        self.class_token = config.class_token
        self.prop_attn = config.prop_attn
        self.matching = find_matching(config.matching)
        self.bipartite: MatchAndMerge | None = None  # another implementation of bipartite matching and merging
        self.norm1 = layer_norm(config.embed_dim, config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = LayerScale(config) if config.layer_scale is not None else nn.Identity()
        self.norm2 = layer_norm(config.embed_dim, config.norm_eps)
        self.mlp = MLPS[config.mlp](config)
        self.ls2 = LayerScale(config) if config.layer_scale is not None else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tokens, r: int | Step = 0, num_read: int | None = None) -> Tokens:
        """
        Args:
            tokens: x (B, N, D).
            r: how many tokens merge here, or a step, which may have another matching.
            num_read: if only the first tokens of the result will be read, how many: the rest is not computed.

        Returns:
            x (B, N - r, D), or (B, num_read, D).
        """
        step = r if isinstance(r, Step) else Step(r)
        matching = self.matching if step.matching is None else MATCHINGS[step.matching]
        x, size, slots, rope, weight = tokens
        counts = (size if self.prop_attn else None) if weight is None else weight
        ranked = step.total > 0 and self.class_token and "importance" in needs_of(matching)
        attended = self.attn(self.norm1(x), counts, num_read, rope, with_importance=ranked)
        x = x if num_read is None else x[:, :num_read]
        tokens = Tokens(x + self.drop_path(self.ls1(attended.x)), size, slots, rope, weight)
        if step.total > 0 and matching is bipartite_soft_matching and self.bipartite is not None and weight is None:
            tokens = self.bipartite(tokens, attended.key, step.merge, self.num_prefix)
        elif step.total > 0:
            tokens = match_and_merge(matching, tokens, attended, step, self.num_prefix)
        del attended  # the keys hold all of qkv, which need not be there when memory peaks
        x = tokens.x
        return tokens._replace(x=x + self.drop_path(self.ls2(self.mlp(self.norm2(x)))))
