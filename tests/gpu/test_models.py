"""Every architecture on a device: forward and backward, against float64 on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.core.test_families import FAMILIES, model_of
from tests.helpers import images_for, relative_error, tiny
from tomevit import MaskedAutoencoder, VisionTransformer
from tomevit.models import build_meta

pytestmark = pytest.mark.gpu
each_family = pytest.mark.parametrize("family", FAMILIES)
HALF = [torch.float16, torch.bfloat16]
#: 96 patches, of which 16 merge in each of three blocks.
GRID = {"img_size": (32, 48)}


def answer_and_gradients(model: VisionTransformer, images: Tensor, r: int) -> list[Tensor]:
    images = images.clone().requires_grad_()
    answer = model(images, r=r)
    wanted = [images, *(p for p in model.parameters() if p.requires_grad)]
    return [answer.detach(), *torch.autograd.grad(answer.square().sum(), wanted, allow_unused=True)]


@each_family
@pytest.mark.parametrize("r", [0, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_forward_and_backward(device: torch.device, family: str, r: int, dtype: torch.dtype) -> None:
    model = model_of(family, **GRID)
    images = images_for(model)
    assert r == 0 or model.token_counts(r)[-1] == model.config.num_tokens - 48
    expected = answer_and_gradients(model, images, r)
    there = copy.deepcopy(model).to(device, dtype)
    found = answer_and_gradients(there, images.to(device, dtype), r)
    bound = 1e-9 if dtype == torch.float64 else 2e-3  # gradients of float32 pass through three softmaxes
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None and theirs.abs().max() > 1e-6:
            assert ours.device.type == device.type
            assert relative_error(ours.cpu().double(), theirs) < bound


@each_family
@pytest.mark.parametrize("dtype", HALF, ids=["float16", "bfloat16"])
def test_autocast(device: torch.device, family: str, dtype: torch.dtype) -> None:
    model = model_of(family, **GRID)
    images = images_for(model)
    there = copy.deepcopy(model).float().to(device)
    with torch.autocast(device.type, dtype), torch.no_grad():
        for r in (0, 16):
            found = there(images.float().to(device), r=r)
            assert found.isfinite().all()
            if r == 0:  # at another r, tokens that are about equally similar may change places
                assert relative_error(found.cpu().double(), model(images, r=0)) < 0.2
        tokens = there.forward_features(images.float().to(device), r=16)
    assert tokens.size is not None
    assert tokens.size.dtype == torch.float32
    assert (tokens.size.sum(1) == model.config.num_tokens).all()


@pytest.mark.parametrize("dtype", HALF, ids=["float16", "bfloat16"])
def test_gradients_under_autocast(device: torch.device, dtype: torch.dtype) -> None:
    model = tiny(16).to(device).train()
    images = images_for(model).to(device)
    exact = torch.autograd.grad(model(images, r=0).square().mean(), list(model.parameters()))
    with torch.autocast(device.type, dtype):
        rough = torch.autograd.grad(model(images, r=0).float().square().mean(), list(model.parameters()))
        merged = torch.autograd.grad(model(images).float().square().mean(), list(model.parameters()))
    whole = [torch.cat([each.flatten() for each in gradients]) for gradients in (rough, exact)]
    assert torch.cosine_similarity(*whole, dim=0) > 0.99
    assert all(each.isfinite().all() for each in merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_masked_autoencoder_is_where_its_encoder_is(device: torch.device, dtype: torch.dtype) -> None:
    encoder = tiny(num_classes=0).to(device, dtype)
    model = MaskedAutoencoder(encoder, decoder_dim=24, decoder_depth=2, decoder_heads=2)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {(device.type, dtype)}
    images = images_for(encoder).to(device)
    for r in (0, 2):
        loss, pred, mask = model(images, r)
        loss.backward()
        assert loss.isfinite()
        assert {each.device.type for each in (pred, mask)} == {device.type}
    noise = torch.rand(3, 64, generator=torch.Generator().manual_seed(0))
    expected = copy.deepcopy(model).cpu().double()(images.cpu().double(), 0, noise=noise)
    found = model(images, 0, noise=noise.to(device))
    assert torch.equal(found.mask.cpu(), expected.mask.float())
    assert relative_error(found.pred.cpu().double(), expected.pred) < (1e-4 if dtype == torch.float32 else 0.1)


def test_checkpointing_changes_nothing(device: torch.device) -> None:
    model = tiny(16).to(device).train()
    images = images_for(model).to(device)
    kept = answer_and_gradients(model, images, 16)
    model.set_grad_checkpointing()
    for ours, theirs in zip(answer_and_gradients(model, images, 16), kept, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("r", [0, 7, 16])
def test_a_batch_gives_what_each_image_gives(device: torch.device, r: int) -> None:
    model = tiny().to(device).double()
    images = images_for(model, 5).to(device)
    with torch.no_grad():
        together = model(images, r)
        alone = torch.cat([model(image[None], r) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


def test_defaults_of_the_host_change_nothing(device: torch.device) -> None:
    """A default device or dtype of the program around is not asked: the model's own are."""
    model = tiny(8)
    images = images_for(model)
    expected = model(images)
    there = copy.deepcopy(model).to(device)
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device(device)
        torch.testing.assert_close(model(images), expected)
        torch.testing.assert_close(there(images.to(device)).cpu(), expected, rtol=0, atol=1e-4)
        torch.set_default_device("cpu")
        assert there(images.to(device)).dtype == torch.float32
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)


@pytest.mark.parametrize("r", [0, 8, 0.3, (8, -0.5)])
def test_meta_has_no_device(r: object) -> None:
    config = tiny().config
    with torch.no_grad():
        images = torch.empty(2, config.in_chans, *config.img_size, device="meta")
        assert build_meta(config)(images, r=r).shape == (2, config.num_classes)
