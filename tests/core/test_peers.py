"""Without merging, each family's models are those of timm, transformers and open_clip, token by token.

At toy size, with numbers of every kind in the parameters. Where a reference keeps its rotations in float32, the float64
comparisons put the definition's in their place (tests/reference.py), by `give_exact_rotations`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.peers import timm
from tests import reference
from tests.helpers import format_of_timms, images_for, randomise, relative_error
from tomevit import card
from tomevit.config import Config
from tomevit.models import VisionTransformer, build
from tomevit.weights import rules
from tomevit.weights.adapt import resample_positions
from tomevit.weights.formats import FORMATS
from tomevit.weights.recognise import find_format

hf = importlib.import_module("transformers")


@dataclass(frozen=True)
class Peer:
    """A reference model, and what it is here."""

    form: str
    config: Config
    model: nn.Module
    answer: Callable[[Tensor], Tensor]  # logits or embeddings
    tokens: Callable[[Tensor], Tensor]  # all of them, after the last norm
    file: str = ""  # the format of the files that it writes, if that is another


SIZES: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 4}
PLAIN: dict[str, Any] = {"img_size": (16, 24), "num_classes": 0} | SIZES
CLIP = PLAIN | {"pre_norm": True, "norm_eps": 1e-5}
DINOV2 = PLAIN | {"layer_scale": 1.0}
DINOV3 = PLAIN | {"layer_scale": 1e-5, "reg_tokens": 4, "pos_embed": "none", "rope": "dinov3", "norm_eps": 1e-5}
DINOV3 |= {"qkv_bias": False}
SIGLIP = PLAIN | {"class_token": False, "pool": "map"}
PE = CLIP | {"rope": "pe"}
EVA = PLAIN | {"num_classes": 7, "rope": "eva", "mlp": "swiglu", "pool": "avg"}
EVA |= {"pool_norm": "after"}
EVA_CLIP = PLAIN | {"rope": "eva", "mlp": "swiglu", "mlp_norm": True, "attn_norm": True}
EVA_CLIP |= {"proj_dim": 10, "proj_bias": True}


def timms(name: str, form: str, fields: dict[str, Any], **arguments: Any) -> Peer:
    """A model of timm's by its name, at toy size; `arguments` replace its own."""
    config = Config(**fields)
    shape = {"img_size": config.img_size, "num_classes": config.num_classes or config.proj_dim, "mlp_ratio": 2.0}
    model = timm.create_model(name, pretrained=False, **SIZES | shape | arguments)
    config = replace(config, mlp_ratio=model.blocks[0].mlp.fc2.weight.shape[1] / config.embed_dim)
    if config.pool == "map":
        hidden = model.attn_pool.mlp.fc1.weight.shape[0]
        config = replace(config, pool_heads=model.attn_pool.num_heads, pool_mlp_ratio=hidden / config.embed_dim)

    def answer(images: Tensor) -> Tensor:
        if config.pool_norm == "none":  # timm has no head for these towers, and returns tokens
            return model.forward_features(images)[:, config.num_prefix :].mean(1)
        return model(images)

    return Peer(form, config, model, answer, model.forward_features)


