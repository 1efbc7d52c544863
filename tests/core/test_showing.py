"""Objects that say what they are: in a line, in a notebook, and in timm's words."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tomevit
from benchmarks.peers import timm, torchvision
from tests.helpers import images_for, tiny
from tomevit.config import Figure
from tomevit.measure.bench import candidates, compare
from tomevit.models import unwrap_replicas
from tomevit.notebook import html_table
from tomevit.tasks.classify import Answer, Answers, Guess
from tomevit.tasks.embed import embed
from tomevit.tasks.evaluate import evaluate
from tomevit.tasks.tune import Point
from tomevit.transform import TrainingTransform, Transform

HOSTILE = "<script>alert('x')</script>\x1b[31m & \"quoted\""


def picture(size: int = 40, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size + 9, 3), dtype=np.uint8))


class Table(HTMLParser):
    """The tags and the text of a piece of HTML."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data + "|"


# ---------------------------------------------------------------------------------------------------------------- lines


def test_a_model_begins_with_what_it_is() -> None:
    model = tomevit.create("deit_s16", r=13)
    first = repr(model).split("\n")[:6]
    assert first == [
        "VisionTransformer(",
        "  deit_s16",
        "  images of 224x224 pixels, 3 channels; 22.1 M parameters",
        "  197 tokens in, 41 out; 2.7 GFLOPs (r = 0: 4.6 GFLOPs)",
        "  r=13",
        "  (patch_embed): PatchEmbed(",
    ]
    model.r = 0
    assert "197 tokens in, 197 out; 4.6 GFLOPs\n" in repr(model)
    assert repr(tomevit.load(_own_file())).split("\n")[1].strip() == "digits_p1.plain"


def _own_file() -> Path:
    return Path(tomevit.__file__).parent / "assets" / "digits_p1_plain.safetensors"


def test_a_models_line_has_its_own_parameters_and_never_raises() -> None:
    model = tiny(4)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count / 1e6:.3g} M parameters" in repr(model)
    model.head = nn.Linear(model.config.embed_dim, 1000)
    assert f"{(count + 993 * 25) / 1e6:.3g} M parameters" in repr(model)
    model.r = ["grid", "grid", "grid", "grid"]
    assert "cannot merge" in repr(model)  # a forward says so too
    with pytest.raises(ValueError, match="cannot merge"):
        model(images_for(model))


def test_a_card_says_what_people_ask_first() -> None:
    card = tomevit.card("deit_s16.tome_r13")
    assert repr(card) == (
        "<Card deit_s16.tome_r13: 22.1 M parameters, 224x224 pixels, 197 tokens, 4.6 GFLOPs, r = 13, "
        "79.36 % top-1 at r = 13, cc-by-nc-4.0>"
    )
    assert all(len(repr(tomevit.card(name))) < 400 for name in tomevit.list_models(weights=True))
    shown = Table(card._repr_html_()).text
    assert all(f"{said}|" in shown for said in ("deit_s16.tome_r13", "22.1 M parameters", "2.7 GFLOPs", card.timm))


def test_answers_are_short_and_a_table() -> None:
    answers = tomevit.classify(
        tomevit.create("digits_p1", pretrained=True), [picture(), b"no image"], r=8, compare=True
    )
    good, bad = answers
    assert re.fullmatch(r"<Answer \d [\d.e-]+ %, \d [\d.e-]+ %, \d [\d.e-]+ %>", repr(good))
    assert "not an image" in repr(bad)
    assert isinstance(answers, list)
    shown = Table(answers._repr_html_())
    assert shown.tags.count("tr") == 1 + len(good.top) + 1
    assert "at r = 0|" in shown.text
    assert "at r = 0" not in Answers([good._replace(top_unmerged=())])._repr_html_()
    assert Table(good._repr_html_()).tags.count("tr") == 1 + len(good.top)


def test_labels_of_guesses() -> None:
    assert Guess(0, "tench, Tinca tinca", "n01440764", 0.5).label == "tench"
    assert Guess(0, "red, blue", "", 0.5).label == "red, blue"
    assert Guess(7, "", "", 0.5).label == "class 7"


def test_comparisons_are_short_and_a_table() -> None:
    model = tiny()
    found = compare(candidates(model, [8]), model, batch=2, rounds=1)
    assert re.match(r"<Comparison in float32, batch 2, \d+ rounds: \[<Row tomevit eager, r = 0: ", repr(found))
    assert "<Row tomevit eager, r = 8: " in repr(found.rows)
    assert Table(found._repr_html_()).tags.count("tr") == 3


