"""The JSON files beside a checkpoint: what we write, timm and transformers load; what they write, we read."""

from __future__ import annotations

import inspect
import json
import math
import re
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import tomevit
from benchmarks.peers import timm
from tests.helpers import images_for, randomise, relative_error, tiny
from tomevit.cards import Card
from tomevit.config import ARCHITECTURE, Config, Preprocess
from tomevit.errors import CheckpointError
from tomevit.models import build_meta
from tomevit.transform import Transform
from tomevit.weights import rules
from tomevit.weights.formats import FORMATS
from tomevit.weights.side_files import card_from_configs, configs_from_card
from tomevit.weights.side_files.common import MOST_BYTES, mlp_ratio_for
from tomevit.weights.side_files.transformers import FAMILIES, crop_share, edges_before_crop

TINY = Config(img_size=(32, 32), patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=7)
SQUASH = Preprocess(mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2), crop_pct=1.0, resize="squash", interpolation="bilinear")
SHORTER = Preprocess(crop_pct=32 / 37)
NAMES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")


def described(preprocess: Preprocess = SHORTER, **fields: Any) -> Card:
    config = replace(TINY, **fields)
    names = NAMES if config.num_classes == len(NAMES) else ()
    return Card(name="mine", config=config, preprocess=preprocess, class_names=names, licence="mit")


def put(directory: Path, files: dict[str, Any]) -> dict[str, Path]:
    paths = {}
    for name, content in files.items():
        paths[name] = directory / name
        paths[name].write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return paths


def architecture(config: Config) -> dict[str, Any]:
    return {field: getattr(config, field) for field in ARCHITECTURE}


def assert_same(found: Card | None, card: Card) -> None:
    assert found is not None
    assert architecture(found.config) == architecture(card.config)
    assert found.preprocess == card.preprocess
    assert found.class_names == card.class_names


# ----------------------------------------------------------------------------------------------------------------- timm

TIMM: dict[str, Card] = {
    "plain": described(),
    "squash": described(replace(SQUASH, crop_pct=0.9)),
    "not square": described(img_size=(32, 48)),
    "registers": described(reg_tokens=3, pos_embed_prefix=False),
    "layer scale": described(layer_scale=0.1),
    "every norm": described(qk_norm=True, pre_norm=True),
    "average": described(pool="avg", pool_norm="after"),
    "average of norms": described(pool="avg"),
    "norm of the token": described(pool_norm="after"),
    "no class token": described(pool="avg", class_token=False),
    "tanh": described(act="gelu_tanh", mlp_ratio=2.5),
    "quick": described(act="quick_gelu", qkv_bias=False),
    "distilled": described(dist_token=True),
    "headless": described(num_classes=0),
    "grey": described(Preprocess(mean=(0.3,), std=(0.4,), crop_pct=1.0), in_chans=1),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm_loads_what_we_write(name: str, tmp_path: Path) -> None:
    card = TIMM[name]
    model = tiny(**architecture(card.config))
    files = put(tmp_path, configs_from_card(card, "timm"))
    save_file(model.state_dict(), tmp_path / "model.safetensors")

    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = images_for(model, 2)
    with torch.inference_mode():
        assert relative_error(model(images), theirs(images)) < 1e-5

    # Another head, where timm must know which tensors to leave out.
    timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)

    data = timm.data.resolve_data_config(theirs.pretrained_cfg)
    ours = card.preprocess
    assert data["input_size"] == (card.config.in_chans, *card.config.img_size)
    assert (tuple(data["mean"]), tuple(data["std"])) == (ours.mean, ours.std)
    assert (data["interpolation"], data["crop_pct"]) == (ours.interpolation, ours.crop_pct)
    assert theirs.pretrained_cfg["fixed_input_size"]
    assert data["crop_mode"] == {"shorter": "center", "squash": "squash"}[ours.resize]

    assert_same(card_from_configs(files), card)


@pytest.mark.parametrize("name", ["plain", "squash", "not square"])
def test_images_are_prepared_as_timm_does(name: str, tmp_path: Path) -> None:
    card = TIMM[name]
    put(tmp_path, configs_from_card(card, "timm"))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=False)
    prepare = timm.data.create_transform(**timm.data.resolve_data_config(theirs.pretrained_cfg))
    image = picture(101, 67)
    assert torch.allclose(Transform(card.preprocess, card.config.img_size)(image), prepare(image), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({}, "vit_ti16"),
        ({"img_size": 64, "in_chans": 1}, "vit_ti16"),
        ({"global_pool": "avg", "num_classes": 5}, "vit_ti16"),
    ],
)
def test_we_read_what_timm_writes(arguments: dict[str, Any], name: str, tmp_path: Path) -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", pretrained=False, **arguments)
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    card = card_from_configs({"config.json": tmp_path / "config.json"})
    assert card is not None
    assert card.name == name
    model = build_meta(card.config)
    randomise(theirs)
    model.load_state_dict(theirs.state_dict(), assign=True)
    images = images_for(model, 1)
    with torch.inference_mode():
        assert relative_error(model.eval()(images), theirs.eval()(images)) < 1e-5


def test_a_fine_tuned_model_is_not_taken_for_the_weights_it_began_with(tmp_path: Path) -> None:
    config = {
        "architecture": "vit_base_patch16_224",
        "num_classes": 2,
        "label_names": ["n1", "n2"],
        "label_descriptions": {"n1": "hot dog"},
        "pretrained_cfg": {"tag": "augreg_in21k_ft_in1k", "input_size": [3, 224, 224], "license": "apache-2.0"},
    }
    card = card_from_configs(put(tmp_path, {"config.json": config}))
    assert card is not None
    assert (card.name, card.weights, card.sources, card.figures) == ("vit_b16", None, (), ())
    assert (card.config.num_classes, card.class_names, card.licence) == (2, ("hot dog", "n2"), "apache-2.0")


