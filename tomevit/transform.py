"""From an image to a model's input, as each set of weights was evaluated.

torch is imported where it is used: `import tomevit` loads this module, and is not to wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, overload

from tomevit.config import Preprocess
from tomevit.errors import import_extra
from tomevit.subject import subject_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from tomevit.cards import Card


#: Of a resized picture with more pixels than so many crops, no more is made than the crop.
CROPS = 32
#: Pixels of tensors that are float32 at a time.
PIXELS_AT_ONCE = 2**22
#: Pillow has a weight as a multiple of 2^-22.
WEIGHT_BITS = 22


class Transform:
    """Resize, centre crop, scale to [0, 1], normalise.

    Takes a PIL image (any mode; Pillow resizes it) or a uint8 tensor (..., C, H, W), and returns a float32 tensor
    (..., C, height, width). Rounding follows timm's evaluation transform (`timm/data/transforms_factory.py`), and the
    arithmetic torchvision's. An image of 20,000 × 1 pixels takes no more memory than others, though it would be
    resized to five million by 256.
    """

    def __init__(self, preprocess: Preprocess, size: tuple[int, int]) -> None:
        self.preprocess = preprocess
        self.size = size

    def __call__(self, image: Image | Tensor) -> Tensor:
        import torch

        check_image(image, len(self.preprocess.mean))
        pixels = self._resize_tensor(image) if isinstance(image, torch.Tensor) else self._resize_pil(image)
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

    def _windows(self, height: int, width: int) -> tuple[_Window, _Window]:
        """What the crop keeps of the resized rows, and of the columns."""
        rows, columns = (
            _Window(have, resized, round((resized - want) / 2), want)
            for have, resized, want in zip((height, width), self._target(height, width), self.size, strict=True)
        )
        return rows, columns

    def _fits(self, rows: _Window, columns: _Window) -> bool:
        """Whether the resized picture may be made whole."""
        return rows.resized * columns.resized <= CROPS * self.size[0] * self.size[1]

    def _resize_pil(self, image: Image) -> Tensor:
        import torch
        from PIL.Image import Resampling

        image = convert(image, mode_for(self.preprocess))
        rows, columns = self._windows(image.height, image.width)
        if self._fits(rows, columns):
            resample = {"bilinear": Resampling.BILINEAR, "bicubic": Resampling.BICUBIC}[self.preprocess.interpolation]
            resized = image.resize((columns.resized, rows.resized), resample)
            return _pixels(resized.crop((columns.begin, rows.begin, columns.end, rows.end)))
        # The same arithmetic, to the last bit: whole numbers, rounded and clipped after each of the two passes.
        down, across = (_sums(window, self.preprocess.interpolation) for window in (rows, columns))
        pixels = _pixels(image.crop((across.begin, down.begin, across.end, down.end))).to(torch.int64)
        passes = [(-1, across), (-2, down)]
        for dim, sums in reversed(passes) if _shrinks_height_first(rows, columns) else passes:
            weights = sums.weights * 2**WEIGHT_BITS
            weights = torch.trunc(weights + torch.copysign(torch.full_like(weights, 0.5), weights)).to(torch.int64)
            pixels = _weighted_sums(pixels, dim, sums.places, weights)
            pixels = (pixels + 2 ** (WEIGHT_BITS - 1) >> WEIGHT_BITS).clamp(0, 255)
        return pixels.to(torch.uint8)

    def _resize_tensor(self, image: Tensor) -> Tensor:
        import torch

        rows, columns = self._windows(*image.shape[-2:])
        if (rows.resized, columns.resized) == tuple(image.shape[-2:]):
            return image[..., rows.begin : rows.end, columns.begin : columns.end]
        if self._fits(rows, columns):
            planes = image.reshape(-1, *image.shape[-2:])
            at_once = max(1, PIXELS_AT_ONCE // (rows.have * columns.have))
            resized = torch.cat([self._resize_planes(part, rows, columns) for part in torch.split(planes, at_once)])
        else:
            down, across = (_sums(window, self.preprocess.interpolation) for window in (rows, columns))
            part = image[..., down.begin : down.end, across.begin : across.end].to(torch.float32)
            for dim, sums in ((-1, across), (-2, down)):
                part = _weighted_sums(part, dim, sums.places, sums.weights.to(torch.float32))
            resized = _to_uint8(part)
        return resized.reshape(*image.shape[:-2], *self.size)

    def _resize_planes(self, planes: Tensor, rows: _Window, columns: _Window) -> Tensor:
        """(K, H, W) uint8 to (K, height, width): first across, some rows at a time, then down."""
        import torch
        import torch.nn.functional as F

        resize = partial(F.interpolate, mode=self.preprocess.interpolation, antialias=True)
        at_once = max(1, PIXELS_AT_ONCE // (len(planes) * max(columns.have, columns.resized)))
        parts = [
            resize(part.to(torch.float32)[None], size=(part.shape[1], columns.resized))[
                ..., columns.begin : columns.end
            ]
            for part in torch.split(planes, at_once, dim=1)
        ]
        resized = resize(torch.cat(parts, dim=2), size=(rows.resized, columns.kept))
        return _to_uint8(resized[0, :, rows.begin : rows.end])


class TrainingTransform:
    """Crop and flip by chance, scale to [0, 1], normalise.

    As networks are trained on ImageNet ever since (arXiv:1409.4842, section 6): a crop of 8 to 100 % of the area with a
    ratio of 3/4 to 4/3, resized to the model's size, and mirrored half of the time. It draws from torch's default
    generator, and from no other; it needs torchvision. It can be pickled, so that it travels to workers.

    Takes what `Transform` takes. Of a tensor of several images (..., C, H, W) all are cropped alike.

    Args:
        preprocess: of the model; its `crop_pct` and `resize` are for evaluation alone.
        size: height and width of the model's images.
        crop: crop and flip; False: resize alone.
        randaugment: number of operations and their magnitude out of 30, as torchvision counts (arXiv:1909.13719); None:
            without.
        erasing: the probability that a rectangle is replaced by noise (arXiv:1708.04896).

    Raises:
        ValueError: torchvision is not installed, or does not fit torch.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        size: tuple[int, int],
        *,
        crop: bool = True,
        randaugment: tuple[int, int] | None = None,
        erasing: float = 0.0,
    ) -> None:
        self.preprocess = preprocess
        self.size = size
        self.steps: list[Callable[[Any], Any]] = []
        if crop or randaugment or erasing:
            v2 = import_extra("torchvision.transforms.v2", "images that are cropped or changed by chance")
        if crop:
            self.steps += [
                v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode(preprocess.interpolation)),
                v2.RandomHorizontalFlip(),
            ]
        if randaugment:
            self.steps.append(v2.RandAugment(*randaugment, interpolation=v2.InterpolationMode.BILINEAR))
        self.steps.append(Transform(replace(preprocess, crop_pct=1.0, resize="squash"), size))
        if erasing:
            self.steps.append(v2.RandomErasing(erasing, value="random"))

    def __call__(self, image: Image | Tensor) -> Tensor:
        import torch

        check_image(image, len(self.preprocess.mean))
        made: Any = image if isinstance(image, torch.Tensor) else convert(image, mode_for(self.preprocess))
        for step in self.steps:
            made = step(made)
        return cast("Tensor", made)

    def __repr__(self) -> str:
        return f"TrainingTransform({self.preprocess}, size={self.size}, steps={self.steps})"


