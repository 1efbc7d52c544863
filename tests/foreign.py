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


class Zeros(tuple[int, ...]):
    """The shape of what is 0 in every file."""


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
    proj: int


def sizes(config: Config) -> Sizes:
    return Sizes(
        config.embed_dim,
        config.depth,
        config.num_heads,
        config.patch_size,
        config.num_positions,
        config.mlp_hidden,
        config.num_classes,
        config.proj_dim,
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


# ----------------------------------------------------------------------------- DINOv2, DINOv3, CLIP, SigLIP, PE, EVA-02


def without(shapes: dict[str, Shape], *parts: str) -> dict[str, Shape]:
    """Those whose names have none of some parts."""
    return {name: shape for name, shape in shapes.items() if not any(part in name for part in parts)}


def under(prefix: str, shapes: dict[str, Shape]) -> dict[str, Shape]:
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


def each_block(s: Sizes, name: str, shapes: dict[str, Shape]) -> dict[str, Shape]:
    return {f"{name}.{i}.{part}": shape for i in range(s.depth) for part, shape in shapes.items()}


def linear_head(s: Sizes, name: str = "head", inputs: int = 1) -> dict[str, Shape]:
    return linear(name, s.classes, inputs * s.dim) if s.classes else {}


def text_tower(start: str) -> dict[str, Shape]:
    return under(start, norm("encoder.layers.0.layer_norm1", 16) | {"embeddings.token_embedding.weight": (50, 16)})


def dinov2(s: Sizes) -> dict[str, Shape]:
    start: dict[str, Shape] = {"mask_token": (1, s.dim)}
    scales: dict[str, Shape] = {"ls1.gamma": (s.dim,), "ls2.gamma": (s.dim,)}
    return start | encoder(s) | norm("norm", s.dim) | each_block(s, "blocks", scales) | linear_head(s, inputs=2)


def gated(s: Sizes, fc1: tuple[str, ...], fc2: str) -> dict[str, Shape]:
    layers: dict[str, Shape] = {}
    for name in fc1:
        layers |= linear(f"mlp.{name}", 2 * s.hidden // len(fc1), s.dim)
    return each_block(s, "blocks", layers | linear(f"mlp.{fc2}", s.dim, s.hidden))


def dinov2_giant(s: Sizes) -> dict[str, Shape]:
    return without(dinov2(s), ".mlp.") | gated(s, ("w12",), "w3")


def dinov2_reg(s: Sizes) -> dict[str, Shape]:
    return dinov2(s) | {"register_tokens": (1, 4, s.dim)}


def timm_dinov2_reg(s: Sizes) -> dict[str, Shape]:
    return without(dinov2(s), "mask_token") | {"reg_token": (1, 4, s.dim)}


def timm_dinov2_giant(s: Sizes) -> dict[str, Shape]:
    return without(dinov2(s), "mask_token", ".mlp.") | gated(s, ("fc1",), "fc2")


def dinov3(s: Sizes) -> dict[str, Shape]:
    bias: dict[str, Shape] = {"attn.qkv.bias": Zeros((3 * s.dim,)), "attn.qkv.bias_mask": (3 * s.dim,)}
    start: dict[str, Shape] = {"storage_tokens": (1, 4, s.dim), "rope_embed.periods": (s.dim // s.heads // 4,)}
    shapes = without(dinov2(s), "pos_embed", "qkv.bias") | each_block(s, "blocks", bias)
    return start | shapes | norm("local_cls_norm", s.dim)


def dinov3_gated(s: Sizes) -> dict[str, Shape]:
    return without(dinov3(s), ".mlp.") | gated(s, ("w1", "w2"), "w3")


def timm_gammas(s: Sizes) -> dict[str, Shape]:
    return each_block(s, "blocks", {"gamma_1": (s.dim,), "gamma_2": (s.dim,)})


def timm_dinov3(s: Sizes) -> dict[str, Shape]:
    start: dict[str, Shape] = {"reg_token": (1, 4, s.dim)}
    return start | without(encoder(s), "pos_embed", "qkv.bias") | norm("norm", s.dim) | timm_gammas(s) | linear_head(s)


def timm_eupe(s: Sizes) -> dict[str, Shape]:
    return timm_dinov3(s) | each_block(s, "blocks", {"attn.q_bias": (s.dim,), "attn.v_bias": (s.dim,)})


def timm_dinov3_gated(s: Sizes) -> dict[str, Shape]:
    return without(timm_dinov3(s), ".mlp.") | gated(s, ("fc1_g", "fc1_x"), "fc2")


def eva02_small(s: Sizes) -> dict[str, Shape]:
    biases: dict[str, Shape] = {"attn.q_bias": (s.dim,), "attn.v_bias": (s.dim,)}
    shapes = without(encoder(s), ".mlp.", "qkv.bias") | each_block(s, "blocks", biases) | gated(s, ("w12",), "w3")
    return shapes | norm("fc_norm", s.dim) | linear_head(s) | {"rope.freqs_cos": (16, s.dim // s.heads)}


def eva02(s: Sizes) -> dict[str, Shape]:
    layers: dict[str, Shape] = {f"attn.{part}_proj.weight": (s.dim, s.dim) for part in "qkv"}
    shapes = without(eva02_small(s), ".mlp.", "qkv.") | gated(s, ("w1", "w2"), "w3")
    return shapes | each_block(s, "blocks", layers | norm("mlp.ffn_ln", s.hidden))


def timm_eva02_small(s: Sizes) -> dict[str, Shape]:
    return without(eva02_small(s), ".mlp.", "rope.") | gated(s, ("fc1",), "fc2")


def timm_eva02(s: Sizes) -> dict[str, Shape]:
    layers: dict[str, Shape] = {f"attn.{part}_proj.weight": (s.dim, s.dim) for part in "qkv"}
    layers |= {"attn.q_proj.bias": (s.dim,), "attn.v_proj.bias": (s.dim,)}
    shapes = without(eva02_small(s), ".mlp.", "rope.", "qkv.", "q_bias", "v_bias") | gated(s, ("fc1_g", "fc1_x"), "fc2")
    return shapes | each_block(s, "blocks", layers | norm("mlp.norm", s.hidden))


def eva02_clip(s: Sizes) -> dict[str, Shape]:
    shapes = without(eva02(s), "fc_norm") | norm("norm", s.dim) | linear("head", s.proj, s.dim)
    return shapes | each_block(s, "blocks", norm("attn.inner_attn_ln", s.dim))


def timm_eva02_clip(s: Sizes) -> dict[str, Shape]:
    shapes = without(timm_eva02(s), "fc_norm") | norm("norm", s.dim) | linear("head", s.proj, s.dim)
    return shapes | each_block(s, "blocks", norm("attn.norm", s.dim))


def timm_clip_finetuned(s: Sizes) -> dict[str, Shape]:
    return without(encoder(s), "patch_embed.proj.bias") | norm("norm_pre", s.dim) | norm("norm", s.dim) | linear_head(s)


def timm_clip(s: Sizes) -> dict[str, Shape]:
    return timm_clip_finetuned(s) | {"head.weight": (s.proj, s.dim), "head.bias": Zeros((s.proj,))}


def timm_attention_pool(s: Sizes) -> dict[str, Shape]:
    out: dict[str, Shape] = {"latent": (1, 1, s.dim)} | linear("q", s.dim, s.dim) | linear("kv", 2 * s.dim, s.dim)
    out |= linear("proj", s.dim, s.dim) | norm("norm", s.dim)
    return under("attn_pool.", out | linear("mlp.fc1", s.hidden, s.dim) | linear("mlp.fc2", s.dim, s.hidden))


def timm_siglip(s: Sizes) -> dict[str, Shape]:
    return without(encoder(s), "cls_token") | norm("norm", s.dim) | timm_attention_pool(s)


def timm_pe_core(s: Sizes) -> dict[str, Shape]:
    return timm_clip(s) | timm_attention_pool(s)


def timm_pe_lang(s: Sizes) -> dict[str, Shape]:
    return without(encoder(s), "patch_embed.proj.bias") | norm("norm_pre", s.dim) | timm_gammas(s)


def open_clip(s: Sizes) -> dict[str, Shape]:
    out: dict[str, Shape] = {
        "class_embedding": (s.dim,),
        "positional_embedding": (s.positions, s.dim),
        "conv1.weight": (s.dim, 3, s.patch, s.patch),
        "proj": (s.dim, s.proj),
    }
    block: dict[str, Shape] = {"attn.in_proj_weight": (3 * s.dim, s.dim), "attn.in_proj_bias": (3 * s.dim,)}
    block |= linear("attn.out_proj", s.dim, s.dim) | norm("ln_1", s.dim) | norm("ln_2", s.dim)
    block |= linear("mlp.c_fc", s.hidden, s.dim) | linear("mlp.c_proj", s.dim, s.hidden)
    return out | norm("ln_pre", s.dim) | norm("ln_post", s.dim) | each_block(s, "transformer.resblocks", block)


def pe_core(s: Sizes) -> dict[str, Shape]:
    pool: dict[str, Shape] = {"probe": (1, 1, s.dim)} | norm("layernorm", s.dim) | linear("attn.out_proj", s.dim, s.dim)
    pool |= {"attn.in_proj_weight": (3 * s.dim, s.dim), "attn.in_proj_bias": (3 * s.dim,)}
    pool |= linear("mlp.c_fc", s.hidden, s.dim) | linear("mlp.c_proj", s.dim, s.hidden)
    return open_clip(s) | under("attn_pool.", pool)


def pe_lang(s: Sizes) -> dict[str, Shape]:
    scales: dict[str, Shape] = {"ls_1.gamma": (s.dim,), "ls_2.gamma": (s.dim,)}
    return {
        name: shape for name, shape in open_clip(s).items() if name != "proj" and "ln_post" not in name
    } | each_block(s, "transformer.resblocks", scales)


def hf_tower(s: Sizes, start: str) -> dict[str, Shape]:
    layer = norm("layer_norm1", s.dim) | norm("layer_norm2", s.dim)
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= linear(f"self_attn.{part}", s.dim, s.dim)
    layer |= linear("mlp.fc1", s.hidden, s.dim) | linear("mlp.fc2", s.dim, s.hidden)
    out = each_block(s, "encoder.layers", layer) | norm("post_layernorm", s.dim)
    return under(start, out | {"embeddings.position_embedding.weight": (s.positions, s.dim)})


def hf_clip_model(s: Sizes, start: str = "") -> dict[str, Shape]:
    out: dict[str, Shape] = {
        "embeddings.class_embedding": (s.dim,),
        "embeddings.patch_embedding.weight": (s.dim, 3, s.patch, s.patch),
    }
    return hf_tower(s, start) | under(start, out | norm("pre_layrnorm", s.dim))


def hf_clip(s: Sizes) -> dict[str, Shape]:
    beside: dict[str, Shape] = {"text_projection.weight": (s.proj, 16), "logit_scale": ()}
    towers = hf_clip_model(s, "vision_model.") | text_tower("text_model.")
    return towers | beside | {"visual_projection.weight": (s.proj, s.dim)}


def hf_clip_classifier(s: Sizes) -> dict[str, Shape]:
    return hf_clip_model(s, "vision_model.") | linear("classifier", s.classes, s.dim)


def hf_siglip_model(s: Sizes, start: str = "") -> dict[str, Shape]:
    pool: dict[str, Shape] = {
        "probe": (1, 1, s.dim),
        "attention.in_proj_weight": (3 * s.dim, s.dim),
        "attention.in_proj_bias": (3 * s.dim,),
    }
    pool |= linear("attention.out_proj", s.dim, s.dim) | norm("layernorm", s.dim)
    pool |= linear("mlp.fc1", s.hidden, s.dim) | linear("mlp.fc2", s.dim, s.hidden)
    return hf_tower(s, start) | under(start, conv("embeddings.patch_embedding", s) | under("head.", pool))


def hf_siglip(s: Sizes) -> dict[str, Shape]:
    beside: dict[str, Shape] = {"logit_scale": (1,), "logit_bias": (1,)}
    return hf_siglip_model(s, "vision_model.") | text_tower("text_model.") | beside


def hf_siglip_classifier(s: Sizes) -> dict[str, Shape]:
    return hf_siglip_model(s, "vision_model.") | linear("classifier", s.classes, s.dim)


def hf_dinov2_any(s: Sizes, start: str, *, v5: bool, registers: bool) -> dict[str, Shape]:
    embeddings: dict[str, Shape] = {
        "cls_token": (1, 1, s.dim),
        "mask_token": (1, s.dim),
        "position_embeddings": (1, s.positions, s.dim),
    }
    embeddings |= {"register_tokens": (1, 4, s.dim)} if registers else {}
    layer: dict[str, Shape] = {f"layer_scale{i}.lambda1": (s.dim,) for i in (1, 2)}
    layer |= norm("norm1", s.dim) | norm("norm2", s.dim)
    for short, long in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        layer |= linear(f"attention.{short}" if v5 else f"attention.attention.{long}", s.dim, s.dim)
    layer |= linear("attention.o_proj" if v5 else "attention.output.dense", s.dim, s.dim)
    layer |= linear("mlp.fc1", s.hidden, s.dim) | linear("mlp.fc2", s.dim, s.hidden)
    out = under("embeddings.", embeddings | conv("patch_embeddings.projection", s))
    out |= each_block(s, "encoder.layer", layer) | norm("layernorm", s.dim)
    return under(start, out) | linear_head(s, "classifier", 2)


def hf_dinov2(s: Sizes) -> dict[str, Shape]:
    return hf_dinov2_any(s, "dinov2.", v5=False, registers=False)


def hf_dinov2_v5(s: Sizes) -> dict[str, Shape]:
    return hf_dinov2_any(s, "dinov2.", v5=True, registers=False)


def hf_dinov2_model(s: Sizes) -> dict[str, Shape]:
    return hf_dinov2_any(s, "", v5=False, registers=False)


def hf_dinov2_model_v5(s: Sizes) -> dict[str, Shape]:
    return hf_dinov2_any(s, "", v5=True, registers=False)


def hf_dinov2_reg(s: Sizes) -> dict[str, Shape]:
    return hf_dinov2_any(s, "dinov2_with_registers.", v5=False, registers=True)


def hf_dinov2_reg_v5(s: Sizes) -> dict[str, Shape]:
    return hf_dinov2_any(s, "dinov2_with_registers.", v5=True, registers=True)


def hf_dinov2_reg_model(s: Sizes) -> dict[str, Shape]:
    return hf_dinov2_any(s, "", v5=False, registers=True)


def hf_dinov2_reg_model_v5(s: Sizes) -> dict[str, Shape]:
    return hf_dinov2_any(s, "", v5=True, registers=True)


def hf_dinov2_giant(s: Sizes) -> dict[str, Shape]:
    layer = linear("mlp.weights_in", 2 * s.hidden, s.dim) | linear("mlp.weights_out", s.dim, s.hidden)
    return without(hf_dinov2_model(s), ".mlp.") | each_block(s, "encoder.layer", layer)


def hf_dinov2_giant_v5(s: Sizes) -> dict[str, Shape]:
    layer = linear("mlp.gate_proj", s.hidden, s.dim) | linear("mlp.up_proj", s.hidden, s.dim)
    layer |= linear("mlp.down_proj", s.dim, s.hidden)
    return without(hf_dinov2_model_v5(s), ".mlp.") | each_block(s, "encoder.layer", layer)


def hf_dinov3(s: Sizes, block: str = "layer") -> dict[str, Shape]:
    embeddings: dict[str, Shape] = {
        "cls_token": (1, 1, s.dim),
        "mask_token": (1, 1, s.dim),
        "register_tokens": (1, 4, s.dim),
    }
    layer: dict[str, Shape] = {f"layer_scale{i}.lambda1": (s.dim,) for i in (1, 2)}
    layer |= norm("norm1", s.dim) | norm("norm2", s.dim) | linear("attention.o_proj", s.dim, s.dim)
    layer |= {f"attention.{part}_proj.weight": (s.dim, s.dim) for part in "qkv"}
    layer |= {f"attention.{part}_proj.bias": Zeros((s.dim,)) for part in "qv"}
    layer |= linear("mlp.up_proj", s.hidden, s.dim) | linear("mlp.down_proj", s.dim, s.hidden)
    out = under("embeddings.", embeddings | conv("patch_embeddings", s))
    return out | each_block(s, block, layer) | norm("norm", s.dim)


def hf_dinov3_v5(s: Sizes) -> dict[str, Shape]:
    return hf_dinov3(s, "model.layer")


def hf_dinov3_gated(s: Sizes) -> dict[str, Shape]:
    return hf_dinov3(s) | each_block(s, "layer", linear("mlp.gate_proj", s.hidden, s.dim))


def big_vision_siglip(s: Sizes) -> dict[str, Shape]:
    per_head = (s.heads, s.dim // s.heads)
    attention, mlp = "MultiHeadDotProductAttention_0", "MlpBlock_0"
    pool: dict[str, Shape] = {"probe": (1, 1, s.dim), "LayerNorm_0/scale": (s.dim,), "LayerNorm_0/bias": (s.dim,)}
    for part in ("query", "key", "value"):
        pool |= {f"{attention}/{part}/kernel": (s.dim, *per_head), f"{attention}/{part}/bias": per_head}
    pool |= {f"{attention}/out/kernel": (*per_head, s.dim), f"{attention}/out/bias": (s.dim,)}
    pool |= {f"{mlp}/Dense_0/kernel": (s.dim, s.hidden), f"{mlp}/Dense_0/bias": (s.hidden,)}
    pool |= {f"{mlp}/Dense_1/kernel": (s.hidden, s.dim), f"{mlp}/Dense_1/bias": (s.dim,)}
    return {name: shape for name, shape in big_vision(s).items() if name != "cls"} | under("MAPHead_0/", pool)


SMALL: dict[str, Any] = {"img_size": (32, 32), "patch_size": 8, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
NO_HEAD = SMALL | {"num_classes": 0}
POOLED = SMALL | {"pool": "avg", "pool_norm": "after"}
DIST = SMALL | {"dist_token": True}
SCALED = SMALL | {"layer_scale": 1e-6, "pos_embed_prefix": False}
BESIDE_MEAN = SMALL | {"layer_scale": 1.0, "pool": "token_avg"}
DINOV2 = NO_HEAD | {"layer_scale": 1.0}
GIANT = DINOV2 | {"mlp": "swiglu"}
REGISTERS = {"reg_tokens": 4, "pos_embed_prefix": "class"}
DINOV3 = NO_HEAD | {"layer_scale": 1e-5, "reg_tokens": 4, "pos_embed": "none", "rope": "dinov3"}
DINOV3 |= {"norm_eps": 1e-5, "qkv_bias": False}
EVA02 = POOLED | {"rope": "eva", "mlp": "swiglu"}
EVA02_LARGE = EVA02 | {"mlp_norm": True}
CLIP = NO_HEAD | {"pre_norm": True, "norm_eps": 1e-5, "proj_dim": 10}
EVA02_CLIP = NO_HEAD | {"rope": "eva", "mlp": "swiglu", "mlp_norm": True, "attn_norm": True}
EVA02_CLIP |= {"proj_dim": 10, "proj_bias": True}
CLIP_CLASSIFIER = SMALL | {"pre_norm": True, "norm_eps": 1e-5}
SIGLIP = NO_HEAD | {"class_token": False, "pool": "map"}
PE_CORE = CLIP | {"rope": "pe", "pool": "map", "pool_heads": 8}
PE_LANG = CLIP | {"rope": "pe", "pool": "avg", "pool_norm": "none", "proj_dim": 0, "layer_scale": 0.1}
TEXT = ("text_model.", "text_projection.", "logit_")
DINOV3_BESIDE = ("mask_token", "rope_embed.", "local_cls_norm.", *(f"blocks.{i}.attn.qkv.bias_mask" for i in range(32)))

#: Every format: the key list, the config (depth excepted), and what of the list our models have no place for.
FORMATS: dict[str, list[tuple[Callable[[Sizes], dict[str, Shape]], dict[str, Any], tuple[str, ...]]]] = {
    "timm": [
        (deit, SMALL, ()),
        (deit_distilled, DIST, ()),
        (timm_deit3, SCALED, ()),
        (mae_finetuned, POOLED, ()),
        (mae_encoder, NO_HEAD, ()),
        (timm_in21k, SMALL | {"num_classes": 0, "classes": 5}, ("pre_logits.", "head.")),
        (timm_clip_finetuned, CLIP_CLASSIFIER, ()),
        (timm_dinov2_reg, DINOV2 | {"reg_tokens": 4, "pos_embed_prefix": False}, ()),
        (timm_dinov2_giant, GIANT, ()),
        (timm_siglip, SIGLIP, ()),
    ],
    "timm_clip": [(timm_clip, CLIP, ()), (timm_pe_core, PE_CORE, ())],
    "timm_eva": [
        (timm_dinov3, DINOV3, ()),
        (timm_dinov3_gated, DINOV3 | {"mlp": "swiglu"}, ()),
        (timm_pe_lang, PE_LANG, ()),
        (timm_eupe, DINOV3 | {"qkv_bias": True}, ()),
        (timm_eva02_small, EVA02, ()),
        (timm_eva02, EVA02_LARGE, ()),
    ],
    "timm_eva_clip": [(timm_eva02_clip, EVA02_CLIP, ())],
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
    "big_vision": [(big_vision, SMALL, ()), (big_vision_siglip, SIGLIP, ())],
    "dinov2": [(dinov2, DINOV2, ("mask_token",)), (dinov2_giant, GIANT, ("mask_token",))],
    "dinov2_reg": [(dinov2_reg, DINOV2 | REGISTERS, ("mask_token",))],
    "dinov3": [(dinov3, DINOV3, DINOV3_BESIDE), (dinov3_gated, DINOV3 | {"mlp": "swiglu"}, DINOV3_BESIDE)],
    "eva02": [(eva02, EVA02_LARGE, ("rope.",))],
    "eva02_clip": [(eva02_clip, EVA02_CLIP, ("rope.",))],
    "eva02_small": [(eva02_small, EVA02, ("rope.",))],
    "open_clip": [(open_clip, CLIP, ()), (pe_core, PE_CORE, ()), (pe_lang, PE_LANG, ())],
    "hf_clip": [(hf_clip, CLIP, TEXT)],
    "hf_clip_classifier": [
        (hf_clip_classifier, CLIP_CLASSIFIER | {"pool": "avg", "pool_norm": "none"}, ("vision_model.post_layernorm.",))
    ],
    "hf_clip_model": [(hf_clip_model, CLIP | {"proj_dim": 0}, ())],
    "hf_siglip": [(hf_siglip, SIGLIP, TEXT)],
    "hf_siglip_model": [(hf_siglip_model, SIGLIP, ())],
    "hf_siglip_classifier": [
        (hf_siglip_classifier, SMALL | {"class_token": False, "pool": "avg"}, ("vision_model.head.",))
    ],
    "hf_dinov2": [(hf_dinov2, BESIDE_MEAN, ("dinov2.embeddings.mask",))],
    "hf_dinov2_v5": [(hf_dinov2_v5, BESIDE_MEAN, ("dinov2.embeddings.mask",))],
    "hf_dinov2_model": [
        (hf_dinov2_model, DINOV2, ("embeddings.mask",)),
        (hf_dinov2_giant, GIANT, ("embeddings.mask",)),
    ],
    "hf_dinov2_model_v5": [
        (hf_dinov2_model_v5, DINOV2, ("embeddings.mask",)),
        (hf_dinov2_giant_v5, GIANT, ("embeddings.mask",)),
    ],
    "hf_dinov2_with_registers": [(hf_dinov2_reg, BESIDE_MEAN | REGISTERS, ("dinov2_with_registers.embeddings.mask",))],
    "hf_dinov2_with_registers_v5": [
        (hf_dinov2_reg_v5, BESIDE_MEAN | REGISTERS, ("dinov2_with_registers.embeddings.mask",))
    ],
    "hf_dinov2_with_registers_model": [(hf_dinov2_reg_model, DINOV2 | REGISTERS, ("embeddings.mask",))],
    "hf_dinov2_with_registers_model_v5": [(hf_dinov2_reg_model_v5, DINOV2 | REGISTERS, ("embeddings.mask",))],
    "hf_dinov3": [
        (hf_dinov3, DINOV3, ("embeddings.mask",)),
        (hf_dinov3_gated, DINOV3 | {"mlp": "swiglu"}, ("embeddings.mask",)),
    ],
    "hf_dinov3_v5": [(hf_dinov3_v5, DINOV3, ("embeddings.mask",))],
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
        if isinstance(shape, Zeros) or not shape:
            out[name] = torch.zeros(shape, dtype=dtype)
            continue
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
