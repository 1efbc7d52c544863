"""End to end, at full size: a checkpoint as its project published it, served here, through create(pretrained=True)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tomevit
from benchmarks.peers import timm, torchvision
from tests import foreign
from tests.elsewhere import Elsewhere
from tests.helpers import relative_error
from tests.server import Server
from tomevit import zoo
from tomevit.weights.checkpoint import read
from tomevit.weights.convert import published_weights

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "full_size.safetensors")


@pytest.fixture(autouse=True)
def network(server: Server, set_environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The server stands in for the hub and for every other host; nothing is published with a hash."""
    set_environment(TOMEVIT_MIRROR=server.url, HF_HUB_DOWNLOAD_TIMEOUT="30")  # files of hundreds of MB
    found = zoo._zoo()
    cards = {
        name: tuple(
            replace(card, sources=tuple(replace(source, sha256=None, md5=None) for source in card.sources))
            for card in group
        )
        for name, group in found.cards.items()
    }
    monkeypatch.setattr(zoo, "_zoo", lambda: found._replace(cards=cards))


@dataclass(frozen=True)
class Case:
    keys: Callable[[foreign.Sizes], dict[str, foreign.Shape]]
    publish: Callable[[Server, Path, dict[str, Tensor], tomevit.Card], None]
    reference: Callable[[dict[str, Tensor], Path], torch.nn.Module] | None


def at_url(suffix: str, key: str = "", **beside: Any) -> Callable[..., None]:
    def publish(server: Server, folder: Path, tensors: dict[str, Tensor], card: tomevit.Card) -> None:
        path = foreign.write(folder / f"published{suffix}", tensors, key=key, **beside)
        (url,) = (source.url for source in card.sources if source.url and source.url.endswith(suffix))
        server.put(f"/{url.partition('://')[2]}", path.read_bytes())

    return publish


def on_hub(server: Server, folder: Path, tensors: dict[str, Tensor], card: tomevit.Card) -> None:
    path = foreign.write(folder / "published.safetensors", tensors)
    assert card.sources[0].hub
    server.put_hub(card.sources[0].hub, "model.safetensors", path.read_bytes())


def by_timm(name: str, **arguments: Any) -> Callable[..., torch.nn.Module]:
    def load(tensors: dict[str, Tensor], folder: Path) -> torch.nn.Module:
        model = timm.create_model(name, **arguments)
        if (folder / "published.npz").exists():
            model.load_pretrained(str(folder / "published.npz"))
        else:
            model.load_state_dict(tensors)
        return model

    return load


def deit3_by_timm(tensors: dict[str, Tensor], folder: Path) -> torch.nn.Module:
    model = timm.create_model("deit3_small_patch16_224")
    adapt = timm.models.vision_transformer.checkpoint_filter_fn
    model.load_state_dict(adapt(dict(tensors), model, adapt_layer_scale=True))
    return model


def by_torchvision(tensors: dict[str, Tensor], folder: Path) -> torch.nn.Module:
    """SWAG's model is torchvision's, with other names and the positions sequence first."""
    model = torchvision.models.vit_b_16(image_size=384)
    names = {
        "layers.layer_": "layers.encoder_layer_",
        "linear_1": "0",
        "linear_2": "3",
        "head.layers.head": "heads.head",
    }
    renamed = {}
    for name, tensor in tensors.items():
        new = name
        for theirs, ours in names.items():
            new = new.replace(theirs, ours)
        renamed[new] = tensor.transpose(0, 1) if name == "encoder.pos_embedding" else tensor
    model.load_state_dict(renamed)
    return model


