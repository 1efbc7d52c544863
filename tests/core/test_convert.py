"""From other projects' files to ours and back, with their own code as the judge."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tomevit
from benchmarks.peers import timm, torchvision
from tests import foreign
from tests.helpers import images_for, relative_error, tiny
from tomevit import AmbiguousCheckpointError, CheckpointError, Config
from tomevit.cards import Card
from tomevit.config import Source
from tomevit.weights import checkpoint
from tomevit.weights.adapt import adapt, resample_positions
from tomevit.weights.formats import BICUBIC, FORMATS

TINY = Config(depth=2, **foreign.SMALL)
CARD = Card(name="tiny", config=TINY)


def card(**fields: Any) -> Card:
    return Card(name="tiny", config=Config(depth=2, **foreign.SMALL | fields))


@pytest.fixture
def deit_ti16() -> dict[str, torch.Tensor]:
    """A checkpoint of the smallest published size."""
    return foreign.fill(foreign.deit(foreign.sizes(tomevit.card("deit_ti16").config)))


# --------------------------------------------------------------------------------- numbers, by the other project's code


def test_timm_npz(tmp_path: Path) -> None:
    model = tiny(patch_size=8, embed_dim=24)
    tomevit.export(model, tmp_path / "model.npz", "vit_jax")
    theirs = timm.models.VisionTransformer(32, 8, num_classes=7, embed_dim=24, depth=4, num_heads=3).eval()
    theirs.load_pretrained(str(tmp_path / "model.npz"))
    images = images_for(model)
    with torch.inference_mode():
        assert relative_error(model(images), theirs(images)) < 1e-5
    for prefix in ("opt/target/", "params/"):
        with np.load(tmp_path / "model.npz") as arrays:
            np.savez(tmp_path / "prefixed.npz", **{prefix + name: array for name, array in arrays.items()})
        ours = tomevit.convert(tmp_path / "prefixed.npz", tmp_path / "ours.safetensors", model=model.card)
        assert ours.recognised.startswith("vit_jax")
        again = tomevit.load(tmp_path / "ours.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_torchvision(tmp_path: Path) -> None:
    model = tiny(patch_size=8)
    theirs = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=4, num_heads=3, hidden_dim=24, mlp_dim=96, num_classes=7
    ).eval()
    tomevit.export(model, tmp_path / "model.pth", "torchvision")
    theirs.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    images = images_for(model)
    with torch.inference_mode():
        assert relative_error(model(images), theirs(images)) < 1e-5


@pytest.mark.parametrize(
    ("r", "left_out"),
    [(0, None), ([0, 0], None), ((8, -1.0), "8,-1"), ("1.2x", "7"), ([0, "8+3 diffrate"], '[0,"8+3 diffrate"]')],
)
def test_what_is_left_out_of_merging_is_said_as_it_is_typed(tmp_path: Path, r: Any, left_out: str | None) -> None:
    model = tiny(r)
    exported = tomevit.export(model, tmp_path / "model.pth", "deit")
    assert exported.unsaid == ([f"deit does not know merging: r = {left_out} is left out"] if left_out else [])


@pytest.mark.parametrize("out", ["file.safetensors", "file.pth", "directory"])
def test_timm(tmp_path: Path, out: str) -> None:
    model = tomevit.create("deit_distilled_ti16", num_classes=7, r=8)
    exported = tomevit.export(model, tmp_path / out, "timm")
    assert exported.unsaid == ["timm does not know merging: r = 8 is left out"]
    if out == "directory":
        theirs = timm.create_model(f"local-dir:{tmp_path / out}", pretrained=True)
    else:
        theirs = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7)
        timm.models.load_checkpoint(theirs, str(tmp_path / out))
    images = images_for(model, 1)
    with torch.inference_mode():
        assert relative_error(model(images, r=0), theirs.eval()(images)) < 1e-5


@pytest.mark.parametrize("family", ["vit", "deit", "vit_mae"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transformers(tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    fields: dict[str, Any] = {"patch_size": 8, "norm_eps": 1e-12}
    fields |= {"dist_token": True} if family == "deit" else {"num_classes": 0} if family == "vit_mae" else {}
    model = tiny(**fields)
    tomevit.export(model, tmp_path / "model", f"hf_{family}")
    kind = {
        "vit": "ViTForImageClassification",
        "deit": "DeiTForImageClassificationWithTeacher",
        "vit_mae": "ViTMAEModel",
    }[family]
    theirs, info = getattr(transformers, kind).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values())
    images = images_for(model)
    with torch.inference_mode():
        if family == "vit_mae":
            theirs.config.mask_ratio = 0.0
            noise = torch.arange(16.0).expand(len(images), -1)
            answer = theirs(images, noise=noise).last_hidden_state[:, 0]
        else:
            answer = theirs(images).logits
        assert relative_error(model(images), answer) < 1e-5

    theirs.save_pretrained(tmp_path / "again")
    back = tomevit.convert(
        tmp_path / "again", tmp_path / "back.safetensors", **({"format": "hf_vit_mae"} if family == "vit_mae" else {})
    )
    again = tomevit.load(back.out or "")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


# --------------------------------------------------------------------------------------------------- what is recognised


def test_released_deit(tmp_path: Path, deit_ti16: dict[str, torch.Tensor]) -> None:
    path = foreign.write(tmp_path / "deit.pth", deit_ti16, key="model", **foreign.TRAINING)
    report = tomevit.convert(path, tmp_path / "out.safetensors")
    assert report.model == "deit_ti16"
    assert report.recognised.startswith("deit under 'model': it has patch_embed.proj.weight")
    assert set(report.left_out) == set(foreign.TRAINING)
    model = tomevit.load(tmp_path / "out.safetensors")
    assert model.card.origin == Source(format="deit", file="deit.pth", sha256=report.sha256)
    assert model.card.licence is None
    assert model.card.figures == ()
    assert all(torch.equal(tensor, deit_ti16[name]) for name, tensor in model.state_dict().items())
    assert all(check.passed for check in tomevit.verify(tmp_path / "out.safetensors", against=path))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_wrappers(tmp_path: Path, deit_ti16: dict[str, torch.Tensor], prefix: str) -> None:
    wrapped = {prefix + name: tensor for name, tensor in deit_ti16.items()}
    foreign.write(tmp_path / "deit.pth", wrapped, key="state_dict_ema")
    model = tomevit.create("deit_ti16", pretrained=tmp_path / "deit.pth")
    assert torch.equal(model.head.weight, deit_ti16["head.weight"])


def test_two_state_dicts_are_asked_about(tmp_path: Path, deit_ti16: dict[str, torch.Tensor]) -> None:
    averaged = {name: tensor + 1 for name, tensor in deit_ti16.items()}
    path = foreign.write(tmp_path / "deit.pth", deit_ti16, key="model", model_ema=averaged)
    with pytest.raises(CheckpointError, match="model_ema"):
        tomevit.convert(path, tmp_path / "out.safetensors")
    tomevit.convert(path, tmp_path / "out.safetensors", key="model_ema")
    assert torch.equal(tomevit.load(tmp_path / "out.safetensors").head.bias, averaged["head.bias"])


def test_two_models_are_asked_about(tmp_path: Path, deit_ti16: dict[str, torch.Tensor]) -> None:
    path = foreign.write(tmp_path / "model.safetensors", deit_ti16)
    with pytest.raises(AmbiguousCheckpointError, match="it fits deit_ti16 or vit_ti16, which differ in prep") as caught:
        tomevit.convert(path, tmp_path / "out.safetensors")
    assert (caught.value.option, caught.value.choices) == ("model", ["deit_ti16", "vit_ti16"])
    assert not (tmp_path / "out.safetensors").exists()
    report = tomevit.convert(path, tmp_path / "out.safetensors", model="vit_ti16")
    assert report.model == "vit_ti16"
    assert tomevit.load(tmp_path / "out.safetensors").card.preprocess.mean == (0.5, 0.5, 0.5)


def test_a_file_by_the_name_of_published_weights_is_asked_about(
    tmp_path: Path, deit_ti16: dict[str, torch.Tensor]
) -> None:
    path = foreign.write(tmp_path / "f367470145_deit_T_r13.pth", deit_ti16, key="model")
    with pytest.raises(
        AmbiguousCheckpointError, match=r"deit_ti16\.tome_r13 or deit_ti16 \(by its name it is the first"
    ):
        tomevit.convert(path, tmp_path / "out.safetensors")
    model = tomevit.create("deit_ti16.tome_r13", pretrained=path)
    assert (model.r, model.config.prop_attn, model.card.licence) == (13, True, "cc-by-nc-4.0")


def test_published_weights_are_known_by_their_hash(
    tmp_path: Path, deit_ti16: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = foreign.write(tmp_path / "anything.pth", deit_ti16, key="model")
    prefix = tomevit.weights.files.sha256(path)[:8]  # type: ignore[attr-defined]
    published = [
        (known, replace(source, sha256=prefix) if known.full_name == "deit_ti16.fb_in1k" and source.url else source)
        for known, source in tomevit.zoo.published_sources()  # type: ignore[attr-defined]
    ]
    monkeypatch.setattr("tomevit.zoo.published_sources", lambda: iter(published))
    report = tomevit.convert(path, tmp_path / "out.safetensors")
    assert report.source == str(path)
    model = tomevit.load(tmp_path / "out.safetensors")
    assert model.card.full_name == "deit_ti16.fb_in1k"
    assert model.card.licence == "apache-2.0"
    assert model.card.figures
    with pytest.raises(CheckpointError, match=r"it is deit_ti16\.fb_in1k by its address or hash, and not vit_ti16"):
        tomevit.convert(path, tmp_path / "other.safetensors", model="vit_ti16")


def test_in21k_heads_that_stand_on_a_representation_layer_are_left_out(tmp_path: Path) -> None:
    sizes = foreign.Sizes(**vars(foreign.sizes(tomevit.card("vit_ti16").config)) | {"classes": 50})
    path = foreign.write(tmp_path / "in21k.npz", foreign.fill(foreign.vit_jax_in21k(sizes)))
    report = tomevit.convert(path, tmp_path / "out.safetensors")
    assert report.model == "vit_ti16"
    assert set(report.left_out) == {"pre_logits/kernel", "pre_logits/bias", "head/kernel", "head/bias"}
    assert tomevit.load(tmp_path / "out.safetensors").config.num_classes == 0


def test_mae_with_its_decoder(tmp_path: Path) -> None:
    config = card(num_classes=0).config
    path = foreign.write(tmp_path / "full.pth", foreign.fill(foreign.mae_full(foreign.sizes(config))), key="model")
    report = tomevit.convert(path, tmp_path / "out.safetensors", model=Card(name="tiny", config=config))
    assert report.recognised.startswith("mae")
    assert {name.split(".")[0] for name in report.left_out} == {
        "mask_token", "decoder_pos_embed", "decoder_embed", "decoder_blocks", "decoder_norm", "decoder_pred",
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------- the wrong architecture


def test_another_architecture(tmp_path: Path, deit_ti16: dict[str, torch.Tensor]) -> None:
    path = foreign.write(tmp_path / "model.pth", deit_ti16)
    with pytest.raises(
        CheckpointError, match=r"does not fit deit_s16: embed_dim 192 where the model has 384. It fits .*deit_ti16"
    ):
        tomevit.create("deit_s16", pretrained=path)
    with pytest.raises(CheckpointError, match="dist_token False where the model has True"):
        tomevit.create("deit_distilled_ti16", pretrained=path)


def test_no_architecture(tmp_path: Path) -> None:
    path = foreign.write(tmp_path / "model.pth", foreign.fill(foreign.deit(foreign.sizes(TINY))))
    with pytest.raises(
        CheckpointError, match=r"it fits no model here\. The nearest is vit_b8: embed_dim 24 where the model has 768"
    ):
        tomevit.convert(path, tmp_path / "out.safetensors")
    assert tomevit.convert(path, tmp_path / "out.safetensors", model=CARD).model == "tiny"


def test_other_heads_of_attention_are_seen_in_flax(tmp_path: Path) -> None:
    path = foreign.write(tmp_path / "model.npz", foreign.fill(foreign.vit_jax(foreign.sizes(TINY))))
    with pytest.raises(CheckpointError, match="it has 3 attention heads, and tiny has 4"):
        tomevit.convert(path, tmp_path / "out.safetensors", model=card(num_heads=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.mlp.fc2.bias"), r"blocks\.1\.mlp\.fc2\.bias: model \(24,\), file —"),
        (lambda t: t.pop("pos_embed"), "pos_embed none where the model has learned"),
        (lambda t: t.update({"blocks.2.norm1.weight": torch.ones(24)}), "depth 3 where the model has 2"),
        (lambda t: t.update({"blocks.x.norm1.weight": torch.ones(24)}), r"no place for blocks\.x\.norm1\.weight"),
        (lambda t: t.update({"norm.weight": torch.ones(25)}), r"norm\.weight: model \(24,\), file \(25,\)"),
        (lambda t: t.update({"cls_token": torch.ones(24)}), r"cls_token: model \(1, 1, 24\), file \(24,\)"),
        (lambda t: t.update({"pos_embed": torch.ones(1, 16, 24)}), "positions for 15 patches, which make no square"),
        (lambda t: t.update({"pos_embed": torch.ones(17, 24)}), r"pos_embed is \(17, 24\), and must have 3 dimensions"),
        (lambda t: t["norm.bias"].fill_(float("nan")), r"NaN or infinity, in norm\.bias"),
        (lambda t: t["head.weight"][2, 3].fill_(float("-inf")), r"NaN or infinity, in head\.weight"),
        (lambda t: t.update({"norm.bias": torch.ones(24, dtype=torch.int8)}), r"floating point: norm\.bias are int8"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(tmp_path: Path, change: Any, message: str) -> None:
    tensors = foreign.fill(foreign.deit(foreign.sizes(TINY)))
    change(tensors)
    path = foreign.write(tmp_path / "model.pth", tensors)
    (tmp_path / "out.safetensors").write_text("as it was")
    with pytest.raises(CheckpointError, match=message) as caught:
        tomevit.convert(path, tmp_path / "out.safetensors", model=CARD)
    assert str(caught.value).startswith(str(path))
    assert {file.name for file in tmp_path.iterdir()} == {"model.pth", "out.safetensors"}
    assert (tmp_path / "out.safetensors").read_text() == "as it was"


# --------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = foreign.fill(foreign.deit(foreign.sizes(TINY)), dtype=dtype)
    path = foreign.write(tmp_path / "model.pth", tensors)
    report = tomevit.convert(path, tmp_path / "out.safetensors", model=CARD)
    assert report.changes == ()
    model = tomevit.load(tmp_path / "out.safetensors")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    report = tomevit.convert(path, tmp_path / "out.safetensors", model=CARD, dtype=torch.bfloat16)
    model = tomevit.load(tmp_path / "out.safetensors")
    assert all(torch.equal(tensor, tensors[name].bfloat16()) for name, tensor in model.state_dict().items())
    assert report.changes == (() if dtype is torch.bfloat16 else (f"{str(dtype)[6:]} rounded to bfloat16",))


def test_a_mixture_of_dtypes_becomes_the_widest(tmp_path: Path) -> None:
    tensors = foreign.fill(foreign.deit(foreign.sizes(TINY)), dtype=torch.float16)
    tensors["norm.weight"] = torch.rand(24)
    path = foreign.write(tmp_path / "model.pth", tensors)
    report = tomevit.convert(path, tmp_path / "out.safetensors", model=CARD)
    assert report.changes == ("a mixture of float16 or float32 made float32 throughout, without loss",)
    model = tomevit.load(tmp_path / "out.safetensors")
    assert all(torch.equal(tensor, tensors[name].float()) for name, tensor in model.state_dict().items())


def test_shared_and_strided_tensors(tmp_path: Path) -> None:
    tensors = foreign.fill(foreign.deit(foreign.sizes(TINY)))
    tensors["blocks.0.mlp.fc2.weight"] = tensors["blocks.0.mlp.fc1.weight"].T
    tensors["blocks.1.norm1.weight"] = tensors["blocks.0.norm1.weight"]
    path = foreign.write(tmp_path / "model.pth", tensors)
    tomevit.convert(path, tmp_path / "out.safetensors", model=CARD)
    model = tomevit.load(tmp_path / "out.safetensors")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------- lossy steps


@pytest.mark.parametrize("size", [(48, 48), (32, 64), (24, 40), (16, 16)])
def test_positions_resampled_by_timm(tmp_path: Path, size: tuple[int, int]) -> None:
    tensors = foreign.fill(foreign.deit(foreign.sizes(TINY)))
    path = foreign.write(tmp_path / "model.safetensors", tensors)
    report = tomevit.convert(path, tmp_path / "out.safetensors", model=CARD, img_size=size)
    grid = (size[0] // 8, size[1] // 8)
    assert report.changes == (f"positions resampled from 4x4 to {grid[0]}x{grid[1]} patches, bicubic with antialias",)
    expected = timm.layers.resample_abs_pos_embed(tensors["pos_embed"], list(grid), [4, 4], num_prefix_tokens=1)
    assert torch.equal(tomevit.load(tmp_path / "out.safetensors").pos_embed, expected)


def test_positions_resampled_by_torchvision(tmp_path: Path) -> None:
    tensors = foreign.fill(foreign.torchvision(foreign.sizes(TINY)))
    path = foreign.write(tmp_path / "model.pth", tensors)
    report = tomevit.convert(path, tmp_path / "out.safetensors", model=CARD, img_size=(48, 48))
    assert report.changes == ("positions resampled from 4x4 to 6x6 patches, bicubic with align_corners",)
    interpolate = torchvision.models.vision_transformer.interpolate_embeddings
    expected = interpolate(48, 8, dict(tensors))["encoder.pos_embedding"]
    assert torch.allclose(tomevit.load(tmp_path / "out.safetensors").pos_embed, expected, atol=1e-6)


def test_every_format_has_its_own_rule() -> None:
    pos_embed = torch.randn(1, 17, 24)
    ways = {form.resampling for form in FORMATS.values()}
    out = [resample_positions(pos_embed, (4, 4), (7, 3), 1, way) for way in ways]
    assert len(ways) == 5
    for i, one in enumerate(out):
        assert one.shape == (1, 22, 24)
        assert torch.equal(one[:, 0], pos_embed[:, 0])
        assert all((one - other).abs().max() > 1e-3 for other in out[:i])


def test_a_grid_that_is_not_square_is_taken_as_it_is_when_named(tmp_path: Path) -> None:
    tensors = foreign.fill(foreign.deit(foreign.sizes(card(img_size=(24, 40)).config)))
    path = foreign.write(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match="positions for 15 patches, which make no square: say img_size="):
        tomevit.convert(path, tmp_path / "out.safetensors", model=CARD)
    report = tomevit.convert(path, tmp_path / "out.safetensors", model=CARD, img_size=(24, 40))
    assert report.changes == ()
    assert torch.equal(tomevit.load(tmp_path / "out.safetensors").pos_embed, tensors["pos_embed"])


def test_our_own_files_keep_the_rule_of_where_they_came_from(tmp_path: Path) -> None:
    path = foreign.write(tmp_path / "model.torch", foreign.fill(foreign.swag(foreign.sizes(TINY))))
    once = tomevit.convert(path, tmp_path / "once.safetensors", model=CARD, img_size=(48, 48))
    tomevit.convert(path, tmp_path / "first.safetensors", model=CARD)
    then = tomevit.convert(tmp_path / "first.safetensors", tmp_path / "then.safetensors", img_size=(48, 48))
    assert then.changes == once.changes == ("positions resampled from 4x4 to 6x6 patches, bicubic with align_corners",)
    assert (tmp_path / "then.safetensors").read_bytes() == (tmp_path / "once.safetensors").read_bytes()


def test_a_new_class_count_replaces_both_heads(tmp_path: Path) -> None:
    config = card(dist_token=True, init="deit").config
    path = foreign.write(
        tmp_path / "model.pth", foreign.fill(foreign.deit_distilled(foreign.sizes(config))), key="model"
    )
    distilled = Card(name="tiny", config=config)
    report = tomevit.convert(path, tmp_path / "out.safetensors", model=distilled, num_classes=11)
    assert report.changes == ("both heads replaced: fresh weights for 11 classes instead of 5",)
    model = tomevit.load(tmp_path / "out.safetensors")
    assert model.head.weight.shape == model.head_dist.weight.shape == (11, 24)  # type: ignore[union-attr]
    assert not torch.equal(model.head.weight, model.head_dist.weight)  # type: ignore[arg-type]
    first = (tmp_path / "out.safetensors").read_bytes()
    tomevit.convert(path, tmp_path / "out.safetensors", model=distilled, num_classes=11)
    assert (tmp_path / "out.safetensors").read_bytes() == first
    report = tomevit.convert(path, tmp_path / "out.safetensors", model=distilled, num_classes=0)
    assert report.changes == ("both heads for 5 classes left out",)


def test_create_adapts(tmp_path: Path, deit_ti16: dict[str, torch.Tensor]) -> None:
    path = foreign.write(tmp_path / "model.pth", deit_ti16, key="model")
    model = tomevit.create("deit_ti16", pretrained=path, num_classes=3, img_size=(64, 96), in_chans=1)
    assert model.config.img_size == (64, 96)
    assert model(torch.randn(1, 1, 64, 96)).shape == (1, 3)
    assert model.card.preprocess.mean == (0.5,)
    same = tomevit.create("deit_ti16", pretrained=path, in_chans=6)
    weight = deit_ti16["patch_embed.proj.weight"]
    assert torch.equal(same.patch_embed.proj.weight, torch.cat([weight, weight], 1) / 2)


@pytest.fixture
def averaged(tmp_path: Path) -> Path:
    """timm's ViT with global_pool="avg", whose last norm is fc_norm."""
    config = replace(tomevit.card("vit_ti16").config, num_classes=5)
    tensors = foreign.fill(foreign.mae_finetuned(foreign.sizes(config)))
    return foreign.write(tmp_path / "averaged.safetensors", tensors)


