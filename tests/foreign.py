"""Checkpoints of other projects: their key lists, written out here from their code, and files in their containers."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tomevit.config import Config

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """What shapes depend on."""

    dim: int
    depth: int
    heads: int
    patch: int
    positions: int  # prefix included
    hidden: int
    classes: int


def sizes(config: Config) -> Sizes:
    positions = config.num_tokens if config.pos_embed_prefix else config.num_patches
    hidden = int(config.embed_dim * config.mlp_ratio)
    return Sizes(
        config.embed_dim, config.depth, config.num_heads, config.patch_size, positions, hidden, config.num_classes
    )


def linear(name: str, outputs: int, inputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, dim: int) -> dict[str, Shape]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def conv(name: str, s: Sizes) -> dict[str, Shape]:
    return {f"{name}.weight": (s.dim, 3, s.patch, s.patch), f"{name}.bias": (s.dim,)}


def timm_blocks(name: str, dim: int, hidden: int, depth: int) -> dict[str, Shape]:
    out: dict[str, Shape] = {}
    for i in range(depth):
        b = f"{name}.{i}"
        out |= norm(f"{b}.norm1", dim) | linear(f"{b}.attn.qkv", 3 * dim, dim) | linear(f"{b}.attn.proj", dim, dim)
        out |= norm(f"{b}.norm2", dim) | linear(f"{b}.mlp.fc1", hidden, dim) | linear(f"{b}.mlp.fc2", dim, hidden)
    return out


def encoder(s: Sizes) -> dict[str, Shape]:
    """What timm 0.4.12, DeiT, MAE and ToMe's files all have."""
    start: dict[str, Shape] = {"cls_token": (1, 1, s.dim), "pos_embed": (1, s.positions, s.dim)}
    return start | conv("patch_embed.proj", s) | timm_blocks("blocks", s.dim, s.hidden, s.depth)


def deit(s: Sizes) -> dict[str, Shape]:
    return encoder(s) | norm("norm", s.dim) | linear("head", s.classes, s.dim)


def deit_distilled(s: Sizes) -> dict[str, Shape]:
    dist: dict[str, Shape] = {"dist_token": (1, 1, s.dim)}
    return deit(s) | dist | linear("head_dist", s.classes, s.dim)


def timm_in21k(s: Sizes) -> dict[str, Shape]:
    return deit(s) | linear("pre_logits.fc", s.dim, s.dim)


def deit3(s: Sizes) -> dict[str, Shape]:
    return deit(s) | {f"blocks.{i}.gamma_{k}": (s.dim,) for i in range(s.depth) for k in (1, 2)}


def timm_deit3(s: Sizes) -> dict[str, Shape]:
    return deit(s) | {f"blocks.{i}.ls{k}.gamma": (s.dim,) for i in range(s.depth) for k in (1, 2)}


def mae_finetuned(s: Sizes) -> dict[str, Shape]:
    return encoder(s) | norm("fc_norm", s.dim) | linear("head", s.classes, s.dim)


def mae_encoder(s: Sizes) -> dict[str, Shape]:
    return encoder(s) | norm("norm", s.dim)


def mae_full(s: Sizes, width: int = 16, depth: int = 8) -> dict[str, Shape]:
    pixels = 3 * s.patch**2
    decoder: dict[str, Shape] = {"mask_token": (1, 1, width), "decoder_pos_embed": (1, s.positions, width)}
    decoder |= linear("decoder_embed", width, s.dim) | timm_blocks("decoder_blocks", width, 4 * width, depth)
    return mae_encoder(s) | decoder | norm("decoder_norm", width) | linear("decoder_pred", pixels, width)


def encoder_layers(s: Sizes, layer: str, fc1: str, fc2: str, positions: Shape, head: str) -> dict[str, Shape]:
    out: dict[str, Shape] = {"class_token": (1, 1, s.dim), "encoder.pos_embedding": positions} | conv("conv_proj", s)
    for i in range(s.depth):
        b = f"encoder.layers.{layer}_{i}"
        out |= norm(f"{b}.ln_1", s.dim) | norm(f"{b}.ln_2", s.dim)
        out |= {f"{b}.self_attention.in_proj_weight": (3 * s.dim, s.dim)}
        out |= {f"{b}.self_attention.in_proj_bias": (3 * s.dim,)}
        out |= linear(f"{b}.self_attention.out_proj", s.dim, s.dim)
        out |= linear(f"{b}.mlp.{fc1}", s.hidden, s.dim) | linear(f"{b}.mlp.{fc2}", s.dim, s.hidden)
    return out | norm("encoder.ln", s.dim) | (linear(head, s.classes, s.dim) if s.classes else {})


