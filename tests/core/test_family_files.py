"""The files that transformers, timm and open_clip leave of today's backbones, read with what lies beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor, nn

import tomevit
from benchmarks.peers import timm
from tests.helpers import randomise, relative_error
from tomevit.errors import CheckpointError
from tomevit.weights.convert import weights_of
from tomevit.weights.export import export

TOWER = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
TOWER |= {"image_size": 32, "patch_size": 16}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"vocab_size": 50, "max_position_embeddings": 8}
TEXTS = {"vision_config": TOWER, "text_config": TEXT}
DINOV2 = {"hidden_size": 48, "mlp_ratio": 2, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 56}
DINOV2 |= {"patch_size": 14}
DINOV3 = TOWER | {"image_size": 64, "num_register_tokens": 4}
LABELS = {0: "ant", 1: "bee", 2: "cat"}


def pooled(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).pooler_output


def logits(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).logits


def embedded(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).image_embeds


def features(model: Any, images: Tensor) -> Tensor:
    return model.get_image_features(images).pooler_output


#: A model of transformers', and how its answer is had.
TRANSFORMERS: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor]]] = {
    "dinov2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**DINOV2)), pooled),
    "dinov2 gated": (lambda: hf.Dinov2Model(hf.Dinov2Config(**DINOV2, use_swiglu_ffn=True)), pooled),
    "dinov2 classifier": (
        lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**DINOV2, id2label=LABELS)),
        logits,
    ),
    "dinov2 with registers": (
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**DINOV2)),
        pooled,
    ),
    "dinov2 with registers, classifier": (
        lambda: hf.Dinov2WithRegistersForImageClassification(
            hf.Dinov2WithRegistersConfig(**DINOV2, num_register_tokens=2, id2label=LABELS)
        ),
        logits,
    ),
    "dinov3": (lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**DINOV3)), pooled),
    "dinov3 gated": (
        lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**DINOV3, use_gated_mlp=True, hidden_act="silu")),
        pooled,
    ),
    "clip": (lambda: hf.CLIPModel(hf.CLIPConfig(**TEXTS, projection_dim=7)), features),
    "clip projection": (
        lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**TOWER, projection_dim=7, hidden_act="gelu")),
        embedded,
    ),
    "clip tower": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**TOWER)), pooled),
    "siglip": (lambda: hf.SiglipModel(hf.SiglipConfig(**TEXTS)), features),
    "siglip tower": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**TOWER)), pooled),
    "siglip classifier": (
        lambda: hf.SiglipForImageClassification(hf.SiglipConfig(**TEXTS, id2label=LABELS)),
        logits,
    ),
}


@torch.no_grad()
def filled(model: Any) -> Any:
    for module in model.modules():
        if not isinstance(module, hf.PreTrainedModel) and list(module.parameters(recurse=False)):
            randomise(module)
    for name, parameter in model.named_parameters():
        if "dinov3" in type(model).__module__ and name.endswith(("q_proj.bias", "v_proj.bias")):
            parameter.zero_()  # as in all released files
    return model.eval()


def noise(config: tomevit.Config) -> Tensor:
    return torch.randn(2, config.in_chans, *config.img_size, generator=torch.Generator().manual_seed(1))


def model_of(path: Path, directory: Path) -> tuple[tomevit.VisionTransformer, Any]:
    report = tomevit.convert(path, directory / "ours.safetensors")
    return tomevit.load(directory / "ours.safetensors"), report


@pytest.mark.parametrize("as_saved", [True, False], ids=["saved", "in memory"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_what_transformers_writes_is_read_by_its_side_files(name: str, as_saved: bool, tmp_path: Path) -> None:
    make, call = TRANSFORMERS[name]
    theirs = filled(make())
    theirs.save_pretrained(tmp_path)
    if not as_saved:  # the names of version 5's state dict, where files have older ones
        save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    ours, report = model_of(tmp_path, tmp_path)
    images = noise(ours.config)
    with torch.inference_mode():
        assert relative_error(ours(images, r=0), call(theirs, images)) < 1e-5
    if ours.config.num_classes:
        assert ours.card.class_names == tuple(LABELS.values())
    assert all(name in report.left_out or name for name in theirs.state_dict())


BACK = ("dinov2", "dinov2 gated", "dinov2 classifier", "dinov2 with registers", "dinov3", "dinov3 gated")
BACK += ("clip projection", "clip tower", "siglip tower", "siglip classifier")


@pytest.mark.parametrize("name", BACK)
def test_transformers_loads_what_was_exported_back(name: str, tmp_path: Path) -> None:
    make, call = TRANSFORMERS[name]
    theirs = filled(make())
    theirs.save_pretrained(tmp_path / "theirs")
    card, tensors, report = weights_of(tmp_path / "theirs")
    assert card.origin is not None
    ours = tmp_path / "ours.safetensors"
    tomevit.convert(tmp_path / "theirs", ours)
    written = export(ours, tmp_path / "back", card.origin.format).written
    assert {path.name for path in written} == {"model.safetensors", "config.json", "preprocessor_config.json"}
    back, info = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    missing = {key for key in info["missing_keys"] if "mask_token" not in key and "text_model" not in key}
    assert not info["unexpected_keys"]
    assert all(key.startswith(("text_", "logit_")) or ".head." in key for key in missing), missing
    images = noise(card.config)
    with torch.inference_mode():
        assert torch.equal(call(back.eval(), images), call(theirs, images))