@pytest.mark.parametrize("key", ["", "model", "state_dict"])
@pytest.mark.parametrize("name", ["vit_ti16", "vit_tiny_patch16_224", "deit_ti16"])
def test_average_pooling_is_read_as_the_model_that_is_named(averaged: Path, name: str, key: str) -> None:
    path = foreign.write(averaged.with_suffix(".pth"), load_file(averaged), key=key)
    theirs = timm.create_model("vit_tiny_patch16_224", global_pool="avg", num_classes=5).eval()
    theirs.load_state_dict(load_file(averaged))
    images = foreign.fill({"images": (1, 3, 224, 224)}, seed=1)["images"]
    for model in (
        tomevit.create(name, pretrained=path),
        tomevit.create(name, pretrained=path, pool="avg"),
        tomevit.load(tomevit.convert(path, path.with_name("out.safetensors"), model=name).out or ""),
        tomevit.create(name, pretrained=path.with_name("out.safetensors")),
    ):
        assert (model.card.name, model.card.preprocess) == (tomevit.card(name).name, tomevit.card(name).preprocess)
        assert (model.config.pool, model.config.pool_norm, model.config.prop_attn) == ("avg", "after", True)
        assert model.card.origin is not None
        assert model.card.origin.format == "timm"
        with torch.inference_mode():
            assert relative_error(model(images), theirs(images)) < 1e-5


