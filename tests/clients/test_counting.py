"""Counters of multiply-adds find every layer, and what merging saves."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from tests.helpers import images_for, tiny
from tests.outcomes import works_with
from tomevit.models import VisionTransformer

R_VALUES = (0, 8)


def products(model: VisionTransformer) -> int:
    """Multiply-adds of all layers for one image, attention's own products left out."""
    config, counts = model.config, model.token_counts()
    dim, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
    embedding = config.num_patches * config.patch_size**2 * config.in_chans * dim
    blocks = sum(4 * entering * dim**2 + 2 * leaving * dim * hidden for entering, leaving in pairwise(counts))
    return embedding + blocks + dim * config.num_classes


def norms(model: VisionTransformer) -> int:
    """Elements that pass through a LayerNorm."""
    counts = model.token_counts()
    return model.config.embed_dim * (sum(entering + leaving for entering, leaving in pairwise(counts)) + counts[-1])


@pytest.fixture(params=R_VALUES)
def model(request: pytest.FixtureRequest) -> VisionTransformer:
    return tiny(request.param, pool="avg")  # all of the last block is computed


@works_with("thop", "profile: the multiply-adds of all layers, with merging and without")
def test_thop(model: VisionTransformer) -> None:
    import thop

    macs, parameters = thop.profile(model, inputs=(images_for(model, 1),), verbose=False)
    # It counts norms by several operations for each element, and attention, which is no layer, not at all.
    assert products(model) <= macs <= products(model) + 4 * norms(model)
    assert parameters == sum(p.numel() for n, p in model.named_parameters() if "." in n)  # of layers


@works_with("ptflops", "get_model_complexity_info: the multiply-adds of all layers, with merging and without")
def test_ptflops(model: VisionTransformer) -> None:
    from ptflops import get_model_complexity_info

    macs, parameters = get_model_complexity_info(
        model, (3, *model.config.img_size), as_strings=False, print_per_layer_stat=False, backend="pytorch"
    )
    assert products(model) <= macs <= 1.35 * products(model)
    assert parameters == sum(p.numel() for p in model.parameters())


@works_with("fvcore", "FlopCountAnalysis: the multiply-adds of all layers, with merging and without")
def test_fvcore(model: VisionTransformer) -> None:
    from fvcore.nn import FlopCountAnalysis

    counted = FlopCountAnalysis(model, images_for(model, 1)).unsupported_ops_warnings(False).by_operator()
    assert counted["linear"] + counted["conv"] == products(model)


@works_with("torchinfo", "summary: every layer with its output shape and parameters")
def test_torchinfo(model: VisionTransformer) -> None:
    import torchinfo

    summary = torchinfo.summary(model, input_data=images_for(model, 1), verbose=0)
    shapes = [layer.output_size for layer in summary.summary_list if layer.var_name == "fc2"]
    assert [shape[1] for shape in shapes] == list(model.token_counts()[1:])
    assert summary.trainable_params == sum(p.numel() for p in model.parameters())


@works_with("torch", "torch.utils.flop_counter: twice the multiply-adds of all layers, and what merging itself costs")
def test_torch(model: VisionTransformer) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images_for(model, 1))
    # On a CPU it does not count attention. The scores of the keys: at most 32 x 33 pairs of 8 channels in each block.
    merging = counter.get_total_flops() / 2 - products(model)
    assert 0 < merging <= model.config.depth * 32 * 33 * 8 if model.r else merging == 0
