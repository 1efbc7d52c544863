"""Without merging, the models are torchvision's and SWAG's, whose code is the same: same outputs under other names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.peers import torchvision
from tests.helpers import images_for, randomise, relative_error
from tomevit import card
from tomevit.config import Config
from tomevit.models import build_meta

NAMES = {
    "class_token": "cls_token",
    "conv_proj": "patch_embed.proj",
    "encoder.pos_embedding": "pos_embed",
    "encoder.layers.encoder_layer_": "blocks.",
    "encoder.ln": "norm",
    "ln_": "norm",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
    "heads.head": "head",
}


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, tensor in state.items():
        new = name
        for theirs, ours in NAMES.items():
            new = new.replace(theirs, ours)
        out[new] = tensor
    return out


def compare(theirs: torch.nn.Module, config: Config, batch: int) -> None:
    randomise(theirs)
    ours = build_meta(config)
    ours.load_state_dict(renamed(theirs.state_dict()), assign=True)
    images = images_for(ours, batch)
    with torch.inference_mode():
        expected = theirs.eval()(images)
        assert relative_error(ours.eval()(images), expected) < 1e-5


@pytest.mark.usefixtures("all_threads")
def test_swag_b16_at_full_size() -> None:
    with torch.device("meta"):
        theirs = torchvision.models.vit_b_16()
    compare(theirs.to_empty(device="cpu"), card("swag_b16.linear_in1k").config, batch=2)


def test_small() -> None:
    theirs = torchvision.models.VisionTransformer(
        image_size=40, patch_size=8, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=96, num_classes=11
    )
    sizes = {"img_size": (40, 40), "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 11}
    compare(theirs, Config(**sizes, mlp_ratio=3.0), batch=3)
