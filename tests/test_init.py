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

#: Standard deviations by name, of what is drawn; 0 for what is all zeros. A uniform one up to b has b / √3.
PATCH, XAVIER, XAVIER_MLP = 1 / (3 * 16 * 16) ** 0.5, (2 / (D + D)) ** 0.5, (2 / (D + 4 * D)) ** 0.5
EXPECTED = {
    "vit": {
        "cls_token": 0, "pos_embed": 0.02, "patch_embed.proj.weight": PATCH, "blocks.1.attn.qkv.weight": XAVIER,
        "blocks.1.attn.proj.weight": XAVIER, "blocks.1.mlp.fc1.weight": XAVIER_MLP, "blocks.1.mlp.fc1.bias": 1e-6,
        "head.weight": 0, "head.bias": 0,
    },
    "deit": {
        "cls_token": 0.02, "pos_embed": 0.02, "patch_embed.proj.weight": PATCH / 3**0.5,
        "blocks.1.attn.qkv.weight": 0.02, "blocks.1.attn.proj.weight": 0.02, "blocks.1.mlp.fc1.weight": 0.02,
        "blocks.1.mlp.fc1.bias": 0, "head.weight": 0.02, "head.bias": 0,
    },
    "mae": {
        "cls_token": 0.02, "patch_embed.proj.weight": (2 / (D + 768)) ** 0.5,
        "blocks.1.attn.qkv.weight": (2 / (4 * D)) ** 0.5, "blocks.1.attn.proj.weight": XAVIER,
        "blocks.1.mlp.fc1.weight": XAVIER_MLP, "blocks.1.mlp.fc1.bias": 0, "head.weight": 2e-5, "head.bias": 0,
    },
    "swag": {
        "cls_token": 0, "pos_embed": 0.02, "patch_embed.proj.weight": PATCH,
        "blocks.1.attn.qkv.weight": (2 / (4 * D)) ** 0.5, "blocks.1.attn.proj.weight": (1 / (3 * D)) ** 0.5,
        "blocks.1.mlp.fc1.weight": XAVIER_MLP, "blocks.1.mlp.fc1.bias": 1e-6, "head.weight": 0, "head.bias": 0,
    },
}  # fmt: skip
#: The largest value there may be, in standard deviations.
CUT = {("vit", "patch_embed.proj.weight"): 2 / 0.8796}


@pytest.mark.parametrize("init", CHOICES["init"])
def test_distributions(init: str) -> None:
    model = build(Config(**vars(CONFIG) | {"init": init, "reg_tokens": 2}))
    parameters = dict(model.named_parameters())
    for name, std in EXPECTED[init].items():
        tensor = parameters[name].detach()
        if std == 0:
            assert not tensor.any(), name
            continue
        assert tensor.std().item() == pytest.approx(std, rel=4 * (2 * tensor.numel()) ** -0.5), name
        assert tensor.mean().abs() < 4 * std / tensor.numel() ** 0.5, name
        uniform = std in (XAVIER, XAVIER_MLP) or (tensor.abs().max() < 1.75 * std)
        most = CUT.get((init, name), 3**0.5 if uniform else 6)
        assert tensor.abs().max() <= most * std * 1.001, name
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
