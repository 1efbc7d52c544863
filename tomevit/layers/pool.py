"""From tokens to the vector that the head reads."""

from __future__ import annotations

import torch
from torch import Tensor

from tomevit.layers.merge import Tokens


def mean_patch(tokens: Tokens, num_prefix: int) -> Tensor:
    """The mean over the initial patches, (B, D): each token counts as often as the patches it stands for."""
    x = tokens.x[:, num_prefix:]
    if tokens.size is None:
        return x.mean(1)
    size = tokens.size[:, num_prefix:].to(torch.promote_types(x.dtype, torch.float32))
    # Weights that sum to one; the sum of the sizes is the initial number of patches (tome.patch.mae divides by it).
    return (x * (size / size.sum(1, keepdim=True))).sum(1).to(x.dtype)
