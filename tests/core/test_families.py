"""Every architecture that a config can describe, against its definition, at any r."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tomevit
from tests import reference
from tomevit import VisionTransformer
from tomevit.config import Config
from tomevit.flops import count_parameters
from tomevit.models import build, build_meta
from tomevit.schedule import Schedule

SMALL = Config(img_size=(12, 20), patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=5, mlp_ratio=2.0)

#: What each family has, at toy size.
FAMILIES: dict[str, dict[str, Any]] = {
    "clip": {"pre_norm": True, "act": "quick_gelu", "norm_eps": 1e-5, "proj_dim": 10, "num_classes": 0},
    "dinov2": {"layer_scale": 1.0},
    "dinov2 with registers": {"layer_scale": 1.0, "reg_tokens": 4, "pos_embed_prefix": "class"},
    "dinov2 linear": {"layer_scale": 1.0, "reg_tokens": 4, "pos_embed_prefix": "class", "pool": "token_avg"},
    "dinov2 giant": {"layer_scale": 1.0, "mlp": "swiglu", "pool": "token_avg"},
    "siglip": {"class_token": False, "act": "gelu_tanh", "pool": "map", "num_classes": 0},
    "siglip gap": {"class_token": False, "act": "gelu_tanh", "pool": "avg"},
    "dinov3": {
        "layer_scale": 1e-5,
        "reg_tokens": 4,
        "pos_embed": "none",
        "rope": "dinov3",
        "qkv_bias": False,
        "norm_eps": 1e-5,
        "num_classes": 0,
    },
    "dinov3 gated": {"layer_scale": 1e-5, "reg_tokens": 4, "pos_embed": "none", "rope": "dinov3", "mlp": "swiglu"},
    "pe core": {
        "pre_norm": True,
        "rope": "pe",
        "pool": "map",
        "pool_heads": 2,
        "pool_mlp_ratio": 3.0,
        "proj_dim": 10,
        "norm_eps": 1e-5,
        "num_classes": 0,
    },
    "pe core without class token": {
        "pre_norm": True,
        "rope": "pe",
        "pool": "map",
        "pool_heads": 2,
        "class_token": False,
        "proj_dim": 10,
    },
    "pe lang": {"pre_norm": True, "rope": "pe", "pool": "avg", "pool_norm": "none", "layer_scale": 0.1},
    "pe spatial": {"pre_norm": True, "rope": "pe", "pool": "token", "pool_norm": "none"},
    "eva02": {"rope": "eva", "mlp": "swiglu", "pool": "avg", "pool_norm": "after"},
    "eva02 large": {"rope": "eva", "mlp": "swiglu", "mlp_norm": True, "pool": "avg", "pool_norm": "after"},
    "eva02 clip": {
        "rope": "eva",
        "mlp": "swiglu",
        "mlp_norm": True,
        "attn_norm": True,
        "proj_dim": 10,
        "proj_bias": True,
        "num_classes": 0,
    },
    "token beside mean, normed and projected": {"pool": "token_avg", "pool_norm": "after", "proj_dim": 6},
}
#: Families that together have every field that the trunk reads.
DIFFERENT = ("clip", "dinov2 linear", "siglip", "dinov3", "pe core", "eva02 large")
each_family = pytest.mark.parametrize("family", FAMILIES)


def model_of(family: str, **fields: Any) -> VisionTransformer:
    """In float64, with parameters of which none is 0 or 1."""
    model = build(replace(SMALL, **FAMILIES[family] | fields)).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def images_for(model: VisionTransformer, count: int = 2) -> Tensor:
    return torch.randn(count, model.config.in_chans, *model.config.img_size, dtype=torch.float64)


@each_family
@pytest.mark.parametrize("r", [0, 2, [3, 0, 1], 0.3])
def test_it_is_its_definition(family: str, r: Schedule) -> None:
    model = model_of(family)
    images = images_for(model)
    found, output = model.forward_features(images, r=r), model(images, r=r)
    for i, image in enumerate(images):
        expected = reference.run(model, image, model.schedule(r))
        torch.testing.assert_close(found.x[i], expected.tokens, rtol=0, atol=1e-10)
        torch.testing.assert_close(output[i], expected.output, rtol=0, atol=1e-10)
        sizes = [1] * len(expected.sizes) if found.size is None else found.size[i, :, 0].tolist()
        assert sizes == expected.sizes
        assert found.slots is not None
        assert [tuple((found.slots[i] == n).nonzero().flatten().tolist()) for n in range(len(sizes))] == [
            tuple(sorted(sources)) for sources in expected.sources
        ]


@each_family
def test_its_gradients_are_those_of_the_definition(family: str) -> None:
    model = model_of(family, depth=2)
    images = images_for(model, 1).requires_grad_()
    wanted = [images, *model.parameters()]
    ours = torch.autograd.grad(model(images, r=2).square().sum(), wanted)
    outputs = reference.run(model, images[0], model.schedule(2)).output.square().sum()
    theirs = torch.autograd.grad(outputs, wanted)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@each_family
def test_its_parameters_are_counted(family: str) -> None:
    config = replace(SMALL, **FAMILIES[family])
    assert count_parameters(config) == sum(parameter.numel() for parameter in build_meta(config).parameters())


@each_family
def test_fresh_weights_are_drawn(family: str) -> None:
    model = build(replace(SMALL, **FAMILIES[family]))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    equal = [name for name, p in model.named_parameters() if p.ndim > 1 and len(p.unique()) == 1 and "head" not in name]
    assert set(equal) <= {"cls_token"}
    assert model(images_for(model).float(), r=2).isfinite().all()


@each_family
def test_hidden_patches_are_left_out(family: str) -> None:
    model = model_of(family)
    images, visible = images_for(model, 1), torch.tensor([[0, 3, 4, 8, 9, 13]])
    changed = images.clone()
    changed[:, :, :4, 4:8] += 1  # patch 1, which is hidden
    first, second = (model.forward_features(each, r=1, visible=visible) for each in (images, changed))
    torch.testing.assert_close(first.x, second.x, rtol=0, atol=0)
    everything = torch.arange(model.config.num_patches)[None]
    torch.testing.assert_close(
        model.forward_features(images, r=1, visible=everything).x, model.forward_features(images, r=1).x
    )


@each_family
def test_blocks_one_by_one_give_the_same(family: str) -> None:
    model = model_of(family)
    images = images_for(model)
    last = model.forward_intermediates(images, r=2, norm=True)[-1]
    torch.testing.assert_close(last.x, model.forward_features(images, r=2).x, rtol=0, atol=1e-12)


@each_family
def test_it_is_copied_saved_and_checkpointed(family: str) -> None:
    model = model_of(family).float()
    images = images_for(model).float()
    expected = model(images, r=2)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images, r=2), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = build(model.config).eval()
    again.load_state_dict(torch.load(file))
    assert torch.equal(again(images, r=2), expected)
    model.train().set_grad_checkpointing()
    loss = model(images, r=2).square().sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("family", [name for name, fields in FAMILIES.items() if "rope" in fields])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_stay_exact_in_half_precision(family: str, dtype: torch.dtype) -> None:
    model = model_of(family).float()
    assert model.rope is not None
    exact = model.rope.table.clone()
    assert model.to(dtype).rope.table.dtype == torch.float32
    assert torch.equal(model.rope.table, exact)
    assert model(images_for(model), r=2).dtype == dtype
    assert torch.equal(model.float().rope.table, exact)


@pytest.mark.parametrize("family", DIFFERENT)
def test_it_is_exported(family: str) -> None:
    model = model_of(family).float()
    model.r = 2
    images = images_for(model).float()
    program = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(program(images), model(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope": "dinov3", "embed_dim": 18, "num_heads": 3}, "must divide by 4"),
        ({"pool": "token_avg", "class_token": False}, "reads the class token"),
        ({"pool": "map", "pool_heads": 5}, "not a multiple of pool_heads"),
        ({"mlp_norm": True}, "mlp='swiglu'"),
        ({"proj_dim": -1}, "proj_dim is -1"),
        ({"pos_embed_prefix": "class", "class_token": False, "pool": "avg"}, "class token's position"),
        ({"dist_token": True, "proj_dim": 3}, "no projection"),
    ],
)
def test_what_no_model_can_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **fields)


def test_a_masked_autoencoder_needs_positions_to_predict_from() -> None:
    with pytest.raises(ValueError, match="no learned positions"):
        tomevit.MaskedAutoencoder(model_of("dinov3").float())


@each_family
def test_a_replica_of_data_parallelism_answers_alike(family: str) -> None:
    model = model_of(family)
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = child if child is None else replicas[child]
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            # As torch.nn.parallel.replicate does: no parameter is registered.
            setattr(replica, name, None if tensor is None else tensor.detach().clone())
    assert not list(replicas[model].parameters())
    images = images_for(model)
    torch.testing.assert_close(replicas[model](images, r=2), model(images, r=2), rtol=0, atol=1e-12)
