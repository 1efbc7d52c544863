"""The digits models that ship, the images they are measured on, and the script that made both."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import tomevit
from tomevit import zoo
from tomevit.tasks.demo import accuracy, held_out
from tomevit.weights.checkpoint import read

pytest.importorskip("sklearn", reason="the digits come from scikit-learn")

from examples import train_digits
from tomevit.training.digits import Digits, load_split, move_digits

MODELS = ("digits_p1", "digits_p2")
SHIPPED = tuple(card.full_name for model in MODELS for card in zoo.cards(model))
LICENCES = {"digits_p1": "CC BY 4.0", "digits_p2": "CC BY-SA 3.0"}


def shipped_file(name: str) -> Path:
    (source,) = zoo.card(name).sources
    return Path(str(resources.files("tomevit"))) / source.package


@pytest.fixture(scope="module")
def models():
    return {name: tomevit.create(name, pretrained=True) for name in SHIPPED}


def test_the_plain_weights_are_the_default():
    assert [zoo.card(model).full_name for model in MODELS] == ["digits_p1.plain", "digits_p2.plain"]
    assert SHIPPED == ("digits_p1.plain", "digits_p1.tome_r16", "digits_p2.plain", "digits_p2.tome_r13")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_are_accurate(models, name):
    # As they were trained: those trained with merging, with merging. digits_p1 loses some by it, of few tokens.
    least = 95.0 if name == "digits_p1.tome_r16" else 97.0
    assert accuracy(models[name], *held_out(zoo.card(name).name)) >= least


def test_training_with_merging_recovers_most_of_what_merging_costs(models):
    plain, trained = (models[card.full_name] for card in zoo.cards("digits_p1"))
    unmerged, off_the_shelf = (accuracy(plain, *held_out(), r=r) for r in (0, 16))
    assert unmerged - off_the_shelf > 3
    assert unmerged - accuracy(trained, *held_out()) < (unmerged - off_the_shelf) / 2


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_small_and_say_where_they_come_from(models, name):
    path, card = shipped_file(name), models[name].card
    assert path.stat().st_size < 3_000_000
    model = "" if card.name == "digits_p1" else f"--model {card.name} "
    assert f"python -m examples.train_digits {model}--r {card.r} " in card.notes
    assert LICENCES[card.name] in card.notes
    assert card.licence == "apache-2.0"
    assert card.class_names == tuple("0123456789")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_listed_card_is_the_files_card(name):
    listed, filed = zoo.card(name), read(shipped_file(name))[0].card
    for field in ("full_name", "config", "preprocess", "r", "licence", "class_names", "notes"):
        assert getattr(listed, field) == getattr(filed, field), field


@pytest.mark.parametrize("name", SHIPPED)
def test_r_is_what_the_weights_were_trained_with(models, name):
    tag = name.partition(".")[2]
    assert models[name].r == (0 if tag == "plain" else int(tag.removeprefix("tome_r")))


@pytest.mark.parametrize(("model", "source", "count"), [("digits_p1", "digits", 360), ("digits_p2", "mnist", 500)])
def test_shipped_images_are_the_held_out_split(model, source, count):
    _, wanted = load_split(source)
    images, labels = held_out(model)
    assert torch.equal(images, wanted.images[:count])
    assert torch.equal(labels, wanted.labels[:count])
    assert images.shape == (count, 1, *zoo.card(model).config.img_size)
    assert images.dtype == torch.uint8
    assert images.max() == 255
    assert labels.bincount().min() >= 34


@pytest.mark.parametrize("model", MODELS)
def test_shipped_images_are_written_by_the_script(tmp_path, model):
    train_digits.main(["--model", model, "--heldout", str(tmp_path / "images.safetensors")])
    shipped = Path(str(resources.files("tomevit"))) / "assets" / f"{model}_heldout.safetensors"
    assert (tmp_path / "images.safetensors").read_bytes() == shipped.read_bytes()
    with safe_open(shipped, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    assert about["licence"] == LICENCES[model]
    assert about["source"] == train_digits.RECIPES[model].source


@pytest.mark.parametrize(("source", "counts"), [("digits", (1437, 360, 1149, 288)), ("mnist", (4000, 1000, 3200, 800))])
def test_no_image_is_on_both_sides_of_a_split(source, counts):
    train, held = load_split(source)
    fit, validation = load_split(source, validate=True)
    assert tuple(len(digits.labels) for digits in (train, held, fit, validation)) == counts
    images = {name: _multiset(digits) for name, digits in (("train", train), ("held", held))}
    assert _multiset(fit, validation) == images["train"]
    assert not set(images["train"]) & set(images["held"])
    assert held.labels.bincount().min() >= 34


def _multiset(*several: Digits) -> list[bytes]:
    return sorted(bytes(image.flatten().tolist()) for digits in several for image in digits.images)


@pytest.mark.parametrize(("model", "source"), [("digits_p1", "digits"), ("digits_p2", "mnist")])
def test_transform_normalises_the_training_images(model, source):
    train, _ = load_split(source)
    prepared = tomevit.transform(tomevit.create(model))(train.images)
    assert prepared.mean().abs() < 0.01
    assert prepared.std() == pytest.approx(1, abs=0.01)


def test_augmentation_moves_images_but_keeps_them_the_same_digits():
    images = held_out()[0]
    moved = move_digits(images, torch.Generator().manual_seed(0))
    assert moved.dtype == torch.uint8
    assert moved.shape == images.shape
    assert (moved != images).flatten(1).any(1).all()
    close = torch.nn.functional.cosine_similarity(moved.flatten(1).float(), images.flatten(1).float())
    assert close.min() > 0.5
    assert close.mean() > 0.85


def train_a_little(directory: Path, r: int, *more: str) -> Path:
    directory.mkdir()
    path = directory / "digits.safetensors"
    train_digits.main(["--r", str(r), "--epochs", "1", "--limit", "64", "--batch", "32", "--out", str(path), *more])
    return path


def test_training_is_reproducible(tmp_path):
    first, again = (train_a_little(tmp_path / name, 8) for name in ("first", "again"))
    assert first.read_bytes() == again.read_bytes()


def test_training_depends_on_the_seed(tmp_path):
    first, other = (read(train_a_little(tmp_path / seed, 8, "--seed", seed))[1] for seed in "01")
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_what_training_writes_loads_and_says_how_it_was_made(tmp_path, capsys):
    model = tomevit.load(train_a_little(tmp_path / "run", 8, "--validate"))
    assert model.r == 8
    assert model.card.full_name == "digits_p1.tome_r8"
    assert "--r 8 --epochs 1 --batch 32 --lr 0.003 --seed 0 --limit 64 --validate" in model.card.notes
    images = held_out()[0][:2]
    assert model(tomevit.transform(model)(images)).shape == (2, 10)
    assert "of 288 validation images" in capsys.readouterr().out


def test_training_learns(tmp_path):
    # 64 images, 160 steps: far from good, and far above the 10 % of chance.
    model = tomevit.load(train_a_little(tmp_path / "run", 16, "--epochs", "40", "--batch", "16"))
    train = load_split()[0]
    assert accuracy(model, train.images[:64], train.labels[:64]) > 40
