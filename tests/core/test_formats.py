"""Every format's table: full key lists in, and back out to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import foreign
from tests.helpers import images_for, randomise
from tomevit import convert, load
from tomevit.cards import Card
from tomevit.config import Config
from tomevit.errors import AmbiguousCheckpointError, CheckpointError, MissingOptionError
from tomevit.models import build, build_meta
from tomevit.weights import rules
from tomevit.weights.formats import FORMATS
from tomevit.weights.recognise import adopt_inferred, differences, find_format, infer_architecture

CASES = foreign.cases()
IDS = [f"{name}-{keys.__name__}-{config.depth}" for name, keys, config, *_ in CASES]


def test_every_format_is_tested() -> None:
    assert set(foreign.FORMATS) == set(FORMATS)


@pytest.mark.parametrize(("name", "keys", "config", "sizes", "omitted"), CASES, ids=IDS)
def test_round_trip(name: str, keys: Any, config: Config, sizes: foreign.Sizes, omitted: tuple[str, ...]) -> None:
    source = foreign.fill(keys(sizes))
    read = rules.to_native(FORMATS[name], dict(source))
    tensors = read.tensors
    if "pre_logits" in "".join(omitted):  # the head goes with the layer that it stands on
        tensors = {native: tensor for native, tensor in tensors.items() if not native.startswith("head.")}
    expected = {native: tuple(tensor.shape) for native, tensor in build_meta(config).state_dict().items()}
    assert {native: tuple(tensor.shape) for native, tensor in tensors.items()} == expected

    back = rules.from_native(FORMATS[name], tensors, config)
    kept = {key: tensor for key, tensor in source.items() if not key.startswith(omitted or ("-",))}
    added = back.keys() - kept.keys()  # what the project's code insists on, and the model does without
    insisted = ("mask_token", *(("periods", "bias_mask") if name == "dinov3" else ()))
    assert added == {key for key in source if key.endswith(insisted) and FORMATS[name].always}
    assert all(back[key].shape == source[key].shape for key in added)
    assert not any(back[key].any() for key in added if not key.endswith("periods"))
    assert back.keys() == kept.keys() | added
    for key, tensor in kept.items():
        assert torch.equal(back[key], tensor), key
        assert back[key].is_contiguous()


@pytest.mark.parametrize(("name", "keys", "config", "sizes", "omitted"), CASES, ids=IDS)
def test_recognised(name: str, keys: Any, config: Config, sizes: foreign.Sizes, omitted: tuple[str, ...]) -> None:
    names = keys(sizes)
    form = FORMATS[name]
    assert find_format(names, told=name) is form
    if form.variant_of:
        assert find_format(names, told=form.variant_of) in (form, FORMATS[form.variant_of])
    key = "model" if form.container == "torch:model" else ""
    twins = {"hf_vit_model", "hf_vit_mae_model"}, {"hf_vit_model_v5", "hf_vit_mae_model_v5"}
    # A classifier on CLIP has the names of a projection.
    alike = keys in (foreign.mae_finetuned, foreign.timm_clip_finetuned) and name == "timm"
    if any(name in pair for pair in twins) or alike or name in ("timm_clip", "timm_eva_clip"):
        with pytest.raises(AmbiguousCheckpointError) as caught:
            find_format(names, key)
        assert caught.value.option == "format"
        assert name in caught.value.choices
        assert len(caught.value.choices) == 2
    else:
        assert find_format(names, key) is form


@pytest.mark.parametrize(("name", "keys", "config", "sizes", "omitted"), CASES, ids=IDS)
def test_observed(name: str, keys: Any, config: Config, sizes: foreign.Sizes, omitted: tuple[str, ...]) -> None:
    tensors = rules.to_native(FORMATS[name], foreign.fill(keys(sizes))).tensors
    observed = infer_architecture(tensors)
    assert differences(observed, config) == []
    other = Config(**{**foreign.SMALL, "embed_dim": 48, "depth": 7, "num_heads": 3})
    assert differences(observed, other)[:2] == [
        "embed_dim 24 where the model has 48",
        f"depth {config.depth} where the model has 7",
    ]
    if not omitted and config.pos_embed == "learned":  # without positions, weights are of no image size
        assert adopt_inferred(Config(**{**vars(config), "img_size": (64, 64), "num_classes": 9}), observed) == config


def test_what_a_table_does_not_know_is_named() -> None:
    config = Config(depth=2, **foreign.SMALL)
    source = foreign.fill(foreign.deit(foreign.sizes(config)))
    source["blocks.0.attn.relative_position_bias_table"] = torch.zeros(3)
    with pytest.raises(
        CheckpointError, match=r"timm, which has no place for blocks\.0\.attn\.relative_position_bias_t"
    ):
        rules.to_native(FORMATS["timm"], source)


def test_a_part_without_the_others_is_named() -> None:
    config = Config(depth=2, **foreign.SMALL)
    source = foreign.fill(foreign.hf_vit(foreign.sizes(config)))
    del source["vit.encoder.layer.1.attention.attention.key.weight"]
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.qkv\.weight is made of 3 tensors, of which there are"):
        rules.to_native(FORMATS["hf_vit"], source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": torch.zeros(24, 23)}, r"key\.weight \(24, 23\)"),
        ({"key": torch.zeros(25, 24), "query": torch.zeros(23, 24)}, r"key\.weight \(25, 24\)"),  # 72 rows in all
        ({"key": torch.zeros(24, 24).half()}, r"key\.weight \(24, 24\) torch\.float16"),
        (dict.fromkeys(("query", "key", "value"), torch.tensor(1.0)), r"key\.weight \(\)"),
    ],
)
def test_parts_that_do_not_match_are_named(changes: dict[str, torch.Tensor], message: str) -> None:
    config = Config(depth=2, **foreign.SMALL)
    source = foreign.fill(foreign.hf_vit(foreign.sizes(config)))
    source |= {f"vit.encoder.layer.1.attention.attention.{name}.weight": part for name, part in changes.items()}
    with pytest.raises(CheckpointError, match=f"do not match: .*{message}"):
        rules.to_native(FORMATS["hf_vit"], source)


def test_another_layout_is_named() -> None:
    config = Config(depth=2, **foreign.SMALL)
    source = foreign.fill(foreign.vit_jax(foreign.sizes(config)))
    source["embedding/kernel"] = torch.zeros(8, 8, 24)
    with pytest.raises(CheckpointError, match=r"embedding/kernel is \(8, 8, 24\), and vit_jax lays it out as h w i o"):
        rules.to_native(FORMATS["vit_jax"], source)


def test_nothing_known() -> None:
    with pytest.raises(
        CheckpointError, match=r"of no known format: it holds 2 tensors such as conv1\.weight, fc\.weight"
    ):
        find_format(["conv1.weight", "fc.weight"])


def test_another_format_than_told() -> None:
    names = foreign.swag(foreign.sizes(Config(depth=2, **foreign.SMALL)))
    with pytest.raises(CheckpointError, match=r"not of the format mae: it has no patch_embed.*; it looks like swag"):
        find_format(names, told="mae")
    with pytest.raises(
        ValueError, match="there is no format 'mea'; there are timm, timm_clip, timm_eva, timm_eva_clip, deit"
    ):
        find_format(names, told="mea")


@pytest.mark.parametrize(
    ("form", "fields", "message"),
    [
        ("torchvision", {"act": "quick_gelu"}, "its act is 'quick_gelu', and models of that format have 'gelu'"),
        ("swag", {"pool": "avg"}, "its pool is 'avg'"),
        ("hf_vit", {"reg_tokens": 2}, "it has no place for reg_token"),
        ("mae", {"layer_scale": 1e-5}, r"no place for blocks\.0\.ls1\.gamma, blocks\.0\.ls2\.gamma"),
        ("deit3", {"layer_scale": 1e-5}, "its pos_embed_prefix is True"),
        (
            "dinov2",
            {"layer_scale": 1.0, "pos_embed_prefix": False},
            "its num_positions_prefix is 0, and models of that",
        ),
        ("dinov2_reg", {"layer_scale": 1.0, "reg_tokens": 4}, "its num_positions_prefix is 5, and models of that"),
        ("hf_dinov2", {"layer_scale": 1.0, "pos_embed_prefix": "class", "reg_tokens": 4}, "no place for reg_token"),
        ("vit_jax", {"dist_token": True}, r"no place for dist_token, head_dist\.bias, head_dist\.weight"),
    ],
)
def test_what_a_format_cannot_hold(form: str, fields: dict[str, Any], message: str) -> None:
    config = Config(depth=1, **foreign.SMALL | fields)
    with pytest.raises(ValueError, match=f"{form} cannot hold this model: .*{message}"):
        rules.from_native(FORMATS[form], build_meta(config).state_dict(), config)


def test_the_original_dinov3_finds_all_that_it_insists_on() -> None:
    """facebookresearch/dinov3@6876159, whose load_state_dict is strict: hub/backbones.py, and the modules' buffers."""
    config = Config(depth=2, **foreign.DINOV3 | {"embed_dim": 48, "num_heads": 3})
    written = rules.from_native(FORMATS["dinov3"], build(config).state_dict(), config)
    expected = foreign.dinov3(foreign.sizes(config))
    assert written.keys() == {name for name in expected if not name.startswith(("local_cls_norm.", "head."))}
    assert all(tuple(tensor.shape) == expected[name] for name, tensor in written.items())
    torch.testing.assert_close(written["rope_embed.periods"], torch.tensor([1.0, 100**0.25, 10.0, 100**0.75]))
    assert not written["blocks.1.attn.qkv.bias_mask"].any()
    # 7B has a norm for local crops, and no bias at all.
    config = Config(depth=1, **foreign.DINOV3 | {"embed_dim": 4096, "num_heads": 32, "mlp": "swiglu", "mlp_ratio": 2.0})
    written = rules.from_native(FORMATS["dinov3"], build_meta(config).state_dict(), config)
    assert {"local_cls_norm.weight", "local_cls_norm.bias", "rope_embed.periods"} <= written.keys()
    assert not any("qkv.bias" in name for name in written)


