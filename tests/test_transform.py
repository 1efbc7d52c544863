"""Preprocessing is torchvision's arithmetic with timm's rounding."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.peers import timm, torchvision
from tests.helpers import tiny
from tomevit import card, create, list_models, transform
from tomevit.config import Preprocess
from tomevit.transform import Transform

T = torchvision.transforms
FILTERS = {"bilinear": T.InterpolationMode.BILINEAR, "bicubic": T.InterpolationMode.BICUBIC}
PHOTOGRAPHS = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640 × 427
ZOO = sorted(
    {found.preprocess for found in map(card, list_models(weights=True)) if found.config.in_chans == 3}, key=repr
)


def pictures() -> dict[str, Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (301, 187, 3), dtype=np.uint8)
    china, flower = PHOTOGRAPHS
    return {
        "landscape": china,
        "portrait": flower.rotate(90, expand=True).crop((3, 0, 420, 633)),
        "noise": Image.fromarray(noise),
        "square": china.crop((10, 20, 271, 281)),
        "panorama": china.crop((0, 100, 640, 171)),
        "tower": china.crop((100, 0, 163, 427)),
        "smaller_than_the_model": flower.resize((57, 43)),
        "exactly_the_model": flower.resize((224, 224)),
        "one_pixel_wide": china.crop((7, 0, 8, 31)),
    }


def reference(preprocess: Preprocess, size: int) -> T.Compose:
    edge = int(size / preprocess.crop_pct)
    return T.Compose(
        [
            T.Resize((edge, edge) if preprocess.resize == "squash" else edge, FILTERS[preprocess.interpolation]),
            T.CenterCrop(size),
            T.ToTensor(),
            T.Normalize(preprocess.mean, preprocess.std),
        ]
    )


@pytest.mark.parametrize("size", [224, 91])
@pytest.mark.parametrize("preprocess", ZOO, ids=lambda p: f"{p.interpolation}-{p.crop_pct}-{p.mean[0]}-{p.resize}")
def test_pil_images_as_torchvision_bit_for_bit(preprocess: Preprocess, size: int) -> None:
    ours, theirs = Transform(preprocess, (size, size)), reference(preprocess, size)
    for name, picture in pictures().items():
        answer = ours(picture)
        assert answer.shape == (3, size, size), name
        assert torch.equal(answer, theirs(picture)), name


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "I", "F", "YCbCr"])
def test_other_modes_become_rgb(mode: str) -> None:
    picture = PHOTOGRAPHS[0].convert(mode)
    answer = Transform(Preprocess(), (64, 64))(picture)
    assert torch.equal(answer, reference(Preprocess(), 64)(picture.convert("RGB")))


def test_files_are_taken_as_opened() -> None:
    file = io.BytesIO()
    PHOTOGRAPHS[1].save(file, "JPEG")
    with Image.open(file) as picture:
        answer = Transform(Preprocess(), (96, 96))(picture)
        assert torch.equal(answer, reference(Preprocess(), 96)(picture))


@pytest.mark.parametrize("size", [(224, 224), (160, 224), (224, 96), (91, 133)], ids=repr)
@pytest.mark.parametrize("resize", ["shorter", "squash"])
@pytest.mark.parametrize("preprocess", ZOO, ids=lambda p: f"{p.interpolation}-{p.crop_pct}-{p.mean[0]}-{p.resize}")
def test_as_timm_bit_for_bit(preprocess: Preprocess, resize: str, size: tuple[int, int]) -> None:
    theirs = timm.data.create_transform(
        (3, *size),
        is_training=False,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        std=preprocess.std,
        crop_pct=preprocess.crop_pct,
        crop_mode="squash" if resize == "squash" else "center",
    )
    fields = {name: getattr(preprocess, name) for name in ("interpolation", "mean", "std", "crop_pct")}
    ours = Transform(Preprocess(**fields, resize=resize), size)
    for name, picture in pictures().items():
        if name != "one_pixel_wide":
            assert torch.equal(ours(picture), theirs(picture)), name


@pytest.mark.parametrize("preprocess", ZOO, ids=lambda p: f"{p.interpolation}-{p.crop_pct}-{p.mean[0]}-{p.resize}")
def test_tensors_as_torchvision(preprocess: Preprocess) -> None:
    ours = Transform(preprocess, (96, 96))
    normalise = T.Normalize(preprocess.mean, preprocess.std)
    resize = reference(preprocess, 96).transforms[0]
    for name, picture in pictures().items():
        pixels = T.functional.pil_to_tensor(picture)
        expected = normalise(T.CenterCrop(96)(resize(pixels)).float() / 255)
        torch.testing.assert_close(ours(pixels), expected, rtol=0, atol=1e-6, msg=name)


def test_tensors_close_to_pil() -> None:
    """The same filter, but Pillow rounds and clips between its two passes: a grey level here and there."""
    for interpolation in FILTERS:
        ours = Transform(Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3, interpolation=interpolation), (96, 96))
        for name, picture in pictures().items():
            levels = 255 * (ours(T.functional.pil_to_tensor(picture)) - ours(picture)).abs()
            assert (levels > 1.5).float().mean() < 0.01, name
            assert levels.mean() < 0.25, name


def test_a_batch_of_tensors_is_its_images() -> None:
    ours = Transform(Preprocess(), (64, 48))
    batch = torch.randint(0, 256, (2, 3, 3, 101, 77), dtype=torch.uint8)
    original = batch.clone()
    answer = ours(batch)
    assert answer.shape == (2, 3, 3, 64, 48)
    assert torch.equal(answer[1, 2], ours(batch[1, 2]))
    assert torch.equal(batch, original)


def test_the_transform_of_a_model_is_its_cards_at_its_size() -> None:
    model = create("deit_ti16", img_size=(96, 160))
    ours = transform(model)
    assert ours.preprocess == card("deit_ti16").preprocess
    picture = PHOTOGRAPHS[0]
    images = ours(picture)[None]
    assert images.shape == (1, 3, 96, 160)
    with torch.inference_mode():
        assert model(images).isfinite().all()


def test_one_channel() -> None:
    ours = Transform(Preprocess(mean=(0.5,), std=(0.25,)), (64, 64))
    grey = PHOTOGRAPHS[0].convert("L")
    theirs = T.Compose([T.Resize(73, FILTERS["bicubic"]), T.CenterCrop(64), T.ToTensor(), T.Normalize(0.5, 0.25)])
    assert torch.equal(ours(PHOTOGRAPHS[0]), theirs(grey))


def test_the_transform_fits_a_model_of_other_channels() -> None:
    model = create("deit_ti16", in_chans=1, img_size=64)
    with torch.inference_mode():
        assert model(transform(model)(PHOTOGRAPHS[0])[None]).isfinite().all()


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 64, 64),
        torch.zeros(64, 64, dtype=torch.uint8),
        torch.zeros(64, 64, 3, dtype=torch.uint8),
        torch.zeros(1, 64, 64, dtype=torch.uint8),
        torch.zeros(3, 64, 64, dtype=torch.int64),
        np.zeros((64, 64, 3), dtype=np.uint8),
        "photograph.jpg",
    ],
    ids=lambda image: f"{getattr(image, 'dtype', image)}{tuple(getattr(image, 'shape', ()))}",
)
def test_wrong_images_are_value_errors(image: Any) -> None:
    with pytest.raises(ValueError, match=r"uint8|channels"):
        transform(tiny())(image)
