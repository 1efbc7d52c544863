"""Models of other libraries that are in memory, taken in one line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import tomevit
from benchmarks.peers import timm, torchvision
from tests.core.test_family_files import DINOV2, TIMM, TRANSFORMERS, filled, made_by_timm, noise
from tests.helpers import randomise, relative_error
from tomevit.errors import CheckpointError

VIT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
VIT |= {"image_size": 32, "patch_size": 16}
OLDER: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor]]] = {
    "vit": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT, id2label={0: "a", 1: "b"})),
        lambda m, x: m(x).logits,
    ),
    "deit": (
        lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**VIT, num_labels=3)),
        lambda m, x: m(x).logits,
    ),
}


def assert_alike(module: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> tomevit.VisionTransformer:
    ours = tomevit.from_module(module)
    images = noise(ours.config)
    with torch.inference_mode():
        assert relative_error(ours(images), call(module, images)) < 1e-5
        assert ours(images, r=1).shape == ours(images).shape
    return ours


@pytest.mark.parametrize("name", [*TRANSFORMERS, *OLDER])
def test_models_of_transformers(name: str) -> None:
    make, call = (TRANSFORMERS | OLDER)[name]
    assert_alike(filled(make()), call)


@pytest.mark.parametrize("name", TIMM)
def test_models_of_timm(name: str) -> None:
    theirs = made_by_timm(name)
    ours = assert_alike(theirs, lambda m, x: m(x))
    assert (ours.config.proj_dim > 0) == (name in ("clip", "clip with QuickGELU", "pe core"))
    mean = tuple(theirs.pretrained_cfg["mean"])
    assert ours.card.preprocess.mean == mean


PLAIN = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


@pytest.mark.parametrize(
    "arguments",
    [
        *({}, {"global_pool": "avg"}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}),
        *({"no_embed_class": True}, {"init_values": 0.1}, {"qk_norm": True}, {"act_layer": "quick_gelu"}),
    ],
    ids=str,
)
def test_a_model_that_timm_has_no_name_for(arguments: dict[str, Any]) -> None:
    theirs = timm.models.VisionTransformer(**PLAIN, **arguments)
    randomise(theirs)
    assert_alike(theirs.eval(), lambda m, x: m(x))


@pytest.mark.parametrize("outputs", [512, 5])
def test_the_head_of_eva02s_clip_is_its_projection(outputs: int) -> None:
    toy = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": outputs}
    theirs = timm.create_model("eva02_base_patch16_clip_224", **toy)
    randomise(theirs)
    ours = assert_alike(theirs.eval(), lambda m, x: m(x))
    assert ours.config.attn_norm
    assert (ours.config.proj_dim, ours.config.num_classes) == ((512, 0) if outputs == 512 else (0, 5))


def test_the_model_of_torchvision() -> None:
    theirs = torchvision.models.VisionTransformer(32, 16, 2, 3, 48, 96, num_classes=5)
    randomise(theirs)
    ours = assert_alike(theirs.eval(), lambda m, x: m(x))
    assert ours.card.preprocess.interpolation == "bilinear"


def open_clips(**vision: Any) -> Any:
    open_clip = pytest.importorskip("open_clip")
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    kind = open_clip.CustomTextCLIP if "timm_model_name" in vision else open_clip.CLIP
    quick = {} if "timm_model_name" in vision else {"quick_gelu": True}
    model = kind(7, {"image_size": 32, **vision}, text, **quick)
    randomise(model.visual)
    return model.eval()


@pytest.mark.parametrize(
    "vision",
    [
        {"layers": 2, "width": 48, "head_width": 16, "patch_size": 16},
        {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none"},
        {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear"},
    ],
    ids=["its own", "timm's", "timm's, projected"],
)
def test_models_of_open_clip(vision: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tomevit"):
        assert_alike(open_clips(**vision), lambda m, x: m.encode_image(x))
    told = [record.getMessage() for record in caplog.records]
    assert sum("transformer.resblocks.{i}.ln_1.weight" in line for line in told) == 1


def test_weights_are_copies_and_what_was_taken_is_told(caplog: pytest.LogCaptureFixture) -> None:
    theirs = filled(hf.Dinov2Model(hf.Dinov2Config(**DINOV2)))
    with caplog.at_level(logging.INFO, "tomevit"):
        ours = tomevit.from_module(theirs, r=2)
    assert ours.r == 2
    told = " ".join(record.getMessage() for record in caplog.records)
    assert "Dinov2Model in memory" in told
    assert "mask_token" in told
    assert "usually" in told
    before = ours.blocks[0].attn.qkv.weight.clone()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    assert torch.equal(ours.blocks[0].attn.qkv.weight, before)


def test_our_own_is_copied_too() -> None:
    model = tomevit.create("vit_ti16")
    copy = tomevit.from_module(model, r=3)
    assert copy.r == 3
    assert model.r == 0
    assert copy.blocks[0].attn.qkv.weight.data_ptr() != model.blocks[0].attn.qkv.weight.data_ptr()


def test_create_takes_a_model_of_another_library() -> None:
    theirs = timm.create_model("vit_small_patch14_dinov2", img_size=56, depth=12)
    randomise(theirs)
    ours = tomevit.create("dinov2_s14", pretrained=theirs.eval(), r=4)
    images = torch.randn(1, 3, 56, 56)
    with torch.inference_mode():
        assert relative_error(ours(images, r=0), theirs(images)) < 1e-5
    assert (ours.card.name, ours.config.img_size) == ("dinov2_s14", (56, 56))
    resized = tomevit.create("dinov2_s14", pretrained=theirs, img_size=112, num_classes=3)
    assert resized(torch.randn(1, 3, 112, 112)).shape == (1, 3)
    with pytest.raises(CheckpointError, match="dinov2_b14"):
        tomevit.create("dinov2_b14", pretrained=theirs)


class Lora(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.lora_A = layer, nn.Linear(layer.in_features, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


def replace_attention(model: Any) -> None:
    model.blocks[1].attn.qkv = Lora(model.blocks[1].attn.qkv)


def quantise(model: Any) -> None:
    model.blocks[0].mlp.fc1 = torch.ao.nn.quantized.dynamic.Linear(48, 192)


def change_activation(model: Any) -> None:
    model.blocks[0].mlp.act = nn.ReLU()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize:UserWarning")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (replace_attention, r"replaced.*blocks\.1\.attn\.qkv \(tests\.core\.test_live\.Lora\).*merge_and_unload"),
        (quantise, r"replaced.*blocks\.0\.mlp\.fc1 \(torch\.ao\.nn\.quantized"),
        (change_activation, r"activation torch\.nn\.modules\.activation\.ReLU is none of gelu"),
        (lambda model: setattr(model, "global_pool", "max"), "global_pool is 'max'"),
        (lambda model: model.norm_pre.register_parameter("x", nn.Parameter(torch.ones(1))), r"norm_pre\.x"),
    ],
)
def test_what_cannot_be_read_is_named(change: Callable[[Any], Any], said: str) -> None:
    model = timm.models.VisionTransformer(**PLAIN)
    change(model)
    with pytest.raises(CheckpointError, match=said):
        tomevit.from_module(model)


@pytest.mark.parametrize(
    "module",
    [nn.Linear(2, 2), timm.create_model("resnet18"), torchvision.models.resnet18()],
    ids=["torch", "timm", "torchvision"],
)
def test_other_models_are_refused(module: nn.Module) -> None:
    with pytest.raises(ValueError, match="VisionTransformer"):
        tomevit.from_module(module)


def test_a_config_that_we_have_nothing_like_is_refused() -> None:
    config = hf.DINOv3ViTConfig(**VIT, num_register_tokens=4, rope_theta=50.0)
    with pytest.raises(CheckpointError, match="rope_theta is 50"):
        tomevit.from_module(hf.DINOv3ViTModel(config))
