"""A model, a file, a directory, a URL or a name: one function finds what is meant, for all that take one."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import tomevit
from tests import foreign
from tests.helpers import images_for, tiny
from tests.server import Server
from tomevit import zoo
from tomevit.config import Preprocess
from tomevit.models import build
from tomevit.weights import cache, checkpoint
from tomevit.weights.convert import weights_of
from tomevit.weights.sources import card_of_source


@pytest.fixture(scope="module")
def deit_ti16() -> dict[str, torch.Tensor]:
    """A checkpoint of the smallest published size."""
    return foreign.fill(foreign.deit(foreign.sizes(tomevit.card("deit_ti16").config)))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),  # type: ignore[return-value]
    "averaged": torch.optim.swa_utils.AveragedModel,
    "both": lambda model: nn.DataParallel(torch.optim.swa_utils.AveragedModel(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_models_in_wrappers_are_taken_everywhere(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = tiny(3).eval()
    wrapped, images = wrap(model), images_for(model)
    tomevit.save(wrapped, tmp_path / "saved.safetensors")
    tomevit.export(wrapped, tmp_path / "timm.pth", "timm")
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(tomevit.load(tmp_path / "saved.safetensors")(images), expected, rtol=0, atol=0)
        optimized = tomevit.optimize(wrapped, packed=False, keep_memory=False)
        torch.testing.assert_close(optimized(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("call", [tomevit.optimize, weights_of, lambda m: tomevit.save(m, "x.safetensors")])
def test_other_modules_are_refused_in_the_same_words(call: Callable[[nn.Module], object]) -> None:
    with pytest.raises(ValueError, match=r"model is a Linear, and must be a VisionTransformer of tomevit's"):
        call(nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["nope.safetensors", "folder/nope", "./vit_b16", "nope.pth", "/nowhere/vit_b16"])
def test_a_missing_file_is_a_missing_file_everywhere(name: str, tmp_path: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: tomevit.create("vit_b16", pretrained=name),
        lambda: tomevit.convert(name, tmp_path / "out.safetensors"),
        lambda: tomevit.export(name, tmp_path / "out.pth", "timm"),
        lambda: tomevit.export_program(name, tmp_path / "out.pt2", "pt2"),
        lambda: tomevit.push(name, "me/mine"),
        lambda: weights_of(name),
    ]
    for call in calls:
        with pytest.raises(FileNotFoundError, match=f"^there is no file {re.escape(name)}$"):
            call()


def test_names_of_timm_and_of_repositories_are_names() -> None:
    asked = ["timm/vit_base_patch16_224.augreg_in21k_ft_in1k", "vit_base_patch16_224.augreg_in21k_ft_in1k"]
    for name in (*asked, "hf-hub:timm/vit_base_patch16_224.augreg_in21k_ft_in1k"):
        assert card_of_source(name).full_name == "vit_b16.augreg_in21k_ft_in1k"
    assert card_of_source("google/vit-base-patch16-224").full_name == "vit_b16.orig_in21k_ft_in1k"
    assert tomevit.create("google/vit-base-patch16-224").card.name == "vit_b16"


def test_published_weights_have_the_card_of_today(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A conversion may be years old: what a release corrects holds for it too."""
    today = tomevit.card("deit_ti16")
    old = replace(
        today,
        r=5,
        licence="CC-BY-NC-4.0",
        preprocess=Preprocess(crop_pct=0.5),
        config=replace(today.config, prop_attn=False, num_classes=7, act="gelu_tanh"),
        origin=replace(today.sources[0], sha256="0" * 64),
        class_names=tuple("abcdefg"),
    )
    stored = build(old.config, old.r)
    checkpoint.write(tmp_path / "stored.safetensors", old, dict(stored.state_dict()))
    monkeypatch.setattr("tomevit.weights.cache.cached", lambda *_, **__: tmp_path / "stored.safetensors")
    model = tomevit.create("deit_ti16", pretrained=True)
    assert (model.r, model.card.licence, model.card.preprocess) == (today.r, today.licence, today.preprocess)
    assert (model.config.prop_attn, model.config.act) == (today.config.prop_attn, today.config.act)
    assert (model.config.num_classes, model.card.origin) == (7, old.origin)
    assert (model.card.figures, model.card.class_names) == ((), ())  # they are not of seven classes


