"""The cost of a forward pass, counted."""

from __future__ import annotations

from itertools import pairwise

from tomevit.config import Config, Schedule
from tomevit.layers.schedule import token_counts


def flops(config: Config, r: Schedule = 0) -> int:
    """Multiply-adds of the matrix products for one image, as the ToMe paper counts them.

    The patch embedding, and per block with N tokens in, N' behind the merge and D channels 4ND² + 2N²D for attention
    and 8N'D² for an MLP of ratio 4. Heads, norms, the merge itself, and what is saved where only the class token is
    read, are not counted.
    """
    dim = config.embed_dim
    total = config.num_patches * config.patch_size**2 * config.in_chans * dim
    for entering, leaving in pairwise(token_counts(r, config.depth, config.num_tokens, config.num_prefix)):
        total += 4 * entering * dim**2 + 2 * entering**2 * dim
        total += 2 * leaving * dim * int(dim * config.mlp_ratio)
    return total
