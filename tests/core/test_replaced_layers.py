"""Whatever stands in the place of a layer acts: in every block, in every method, and in what is learned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import tomevit
from tests.helpers import images_for, relative_error, tiny

FIELDS: list[dict[str, Any]] = [
    {},
    {"pool": "avg", "class_token": False},
    {"dist_token": True, "qk_norm": True, "layer_scale": 0.1},
    {"pool_norm": "after", "pre_norm": True, "reg_tokens": 2},
    {"rope": "pe", "pool": "map", "pool_heads": 2, "proj_dim": 10},
    {"rope": "eva", "mlp": "swiglu", "mlp_norm": True, "pool": "token_avg", "pos_embed_prefix": "class"},
    {"rope": "eva", "attn_norm": True},
]


class Adapter(nn.Module):
    """A low-rank update beside a linear layer, as LoRA has it: no weight of its own name."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        weight = base.weight
        assert isinstance(weight, Tensor)
        self.down = nn.Parameter(torch.randn(2, weight[0].numel()) / 4)
        self.up = nn.Parameter(torch.randn(len(weight), 2) / 4)

    def delta(self) -> Tensor:
        return self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base, nn.Conv2d):
            return self.base(x) + F.conv2d(x, self.delta().view_as(self.base.weight), stride=self.base.stride)
        return self.base(x) + F.linear(x, self.delta())


class Double(nn.Module):
    """Of any layer, what it answers, twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return 2 * self.inner(*args)


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def double_forward(layer: nn.Module) -> None:
    inner = layer.forward
    layer.forward = lambda *args: 2 * inner(*args)  # as accelerate does it


def at(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, last = name.rpartition(".")
    return model.get_submodule(parent), last


def with_weights(model: nn.Module) -> list[str]:
    """The layers that have weights of their own; a query or a token beside layers is no layer's."""
    return [name for name, m in model.named_modules() if not any(m.children()) and any(True for _ in m.parameters())]


def wrap(model: nn.Module, name: str) -> None:
    parent, last = at(model, name)
    setattr(parent, last, Double(getattr(parent, last)))


#: Ways to have a layer answer twice as much, none of which changes its parameters.
DOUBLING: dict[str, Callable[[nn.Module, str], Any]] = {
    "wrapper": wrap,
    "hook": lambda model, name: model.get_submodule(name).register_forward_hook(lambda _, args, out: 2 * out),
    "forward": lambda model, name: double_forward(model.get_submodule(name)),
    "parametrisation": lambda model, name: [
        parametrize.register_parametrization(model.get_submodule(name), each, Twice())
        for each, _ in list(model.get_submodule(name).named_parameters(recurse=False))
    ],
}


def double_parameters(model: nn.Module, name: str) -> None:
    with torch.no_grad():
        for parameter in model.get_submodule(name).parameters(recurse=False):
            parameter *= 2


def answers(model: tomevit.VisionTransformer, images: Tensor) -> dict[str, Tensor]:
    """The same by every method."""
    features = model.forward_features(images)
    layers = model.forward_intermediates(images, norm=True)
    assert relative_error(layers[-1].x, features.x) < 1e-5
    return {"forward": model(images), "head of features": model.forward_head(features)}


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("how", DOUBLING)
def test_what_is_put_in_the_place_of_a_layer_acts(how: str, fields: dict[str, Any]) -> None:
    plain = tiny(4, depth=2, **fields)
    images = images_for(plain)
    for name in with_weights(plain):
        doubled, model = copy.deepcopy(plain), copy.deepcopy(plain)
        double_parameters(doubled, name)
        DOUBLING[how](model, name)
        with torch.no_grad():
            expected = doubled(images)
            for method, found in answers(model, images).items():
                assert relative_error(found, expected) < 1e-4, (name, method)
        for mode in (torch.enable_grad, torch.inference_mode):
            with mode():
                assert relative_error(model(images), expected) < 1e-4, name


