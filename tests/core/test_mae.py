"""The masked autoencoder: the reference's loss, merging in the encoder, and the way to a classifier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import tomevit
from tests.helpers import images_for, relative_error
from tomevit import MaskedAutoencoder
from tomevit.config import Config
from tomevit.models import build, build_meta, patchify, unpatchify
from tomevit.models.init import sincos_positions

GOLDEN = load_file(Path(__file__).parents[1] / "golden/mae_pretrain.safetensors")
REFERENCE = {name.removeprefix("weights/"): value for name, value in GOLDEN.items() if name.startswith("weights/")}
SMALL = Config(img_size=(64, 64), patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=0, init="mae")


def autoencoder(config: Config = SMALL, **options: object) -> MaskedAutoencoder:
    options = {"decoder_dim": 24, "decoder_depth": 2, "decoder_heads": 2} | options
    return MaskedAutoencoder(build(config), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_the_references_loss(norm_pix: bool, dtype: torch.dtype) -> None:
    model = autoencoder(norm_pix=norm_pix)
    model.load_mae(REFERENCE)
    loss, pred, mask = model.to(dtype)(GOLDEN["input"].to(dtype), noise=GOLDEN["noise"])
    torch.autograd.backward(loss)
    expected = {key: GOLDEN[f"norm_pix{norm_pix:d}/{key}"] for key in ("loss", "pred", "mask", "grad_patch_embed")}
    # Predictions and gradients are stored in float32.
    bound = 1e-6 if dtype == torch.float64 else 1e-5
    assert relative_error(loss[None].double(), expected["loss"]) < (1e-13 if dtype == torch.float64 else 1e-5)
    assert relative_error(pred.float(), expected["pred"]) < bound
    gradient = model.encoder.patch_embed.proj.weight.grad
    assert gradient is not None
    assert relative_error(gradient.float(), expected["grad_patch_embed"]) < bound
    assert torch.equal(mask.byte(), expected["mask"])


def test_reference_names_there_and_back() -> None:
    model = autoencoder()
    model.load_mae(REFERENCE)
    ours = model.mae_state_dict()
    assert ours.keys() == REFERENCE.keys()
    assert all(torch.equal(ours[name], REFERENCE[name]) for name in ours)
    with pytest.raises(ValueError, match="there is no decoder"):
        model.load_mae({name: value for name, value in REFERENCE.items() if name in ("norm.weight", "pos_embed")})
    with pytest.raises(RuntimeError, match=r"decoder\.pred"):
        model.load_mae({name: value for name, value in REFERENCE.items() if name != "decoder_pred.weight"})


def test_positions_are_the_references() -> None:
    assert relative_error(sincos_positions((8, 8), 65, 32), REFERENCE["pos_embed"]) < 1e-6
    assert relative_error(sincos_positions((8, 8), 65, 24), REFERENCE["decoder_pos_embed"]) < 1e-6
    model = autoencoder()
    assert torch.equal(model.encoder.pos_embed, sincos_positions((8, 8), 65, 32))
    assert torch.equal(model.decoder.pos_embed, sincos_positions((8, 8), 65, 24))
    with pytest.raises(ValueError, match="multiple of 4, and this one is 30"):
        sincos_positions((8, 8), 65, 30)


@pytest.mark.parametrize("fields", [{}, {"reg_tokens": 2}, {"class_token": False, "pool": "avg"}])
@pytest.mark.parametrize("r", [0, 2, [3, 0, 5]])
def test_only_the_visible_patches_matter(fields: dict[str, object], r: int | list[int]) -> None:
    model = autoencoder(replace(SMALL, **fields), norm_pix=False).double()  # type: ignore[arg-type]
    torch.nn.init.normal_(model.decoder.mask_token)
    images = images_for(model.encoder)
    noise = torch.rand(3, 64, dtype=torch.float64)
    loss, pred, mask = model(images, r, noise=noise)
    assert mask.sum(1).tolist() == [48] * 3
    assert (noise * mask).max() == noise.max()
    assert ((1 - mask) * noise).amax() < 1
    others = unpatchify(mask[..., None] * torch.randn(3, 64, 192, dtype=torch.float64), (8, 8), 8)
    changed = model(images + others, r, noise=noise)
    assert torch.equal(changed.pred, pred)
    assert changed.loss != loss
    seen = unpatchify((1 - mask)[..., None] * torch.randn(3, 64, 192, dtype=torch.float64), (8, 8), 8)
    assert not torch.equal(model(images + seen, r, noise=noise).pred, pred)


def test_merging_in_the_encoder() -> None:
    model = autoencoder()
    images, noise = images_for(model.encoder), torch.rand(3, 64)
    assert model.token_counts(3) == (17, 14, 11, 8, 5)
    assert model.token_counts(0) == (17,) * 5
    plain, merged = (model(images, r, noise=noise) for r in (0, 3))
    assert merged.pred.shape == plain.pred.shape == (3, 64, 192)
    assert not torch.equal(merged.pred, plain.pred)
    torch.autograd.backward(merged.loss)
    fixed = {"encoder.pos_embed", "decoder.pos_embed"}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in fixed), name
    model.encoder.r = 3
    assert torch.equal(model(images, noise=noise).pred, merged.pred)


def test_a_dropped_patch_is_a_hidden_one_to_the_decoder() -> None:
    model = autoencoder().double()
    torch.nn.init.normal_(model.decoder.mask_token)
    images, noise = images_for(model.encoder), torch.rand(3, 64)
    entering: list[Tensor] = []
    model.decoder.blocks[0].register_forward_pre_hook(lambda _, arguments: entering.append(arguments[0].x))
    for r in (0, ["3+2 diffrate", "0+4 diffrate"]):
        model(images, r, noise=noise)
    unseen = [((x - model.decoder.pos_embed - model.decoder.mask_token).abs() < 1e-12).all(2) for x in entering]
    assert unseen[0].sum(1).tolist() == [48] * 3
    assert (unseen[1].sum(1) >= 48 + 6).all()  # more where a merged token was dropped
    assert (unseen[1] | ~unseen[0]).all()
    assert not unseen[1][:, 0].any()
    torch.autograd.backward(model(images, ["3+2 diffrate"], noise=noise).loss)
    assert model.encoder.patch_embed.proj.weight.grad is not None
    with pytest.raises(ValueError, match="need the whole grid of patches"):
        model(images, [0, "grid"], noise=noise)


def test_merging_equal_patches_changes_nothing() -> None:
    """Where all visible patches are equal, position included, a merge loses nothing."""
    model = autoencoder(replace(SMALL, prop_attn=True)).double()
    model.encoder.pos_embed.data.zero_()
    images = images_for(model.encoder)[:, :, :8, :8].repeat(1, 1, 8, 8)
    noise = torch.rand(3, 64, dtype=torch.float64)
    plain, merged = (model(images, r, noise=noise) for r in (0, 4))
    assert relative_error(merged.pred, plain.pred) < 1e-12


@given(height=st.integers(1, 4), width=st.integers(1, 4), patch=st.integers(1, 5), channels=st.integers(1, 3))
def test_patchify_and_back(height: int, width: int, patch: int, channels: int) -> None:
    images = torch.randn(2, channels, height * patch, width * patch)
    patches = patchify(images, patch)
    assert patches.shape == (2, height * width, patch * patch * channels)
    assert torch.equal(patches[:, 0, :channels], images[:, :, 0, 0])
    assert torch.equal(unpatchify(patches, (height, width), patch), images)


def test_it_learns() -> None:
    model = autoencoder(replace(SMALL, img_size=(32, 32)), norm_pix=True)
    optimizer = torch.optim.AdamW(tomevit.param_groups(model, 3e-3))
    ramps = torch.linspace(-1, 1, 32).expand(3, 32, 32)
    images = torch.stack([ramps, ramps.mT, -ramps, -ramps.mT])
    losses = []
    for _ in range(40):
        loss = model(images, r=1).loss
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9
    assert losses[-1] < 0.5 * losses[0]


def test_parameter_groups() -> None:
    model = autoencoder()
    groups = tomevit.param_groups(model, 1.0, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    where = {names[id(p)]: group for group in groups for p in group["params"]}
    assert set(where) == set(names.values()) - {"encoder.pos_embed", "decoder.pos_embed"}
    assert where["encoder.blocks.3.mlp.fc1.weight"]["name"] == "blocks.3"
    assert where["encoder.patch_embed.proj.weight"]["lr"] == 0.5**5
    assert where["decoder.blocks.0.mlp.fc1.weight"]["lr"] == 1.0
    assert where["decoder.mask_token"]["weight_decay"] == where["encoder.cls_token"]["weight_decay"] == 0.0


def test_checkpointing_and_compile() -> None:
    model = autoencoder()
    images, noise = images_for(model.encoder), torch.rand(3, 64)

    def gradients(run: object) -> list[Tensor]:
        model.zero_grad()
        torch.autograd.backward(run(images, 3, noise=noise).loss)  # type: ignore[operator]
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients(model)
    compiled = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    model.set_grad_checkpointing()
    again = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(compiled, plain, strict=True))


def test_the_encoder_becomes_a_classifier(tmp_path: Path) -> None:
    model = MaskedAutoencoder(
        tomevit.create("mae_cls_b16", img_size=64), decoder_dim=16, decoder_depth=1, decoder_heads=1
    )
    encoder = model.encoder
    tomevit.save(encoder, tmp_path / "encoder.safetensors")
    for source in (encoder, tmp_path / "encoder.safetensors"):
        classifier = tomevit.create("mae_b16", pretrained=source, num_classes=5, r=4, drop_path=0.1)
        assert classifier.config.pool == "avg"
        assert classifier.card.full_name == "mae_b16"
        assert all(parameter.requires_grad for parameter in classifier.parameters())
        theirs = encoder.state_dict()
        fresh = {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
        for name, tensor in classifier.state_dict().items():
            assert name in fresh or torch.equal(tensor, theirs[name]), name
        assert torch.equal(classifier.fc_norm.weight, torch.ones(768))
        assert classifier.head.weight.std().item() == pytest.approx(2e-5, rel=0.1)
        assert classifier(images_for(classifier)).shape == (3, 5)
    theirs["blocks.0.norm1.weight"].zero_()  # the classifier's weights are its own
    assert classifier.blocks[0].norm1.weight.any()
    probe = tomevit.create("mae_cls_b16", pretrained=encoder, num_classes=5)
    assert torch.equal(probe.norm.weight, encoder.norm.weight)
    with pytest.raises(tomevit.CheckpointError, match="embed_dim 768 where the model has 1024"):
        tomevit.create("mae_l16", pretrained=encoder)
    with pytest.raises(ValueError, match=r"model is a MaskedAutoencoder.*: give its encoder"):
        tomevit.create("mae_b16", pretrained=model)
    averaged = torch.optim.swa_utils.AveragedModel(encoder)
    assert torch.equal(tomevit.create("mae_cls_b16", pretrained=averaged).pos_embed, encoder.pos_embed)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"pool": "avg", "pool_norm": "after"}, {}, "its norm after the pooling"),
        ({"dist_token": True}, {}, "a distillation token"),
        ({}, {"mask_ratio": 0.0}, "of 64 patches some must be hidden"),
        ({}, {"mask_ratio": 0.99}, "of 64 patches some must be hidden"),
        ({}, {"decoder_heads": 5}, "embed_dim 24 is not a multiple of num_heads 5"),
        ({}, {"decoder_dim": 26}, "multiple of 4, and this one is 26"),
    ],
)
def test_what_cannot_be(fields: dict[str, object], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        autoencoder(replace(SMALL, **fields), **options)  # type: ignore[arg-type]


def test_a_failure_leaves_the_encoder_as_it_was() -> None:
    encoder = build(replace(SMALL, num_classes=3))
    for options in ({"decoder_heads": 5}, {"mask_ratio": float("nan")}):
        with pytest.raises(ValueError, match=r"decoder|num_heads|mask_ratio"):
            MaskedAutoencoder(encoder, decoder_dim=24, decoder_depth=1, **options)  # type: ignore[arg-type]
    assert encoder.config.num_classes == 3
    assert encoder.pos_embed.requires_grad


def test_training_mode_is_the_encoders() -> None:
    assert not MaskedAutoencoder(build(SMALL).eval(), decoder_dim=16, decoder_depth=1).training
    model = MaskedAutoencoder(build(SMALL).train(), decoder_dim=16, decoder_depth=1)
    assert model.training
    assert model.decoder.training


@pytest.mark.parametrize("encoder", [build(SMALL).bfloat16(), build(SMALL).double(), build_meta(SMALL)])
def test_the_decoder_is_like_its_encoder(encoder: tomevit.VisionTransformer) -> None:
    kind = {(tensor.dtype, tensor.device) for tensor in encoder.state_dict().values()}
    model = MaskedAutoencoder(encoder, decoder_dim=16, decoder_depth=1, decoder_heads=1)
    assert {(tensor.dtype, tensor.device) for tensor in model.state_dict().values()} == kind
    if encoder.pos_embed.is_meta:
        return
    loss, pred, mask = model(images_for(encoder), r=4)
    assert pred.dtype == encoder.dtype
    assert mask.dtype == torch.float32
    loss.backward()


def test_r_is_the_encoders() -> None:
    model = autoencoder()
    model.r = (2, -1.0)
    assert model.r == model.encoder.r == (2, -1.0)
    assert model.token_counts() != model.token_counts(0)
    with pytest.raises(ValueError, match="negative"):
        model.r = -1


def test_what_patches_are_visible_is_said_by_number() -> None:
    encoder = build(SMALL)
    mask = torch.rand(3, 64) > 0.5
    for visible in (mask, torch.arange(4), torch.zeros(2, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"visible is .* and must be int64, the numbers of the visible patches"):
            encoder.forward_features(images_for(encoder), visible=visible)


def test_noise_of_another_shape() -> None:
    model = autoencoder()
    with pytest.raises(ValueError, match=r"noise is \(3, 65\), and must have a value for every patch: \(3, 64\)"):
        model(images_for(model.encoder), noise=torch.rand(3, 65))