def test_average_pooling_by_format_by_card_and_by_the_file_beside_it(averaged: Path) -> None:
    out = averaged.with_name("out.safetensors")
    report = tomevit.convert(averaged, out, model="vit_ti16", format="timm")
    assert report.changes == ("the head reads the mean patch: the last norm is fc_norm",)
    zoo = tomevit.card("vit_ti16")
    own = replace(zoo, config=replace(zoo.config, pool="avg", pool_norm="after"))
    assert tomevit.convert(averaged, out, model=own).changes == ()
    with pytest.raises(CheckpointError, match="pool_norm after where the model has before"):
        tomevit.convert(averaged, out, model=zoo)  # it says how it pools
    with pytest.raises(CheckpointError, match="pool_norm after where the model has before"):
        tomevit.create("mae_cls_b16", pretrained=tiny(pool="avg", pool_norm="after"))
    directory = averaged.parent / "directory"
    directory.mkdir()
    averaged.rename(directory / "model.safetensors")
    (directory / "config.json").write_text('{"architecture": "vit_tiny_patch16_224", "global_pool": "avg"}')
    for model in (None, "vit_ti16"):
        assert tomevit.convert(directory, out, model=model).model == "vit_ti16"
        assert tomevit.load(out).config.prop_attn


def test_average_pooling_of_which_nothing_is_said_is_asked_about(tmp_path: Path, averaged: Path) -> None:
    asked = []

    def ask(error: AmbiguousCheckpointError) -> str:
        asked.append((error.option, sorted(error.choices)))
        return {"format": "timm", "model": "vit_ti16"}[error.option]

    report = tomevit.convert(averaged, tmp_path / "out.safetensors", ask=ask)
    assert report.model == "vit_ti16"
    assert asked == [("format", ["mae", "timm"]), ("model", ["deit_ti16", "vit_ti16"])]