@pytest.mark.parametrize(
    ("said", "name", "pool_norm"),
    [
        ({"pretrained_cfg": {"global_pool": "avg"}}, "vit_b16", "after"),
        ({"model_args": {"global_pool": "avg"}}, "vit_b16", "after"),
        ({"global_pool": "avg", "pretrained_cfg": {"tag": "augreg_in21k_ft_in1k"}}, "vit_b16", "after"),
        ({"model_args": {"global_pool": "avg", "fc_norm": False}}, "vit_b16", "before"),
        ({"architecture": "deit_base_patch16_224", "global_pool": "avg"}, "deit_b16", "after"),
        ({"global_pool": "avg", "pretrained_cfg": {"tag": "mae"}}, "mae_b16", "after"),
    ],
)
def test_average_pooling_is_of_the_family_that_the_file_names(
    said: dict[str, Any], name: str, pool_norm: str, tmp_path: Path
) -> None:
    card = card_from_configs(put(tmp_path, {"config.json": {"architecture": "vit_base_patch16_224"} | said}))
    assert card is not None
    assert (card.name, card.config.pool, card.config.pool_norm) == (name, "avg", pool_norm)
    assert card.config.prop_attn == (not name.startswith("mae"))


def test_mae_is_still_mae_after_it_was_written(tmp_path: Path) -> None:
    found = card_from_configs(put(tmp_path, configs_from_card(tomevit.card("mae_l16"), "timm")))
    assert found is not None
    assert (found.name, found.config.prop_attn) == ("mae_l16", False)


TRAINING = ["drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"]
TRAINING += ["drop_block_rate", "weight_init", "fix_init", "dynamic_img_size", "dynamic_img_pad", "device", "dtype"]
TRAINING += ["scriptable", "exportable", "no_jit", "cache_dir", "checkpoint_path", "pretrained", "pretrained_strict"]


@pytest.mark.parametrize("name", TRAINING)
def test_what_only_training_cares_about_is_passed_over(name: str, tmp_path: Path) -> None:
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {name: 0.1, "scale_mlp_norm": False}}
    card = card_from_configs(put(tmp_path, {"config.json": config}))
    assert card is not None
    assert card.name == "vit_ti16"


def test_every_argument_of_timms_vit_is_known(tmp_path: Path) -> None:
    """Where it has its default, or speaks of training alone, it is read: no other model is refused for one of these."""
    arguments = inspect.signature(timm.models.VisionTransformer.__init__).parameters
    plain = {name: p.default for name, p in arguments.items() if isinstance(p.default, bool | int | float | str)}
    assert {"proj_bias", "scale_attn_norm", "final_norm", "drop_path_rate", "pos_embed"} <= plain.keys()
    card = card_from_configs(
        put(tmp_path, {"config.json": {"architecture": "vit_base_patch16_224", "model_args": plain}})
    )
    assert card is not None
    assert card.name == "vit_b16"


IDLE = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "drop_path_rate": 0.1, "dtype": "float32"}
IDLE |= {
    "problem_type": "single_label_classification",
    "torch_dtype": "float16",
    "use_cache": True,
    "return_dict": True,
}
IDLE |= {"gradient_checkpointing": True, "finetuning_task": "x", "layerdrop": 0.1, "encoder_stride": 16}
IDLE |= {
    "pooler_output_size": 768,
    "pooler_act": "tanh",
    "output_attentions": True,
    "pruned_heads": {},
    "num_labels": 2,
}


def test_what_changes_no_weight_and_no_answer_in_transformers_is_passed_over(tmp_path: Path) -> None:
    config = {"model_type": "vit", "id2label": {"0": "a", "1": "b"}}
    plain = card_from_configs(put(tmp_path, {"config.json": config}))
    assert card_from_configs(put(tmp_path, {"config.json": config | IDLE})) == plain


GREY: list[tuple[dict[str, Any], dict[str, Any], tuple[float, ...], tuple[float, ...]]] = [
    ({"architecture": "vit_tiny_patch16_224", "model_args": {"in_chans": 1}}, {}, (0.5,), (0.5,)),
    (
        {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"input_size": [1, 224, 224], "mean": [0.1307]}}
        | {"mean": [0.1]},
        {},
        (0.1307,),
        (0.5,),
    ),
    (
        {"architecture": "vit_tiny_patch16_224", "input_size": [1, 224, 224], "mean": [0.485, 0.456, 0.406]}
        | {"std": [0.229, 0.224, 0.225]},
        {},
        (0.5,),
        (0.5,),
    ),
    (
        {"architecture": "vit_tiny_patch16_224", "input_size": [13, 224, 224], "mean": [0.0] * 3, "std": [1.0] * 3},
        {},
        (0.0,) * 13,
        (1.0,) * 13,
    ),
    ({"model_type": "vit", "num_channels": 1}, {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, (0.5,), (0.25,)),
    ({"model_type": "vit", "num_channels": 1}, {"image_mean": 0.3, "image_std": [0.4]}, (0.3,), (0.4,)),
    ({"model_type": "vit", "num_channels": 4}, {"image_processor_type": "CLIPImageProcessor"}, (0.5,) * 4, (0.5,) * 4),
]


@pytest.mark.parametrize(("config", "processor", "mean", "std"), GREY)
def test_statistics_have_the_models_channels(
    config: dict[str, Any], processor: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...], tmp_path: Path
) -> None:
    card = card_from_configs(put(tmp_path, {"config.json": config, "preprocessor_config.json": processor}))
    assert card is not None
    assert (card.preprocess.mean, card.preprocess.std) == (mean, std)
    assert card.config.in_chans == len(mean)