CASES = {
    "vit_ti16.augreg_in21k_ft_in1k": Case(foreign.vit_jax, at_url(".npz"), by_timm("vit_tiny_patch16_224")),
    "vit_s16.augreg_in1k": Case(foreign.deit, on_hub, by_timm("vit_small_patch16_224")),
    "deit_distilled_ti16.fb_in1k": Case(
        foreign.deit_distilled,
        at_url(".pth", "model", **foreign.TRAINING),
        by_timm("deit_tiny_distilled_patch16_224"),
    ),
    "deit3_s16.fb_in1k": Case(foreign.deit3, at_url(".pth", "model"), deit3_by_timm),
    "mae_b16.ft_in1k": Case(
        foreign.mae_finetuned,
        at_url(".pth", "model", **foreign.TRAINING),
        by_timm("vit_base_patch16_224", global_pool="avg"),
    ),
    "swag_b16_384.ft_in1k": Case(foreign.swag, at_url(".torch"), by_torchvision),
    "deit_ti16.tome_r13": Case(foreign.deit, at_url(".pth", "model", **foreign.TRAINING), None),
    "mae_b16.tome_r16": Case(foreign.mae_finetuned, at_url(".pth", "model", **foreign.TRAINING), None),
}


#: At full width nothing is otherwise than where test_golden.py, test_formats.py and test_torchvision.py have them.
AS_SMALL_ONES = {"mae_b16.ft_in1k", "mae_b16.tome_r16", "swag_b16_384.ft_in1k"}


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.soak if name in AS_SMALL_ONES else []) for name in CASES]
)
def test_published_weights(name: str, server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case, card = CASES[name], tomevit.card(name)
    tensors = foreign.fill(case.keys(foreign.sizes(card.config)))
    case.publish(server, tmp_path, tensors, card)
    model = tomevit.create(name, pretrained=True)
    assert not model.training
    assert (model.r, model.config) == (card.r, card.config)
    assert model.card.origin is not None
    assert model.card.origin.sha256 is not None
    assert model.card == replace(card, origin=model.card.origin)
    assert ("not for commercial use" in caplog.text) == ("nc" in (card.licence or ""))

    images = foreign.fill({"images": (2, 3, *card.config.img_size)}, seed=1)["images"]
    with torch.inference_mode():
        answers = {r: model(images, r) for r in {0, card.r}}
        if case.reference is not None:
            expected = case.reference(tensors, tmp_path).eval()(images)
            assert relative_error(answers[0], expected) < 1e-5
        for r, answer in answers.items():
            if f"{name}.r{r}" in GOLDEN:
                assert relative_error(answer, GOLDEN[f"{name}.r{r}"]) < 1e-5
    assert case.reference or f"{name}.r{card.r}" in GOLDEN

    # From now on neither the network nor the original is needed.
    server.requests.clear()
    caplog.clear()
    again = tomevit.create(name, pretrained=True)
    assert server.requests == []
    assert caplog.text == ""
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    (cached,) = (tmp_path / "home" / "weights").iterdir()
    assert all(check.passed for check in tomevit.verify(cached))


def test_eight_processes_that_create_the_same_model_at_once(server: Server, tmp_path: Path) -> None:
    name = "deit_ti16.tome_r13"
    tensors = foreign.fill(foreign.deit(foreign.sizes(tomevit.card(name).config)))
    at_url(".pth", "model")(server, tmp_path, tensors, tomevit.card(name))
    code = f"__import__('tomevit').create({name!r}, pretrained=True).head.bias.sum().item()"
    running = [Elsewhere(dict(os.environ), eval, code) for _ in range(8)]
    answers = {process.result() for process in running}
    assert [process.process.exitcode for process in running] == [0] * 8
    assert answers == {tensors["head.bias"].sum().item()}
    assert len(server.paths()) == 1


def test_a_model_for_another_task_starts_from_published_weights(server: Server, tmp_path: Path) -> None:
    name = "deit_distilled_ti16.fb_in1k"
    tensors = foreign.fill(foreign.deit_distilled(foreign.sizes(tomevit.card(name).config)))
    on_hub(server, tmp_path, tensors, tomevit.card(name))
    model = tomevit.create(name, pretrained=True, num_classes=10, img_size=(128, 192), drop_path=0.1, r=8)
    assert model(torch.randn(1, 3, 128, 192)).shape == (1, 10)
    assert torch.equal(model.blocks[3].mlp.fc1.weight, tensors["blocks.3.mlp.fc1.weight"])  # type: ignore[union-attr]
    assert model.card.figures == ()
    assert published_weights(tomevit.card(name)).card.figures != ()


def test_convert_takes_names_urls_and_repositories(server: Server, tmp_path: Path) -> None:
    name = "deit_ti16.fb_in1k"
    tensors = foreign.fill(foreign.deit(foreign.sizes(tomevit.card(name).config)))
    on_hub(server, tmp_path, tensors, tomevit.card(name))
    at_url(".pth", "model")(server, tmp_path, tensors, tomevit.card(name))
    by_name = tomevit.convert(name, tmp_path / "name.safetensors")
    by_repo = tomevit.convert("hf-hub:timm/deit_tiny_patch16_224.fb_in1k", tmp_path / "repo.safetensors")
    url = tomevit.card(name).sources[1].url or ""
    by_url = tomevit.convert(url, tmp_path / "url.safetensors")
    assert {report.model for report in (by_name, by_repo, by_url)} == {name}
    assert by_name.sha256 == by_repo.sha256 != by_url.sha256
    assert by_url.source == url
    assert (tmp_path / "name.safetensors").read_bytes() == (tmp_path / "repo.safetensors").read_bytes()
    for file in ("name", "url"):
        header, found = read(tmp_path / f"{file}.safetensors")
        assert header.card.licence == "apache-2.0"
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in found.items())