@pytest.mark.parametrize("form", ["eva02", "eva02_small", "timm_eva"])
def test_keys_with_a_bias_cannot_be_written_as_eva(form: str) -> None:
    fields = foreign.EVA02 if form == "eva02_small" else foreign.EVA02_LARGE
    config = Config(depth=1, **fields)
    tensors = build(config).state_dict()
    assert rules.from_native(FORMATS[form], tensors, config)
    tensors["blocks.0.attn.qkv.bias"][config.embed_dim : 2 * config.embed_dim] = 1.0
    with pytest.raises(
        ValueError, match=r"its blocks\.0\.attn\.qkv\.bias has values where models of that format have none"
    ):
        rules.from_native(FORMATS[form], tensors, config)


def test_the_class_tokens_position_is_added_to_it_for_timm() -> None:
    """As timm's own converter does it with DINOv2's registers: the same sum that the model begins with."""
    config = Config(depth=2, **foreign.DINOV2 | foreign.REGISTERS)
    model = build(config)
    randomise(model)
    written = rules.from_native(FORMATS["timm"], model.state_dict(), config)
    assert torch.equal(written["cls_token"], model.cls_token + model.pos_embed[:, :1])
    assert torch.equal(written["pos_embed"], model.pos_embed[:, 1:])
    read = rules.to_native(FORMATS["timm"], dict(written)).tensors
    found = adopt_inferred(config, infer_architecture(read))
    assert found == replace(config, pos_embed_prefix=False)
    again = build(found)
    again.load_state_dict(read)
    images = images_for(model)
    assert torch.equal(again.eval()(images), model.eval()(images))
    assert torch.equal(again(images, r=3), model(images, r=3))


