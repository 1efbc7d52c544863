"""The formats of the projects that the families come from, in torch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tomevit.config import Config
from tomevit.weights.formats.common import (
    BICUBIC,
    DECODER,
    ENCODER,
    LAYER_SCALE,
    LAYER_SCALE_GAMMA,
    MASK_TOKEN,
    NO_BIAS,
    PLAIN,
    QKV,
    ROTATIONS,
    VIT,
    VIT_HAS,
    same,
)
from tomevit.weights.rules import Format, Omission, Resampling, Rule, Signature

DEIT = Format(
    name="deit",
    title="DeiT, plain and distilled (facebookresearch/deit, models.py)",
    rules=VIT,
    signatures=(
        Signature(
            has=(*VIT_HAS, "norm.weight", "head.**"),
            lacks=("blocks.#.gamma_1", "blocks.#.ls1.gamma", "decoder_embed.weight", "fc_norm.weight"),
            keys=("model", "model_ema"),
        ),
    ),
    resampling=BICUBIC,  # main.py, interpolation of a checkpoint to fine-tune
    omissions=(Omission("mask_token", MASK_TOKEN),),
    fixed=PLAIN,
    container="torch:model",
)

DEIT3 = Format(
    name="deit3",
    title="DeiT III (facebookresearch/deit, models_v2.py)",
    rules=(*VIT, *LAYER_SCALE_GAMMA),
    signatures=(Signature(has=(*VIT_HAS, "blocks.#.gamma_1", "pos_embed"), lacks=("norm_pre.weight", "reg_token")),),
    resampling=BICUBIC,
    omissions=(Omission("mask_token", MASK_TOKEN),),
    variant_of="timm",  # timm reads it too
    fixed=PLAIN | {"pos_embed_prefix": False},
    container="torch:model",
)

MAE = Format(
    name="mae",
    title="MAE, pre-trained or fine-tuned (facebookresearch/mae, models_mae.py and models_vit.py)",
    rules=VIT,
    signatures=(
        Signature(has=(*VIT_HAS, "decoder_embed.weight")),
        Signature(has=(*VIT_HAS, "fc_norm.weight"), lacks=("blocks.#.ls1.gamma", "blocks.#.attn.q_bias")),
        Signature(
            has=(*VIT_HAS, "norm.weight"),
            lacks=("blocks.#.gamma_1", "blocks.#.ls1.gamma", "head.**"),
            keys=("model", "model_ema"),
        ),
    ),
    resampling=BICUBIC,  # util/pos_embed.py, interpolate_pos_embed
    omissions=(Omission("decoder_**", DECODER), Omission("mask_token", DECODER)),
    fixed={"act": "gelu", "norm_eps": 1e-6, "pos_embed_prefix": True, "dist_token": False},
    container="torch:model",
)


def _encoder_layers(layer: str, fc1: str, fc2: str, head: str, positions: str | None) -> tuple[Rule, ...]:
    """The names that SWAG and torchvision share."""
    block = f"encoder.layers.{layer}_#"
    return (
        Rule("cls_token", "class_token"),
        Rule("patch_embed.proj.*", "conv_proj.*"),
        Rule("pos_embed", "encoder.pos_embedding", positions),
        Rule("blocks.#.norm1.*", f"{block}.ln_1.*"),
        Rule("blocks.#.attn.qkv.*", f"{block}.self_attention.in_proj_*"),
        Rule("blocks.#.attn.proj.*", f"{block}.self_attention.out_proj.*"),
        Rule("blocks.#.norm2.*", f"{block}.ln_2.*"),
        Rule("blocks.#.mlp.fc1.*", f"{block}.mlp.{fc1}.*"),
        Rule("blocks.#.mlp.fc2.*", f"{block}.mlp.{fc2}.*"),
        Rule("norm.*", "encoder.ln.*"),
        Rule("head.*", f"{head}.*"),
    )


SWAG = Format(
    name="swag",
    title="SWAG (facebookresearch/SWAG, models/vision_transformer.py)",
    rules=_encoder_layers("layer", "linear_1", "linear_2", "head.layers.head", "n 1 d -> 1 n d"),
    signatures=(Signature(has=("conv_proj.weight", "encoder.pos_embedding", "encoder.layers.layer_#.ln_1.weight")),),
    resampling=Resampling("bicubic", align_corners=True),  # load_state_dict there
    fixed=PLAIN,
    container="torch",
)

TORCHVISION = Format(
    name="torchvision",
    title="torchvision's VisionTransformer (pytorch/vision, torchvision/models/vision_transformer.py)",
    rules=_encoder_layers("encoder_layer", "0", "3", "heads.head", None),
    signatures=(Signature(has=("conv_proj.weight", "encoder.layers.encoder_layer_#.mlp.0.weight")),),
    resampling=Resampling("bicubic", align_corners=True),  # interpolate_embeddings there
    fixed=PLAIN,
    container="torch",
)

TORCHVISION_LINEAR = replace(
    TORCHVISION,
    name="torchvision_linear",
    title="torchvision's VisionTransformer before its MLP layers were renamed (pytorch/vision, pull request 6053)",
    rules=_encoder_layers("encoder_layer", "linear_1", "linear_2", "heads.head", None),
    signatures=(Signature(has=("conv_proj.weight", "encoder.layers.encoder_layer_#.mlp.linear_1.weight")),),
    variant_of="torchvision",
)


# DINOv2 and DINOv3

_DINOV2_HAS = (*VIT_HAS, "blocks.#.ls1.gamma", "mask_token", "pos_embed")
DINOV2 = Format(
    name="dinov2",
    title="DINOv2 (facebookresearch/dinov2, dinov2/models/vision_transformer.py)",
    rules=(
        *ENCODER,
        *QKV,
        *LAYER_SCALE,
        Rule("reg_token", "register_tokens"),
        *(Rule(f"blocks.#.mlp.fc{i}.*", f"blocks.#.mlp.fc{i}.*", when={"mlp": "mlp"}) for i in (1, 2)),
        Rule("blocks.#.mlp.fc1.*", "blocks.#.mlp.w12.*"),
        Rule("blocks.#.mlp.fc2.*", "blocks.#.mlp.w3.*"),
    ),
    signatures=(Signature(has=_DINOV2_HAS, lacks=("register_tokens",)),),
    resampling=Resampling("bicubic", offset=0.1),  # interpolate_pos_encoding there
    omissions=(Omission("mask_token", MASK_TOKEN, like="cls_token", layout="1 1 d -> 1 d"),),
    fixed={"norm_eps": 1e-6, "pool_norm": "before", "num_positions_prefix": 1},
    always=("blocks.#.ls1.gamma",),
    beside_mean=True,
    container="torch",
)
DINOV2_REG = replace(
    DINOV2,
    name="dinov2_reg",
    title="DINOv2 with registers, whose positions are resampled otherwise",
    signatures=(Signature(has=(*_DINOV2_HAS, "register_tokens")),),
    resampling=Resampling("bicubic", antialias=True),
    variant_of="dinov2",
    always=("reg_token", "blocks.#.ls1.gamma"),
)


def _periods(_: Tensor, config: Config) -> Tensor:
    """Those by which the code divides angles, as it computes them; published files have them rounded to bfloat16."""
    quarter = config.head_dim // 4
    return 100.0 ** (2 * torch.arange(quarter, dtype=torch.float32, device="cpu") / (2 * quarter))


def _masked_bias(weight: Tensor, config: Config) -> Tensor | None:
    """What is 0 in all published files, the mask too, but for 7B, which has no bias."""
    return None if config.embed_dim == _DINOV3_7B else torch.zeros_like(weight[:, 0])


def _local_norm(norm: Tensor, config: Config) -> Tensor | None:
    """A norm that 7B's code asks for, and uses in training alone: as the other one is."""
    return norm if config.embed_dim == _DINOV3_7B else None


