"""What a model costs, counted from its config: a forward pass, and parameters."""

from __future__ import annotations

from itertools import pairwise

from tomevit.config import Config
from tomevit.schedule import Schedule, token_counts


def flops(config: Config, r: Schedule = 0, *, computed: bool = False) -> int:
    """Multiply-adds of the matrix products for one image, as the ToMe paper counts them, or as they are computed.

    The patch embedding, and per block with N tokens in, N' behind the merge and D channels 4ND² + 2N²D for attention
    and 8N'D² for an MLP of ratio 4. Heads, norms, attention pooling and the merge itself are not counted.

    Args:
        config: the architecture.
        r: as a model takes it.
        computed: leave out of the last block what `VisionTransformer.forward` leaves out: where the head reads the
            class token, only that one has queries, a projection and an MLP there, and nothing merges. By the paper's
            count ViT-B/16 with r = 16 costs half of what it costs without merging; what is computed is 1.88 times
            less, since r = 0 saves more in its last block of 197 tokens than r = 16 in one of 21. A speed-up can only
            be judged by what is computed.
    """
    return sum(flops_by_step(config, r, computed=computed))


def flops_by_step(config: Config, r: Schedule = 0, *, computed: bool = False) -> tuple[int, ...]:
    """What `flops` adds up: of the patch embedding, and of each block: depth + 1 numbers."""
    dim, mlp = config.embed_dim, config.embed_dim * config.mlp_hidden * (3 if config.mlp == "swiglu" else 2)
    counts = token_counts(r, config.depth, config.num_tokens, config.num_prefix)
    blocks = [(entering, entering, leaving) for entering, leaving in pairwise(counts)]
    if computed and config.num_read is not None:
        blocks[-1] = (counts[-2], config.num_read, config.num_read)
    return (
        config.num_patches * config.patch_size**2 * config.in_chans * dim,
        *(
            2 * (keys + queries) * dim**2 + 2 * queries * keys * dim + leaving * mlp
            for keys, queries, leaving in blocks
        ),
    )


def count_parameters(config: Config) -> int:
    """The number of a model's parameters, tokens and positions among them."""
    dim, norm = config.embed_dim, 2 * config.embed_dim
    attention = 4 * dim**2 + (4 if config.qkv_bias else 1) * dim
    block = attention + 2 * norm + _count_mlp(config, config.mlp_hidden, gated=config.mlp == "swiglu")
    block += 2 * config.mlp_hidden if config.mlp_norm else 0
    block += 4 * config.head_dim if config.qk_norm else 0
    block += norm if config.attn_norm else 0
    block += norm if config.layer_scale is not None else 0
    patches = config.patch_size**2 * config.in_chans * dim + (0 if config.pre_norm else dim)
    tokens = (config.num_prefix + config.num_positions) * dim
    norms = norm if config.pre_norm else 0
    norms += {"before": norm, "after": 2 * config.num_pooled, "none": 0}[config.pool_norm]
    pool = 0
    if config.pool == "map":
        pool = dim + 4 * dim**2 + 4 * dim + norm
        pool += _count_mlp(config, int(dim * (config.pool_mlp_ratio or config.mlp_ratio)), gated=False)
    proj = (config.num_pooled + config.proj_bias) * config.proj_dim
    heads = (1 + config.dist_token) * (config.num_features + 1) * config.num_classes
    return patches + tokens + norms + config.depth * block + pool + proj + heads


def _count_mlp(config: Config, hidden: int, *, gated: bool) -> int:
    first = 2 * hidden if gated else hidden
    return (config.embed_dim + 1) * first + (hidden + 1) * config.embed_dim
