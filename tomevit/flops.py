"""What a model costs, counted from its config, and which r makes it cost so much."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

from tomevit.config import Config, Preset
from tomevit.errors import join_with_or
from tomevit.schedule import Schedule, Step, check_schedule, entries, resolve_steps, token_counts
from tomevit.words import Words, format_words, parse_words, shaped


def flops(config: Config, r: Schedule = 0, *, computed: bool = False) -> int:
    """Multiply-adds of the matrix products for one image, as the ToMe paper counts them, or as they are computed.

    `tomevit.flops` says what is counted.

    Args:
        config: the architecture.
        r: as a model takes it, but for presets, which are a card's.
        computed: as they are computed.
    """
    return sum(flops_by_step(config, r, computed=computed))


def format_flops(count: float) -> str:
    """Multiply-adds in words, as in "17.6 GFLOPs"."""
    return f"{count / 1e9:.3g} GFLOPs" if count >= 1e9 else f"{count / 1e6:.3g} MFLOPs"


def flops_by_step(config: Config, r: Schedule = 0, *, computed: bool = False) -> tuple[int, ...]:
    """What `flops` adds up: of the patch embedding, and of each block: depth + 1 numbers."""
    dim, mlp = config.embed_dim, config.embed_dim * config.mlp_hidden * (3 if config.mlp == "swiglu" else 2)
    plain = plain_schedule(r, config)
    counts = token_counts(plain, config.depth, config.num_tokens, config.num_prefix, config.grid)
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


def plain_schedule(r: object, config: Config, presets: Sequence[Preset] = ()) -> Schedule:
    """An r in plain numbers, for whole images of the config's size.

    Of "2x" it is the least int that needs at least so many times fewer FLOPs, as they are computed; of "60%" the least
    that needs at most that share. ("2x", inflection) is the least such line. "2x late" and "2x deferred" merge the
    fewest tokens of that shape, "1.5x grid" merges 2x2 neighbours once, as late as it can, and "2x pitome" is the least
    constant r of that matching. A preset is what the card has by that name.

    Args:
        r: as a model takes it.
        config: the architecture.
        presets: those of its card.

    Returns:
        r itself where it has no words; else an int, (r, inflection), or a list with one entry per block.

    Raises:
        ValueError: r is of no known form, or cannot be reached, or is no preset of this model; the message says what
            can be.
    """
    r = check_schedule(r, config.depth)
    if not isinstance(r, str):
        return r
    words = parse_words(r)
    if words.preset is not None:
        return _find_preset(words.preset, config, presets)
    if words.ratio is not None:
        r = _least(r, words, words.ratio, config)
    return _entries(r, config) if isinstance(r, str) else r


def plain_steps(r: object, config: Config, presets: Sequence[Preset] = ()) -> tuple[Step, ...]:
    """What happens in each block at an r of any form, for whole images of the config's size.

    Arguments and errors as `plain_schedule`; neighbours that cannot merge are an error too.
    """
    return _resolve(plain_schedule(r, config, presets), config)


def _entries(r: Schedule, config: Config) -> list[int | str]:
    return list(entries(_resolve(r, config)))


def _resolve(r: Schedule, config: Config) -> tuple[Step, ...]:
    return resolve_steps(r, config.depth, config.num_tokens, config.num_prefix, config.grid)


def _least(asked: str, words: Words, ratio: float, config: Config) -> Schedule:
    """The least r of these words' kind that needs so many times fewer FLOPs."""
    depth, whole = config.depth, flops(config, computed=True)
    line = "" if words.inflection is None else f",{words.inflection!r}"
    matching = "" if words.matching is None else f" {words.matching}"

    def kind(n: int) -> Schedule:
        if words.matching == "grid":
            return [0] * (depth - 1 - n) + ["grid"] + [0] * n
        if words.shape is not None:
            counts = shaped(n, depth, words.shape, words.number)
            return _entries([Step(count, matching=words.matching).entry for count in counts], config)
        return check_schedule(f"{n}{line}{matching}", depth)

    def saves(n: int) -> float:
        return whole / flops(config, kind(n), computed=True)

    # Beyond, every block that may merges all that it can, and further ones change nothing.
    most = config.num_patches if words.shape is None and words.inflection is None else 10**9
    most = depth - 1 if words.matching == "grid" else most
    found = bisect_left(range(most + 1), ratio, key=saves)
    if found <= most:
        return kind(found)
    height, width = config.img_size
    best = int(100 * saves(most)) / 100
    raise ValueError(
        f"r = {asked!r} cannot be reached: at {height}x{width} pixels this model can have {best:.2f} times fewer FLOPs "
        f"so, as they are computed: {format_words(words._replace(amount=f'{best:g}x'))!r} can be had"
    )


def _find_preset(name: str, config: Config, presets: Sequence[Preset]) -> Schedule:
    for preset in presets:
        if preset.name != name:
            continue
        if not preset.fits(config):
            raise ValueError(
                f"r = {name!r} is for {preset.num_tokens} tokens and {len(preset.r)} blocks, and this model has "
                f"{config.num_tokens} and {config.depth}: '2x diffrate' and the like fit any"
            )
        return list(preset.r)
    known = join_with_or([repr(preset.name) for preset in presets]) if presets else "none"
    raise ValueError(f"r = {name!r} is no preset of this model; it has {known}")


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
