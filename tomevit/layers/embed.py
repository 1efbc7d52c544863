"""From images to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tomevit.config import Config
from tomevit.errors import check_type
from tomevit.layers import backends

PREPARE = "tomevit.transform(model)(image)[None] makes it of a PIL image"


class PatchEmbed(nn.Module):
    """One token per patch, by a linear map of its pixels: (B, C, H, W) -> (B, N, D), row by row."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.proj = nn.Conv2d(
            config.in_chans,
            config.embed_dim,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=not config.pre_norm,
        )

    def forward(self, images: Tensor) -> Tensor:
        return backends.call(self.proj, images).flatten(2).transpose(1, 2)  # (B, D, H, W) -> (B, H W, D)


def add_prefix_and_positions(
    patches: Tensor, prefix: Sequence[Tensor], pos_embed: Tensor | None, pos_embed_prefix: bool | Literal["class"]
) -> Tensor:
    """Put the prefix tokens in front and add the positions.

    Args:
        patches: (B, N, D).
        prefix: tensors (1, P_i, D): class token, distillation token, registers, in this order.
        pos_embed: (1, N, D), with the class token's (1, 1 + N, D), with the whole prefix's (1, P + N, D); None: there
            are none to add.
        pos_embed_prefix: whether pos_embed covers the prefix, or "class" of it.

    Returns:
        (B, P + N, D)
    """
    if pos_embed is not None and pos_embed_prefix == "class":
        cls, pos_embed = pos_embed[:, :1], pos_embed[:, 1:]
        prefix = [prefix[0] + cls, *prefix[1:]]
    if pos_embed is not None and pos_embed_prefix is not True:
        patches = patches + pos_embed
    x = torch.cat([*(token.expand(patches.shape[0], -1, -1) for token in prefix), patches], 1)
    return x + pos_embed if pos_embed is not None and pos_embed_prefix is True else x


def check_images(images: Tensor, shape: tuple[int, int, int]) -> None:
    """Raises ValueError unless images are floating, (B, C, H, W), of this C, H and W."""
    check_type("images", images, Tensor, f"a tensor (B, {shape[0]}, {shape[1]}, {shape[2]}): {PREPARE}")
    # torch.jit.trace makes tensors of shapes, and would warn that they are compared.
    if not backends.is_traced() and tuple(images.shape)[1:] != shape:
        raise ValueError(
            f"images are {tuple(images.shape)}, and this model takes (B, {shape[0]}, {shape[1]}, {shape[2]}); "
            f"{_advice(tuple(images.shape), shape)}"
        )
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}: normalise them first, with tomevit.transform(model)")


def _advice(given: tuple[int, ...], shape: tuple[int, int, int]) -> str:
    """What to do with images of another shape than a model takes."""
    channels, height, width = shape
    if given == shape:
        return "one image is a batch of one: images[None]"
    if given[-3:] == (height, width, channels):
        return "channels come first: images.movedim(-1, -3)" + "[None]" * (len(given) == 3)
    if len(given) == 4 and given[2:] == (height, width):
        return f"for {given[1]} channels create it with in_chans={given[1]}"
    return "for another size create it with img_size=(height, width)"


def check_visible(visible: Tensor, images: int, patches: int) -> None:
    """Raises ValueError unless these are numbers of patches: (B, M) int64, M at least 1, from 0 to patches - 1."""
    check_type("visible", visible, Tensor, "int64, the numbers of the visible patches in each image")
    if visible.dtype != torch.int64 or visible.ndim != 2 or len(visible) != images or not visible.shape[1]:
        raise ValueError(
            f"visible is {visible.dtype} of shape {tuple(visible.shape)}, and must be int64, the "
            f"numbers of the visible patches in each of the {images} images"
        )
    # Elsewhere the values would have to be waited for; an index out of range is stopped by the device itself.
    if backends.can_look_at(visible):
        least, most = (int(value) for value in visible.aminmax())
        if least < 0 or most >= patches:
            raise ValueError(f"visible names patches {least} to {most}, and an image has 0 to {patches - 1}")