def check_image(image: object, channels: int) -> None:
    """Before any work, that an image is a PIL image, or a tensor (..., C, H, W) uint8 of so many channels.

    Raises:
        ValueError: it is something else; of a tensor whose channels come last the message says what to do.
    """
    import torch

    if not isinstance(image, torch.Tensor):
        from PIL.Image import Image

        if isinstance(image, Image):
            if channels not in (1, 3):
                raise ValueError(f"a PIL image becomes one of 1 or 3 channels, and the model takes {channels}")
            return
        hint = ": PIL.Image.fromarray makes one of an array" if type(image).__module__ == "numpy" else ""
        raise ValueError(
            f"the image is a {type(image).__name__}; give a PIL image or a uint8 tensor (..., C, H, W){hint}"
        )
    shape = tuple(image.shape)
    if image.dtype != torch.uint8 or image.ndim < 3:
        raise ValueError(f"the image is a {image.dtype} tensor of shape {shape}; give uint8 (..., C, H, W)")
    if shape[-3] != channels:
        hint, likely = "", {1, 3, 4, channels}
        if shape[-1] in likely and shape[-3] not in likely:
            last = "permute(2, 0, 1)" if image.ndim == 3 else "movedim(-1, -3)"
            hint = f": its shape {shape} is height, width, channel: {last}"
            hint += f", and then of {shape[-1]} channels make {channels}" if shape[-1] != channels else ""
        elif (shape[-3], channels) == (1, 3):
            hint = ": image.expand(*image.shape[:-3], 3, -1, -1) has the grey in all three"
        elif (shape[-3], channels) == (4, 3):
            hint = ": image[..., :3, :, :] leaves the opacity out"
        raise ValueError(
            f"the image has {shape[-3]} channel{'s' * (shape[-3] != 1)}, and the model takes {channels}{hint}"
        )
    if not image.numel():
        raise ValueError(f"the image is a tensor of shape {shape}, and has no pixels")


def mode_for(preprocess: Preprocess) -> str:
    """Pillow's mode of what a model takes."""
    return "L" if len(preprocess.mean) == 1 else "RGB"