HF: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 4,
}
HF_TOWER = HF | {"intermediate_size": 48}
HF_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
HF_TEXT |= {"vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
HF_DINOV2 = HF | {"mlp_ratio": 2}
SQUARE: dict[str, Any] = {"img_size": (16, 16), "mlp_ratio": 2.0}


def hf_clip(kind: str, **fields: Any) -> Peer:
    config = Config(**CLIP | SQUARE | {"act": "quick_gelu"} | fields)
    vision = hf.CLIPVisionConfig(**HF_TOWER, projection_dim=10)
    if kind == "CLIPVisionModelWithProjection":
        model, form = hf.CLIPVisionModelWithProjection(vision), "hf_clip"
        answer, tower = (lambda images: model(images).image_embeds), model.vision_model
    elif kind == "CLIPVisionModel":
        model, form = hf.CLIPVisionModel(vision), "hf_clip_model"
        answer, tower = (lambda images: model(images).pooler_output), model
    else:
        both = hf.CLIPConfig(vision_config=vision.to_dict(), text_config=HF_TEXT, projection_dim=10, num_labels=7)
        model = getattr(hf, kind)(both)
        tower = model.vision_model
        if kind == "CLIPModel":
            form, answer = "hf_clip", lambda images: model.get_image_features(images).pooler_output
        else:
            form, answer = "hf_clip_classifier", lambda images: model(images).logits

    def tokens(images: Tensor) -> Tensor:
        last = tower(images).last_hidden_state
        return tower.post_layernorm(last) if config.pool_norm == "before" else last

    return Peer(form, config, model, answer, tokens)


def hf_siglip(kind: str, **fields: Any) -> Peer:
    config = Config(**SIGLIP | SQUARE | {"act": "gelu_tanh"} | fields)
    vision = hf.SiglipVisionConfig(**HF_TOWER)
    if kind == "SiglipVisionModel":
        model = hf.SiglipVisionModel(vision)
        return Peer(
            "hf_siglip_model",
            config,
            model,
            lambda images: model(images).pooler_output,
            lambda images: model(images).last_hidden_state,
        )
    both = hf.SiglipConfig(vision_config=vision.to_dict(), text_config=HF_TEXT, num_labels=7)
    model = getattr(hf, kind)(both)
    tokens = lambda images: model.vision_model(images).last_hidden_state  # noqa: E731
    if kind == "SiglipModel":
        return Peer("hf_siglip", config, model, lambda images: model.get_image_features(images).pooler_output, tokens)
    return Peer("hf_siglip_classifier", config, model, lambda images: model(images).logits, tokens)


def hf_dinov2(kind: str, arguments: dict[str, Any], **fields: Any) -> Peer:
    config = Config(**DINOV2 | SQUARE | fields)
    settings = getattr(hf, f"{kind.partition('Model')[0].partition('For')[0]}Config")
    model = getattr(hf, kind)(settings(**HF_DINOV2, num_labels=7, **arguments))
    if arguments:
        config = replace(
            config, mlp_ratio=model.state_dict()["encoder.layer.0.mlp.down_proj.weight"].shape[1] / config.embed_dim
        )
    name = "hf_dinov2_with_registers" if "Registers" in kind else "hf_dinov2"
    if kind.endswith("Model"):
        name = f"{name}_model"
        answer, trunk = (lambda images: model(images).pooler_output), model
    else:
        answer, trunk = (lambda images: model(images).logits), getattr(model, name.removeprefix("hf_"))
    return Peer(f"{name}_v5", config, model, answer, lambda images: trunk(images).last_hidden_state, name)


def hf_dinov3(*, gated: bool) -> Peer:
    config = Config(**DINOV3 | SQUARE | {"mlp": "swiglu" if gated else "mlp"})
    # Its gate is a SiLU in the models that are published, whose config says so; the class's default is GELU.
    act = {"use_gated_mlp": True, "hidden_act": "silu"} if gated else {}
    model = hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**HF_TOWER, num_register_tokens=4, **act))
    return Peer(
        "hf_dinov3_v5",
        config,
        model,
        lambda images: model(images).pooler_output,
        lambda images: model(images).last_hidden_state,
        "hf_dinov3",
    )


def open_clips(act: str, layer_scale: float | None) -> Peer:
    open_clip = pytest.importorskip("open_clip")
    config = Config(**CLIP | SQUARE | {"proj_dim": 10, "act": act, "layer_scale": layer_scale})
    layer = {"gelu": nn.GELU, "quick_gelu": open_clip.transformer.QuickGELU}[act]
    model = open_clip.transformer.VisionTransformer(
        16, 4, 24, 2, 3, 2.0, ls_init_value=layer_scale, output_dim=10, act_layer=layer, output_tokens=True
    )

    def tokens(images: Tensor) -> Tensor:
        return model.ln_post(model.transformer(model._embeds(images)))

    return Peer("open_clip", config, model, lambda images: model(images)[0], tokens)


