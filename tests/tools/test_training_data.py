"""The data sets to train on."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

import tomevit
from benchmarks.peers import torchvision  # noqa: F401  # the way to import it beside a CPU torch
from tomevit.training.datasets import DataError, augmentation, load_data, noise_data
from tomevit.training.digits import load_split
from tomevit.transform import Transform

pytest.importorskip("sklearn", reason="the digits come from scikit-learn")

DIGITS = Transform(tomevit.card("digits_p1").preprocess, (8, 8))
FOLDER = Transform(tomevit.card("vit_b16").preprocess, (32, 48))


def draw_image(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(256, size=(50, 70, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, (part, name) in enumerate((part, name) for part in ("train", "val") for name in ("cat", "dog")):
        for k in range(3):
            draw_image(tmp_path / "images" / part / name / f"{k}.png", 10 * i + k)
    return tmp_path / "images"


def load_augmented(source: str, preprocess: Transform, *, seed: int = 0, repeats: int = 1) -> Any:
    augment = augmentation("digits" if source == "digits" else "folder", preprocess, randaugment=(2, 9), erasing=0.5)
    return load_data(source, preprocess, augment, seed=seed, repeats=repeats, limit=4)


def test_the_digits_are_the_split(folder):
    train, held_out = load_split()
    data = load_data("digits", DIGITS)
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.classes == tuple("0123456789")
    for images, wanted in ((data.train, train), (data.test, held_out)):
        image, label = images[7]
        assert torch.equal(image, DIGITS(wanted.images[7]))
        assert label == wanted.labels[7]
    assert len(load_data("digits", DIGITS, validate=True).test) == 288


def test_a_folder_is_read_by_class(folder):
    data = load_data(str(folder), FOLDER)
    assert data.classes == ("cat", "dog")
    assert [label for _, label in data.train] == [0, 0, 0, 1, 1, 1]
    with PIL.Image.open(folder / "val" / "dog" / "1.png") as image:
        assert torch.equal(data.test[4][0], FOLDER(image))


@pytest.mark.parametrize("source", ["digits", "folder"])
def test_draws_depend_on_seed_epoch_and_index_alone(source, folder):
    preprocess, place = (DIGITS, source) if source == "digits" else (FOLDER, str(folder))
    images = load_augmented(place, preprocess).train
    before = torch.get_rng_state()
    first = [image for image, _ in images]
    assert torch.equal(torch.get_rng_state(), before)
    assert {image.shape for image in first} == {(len(preprocess.preprocess.mean), *preprocess.size)}

    torch.manual_seed(5)
    backwards = [images[i][0] for i in reversed(range(len(images)))][::-1]
    by_a_worker = list(DataLoader(images, 1, num_workers=1))
    assert all(map(torch.equal, first, backwards))
    assert all(torch.equal(image, other[0]) for image, (other, _) in zip(first, by_a_worker, strict=True))

    images.set_epoch(1)
    assert not any(map(torch.equal, first, (image for image, _ in images)))
    other_seed = load_augmented(place, preprocess, seed=1).train
    assert not any(map(torch.equal, first, (image for image, _ in other_seed)))
    images.set_epoch(0)
    assert torch.equal(images[2][0], first[2])


def test_a_worker_that_lives_on_sees_the_epoch_change():
    images = load_augmented("digits", DIGITS).train
    loader = DataLoader(images, 4, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in range(2):
        images.set_epoch(epoch)
        epochs += [batch for batch, _ in loader]
        assert torch.equal(epochs[epoch][3], images[3][0])
    assert not torch.equal(*epochs)


def test_images_travel_to_workers_that_do_not_share_memory(folder):
    images = load_augmented(str(folder), FOLDER).train
    assert torch.equal(pickle.loads(pickle.dumps(images))[1][0], images[1][0])


def test_repeats_are_the_same_images_under_other_draws():
    images = load_augmented("digits", DIGITS, repeats=2).train
    assert len(images) == 4
    assert not torch.equal(images[1][0], images[5][0])
    assert images[1][1] == images[5][1]
    with pytest.raises(IndexError):
        images[8]


def test_a_limit_takes_the_same_images_every_time_and_from_all_classes(folder):
    few, again = (load_data("digits", DIGITS, limit=100).train for _ in range(2))
    assert len(few) == 100
    assert all(torch.equal(few[i][0], again[i][0]) for i in range(100))
    assert {label for _, label in load_data(str(folder), FOLDER, limit=3, measure=3).train} == {0, 1}
    assert {label for _, label in load_data(str(folder), FOLDER, limit=3, measure=3).test} == {0, 1}


def test_noise_takes_the_way_of_a_folder():
    data = noise_data(FOLDER, augmentation("folder", FOLDER), length=3)
    assert len(data.classes) == 1000
    for images in (data.train, data.test):
        assert [images[i][0].shape for i in range(3)] == [(3, 32, 48)] * 3
    assert not torch.equal(data.train[0][0], data.train[1][0])


def remove(folder: Path, pattern: str) -> None:
    for path in list(folder.parent.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("images", "there is no folder .*images; the data are 'digits', 'mnist', or a folder with train/ and val/"),
        ("images/train", "has no train/ in it"),
        ("images/val", "has no val/ in it"),
        ("images/train/*", "train has no folders in it; it must have one per class"),
        ("images/val/dog", "train/ has a class dog and val/ has not"),
        ("images/train/cat", "val/ has a class cat and train/ has not"),
        ("images/train/cat/*", "classes cat"),
        ("images/*/cat", "train has one class alone"),
    ],
)
def test_what_is_missing_is_said(folder, gone, said):
    remove(folder, gone)
    with pytest.raises(DataError, match=said) as raised:
        load_data(str(folder), FOLDER)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("damage", "workers"), [("text", 0), ("cut", 0), ("text", 1)])
def test_an_image_that_cannot_be_read_is_named(folder, damage, workers):
    path = folder / "train" / "dog" / "1.png"
    path.write_bytes(b"no image" if damage == "text" else path.read_bytes()[:2000])
    images = load_data(str(folder), FOLDER).train
    with pytest.raises(DataError) as raised:
        list(DataLoader(images, 6, num_workers=workers))
    assert str(raised.value).startswith(f"{path} cannot be read as an image: ")
    assert "\n" not in str(raised.value)
