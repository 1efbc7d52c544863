"""From tokens to the vector that the head reads."""

from __future__ import annotations

from torch import Tensor

from tomevit.layers import backends
from tomevit.layers.merge import Tokens


def mean_patch(tokens: Tokens, num_prefix: int) -> Tensor:
    """The mean over the initial patches, (B, D): each token counts as often as the patches it stands for."""
    x, size = tokens.x, tokens.size
    if num_prefix:
        x, size = x[:, num_prefix:], None if size is None else size[:, num_prefix:]
    if size is None:
        return x.mean(1)
    size = size.to(backends.at_least_float32(x.dtype))
    # Weights that sum to one; the sum of the sizes is the initial number of patches (tome.patch.mae divides by it).
    return (x * (size / size.sum(1, keepdim=True))).sum(1).to(x.dtype)
