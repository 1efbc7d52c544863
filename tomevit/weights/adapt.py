"""The lossy steps, each of which says what it did: positions for another grid, image channels, pooling, new heads."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tomevit.cards import Card
from tomevit.config import Config
from tomevit.models import initial_heads
from tomevit.weights.rules import Resampling

#: The fields of an architecture that may differ between weights and the model that takes them.
ADAPTABLE = ("img_size", "num_classes", "in_chans", "pool", "pool_norm", "proj_dim")


def adapt(
    card: Card, tensors: dict[str, Tensor], wanted: Config, resampling: Resampling
) -> tuple[Card, dict[str, Tensor], list[str]]:
    """Make weights fit a config of another image size, class count or number of channels.

    Args:
        card: what the tensors are.
        tensors: by native name.
        wanted: of the architecture, it differs from the card's config in fields of `ADAPTABLE` alone.
        resampling: of the positions, as the source has it.

    Returns:
        Card and tensors of the result, and one sentence for each change. New heads are drawn from torch's default
        generator.
    """
    found, changes = card.config, []
    tensors = dict(tensors)
    if wanted.grid != found.grid and found.pos_embed == "learned":
        tensors["pos_embed"] = resample_positions(
            tensors["pos_embed"], found.grid, wanted.grid, found.num_positions_prefix, resampling
        )
        changes.append(f"positions resampled from {_size(found.grid)} to {_size(wanted.grid)} patches, {resampling}")
    if wanted.in_chans != found.in_chans:
        weight = tensors["patch_embed.proj.weight"]
        tensors["patch_embed.proj.weight"] = convert_channels(weight, wanted.in_chans)
        changes.append(f"patch embedding made for {wanted.in_chans} instead of {found.in_chans} image channels")
    if wanted.proj_dim != found.proj_dim:
        if wanted.proj_dim:
            raise ValueError(f"proj_dim is {wanted.proj_dim}, and the weights have {found.proj_dim}: 0 leaves it out")
        del tensors["proj.weight"]
        tensors.pop("proj.bias", None)
        changes.append("the projection left out")
    if wanted.pool_norm != found.pool_norm:
        # MAE's fine-tuning: what was pre-trained ends in a norm of every token (facebookresearch/mae, models_vit.py).
        assert wanted.pool_norm == "after"
        tensors["fc_norm.weight"] = torch.ones_like(tensors.pop("norm.weight"))
        tensors["fc_norm.bias"] = torch.zeros_like(tensors.pop("norm.bias"))
        changes.append("the norm of every token left out, and a fresh one put after the pooling")
    other_features = wanted.num_classes and wanted.num_features != found.num_features
    if wanted.num_classes != found.num_classes or other_features:
        changes.append(_replace_heads(tensors, found, wanted))
        card = replace(card, class_names=())
    if changes or wanted.img_size != found.img_size:
        card = replace(card, figures=())  # they were measured without them
    return replace(card, config=wanted), tensors, changes


def resample_positions(
    pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int, resampling: Resampling
) -> Tensor:
    """Positions for another grid; those of prefix tokens stay as they are.

    Args:
        pos_embed: (1, P + H * W, D), floating; computed in float32 at least.
        old, new: (H, W) and (H', W'), patches along height and width.
        prefix: P, the rows in front that belong to no patch.

    Returns:
        (1, P + H' * W', D) in the same dtype.
    """
    grid = rearrange(pos_embed[:, prefix:], "1 (h w) d -> 1 d h w", h=old[0], w=old[1])
    step = [(wanted + resampling.offset) / length for wanted, length in zip(new, old, strict=True)]
    grid = F.interpolate(
        grid.to(torch.promote_types(grid.dtype, torch.float32)),
        **{"scale_factor": step} if resampling.offset else {"size": new},
        mode=resampling.mode,
        antialias=resampling.antialias,
        align_corners=resampling.align_corners,
    )
    patches = rearrange(grid, "1 d h w -> 1 (h w) d").to(pos_embed.dtype)
    return torch.cat([pos_embed[:, :prefix], patches], 1)


def convert_channels(weight: Tensor, channels: int) -> Tensor:
    """A patch embedding (D, C, p, p) for other channels: their sum for one, else repeated and scaled by C / channels.

    As timm does it (timm/models/_manipulate.py, adapt_input_conv).
    """
    old = weight.shape[1]
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-channels // old), 1, 1)[:, :channels] * (old / channels)


def _replace_heads(tensors: dict[str, Tensor], found: Config, wanted: Config) -> str:
    names = ["head", "head_dist"] if wanted.dist_token else ["head"]
    for name in names:
        tensors.pop(f"{name}.weight", None)
        tensors.pop(f"{name}.bias", None)
    plural, both = ("s", "both ") if wanted.dist_token else ("", "")
    if not wanted.num_classes:
        return f"{both}head{plural} for {found.num_classes} classes left out"
    heads = initial_heads(names, wanted)
    tensors |= heads.to(next(iter(tensors.values())).dtype).state_dict()
    if not found.num_classes:
        return f"{both}head{plural} added for {wanted.num_classes} classes, with fresh weights"
    return f"{both}head{plural} replaced: fresh weights for {wanted.num_classes} classes instead of {found.num_classes}"


def _size(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"