@pytest.mark.usefixtures("set_environment")
def test_a_copy_of_a_published_file_has_the_card_of_today(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    card = tomevit.card("deit_ti16.fb_in1k")
    tensors = foreign.fill(foreign.deit(foreign.sizes(card.config)))
    file = foreign.write(tmp_path / "copy.pth", tensors, key="model").read_bytes()
    server.put("/copy.pth", file)
    found, (source,) = zoo._zoo(), (each for each in card.sources if each.url)
    source = replace(source, sha256=hashlib.sha256(file).hexdigest()[:8])
    for licence in ("of then", "of today"):
        published = replace(card, licence=licence, sources=(source,))
        cards = {**found.cards, card.name: (published,)}
        monkeypatch.setattr(zoo, "_zoo", lambda cards=cards: found._replace(cards=cards))
        weights = weights_of(f"{server.url}/copy.pth")
        assert (weights.card.full_name, weights.card.licence) == (card.full_name, licence)
    assert server.paths().count("/copy.pth") == 1


@pytest.mark.usefixtures("set_environment")
def test_an_answer_costs_no_second_download(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, deit_ti16: dict[str, torch.Tensor]
) -> None:
    file = foreign.write(tmp_path / "w.pth", deit_ti16, key="state_dict", state_dict_ema=deit_ti16).read_bytes()
    url, home = server.put("/w.pth", file), cache.home()

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(tomevit.AmbiguousCheckpointError, match="several state dicts"):
        tomevit.create("deit_ti16", pretrained=url)
    with pytest.raises(tomevit.CheckpointError, match="has nothing at 'state'"):
        tomevit.create("deit_ti16", pretrained=url, key="state")
    with pytest.raises(tomevit.AmbiguousCheckpointError, match=r"--model$"):
        tomevit.convert(url, tmp_path / "out.safetensors", key="state_dict")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tomevit.create("deit_ti16", pretrained=url, key="state_dict")
    model = tomevit.create("deit_ti16", pretrained=url, key="state_dict_ema")
    assert torch.equal(model.head.weight, deit_ti16["head.weight"])  # type: ignore[arg-type]
    assert server.paths() == ["/w.pth"]
    assert not list((home / "unfinished").iterdir())


@pytest.mark.usefixtures("set_environment")
def test_what_comes_from_the_hub_outlives_its_file(
    server: Server, environment: dict[str, str], tmp_path: Path, deit_ti16: dict[str, torch.Tensor]
) -> None:
    for name in ("pytorch_model.bin", "model.safetensors"):
        file = foreign.write(tmp_path / name, deit_ti16).read_bytes()
        server.put_hub(f"owner/{Path(name).stem}", name, file)
        model = tomevit.create("deit_ti16", pretrained=f"hf-hub:owner/{Path(name).stem}")
        for blob in Path(environment["HF_HOME"]).rglob("blobs/*"):
            blob.write_bytes(b"")
        assert all(torch.equal(tensor, deit_ti16[key]) for key, tensor in model.state_dict().items())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell their mappings otherwise")
@pytest.mark.usefixtures("set_environment")
def test_the_cache_alone_is_mapped(server: Server, tmp_path: Path, deit_ti16: dict[str, torch.Tensor]) -> None:
    url = server.put("/w.pth", foreign.write(tmp_path / "w.pth", deit_ti16).read_bytes())

    def files() -> list[str]:
        return [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "safetensors" in line]

    before = Counter(files())
    models = [tomevit.create("deit_ti16", pretrained=url), tomevit.create("digits_p1", pretrained=True)]
    mapped = Counter(files()) - before
    (cached,) = (cache.home() / "weights").iterdir()
    assert str(cached) in mapped
    assert not any(path.startswith(str(Path(tomevit.__file__).parent)) for path in mapped)
    del models


def test_a_directory_of_results_does_not_hide_the_model_of_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("digits_p1", "results"):
        (tmp_path / name).mkdir()
    assert weights_of("digits_p1").card.name == "digits_p1"
    with pytest.raises(FileNotFoundError, match=r"^results is a directory without model\.safetensors"):
        weights_of("results")
    tomevit.save(tiny(7), tmp_path / "digits_p1" / "model.safetensors")
    assert weights_of("digits_p1").card.r == 7


@pytest.mark.parametrize("call", [weights_of, lambda source: tomevit.export(source, "x.pth", "timm")])
def test_what_is_no_file_and_no_name(
    call: Callable[[object], object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(ValueError, match="the source's name is empty"):
        call("")
    with pytest.raises(tomevit.CheckpointError, match=r"^pipe is not a regular file$"):
        call("pipe")


def test_only_convert_can_be_told_what_a_checkpoint_is(tmp_path: Path) -> None:
    path = tmp_path / "both.safetensors"
    foreign.write(path, foreign.fill(foreign.deit(foreign.sizes(tomevit.card("deit_ti16").config))))
    with pytest.raises(tomevit.AmbiguousCheckpointError, match=r"--model of tomevit convert, whose file every command"):
        tomevit.export(path, tmp_path / "out.pth", "timm")
    with pytest.raises(tomevit.AmbiguousCheckpointError, match=r"--model$"):
        tomevit.convert(path, tmp_path / "out.safetensors")


class Part(torch.Tensor):
    """As DTensor is: a tensor that is no plain one."""


def test_weights_that_are_spread_over_processes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny()
    monkeypatch.setattr(checkpoint, "SPREAD", {"Part"})
    spread = {name: tensor.as_subclass(Part) for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(model, "state_dict", lambda: spread)
    for call in (weights_of, lambda model: tomevit.export(model, tmp_path / "x.pth", "timm")):
        with pytest.raises(ValueError, match=r"the weights are of type Part; .* state_dict=get_model_state_dict"):
            call(model)