@pytest.mark.parametrize("size", [{"shortest_edge": None}, {"height": None, "width": None}, {}, None])
def test_a_size_of_null_is_the_processors_own(size: Any, tmp_path: Path) -> None:
    files = {"config.json": {"model_type": "deit"}, "preprocessor_config.json": {"size": size}}
    card = card_from_configs(put(tmp_path, files))
    assert card is not None
    assert (card.preprocess.resize, card.preprocess.crop_pct) == ("squash", 0.875)


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("timm", {"mlp_ratio": 1e5}, "mlp_ratio is 100000.0, and must be from 0 to 65536 to be written"),
        ("hf_vit", {"mlp_ratio": 1e5}, "intermediate_size is 2400000, and must be from 1 to 1048576 to be written"),
        ("timm", {"in_chans": 5000}, "in_chans is 5000"),
        ("timm", {"img_size": (2**15, 2**15)}, "img_size is (32768, 32768)"),
    ],
)
def test_what_is_not_read_is_not_written(kind: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        configs_from_card(described(**fields), kind)


def test_a_tag_tells_families_of_one_name_apart(tmp_path: Path) -> None:
    config = {"architecture": "vit_base_patch16_224", "num_classes": 0, "pretrained_cfg": {"tag": "mae"}}
    card = card_from_configs(put(tmp_path, {"config.json": config}))
    assert card is not None
    assert card.name == "mae_cls_b16"
    assert not card.config.prop_attn


def test_one_level_as_timm_once_wrote(tmp_path: Path) -> None:
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "input_size": [3, 224, 224], "crop_pct": 0.9}
    config |= {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "labels": ["a", "b", "c"]}
    card = card_from_configs(put(tmp_path, {"config.json": config}))
    assert card is not None
    assert (card.config.num_classes, card.class_names) == (3, ("a", "b", "c"))
    assert card.preprocess == Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9)


def test_positions_that_timm_resamples_at_run_time_are_the_models_own(tmp_path: Path) -> None:
    cfg = {"input_size": [3, 288, 288], "fixed_input_size": False}
    config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": cfg, "model_args": {"dynamic_img_size": True}}
    card = card_from_configs(put(tmp_path, {"config.json": config}))
    assert card is not None
    assert card.config.img_size == (224, 224)


def test_names_for_another_number_of_classes_are_no_names(tmp_path: Path) -> None:
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "label_names": ["a", "b"], "pretrained_cfg": {}}
    card = card_from_configs(put(tmp_path, {"config.json": config}))
    assert card is not None
    assert (card.config.num_classes, card.class_names) == (5, ())


def test_the_nearest_architectures_are_named(tmp_path: Path) -> None:
    files = put(tmp_path, {"config.json": {"architecture": "vit_base_patch16_225", "pretrained_cfg": {}}})
    with pytest.raises(CheckpointError, match=r"config\.json: .*vit_base_patch16_224"):
        card_from_configs(files)


def test_every_card_of_the_zoo_survives_timm(tmp_path: Path) -> None:
    for name in tomevit.list_models(weights=True):
        card = tomevit.card(name)
        if card.config.pool == "token_avg" or (card.config.pos_embed_prefix == "class" and card.config.reg_tokens):
            with pytest.raises(ValueError, match=r"token_avg|pos_embed_prefix"):
                configs_from_card(card, "timm")
            continue
        found = card_from_configs(put(tmp_path, configs_from_card(card, "timm")))
        assert_same(found, card)
        assert found is not None
        assert found.licence == card.licence
        if card.timm:
            assert (found.timm, found.title) == (card.timm, card.title)


# --------------------------------------------------------------------------------------------------------- transformers

HF: dict[str, tuple[str, Card]] = {
    "plain": ("hf_vit", described()),
    "squash": ("hf_vit", described(SQUASH)),
    "squash and crop": ("hf_vit", described(replace(SQUASH, crop_pct=0.8))),
    "not square": ("hf_vit", described(SQUASH, img_size=(32, 48))),
    "headless": ("hf_vit", described(num_classes=0)),
    "tanh": ("hf_vit", described(act="gelu_tanh", norm_eps=1e-12)),
    "quick": ("hf_vit", described(act="quick_gelu", qkv_bias=False, mlp_ratio=5 / 3)),
    "distilled": ("hf_deit", described(dist_token=True)),
    "distilled, headless": ("hf_deit", described(dist_token=True, num_classes=0)),
    "mae": ("hf_vit_mae", described(num_classes=0)),
}


@pytest.mark.parametrize("name", HF)
def test_transformers_loads_what_we_write(name: str, tmp_path: Path) -> None:
    kind, card = HF[name]
    model = tiny(**architecture(card.config))
    files = put(tmp_path, configs_from_card(card, kind))
    tensors = rules.from_native(FORMATS[kind], model.state_dict(), card.config)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})

    headed = card.config.num_classes > 0
    auto = transformers.AutoModelForImageClassification if headed else transformers.AutoModel
    theirs, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    theirs.eval()
    assert type(theirs).__name__ == theirs.config.architectures[0]
    assert not report["unexpected_keys"]
    assert all(key.startswith("pooler.") for key in report["missing_keys"])  # which stands beside the features
    images = images_for(model, 2)
    with torch.inference_mode():
        answer = theirs(images)
        features = None if headed else answer.last_hidden_state[:, : 1 + card.config.dist_token].mean(1)
        assert relative_error(model(images), answer.logits if headed else features) < 1e-5
    if headed:
        assert theirs.config.id2label == dict(enumerate(NAMES))

    assert_same(card_from_configs(files), card)


def picture(width: int, height: int) -> Image.Image:
    """Smooth and not symmetric, so that a shift or another filter shows."""
    y, x = torch.meshgrid(torch.linspace(0, 5, height), torch.linspace(0, 7, width), indexing="ij")
    channels = torch.stack([x.sin() * y.cos(), (x * y / 3).sin(), (x + y).cos()], -1)
    return Image.fromarray(((channels + 1) * 127).to(torch.uint8).numpy())