def test_an_encoder_that_averages_takes_a_head(tmp_path: Path) -> None:
    tensors = foreign.fill(foreign.mae_finetuned(foreign.sizes(tomevit.card("vit_ti16").config)))
    path = foreign.write(tmp_path / "encoder.pth", {n: t for n, t in tensors.items() if not n.startswith("head.")})
    tomevit.convert(path, tmp_path / "out.safetensors", model="vit_ti16")
    for source in (path, tmp_path / "out.safetensors"):
        model = tomevit.create("vit_ti16", pretrained=source, num_classes=3)
        assert (model.config.pool, model.config.pool_norm, model.config.num_classes) == ("avg", "after", 3)
    assert tomevit.convert(tmp_path / "out.safetensors", tmp_path / "again.safetensors", model="vit_ti16")


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_other_channels_have_the_preprocessing_that_goes_with_them(tmp_path: Path, channels: int) -> None:
    shapes = foreign.deit(foreign.sizes(replace(tomevit.card("deit_ti16").config, num_classes=5)))
    tensors = foreign.fill(shapes | {"patch_embed.proj.weight": (192, channels, 16, 16)})
    path = foreign.write(tmp_path / "model.pth", tensors, key="model")
    report = tomevit.convert(path, tmp_path / "out.safetensors")
    assert report.changes == (f"images of {channels} instead of 3 channels, with a mean and std each",)
    own = replace(tomevit.card("deit_ti16"), config=replace(tomevit.card("deit_ti16").config, in_chans=channels))
    tomevit.convert(path, tmp_path / "own.safetensors", model=own)
    for model in (
        tomevit.load(tmp_path / "out.safetensors"),
        tomevit.load(tmp_path / "own.safetensors"),
        tomevit.create("deit_ti16", pretrained=path),
        tomevit.create("deit_ti16", pretrained=path, in_chans=channels),
        tomevit.create("deit_ti16", in_chans=channels),
        tiny(in_chans=channels),
    ):
        half = (0.5,) * channels
        assert (model.config.in_chans, model.card.preprocess.mean, model.card.preprocess.std) == (channels, half, half)
        size = model.config.img_size
        image = torch.zeros(channels, *size, dtype=torch.uint8)
        assert model(tomevit.transform(model)(image)[None]).isfinite().all()


