"""From an image to a model's input, as each set of weights was evaluated.

torch is imported where it is used: `import tomevit` loads this module, and is not to wait for it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tomevit.config import Preprocess

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn


class Transform:
    """Resize, centre crop, scale to [0, 1], normalise.

    Takes a PIL image (any mode; Pillow resizes it) or a uint8 tensor (..., C, H, W), and returns a float32 tensor
    (..., C, height, width). Rounding follows timm's evaluation transform (`timm/data/transforms_factory.py`), and the
    arithmetic torchvision's.
    """

    def __init__(self, preprocess: Preprocess, size: tuple[int, int]) -> None:
        self.preprocess = preprocess
        self.size = size

    def __call__(self, image: Image | Tensor) -> Tensor:
        import torch

        if isinstance(image, torch.Tensor):
            if image.dtype != torch.uint8 or image.ndim < 3:
                raise ValueError(
                    f"the image is a {image.dtype} tensor of shape {tuple(image.shape)}; give uint8 (..., C, H, W)"
                )
            pixels = _crop(self._resize_tensor(image), self.size)
        else:
            pixels = _crop(self._resize_pil(image), self.size)
        channels = len(self.preprocess.mean)
        if pixels.shape[-3] != channels:
            raise ValueError(f"the image has {pixels.shape[-3]} channels, and the model takes {channels}")
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=pixels.device)[:, None, None]
            for values in (self.preprocess.mean, self.preprocess.std)
        )
        return pixels.to(torch.float32).div(255).sub(mean).div(std)

    def __repr__(self) -> str:
        return f"Transform({self.preprocess}, size={self.size})"

    def _target(self, height: int, width: int) -> tuple[int, int]:
        """The size to resize to, before the crop."""
        wanted = [math.floor(pixels / self.preprocess.crop_pct) for pixels in self.size]
        if self.preprocess.resize == "squash":
            return wanted[0], wanted[1]
        # The edge that is short, measured against the crop, gets the wanted length; the other keeps the ratio, rounded
        # as torchvision does for a square crop and timm for others.
        if wanted[0] != wanted[1]:
            ratio = min(height / wanted[0], width / wanted[1])
            return round(height / ratio), round(width / ratio)
        if height <= width:
            return wanted[0], int(wanted[0] * width / height)
        return int(wanted[1] * height / width), wanted[1]

    def _resize_pil(self, image: Image) -> Tensor:
        import torch
        from PIL.Image import Image, Resampling

        if not isinstance(image, Image):
            raise ValueError(
                f"the image is a {type(image).__name__}; give a PIL image or a uint8 tensor (..., C, H, W)"
            )
        mode = "L" if len(self.preprocess.mean) == 1 else "RGB"
        image = image.convert(mode)
        height, width = self._target(image.height, image.width)
        filters = {"bilinear": Resampling.BILINEAR, "bicubic": Resampling.BICUBIC}
        image = image.resize((width, height), filters[self.preprocess.interpolation])
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(height, width, len(mode)).permute(2, 0, 1)

    def _resize_tensor(self, image: Tensor) -> Tensor:
        import torch
        import torch.nn.functional as F

        size = self._target(*image.shape[-2:])
        if size == tuple(image.shape[-2:]):
            return image
        batch = image.reshape(-1, *image.shape[-3:]).to(torch.float32)
        batch = F.interpolate(batch, size=size, mode=self.preprocess.interpolation, antialias=True)
        return batch.clamp(0, 255).round().to(torch.uint8).reshape(*image.shape[:-2], *size)


def _crop(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    top, left = (round((have - want) / 2) for have, want in zip(pixels.shape[-2:], size, strict=True))
    return pixels[..., top : top + size[0], left : left + size[1]]


def transform(model: nn.Module) -> Transform:
    """The preprocessing that a model's weights were evaluated with, at the model's image size.

    Args:
        model: in a wrapper of torch's or not.
    """
    from tomevit.models import unwrap

    inner: Any = unwrap(model)
    return Transform(inner.card.preprocess, inner.config.img_size)
