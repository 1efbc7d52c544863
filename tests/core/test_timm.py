"""Without merging, the models are timm's: same parameters, same outputs."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers import timm
from tests.helpers import (
    PLAIN_VITS,
    format_of_timms,
    images_for,
    is_prepared_as_timm_does,
    randomise,
    relative_error,
    timm_on_meta,
    timms_shapes,
    tiny,
)
from tomevit import MaskedAutoencoder, VisionTransformer, card, create, list_models
from tomevit.config import Config
from tomevit.models import build_meta
from tomevit.zoo import _zoo

KNOWN_TO_TIMM = set(timm.list_models())
optim, task, utils = (importlib.import_module(f"timm.{part}") for part in ("optim", "task", "utils"))


def compare(theirs: torch.nn.Module, config: Config, batch: int = 1) -> None:
    randomise(theirs)
    ours = build_meta(config)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    images = images_for(ours, batch)
    with torch.inference_mode():
        expected = theirs.eval()(images)
        answer = ours.eval()(images)
    assert relative_error(answer, expected) < 1e-5


FULL_WIDTH = sorted(alias for alias in _zoo().aliases if alias in KNOWN_TO_TIMM and card(alias).title in PLAIN_VITS)


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize("name", FULL_WIDTH)
def test_full_width(name: str) -> None:
    """Names and shapes at full depth, and the answers of two blocks: the others are like them.

    Plain ViTs alone: test_zoo.py has the shapes of the other families, and test_peers.py their answers.
    """
    # As many classes as in our weights: some of timm's defaults have no head.
    found = card(name)
    config, form = found.config, format_of_timms(found)
    if "_qkvb" in name:
        config = replace(config, qkv_bias=True)  # timm's other models of DINOv3 have biases, 0 in its weights
    classes = config.num_classes or config.proj_dim
    deep, theirs = timm_on_meta(name, num_classes=classes), timm_on_meta(name, num_classes=classes, depth=2)
    assert deep.patch_embed.img_size == config.img_size
    assert {key: tensor.shape for key, tensor in deep.state_dict().items()} == timms_shapes(config, form)
    compare(theirs.to_empty(device="cpu"), replace(config, depth=2))


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


# ------------------------------------------------------------------------------------------------------ timm's helpers

HELPED = ["deit_ti16", "deit_distilled_ti16", "deit3_s16", "vit_s16"]


def with_timms(name: str) -> tuple[VisionTransformer, torch.nn.Module]:
    found = card(name)
    return build_meta(found.config), timm_on_meta(found.timm, num_classes=found.config.num_classes)


@pytest.mark.parametrize("name", HELPED)
@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_its_optimizers_group_parameters_alike(name: str, layer_decay: float | None) -> None:
    def groups(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        optimizer = optim.create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=layer_decay)
        return {names[id(p)]: {**group, "params": 0} for group in optimizer.param_groups for p in group["params"]}

    ours, theirs = with_timms(name)
    assert groups(ours) == groups(theirs)
    if layer_decay:
        assert len({group["lr_scale"] for group in groups(ours).values()}) == ours.config.depth + 2


def test_its_layer_decay_of_a_masked_autoencoder() -> None:
    model = MaskedAutoencoder(tiny(reg_tokens=1, pre_norm=True), decoder_dim=8, decoder_depth=2, decoder_heads=1)
    layers = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert {layers[f"encoder.{name}"] for name in ("cls_token", "reg_token", "pos_embed", "norm_pre.weight")} == {0}
    assert [layers[f"encoder.blocks.{i}.mlp.fc1.weight"] for i in range(4)] == [1, 2, 3, 4]
    assert layers["encoder.norm.bias"] == 4
    assert {layer for name, layer in layers.items() if name.startswith("decoder.")} == {5}


PUBLISHED = {f"{found.timm}.{found.weights}": found for found in map(card, list_models(weights=True))}


@pytest.mark.parametrize(
    "name",
    sorted(
        name for name, found in PUBLISHED.items() if timm.is_model_pretrained(name) and is_prepared_as_timm_does(found)
    ),
)
def test_it_prepares_images_as_it_does_for_its_own_weights(name: str) -> None:
    ours, cfg = build_meta(PUBLISHED[name].config), timm.models.get_pretrained_cfg(name)
    ours.card = PUBLISHED[name]
    expected = timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict())
    assert timm.data.resolve_model_data_config(ours) == expected


@pytest.mark.parametrize("name", HELPED)
def test_a_model_has_its_attributes(name: str) -> None:
    ours, theirs = with_timms(name)
    names = ("num_classes", "in_chans", "embed_dim", "num_features", "head_hidden_size", "num_prefix_tokens")
    for each in (*names, "global_pool"):
        assert getattr(ours, each) == getattr(theirs, each)
        with pytest.raises(AttributeError):
            setattr(ours, each, 1)
    for each in ("input_size", "fixed_input_size", "pool_size", "first_conv", "classifier", "num_classes"):
        assert ours.pretrained_cfg[each] == theirs.pretrained_cfg[each]
    heads = [getattr(ours, head) for head in ours.head_names]
    assert ours.get_classifier() in (heads[0], tuple(heads))
    assert isinstance(ours.get_classifier(), tuple) == isinstance(theirs.get_classifier(), tuple)
    ours.reset_classifier(3)
    assert ours.num_classes == ours.pretrained_cfg["num_classes"] == 3


def test_what_it_writes_for_the_hub_it_reads_again(tmp_path: Path) -> None:
    model = create("deit_ti16", num_classes=5, img_size=64, in_chans=1)
    randomise(model)
    timm.models.save_for_hf(model, tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.inference_mode():
        assert relative_error(model(images_for(model)), theirs(images_for(model))) < 1e-5
    found, expected = map(timm.data.resolve_model_data_config, (theirs, model))
    assert {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()} == expected


def test_its_other_helpers() -> None:
    """They act, or say that they cannot."""
    model = tiny(8)
    utils.freeze(model, ["patch_embed", "blocks.0"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(("patch_embed.", "blocks.0."))}
    ema = utils.ModelEmaV3(model, decay=0.0)
    randomise(model, 1)
    ema.update(model)
    assert torch.equal(ema(images_for(model)), model(images_for(model)))
    assert utils.get_state_dict(ema).keys() == model.state_dict().keys()
    assert timm.layers.apply_test_time_pool(model, {"input_size": (3, 32, 32)}) == (model, False)
    assert task.DistillationTeacher(model, num_classes=7)(images_for(model)).shape == (3, 7)
