"""Arguments of a wrong type are answered in a sentence that names the argument, at every public function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tomevit
from tests.helpers import images_for, tiny
from tomevit import MaskedAutoencoder, VisionTransformer
from tomevit.tasks.embed import embed
from tomevit.tasks.evaluate import evaluate

PICTURE = Image.new("RGB", (8, 8))
ANY = tomevit.Config()

#: What is hardly ever right. A function is given all of these, but for the kinds that it names as right.
WRONG: dict[str, Any] = {
    "None": None,
    "int": 5,
    "list": [1.5],
    "tensor": torch.zeros(3),
    "array": np.zeros((8, 8, 3), np.uint8),
    "picture": PICTURE,
    "object": object(),
    "module": torch.nn.Linear(2, 2),
    "parameter": torch.nn.Parameter(torch.zeros(3)),
    "bytes": b"x",
}

#: One argument of a function each, what its message must name, and which of WRONG are right.
CALLS: dict[str, tuple[Callable[[VisionTransformer, Any], object], str, tuple[str, ...]]] = {
    "card": (lambda _, v: tomevit.card(v), "name", ()),
    "class_names": (lambda _, v: tomevit.class_names(v), "card", ()),
    "classify, images": (
        lambda m, v: tomevit.classify(m, v),
        "image",
        ("picture", "bytes"),
    ),  # bytes: an answer with an error
    "classify, model": (lambda _, v: tomevit.classify(v, PICTURE), "model", ()),
    "classify, r": (lambda m, v: tomevit.classify(m, PICTURE, r=v), "r", ("None", "int", "list")),
    "convert, dtype": (lambda _, v: tomevit.convert("digits_p1.plain", "a.safetensors", dtype=v), "dtype", ("None",)),
    "convert, format": (
        lambda _, v: tomevit.convert("digits_p1.plain", "a.safetensors", format=v),
        "format",
        ("None",),
    ),
    "convert, model": (lambda _, v: tomevit.convert("digits_p1.plain", "a.safetensors", model=v), "model", ("None",)),
    "convert, out": (lambda _, v: tomevit.convert("digits_p1.plain", v), "path|name", ("None",)),
    "convert, source": (lambda _, v: tomevit.convert(v), "source", ()),
    "create": (lambda _, v: tomevit.create(v), "name", ()),
    "create, device": (lambda _, v: tomevit.create("digits_p1", device=v), "device", ("None",)),
    "create, dtype": (lambda _, v: tomevit.create("digits_p1", dtype=v), "dtype", ("None",)),
    "create, img_size": (lambda _, v: tomevit.create("digits_p1", img_size=v), "img_size", ("None", "int")),
    "create, key": (lambda _, v: tomevit.create("digits_p1", pretrained="digits_p1.plain", key=v), "key", ("None",)),
    "create, pretrained": (lambda _, v: tomevit.create("digits_p1", pretrained=v), "pretrained|model", ()),
    "embed": (lambda _, v: embed(v, ["a.png"], "a.safetensors"), "model", ()),
    "evaluate": (lambda _, v: evaluate(v, ["a.png"], [0]), "model", ()),
    "export, format": (lambda m, v: tomevit.export(m, "a.safetensors", v), "format", ()),
    "export, model": (lambda _, v: tomevit.export(v, "a.safetensors", "timm"), "model", ()),
    "export, out": (lambda m, v: tomevit.export(m, v, "timm"), "out", ()),
    "export_program, batch": (lambda m, v: tomevit.export_program(m, "a.onnx", batch=v), "batch", ("None", "int")),
    "export_program, format": (lambda m, v: tomevit.export_program(m, "a.onnx", v), "format", ()),
    "export_program, model": (lambda _, v: tomevit.export_program(v, "a.onnx"), "model", ()),
    "export_program, out": (lambda m, v: tomevit.export_program(m, v), "path", ()),
    "flops": (lambda _, v: tomevit.flops(v), "model", ()),
    "flops, r": (lambda _, v: tomevit.flops(ANY, v), "r", ("None", "int", "list")),
    "from_module": (lambda _, v: tomevit.from_module(v), "module|model", ()),
    "list_models": (lambda _, v: tomevit.list_models(v), "pattern", ()),
    "list_recipes": (lambda _, v: tomevit.list_recipes(v), "pattern", ()),
    "load": (lambda _, v: tomevit.load(v), "path", ()),
    "optimize": (lambda _, v: tomevit.optimize(v), "model", ()),
    "param_groups": (lambda _, v: tomevit.param_groups(v, 1e-3), "model", ()),
    "param_groups, lr": (lambda m, v: tomevit.param_groups(m, v), "lr", ("int",)),
    "push, model": (lambda _, v: tomevit.push(v, "owner/repo"), "source|model", ()),
    "push, repo": (lambda m, v: tomevit.push(m, v), "repo|name", ()),
    "recipe": (lambda _, v: tomevit.recipe(v), "name", ()),
    "save, model": (lambda _, v: tomevit.save(v, "a.safetensors"), "model", ()),
    "save, path": (lambda m, v: tomevit.save(m, v), "path", ()),
    "transform": (lambda _, v: tomevit.transform(v), "model", ()),
    "transform, image": (lambda m, v: tomevit.transform(m)(v), "image", ("picture",)),
    "transform to train, image": (lambda m, v: tomevit.transform(m, train=True)(v), "image", ("picture",)),
    "tune, images": (lambda m, v: tomevit.tune(m, v), "images", ()),
    "tune, labels": (lambda m, v: tomevit.tune(m, images_for(m, 64), v), "labels", ("None",)),
    "tune, matchings": (lambda m, v: tomevit.tune(m, images_for(m, 64), matchings=v), "matchings", ()),
    "tune, model": (lambda _, v: tomevit.tune(v, torch.zeros(64, 3, 32, 32)), "model", ()),
    "tune, rounds": (lambda m, v: tomevit.tune(m, images_for(m, 64), rounds=v), "rounds", ("int",)),
    "unmerge": (lambda _, v: tomevit.unmerge(v), "tokens", ()),
    "verify": (lambda _, v: tomevit.verify(v), "path", ()),
    "visualize, image": (lambda m, v: tomevit.visualize(m, v), "image", ("picture", "bytes")),
    "visualize, model": (lambda _, v: tomevit.visualize(v, PICTURE), "model", ()),
    "visualize, r_values": (lambda m, v: tomevit.visualize(m, PICTURE, v), "r", ("None",)),
    "Card, config": (lambda _, v: tomevit.Card(name="a", config=v), "config", ()),
    "Card, name": (lambda _, v: tomevit.Card(name=v), "name", ()),
    "Config": (lambda _, v: tomevit.Config(depth=v), "depth", ("int",)),
    "Front.load": (lambda _, v: tomevit.Front.load(v), "path", ()),
    "MaskedAutoencoder": (lambda _, v: MaskedAutoencoder(v), "encoder", ()),
    "MaskedAutoencoder.r": (
        lambda m, v: setattr(MaskedAutoencoder(m, decoder_dim=8, decoder_depth=1, decoder_heads=1), "r", v),
        "r",
        ("int", "list"),
    ),
    "Preprocess": (lambda _, v: tomevit.Preprocess(mean=v), "mean", ("list",)),
    "model(images)": (lambda m, v: m(v), "images", ()),
    "model(images, r)": (lambda m, v: m(images_for(m), v), "r", ("None", "int", "list")),
    "model.forward_features": (lambda m, v: m.forward_features(v), "images", ()),
    "model.forward_features, visible": (
        lambda m, v: m.forward_features(images_for(m), visible=v),
        "visible",
        ("None",),
    ),
    "model.forward_head": (lambda m, v: m.forward_head(v), "tokens", ()),
    "model.forward_intermediates": (lambda m, v: m.forward_intermediates(v), "images", ()),
    "model.freeze": (lambda m, v: m.freeze(v), "blocks", ()),
    "model.card": (lambda m, v: setattr(m, "card", v), "card", ()),
    "model.config": (lambda m, v: setattr(m, "config", v), "config", ()),
    "model.r": (lambda m, v: setattr(m, "r", v), "r", ("int", "list")),
    "model.reset_classifier": (lambda m, v: m.reset_classifier(v), "num_classes", ("int",)),
    "model.token_counts": (lambda m, v: m.token_counts(2, v), "num_tokens", ("None", "int")),
}

#: Taken as they are: classes of tuples and errors, and those whose arguments are looked at where they are used.
NO_FUNCTIONS = {"DistilledLogits", "Merge", "Tokens", "Preset", "Recipe", "VisionTransformer"}


def test_every_public_function_is_tried() -> None:
    tried = {call.partition(",")[0].split(".")[0] for call in CALLS}
    errors = {name for name in tomevit.__all__ if name.endswith("Error")}
    assert set(tomevit.__all__) - tried - errors == NO_FUNCTIONS


@pytest.mark.parametrize("call", CALLS)
def test_wrong_types_are_answered_in_a_sentence(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    function, named, right = CALLS[call]
    model = tiny(depth=2)
    for kind, value in WRONG.items():
        if kind in right:
            continue
        with pytest.raises(ValueError, match=rf"(?s)\b({named})") as raised:
            function(model, value)
        message = str(raised.value)
        assert "object has no attribute" not in message, (call, kind)
        assert any(word in message for word in (" must ", "give ", " no ", " is ", "are ")), (call, kind, message)
    assert list(tmp_path.iterdir()) == []


def test_what_is_asked_for_most_is_answered_with_what_to_do() -> None:
    model = tiny()
    for call, said in (
        (lambda: tomevit.create(None), "name is None, and must be a model's name, as in 'vit_b16'"),  # type: ignore[arg-type]
        (lambda: tomevit.unmerge(torch.zeros(2, 3, 4)), r"tokens is a Tensor.*model\.forward_features\(images\)"),  # type: ignore[arg-type]
        (lambda: model(PICTURE), r"images is a Image.*tomevit\.transform\(model\)\(image\)\[None\]"),
        (lambda: model(np.zeros((1, 3, 32, 32), np.float32)), r"images is a ndarray.*tomevit\.transform"),
        (lambda: tomevit.transform(5), "model is 5, and must be a model of tomevit's, its card or its name"),  # type: ignore[call-overload]
    ):
        with pytest.raises(ValueError, match=said):
            call()


def pixels(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


#: What is mixed up most often, and what the message must say to do.
MIXED_UP: dict[str, tuple[Callable[[], object], str]] = {
    "a file of ours": (
        lambda: tomevit.create("mine.safetensors"),
        r"names a file.*tomevit\.load\('mine\.safetensors'\)",
    ),
    "a path": (lambda: tomevit.create(Path("a.pth")), r"names a file.*create\(NAME, pretrained='a\.pth'\)"),  # type: ignore[arg-type]
    "a name to load": (lambda: tomevit.load("vit_b16"), r"tomevit\.create\('vit_b16', pretrained=True\)"),
    "a size in words": (lambda: tomevit.create("vit_b16", img_size="big"), r"must be pixels, as in 384"),  # type: ignore[arg-type]
    "opacity last": (lambda: tomevit.transform("vit_b16")(pixels(60, 50, 4)), r"permute\(2, 0, 1\), and then of 4"),
    "grey last": (lambda: tomevit.transform("vit_b16")(pixels(60, 50, 1)), r"permute\(2, 0, 1\), and then of 1"),
    "colour last, of grey": (lambda: tomevit.transform("digits_p1")(pixels(60, 50, 3)), r"permute\(2, 0, 1\), and"),
    "grey": (lambda: tomevit.transform("vit_b16")(pixels(1, 60, 50)), r"has 1 channel, .*expand\("),
    "opacity": (lambda: tomevit.transform("vit_b16")(pixels(4, 60, 50)), r"image\[\.\.\., :3, :, :\]"),
    "a batch's channels last": (lambda: tiny()(torch.zeros(1, 32, 32, 3)), r"images\.movedim\(-1, -3\)$"),
    "an image's channels last": (lambda: tiny()(torch.zeros(32, 32, 3)), r"images\.movedim\(-1, -3\)\[None\]"),
    "one image": (lambda: tiny()(torch.zeros(3, 32, 32)), r"images\[None\]"),
    "other channels": (lambda: tiny()(torch.zeros(1, 4, 32, 32)), r"create it with in_chans=4"),
    "another size": (lambda: tiny()(torch.zeros(1, 3, 40, 40)), r"create it with img_size="),
}


@pytest.mark.parametrize("mistake", MIXED_UP)
def test_what_is_mixed_up_most_often_is_told_what_to_do(mistake: str) -> None:
    call, says = MIXED_UP[mistake]
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        call()


def test_what_a_message_says_to_do_with_pixels_works() -> None:
    transform = tomevit.transform("digits_p1.plain")
    colour = tomevit.transform("vit_ti16", train=False)
    grey, opaque = pixels(1, 60, 50), pixels(4, 60, 50)
    assert colour(grey.expand(*grey.shape[:-3], 3, -1, -1)).shape == colour(opaque[..., :3, :, :]).shape
    assert transform(pixels(60, 50, 1).permute(2, 0, 1)).shape == (1, 8, 8)


def test_a_card_stands_for_its_model() -> None:
    assert tomevit.create(tomevit.card("digits_p1")).card.full_name == "digits_p1"
    model = tomevit.create(tomevit.card("digits_p1.tome_r16"), pretrained=True)
    assert (model.r, model.card.full_name) == (16, "digits_p1.tome_r16")


def test_a_device_that_torch_was_not_built_for_is_named_alone() -> None:
    with pytest.raises(
        ValueError, match=r"^device is 'mps', which there is not here$|^device is 'mps', .*: \S.{0,80}$"
    ):
        tomevit.create("digits_p1", device="mps")