def swag(s: Sizes) -> dict[str, Shape]:
    return encoder_layers(s, "layer", "linear_1", "linear_2", (s.positions, 1, s.dim), "head.layers.head")


def torchvision(s: Sizes) -> dict[str, Shape]:
    return encoder_layers(s, "encoder_layer", "0", "3", (1, s.positions, s.dim), "heads.head")


def torchvision_old(s: Sizes) -> dict[str, Shape]:
    return encoder_layers(s, "encoder_layer", "linear_1", "linear_2", (1, s.positions, s.dim), "heads.head")


def flax(s: Sizes, positions: str, norm2: str, attention: str, mlp: str) -> dict[str, Shape]:
    per_head = (s.heads, s.dim // s.heads)
    out: dict[str, Shape] = {
        "cls": (1, 1, s.dim),
        positions: (1, s.positions, s.dim),
        "embedding/kernel": (s.patch, s.patch, 3, s.dim),
        "embedding/bias": (s.dim,),
        "Transformer/encoder_norm/scale": (s.dim,),
        "Transformer/encoder_norm/bias": (s.dim,),
    }
    for i in range(s.depth):
        b = f"Transformer/encoderblock_{i}"
        for name in ("LayerNorm_0", norm2):
            out |= {f"{b}/{name}/scale": (s.dim,), f"{b}/{name}/bias": (s.dim,)}
        for name in ("query", "key", "value"):
            out |= {f"{b}/{attention}/{name}/kernel": (s.dim, *per_head), f"{b}/{attention}/{name}/bias": per_head}
        out |= {f"{b}/{attention}/out/kernel": (*per_head, s.dim), f"{b}/{attention}/out/bias": (s.dim,)}
        out |= {f"{b}/{mlp}/Dense_0/kernel": (s.dim, s.hidden), f"{b}/{mlp}/Dense_0/bias": (s.hidden,)}
        out |= {f"{b}/{mlp}/Dense_1/kernel": (s.hidden, s.dim), f"{b}/{mlp}/Dense_1/bias": (s.dim,)}
    return out | ({"head/kernel": (s.dim, s.classes), "head/bias": (s.classes,)} if s.classes else {})


def vit_jax(s: Sizes) -> dict[str, Shape]:
    positions = "Transformer/posembed_input/pos_embedding"
    return flax(s, positions, "LayerNorm_2", "MultiHeadDotProductAttention_1", "MlpBlock_3")


def vit_jax_in21k(s: Sizes) -> dict[str, Shape]:
    return vit_jax(s) | {"pre_logits/kernel": (s.dim, s.dim), "pre_logits/bias": (s.dim,)}


def big_vision(s: Sizes) -> dict[str, Shape]:
    return flax(s, "pos_embedding", "LayerNorm_1", "MultiHeadDotProductAttention_0", "MlpBlock_0")


def transformers(s: Sizes, prefix: str, *, v5: bool = False) -> dict[str, Shape]:
    out: dict[str, Shape] = {
        f"{prefix}embeddings.cls_token": (1, 1, s.dim),
        f"{prefix}embeddings.position_embeddings": (1, s.positions, s.dim),
    }
    out |= conv(f"{prefix}embeddings.patch_embeddings.projection", s) | norm(f"{prefix}layernorm", s.dim)
    for i in range(s.depth):
        b = f"{prefix}layers.{i}" if v5 else f"{prefix}encoder.layer.{i}"
        out |= norm(f"{b}.layernorm_before", s.dim) | norm(f"{b}.layernorm_after", s.dim)
        for short, long in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            out |= linear(f"{b}.attention.{short}" if v5 else f"{b}.attention.attention.{long}", s.dim, s.dim)
        out |= linear(f"{b}.attention.o_proj" if v5 else f"{b}.attention.output.dense", s.dim, s.dim)
        out |= linear(f"{b}.mlp.fc1" if v5 else f"{b}.intermediate.dense", s.hidden, s.dim)
        out |= linear(f"{b}.mlp.fc2" if v5 else f"{b}.output.dense", s.dim, s.hidden)
    return out


def hf_vit(s: Sizes) -> dict[str, Shape]:
    return transformers(s, "vit.") | linear("classifier", s.classes, s.dim)


def hf_vit_v5(s: Sizes) -> dict[str, Shape]:
    return transformers(s, "vit.", v5=True) | linear("classifier", s.classes, s.dim)


def hf_vit_model(s: Sizes) -> dict[str, Shape]:
    return transformers(s, "") | linear("pooler.dense", s.dim, s.dim)


def hf_vit_model_v5(s: Sizes) -> dict[str, Shape]:
    return transformers(s, "", v5=True) | linear("pooler.dense", s.dim, s.dim)


def hf_deit(s: Sizes, *, v5: bool = False) -> dict[str, Shape]:
    dist: dict[str, Shape] = {"deit.embeddings.distillation_token": (1, 1, s.dim)}
    heads = linear("cls_classifier", s.classes, s.dim) | linear("distillation_classifier", s.classes, s.dim)
    return transformers(s, "deit.", v5=v5) | dist | heads


def hf_deit_single(s: Sizes, *, v5: bool = False) -> dict[str, Shape]:
    dist: dict[str, Shape] = {"deit.embeddings.distillation_token": (1, 1, s.dim)}
    return transformers(s, "deit.", v5=v5) | dist | linear("classifier", s.classes, s.dim)


def hf_deit_single_v5(s: Sizes) -> dict[str, Shape]:
    return hf_deit_single(s, v5=True)


def hf_deit_v5(s: Sizes) -> dict[str, Shape]:
    return hf_deit(s, v5=True)


def hf_deit_model(s: Sizes, *, v5: bool = False) -> dict[str, Shape]:
    dist: dict[str, Shape] = {"embeddings.distillation_token": (1, 1, s.dim)}
    return transformers(s, "", v5=v5) | dist | linear("pooler.dense", s.dim, s.dim)


def hf_deit_model_v5(s: Sizes) -> dict[str, Shape]:
    return hf_deit_model(s, v5=True)


def hf_vit_mae(s: Sizes, *, v5: bool = False, width: int = 16) -> dict[str, Shape]:
    decoder: dict[str, Shape] = {
        "decoder.mask_token": (1, 1, width),
        "decoder.decoder_pos_embed": (1, s.positions, width),
    }
    for i in range(8):
        b = f"decoder.decoder_layers.{i}"
        decoder |= norm(f"{b}.layernorm_before", width) | norm(f"{b}.layernorm_after", width)
        decoder |= linear(f"{b}.intermediate.dense", 4 * width, width) | linear(f"{b}.output.dense", width, 4 * width)
    decoder |= linear("decoder.decoder_embed", width, s.dim) | norm("decoder.decoder_norm", width)
    return transformers(s, "vit.", v5=v5) | decoder | linear("decoder.decoder_pred", 3 * s.patch**2, width)


def hf_vit_mae_v5(s: Sizes) -> dict[str, Shape]:
    return hf_vit_mae(s, v5=True)


def bare_mae(s: Sizes) -> dict[str, Shape]:
    return transformers(s, "")


def bare_mae_v5(s: Sizes) -> dict[str, Shape]:
    return transformers(s, "", v5=True)


SMALL: dict[str, Any] = {"img_size": (32, 32), "patch_size": 8, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
NO_HEAD = SMALL | {"num_classes": 0}
POOLED = SMALL | {"pool": "avg", "pool_norm": "after"}
DIST = SMALL | {"dist_token": True}
SCALED = SMALL | {"layer_scale": 1e-6, "pos_embed_prefix": False}

#: Every format: the key list, the config (depth excepted), and what of the list our models have no place for.
FORMATS: dict[str, list[tuple[Callable[[Sizes], dict[str, Shape]], dict[str, Any], tuple[str, ...]]]] = {
    "timm": [
        (deit, SMALL, ()),
        (deit_distilled, DIST, ()),
        (timm_deit3, SCALED, ()),
        (mae_finetuned, POOLED, ()),
        (mae_encoder, NO_HEAD, ()),
        (timm_in21k, SMALL | {"num_classes": 0, "classes": 5}, ("pre_logits.", "head.")),
    ],
    "deit": [(deit, SMALL, ()), (deit_distilled, DIST, ())],
    "deit3": [(deit3, SCALED, ())],
    "mae": [(mae_finetuned, POOLED, ()), (mae_encoder, NO_HEAD, ()), (mae_full, NO_HEAD, ("decoder_", "mask_token"))],
    "swag": [(swag, NO_HEAD, ()), (swag, SMALL, ())],
    "torchvision": [(torchvision, SMALL, ())],
    "torchvision_linear": [(torchvision_old, SMALL, ())],
    "vit_jax": [
        (vit_jax, SMALL, ()),
        (vit_jax_in21k, SMALL | {"num_classes": 0, "classes": 5}, ("pre_logits/", "head/")),
    ],
    "big_vision": [(big_vision, SMALL, ())],
    "hf_vit": [(hf_vit, SMALL, ())],
    "hf_vit_v5": [(hf_vit_v5, SMALL, ())],
    "hf_vit_model": [(hf_vit_model, NO_HEAD, ("pooler.",))],
    "hf_vit_model_v5": [(hf_vit_model_v5, NO_HEAD, ("pooler.",))],
    "hf_deit": [(hf_deit, DIST, ())],
    "hf_deit_v5": [(hf_deit_v5, DIST, ())],
    "hf_deit_single": [(hf_deit_single, SMALL | {"reg_tokens": 1}, ())],
    "hf_deit_single_v5": [(hf_deit_single_v5, SMALL | {"reg_tokens": 1}, ())],
    "hf_deit_model": [(hf_deit_model, DIST | {"num_classes": 0}, ("pooler.",))],
    "hf_deit_model_v5": [(hf_deit_model_v5, DIST | {"num_classes": 0}, ("pooler.",))],
    "hf_vit_mae": [(hf_vit_mae, NO_HEAD, ("decoder.",))],
    "hf_vit_mae_v5": [(hf_vit_mae_v5, NO_HEAD, ("decoder.",))],
    "hf_vit_mae_model": [(bare_mae, NO_HEAD, ())],
    "hf_vit_mae_model_v5": [(bare_mae_v5, NO_HEAD, ())],
}


def cases() -> list[tuple[str, Callable[[Sizes], dict[str, Shape]], Config, Sizes, tuple[str, ...]]]:
    """Every format and family, at the depths of tiny to huge models."""
    out = []
    for name, families in FORMATS.items():
        for i, (keys, fields, omitted) in enumerate(families):
            for depth in (12, 24, 32) if i == 0 else (12,):
                plain = {field: value for field, value in fields.items() if field != "classes"}
                config = Config(depth=depth, **plain)
                s = sizes(config)
                out.append(
                    (name, keys, config, Sizes(**vars(s) | {"classes": fields.get("classes", s.classes)}), omitted)
                )
    return out


def fill(shapes: dict[str, Shape], *, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Noise at a scale that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in shapes.items():
        scale = (
            0.2
            if len(shape) == 1
            else 0.5
            if shape[0] == 1 or shape[1] == 1
            else (torch.Size(shape).numel() / max(shape)) ** -0.5
        )
        noise = torch.randn(shape, generator=generator).mul_(scale)
        centre = (
            1.0
            if name.endswith(
                (
                    "norm1.weight",
                    "norm2.weight",
                    "norm.weight",
                    "ln.weight",
                    "ln_1.weight",
                    "ln_2.weight",
                    "/scale",
                    "layernorm_before.weight",
                    "layernorm_after.weight",
                    "layernorm.weight",
                    "gamma_1",
                    "gamma_2",
                    ".gamma",
                )
            )
            else 0.0
        )
        out[name] = noise.add_(centre).to(dtype)
    return out


def write(path: Path, tensors: dict[str, Tensor], *, key: str = "", **beside: Any) -> Path:
    """A checkpoint file, in the container that its suffix says, under a key and with other things beside it."""
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({key: tensors, **beside} if key else tensors, path)
    return path


#: What DeiT's and MAE's training leaves beside the weights.
TRAINING = {
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": np.float64(0.1), "params": [0]}]},
    "lr_scheduler": {"last_epoch": 299},
    "epoch": 299,
    "args": Namespace(model="deit_small_patch16_224", lr=5e-4, output_dir="/checkpoint"),
    "max_accuracy": np.float64(79.86),
}
