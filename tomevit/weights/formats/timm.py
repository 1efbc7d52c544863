"""timm's formats, whose names are ours or nearly so."""

from __future__ import annotations

from dataclasses import replace

from tomevit.weights.formats.common import (
    ENCODER,
    LAYER_SCALE,
    LAYER_SCALE_GAMMA,
    MASK_TOKEN,
    OPTIONS,
    VIT,
    VIT_HAS,
    same,
)
from tomevit.weights.rules import PRE_LOGITS, Format, Omission, Resampling, Rule, Signature

_ATTENTION_POOL = (
    *same("attn_pool.latent attn_pool.proj.* attn_pool.norm.* attn_pool.mlp.fc1.* attn_pool.mlp.fc2.*"),
    Rule("attn_pool.qkv.*", ("attn_pool.q.*", "attn_pool.kv.*"), shares=(1, 2)),
)

TIMM = Format(
    name="timm",
    title="timm's VisionTransformer (huggingface/pytorch-image-models, timm/models/vision_transformer.py)",
    rules=(*VIT, *LAYER_SCALE, *_ATTENTION_POOL),
    signatures=(
        Signature(
            has=VIT_HAS,
            lacks=("blocks.#.gamma_1", "blocks.#.ls1.gamma", "blocks.#.attn.q_bias", "decoder_embed.weight"),
            not_keys=("model", "model_ema"),  # as DeiT and MAE have it
        ),
        Signature(has=(*VIT_HAS, "blocks.#.ls1.gamma"), lacks=("mask_token",)),
    ),
    resampling=Resampling("bicubic", antialias=True),  # timm/layers/pos_embed.py, resample_abs_pos_embed
    omissions=(Omission("pre_logits.fc.*", PRE_LOGITS), Omission("mask_token", MASK_TOKEN)),
    folds_class_position=True,  # _convert_dinov2 there
)

TIMM_CLIP = replace(
    TIMM,
    name="timm_clip",
    title="timm's image towers of CLIP and Perception Encoder, in which the projection is a head with a bias of 0",
    rules=(Rule("proj.weight", "head.weight"), *(rule for rule in TIMM.rules if rule.native != "head.*")),
    signatures=(Signature(has=(*VIT_HAS, "norm_pre.weight", "head.weight"), lacks=("blocks.#.gamma_1",)),),
    omissions=(Omission("head.bias", "a projection has none", zero=True, like="proj.weight"),),
    always=("norm_pre.weight", "proj.weight"),
)

_FUSED = {"rope": "eva", "mlp_norm": False}  # EVA-02 Ti and S
_SPLIT = {"rope": "eva", "mlp_norm": True}  # EVA-02 B and L
TIMM_EVA = Format(
    name="timm_eva",
    title="timm's Eva: EVA-02, DINOv3, Perception Encoder (huggingface/pytorch-image-models, timm/models/eva.py)",
    rules=(
        *ENCODER,
        *OPTIONS,
        *LAYER_SCALE_GAMMA,
        *_ATTENTION_POOL,
        *same("blocks.#.mlp.fc2.* blocks.#.mlp.norm.* blocks.#.attn.norm.*"),
        Rule("blocks.#.attn.qkv.*", "blocks.#.attn.qkv.*", when={"rope": "pe"}),
        Rule("blocks.#.attn.qkv.weight", "blocks.#.attn.qkv.weight", when={"rope": "dinov3"}),
        Rule("blocks.#.attn.qkv.weight", "blocks.#.attn.qkv.weight", when=_FUSED),
        *(
            Rule("blocks.#.attn.qkv.bias", ("blocks.#.attn.q_bias", None, "blocks.#.attn.v_bias"), when=when)
            for when in ({"rope": "dinov3"}, _FUSED)
        ),
        Rule("blocks.#.attn.qkv.weight", tuple(f"blocks.#.attn.{x}_proj.weight" for x in "qkv"), when=_SPLIT),
        Rule("blocks.#.attn.qkv.bias", ("blocks.#.attn.q_proj.bias", None, "blocks.#.attn.v_proj.bias"), when=_SPLIT),
        *(
            Rule("blocks.#.mlp.fc1.*", ("blocks.#.mlp.fc1_g.*", "blocks.#.mlp.fc1_x.*"), when={"mlp": "swiglu"} | when)
            for when in ({"rope": "dinov3"}, _SPLIT)
        ),
        Rule("blocks.#.mlp.fc1.*", "blocks.#.mlp.fc1.*"),
    ),
    signatures=(
        Signature(has=(*VIT_HAS, "blocks.#.gamma_1", "reg_token"), lacks=("pos_embed", "blocks.#.attn.qkv.bias")),
        Signature(has=(*VIT_HAS, "blocks.#.gamma_1", "norm_pre.weight"), lacks=("blocks.#.attn.q_bias",)),
        Signature(has=(*VIT_HAS, "blocks.#.attn.q_bias", "blocks.#.mlp.fc1.weight"), lacks=("blocks.#.gamma_1",)),
        Signature(has=("patch_embed.proj.weight", "blocks.#.attn.q_proj.weight", "blocks.#.mlp.fc1_g.weight")),
    ),
    resampling=TIMM.resampling,
    omissions=(Omission("mask_token", MASK_TOKEN), Omission("lm_head.*", MASK_TOKEN)),
)

TIMM_EVA_CLIP = replace(
    TIMM_EVA,
    name="timm_eva_clip",
    title="timm's image towers of EVA-02's CLIP, in which the projection is a head",
    rules=(Rule("proj.*", "head.*"), *(rule for rule in TIMM_EVA.rules if rule.native != "head.*")),
    signatures=(
        Signature(
            has=(
                *("patch_embed.proj.weight", "head.weight"),
                "blocks.#.attn.q_proj.weight",
                "blocks.#.attn.norm.weight",
            )
        ),
    ),
    always=("blocks.#.attn.norm.weight", "proj.weight", "proj.bias"),
)