GAP = {"pool": "avg"}
REGISTERS = {"reg_tokens": 4, "pos_embed_prefix": "class"}
GATED = {"mlp": "swiglu"}
# timm scales rotary positions to a reference grid, which the Perception Encoder has not: here it is the model's own.
NATIVE = {"ref_feat_shape": (4, 6)}
PEERS: dict[str, Callable[[], Peer]] = {
    "timm CLIP": partial(timms, "vit_base_patch16_clip_224", "timm_clip", CLIP | {"proj_dim": 10}),
    "timm CLIP, quick": partial(
        timms, "vit_base_patch16_clip_quickgelu_224", "timm_clip", CLIP | {"proj_dim": 10, "act": "quick_gelu"}
    ),
    "timm CLIP, fine-tuned": partial(timms, "vit_base_patch16_clip_224", "timm", CLIP | {"num_classes": 7}),
    "timm DINOv2": partial(timms, "vit_small_patch14_dinov2", "timm", DINOV2),
    "timm DINOv2, registers": partial(
        timms, "vit_small_patch14_reg4_dinov2", "timm", DINOV2 | {"reg_tokens": 4, "pos_embed_prefix": False}
    ),
    "timm DINOv2, giant": partial(timms, "vit_giant_patch14_dinov2", "timm", DINOV2 | GATED, mlp_ratio=4.0),
    "timm SigLIP": partial(timms, "vit_base_patch16_siglip_224", "timm", SIGLIP),
    "timm SigLIP 2, so400m": partial(
        timms, "vit_so400m_patch16_siglip_256", "timm", SIGLIP | {"act": "gelu_tanh"}, act_layer="gelu_tanh"
    ),
    "timm SigLIP, gap": partial(timms, "vit_base_patch16_siglip_gap_224", "timm", SIGLIP | GAP),
    "timm DINOv3": partial(timms, "vit_small_patch16_dinov3", "timm_eva", DINOV3, global_pool="token"),
    "timm DINOv3, gated": partial(
        timms, "vit_small_plus_patch16_dinov3", "timm_eva", DINOV3 | GATED, global_pool="token"
    ),
    "timm EUPE": partial(
        timms, "vit_tiny_patch16_dinov3_qkvb", "timm_eva", DINOV3 | {"qkv_bias": True}, global_pool="token"
    ),
    "timm PE core": partial(
        timms,
        "vit_pe_core_base_patch16_224",
        "timm_clip",
        PE | {"proj_dim": 10, "pool": "map"},
        attn_pool_mlp_ratio=1.0,
        **NATIVE,
    ),
    "timm PE core, giant": partial(
        timms,
        "vit_pe_core_gigantic_patch14_448",
        "timm_clip",
        PE | {"proj_dim": 10, "pool": "map", "class_token": False},
        **NATIVE,
    ),
    "timm PE lang": partial(
        timms,
        "vit_pe_lang_large_patch14_448",
        "timm_eva",
        PE | {"pool_norm": "none", "layer_scale": 0.1} | GAP,
        **NATIVE,
    ),
    "timm PE spatial": partial(
        timms, "vit_pe_spatial_tiny_patch16_512", "timm", PE | {"pool_norm": "none"} | GAP, **NATIVE
    ),
    "timm EVA-02, small": partial(timms, "eva02_small_patch14_336", "timm_eva", EVA),
    "timm EVA-02, large": partial(timms, "eva02_large_patch14_448", "timm_eva", EVA | {"mlp_norm": True}),
    "timm EVA-02, CLIP": partial(timms, "eva02_base_patch16_clip_224", "timm_eva_clip", EVA_CLIP),
    "transformers CLIP": partial(hf_clip, "CLIPModel", proj_dim=10),
    "transformers CLIP, projected": partial(hf_clip, "CLIPVisionModelWithProjection", proj_dim=10),
    "transformers CLIP, bare": partial(hf_clip, "CLIPVisionModel"),
    "transformers CLIP, classifier": partial(
        hf_clip, "CLIPForImageClassification", pool="avg", pool_norm="none", num_classes=7
    ),
    "transformers SigLIP": partial(hf_siglip, "SiglipModel"),
    "transformers SigLIP, bare": partial(hf_siglip, "SiglipVisionModel"),
    "transformers SigLIP, classifier": partial(hf_siglip, "SiglipForImageClassification", pool="avg", num_classes=7),
    "transformers DINOv2": partial(hf_dinov2, "Dinov2Model", {}),
    "transformers DINOv2, giant": partial(hf_dinov2, "Dinov2Model", {"use_swiglu_ffn": True}, mlp="swiglu"),
    "transformers DINOv2, classifier": partial(
        hf_dinov2, "Dinov2ForImageClassification", {}, pool="token_avg", num_classes=7
    ),
    "transformers DINOv2, registers": partial(hf_dinov2, "Dinov2WithRegistersModel", {}, **REGISTERS),
    "transformers DINOv2, registers, classifier": partial(
        hf_dinov2, "Dinov2WithRegistersForImageClassification", {}, pool="token_avg", num_classes=7, **REGISTERS
    ),
    "transformers DINOv3": partial(hf_dinov3, gated=False),
    "transformers DINOv3, gated": partial(hf_dinov3, gated=True),
    "open_clip": partial(open_clips, "gelu", None),
    "open_clip, quick and scaled": partial(open_clips, "quick_gelu", 0.1),
}
each_peer = pytest.mark.parametrize("name", PEERS)


