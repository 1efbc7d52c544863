"""Token merging in a transformer of your own: the functions of tomevit.layers need tensors, not our models.

Here torch's own encoder layer gets a merge between attention and MLP. Run: python examples/own_transformer.py
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from tomevit.layers import Tokens, bipartite_soft_matching, merge_tokens, unmerge


class MergingLayer(nn.TransformerEncoderLayer):
    """torch's pre-norm encoder layer, in which r tokens merge."""

    def merge(self, tokens: Tokens, r: int, num_prefix: int) -> Tokens:
        x = self.norm1(tokens.x)
        bias = None
        if tokens.size is not None:  # proportional attention: a key that stands for more patches weighs more
            bias = tokens.size.log().mT.expand(-1, x.shape[1], -1).repeat_interleave(self.self_attn.num_heads, 0)
        attended, _ = self.self_attn(x, x, x, attn_mask=bias, need_weights=False)
        tokens = tokens._replace(x=tokens.x + attended)
        tokens = merge_tokens(tokens, bipartite_soft_matching(self.keys(x), r, num_prefix))
        return tokens._replace(x=tokens.x + self._ff_block(self.norm2(tokens.x)))

    def keys(self, x: Tensor) -> Tensor:
        """The attention keys averaged over the heads, (B, N, d): what similarity is measured on."""
        weight, bias = self.self_attn.in_proj_weight.chunk(3)[1], self.self_attn.in_proj_bias.chunk(3)[1]
        heads = self.self_attn.num_heads
        return rearrange(nn.functional.linear(x, weight, bias), "b n (h d) -> b n h d", h=heads).mean(2)


def main() -> None:
    torch.manual_seed(0)
    layers = [MergingLayer(64, 4, 128, batch_first=True, norm_first=True, dropout=0.0) for _ in range(4)]
    x = torch.randn(2, 1 + 49, 64)  # a class token, then 49 tokens
    tokens = Tokens(x, slots=torch.arange(50).expand(2, -1))
    for layer in layers:
        tokens = layer.merge(tokens, r=8, num_prefix=1)
        assert tokens.size is not None
        print(f"{tokens.x.shape[1]} tokens, the largest of {int(tokens.size.max())}")
    print("back on the grid:", tuple(unmerge(tokens).shape))


if __name__ == "__main__":
    main()
