"""Without merging, the models are timm's: same parameters, same outputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.peers import timm
from tests.helpers import images_for, randomise, relative_error, tiny
from tomevit import card
from tomevit.config import Config
from tomevit.models import build_meta
from tomevit.zoo import _zoo

KNOWN_TO_TIMM = set(timm.list_models())


def compare(theirs: torch.nn.Module, config: Config, batch: int = 1) -> None:
    randomise(theirs)
    ours = build_meta(config)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    images = images_for(ours, batch)
    with torch.inference_mode():
        expected = theirs.eval()(images)
        answer = ours.eval()(images)
    assert relative_error(answer, expected) < 1e-5


FULL_WIDTH = sorted(alias for alias in _zoo().aliases if alias in KNOWN_TO_TIMM)


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize("name", FULL_WIDTH)
def test_full_width(name: str) -> None:
    """Names and shapes at full depth, and the answers of two blocks: the others are like them."""
    # As many classes as in our weights: some of timm's defaults have no head.
    config = card(name).config
    with torch.device("meta"):
        deep, theirs = (
            timm.create_model(name, pretrained=False, num_classes=config.num_classes, **depth)
            for depth in ({}, {"depth": 2})
        )
    assert deep.patch_embed.img_size == config.img_size
    assert shapes(deep) == shapes(build_meta(config))
    compare(theirs.to_empty(device="cpu"), replace(config, depth=2))


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


SIZES: dict[str, Any] = {
    "img_size": (32, 48),
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 11,
}
NO_CLASS_TOKEN = {"class_token": False, "global_pool": "avg"}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # timm's arguments, and ours
    "non_square": ({}, {}),
    "registers": ({"reg_tokens": 4}, {"reg_tokens": 4}),
    "registers_without_positions": (
        {"reg_tokens": 3, "no_embed_class": True},
        {"reg_tokens": 3, "pos_embed_prefix": False},
    ),
    "class_without_position": ({"no_embed_class": True}, {"pos_embed_prefix": False}),
    "layer_scale": ({"init_values": 0.1}, {"layer_scale": 0.1}),
    "qk_norm": ({"qk_norm": True}, {"qk_norm": True}),
    "pre_norm": ({"pre_norm": True}, {"pre_norm": True}),
    "avg_norm_after": ({"global_pool": "avg"}, {"pool": "avg", "pool_norm": "after"}),
    "avg_norm_before": ({"global_pool": "avg", "fc_norm": False}, {"pool": "avg"}),
    "avg_registers": ({"global_pool": "avg", "reg_tokens": 2}, {"pool": "avg", "pool_norm": "after", "reg_tokens": 2}),
    "token_norm_after": ({"fc_norm": True}, {"pool_norm": "after"}),
    "no_class_token": (NO_CLASS_TOKEN, {"class_token": False, "pool": "avg", "pool_norm": "after"}),
    "quick_gelu": ({"act_layer": "quick_gelu"}, {"act": "quick_gelu"}),
    "gelu_tanh": ({"act_layer": "gelu_tanh"}, {"act": "gelu_tanh"}),
    "grey": ({"in_chans": 1}, {"in_chans": 1}),
    "features": ({"num_classes": 0}, {"num_classes": 0}),
    "features_avg": ({"num_classes": 0, "global_pool": "avg"}, {"num_classes": 0, "pool": "avg", "pool_norm": "after"}),
    "no_qkv_bias": ({"qkv_bias": False}, {"qkv_bias": False}),
    "narrow_mlp": ({"mlp_ratio": 2.5}, {"mlp_ratio": 2.5}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str) -> None:
    their_fields, our_fields = VARIANTS[variant]
    theirs = timm.models.VisionTransformer(**SIZES | their_fields)
    compare(theirs, Config(**SIZES | our_fields), batch=2)


def test_agreement_is_no_accident() -> None:
    """The output depends on the image and on every parameter, or agreement would mean nothing."""
    model = tiny(reg_tokens=1, layer_scale=0.5, qk_norm=True).double()
    images = images_for(model)
    with torch.inference_mode():
        answer = model(images)
        assert relative_error(model(images.flip(2)), answer) > 1e-2
        for name, parameter in model.named_parameters():
            if name.endswith(("k_norm.bias", "qkv.bias")):
                continue  # the same shift of all keys cancels in the softmax
            parameter.mul_(1.5)
            assert relative_error(model(images), answer) > 1e-4, name
            parameter.div_(1.5)