# --------------------------------------------------------------------------------------------------------- our own file


def test_older_versions_of_the_file_still_load(tmp_path: Path) -> None:
    model = tiny(8)
    tomevit.save(model, tmp_path / "new.safetensors")
    data = (tmp_path / "new.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    described = json.loads(header["__metadata__"]["tomevit"])
    del described["sha256"], described["card"]["origin"]
    header["__metadata__"]["tomevit"] = json.dumps(described | {"version": 1})
    text = json.dumps(header).encode()
    old = tmp_path / "old.safetensors"
    old.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    again = tomevit.load(old)
    assert again.r == 8
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert [check.name for check in tomevit.verify(old) if check.passed] == [
        "file", "structure", "digest", "values", "forward at r = 0", "forward at r = 8",
    ]  # fmt: skip


def test_verify_finds_one_flipped_bit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tomevit.save(tiny(8), path)
    assert all(check.passed for check in tomevit.verify(path))
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    assert [check.name for check in tomevit.verify(path) if not check.passed] == ["digest"]


def test_verify_finds_nan_and_missing_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = tiny()
    model.norm.bias.data[3] = float("nan")
    tomevit.save(model, path)
    failed = [check for check in tomevit.verify(path) if not check.passed]
    assert [(check.name, check.found) for check in failed] == [("values", "NaN or infinity in norm.bias")]
    tensors = {name: tensor for name, tensor in tiny().state_dict().items() if name != "norm.bias"}
    checkpoint.write(path, tiny().card, tensors)
    failed = [check for check in tomevit.verify(path) if not check.passed]
    assert [check.name for check in failed] == ["structure"]
    assert "norm.bias: model (24,), file —" in failed[0].found
    path.write_bytes(b"\0" * 100)
    assert [check.name for check in tomevit.verify(path)] == ["file"]


def test_verify_against_a_source(tmp_path: Path) -> None:
    tensors = foreign.fill(foreign.vit_jax(foreign.sizes(TINY)))
    path = foreign.write(tmp_path / "model.npz", tensors)
    out = tmp_path / "out.safetensors"
    tomevit.convert(path, out, model=CARD, dtype=torch.bfloat16)
    last = tomevit.verify(out, against=path)[-1]
    assert last.passed
    assert last.found.endswith("to the bit once rounded")
    tensors["head/bias"][2] += 0.5
    foreign.write(path, tensors)
    last = tomevit.verify(out, against=path)[-1]
    assert not last.passed
    assert last.found.startswith("head.bias differs by up to 0.5")


def test_a_directory_is_read_by_its_config(tmp_path: Path) -> None:
    model = tomevit.create("vit_ti16", num_classes=3, img_size=64)
    tomevit.export(model, tmp_path / "timm", "timm")
    for source in (tmp_path / "timm", tmp_path / "timm" / "model.safetensors"):
        report = tomevit.convert(source, tmp_path / "out.safetensors")
        assert report.model == "vit_ti16"
    (tmp_path / "timm" / "config.json").unlink()
    with pytest.raises(AmbiguousCheckpointError):
        tomevit.convert(tmp_path / "timm", tmp_path / "out.safetensors")
    shutil.rmtree(tmp_path / "timm")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*timm"):
        tomevit.convert(tmp_path / "timm", tmp_path / "out.safetensors")


def test_what_lies_beside_a_file_stands_when_its_model_is_named(tmp_path: Path) -> None:
    model = tomevit.create("vit_ti16", num_classes=3, img_size=64)
    config = replace(model.config, norm_eps=1e-12)
    preprocess = replace(model.card.preprocess, mean=(0.1, 0.2, 0.3))
    model.card = replace(model.card, config=config, preprocess=preprocess, class_names=("a", "b", "c"), licence="mit")
    checkpoint.write(tmp_path / "ours.safetensors", model.card, model.state_dict())
    tomevit.export(tmp_path / "ours.safetensors", tmp_path / "theirs", "hf_vit")
    again = tomevit.create("vit_tiny_patch16_224", pretrained=tmp_path / "theirs")
    assert again.config.norm_eps == 1e-12
    assert again.card.class_names == ("a", "b", "c")
    assert again.card.preprocess.mean == (0.1, 0.2, 0.3)
    assert again.card.licence is None  # transformers' files do not say
    with pytest.raises(CheckpointError, match=r"by the files beside it, and no deit_s16: embed_dim 192 where"):
        tomevit.create("deit_s16", pretrained=tmp_path / "theirs")


def test_figures_are_of_the_published_file_alone(tmp_path: Path, deit_ti16: dict[str, torch.Tensor]) -> None:
    path = foreign.write(tmp_path / "mine.pth", deit_ti16, key="model")
    assert tomevit.card("deit_ti16.fb_in1k").figures
    model = tomevit.create("deit_ti16.fb_in1k", pretrained=path)
    assert (model.card.full_name, model.card.licence) == ("deit_ti16.fb_in1k", "apache-2.0")
    assert model.card.figures == ()


@pytest.mark.parametrize("wanted", [{"img_size": (48, 48)}, {"in_chans": 1}, {"num_classes": 3}])
def test_figures_do_not_outlive_a_change(wanted: dict[str, Any]) -> None:
    known = replace(CARD, figures=(tomevit.config.Figure(top1=80.0, source="a paper"),))  # type: ignore[attr-defined]
    tensors = dict(tiny(patch_size=8, embed_dim=24, depth=2, num_classes=5).state_dict())
    same, _, none = adapt(known, tensors, TINY, BICUBIC)
    assert (same.figures, none) == (known.figures, [])
    changed, _, some = adapt(known, tensors, replace(TINY, **wanted), BICUBIC)
    assert (changed.figures, len(some)) == ((), 1)


def test_a_created_model_does_not_need_its_file(tmp_path: Path, deit_ti16: dict[str, torch.Tensor]) -> None:
    for name in ("model.pth", "model.safetensors"):
        path = foreign.write(tmp_path / name, deit_ti16)
        model = tomevit.create("deit_ti16", pretrained=path)
        path.write_bytes(b"")  # in place: what were mapped from here would be gone, and the process with it
        assert all(torch.equal(tensor, deit_ti16[key]) for key, tensor in model.state_dict().items())
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert not model.training


def test_a_new_head_is_drawn_from_the_default_generator(tmp_path: Path, deit_ti16: dict[str, torch.Tensor]) -> None:
    path = foreign.write(tmp_path / "model.pth", deit_ti16)

    def head(seed: int) -> torch.nn.Linear:
        torch.manual_seed(seed)
        return tomevit.create("deit_ti16", pretrained=path, num_classes=500).head  # type: ignore[return-value]

    first = head(0)
    assert torch.equal(first.weight, head(0).weight)
    assert not torch.equal(first.weight, head(1).weight)
    assert first.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not first.bias.any()


def test_conversion_leaves_the_generator_alone(tmp_path: Path) -> None:
    path = foreign.write(tmp_path / "model.pth", foreign.fill(foreign.deit(foreign.sizes(TINY))))
    before = torch.get_rng_state()
    tomevit.convert(path, tmp_path / "out.safetensors", model=CARD, num_classes=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_create_in_threads(tmp_path: Path, deit_ti16: dict[str, torch.Tensor]) -> None:
    path = foreign.write(tmp_path / "model.pth", deit_ti16, key="model", **foreign.TRAINING)
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: tomevit.create("deit_ti16", pretrained=path), range(4)))
    for model in models:
        assert all(torch.equal(tensor, deit_ti16[key]) for key, tensor in model.state_dict().items())