@pytest.mark.parametrize("fields", FIELDS)
def test_names_that_adapters_look_for_are_of_layers_with_weights(fields: dict[str, Any]) -> None:
    """peft looks for layers by the end of their names, and ends where one of them can have no adapter."""
    model = tiny(4, depth=1, **fields)
    called = [name for name, _ in model.named_modules() if name.endswith(("qkv", "proj", "fc1", "fc2", "head"))]
    assert len(called) >= 4
    assert all(isinstance(model.get_submodule(name), nn.Linear | nn.Conv2d) for name in called), called


@pytest.mark.parametrize("fields", FIELDS)
def test_an_adapter_acts_and_learns(fields: dict[str, Any]) -> None:
    plain = tiny(4, depth=3, **fields)
    images = images_for(plain)
    linear = [name for name in with_weights(plain) if isinstance(plain.get_submodule(name), nn.Linear | nn.Conv2d)]
    pooling = [name for name in linear if name.startswith(("attn_pool", "proj"))]
    assert len(pooling) == (5 if plain.attn_pool else 0)
    assert len(linear) == 1 + 4 * 3 + len(pooling) + len(plain.head_names)
    model, merged = copy.deepcopy(plain), copy.deepcopy(plain)
    adapters = {}
    for name in linear:
        parent, last = at(model, name)
        adapters[name] = Adapter(getattr(parent, last))
        setattr(parent, last, adapters[name])
        with torch.no_grad():
            weight = merged.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight += adapters[name].delta().view_as(weight)
    with torch.no_grad():
        for method, found in answers(model, images).items():
            assert relative_error(found, merged(images)) < 1e-4, method
    model(images).sum().backward()
    for name, adapter in adapters.items():
        assert adapter.up.grad is not None, name
        assert adapter.up.grad.abs().max() > 0, name


@pytest.mark.parametrize("fields", FIELDS)
def test_every_layer_sees_its_hooks(fields: dict[str, Any]) -> None:
    model = tiny(4, depth=3, **fields)
    images, seen = images_for(model), []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    for call in (model, model.forward_features):
        seen.clear()
        with torch.no_grad():
            call(images)
        behind = ("head", "fc_norm", "attn_pool", "proj")
        expected = [name for name in with_weights(model) if call is model or not name.startswith(behind)]
        assert set(expected) <= set(seen)
        assert all(seen.count(name) == 1 for name in expected)


def test_what_torch_puts_in_the_place_of_weights() -> None:
    plain = tiny(4, depth=2)
    images, expected = images_for(plain), plain(images_for(plain))
    for parametrisation in (parametrizations.weight_norm, parametrizations.spectral_norm):
        model = copy.deepcopy(plain)
        for name in ("blocks.0.attn.qkv", "blocks.1.attn.qkv", "patch_embed.proj"):
            parametrisation(model.get_submodule(name))
        different = relative_error(model(images), expected)
        assert different < 1e-5 if parametrisation is parametrizations.weight_norm else different > 1e-3
    model, pruned = copy.deepcopy(plain), copy.deepcopy(plain)
    for name in ("blocks.1.attn.qkv", "patch_embed.proj"):
        prune.l1_unstructured(model.get_submodule(name), "weight", 0.5)
        weight = pruned.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        with torch.no_grad():
            weight *= weight.abs() > weight.abs().flatten().median()
    assert relative_error(model(images), pruned(images)) < 1e-5
    assert relative_error(model(images), expected) > 1e-2


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GELU])
def test_models_are_made_of_torchs_own_classes(kind: type[nn.Module]) -> None:
    model = tomevit.create("digits_p1", pretrained=True)
    found = [type(module) for module in model.modules() if isinstance(module, kind)]
    assert found
    assert set(found) == {kind}


def test_a_product_of_a_model_in_parts_is_as_fast_where_nothing_is_in_its_place() -> None:
    model, products = tiny(4, depth=2), []

    class See(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.linear:
                products.append(tuple(args[1].shape))
            return func(*args, **(kwargs or {}))

    with torch.inference_mode(), See():
        model(images_for(model))
    dim = model.config.embed_dim
    assert products[4:6] == [(dim, dim), (2 * dim, dim)]
