"""What people do with a model they do with every family's: look at it, time it, count it, classify with it or embed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tomevit
from benchmarks.peers import timm  # noqa: F401 - which no torchvision keeps from being imported
from tests.core.test_families import FAMILIES, each_family, images_for, model_of
from tests.helpers import relative_error
from tests.tasks.test_cli import run
from tomevit.config import Figure
from tomevit.layers import Merge
from tomevit.measure.bench import timm_twin
from tomevit.measure.bounds import Limits
from tomevit.measure.defaults import default_r
from tomevit.measure.published import published_accuracies
from tomevit.tasks.embed import extractor, pooling, width
from tomevit.tasks.embedding_files import read
from tomevit.tasks.visualize import attention_weights, observe, page

DIFFERENT = ("siglip", "dinov2 linear", "pe core", "eva02 large")
NEW = ("clip", "dinov2", "dinov3", "siglip", "siglip2", "pe", "eva02")


def saved(family: str, folder: Path, **fields: Any) -> str:
    """A file of a toy model in float32, at r = 2."""
    model = model_of(family, **fields).float()
    model.r = 2
    model.card = replace(model.card, config=model.config, title=family)
    path = folder / "model.safetensors"
    tomevit.save(model, path)
    return str(path)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    pixels = torch.randint(0, 256, (24, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    Image.fromarray(pixels.numpy()).save(path)
    return str(path)


# ------------------------------------------------------------------------------------------------------------ commands


@each_family
def test_embed_writes_what_the_family_answers(family: str, picture: str, tmp_path: Path, capsys: Any) -> None:
    path, out = saved(family, tmp_path), tmp_path / "out.safetensors"
    status, said, _ = run(capsys, "embed", picture, "--model", path, "-o", str(out), "--no-normalize", "--workers", "0")
    model = tomevit.load(path)
    assert (status, said) == (0, f"{out}: 1 vectors of {width(model.config)} float32 numbers\n")
    found = read(out)
    assert found.info["pool"] == pooling(model.config)
    with torch.inference_mode():
        prepared = tomevit.transform(model)(Image.open(picture))[None]
        assert relative_error(found.vectors, extractor(model)(prepared)) < 1e-5


@each_family
def test_classify_says_what_a_head_says_or_that_there_is_none(
    family: str, picture: str, tmp_path: Path, capsys: Any
) -> None:
    path, classes = saved(family, tmp_path), FAMILIES[family].get("num_classes", 5)
    status, out, err = run(capsys, "classify", picture, "--model", path, "--json")
    if classes:
        assert status == 0
        assert len(json.loads(out)["images"][0]["top"]) == classes
    else:
        refusal = "has no head to classify with: give it one, with num_classes, and train it; tomevit embed takes it"
        assert (status, len(err.splitlines())) == (2, 1)
        assert refusal in err
        (tmp_path / "data" / "a").mkdir(parents=True)
        status, _, err = run(capsys, "eval", "--data", str(tmp_path / "data"), "--model", path)
        assert (status, len(err.splitlines())) == (2, 1)
        assert refusal in err


@each_family
def test_visualize_draws_what_the_model_does(family: str, picture: str, tmp_path: Path, capsys: Any) -> None:
    path = saved(family, tmp_path)
    for name in ("page.html", "strip.png") if family in DIFFERENT else ("page.html",):
        status, _, err = run(capsys, "visualize", picture, "--model", path, "-o", str(tmp_path / name), "--r", "2")
        assert (status, err) == (0, f"written to {tmp_path / name}\n")
        assert (tmp_path / name).stat().st_size > 1000
    model = tomevit.load(path)
    observation = observe(model, Image.open(picture), [2])
    run_ = observation.runs[0]
    assert (run_.attention is None) == (not model.config.class_token)
    text = page.html(observation, "picture")
    said = {"token": "", "avg": "the mean patch", "token_avg": "beside the mean patch", "map": "the attention pooling"}
    assert said[model.config.pool] in text
    assert ("The head reads" in text) == (model.config.pool != "token")


@pytest.mark.parametrize("family", [name for name, fields in FAMILIES.items() if "rope" in fields])
def test_attention_of_rotary_models_is_what_the_block_computes(family: str) -> None:
    model = model_of(family)
    for block, entering in zip(model.blocks, model.forward_intermediates(images_for(model), [2, 0, 0]), strict=True):
        x = block.norm1(entering.x)
        ours = attention_weights(block, entering, num_queries=7).double()
        values = block.attn.qkv(x)[..., 2 * x.shape[2] :].unflatten(2, (-1, block.attn.head_dim)).transpose(1, 2)
        attended = block.attn.proj(block.attn.norm((ours @ values).transpose(1, 2).flatten(2)))
        fused = block.attn(x, entering.size, None, entering.rope).x
        assert relative_error(attended, fused[:, :7]) < 1e-5


@pytest.mark.parametrize("family", DIFFERENT)
def test_bench_and_info_take_a_file_of_it(family: str, tmp_path: Path, capsys: Any) -> None:
    path = saved(family, tmp_path)
    status, out, err = run(capsys, "bench", path, "--r", "2", "--rounds", "1", "--batch", "1", "--no-timm", "--json")
    assert (status, err) == (0, "")
    assert [row["r"] for row in json.loads(out)["comparisons"][0]["rows"]] == [0, 2]
    status, out, _ = run(capsys, "info", path)
    reads = {
        "siglip": "attention pooling",
        "dinov2 linear": "class token beside the mean patch",
        "eva02 large": "mean patch",
    }
    assert f"the head reads the {reads.get(family, 'attention pooling of all tokens, projected to 10 channels')}" in out
    assert ("gated MLP" in out) == (family == "eva02 large")


@pytest.mark.parametrize("family", NEW)
def test_list_and_info_know_the_family(family: str, capsys: Any) -> None:
    status, out, _ = run(capsys, "list", f"{family}_*", "--weights")
    assert status == 0
    assert len(out.splitlines()) > 3
    name = tomevit.list_models(f"{family}_*")[0]
    status, out, _ = run(capsys, "info", name, "--r", "4")
    assert status == 0
    assert "tokens" in out


@pytest.mark.parametrize(
    "name", ["clip_tiny_xs16", "dinov2_s14_518", "siglip_b16", "dinov3_s16plus", "pe_core_t16", "eva02_ti14"]
)
def test_timms_model_has_the_very_weights(name: str) -> None:
    card = tomevit.card(name)
    model = tomevit.create(name, img_size=2 * card.config.patch_size)
    theirs, images = timm_twin(model), torch.randn(2, 3, *model.config.img_size)
    with torch.inference_mode():
        assert theirs.forward_features(images).shape == (2, model.config.num_tokens, model.config.embed_dim)
    ours = {parameter.data_ptr() for parameter in model.parameters()}
    shared = [parameter for parameter in theirs.parameters() if parameter.data_ptr() in ours]
    assert len(shared) > 10 * model.config.depth


# ------------------------------------------------------------------------------------------------------------- figures


def test_a_figure_says_what_it_is_of(tmp_path: Path, capsys: Any) -> None:
    figures = (
        Figure(top1=70.5, by="k-NN", source="a"),
        Figure(top1=71.5, by="zero-shot", source="b"),
        Figure(top1=72.5, by="linear probe", source="c"),
        Figure(top1=73.5, source="d"),
    )
    model = model_of("dinov2 linear").float()
    model.card = replace(model.card, config=model.config, figures=figures)
    assert [each.top1 for each in published_accuracies(model.card)] == [72.5, 73.5]
    headless = replace(model.config, num_classes=0)
    assert published_accuracies(replace(model.card, config=headless)) == []
    tomevit.save(model, tmp_path / "model.safetensors")
    _, out, _ = run(capsys, "info", str(tmp_path / "model.safetensors"))
    for said in ("70.50 % by k-NN at", "71.50 % by zero-shot at", "72.50 % by linear probe at", "73.50 % at"):
        assert said in out


def test_accuracies_of_the_table_say_how_classes_were_told(capsys: Any) -> None:
    _, out, _ = run(capsys, "list", "clip_*", "--weights")
    assert "* Not by a head: zero-shot." in out
    _, out, _ = run(capsys, "list", "vit_b16", "--weights")
    assert "*" not in out


# --------------------------------------------------------------------------------------------------------------- costs


def first_patches(key: Tensor, r: int, num_prefix: int) -> Merge:
    """The first r patches join the one after them. It multiplies nothing."""
    batch, tokens, _ = key.shape
    keep = torch.tensor([i for i in range(tokens) if not num_prefix <= i < num_prefix + r]).expand(batch, -1)
    src = torch.arange(num_prefix, num_prefix + r).expand(batch, -1)
    return Merge(keep, src, torch.full_like(src, num_prefix))


@each_family
@pytest.mark.parametrize("r", [0, [3, 0, 2]], ids=str)
def test_flops_count_what_runs(family: str, r: Any) -> None:
    model = model_of(family, matching=first_patches)
    images = images_for(model, 1)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.forward_features(images, r, trace=False)
    assert tomevit.flops(model.config, r) == counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("clip_l14", 10),
        ("dinov2_g14_518", 34),
        ("dinov3_7b16", 6),
        ("siglip2_so400m14_384", 27),
        ("pe_core_l14_336", 24),
    ],
)
def test_the_r_to_begin_with_fits_the_depth(name: str, most: int) -> None:
    card = tomevit.card(name)
    values = default_r(card)
    assert values[-1] == most == card.config.num_patches // card.config.depth
    assert values == sorted({max(1, most // 2), round(0.8 * most), most})
    left = tomevit.schedule.token_counts(most, card.config.depth, card.config.num_tokens, card.config.num_prefix)[-1]
    assert card.config.num_prefix < left <= card.config.depth + card.config.num_prefix


def test_products_of_gated_mlps_are_timed_in_their_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    original = torch.nn.init.normal_
    monkeypatch.setattr("torch.nn.init.normal_", lambda weight: made.append(tuple(weight.shape)) or original(weight))
    config, limits = model_of("eva02").config, Limits("cpu")
    dim, hidden = config.embed_dim, config.mlp_hidden
    for mlp, first in (("swiglu", 2 * hidden), ("mlp", hidden)):
        made.clear()
        assert limits.rate(replace(config, mlp=mlp), 8, torch.float32) > 0
        assert made == [(3 * dim, dim), (dim, dim), (first, dim), (dim, hidden)]
    assert len(limits._rates) == 2