def convert(image: Image, mode: str) -> Image:
    """An image in mode "RGB" or "L": itself if it is in this mode, not a copy.

    As Pillow converts it, where that makes sense: grey of 16 bits has its high byte, as Pillow takes it of colours of
    16 bits, where `Image.convert` would make everything beyond 255 white.
    """
    if image.mode == mode:
        return image
    import numpy as np
    from PIL import Image, ImageCms

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert(mode)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image).convert(mode)
    if image.mode in ("La", "RGBa"):  # colours that were multiplied by their opacity
        return image.convert(image.mode.upper()).convert(mode)
    return image.convert(mode)


def _shrinks_height_first(rows: _Window, columns: _Window) -> bool:
    """Whether `Image.resize` has the vertical pass first: since Pillow 13, where height loses far more than width."""
    import PIL

    lost = rows.have - rows.resized
    return int(PIL.__version__.partition(".")[0]) >= 13 and lost > max(0, 2 * (columns.have - columns.resized))


def _pixels(image: Image) -> Tensor:
    """(C, H, W) uint8."""
    import torch

    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1)


def _to_uint8(values: Tensor) -> Tensor:
    import torch

    return values.clamp(0, 255).round().to(torch.uint8)


# --------------------------------------------------------------------------------------------- a part of a resized line


class _Window(NamedTuple):
    """What is kept of a line of pixels, a row or a column, that is resized."""

    have: int
    resized: int
    begin: int  # the first of the resized pixels that are kept
    kept: int

    @property
    def end(self) -> int:
        return self.begin + self.kept


class _Sums(NamedTuple):
    """The sums of which a window's pixels consist; K pixels of the line, at most, in each."""

    begin: int  # all are of the pixels of the line from here
    end: int  # to here
    places: Tensor  # (kept, K) int64, counted from begin
    weights: Tensor  # (kept, K) float64


def _sums(window: _Window, interpolation: str) -> _Sums:
    """As Pillow has them (precompute_coeffs in Resample.c), in the same order of operations."""
    import torch

    scale = window.have / window.resized
    stretch = max(scale, 1.0)
    support = stretch * {"bilinear": 1.0, "bicubic": 2.0}[interpolation]
    centre = (torch.arange(window.begin, window.end, dtype=torch.float64, device="cpu")[:, None] + 0.5) * scale
    first = (centre - support + 0.5).to(torch.int64).clamp(min=0)
    end = (centre + support + 0.5).to(torch.int64).clamp(max=window.have)
    places = first + torch.arange(int((end - first).max()), device="cpu")
    weights = _filter((places - centre + 0.5) * (1.0 / stretch), interpolation) * (places < end)
    weights /= weights.cumsum(1)[:, -1:]  # unlike sum, one after the other
    begin, behind = int(first.min()), int(end.max())
    return _Sums(begin, behind, places.clamp(max=behind - 1) - begin, weights)


def _filter(x: Tensor, interpolation: str) -> Tensor:
    """Of distances: bilinear, or bicubic with a = -0.5."""
    import torch

    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def _weighted_sums(pixels: Tensor, dim: int, places: Tensor, weights: Tensor) -> Tensor:
    """Along a dimension, which is -1 or -2, one pixel for each row of places (n, K), in the weights' dtype."""
    places, weights = (
        tensor.T.to(pixels.device).reshape(tensor.shape[1], *[-1] + [1] * (-1 - dim)) for tensor in (places, weights)
    )
    terms = (pixels.index_select(dim, at.flatten()) * weight for at, weight in zip(places, weights, strict=True))
    return sum(terms, start=next(terms))


@overload
def transform(model: nn.Module | Card | str, *, train: Literal[False] = False) -> Transform: ...
@overload
def transform(model: nn.Module | Card | str, *, train: Literal[True]) -> TrainingTransform: ...
@overload
def transform(model: nn.Module | Card | str, *, train: bool) -> Transform | TrainingTransform: ...


def transform(model: nn.Module | Card | str, *, train: bool = False) -> Transform | TrainingTransform:
    """The preprocessing that a model's weights were evaluated with, at the model's image size; or one to train with.

    Either is a function of a PIL image (any mode) or a uint8 tensor (..., C, H, W), to a float32 tensor of the model's
    size, and can be pickled.

    Args:
        model: in a wrapper of torch's or not; or its card, or its name.
        train: crop and flip by chance instead, as networks are trained on ImageNet (`tomevit.recipe` has what else a
            recipe asks for). It draws from torch's default generator, and needs torchvision.

    Raises:
        ValueError: there is no such model; or torchvision is not installed.
    """
    card, config, _ = subject_of(model)
    return (TrainingTransform if train else Transform)(card.preprocess, config.img_size)