def test_repositories_of_other_libraries_describe_themselves(server: Server, tmp_path: Path) -> None:
    model = tomevit.create("vit_ti16", num_classes=3, img_size=64)
    for kind in ("timm", "hf_vit"):
        tomevit.export(model, tmp_path / kind, kind)
        for file in (tmp_path / kind).iterdir():
            server.put_hub(f"someone/{kind}", file.name, file.read_bytes())
        report = tomevit.convert(f"hf-hub:someone/{kind}", tmp_path / "out.safetensors")
        assert report.model == "vit_ti16"
        again = tomevit.create("vit_ti16", pretrained=f"hf-hub:someone/{kind}")
        assert again.config == model.config
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert json.loads((tmp_path / "hf_vit" / "config.json").read_text())["layer_norm_eps"] == 1e-6


def test_mae_is_fine_tuned_from_its_pre_trained_encoder(server: Server, tmp_path: Path) -> None:
    encoder = tomevit.card("mae_cls_b16.pretrain")
    tensors = foreign.fill(foreign.mae_encoder(foreign.sizes(encoder.config)))
    on_hub(server, tmp_path, tensors, encoder)
    theirs = timm.create_model("vit_base_patch16_224", global_pool="avg", num_classes=10).eval()
    missing, left = theirs.load_state_dict(tensors, strict=False)
    assert set(missing) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert set(left) == {"norm.weight", "norm.bias"}
    images = foreign.fill({"images": (1, 3, 224, 224)}, seed=1)["images"]
    path = tmp_path / "published.safetensors"
    for source in ("mae_cls_b16.pretrain", "hf-hub:timm/vit_base_patch16_224.mae"):
        model = tomevit.create("mae_b16", pretrained=source, num_classes=10)
        torch.nn.init.normal_(model.head.weight)  # type: ignore[arg-type]
        theirs.head.load_state_dict(model.head.state_dict())
        with torch.inference_mode():
            assert relative_error(model(images), theirs(images)) < 1e-5
    report = tomevit.convert(path, tmp_path / "out.safetensors", model="mae_b16", num_classes=10)
    assert report.changes == (
        "the norm of every token left out, and a fresh one put after the pooling",
        "head added for 10 classes, with fresh weights",
    )
    model = tomevit.load(tmp_path / "out.safetensors")
    assert (model.card.full_name, model.config.pool, model.config.pool_norm) == ("mae_b16", "avg", "after")
    assert all(check.passed for check in tomevit.verify(tmp_path / "out.safetensors"))
    with pytest.raises(tomevit.CheckpointError, match="pool_norm before where the model has after"):
        # A head trained on the class token is no start for one that reads the mean.
        tomevit.create("mae_b16", pretrained=tomevit.create("deit_b16", num_classes=3))
    with pytest.raises(tomevit.CheckpointError, match=r"it is mae_cls_b16\.pretrain"):
        tomevit.create("mae_l16", pretrained="mae_cls_b16.pretrain")