def with_numbers(name: str) -> Peer:
    """A peer in evaluation mode, with no parameter that is 0 or 1, but for those that its published weights have so."""
    peer = PEERS[name]()
    randomise(peer.model)
    with torch.no_grad():
        for parameter_name, parameter in peer.model.named_parameters():
            projected = peer.form == "timm_clip" and parameter_name == "head.bias"
            if projected or (
                peer.form.startswith("hf_dinov3") and parameter_name.endswith(("q_proj.bias", "v_proj.bias"))
            ):
                parameter.zero_()
    peer.model.eval()
    return peer


def native(form: str, tensors: dict[str, Tensor], config: Config) -> VisionTransformer:
    model = build(config)
    model.load_state_dict(rules.to_native(FORMATS[form], dict(tensors)).tensors, assign=True)
    return model.to(model.dtype).eval()  # rotations are computed in the dtype of the weights


def give_exact_rotations(peer: Peer) -> None:
    """In float64, in place of those that a reference computes in float32."""
    config = peer.config
    turns = torch.stack([reference.rotation(patch, config) for patch in range(config.num_patches)])
    cos = turns.diagonal(dim1=-2, dim2=-1)
    sin = turns.tril(-1).sum(-2) - turns.triu(1).sum(-2)
    if peer.form.startswith("timm"):
        peer.model.rope.get_embed = lambda *_, **__: torch.cat([sin, cos], -1)
    else:
        peer.model.rope_embeddings.forward = lambda _: (cos, sin)


@each_peer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.inference_mode()
def test_answers_and_tokens_are_the_same(name: str, dtype: torch.dtype) -> None:
    peer = with_numbers(name)
    peer.model.to(dtype)
    ours = native(peer.form, peer.model.state_dict(), peer.config)
    if dtype == torch.float64 and peer.config.rope:
        give_exact_rotations(peer)
    images = images_for(ours, 2, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert relative_error(ours(images), peer.answer(images)) < tolerance
    assert relative_error(ours.forward_features(images).x, peer.tokens(images)) < tolerance


SMALL = {  # of each family a small one, with what timm's default has otherwise
    "vit_xsmall_patch16_clip_224": {},
    "vit_small_patch14_dinov2": {"img_size": 224},
    "vit_base_patch32_siglip_256": {},
    "vit_small_patch16_dinov3": {"global_pool": "token"},
    "vit_tiny_patch16_dinov3_qkvb": {"global_pool": "token"},
    "vit_pe_core_tiny_patch16_384": {},
    "eva02_tiny_patch14_336": {},
}


@pytest.mark.parametrize("name", SMALL)
@torch.inference_mode()
def test_answers_are_the_same_at_full_size(name: str) -> None:
    found = card(name)
    classes = found.config.num_classes or found.config.proj_dim
    theirs = timm.create_model(name, pretrained=False, num_classes=classes, **SMALL[name]).eval()
    randomise(theirs)
    if found.config.proj_dim:
        theirs.head.bias.zero_()
    config = replace(found.config, img_size=theirs.patch_embed.img_size)
    ours = native(format_of_timms(found), theirs.state_dict(), config)
    images = images_for(ours, 1)
    answer = theirs(images)
    assert relative_error(ours(images), answer) < 1e-5
    merged = ours(images, r=8)
    assert merged.isfinite().all()
    assert relative_error(merged, answer) > 1e-5


@each_peer
def test_state_dicts_come_back(name: str) -> None:
    peer = with_numbers(name)
    tensors = peer.model.state_dict()
    read = rules.to_native(FORMATS[peer.form], dict(tensors))
    back = rules.from_native(FORMATS[peer.form], read.tensors, peer.config)
    assert back.keys() <= tensors.keys()
    assert tensors.keys() - back.keys() <= read.left_out.keys()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in back.items() if key not in read.left_out)


@pytest.mark.parametrize("name", [name for name in PEERS if name.startswith("transformers")])
def test_files_of_transformers_come_back(name: str, tmp_path: Path) -> None:
    """Its files have the names of version 4, and loaded again they make the model that was saved."""
    peer = with_numbers(name)
    peer.model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    form = find_format(tensors).name
    assert form == (peer.file or peer.form)
    read = rules.to_native(FORMATS[form], dict(tensors))
    in_memory = rules.to_native(FORMATS[peer.form], peer.model.state_dict())
    assert read.tensors.keys() == in_memory.tensors.keys()
    assert all(torch.equal(tensor, in_memory.tensors[key]) for key, tensor in read.tensors.items())
    back = rules.from_native(FORMATS[form], read.tensors, peer.config)
    assert tensors.keys() - back.keys() <= read.left_out.keys()
    assert back.keys() <= tensors.keys()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in back.items() if key not in read.left_out)