def test_layers_in_one_tensor_are_taken_apart(tmp_path: Path) -> None:
    """As big_vision writes them when it scans over blocks; of two towers, the one for images is read."""
    config = Config(depth=3, **foreign.SIGLIP)
    plain = foreign.fill(foreign.big_vision_siglip(foreign.sizes(config)))
    block = "Transformer/encoderblock_"
    scanned = {name: tensor for name, tensor in plain.items() if not name.startswith(block)}
    for name in [name for name in plain if name.startswith(f"{block}0/")]:
        layers = [plain[name.replace("_0/", f"_{i}/", 1)] for i in range(3)]
        scanned[name.replace("_0/", "/", 1)] = torch.stack(layers)
    beside = {"params/txt/Embed_0/embedding": torch.ones(50, 16), "params/txt/Encoder_0/encoderblock/x": torch.ones(3)}
    beside |= {"params/t": torch.ones(1), "params/b": torch.ones(1)}
    card = Card(name="toy", config=config)
    expected = tmp_path / "plain.safetensors"
    convert(foreign.write(tmp_path / "plain.npz", plain), expected, model=card)
    found = tmp_path / "scanned.safetensors"
    towers = {f"params/img/{name}": tensor for name, tensor in scanned.items()} | beside
    report = convert(foreign.write(tmp_path / "scanned.npz", towers), found, model=card)
    ours, theirs = load_file(found), load_file(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert report.left_out.keys() == {"params/txt", "params/t", "params/b"}
    mlp = "Transformer/encoderblock/MlpBlock_0/Dense_0/kernel"
    assert report.names["blocks.2.mlp.fc1.weight"] == (mlp,)


HUBS = {
    "plain": (foreign.dinov2, foreign.DINOV2),
    "registers": (foreign.dinov2_reg, foreign.DINOV2 | foreign.REGISTERS),
    "giant": (foreign.dinov2_giant, foreign.GIANT),
    "giant with registers": (
        lambda s: foreign.dinov2_giant(s) | {"register_tokens": (1, 4, s.dim)},
        foreign.GIANT | foreign.REGISTERS,
    ),
    "of DINOv3": (foreign.dinov3, foreign.DINOV3),
}


def classifier_of_the_hub(name: str, layers: int) -> tuple[dict[str, torch.Tensor], Card]:
    """facebookresearch/dinov2@16ac75c, dinov2/hub/classifiers.py, and facebookresearch/dinov3's: backbone and head."""
    keys, fields = HUBS[name]
    config = Config(depth=2, **fields)
    head = foreign.linear("linear_head", 7, (1 + layers) * config.embed_dim)
    backbone = {f"backbone.{key}": shape for key, shape in keys(foreign.sizes(config)).items()}
    return foreign.fill(backbone | head), Card(name="toy", config=config)


@pytest.mark.parametrize("name", HUBS)
def test_classifiers_of_torch_hub_are_read_with_their_head(name: str, tmp_path: Path) -> None:
    state, card = classifier_of_the_hub(name, layers=1)
    torch.save(state, tmp_path / "lc.pth")
    report = convert(tmp_path / "lc.pth", tmp_path / "out.safetensors", model=card)
    model = load(tmp_path / "out.safetensors")
    assert (model.config.pool, model.config.num_classes) == ("token_avg", 7)
    assert torch.equal(model.head.weight, state["linear_head.weight"])
    assert torch.equal(model.head.bias, state["linear_head.bias"])
    assert report.names["head.weight"] == ("linear_head.weight",)
    assert not any("linear_head" in left_out for left_out in report.left_out)
    images = images_for(model)
    tokens = model.forward_features(images).x
    patches = tokens[:, model.config.num_prefix :]
    expected = torch.cat([tokens[:, 0], patches.mean(1)], 1) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(images), expected)


