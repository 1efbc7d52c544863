"""Preprocessing is torchvision's arithmetic with timm's rounding."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import sklearn.datasets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from benchmarks.peers import timm, torchvision
from tests.helpers import is_prepared_as_timm_does, timm_on_meta, tiny
from tests.tools.test_images import FILES
from tomevit import Card, card, create, list_models, transform
from tomevit.config import Preprocess
from tomevit.data.images import read
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


@settings(max_examples=60)
@given(
    edges=st.tuples(st.integers(1, 12), st.integers(1, 300)).flatmap(st.permutations),
    size=st.tuples(st.integers(2, 24), st.integers(2, 24)) | st.integers(2, 24).map(lambda edge: (edge, edge)),
    crop_pct=st.sampled_from([1.0, 0.875, 0.3]),
    interpolation=st.sampled_from(sorted(FILTERS)),
    resize=st.sampled_from(["shorter", "squash"]),
    mode=st.sampled_from(["L", "RGB"]),
    crops=st.sampled_from([0, 2**40]),
)
def test_a_crop_is_what_a_resized_picture_would_have_there(
    edges: list[int], size: tuple[int, int], crop_pct: float, interpolation: Any, resize: Any, mode: str, crops: int
) -> None:
    zeros, ones = (0.0,) * len(mode), (1.0,) * len(mode)
    ours = Transform(
        Preprocess(mean=zeros, std=ones, interpolation=interpolation, crop_pct=crop_pct, resize=resize), size
    )
    noise = np.random.default_rng(sum(edges)).integers(0, 2, (*edges, 3), dtype=np.uint8) * 255
    picture = Image.fromarray(noise).convert(mode)
    height, width = ours._target(*edges)
    resized = T.functional.pil_to_tensor(
        picture.resize((width, height), getattr(Image.Resampling, interpolation.upper()))
    )
    expected = T.functional.center_crop(resized, list(size)).float() / 255
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys.modules["tomevit.transform"], "CROPS", crops)  # none is made whole, or all are
        assert torch.equal(ours(picture), expected)


# ---------------------------------------------------------------------------- from files, as each family is evaluated

CARDS = [found for found in map(card, list_models(weights=True)) if found.config.in_chans == 3]
TIMM = {
    name: found
    for found in CARDS
    if timm.is_model_pretrained(name := f"{found.timm}.{found.weights}") and is_prepared_as_timm_does(found)
}
TORCHVISION = {
    weights.url: weights
    for name in ("B_16", "B_32", "L_16", "L_32", "H_14")
    for weights in getattr(torchvision.models, f"ViT_{name}_Weights")
}

SKIMAGE, SKLEARN = Path(skimage.__file__).parent / "data", Path(sklearn.datasets.__file__).parent / "images"
SHIPPED = {  # photographs and pictures, as files that others wrote
    "photograph.jpg": SKLEARN / "china.jpg",
    "other_photograph.jpg": SKIMAGE / "rocket.jpg",
    "photograph.png": SKIMAGE / "chelsea.png",
    "grey.png": SKIMAGE / "camera.png",
    "alpha.png": SKIMAGE / "logo.png",
    "palette.gif": SKIMAGE / "no_time_for_that_tiny.gif",  # 14 × 25 pixels
}
MADE = ("odd.png", "grey_alpha.png", "cmyk.jpg", "palette_transparent.png", "turned.jpg", "one_pixel.png")


@cache
def read_by_both(name: str, directory: Path) -> tuple[Image.Image, Image.Image]:
    """A file as our loader and as torchvision's, whose lines are timm's, read it."""
    path = SHIPPED[name] if name in SHIPPED else directory / name
    if name not in SHIPPED:
        path.write_bytes(FILES[name])
    return read(path), torchvision.datasets.folder.default_loader(str(path))


def evaluation(found: Card) -> tuple[str, Callable[[Image.Image], Tensor]]:
    """What images go through before weights are measured, by the code that defines it, and whose code that is."""
    for source in found.sources:
        if source.url in TORCHVISION:
            return "torchvision", TORCHVISION[source.url].transforms()
    name = f"{found.timm}.{found.weights}"
    if name in TIMM:
        return "timm", timm.data.create_transform(**timm.data.resolve_model_data_config(timm_on_meta(name)))
    return "own", reference(found.preprocess, found.config.img_size[0])  # composed by those who trained them


def distinct() -> dict[str, Card]:
    """One set of weights for each preprocessing at each size, from each of those who define it."""
    found: dict[tuple[object, ...], Card] = {}
    for each in CARDS:
        by = "torchvision" if any(s.url in TORCHVISION for s in each.sources) else f"{each.timm}.{each.weights}" in TIMM
        found.setdefault((by, each.title, each.preprocess, each.config.img_size), each)
    return {each.full_name: each for each in found.values()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")  # from their loader
@pytest.mark.parametrize("name", distinct())
def test_from_file_to_tensor_as_each_family_is_evaluated_bit_for_bit(name: str, made: Path) -> None:
    found = distinct()[name]
    ours, (_, theirs) = Transform(found.preprocess, found.config.img_size), evaluation(found)
    for file in (*SHIPPED, *MADE):
        our_image, their_image = read_by_both(file, made)
        answer = ours(our_image)
        assert answer.shape == (3, *found.config.img_size), file
        assert torch.equal(answer, theirs(their_image)), file


def test_all_of_them_are_compared() -> None:
    by = {name: evaluation(found)[0] for name, found in distinct().items()}
    titles = {who: {distinct()[name].title for name in by if by[name] == who} for who in by.values()}
    assert titles["timm"] >= {"Vision Transformer", "DeiT", "DeiT III", "Distilled DeiT"}
    assert titles["torchvision"] == {"Vision Transformer", "SWAG"}
    assert "MAE, global pooling" in titles["own"]
    presets = {s.url for c in CARDS for s in c.sources if s.url in TORCHVISION}
    assert presets == TORCHVISION.keys()


# ------------------------------------------------------------------------------------------------------------- tensors


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


@pytest.mark.parametrize("shape", [(1, 2000), (2000, 1), (3, 700), (40, 1000)])
@pytest.mark.parametrize("interpolation", FILTERS)
def test_tensors_of_extreme_shapes_as_torchvision_but_for_rounding(interpolation: Any, shape: tuple[int, int]) -> None:
    ours = Transform(Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3, interpolation=interpolation), (64, 64))
    pixels = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    resized = T.functional.resize(pixels, [int(64 / 0.875)], FILTERS[interpolation], antialias=True)
    levels = 255 * (ours(pixels) - T.functional.center_crop(resized.float(), [64, 64]) / 255).abs()
    assert levels.max() < 1.5
    assert (levels > 0.5).float().mean() < 0.01


@pytest.mark.parametrize("at_once", [1, 1000, 2**15])
def test_tensors_are_resized_in_parts(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Transform(Preprocess(), (64, 48))
    batch = torch.randint(0, 256, (2, 2, 3, 101, 77), dtype=torch.uint8)
    whole = ours(batch)
    monkeypatch.setattr(sys.modules["tomevit.transform"], "PIXELS_AT_ONCE", at_once)
    assert torch.equal(ours(batch), whole)


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
    with pytest.raises(ValueError, match=r"uint8|channels?\b"):
        transform(tiny())(image)