# -------------------------------------------------------------------------------------------- positions at another size


def positions(patches: int, prefix: int = 1) -> Tensor:
    return torch.randn(1, prefix + patches, 8, generator=torch.Generator().manual_seed(0))


def test_positions_of_dinov2_are_resampled_as_it_does() -> None:
    """facebookresearch/dinov2@7764ea0, models/vision_transformer.py, interpolate_pos_encoding: w0, h0 plus 0.1."""
    found = positions(37 * 37)
    grid = found[:, 1:].reshape(1, 37, 37, 8).permute(0, 3, 1, 2)
    for size in ((16, 16), (16, 24), (40, 50)):
        scale = [(length + 0.1) / 37 for length in size]
        expected = F.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=False)
        assert tuple(expected.shape[-2:]) == size
        ours = resample_positions(found, (37, 37), size, 1, FORMATS["dinov2"].resampling)
        assert torch.equal(ours[:, :1], found[:, :1])
        torch.testing.assert_close(ours[:, 1:], expected.permute(0, 2, 3, 1).flatten(1, 2), rtol=0, atol=1e-6)
        # With registers its offset is 0, and it antialiases.
        expected = F.interpolate(grid, size=size, mode="bicubic", antialias=True)
        ours = resample_positions(found, (37, 37), size, 1, FORMATS["dinov2_reg"].resampling)
        torch.testing.assert_close(ours[:, 1:], expected.permute(0, 2, 3, 1).flatten(1, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["vit_jax", "big_vision"])
def test_positions_of_jax_are_resampled_as_scipy_zooms(form: str) -> None:
    """google-research/vision_transformer, checkpoint.py, and big_vision, models/vit.py: zoom at order 1."""
    ndimage = importlib.import_module("scipy.ndimage")
    found = positions(14 * 14)
    for size in ((24, 24), (7, 10), (14, 20)):
        zoomed = ndimage.zoom(found[0, 1:].view(14, 14, 8).numpy(), (size[0] / 14, size[1] / 14, 1), order=1)
        ours = resample_positions(found, (14, 14), size, 1, FORMATS[form].resampling)
        torch.testing.assert_close(ours[0, 1:], torch.from_numpy(zoomed).flatten(0, 1), rtol=0, atol=1e-5)


def test_positions_of_open_clip_are_resampled_as_it_does() -> None:
    open_clip = pytest.importorskip("open_clip")
    peer = open_clips("gelu", None)
    found = positions(49)
    state = {"visual.positional_embedding": found[0].clone()}
    open_clip.model.resize_pos_embed(state, type("CLIP", (), {"visual": peer.model}))
    ours = resample_positions(found, (7, 7), (4, 4), 1, FORMATS["open_clip"].resampling)
    torch.testing.assert_close(ours[0], state["visual.positional_embedding"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_base_patch16_siglip_224"])
def test_positions_of_timm_are_resampled_as_it_does(name: str) -> None:
    prefix = 1 if "dinov2" in name else 0
    found = positions(49, prefix)
    theirs = timm.layers.resample_abs_pos_embed(found, new_size=[4, 6], old_size=[7, 7], num_prefix_tokens=prefix)
    ours = resample_positions(found, (7, 7), (4, 6), prefix, FORMATS["timm"].resampling)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in PEERS if name.startswith("transformers") and "DINOv3" not in name])
@torch.inference_mode()
def test_other_image_sizes_of_transformers(name: str) -> None:
    """interpolate_pos_encoding=True, which DINOv2 does unasked."""
    peer = with_numbers(name)
    found, patch = peer.config, peer.config.patch_size
    size = (2 * patch, 5 * patch)
    tensors = rules.to_native(FORMATS[peer.form], peer.model.state_dict()).tensors
    wanted = replace(found, img_size=size)
    tensors["pos_embed"] = resample_positions(
        tensors["pos_embed"], found.grid, wanted.grid, found.num_positions_prefix, FORMATS[peer.form].resampling
    )
    ours = build(wanted).eval()
    ours.load_state_dict(tensors)
    images = images_for(ours, 2)
    if "DINOv2" in name:
        answer = peer.answer(images)
    elif name.endswith(("CLIP", "SigLIP")):
        answer = peer.model.get_image_features(images, interpolate_pos_encoding=True).pooler_output
    else:
        output = peer.model(images, interpolate_pos_encoding=True)
        answer = next(
            getattr(output, kind) for kind in ("logits", "image_embeds", "pooler_output") if hasattr(output, kind)
        )
    assert relative_error(ours(images), answer) < 1e-5
