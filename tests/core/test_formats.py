"""Every format's table: full key lists in, and back out to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import foreign
from tomevit.config import Config
from tomevit.errors import AmbiguousCheckpointError, CheckpointError
from tomevit.models import build_meta
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
    assert back.keys() == kept.keys()
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
    if any(name in pair for pair in twins) or (name == "timm" and keys is foreign.mae_finetuned):
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
    if not omitted:
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
    with pytest.raises(ValueError, match="there is no format 'mea'; there are timm, deit"):
        find_format(names, told="mea")


@pytest.mark.parametrize(
    ("form", "fields", "message"),
    [
        ("torchvision", {"act": "quick_gelu"}, "its act is 'quick_gelu', and models of that format have 'gelu'"),
        ("swag", {"pool": "avg"}, "its pool is 'avg'"),
        ("hf_vit", {"reg_tokens": 2}, "it has no place for reg_token"),
        ("mae", {"layer_scale": 1e-5}, r"no place for blocks\.0\.ls1\.gamma, blocks\.0\.ls2\.gamma"),
        ("deit3", {"layer_scale": 1e-5}, "its pos_embed_prefix is True"),
        ("vit_jax", {"dist_token": True}, r"no place for dist_token, head_dist\.bias, head_dist\.weight"),
    ],
)
def test_what_a_format_cannot_hold(form: str, fields: dict[str, Any], message: str) -> None:
    config = Config(depth=1, **foreign.SMALL | fields)
    with pytest.raises(ValueError, match=f"{form} cannot hold this model: .*{message}"):
        rules.from_native(FORMATS[form], build_meta(config).state_dict(), config)
