"""Fresh weights: each family's have the distribution that its own code gives them."""

from __future__ import annotations

import pytest
import torch

import tomevit
from tomevit.config import CHOICES, Config
from tomevit.models import build
from tomevit.models.init import INITS, sincos_positions

D = 128
CONFIG = Config(img_size=(64, 64), patch_size=16, embed_dim=D, depth=2, num_heads=2, num_classes=50, layer_scale=0.1)

D_PATCH = 3 * 16 * 16


def uniform(bound: float) -> tuple[str, float]:
    return "uniform", bound / 3**0.5


def xavier(fan_in: int, fan_out: int) -> tuple[str, float]:
    return uniform((6 / (fan_in + fan_out)) ** 0.5)


def normal(std: float) -> tuple[str, float]:
    return "normal", std


#: By name, the kind of distribution and its standard deviation; None: all 0.
EXPECTED = {
    "vit": {
        "cls_token": None, "pos_embed": normal(0.02), "patch_embed.proj.weight": ("truncated", D_PATCH**-0.5),
        "blocks.1.attn.qkv.weight": xavier(D, D), "blocks.1.attn.proj.weight": xavier(D, D),
        "blocks.1.mlp.fc1.weight": xavier(D, 4 * D), "blocks.1.mlp.fc1.bias": normal(1e-6), "head.weight": None,
        "head.bias": None,
    },
    "deit": {
        "cls_token": normal(0.02), "pos_embed": normal(0.02), "patch_embed.proj.weight": uniform(D_PATCH**-0.5),
        "blocks.1.attn.qkv.weight": normal(0.02), "blocks.1.attn.proj.weight": normal(0.02),
        "blocks.1.mlp.fc1.weight": normal(0.02), "blocks.1.mlp.fc1.bias": None, "head.weight": normal(0.02),
        "head.bias": None,
    },
    "mae": {
        "cls_token": normal(0.02), "patch_embed.proj.weight": xavier(D_PATCH, D),
        "blocks.1.attn.qkv.weight": xavier(D, 3 * D), "blocks.1.attn.proj.weight": xavier(D, D),
        "blocks.1.mlp.fc1.weight": xavier(D, 4 * D), "blocks.1.mlp.fc1.bias": None, "head.weight": normal(2e-5),
        "head.bias": None,
    },
    "swag": {
        "cls_token": None, "pos_embed": normal(0.02), "patch_embed.proj.weight": normal(D_PATCH**-0.5),
        "blocks.1.attn.qkv.weight": xavier(D, 3 * D), "blocks.1.attn.proj.weight": uniform(D**-0.5),
        "blocks.1.mlp.fc1.weight": xavier(D, 4 * D), "blocks.1.mlp.fc1.bias": normal(1e-6), "head.weight": None,
        "head.bias": None,
    },
}  # fmt: skip
#: Where the largest of a hundred values and more lies, in standard deviations.
LARGEST = {"uniform": (1.6, 3**0.5), "truncated": (2.1, 2 / 0.8796), "normal": (2.0, 6.0)}


@pytest.mark.parametrize("init", CHOICES["init"])
def test_distributions(init: str) -> None:
    model = build(Config(**vars(CONFIG) | {"init": init, "reg_tokens": 2}))
    parameters = dict(model.named_parameters())
    for name, drawn in EXPECTED[init].items():
        tensor = parameters[name].detach()
        if drawn is None:
            assert not tensor.any(), name
            continue
        kind, std = drawn
        assert tensor.std().item() == pytest.approx(std, rel=4 * (2 * tensor.numel()) ** -0.5), name
        assert tensor.mean().abs() < 4 * std / tensor.numel() ** 0.5, name
        least, most = LARGEST[kind]
        assert least * std < tensor.abs().max() <= most * std * 1.001, name
        if kind == "normal" and tensor.numel() > 1000:
            assert tensor.abs().max() > 2.5 * std, name
    assert not torch.equal(parameters["reg_token"][:, 0], parameters["reg_token"][:, 1])
    for name, tensor in parameters.items():
        if "norm" in name or name.endswith("gamma"):
            value = 0.0 if name.endswith("bias") else 0.1 if name.endswith("gamma") else 1.0
            assert torch.equal(tensor, torch.full_like(tensor, value)), name


def test_tables_are_the_configs_choices() -> None:
    assert set(INITS) == set(EXPECTED) == set(CHOICES["init"])
    with pytest.raises(ValueError, match="init is 'xavier', and must be one of vit, deit, mae, swag"):
        Config(init="xavier")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "init"),
    [("vit_ti16", "vit"), ("deit_s16", "deit"), ("deit3_s16", "deit"), ("deit_distilled_ti16", "deit"),
     ("mae_b16", "mae"), ("mae_cls_b16", "mae"), ("swag_b16", "swag")],
)  # fmt: skip
def test_every_family_has_its_own(name: str, init: str) -> None:
    assert tomevit.card(name).config.init == init


def test_positions_of_a_grid_that_is_no_square() -> None:
    positions = sincos_positions((2, 3), 7, 8)[0]
    assert not positions[0].any()
    grid = positions[1:].view(2, 3, 8)
    column, row = grid[..., :4], grid[..., 4:]
    assert torch.equal(column[0], column[1])
    assert torch.equal(row[:, 0], row[:, 2])
    x = torch.arange(3.0)[:, None]
    frequency = torch.tensor([1.0, 0.01])
    torch.testing.assert_close(column[0], torch.cat([(x * frequency).sin(), (x * frequency).cos()], 1))