@pytest.mark.parametrize("name", ["plain", "squash", "squash and crop", "not square", "mae"])
@pytest.mark.parametrize("size", [(101, 67), (67, 103), (32, 32), (640, 480)], ids=str)
@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_images_are_prepared_as_transformers_does(
    name: str, size: tuple[int, int], backend: str, tmp_path: Path
) -> None:
    kind, card = HF[name]
    put(tmp_path, configs_from_card(card, kind))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    image = picture(*size)
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    ours = Transform(card.preprocess, card.config.img_size)(image)
    assert ours.shape == theirs.shape
    # Pillow's resize is ours to the bit. torchvision's rounds its filter's weights by itself: up to 1 of 255 off.
    steps = 1e-3 if backend == "pil" else 1 + 1e-3
    # Half an odd margin is rounded down there, and to even here as in timm: the crop may begin a pixel earlier.
    height, width = card.config.img_size
    apart = min(
        (ours[:, : height - y, : width - x] - theirs[:, y:, x:]).abs().max().item() for y in (0, 1) for x in (0, 1)
    )
    assert apart < steps / 255 / min(card.preprocess.std)


def test_we_read_what_transformers_writes(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=768, image_size=384, id2label={0: "no", 1: "yes"}, hidden_act="gelu_new", qkv_bias=False
    )
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 384, "width": 384}).save_pretrained(tmp_path)
    card = card_from_configs({path.name: path for path in tmp_path.iterdir()})
    assert card is not None
    assert card.name == "vit_768x12_p16"  # tanh and no bias of queries: no model of the zoo's
    assert card.config == Config(img_size=(384, 384), num_classes=2, act="gelu_tanh", qkv_bias=False, norm_eps=1e-12)
    assert card.class_names == ("no", "yes")
    half = (0.5, 0.5, 0.5)
    assert card.preprocess == Preprocess(mean=half, std=half, interpolation="bilinear", crop_pct=1.0, resize="squash")


