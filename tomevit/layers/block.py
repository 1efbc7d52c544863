"""The transformer block, with a merge between attention and MLP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from tomevit.config import Config
from tomevit.layers.attention import Attention
from tomevit.layers.matching import MATCHINGS, Matching, check_merge, find_matching
from tomevit.layers.merge import Tokens, merge_tokens
from tomevit.layers.mlp import MLPS, DropPath, LayerScale
from tomevit.layers.uninitialised import layer_norm

MatchAndMerge = Callable[[Tokens, Tensor, int, int], Tokens]


def match_and_merge(matching: Matching, tokens: Tokens, key: Tensor, r: int, num_prefix: int) -> Tokens:
    """Merge r tokens, those that the matching finds similar in the keys (B, H, N, d), averaged over the heads.

    Raises:
        ValueError: a matching of the user's own merges other tokens than r of those that it was given.
    """
    merge = matching(key.mean(1), r, num_prefix)
    if matching not in MATCHINGS.values():
        check_merge(merge, matching, key.shape[2], r, num_prefix)
    return merge_tokens(tokens, merge)


class Block(nn.Module):
    """Attention, merge, MLP (ToMe, figure 1)."""

    def __init__(self, config: Config, drop_path: float = 0.0) -> None:
        super().__init__()
        self.num_prefix = config.num_prefix
        self.prop_attn = config.prop_attn
        self.match_and_merge: MatchAndMerge = partial(match_and_merge, find_matching(config.matching))
        self.norm1 = layer_norm(config.embed_dim, config.norm_eps)
        self.attn = Attention(config)
        self.ls1 = LayerScale(config) if config.layer_scale is not None else nn.Identity()
        self.norm2 = layer_norm(config.embed_dim, config.norm_eps)
        self.mlp = MLPS[config.mlp](config)
        self.ls2 = LayerScale(config) if config.layer_scale is not None else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tokens, r: int = 0, num_read: int | None = None) -> Tokens:
        """
        Args:
            tokens: x (B, N, D).
            r: how many tokens merge here.
            num_read: if only the first tokens of the result will be read, how many: the rest is not computed.

        Returns:
            x (B, N - r, D), or (B, num_read, D).
        """
        x, size, slots, rope = tokens
        attended, key = self.attn(self.norm1(x), size if self.prop_attn else None, num_read, rope)
        x = x if num_read is None else x[:, :num_read]
        tokens = Tokens(x + self.drop_path(self.ls1(attended)), size, slots, rope)
        if r > 0:
            tokens = self.match_and_merge(tokens, key, r, self.num_prefix)
        del attended, key  # the keys hold all of qkv, which need not be there when memory peaks
        x = tokens.x
        return tokens._replace(x=x + self.drop_path(self.ls2(self.mlp(self.norm2(x)))))