def a_front(top1: float | None = None, model: str = "digits_p1") -> tomevit.Front:
    fields: dict[str, Any] = {"matchings": (), "flop_ratio": 1.0, "seconds": 1.0, "seconds_range": (1.0, 1.0)}
    fields |= {"speed_up_range": None, "kl": 0.0, "cosine": None, "top1": top1}
    points = (
        Point(r=0, kind="unmerged", tokens=65, speed_up=1.0, agreement=100.0, **fields),
        Point(r=[0, 8], kind="found", tokens=57, speed_up=1.5, agreement=99.0, **fields),
    )
    setting = {"model": model, "device": "cpu", "dtype": "float32", "batch": 8}
    return tomevit.Front(setting=setting, points=points, note="Nothing was gained.")


def test_fronts_are_short_and_a_table() -> None:
    front = a_front()
    assert repr(front) == (
        "<Front of digits_p1 on cpu, float32, batch 8: 2 points, 1.00 to 1.50 times as fast, agreement 100.00 to "
        "99.00 %>"
    )
    assert repr(front.points[1]) == "<Point r = [0,8]: 1.50 times as fast, agreement 99.00 %, 57 remaining tokens>"
    shown = Table(front._repr_html_())
    assert shown.tags.count("tr") == 3
    assert "Nothing was gained.|" in shown.text
    assert "top-1" not in shown.text
    assert "97.50|" in Table(a_front(97.5)._repr_html_()).text


def hostile_objects() -> dict[str, Any]:
    card = tomevit.Card(name=HOSTILE, notes=HOSTILE, figures=(Figure(top1=1.0, source=HOSTILE),), licence=HOSTILE)
    answer = Answer(HOSTILE, (Guess(0, HOSTILE, "", 0.5),), 4)
    seen = tomevit.visualize(tiny(), picture(), [0, 8], title=HOSTILE)
    return {
        "card": card,
        "answer": answer,
        "error": Answer(HOSTILE, (), 4, error=HOSTILE),
        "answers": Answers([answer]),
        "front": a_front(model=HOSTILE),
        "observation": replace(seen, card=replace(seen.card, name=HOSTILE)),
    }


@pytest.mark.parametrize("name", ["card", "answer", "error", "answers", "front", "observation"])
def test_texts_of_others_are_escaped(name: str) -> None:
    shown = hostile_objects()[name]
    page, line = shown._repr_html_(), repr(shown)
    assert "\x1b" not in page + line
    assert "<script>alert" not in page
    assert set(Table(page).tags) <= {"table", "caption", "b", "thead", "tbody", "tr", "th", "td", "p", "iframe"}


def test_tables_hold_what_they_are_given() -> None:
    shown = Table(html_table("a <b>", ("x", "y"), [(1, None), ("<i>", "\n")], "note"))
    assert shown.text == "a <b>|x|y|1|<i>|\\n|note|"


# ---------------------------------------------------------------------------------------------------- what visualize is


@pytest.fixture(scope="module")
def seen() -> Any:
    return tomevit.visualize(tiny(), picture(), [0, 8])


def test_visualize_shows_itself(seen: Any) -> None:
    shown = seen._repr_html_()
    tags = Table(shown).tags
    assert tags == ["iframe"]
    assert "srcdoc=" in shown
    assert 'sandbox="allow-scripts"' in shown
    assert repr(seen) == (
        "<Observation of an image in a model without a name; r = 0: 65 to 65 tokens, r = 8: 65 to 33 tokens>"
    )


BEGINNINGS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "html": b"<!doctype html>", "HTM": b"<!doctype html>"}


