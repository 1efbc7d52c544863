"""Pruning and parametrisations of every layer that has weights."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.helpers import images_for, relative_error, tiny
from tests.outcomes import works_with

R_VALUES = (0, 8)


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


@works_with("torch", "torch.nn.utils.prune on every layer, before and after prune.remove")
@pytest.mark.parametrize("r", R_VALUES)
def test_prune(r: int) -> None:
    model, images = tiny(r), images_for(tiny(r))
    pruned = deepcopy(model)
    prune.global_unstructured(
        [(layer, "weight") for layer in layers(pruned)], pruning_method=prune.L1Unstructured, amount=0.3
    )
    expected = deepcopy(model)
    for mine, theirs in zip(layers(expected), layers(pruned), strict=True):
        mine.weight.data.mul_(theirs.weight_mask)
    with torch.no_grad():
        assert relative_error(pruned(images), model(images)) > 1e-3
        assert relative_error(pruned(images), expected(images)) < 1e-5
        for layer in layers(pruned):
            prune.remove(layer, "weight")
        assert relative_error(pruned(images), expected(images)) < 1e-5


@works_with("torch", "weight_norm and spectral_norm on every layer: the forward uses them, and they learn")
@pytest.mark.parametrize("parametrization", [parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("r", R_VALUES)
def test_parametrizations(r: int, parametrization: type) -> None:
    model, images = tiny(r), images_for(tiny(r))
    for layer in layers(model):
        parametrization(layer)
    model(images).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        expected = model(images)
        for layer in layers(model):
            parametrize.remove_parametrizations(layer, "weight")
        assert relative_error(model(images), expected) < 1e-5


@works_with("torch-pruning", "MagnitudePruner: half of the hidden channels of every MLP")
@pytest.mark.parametrize("r", R_VALUES)
def test_structured_pruning(r: int) -> None:
    import torch_pruning

    model, images = tiny(r), images_for(tiny(r))
    ratios = {block.mlp.fc1: 0.5 for block in model.blocks}
    kept = [layer for layer in layers(model) if layer not in ratios]
    torch_pruning.pruner.MagnitudePruner(
        model,
        example_inputs=images,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.0,
        pruning_ratio_dict=ratios,
        ignored_layers=kept,
    ).step()
    assert {block.mlp.fc1.out_features for block in model.blocks} == {2 * model.config.embed_dim}
    assert {block.mlp.fc2.in_features for block in model.blocks} == {2 * model.config.embed_dim}
    model(images).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