_DINOV3_7B = 4096  # channels, which no other size has
DINOV3 = Format(
    name="dinov3",
    title="DINOv3 (facebookresearch/dinov3, dinov3/models/vision_transformer.py)",
    rules=(
        *ENCODER,
        *same("blocks.#.attn.qkv.weight"),
        *LAYER_SCALE,
        Rule("reg_token", "storage_tokens"),
        *(Rule(f"blocks.#.mlp.fc{i}.*", f"blocks.#.mlp.fc{i}.*", when={"mlp": "mlp"}) for i in (1, 2)),
        Rule("blocks.#.mlp.fc1.*", ("blocks.#.mlp.w1.*", "blocks.#.mlp.w2.*")),
        Rule("blocks.#.mlp.fc2.*", "blocks.#.mlp.w3.*"),
    ),
    signatures=(Signature(has=("patch_embed.proj.weight", "storage_tokens", "blocks.#.attn.qkv.weight")),),
    resampling=BICUBIC,  # there is nothing to resample
    omissions=(
        Omission("mask_token", MASK_TOKEN, like="cls_token", layout="1 1 d -> 1 d"),
        *(
            Omission(
                f"blocks.#.attn.qkv.{bias}", NO_BIAS, zero=zero, like="blocks.#.attn.qkv.weight", value=_masked_bias
            )
            for bias, zero in (("bias", True), ("bias_mask", False))
        ),
        Omission("rope_embed.periods", ROTATIONS, like="cls_token", value=_periods),
        Omission(
            "local_cls_norm.*",
            "it norms the class tokens of small crops in pre-training",
            like="norm.*",
            value=_local_norm,
        ),
    ),
    fixed={"rope": "dinov3", "pos_embed": "none", "norm_eps": 1e-5, "pool_norm": "before", "qkv_bias": False},
    always=("reg_token", "blocks.#.ls1.gamma"),
    beside_mean=True,
    container="torch",
)

# EVA-02


def _eva(attention: Rule, fc1: str | tuple[str, ...]) -> tuple[Rule, ...]:
    """What the sizes of EVA-02 share, and what they name differently."""
    return (
        *ENCODER,
        attention,
        Rule("blocks.#.attn.qkv.bias", ("blocks.#.attn.q_bias", None, "blocks.#.attn.v_bias")),
        Rule("blocks.#.mlp.fc1.*", fc1),
        Rule("blocks.#.mlp.norm.*", "blocks.#.mlp.ffn_ln.*"),
        Rule("blocks.#.mlp.fc2.*", "blocks.#.mlp.w3.*"),
        *same("fc_norm.*"),
    )