@pytest.mark.parametrize("suffix", BEGINNINGS)
def test_visualize_saves_by_suffix(seen: Any, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    seen.save(path)
    assert path.read_bytes().startswith(BEGINNINGS[suffix])
    assert list(tmp_path.iterdir()) == [path]


def test_visualize_draws_what_it_is_asked_for(seen: Any, tmp_path: Path) -> None:
    figure = seen.figure(show="attention", blocks=[1, 4])
    assert [axis.get_title() for axis in figure.axes[:2]] == ["block 1", "block 4"]  # attention is in a block
    figure = seen.figure(blocks=[1, 4])
    assert {"after block 1", "after block 4"} < {axis.get_title() for axis in figure.axes}
    assert len(seen.figure(show="picture").axes) == 2  # the image, and what r = 8 makes of it
    seen.save(tmp_path / "a.png", show="picture")
    for wrong, said in (
        ({"path": "a.xyz"}, r"\.png, \.svg or \.pdf, a page's in \.html"),
        ({"path": "a.html", "show": "strip"}, "show and blocks are for pictures"),
        ({"path": "a.png", "show": "film"}, "must be picture, strip or attention"),
        ({"path": "a.png", "show": "picture", "blocks": [1]}, "for strips"),
        ({"path": "a.png", "blocks": [9]}, "no block 9"),
    ):
        with pytest.raises(ValueError, match=said):
            seen.save(**wrong | {"path": tmp_path / wrong["path"]})
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_visualize_takes_files_and_its_own_r(tmp_path: Path) -> None:
    model = tiny(3)
    picture().save(tmp_path / "cat.png")
    found = tomevit.visualize(torch.optim.swa_utils.AveragedModel(model).eval(), tmp_path / "cat.png")
    assert found.title == "cat.png"
    assert found.runs[0].r == 0
    assert 3 in [run.r for run in found.runs]
    assert tomevit.visualize(model, (tmp_path / "cat.png").read_bytes(), [0]).title == ""


# ---------------------------------------------------------------------------------------------------------- timm's


@pytest.mark.parametrize("name", ["vit_b16", "vit_ti16_384", "mae_b16", "digits_p1"])
def test_timm_resolves_how_images_are_prepared(name: str) -> None:
    model, card = tomevit.create(name, device="meta"), tomevit.card(name)
    for found in (timm.data.resolve_data_config(model=model), timm.data.resolve_model_data_config(model)):
        assert found["input_size"] == (card.config.in_chans, *card.config.img_size)
        assert (found["mean"], found["std"]) == (card.preprocess.mean, card.preprocess.std)
        assert (found["interpolation"], found["crop_pct"]) == (card.preprocess.interpolation, card.preprocess.crop_pct)
    assert model.default_cfg == model.pretrained_cfg
    assert model.default_cfg["num_classes"] == card.config.num_classes


@pytest.mark.parametrize("name", ["deit_ti16", "deit_distilled_ti16"])
def test_attributes_are_timms(name: str) -> None:
    card = tomevit.card(name)
    ours = tomevit.create(name)
    theirs = timm.create_model(card.timm)
    for attribute in ("num_classes", "num_features", "embed_dim", "head_hidden_size", "num_prefix_tokens"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert (ours.has_class_token, ours.num_reg_tokens) == (theirs.has_class_token, theirs.num_reg_tokens)
    assert ours.feature_info == theirs.feature_info
    ours.feature_info = ours.feature_info[-2:]  # as one does for timm's FeatureHookNet
    assert ours.feature_info == theirs.feature_info[-2:]
    theirs.load_state_dict(ours.state_dict())
    images = images_for(ours, 1)
    with torch.inference_mode():
        mine = ours.forward_head(ours.forward_features(images), pre_logits=True)
        expected = theirs.eval().forward_head(theirs.forward_features(images), pre_logits=True)
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------- what stands for a model


def test_flops_and_transform_take_a_model_a_card_or_a_name() -> None:
    card = tomevit.card("deit_s16.tome_r13")
    model = tomevit.create("deit_s16.tome_r13")
    whole, merged = tomevit.flops(card.config), tomevit.flops(card.config, 13)
    assert whole > merged
    for subject in (model, nn.DataParallel(model), card, "deit_s16.tome_r13"):
        assert tomevit.flops(subject) == merged
        assert tomevit.flops(subject, 0) == whole
        assert tomevit.flops(subject, "2x", computed=True) < tomevit.flops(subject, 0, computed=True) / 1.99
        assert repr(tomevit.transform(subject)) == repr(tomevit.transform(model))
    small = tomevit.create("deit_s16", img_size=64, r=2)
    assert tomevit.flops(small) == tomevit.flops(small.config, 2)
    assert tomevit.transform(small).size == (64, 64)
    vit = tomevit.card("vit_b16")
    if vit.presets:
        assert tomevit.flops("vit_b16", vit.presets[0].name) == tomevit.flops(vit.config, list(vit.presets[0].r))
    with pytest.raises(ValueError, match="did you mean vit_b16"):
        tomevit.flops("vit_b61")


# ---------------------------------------------------------------------------------------------------- device and dtype


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float64])
def test_create_puts_weights_where_they_are_to_be(pretrained: bool, dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    plain = tomevit.create("digits_p1", pretrained=pretrained, r=8)
    torch.manual_seed(0)
    model = tomevit.create("digits_p1", pretrained=pretrained, r=8, device="cpu", dtype=dtype)
    expected = dtype or torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert all(torch.equal(a, b.to(expected)) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert (model.r, model.training) == (8, False)
    assert tomevit.create("digits_p1", pretrained=pretrained, device="meta").device.type == "meta"


def test_create_knows_devices_and_dtypes_before_it_reads_anything() -> None:
    for wrong, said in (
        ({"device": "abacus"}, "device is 'abacus', which there is not here"),
        ({"device": "cuda:99"}, "device is 'cuda:99', which there is not here"),
        ({"dtype": torch.int8}, "dtype is torch.int8, and must be a floating one"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16', and must be a floating one of torch's, as in torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=said):
            tomevit.create("digits_p1", pretrained="/nowhere/a.pth", **wrong)


# ---------------------------------------------------------------------------------------------------------- to train on


def test_training_transforms_crop_and_flip_as_torchvision_does() -> None:
    model = tomevit.create("deit_ti16", img_size=32)
    ours = tomevit.transform(model, train=True)
    images, theirs_of = model.card.preprocess, torchvision.transforms
    theirs = theirs_of.Compose(
        [
            theirs_of.RandomResizedCrop((32, 32), interpolation=theirs_of.InterpolationMode(images.interpolation)),
            theirs_of.RandomHorizontalFlip(),
            theirs_of.ToTensor(),
            theirs_of.Normalize(images.mean, images.std),
        ]
    )
    for seed in range(5):
        torch.manual_seed(seed)
        mine = ours(picture())
        torch.manual_seed(seed)
        assert torch.equal(mine, theirs(picture()))
    assert not torch.equal(ours(picture()), ours(picture()))


def test_training_transforms_take_what_others_take_and_travel() -> None:
    ours = tomevit.transform("digits_p1", train=True)
    assert isinstance(ours, TrainingTransform)
    assert ours(picture()).shape == (1, 8, 8)
    assert ours(torch.zeros(5, 1, 12, 9, dtype=torch.uint8)).shape == (5, 1, 8, 8)
    again = pickle.loads(pickle.dumps(ours))
    results = []
    for each in (ours, again):
        torch.manual_seed(1)
        results.append(each(picture()))
    assert torch.equal(*results)
    palette = picture().convert("P")
    torch.manual_seed(1)
    first = tomevit.transform("deit_ti16", train=True)(palette)
    torch.manual_seed(1)
    assert torch.equal(first, tomevit.transform("deit_ti16", train=True)(palette.convert("RGB")))
    assert "RandomResizedCrop" in repr(ours)


def test_without_torchvision_training_transforms_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchvision.transforms.v2", None)
    with pytest.raises(ValueError, match=r"by chance need torchvision: pip install 'tomevit\[train\]'$"):
        tomevit.transform("digits_p1", train=True)
    tomevit.transform("digits_p1")


@pytest.mark.parametrize("train", [False, True])
def test_channels_are_looked_at_before_anything_is_resized(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = tomevit.transform("vit_b16", train=train)
    monkeypatch.setattr(Transform, "_resize_tensor", lambda *_: pytest.fail("it was resized"))
    image = torch.zeros(1200, 1600, 3, dtype=torch.uint8)
    for wrong, said in (
        (image, r"its shape \(1200, 1600, 3\) is height, width, channel: permute\(2, 0, 1\)"),
        (image[None], r"height, width, channel: movedim\(-1, -3\)"),
        (torch.zeros(5, 8, 8, dtype=torch.uint8), "the image has 5 channels, and the model takes 3$"),
        (torch.zeros(3, 0, 8, dtype=torch.uint8), "has no pixels"),
        (image.numpy(), "PIL.Image.fromarray makes one"),
    ):
        with pytest.raises(ValueError, match=said):
            prepare(wrong)


# ------------------------------------------------------------------------------------------------------------- wrappers


def replicated(model: nn.Module) -> dict[str, nn.Module]:
    return {
        "averaged": torch.optim.swa_utils.AveragedModel(model),
        "timm's average": timm.utils.ModelEmaV2(model),
        "data parallel": nn.DataParallel(model),
        "twice": nn.DataParallel(torch.optim.swa_utils.AveragedModel(model)),
    }


@pytest.mark.parametrize("name", ["averaged", "timm's average", "data parallel", "twice"])
def test_wrapped_models_classify_evaluate_and_embed(name: str, tmp_path: Path) -> None:
    model = tiny(4)
    wrapped = replicated(model)[name].eval()
    picture().save(tmp_path / "a.png")
    file = str(tmp_path / "a.png")

    def plain(answers: Answers) -> list[list[tuple[int, float]]]:
        return [[(guess.class_index, guess.probability) for guess in answer.top] for answer in answers]

    assert plain(tomevit.classify(wrapped, file)) == plain(tomevit.classify(model, file))
    assert evaluate(wrapped, [file], [0]).rows[0].top1 == evaluate(model, [file], [0]).rows[0].top1
    assert embed(wrapped, [file], tmp_path / "a.safetensors").rows == 1


def test_what_compiling_made_stays_and_other_modules_are_told() -> None:
    model = tiny()
    compiled: Any = torch.compile(model)
    assert unwrap_replicas(compiled) is compiled
    assert unwrap_replicas(nn.DataParallel(compiled)) is compiled
    assert unwrap_replicas(torch.compile(nn.DataParallel(model))) is model  # type: ignore[arg-type]
    assert unwrap_replicas(model) is model
    with pytest.raises(ValueError, match="model is a Linear, and must be a model of tomevit's"):
        tomevit.classify(nn.DataParallel(nn.Linear(2, 2)), picture())  # type: ignore[arg-type]