def test_a_head_over_four_blocks_is_not_lost(tmp_path: Path) -> None:
    state, card = classifier_of_the_hub("plain", layers=4)
    torch.save(state, tmp_path / "lc.pth")
    with pytest.raises(MissingOptionError, match=r"its head, linear_head, reads the class tokens of the last four"):
        convert(tmp_path / "lc.pth", tmp_path / "out.safetensors", model=card)
    convert(tmp_path / "lc.pth", tmp_path / "out.safetensors", model=card, num_classes=0)
    assert load(tmp_path / "out.safetensors").config.num_classes == 0


@pytest.mark.parametrize(
    ("width", "said"),
    [
        (2 * 384, r"reads: the zoo's dinov2_s14\.linear_in1k or dinov2_s14_reg\.linear_in1k has both; of your own"),
        (5 * 1536, r"reads: the zoo's dinov2_g14\.linear_in1k or dinov2_g14_reg\.linear_in1k has both; of your own"),
        (2 * 4096, "reads; of your own"),
    ],
)
def test_a_head_alone_says_what_has_both(width: int, said: str, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1000, width), "bias": torch.zeros(1000)}, tmp_path / "head.pth")
    with pytest.raises(CheckpointError, match=f"one linear layer, from {width} channels to 1000, without .* {said}"):
        convert(tmp_path / "head.pth", tmp_path / "out.safetensors")


@pytest.mark.parametrize(("value", "found"), [(0.0, "dinov3_s16"), (0.1, "eupe_s16")])
def test_biases_of_0_are_those_that_dinov3_does_without(value: float, found: str, tmp_path: Path) -> None:
    """timm's `qkvb` models of both have the same names and shapes, and another licence."""
    config = Config(depth=12, **foreign.DINOV3 | {"embed_dim": 384, "num_heads": 6, "patch_size": 16})
    state = {name: torch.zeros(shape) for name, shape in foreign.timm_eupe(foreign.sizes(config)).items()}
    state["blocks.5.attn.v_bias"] += value
    torch.save(state, tmp_path / "qkvb.pth")
    report = convert(tmp_path / "qkvb.pth", tmp_path / "out.safetensors")
    assert report.model == found
    assert load(tmp_path / "out.safetensors").config.qkv_bias == (value != 0)
    biases = {name for name in state if name.endswith(("q_bias", "v_bias"))}
    assert report.left_out.keys() == (set() if value else biases)