EVA02 = Format(
    name="eva02",
    title="EVA-02 B and L (baaivision/EVA, EVA-02/asuka/modeling_finetune.py)",
    rules=_eva(
        Rule("blocks.#.attn.qkv.weight", tuple(f"blocks.#.attn.{x}_proj.weight" for x in "qkv")),
        ("blocks.#.mlp.w1.*", "blocks.#.mlp.w2.*"),
    ),
    signatures=(
        Signature(
            has=("patch_embed.proj.weight", "blocks.#.attn.q_proj.weight", "blocks.#.mlp.w1.weight"),
            lacks=("blocks.#.attn.inner_attn_ln.weight",),
        ),
    ),
    resampling=BICUBIC,
    omissions=(
        Omission("mask_token", MASK_TOKEN),
        Omission("lm_head.*", MASK_TOKEN),
        Omission("rope.freqs_**", ROTATIONS),
        Omission("blocks.#.attn.rope.freqs_**", ROTATIONS),
    ),
    fixed={"rope": "eva", "norm_eps": 1e-6, "mlp": "swiglu", "mlp_norm": True, "qkv_bias": True},
    container="torch:module",
)
EVA02_SMALL = replace(
    EVA02,
    name="eva02_small",
    title="EVA-02 Ti and S, with fused layers",
    rules=_eva(Rule("blocks.#.attn.qkv.weight", "blocks.#.attn.qkv.weight"), "blocks.#.mlp.w12.*"),
    signatures=(Signature(has=(*VIT_HAS, "blocks.#.attn.q_bias", "blocks.#.mlp.w12.weight")),),
    variant_of="eva02",
    fixed={**EVA02.fixed, "mlp_norm": False},
)
EVA02_CLIP = replace(
    EVA02,
    name="eva02_clip",
    title="EVA-02's CLIP B and L (baaivision/EVA, EVA-CLIP/rei/eva_clip/eva_vit_model.py)",
    rules=(
        Rule("proj.*", "head.*"),
        Rule("blocks.#.attn.norm.*", "blocks.#.attn.inner_attn_ln.*"),
        *(rule for rule in EVA02.rules if rule.native not in ("head.*", "fc_norm.*")),
    ),
    signatures=(Signature(has=(*EVA02.signatures[0].has, "blocks.#.attn.inner_attn_ln.weight")),),
    fixed={**EVA02.fixed, "attn_norm": True, "proj_bias": True, "num_classes": 0},
    container="torch",
)


OPEN_CLIP = Format(
    name="open_clip",
    title="CLIP and Perception Encoder (openai/CLIP; mlfoundations/open_clip; facebookresearch/perception_models)",
    rules=(
        Rule("cls_token", "class_embedding", "d -> 1 1 d"),
        Rule("pos_embed", "positional_embedding", "n d -> 1 n d"),
        Rule("patch_embed.proj.weight", "conv1.weight"),
        Rule("norm_pre.*", "ln_pre.*"),
        Rule("blocks.#.norm1.*", "transformer.resblocks.#.ln_1.*"),
        Rule("blocks.#.attn.qkv.*", "transformer.resblocks.#.attn.in_proj_*"),
        Rule("blocks.#.attn.proj.*", "transformer.resblocks.#.attn.out_proj.*"),
        Rule("blocks.#.ls1.gamma", "transformer.resblocks.#.ls_1.gamma"),
        Rule("blocks.#.norm2.*", "transformer.resblocks.#.ln_2.*"),
        Rule("blocks.#.mlp.fc1.*", "transformer.resblocks.#.mlp.c_fc.*"),
        Rule("blocks.#.mlp.fc2.*", "transformer.resblocks.#.mlp.c_proj.*"),
        Rule("blocks.#.ls2.gamma", "transformer.resblocks.#.ls_2.gamma"),
        Rule("norm.*", "ln_post.*"),
        Rule("attn_pool.latent", "attn_pool.probe"),
        Rule("attn_pool.qkv.*", "attn_pool.attn.in_proj_*"),
        Rule("attn_pool.proj.*", "attn_pool.attn.out_proj.*"),
        Rule("attn_pool.norm.*", "attn_pool.layernorm.*"),
        Rule("attn_pool.mlp.fc1.*", "attn_pool.mlp.c_fc.*"),
        Rule("attn_pool.mlp.fc2.*", "attn_pool.mlp.c_proj.*"),
        Rule("proj.weight", "proj", "d e -> e d"),
    ),
    signatures=(Signature(has=("conv1.weight", "ln_pre.weight", "transformer.resblocks.#.attn.in_proj_weight")),),
    resampling=Resampling("bicubic", antialias=True),  # open_clip/model.py, resize_pos_embed
    omissions=(Omission("rope.freqs", ROTATIONS),),
    fixed={"norm_eps": 1e-5, "pre_norm": True, "num_classes": 0, "qkv_bias": True},
    container="torch",
)
