"""Recipes: their values are those of their sources, and fit the models."""

from __future__ import annotations

import tomllib
from dataclasses import fields, replace

import pytest
import torch

import tomevit
from tomevit import zoo
from tomevit.models import build_meta
from tomevit.training.recipes import Recipe, list_recipes, recipe
from tomevit.zoo import configs

# FINETUNE.md and main_finetune.py of facebookresearch/mae@efb2a80; main.py, samplers.py and README_deit.md of
# facebookresearch/deit@7e160fe; README.md of facebookresearch/ToMe@af95e4b.
SHARED = {
    "optimizer": "adamw", "betas": (0.9, 0.999), "batch": 1024, "weight_decay": 0.05, "clip": 0.0, "warmup_epochs": 5,
    "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "erasing": 0.25, "randaugment": (2, 27), "crop_pct": 0.875,
    "loss": "cross-entropy", "distillation": "none",
}  # fmt: skip
MAE = SHARED | {"lr_batch": 256, "warmup_lr": 0.0, "min_lr": 1e-6, "repeats": 1, "ema": 0.0}
DEIT = SHARED | {
    "lr": 5e-4, "lr_batch": 512, "warmup_lr": 1e-6, "min_lr": 1e-5, "layer_decay": 1.0, "drop_path": 0.1,
    "epochs": 300, "repeats": 3, "ema": 0.99996, "start": None, "prop_attn": True,
}  # fmt: skip
MAE_SIZES = {
    "b16": {"lr": 5e-4, "layer_decay": 0.65, "drop_path": 0.1, "epochs": 100, "start": "mae_cls_b16.pretrain"},
    "l16": {"lr": 1e-3, "layer_decay": 0.75, "drop_path": 0.2, "epochs": 50, "start": "mae_cls_l16.pretrain"},
    "h14": {"lr": 1e-3, "layer_decay": 0.75, "drop_path": 0.3, "epochs": 50, "start": "mae_cls_h14.pretrain"},
}
PUBLISHED = {
    "deit_ti16.fb_in1k": DEIT | {"r": 0},
    "deit_ti16.tome_r13": DEIT | {"r": 13},
    "deit_s16.fb_in1k": DEIT | {"r": 0},
    "deit_s16.tome_r13": DEIT | {"r": 13},
    "mae_b16.ft_in1k": MAE | MAE_SIZES["b16"] | {"r": 0, "prop_attn": False},
    "mae_b16.tome_r16": MAE | MAE_SIZES["b16"] | {"r": 16, "prop_attn": True},
    "mae_l16.ft_in1k": MAE | MAE_SIZES["l16"] | {"r": 0, "prop_attn": False},
    "mae_l16.tome_r8": MAE | MAE_SIZES["l16"] | {"r": 8, "prop_attn": True},
    "mae_h14.ft_in1k": MAE | MAE_SIZES["h14"] | {"r": 0, "prop_attn": False},
    "mae_h14.tome_r7": MAE | MAE_SIZES["h14"] | {"r": 7, "prop_attn": True},
}
SAID = {"name", "title", "notes", "sources"}  # the fields that are no values of a training


def test_every_recipe_is_in_the_table():
    assert list_recipes() == list(PUBLISHED)
    assert list_recipes("deit*") == [name for name in PUBLISHED if name.startswith("deit")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_are_the_published_ones(name):
    found = recipe(name)
    assert {f.name: getattr(found, f.name) for f in fields(Recipe) if f.name not in SAID} == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_value_has_a_source(name):
    found = recipe(name)
    assert set(found.sources) == {f.name for f in fields(Recipe)} - SAID
    assert all(source.startswith("facebookresearch/") for source in found.sources.values())
    merged = "ToMe" if found.r else "deit" if "deit" in name else "mae"
    assert found.sources["r"].startswith(f"facebookresearch/{merged}@")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_makes_the_weights_it_is_named_for(name):
    found, card = recipe(name), tomevit.card(name)
    assert (found.r, found.prop_attn) == (card.r, card.config.prop_attn)
    assert found.name == card.full_name
    if found.model.startswith("mae") or found.r:  # DeiT's own weights have timm's crop on their card, which is larger
        assert found.crop_pct == card.preprocess.crop_pct
    if found.start:
        start = tomevit.card(found.start)
        assert start.full_name == found.start
        assert (start.config.embed_dim, start.config.depth) == (card.config.embed_dim, card.config.depth)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_and_its_groups_can_be_built(name):
    found = recipe(name)
    config = replace(zoo.card(found.model).config, drop_path=found.drop_path, prop_attn=found.prop_attn)
    model = build_meta(config, found.r)
    assert sum(model.schedule()) <= config.num_patches
    groups = tomevit.param_groups(model, found.lr, found.weight_decay, found.layer_decay)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert groups[0]["lr"] == pytest.approx(found.lr * found.layer_decay ** (config.depth + 1))
    assert groups[-1]["lr"] == found.lr
    assert {group["weight_decay"] for group in groups} == {0.0, found.weight_decay}
    torch.optim.AdamW(groups, betas=found.betas)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mae_b16.tome_r13", "did you mean mae_b16.tome_r16"),
        ("deit_s16", "did you mean deit_s16"),
        ("?", "there are deit_ti16.fb_in1k, .* or mae_h14.tome_r7"),
    ],
)
def test_an_unknown_name_is_answered_with_near_ones(name, said):
    with pytest.raises(ValueError, match=f"there is no recipe '{'[?]' if name == '?' else name}'; {said}"):
        recipe(name)


def test_no_file_says_a_value_twice():
    for file in (configs() / "recipes").iterdir():
        data = tomllib.loads(file.read_text(encoding="utf-8"))
        entries = data.pop("recipes")
        shared = [field for group in data.values() if isinstance(group, dict) for field in group if field != "source"]
        assert len(shared) == len(set(shared))
        for entry in entries.values():
            own = [field for group in entry.values() if isinstance(group, dict) for field in group if field != "source"]
            assert not set(own) & set(shared)
            assert len(own) == len(set(own))
