"""Images are classified as the model says, by name; broken ones are passed over; r = 0 is shown beside r if asked."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import tomevit
import tomevit.cli.classify
from benchmarks.peers import timm, torchvision
from docs import class_names as script
from tests.helpers import PLAIN, TRAINED, tiny
from tests.tasks.test_cli import run
from tests.tools.test_images import FILES, turned
from tomevit import Card, Config, card, class_names, classify, list_models
from tomevit.data.class_names import IMAGENET, imagenet
from tomevit.data.images import read
from tomevit.measure.timing import WARMUP
from tomevit.tasks.classify import Answer, Guess, answers, check_classifiable, summarise
from tomevit.tasks.demo import accuracy, held_out

DIGITS = "digits_p1"


def save_digits(directory: Path, count: int, first: int = 0) -> list[str]:
    """Held-out digits as files."""
    images, _ = held_out()
    paths = [directory / f"{i:03}.png" for i in range(first, first + count)]
    for i, path in enumerate(paths, first):
        Image.fromarray(images[i, 0].numpy()).save(path)
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def digits() -> tomevit.VisionTransformer:
    return tomevit.create(PLAIN, pretrained=True)


# ---------------------------------------------------------------------------------------------------- names of classes

WITH_HEAD = [name for name in list_models(weights=True) if card(name).config.num_classes]


def test_every_head_of_the_zoo_has_names() -> None:
    sizes = set()
    for name in WITH_HEAD:
        found, config = class_names(card(name)), card(name).config
        assert len(found.names) == config.num_classes, name
        assert all(found.names), name
        assert found.source == IMAGENET.get(config.num_classes, "own"), name
        sizes.add(config.num_classes)
    assert sizes == {10, 1000, 11821, 21843}


@pytest.mark.parametrize(
    ("classes", "theirs"), [(1000, "imagenet-1k"), (11821, "imagenet-12k"), (21843, "imagenet-21k-goog")]
)
def test_imagenets_names_and_their_order_are_timms(classes: int, theirs: str) -> None:
    info = timm.data.ImageNetInfo(theirs)
    assert list(imagenet(classes).synsets) == info.label_names()
    assert list(imagenet(classes).names) == info.label_descriptions()


def test_the_order_of_imagenet_1k_is_that_of_torchvisions_weights() -> None:
    categories = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
    ours = imagenet(1000)
    for index, category in enumerate(categories):
        if category not in ("crane bird", "maillot tank suit"):  # so called to tell them from two others
            assert category in ours.names[index].split(", ")


def test_the_file_of_names_is_what_the_script_makes() -> None:
    assert script.main(["--check"]) is None


def test_the_licence_of_the_names_is_beside_them() -> None:
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in script.DATA.with_name("LICENSE.wordnet").read_text()
    assert "LICENSE.wordnet" in script.HEADER


def test_a_models_own_names_come_first() -> None:
    names = tuple(f"breed {i}" for i in range(1000))
    found = class_names(Card(name="dogs", config=Config(num_classes=1000), class_names=names))
    assert found == (names, (), "own")
    assert found.short(3) == "breed 3"
    other = Card(name="dogs", config=Config(num_classes=2), class_names=names[:1])
    assert class_names(other) == (["", ""], (), ""), "names of fewer classes than the head has"


def test_short_names_are_the_first_synonym_or_the_number() -> None:
    assert imagenet(1000).names[0] == "tench, Tinca tinca"
    assert imagenet(1000).short(0) == "tench"
    mine = Card(name="", config=Config(num_classes=2), class_names=("cat, sleeping", ""))
    assert [class_names(mine).short(i) for i in range(2)] == ["cat, sleeping", "class 1"]
    assert class_names(Card(name="", config=Config(num_classes=37))).short(36) == "class 36"


# ------------------------------------------------------------------------------------------------------------- library


def test_the_likeliest_classes_are_those_of_the_model(digits: tomevit.VisionTransformer) -> None:
    images, labels = held_out()
    found = classify(digits, images, r=16, top=10)
    right = sum(answer.top[0].name == str(label) for answer, label in zip(found, labels.tolist(), strict=True))
    assert 100 * right / len(labels) == accuracy(digits, images, labels, r=16)
    with torch.inference_mode():
        expected = digits(tomevit.transform(digits)(images), r=16).softmax(1)
    for answer, probabilities in zip(found, expected, strict=True):
        assert sorted(guess.class_index for guess in answer.top) == list(range(10))
        said = [guess.probability for guess in answer.top]
        assert said == sorted(said, reverse=True)
        assert sum(said) == pytest.approx(1, abs=1e-5)
        order = [guess.class_index for guess in answer.top]
        torch.testing.assert_close(torch.tensor(said), probabilities[order], rtol=1e-4, atol=1e-6)
        assert answer.tokens == digits.token_counts(16)[-1]
        assert answer.seconds > 0


def test_r_is_the_weights_own_unless_given() -> None:
    trained = tomevit.create(TRAINED, pretrained=True)
    image = held_out()[0][0]
    by_itself, at_16, at_0 = (classify(trained, image, r=r)[0] for r in (None, 16, 0))
    assert by_itself.top == at_16.top != at_0.top
    assert (by_itself.tokens, at_0.tokens) == (9, 65)


def test_a_comparison_has_both_answers_and_both_probabilities(digits: tomevit.VisionTransformer) -> None:
    images = held_out()[0][:40]
    both = classify(digits, images, r=16, compare=True, top=10, batch=7)
    merged, plain = (classify(digits, images, r=r, top=10, batch=7) for r in (16, 0))
    for answer, at_16, at_0 in zip(both, merged, plain, strict=True):
        assert [guess[:4] for guess in answer.top] == [guess[:4] for guess in at_16.top]
        at_r, unmerged = ({guess.class_index: guess.probability for guess in one.top} for one in (at_16, at_0))
        for guess in (*answer.top, *answer.top_unmerged):
            assert guess.probability == at_r[guess.class_index]
            assert guess.unmerged == unmerged[guess.class_index]
        assert [guess.class_index for guess in answer.top_unmerged] == [guess.class_index for guess in at_0.top]
        assert answer.changed == (at_16.top[0].class_index != at_0.top[0].class_index)
        assert at_16.changed is None
    kept = summarise(both).kept
    assert kept is not None
    assert 0 < kept < len(images), "of these images merging changes some"
    assert kept == [answer.changed for answer in both].count(False)


def test_the_speed_up_is_of_the_same_batches_in_turn(
    digits: tomevit.VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, Any]] = []
    forward = type(digits).forward

    def recorded(self: Any, images: Tensor, r: Any = None) -> Tensor:
        calls.append((len(images), r))
        return forward(self, images, r)

    def clock(call: Callable[[], Any], device: object) -> tuple[Any, float]:
        return call(), calls[-1][0] * (3.0 if calls[-1][1] == 0 else 1.5)

    monkeypatch.setattr(type(digits), "forward", recorded)
    monkeypatch.setattr("tomevit.measure.timing.timed", clock)
    found = classify(digits, held_out()[0][:8], r=16, compare=True, batch=3)
    both_at_3, both_at_2 = [(3, 16), (3, 0)], [(2, 16), (2, 0)]
    warm_up, measured = calls[:4], calls[4:8]
    assert warm_up == both_at_3 * WARMUP
    assert measured == [(3, 16), (3, 0), (3, 0), (3, 16)]
    assert calls[8:] == [*both_at_2 * WARMUP, *both_at_2], "a batch of another size is warmed up too"
    assert {(answer.seconds, answer.seconds_unmerged) for answer in found} == {(1.5, 3.0)}
    assert summarise(found).speed_up == 2.0


def test_summaries() -> None:
    def answer(seconds: float, best: int, unmerged: int) -> Answer:
        tops = [(Guess(index, "", "", 0.5, 0.5),) for index in (best, unmerged)]
        return Answer("", tops[0], 9, seconds, tops[1], 2 * seconds)

    broken = Answer("", (), 9, error="damaged")
    found = summarise([answer(1.0, 3, 3), broken, answer(2.0, 3, 4), answer(6.0, 1, 1)])
    assert found == (3, 1, 3.0, 6.0, 2)
    assert found.speed_up == 2.0
    assert summarise([broken]) == (0, 1, None, None, None)
    assert summarise([]).speed_up is None


def test_distilled_models_answer_with_the_mean_of_both_heads() -> None:
    model = tiny(dist_token=True)
    image = read(FILES["photograph.jpg"])
    (answer,) = classify(model, image, top=7)
    tokens = model.forward_features(tomevit.transform(model)(image)[None])
    logits = (model.head(tokens.x[:, 0]) + model.head_dist(tokens.x[:, 1])) / 2
    expected = logits.softmax(1)[0]
    order = [guess.class_index for guess in answer.top]
    said = torch.tensor([guess.probability for guess in answer.top])
    torch.testing.assert_close(said, expected[order], rtol=1e-4, atol=1e-6)
    assert answer.top[0].name == ""


def test_images_come_from_anywhere_and_stay_in_order(tmp_path: Path) -> None:
    model = tiny()
    for name, place in (("photograph.jpg", "folder/b.jpg"), ("palette.png", "folder/a.png"), ("odd.png", "c.png")):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(FILES[name])
    path, picture = tmp_path / "c.png", read(FILES["grey.jpg"])
    tensor = torchvision.transforms.functional.pil_to_tensor(picture)
    several = [str(path), path, tmp_path / "folder", str(tmp_path / "*.png"), FILES["odd.png"], picture, tensor]
    found = classify(model, several, batch=3)
    names = ["c.png", "c.png", "folder/a.png", "folder/b.jpg", "c.png", "", "", ""]
    assert [answer.image for answer in found] == [name and str(tmp_path / name) for name in names]
    tops = [[guess.class_index for guess in answer.top] for answer in found]
    assert tops[0] == tops[1] == tops[4] == tops[5]
    for i, one in enumerate((path, FILES["odd.png"], picture, tensor)):
        (alone,) = classify(model, one)
        assert [guess.class_index for guess in alone.top] == tops[(0, 5, 6, 7)[i]]
    assert [a.top for a in classify(model, tensor[None])] == [a.top for a in classify(model, tensor)]


@pytest.mark.parametrize("orientation", [3, 6])
def test_photographs_are_turned_upright_unless_they_are_to_be_as_the_loaders_have_them(orientation: int) -> None:
    model, data = tiny(), turned(orientation)
    upright, plain = (classify(model, read(data, upright=upright))[0].top for upright in (True, False))
    assert upright != plain
    assert classify(model, data)[0].top == upright
    assert classify(model, data, upright=False)[0].top == plain


def test_what_cannot_be_read_is_passed_over(digits: tomevit.VisionTransformer, tmp_path: Path) -> None:
    paths = save_digits(tmp_path, 5)
    whole = classify(digits, paths, batch=2)
    Path(paths[1]).write_bytes(Path(paths[1]).read_bytes()[:60])
    Path(paths[4]).unlink()
    found = list(answers(digits, paths, batch=2))
    assert [answer.image for answer in found] == paths
    assert [answer.error for answer in found] == [
        "",
        "damaged: image file is truncated",
        "",
        "",
        "No such file or directory",
    ]
    for i in (0, 2, 3):
        assert [guess.class_index for guess in found[i].top] == [guess.class_index for guess in whole[i].top]
    assert [found[i].top for i in (1, 4)] == [(), ()]
    assert summarise(found)[:2] == (3, 2)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "vit_b16.orig_in21k",
            "has no head .*: take vit_b16.augreg_in21k_ft_in1k, or another of tomevit list 'vit_b16\\*'",
        ),
        ("swag_b16.trunk", "take swag_b16.linear_in1k"),
        ("mae_cls_b16.pretrain", "give it one, with num_classes"),
    ],
)
def test_models_without_a_head_are_refused(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"{name} {says}" if says.startswith("has") else says):
        check_classifiable(card(name))


def test_wrong_models_and_values_are_refused(
    digits: tomevit.VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = held_out()[0][0]
    with pytest.raises(ValueError, match="the model has no head"):
        classify(tiny(num_classes=0), image)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        classify(tiny().train(), image)
    with pytest.raises(ValueError, match="4 channels"):
        classify(tiny(in_chans=4), image)
    with pytest.raises(ValueError, match="negative"):
        classify(digits, image, r=-1)
    for r in (None, 0, [0, 0]):
        with pytest.raises(ValueError, match=r"merges nothing.*: give an r such as 8, 13 or 16"):
            classify(digits, image, r=r, compare=True)
    with pytest.raises(ValueError, match="No such file or directory"):
        classify(digits, "nothing.png")
    broken = tiny()
    torch.nn.init.constant_(broken.head.bias, torch.inf)
    with pytest.raises(ValueError, match=r"not finite.* float32"):
        classify(broken, FILES["odd.png"])

    def no_memory(self: Any, images: Tensor, r: Any = None) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(digits), "forward", no_memory)
    with pytest.raises(ValueError, match="a batch of 1 does not fit into the memory of cpu"):
        classify(digits, image)


# ------------------------------------------------------------------------------------------------------------- command


def give(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_one_image_is_shown_with_all_classes_asked_for(capsys, tmp_path):
    (path,) = save_digits(tmp_path, 1)
    status, out, err = run(capsys, "classify", path, "--model", TRAINED, "--top", "3")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{TRAINED}, r = 16: 9 of 65 tokens remain after the last block"
    assert lines[1] == "the model's own classes"
    assert lines[3].startswith(f"{path}, ")
    assert lines[3].endswith(" ms")
    percents = [float(line.split()[0]) for line in lines[4:7]]
    assert percents == sorted(percents, reverse=True)
    assert [line.split()[1:] for line in lines[4:5]] == [["%", str(held_out()[1][0].item())]]
    assert lines[7] == ""
    assert lines[8].startswith("1 image, ")


@pytest.mark.parametrize("own_names", [False, True])
@pytest.mark.parametrize("compare", [False, True])
def test_text_is_readable_at_80_columns(capsys, tmp_path, monkeypatch, own_names, compare):
    monkeypatch.chdir(tmp_path)
    model = tiny(4, num_classes=9 if own_names else 1000)
    if own_names:
        model.card = replace(model.card, class_names=tuple(f"{i} of {'very ' * 20}many" for i in range(9)))
    tomevit.save(model, "tiny.safetensors")
    for i, name in enumerate(["photograph.jpg", "odd.png", "grey.jpg", "cmyk.jpg"] * 3):
        Path(f"{i}{name}").write_bytes(FILES[name])
    for sources, rows in ((["1odd.png", "2grey.jpg"], range(10, 21)), (["."], range(12, 13))):
        status, out, _ = run(capsys, "classify", *sources, "--model", "tiny.safetensors", *["--compare"] * compare)
        lines = out.splitlines()
        assert status == 0
        assert max(map(len, lines)) <= 80
        assert ("the model's own classes" if own_names else "classes of ImageNet-1k, by the size of the head") in lines
        assert sum(".jpg" in line or ".png" in line for line in lines) == (2 if len(sources) == 2 else 12)
        percents = [line for line in lines if re.match(r" *\d+\.\d\d %", line)]
        assert len(percents) in rows
        assert any("…" in line for line in percents) == own_names


def test_a_comparison_is_shown_side_by_side(capsys, tmp_path, digits):
    paths = save_digits(tmp_path, 20, first=10)
    arguments = ("--model", DIGITS, "--r", "16", "--compare")
    found = classify(digits, paths, r=16, compare=True, batch=8)
    changed = [i for i, answer in enumerate(found) if answer.changed]
    assert 0 < len(changed) < 20

    status, out, _ = run(capsys, "classify", *paths, *arguments)
    assert status == 0
    rows = {line.split()[-1]: line for line in out.splitlines() if ".png" in line}
    for path, answer in zip(paths, found, strict=True):
        best, unmerged = answer.top[0], answer.top_unmerged[0]
        both = f"{100 * unmerged.unmerged:6.2f} %  {100 * best.probability:6.2f} %"
        assert rows[path].strip().startswith(both.strip())
        assert (f"{unmerged.name} → {best.name}" in rows[path]) == answer.changed
    assert f"r = 0 for {20 - len(changed)} of 20 images ({5 * (20 - len(changed)):.1f} %)" in out

    _, out, _ = run(capsys, "classify", paths[changed[0]], *arguments)
    assert "another answer" in out
    answer = found[changed[0]]
    wanted = {guess.class_index for guess in (*answer.top, *answer.top_unmerged)}
    shown = [line.split() for line in out.splitlines() if line.count(" % ") == 2]
    assert next(int(row[-1]) for row in shown) == answer.top[0].class_index
    assert {int(row[-1]) for row in shown} == wanted
    assert "tomevit bench" in out


def test_json(capsys, tmp_path, digits):
    save_digits(tmp_path, 5)
    (tmp_path / "x.png").write_bytes(b"no image")
    status, out, err = run(
        capsys, "classify", str(tmp_path), "--model", DIGITS, "--r", "8,-1", "--json", "--compare", "--top", "2"
    )
    assert status == 1
    assert err == f"tomevit: {tmp_path / 'x.png'}: not an image of a known format\n"
    result = json.loads(out)
    assert {"schema", "device", "threads", "torch", "tomevit", "dtype", "batch"} <= result.keys()
    assert (result["r"], result["tokens"]) == ({"mean": 8, "inflection": -1.0}, list(digits.token_counts((8, -1.0))))
    assert (result["upright"], result["interrupted"], result["classes"]) == (True, False, "own")
    assert result["unreadable"] == [{"image": str(tmp_path / "x.png"), "reason": "not an image of a known format"}]
    expected = classify(digits, [tmp_path / f"{i:03}.png" for i in range(5)], r=(8, -1.0), compare=True, top=2)
    assert [image["image"] for image in result["images"]] == [answer.image for answer in expected]
    for image, answer in zip(result["images"], expected, strict=True):
        for shown, guesses in ((image["top"], answer.top), (image["r0"]["top"], answer.top_unmerged)):
            assert [(one["class_index"], one["name"], one["probability"], one["probability_r0"]) for one in shown] == [
                (g.class_index, g.name, pytest.approx(g.probability), pytest.approx(g.unmerged)) for g in guesses
            ]
        assert image["changed"] == answer.changed
        assert image["seconds"] > 0 < image["r0"]["seconds"]
    assert result["summary"]["images"] == 5
    assert result["summary"]["kept"] == summarise(expected).kept
    assert result["summary"]["speed_up"] == pytest.approx(
        sum(image["r0"]["seconds"] for image in result["images"]) / sum(image["seconds"] for image in result["images"])
    )


@pytest.mark.parametrize("compare", [False, True])
def test_csv_has_a_row_for_each_image_and_rank(capsys, tmp_path, compare):
    tomevit.save(tiny(4, num_classes=1000), tmp_path / "tiny.safetensors")
    (tmp_path / "a, b.png").write_bytes(FILES["odd.png"])
    (tmp_path / "c.jpg").write_bytes(FILES["photograph.jpg"])
    arguments = [str(tmp_path), "--model", str(tmp_path / "tiny.safetensors"), "--csv"]
    status, out, err = run(capsys, "classify", *arguments, *["--compare"] * compare)
    assert (status, err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["image"].rpartition("/")[2], row["rank"]) for row in rows] == [
        (name, str(rank)) for name in ("a, b.png", "c.jpg") for rank in range(1, 6)
    ]
    model, names = tomevit.load(tmp_path / "tiny.safetensors"), imagenet(1000)
    expected = [
        pair
        for answer in classify(model, tmp_path, compare=True)
        for pair in zip(answer.top, answer.top_unmerged, strict=True)
    ]
    for row, (guess, unmerged) in zip(rows, expected, strict=True):
        index = int(row["class_index"])
        assert index == guess.class_index
        assert (row["name"], row["synset"]) == (names.names[index], names.synsets[index])
        assert float(row["probability"]) == pytest.approx(guess.probability)
        assert int(row["tokens"]) == model.token_counts()[-1]
        assert ("r0_name" in row) == compare
        if compare:
            assert row["r0_name"] == unmerged.name
            assert float(row["r0_probability"]) == pytest.approx(unmerged.unmerged)
            assert float(row["probability_r0"]) == pytest.approx(guess.unmerged)


@pytest.mark.parametrize("form", [(), ("--csv",), ("--json",)], ids=str)
def test_a_file_gets_what_is_printed(capsys, tmp_path, form):
    save_digits(tmp_path, 12)
    arguments = ["classify", str(tmp_path), "--model", DIGITS, "--batch", "5", *form]
    _, printed, _ = run(capsys, *arguments)
    status, out, err = run(capsys, *arguments, "-o", str(tmp_path / "out.txt"), "--workers", "2")
    assert (status, out, err) == (0, "", f"written to {tmp_path / 'out.txt'}\n")
    written = (tmp_path / "out.txt").read_text(encoding="utf-8")
    # Of both without the times. Lines of 12 digits, each with its file.
    times = r"\d+(\.\d+)? ms|\"seconds\": .*|,\d\.\d+(e-\d+)?$"
    first, second = (re.sub(times, "", text, flags=re.MULTILINE) for text in (printed, written))
    assert first == second
    assert all(f"{i:03}.png" in first for i in range(12))


def test_standard_input_is_an_image_or_a_list(capsys, tmp_path, monkeypatch):
    paths = save_digits(tmp_path, 3)
    arguments = ("classify", "-", "--model", DIGITS, "--json")

    give(monkeypatch, Path(paths[1]).read_bytes())
    status, out, _ = run(capsys, *arguments)
    (image,) = json.loads(out)["images"]
    assert (status, image["image"]) == (0, "-")

    give(monkeypatch, f"{paths[0]}\r\n\n{paths[1]}\n{tmp_path}/none.png\n{paths[2]}".encode())
    status, out, err = run(capsys, *arguments)
    found = json.loads(out)["images"]
    assert [each["image"] for each in found] == paths
    assert [one["class_index"] for one in found[1]["top"]] == [one["class_index"] for one in image["top"]]
    assert (status, err) == (1, f"tomevit: {tmp_path}/none.png: No such file or directory\n")

    give(monkeypatch, Path(paths[1]).read_bytes())
    status, out, _ = run(capsys, *arguments, paths[2])
    assert [each["image"] for each in json.loads(out)["images"]] == ["-", paths[2]]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "standard input is empty"),
        (b"\r\n \n", "standard input is empty"),
        (bytes(range(256)), "neither an image of a known format nor a list of files"),
        (FILES["odd.png"][:2000], "standard input: damaged"),
        (b"/no/such/file.png\n", "/no/such/file.png: No such file"),
    ],
)
def test_standard_input_that_is_neither(capsys, monkeypatch, data, says):
    give(monkeypatch, data)
    status, _, err = run(capsys, "classify", "-", "--model", DIGITS, "--csv")
    assert status == 2
    assert says in err
    assert len(err.splitlines()) == 1


def test_status_is_1_if_some_cannot_be_read_and_2_if_none_can(capsys, tmp_path):
    good, bad = save_digits(tmp_path, 2)
    Path(bad).write_bytes(b"")
    model = ("--model", DIGITS)
    status, out, err = run(capsys, "classify", good, bad, *model)
    assert (status, err) == (1, f"tomevit: {bad}: the file is empty\n")
    assert good in out
    status, out, err = run(capsys, "classify", bad, bad, *model)
    assert (status, err.splitlines()[-1]) == (2, "tomevit: none of 2 images can be read")
    assert run(capsys, "classify", bad, *model)[0] == 2


def test_names_of_files_may_be_any_bytes(capsys, tmp_path, monkeypatch):
    (path,) = save_digits(tmp_path, 1)
    odd = Path(path).rename(tmp_path / "odd\udce9,\u201cname\u201d.png")
    for form in ([], ["--csv"], ["--json"], ["-o", str(tmp_path / "out.txt")]):
        with monkeypatch.context() as patch, (tmp_path / "printed").open("w", encoding="utf-8") as printed:
            patch.setattr(sys, "stdout", printed)
            assert run(capsys, "classify", str(odd), "--model", DIGITS, *form)[0] == 0
        text = (tmp_path / ("out.txt" if "-o" in form else "printed")).read_bytes()
        names = {"--json": json.dumps(str(odd)).encode()}
        assert names.get("".join(form), os.fsencode(odd)) in text


def test_ctrl_c_prints_what_there_is(capsys, tmp_path, monkeypatch):
    paths = save_digits(tmp_path, 5)

    def interrupted(*args: Any, **options: Any) -> Iterator[Answer]:
        for i, answer in enumerate(answers(*args, **options)):
            if i == 3:
                before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs may ignore it
                try:
                    signal.raise_signal(signal.SIGINT)
                finally:
                    signal.signal(signal.SIGINT, before)
            yield answer

    monkeypatch.setattr(tomevit.cli.classify, "answers", interrupted)
    for form in ([], ["--csv"], ["--json"], ["--json", "-o", str(tmp_path / "out.txt")]):
        status, out, err = run(capsys, "classify", *paths, "--model", DIGITS, "--top", "1", *form)
        assert status == 130
        assert err.splitlines()[-1] == "tomevit: interrupted"
        if form[1:]:
            out = (tmp_path / "out.txt").read_text(encoding="utf-8")
        assert [path in out for path in paths] == [True] * 3 + [False] * 2
        if form[:1] == ["--json"]:
            assert json.loads(out)["interrupted"] is True
        elif not form:
            assert "Interrupted after 3 of 5 images." in out


def test_who_reads_may_leave(tmp_path):
    """As `head` does: nothing is said about it."""
    (path,) = save_digits(tmp_path, 1)
    code = "from tomevit.cli import main; main()"
    command = [sys.executable, "-W", "error", "-c", code, "classify", path, "--model", DIGITS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_nothing_is_fetched_for_what_cannot_be(capsys, tmp_path, monkeypatch):
    def fetch(*args: Any, **options: Any) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(tomevit.cli.classify, "trained", fetch)
    (path,) = save_digits(tmp_path, 1)
    for arguments, says in (
        ([path, "--model", "vit_b16.orig_in21k"], "vit_b16.orig_in21k has no head"),
        ([path, "--compare"], "r = 0 merges nothing, and would be compared with itself: give an r such as 8, 13 or 16"),
        ([path, "--r", "[1,1,1,1,1,1,1,1,1,1,1,1,1]"], "the model has 12"),
        ([path, "--model", "vit_b61"], "did you mean vit_b16"),
        ([f"{path}x"], "No such file or directory"),
        ([path, "-o", "/nowhere/x.json"], "no directory /nowhere"),
        ([path, "--device", "abacus"], "abacus"),
        ([path, "--dtype", "int8"], "bfloat16"),
        ([path, "--top", "0"], "--top"),
        ([path, "--batch", "0"], "--batch"),
        ([path, "--workers", "-1"], "--workers"),
        ([], "IMAGE"),
        (["-", "-"], "only once"),
    ):
        status, out, err = run(capsys, "classify", *arguments)
        assert (status, out) == (2, ""), arguments
        assert says in err
        assert len(err.splitlines()) == 1


def test_size_dtype_and_orientation_are_as_asked(capsys, tmp_path):
    (tmp_path / "turned.jpg").write_bytes(turned(6))
    tomevit.save(tiny(2), tmp_path / "tiny.safetensors")
    model = tomevit.load(tmp_path / "tiny.safetensors")
    arguments = ("classify", str(tmp_path / "turned.jpg"), "--model", str(tmp_path / "tiny.safetensors"), "--json")
    for more, upright, dtype in (([], True, "float32"), (["--no-upright", "--dtype", "bfloat16"], False, "bfloat16")):
        result = json.loads(run(capsys, *arguments, *more)[1])
        assert (result["upright"], result["dtype"]) == (upright, dtype)
        (expected,) = classify(model.to(getattr(torch, dtype)), tmp_path / "turned.jpg", upright=upright)
        said = [(one["class_index"], one["probability"]) for one in result["images"][0]["top"]]
        assert said == [(guess.class_index, guess.probability) for guess in expected.top]
        model = model.float()
    (path,) = save_digits(tmp_path, 1)
    result = json.loads(run(capsys, "classify", path, "--model", DIGITS, "--img-size", "16x8", "--json")[1])
    assert result["tokens"][0] == 16 * 8 + 1