MAE = {"model_type": "vit_mae", "architectures": ["ViTMAEForPreTraining"], "decoder_hidden_size": 512}
KNOWN: list[tuple[dict[str, Any], dict[str, Any], str, dict[str, Any], dict[str, Any]]] = [
    (
        {"model_type": "vit", "architectures": ["ViTForImageClassification"], "num_labels": 3},
        {"size": 224, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "do_rescale": False},
        "vit_b16",
        {"num_classes": 3, "norm_eps": 1e-12},
        {"resize": "squash", "crop_pct": 1.0, "interpolation": "bilinear"},
    ),
    (
        {"model_type": "vit", "architectures": ["ViTModel"], "image_size": 384, "hidden_size": 1024}
        | {"num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        {"size": 384},
        "vit_l16_384",
        {"num_classes": 0, "img_size": (384, 384)},
        {"resize": "squash", "crop_pct": 1.0},
    ),
    (
        {"model_type": "deit", "architectures": ["DeiTForImageClassificationWithTeacher"]},
        {"feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224, "do_center_crop": True}
        | {"resample": 3, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
        "deit_distilled_b16",
        {"dist_token": True, "num_classes": 2},
        {"resize": "squash", "crop_pct": 0.875, "mean": (0.485, 0.456, 0.406)},
    ),
    (
        {"model_type": "deit", "architectures": ["DeiTForImageClassification"]},
        {},
        "vit_768x12_p16",
        {"dist_token": False, "reg_tokens": 1, "num_classes": 2},
        {"resize": "squash", "crop_pct": 0.875, "interpolation": "bicubic"},
    ),
    (
        MAE,
        {"image_processor_type": "ViTImageProcessorFast", "size": {"height": 224, "width": 224}},
        "mae_cls_b16",
        {"num_classes": 0, "prop_attn": False},
        {"resize": "squash", "mean": (0.5,) * 3},
    ),
    (
        {"model_type": "vit"},
        {"image_processor_type": "CLIPImageProcessor", "size": 256, "crop_size": {"height": 224, "width": 224}},
        "vit_b16",
        {"num_classes": 0},
        {"resize": "shorter", "crop_pct": 0.875, "interpolation": "bicubic"},
    ),
    (  # facebook/dinov2-small
        {"model_type": "dinov2", "architectures": ["Dinov2Model"], "hidden_size": 384, "num_attention_heads": 6}
        | {"image_size": 518, "patch_size": 14, "layerscale_value": 1.0, "mlp_ratio": 4, "use_swiglu_ffn": False},
        {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "resample": 3}
        | {"crop_size": {"height": 224, "width": 224}, "image_mean": [0.485, 0.456, 0.406], "do_center_crop": True}
        | {"image_std": [0.229, 0.224, 0.225]},
        "dinov2_s14_518",
        {"num_classes": 0, "img_size": (518, 518), "pool": "token"},
        {"resize": "shorter", "crop_pct": 0.875, "interpolation": "bicubic"},
    ),
    (  # facebook/dinov2-with-registers-giant-imagenet1k-1-layer
        {"model_type": "dinov2_with_registers", "architectures": ["Dinov2WithRegistersForImageClassification"]}
        | {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True}
        | {"image_size": 518, "patch_size": 14, "num_labels": 1000, "num_register_tokens": 4},
        {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "crop_size": 224},
        "dinov2_g14_reg_518",
        {"num_classes": 1000, "pool": "token_avg", "mlp": "swiglu", "pos_embed_prefix": "class"},
        {"resize": "shorter", "crop_pct": 0.875},
    ),
    (  # facebook/dinov3-vits16plus-pretrain-lvd1689m
        {"model_type": "dinov3_vit", "architectures": ["DINOv3ViTModel"], "hidden_act": "silu", "use_gated_mlp": True}
        | {"num_register_tokens": 4, "rope_theta": 100.0, "pos_embed_rescale": 2.0, "query_bias": True},
        {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 224, "width": 224}, "resample": 2},
        "dinov3_s16plus",
        {"num_classes": 0, "rope": "dinov3", "reg_tokens": 4, "pool": "token"},
        {"resize": "squash", "crop_pct": 1.0, "interpolation": "bilinear", "mean": (0.485, 0.456, 0.406)},
    ),
    (  # openai/clip-vit-base-patch16
        {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 512}
        | {"vision_config": {"patch_size": 16, "projection_dim": 768}, "text_config": {"vocab_size": 49408}},
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "do_center_crop": True},
        "clip_b16",
        {"num_classes": 0, "proj_dim": 512, "act": "quick_gelu", "norm_eps": 1e-5},
        {"resize": "shorter", "crop_pct": 1.0, "mean": (0.48145466, 0.4578275, 0.40821073)},
    ),
    (  # google/siglip-so400m-patch14-384
        {"model_type": "siglip", "architectures": ["SiglipModel"], "text_config": {"vocab_size": 32000}}
        | {
            "vision_config": {"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "patch_size": 14}
            | {"num_hidden_layers": 27, "num_attention_heads": 16}
        },
        {"image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 384}, "resample": 3},
        "siglip_so400m14_378",
        {"img_size": (378, 378), "pool": "map", "act": "gelu_tanh"},
        {"resize": "squash", "crop_pct": 1.0, "mean": (0.5,) * 3},
    ),
    (  # google/siglip2-base-patch16-224
        {"model_type": "siglip", "architectures": ["SiglipModel"], "text_config": {"vocab_size": 256000}}
        | {"vision_config": {"model_type": "siglip_vision_model"}},
        {"image_processor_type": "SiglipImageProcessor", "size": {"height": 224, "width": 224}, "resample": 2},
        "siglip2_b16",
        {"img_size": (224, 224), "pool": "map", "proj_dim": 0},
        {"resize": "squash", "crop_pct": 1.0, "interpolation": "bilinear"},
    ),
    (
        {"model_type": "vit", "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "hidden_act": None},
        {"do_normalize": False, "size": {"shortest_edge": 224}},
        "vit_b16",
        {"num_classes": 2},
        {"resize": "shorter", "crop_pct": 1.0, "mean": (0.0,) * 3, "std": (1.0,) * 3},
    ),
]


@pytest.mark.parametrize(("config", "processor", "name", "fields", "preprocess"), KNOWN)
def test_configs_of_the_hub(
    config: dict[str, Any],
    processor: dict[str, Any],
    name: str,
    fields: dict[str, Any],
    preprocess: dict[str, Any],
    tmp_path: Path,
) -> None:
    card = card_from_configs(put(tmp_path, {"config.json": config, "preprocessor_config.json": processor}))
    assert card is not None
    assert (card.name, card.class_names) == (name, ())
    assert fields.items() <= asdict(card.config).items()
    assert preprocess.items() <= asdict(card.preprocess).items()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_where_a_config_is_silent_transformers_default_holds(model_type: str) -> None:
    family = FAMILIES[model_type]
    theirs = transformers.AutoConfig.for_model(model_type)
    part = getattr(theirs, family.part) if family.part else theirs
    for row in family.rows:
        assert getattr(part, row.theirs) == row.default, row.theirs


def test_without_a_preprocessor_the_models_own_default_holds(tmp_path: Path) -> None:
    card = card_from_configs(put(tmp_path, {"config.json": {"model_type": "vit", "image_size": 384}}))
    assert card is not None
    theirs = transformers.ViTImageProcessor()
    assert list(card.preprocess.mean) == list(theirs.image_mean)
    assert {"bilinear": 2, "bicubic": 3}[card.preprocess.interpolation] == theirs.resample
    assert (card.preprocess.crop_pct, card.preprocess.resize) == (1.0, "squash")


@pytest.mark.parametrize(("name", "kind"), [("plain", "Bit"), ("squash", "ViT"), ("squash and crop", "DeiT")])
def test_processors_do_as_told_in_transformers_4_too(name: str, kind: str) -> None:
    """There each class reads its own fields alone: ViT's crops nothing, and DeiT's has no shorter edge."""
    content = configs_from_card(HF[name][1], "hf_vit")["preprocessor_config.json"]
    assert content["image_processor_type"] == f"{kind}ImageProcessor"


SURVIVORS = {"hf_vit": "vit_b16", "hf_deit": "deit_distilled_b16", "hf_vit_mae": "mae_cls_h14"}
SURVIVORS |= {"hf_dinov2": "dinov2_g14_518", "hf_dinov2_with_registers": "dinov2_b14_reg", "hf_dinov3": "dinov3_b16"}
SURVIVORS |= {"hf_clip": "clip_l14", "hf_siglip": "siglip_so400m14_378"}


@pytest.mark.parametrize("kind", SURVIVORS)
def test_every_card_of_the_zoo_survives_transformers(kind: str, tmp_path: Path) -> None:
    """crop_pct may come back as another quotient, if the size before the crop is the same."""
    survivors = []
    for name in tomevit.list_models(weights=True):
        card = tomevit.card(name)
        try:
            files = configs_from_card(card, kind)
        except ValueError:
            continue
        found = card_from_configs(put(tmp_path, files))
        assert found is not None
        edges = edges_before_crop(card.config.img_size, card.preprocess.crop_pct)
        assert edges_before_crop(found.config.img_size, found.preprocess.crop_pct) == edges
        assert_same(replace(found, preprocess=replace(found.preprocess, crop_pct=card.preprocess.crop_pct)), card)
        survivors.append(card.name)
    assert SURVIVORS[kind] in survivors
    assert "deit3_b16" not in survivors
    assert "mae_b16" not in survivors


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_the_edge_before_the_crop_survives(crop: int, margin: int) -> None:
    """crop_pct is a quotient, and its rounding must not cost a pixel."""
    edges = (crop + margin, crop + margin)
    assert edges_before_crop((crop, crop), crop_share((crop, crop), edges)) == edges


@given(st.integers(1, 4096), st.integers(1, 4096))
@example(49, 1)  # 1 / 49 * 49 < 1
def test_the_width_of_the_mlp_survives(dim: int, hidden: int) -> None:
    assert int(dim * mlp_ratio_for(dim, hidden)) == hidden


# ------------------------------------------------------------------------------------------------------ what is refused

SIGLIP = {"class_token": False, "num_classes": 0, "pool": "map"}
CANNOT: list[tuple[str, dict[str, Any], str]] = [
    ("timm", {"norm_eps": 1e-5}, "norm_eps"),
    ("timm", {"dist_token": True, "reg_tokens": 1}, "registers"),
    ("hf_vit", {"pool": "avg"}, "pool"),
    ("hf_vit", {"pool_norm": "after"}, "pool_norm"),
    ("hf_vit", {"reg_tokens": 2}, "reg_tokens"),
    ("hf_vit", {"class_token": False, "pool": "avg"}, "pool"),
    ("hf_vit", {"pos_embed_prefix": False}, "pos_embed_prefix"),
    ("hf_vit", {"layer_scale": 0.1}, "layer_scale"),
    ("hf_vit", {"qk_norm": True}, "qk_norm"),
    ("hf_vit", {"pre_norm": True}, "pre_norm"),
    ("hf_vit", {"dist_token": True}, "dist_token"),
    ("hf_vit", {"img_size": (32, 48)}, "square"),
    ("hf_deit", {}, "dist_token"),
    ("hf_vit_mae", {}, "num_classes"),
    ("hf_siglip", SIGLIP | {"pool_heads": 1}, "pool_heads=1, only pool_heads=None"),
    ("hf_siglip", SIGLIP | {"pool_mlp_ratio": 2.0}, "pool_mlp_ratio"),
    ("hf_siglip_classifier", SIGLIP | {"num_classes": 7}, "pool='map', only pool='avg'"),
]


@pytest.mark.parametrize(("kind", "fields", "said"), CANNOT)
def test_what_a_library_cannot_do_is_not_written(kind: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        configs_from_card(described(**fields), kind)


def test_r_and_proportional_attention_change_nothing_without_merging() -> None:
    card = described()
    merging = replace(card, r=4, config=replace(card.config, prop_attn=False))
    for kind in ("timm", "hf_vit"):
        assert configs_from_card(merging, kind) == configs_from_card(card, kind)


@pytest.mark.parametrize("kind", ["torchvision", "swag", "mae", "vit_jax", "tomevit"])
def test_other_formats_have_none(kind: str) -> None:
    assert configs_from_card(described(), kind) == {}


def test_other_files_are_not_described(tmp_path: Path) -> None:
    assert card_from_configs({}) is None
    assert card_from_configs(put(tmp_path, {"preprocessor_config.json": {"size": 224}})) is None
    assert card_from_configs(put(tmp_path, {"config.json": {"hello": "world"}})) is None


VIT = {"model_type": "vit"}
TIMMS = {"architecture": "vit_tiny_patch16_224"}
MALFORMED: list[tuple[Any, Any, str]] = [
    ("<!doctype html>", {}, "not JSON"),
    ("[" * 200_000, {}, "not JSON"),
    ("[1]", {}, "object"),
    ({"model_type": "bert"}, {}, "vit, deit, vit_mae"),
    ({"model_type": ["vit"]}, {}, "model_type"),
    (VIT | {"hidden_size": 10**9}, {}, "hidden_size"),
    (VIT | {"hidden_size": -768}, {}, "hidden_size"),
    (VIT | {"hidden_size": True}, {}, "hidden_size"),
    (VIT | {"hidden_size": 770}, {}, "num_heads"),
    (VIT | {"num_hidden_layers": 10**6}, {}, "num_hidden_layers"),
    (VIT | {"patch_size": "SHOULD BE RELOADED"}, {}, "patch_size"),
    (VIT | {"patch_size": [16, 8]}, {}, "patch_size"),
    (VIT | {"image_size": 225}, {"size": 225}, "225"),
    (VIT | {"hidden_act": "relu"}, {}, "hidden_act"),
    ('{"model_type": "vit", "layer_norm_eps": NaN}', {}, "layer_norm_eps"),
    (VIT | {"architectures": ["ViTForChess"]}, {}, "ViTForChess"),
    (VIT | {"architectures": "ViTModel"}, {}, "architectures"),
    (VIT | {"id2label": {"0": "a", "2": "b"}}, {}, "number '1'"),
    (VIT, {"size": {"height": 256, "width": 256}}, "256x256"),
    (VIT, {"size": {"longest_edge": 224}}, "size"),
    (VIT, {"size": 200, "crop_size": 224, "do_center_crop": True}, "200x200"),
    (VIT, {"resample": 1}, "resample"),
    (VIT, {"image_mean": [0.5]}, "image_mean"),
    (VIT, {"image_std": [0, 0, 0]}, "image_std"),
    (VIT, {"image_processor_type": "ChessImageProcessor"}, "ChessImageProcessor"),
    (VIT, "nothing", "preprocessor_config"),
    (TIMMS | {"architecture": 3}, {}, "architecture"),
    (TIMMS | {"architecture": "v" * 10**6}, {}, "architecture"),
    (TIMMS | {"pretrained_cfg": "vit"}, {}, "pretrained_cfg"),
    (TIMMS | {"pretrained_cfg": {"crop_mode": "border"}}, {}, "crop_mode"),
    (TIMMS | {"pretrained_cfg": {"crop_pct": 0}}, {}, "crop_pct"),
    (TIMMS | {"pretrained_cfg": {"input_size": [3, 224]}}, {}, "input_size"),
    (TIMMS | {"model_args": {"block_fn": "ParallelThingsBlock"}}, {}, "block_fn"),
    (TIMMS | {"model_args": {"depth": 1e3}}, {}, "depth"),
    (TIMMS | {"model_args": {"global_pool": "map"}}, {}, "global_pool"),
    (TIMMS | {"model_args": {"features_only": True}}, {}, "features_only"),
    (TIMMS | {"model_args": {"out_indices": [1]}}, {}, "out_indices"),
    (TIMMS | {"model_args": {"scale_mlp_norm": True}}, {}, "scale_mlp_norm"),
    (TIMMS | {"model_args": {"proj_bias": False}}, {}, "proj_bias"),
    (TIMMS | {"model_args": {"norm_layer": "rmsnorm"}}, {}, "norm_layer"),
    (TIMMS | {"model_args": {"pretrained_cfg_overlay": {"mean": [0.5]}}}, {}, "pretrained_cfg_overlay"),
    ({"model_type": "siglip2"}, {}, "siglip_vision_model"),
    ({"model_type": "dinov3_vit", "rope_theta": 50.0}, {}, r"rope_theta is 50\.0, and must be 100\.0"),
    (
        {"model_type": "dinov3_vit", "use_gated_mlp": True, "hidden_act": "gelu"},
        {},
        "hidden_act is 'gelu', and must be one of silu",
    ),
    ({"model_type": "dinov2", "mlp_ratio": 0}, {}, "mlp_ratio"),
    ({"model_type": "clip", "vision_config": [1]}, {}, r"vision_config is \[1\], and must be an object"),
    ({"model_type": "clip", "architectures": ["CLIPForImageClassification"]}, {}, "CLIPForImageClassification"),
    ({"model_type": "clip", "projection_dim": -1}, {}, "projection_dim"),
    ({"model_type": "clip_vision_model", "image_size": 224}, {"size": {"shortest_edge": 256}, "crop_size": 256}, "256"),
    (VIT | {"quantization_config": {"load_in_8bit": True}}, {}, "quantization_config"),
    (VIT | {"pruned_heads": {"0": [1]}}, {}, "pruned_heads"),
    (VIT | {"num_channels": 4}, {"image_mean": [0.5, 0.5]}, "image_mean"),
    (TIMMS | {"model_args": {"class_token": False}}, {}, "class token"),
]


SAID = [
    (VIT | {"hidden_size": "x"}, {}, "hidden_size is 'x', and must be an int"),
    (VIT | {"hidden_size": 0}, {}, "hidden_size is 0, and must be from 1 to 65536"),
    (VIT | {"image_size": [224, 2**15]}, {}, "image_size is [224, 32768], and must be from 1 to 16384"),
    (VIT | {"image_size": "large"}, {}, "image_size is 'large', and must be an int"),
    (VIT | {"qkv_bias": 1}, {}, "qkv_bias is 1, and must be True or False"),
    (VIT | {"patch_size": [16, 8]}, {}, "patch_size is [16, 8], and must be the same along height and width"),
    (VIT, {"size": {"longest_edge": 224}}, "size is {'longest_edge': 224}, and must be an int"),
    (VIT, {"image_mean": [0.5]}, "image_mean is [0.5], and must have 3 values"),
    (VIT, {"image_std": [0.5, 0.5, 0]}, "image_std is [0.5, 0.5, 0], and must be from 1e-06 to 65536"),
    (VIT, {"resample": True}, "resample is True, and must be one of 2, 3"),
    (TIMMS | {"pretrained_cfg": {"crop_pct": 1.5}}, {}, "crop_pct is 1.5, and must be a share above 0, up to 1"),
    (TIMMS | {"model_args": {"depth": 1e3}}, {}, "model_args.depth is 1000.0, and must be an int"),
    (
        TIMMS | {"model_args": {"no_embed_class": 1}},
        {},
        "model_args.no_embed_class is 1, and must be one of False, True",
    ),
    (TIMMS | {"model_args": {"mlp": 3}}, {}, "model_args.mlp is 3, and must be left out: tomevit has nothing like it"),
    (TIMMS | {"pretrained_cfg": {"input_size": [3, 224]}}, {}, "pretrained_cfg.input_size is [3, 224]"),
    (TIMMS | {"pretrained_cfg": {"input_size": [0, 224, 224]}}, {}, "in_chans is 0, and must be from 1 to 4096"),
]


@pytest.mark.parametrize(("config", "processor", "said"), SAID)
def test_messages_say_file_field_value_and_what_it_must_be(
    config: Any, processor: Any, said: str, tmp_path: Path
) -> None:
    files = put(tmp_path, {"config.json": config, "preprocessor_config.json": processor})
    with pytest.raises(CheckpointError, match=re.escape(said)) as error:
        card_from_configs(files)
    assert str(error.value).startswith(str(files["preprocessor_config.json" if processor else "config.json"]) + ": ")


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nb", "\u202e"], ids=ascii)
@pytest.mark.parametrize("name", ["architecture", "model_args"])
def test_no_text_of_a_file_steers_the_terminal(name: str, text: str, tmp_path: Path) -> None:
    config = TIMMS | {name: {text: 1} if name == "model_args" else text}
    with pytest.raises(CheckpointError) as error:
        card_from_configs(put(tmp_path, {"config.json": config}))
    assert str(error.value).isprintable()


@pytest.mark.parametrize(("config", "processor", "said"), MALFORMED)
def test_malformed_files_are_refused_in_one_sentence(config: Any, processor: Any, said: str, tmp_path: Path) -> None:
    files = put(tmp_path, {"config.json": config, "preprocessor_config.json": processor})
    with pytest.raises(CheckpointError, match=said) as error:
        card_from_configs(files)
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value)) < 600 + len(str(tmp_path))


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(CheckpointError, match=str(MOST_BYTES + 1)):
        card_from_configs({"config.json": path})


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SOUND = [
    {"files": configs_from_card(card, kind)}
    for kind, card in [("timm", TIMM["average"]), ("hf_vit", HF["plain"][1]), ("hf_deit", HF["distilled"][1])]
]


@given(data=st.data())
def test_only_our_own_error_comes_out(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    files = json.loads(json.dumps(data.draw(st.sampled_from(SOUND))["files"]))
    content = data.draw(st.sampled_from(list(files.values())))
    for name in ("pretrained_cfg", "model_args", "id2label", "size"):
        if isinstance(content.get(name), dict) and data.draw(st.booleans()):
            content = content[name]
            break
    content[data.draw(st.sampled_from([*content, "num_labels", "labels"]))] = data.draw(ANYTHING)
    paths = put(tmp_path_factory.mktemp("fuzz"), files)
    try:
        card = card_from_configs(paths)
    except CheckpointError:
        return
    if card is not None:
        build_meta(card.config)
        assert all(map(math.isfinite, (*card.preprocess.mean, *card.preprocess.std)))
        Transform(card.preprocess, card.config.img_size)


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [vision]\n---\n# A model\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: fair-noncommercial\n---\n", "fair-noncommercial"),
        ("---\nlicense_name: fair-noncommercial\nlicense: other\n---\n", "fair-noncommercial"),
        ("---\r\nlicense: mit\r\n---\r\n# A model\r\n", "mit"),
        ("\ufeff--- \nlicense:   mit  \n--- \n", "mit"),
        ("---\nlicense: 'mit'\n---\n", "mit"),
        ('---\nlicense: "mit" # as upstream\n---\n', "mit"),
        ("---\nlicense: mit  # as upstream\n---\n", "mit"),
        ("---\n# license: gpl\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: mit\n  # as upstream\n---\n", "mit"),
        ("---\nlicense_name: 'Ours: # 3.1'\n---\n", "Ours: # 3.1"),
        ("---\nlicense_name: Their Community License 3.1\n---\n", "Their Community License 3.1"),
        ("---\nlicense: 0bsd\n---\n", "0bsd"),
        ("---\nlicense_name: https://example.com/licence\n---\n", "https://example.com/licence"),
        ("---\nlicense: gpl\nlicense: mit\n---\n", "mit"),
        ("---\nnote: |\n  license: gpl\n---\n", None),
        ("---\nlicense_link: mit\n---\n", None),
        ("---\nlicense:\n- mit\n---\n", None),
        ("---\nlicense:\n  - mit\n---\n", None),
        ("---\nlicense: # none yet\n---\n", None),
        ("---\nlicense: null\n---\n", None),
        ("---\nlicense: no # licence\n---\n", None),
        ("---\nlicense: 2.0\n---\n", None),
        ("---\nlicense: {mit: yes}\n---\n", None),
        ("---\nlicense: >-\n  mit\n---\n", None),
        ("---\nlicense: mit: x\n---\n", None),
        ("---\nlicense_name: fair\n  noncommercial\nlicense: other\n---\n", "other"),
        ("---\r\nlicense: mit\r\n\r\ntags: x\r\n---\r\n", "mit"),
        ('---\nlicense: "mit\n---\n', None),
        ('---\nlicense: "a\\nb"\n---\n', None),
        ("---\nlicense: mit\x1b[2J\n---\n", None),
        (f"---\nlicense: {'a' * 300}\n---\n", None),
        ("---\na: &a [x, x]\nlicense: *a\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("---\n---\nlicense: mit\n---\n", None),
        ("\n---\nlicense: mit\n---\n", None),
        ("---\ntags: [vision]\n---\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\n: : {[\n---\n", None),
        ("---\njust text\n---\n", None),
        ("# A model under a licence\n", None),
        ("", None),
    ],
)
def test_the_licence_is_in_the_readme(tmp_path: Path, readme: str, licence: str | None) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "README.md").write_text(readme, encoding="utf-8", newline="")
    card = card_from_configs({name: tmp_path / name for name in ("config.json", "README.md")})
    assert card is not None
    assert card.licence == licence


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    "readme",
    [
        f"---\n{BOMB}license: mit\n---\n",
        f"---\n{'x: ' + 'a' * 2**20}\nlicense: mit\n---\n{'z' * MOST_BYTES}",
        f"---\nlicense: mit{' ' * 100}\n---\n",
    ],
    ids=["aliases", "huge", "blanks"],
)
def test_no_readme_takes_long(tmp_path: Path, readme: str) -> None:
    """Aliases that stand for 9^40 values are not followed, and of a huge file the beginning is read."""
    (tmp_path / "README.md").write_text(readme)
    assert licence_of(tmp_path) == "mit"


@pytest.mark.parametrize(
    "piece", ["\n", "---\n", "license: ", " ", "license: a", "#", "license: :", "\r", "---"], ids=repr
)
def test_no_readme_of_one_piece_over_and_over_takes_long(tmp_path: Path, piece: str) -> None:
    for end in ("", "\n---\n"):
        (tmp_path / "README.md").write_text(f"---\nlicense: {piece * 2**18}{end}", newline="")
        before = time.process_time()
        assert licence_of(tmp_path) is None
        assert time.process_time() - before < 5


def licence_of(directory: Path) -> str | None:
    card = card_from_configs(
        put(directory, {"config.json": {"model_type": "vit"}}) | {"README.md": directory / "README.md"}
    )
    assert card is not None
    return card.licence