def test_wrong_arguments_are_found_before_anything_is_read(tmp_path: Path) -> None:
    for wrong in ({"img_size": 100}, {"num_classes": -1}, {"r": -1}, {"drop_path": 2.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            tomevit.create("deit_ti16", pretrained=tmp_path / "missing.pth", **wrong)  # type: ignore[arg-type]


def test_timm_under_the_key_of_others(tmp_path: Path) -> None:
    scaled = card(layer_scale=1e-5, pos_embed_prefix=False)
    tensors = foreign.fill(foreign.timm_deit3(foreign.sizes(scaled.config)))
    path = foreign.write(tmp_path / "model.pth", tensors, key="model", epoch=3)
    report = tomevit.convert(path, tmp_path / "out.safetensors", model=scaled)
    assert report.recognised.startswith("timm under 'model'")


def test_a_hidden_width_that_no_ratio_gives_exactly(tmp_path: Path) -> None:
    odd = card(mlp_ratio=2.6)  # 62 of 24
    path = foreign.write(tmp_path / "model.pth", foreign.fill(foreign.deit(foreign.sizes(odd.config))))
    tomevit.convert(path, tmp_path / "out.safetensors", model=odd)
    assert tomevit.load(tmp_path / "out.safetensors").config.mlp_ratio == 2.6


@pytest.mark.parametrize("form", ["hf_vit", "hf_vit_mae"])
def test_transformers_without_a_head(tmp_path: Path, form: str) -> None:
    model = tiny(patch_size=8, num_classes=0)
    tomevit.export(model, tmp_path / "model.safetensors", form)
    source, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    with pytest.raises(AmbiguousCheckpointError, match="its names fit hf_vit and hf_vit_mae, which"):
        tomevit.convert(source, out)
    report = tomevit.convert(source, out, model=model.card, format=form)
    assert report.left_out == {}
    assert report.recognised.startswith(f"{form}: ")
    tomevit.convert(source, out, model=model.card)  # the model says it
    assert torch.equal(tomevit.load(out).pos_embed, model.pos_embed)


def test_someone_is_asked_once_for_each_choice(tmp_path: Path, deit_ti16: dict[str, torch.Tensor]) -> None:
    path = foreign.write(tmp_path / "model.pth", deit_ti16, key="state_dict", state_dict_ema=deit_ti16)
    asked = []

    def ask(error: AmbiguousCheckpointError) -> str:
        asked.append((error.option, error.choices))
        return error.choices[-1]

    report = tomevit.convert(path, tmp_path / "out.safetensors", ask=ask)
    assert asked == [("key", ["state_dict", "state_dict_ema"]), ("model", ["deit_ti16", "vit_ti16"])]
    assert report.model == "vit_ti16"
