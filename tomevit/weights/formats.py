"""Checkpoint formats: one table each, read in both directions by `tomevit.weights.rules`.

A new format is one more table here. `#` is a block's number, `*` is weight or bias; where the source lays values out in
another way, an einops pattern says how.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from tomevit.weights.rules import PRE_LOGITS, Format, Omission, Resampling, Rule, Signature

BICUBIC = Resampling("bicubic")

# What a ViT with a class token and no options is, for projects that know nothing else.
PLAIN = {"act": "gelu", "norm_eps": 1e-6, "pool": "token", "pool_norm": "before", "pos_embed_prefix": True}

MASK_TOKEN = "it stands for hidden patches in pre-training"
DECODER = "the decoder reconstructs pixels in pre-training, and an encoder does without it"


def _same(names: str) -> tuple[Rule, ...]:
    return tuple(Rule(name, name) for name in names.split())


_SAME_NAMES = _same("""
cls_token dist_token reg_token pos_embed patch_embed.proj.* norm_pre.* norm.* fc_norm.* head.* head_dist.*
blocks.#.norm1.* blocks.#.attn.qkv.* blocks.#.attn.q_norm.* blocks.#.attn.k_norm.* blocks.#.attn.proj.*
blocks.#.norm2.* blocks.#.mlp.fc1.* blocks.#.mlp.fc2.*
""")
_LAYER_SCALE = _same("blocks.#.ls1.gamma blocks.#.ls2.gamma")
_TIMM_ATTENTION_POOL = (
    *_same("attn_pool.latent attn_pool.proj.* attn_pool.norm.* attn_pool.mlp.fc1.* attn_pool.mlp.fc2.*"),
    Rule("attn_pool.qkv.*", ("attn_pool.q.*", "attn_pool.kv.*"), shares=(1, 2)),
)
_TIMM_HAS = ("patch_embed.proj.weight", "blocks.#.attn.qkv.weight")

TIMM = Format(
    name="timm",
    title="timm's VisionTransformer (huggingface/pytorch-image-models, timm/models/vision_transformer.py)",
    rules=(*_SAME_NAMES, *_LAYER_SCALE, *_TIMM_ATTENTION_POOL),
    signatures=(
        Signature(
            has=_TIMM_HAS,
            lacks=("blocks.#.gamma_1", "blocks.#.ls1.gamma", "blocks.#.attn.q_bias", "decoder_embed.weight"),
            not_keys=("model", "model_ema"),  # as DeiT and MAE have it
        ),
        Signature(has=(*_TIMM_HAS, "blocks.#.ls1.gamma"), lacks=("mask_token",)),
    ),
    resampling=Resampling("bicubic", antialias=True),  # timm/layers/pos_embed.py, resample_abs_pos_embed
    omissions=(Omission("pre_logits.fc.*", PRE_LOGITS), Omission("mask_token", MASK_TOKEN)),
)

TIMM_CLIP = replace(
    TIMM,
    name="timm_clip",
    title="timm's image towers of CLIP and Perception Encoder, in which the projection is a head with a bias of 0",
    rules=(Rule("proj.weight", "head.weight"), *(rule for rule in TIMM.rules if rule.native != "head.*")),
    signatures=(Signature(has=(*_TIMM_HAS, "norm_pre.weight", "head.weight"), lacks=("blocks.#.gamma_1",)),),
    omissions=(Omission("head.bias", "a projection has none", zero=True, like="proj.weight"),),
)

_SPLIT = {"mlp_norm": True}  # EVA-02 B and L
TIMM_EVA = Format(
    name="timm_eva",
    title="timm's Eva: EVA-02, DINOv3, Perception Encoder (huggingface/pytorch-image-models, timm/models/eva.py)",
    rules=(
        *(rule for rule in _SAME_NAMES if "attn.qkv" not in rule.native and "mlp.fc1" not in rule.native),
        *(Rule(f"blocks.#.ls{i}.gamma", f"blocks.#.gamma_{i}") for i in (1, 2)),
        *_TIMM_ATTENTION_POOL,
        Rule("blocks.#.attn.qkv.*", "blocks.#.attn.qkv.*", when={"rope": "pe"}),
        Rule("blocks.#.attn.qkv.weight", "blocks.#.attn.qkv.weight", when={"mlp_norm": False}),
        Rule(
            "blocks.#.attn.qkv.bias",
            ("blocks.#.attn.q_bias", None, "blocks.#.attn.v_bias"),
            when={"rope": "eva", "mlp_norm": False},
        ),
        Rule("blocks.#.attn.qkv.weight", tuple(f"blocks.#.attn.{x}_proj.weight" for x in "qkv"), when=_SPLIT),
        Rule("blocks.#.attn.qkv.bias", ("blocks.#.attn.q_proj.bias", None, "blocks.#.attn.v_proj.bias"), when=_SPLIT),
        *(
            Rule("blocks.#.mlp.fc1.*", ("blocks.#.mlp.fc1_g.*", "blocks.#.mlp.fc1_x.*"), when={"mlp": "swiglu"} | when)
            for when in ({"rope": "dinov3"}, _SPLIT)
        ),
        Rule("blocks.#.mlp.fc1.*", "blocks.#.mlp.fc1.*"),
        Rule("blocks.#.mlp.norm.*", "blocks.#.mlp.norm.*"),
    ),
    signatures=(
        Signature(has=(*_TIMM_HAS, "blocks.#.gamma_1", "reg_token"), lacks=("pos_embed", "blocks.#.attn.qkv.bias")),
        Signature(has=(*_TIMM_HAS, "blocks.#.gamma_1", "norm_pre.weight"), lacks=("blocks.#.attn.q_bias",)),
        Signature(has=(*_TIMM_HAS, "blocks.#.attn.q_bias", "blocks.#.mlp.fc1.weight"), lacks=("blocks.#.gamma_1",)),
        Signature(has=("patch_embed.proj.weight", "blocks.#.attn.q_proj.weight", "blocks.#.mlp.fc1_g.weight")),
    ),
    resampling=Resampling("bicubic", antialias=True),
    omissions=(Omission("mask_token", MASK_TOKEN),),
)

DEIT = Format(
    name="deit",
    title="DeiT, plain and distilled (facebookresearch/deit, models.py)",
    rules=_SAME_NAMES,
    signatures=(
        Signature(
            has=(*_TIMM_HAS, "norm.weight", "head.**"),
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
    rules=(*_SAME_NAMES, *(Rule(f"blocks.#.ls{i}.gamma", f"blocks.#.gamma_{i}") for i in (1, 2))),
    signatures=(Signature(has=(*_TIMM_HAS, "blocks.#.gamma_1", "pos_embed"), lacks=("norm_pre.weight", "reg_token")),),
    resampling=BICUBIC,
    omissions=(Omission("mask_token", MASK_TOKEN),),
    variant_of="timm",  # timm reads it too
    fixed=PLAIN | {"pos_embed_prefix": False},
    container="torch:model",
)

MAE = Format(
    name="mae",
    title="MAE, pre-trained or fine-tuned (facebookresearch/mae, models_mae.py and models_vit.py)",
    rules=_SAME_NAMES,
    signatures=(
        Signature(has=(*_TIMM_HAS, "decoder_embed.weight")),
        Signature(has=(*_TIMM_HAS, "fc_norm.weight"), lacks=("blocks.#.ls1.gamma", "blocks.#.attn.q_bias")),
        Signature(
            has=(*_TIMM_HAS, "norm.weight"),
            lacks=("blocks.#.gamma_1", "blocks.#.ls1.gamma", "head.**"),
            keys=("model", "model_ema"),
        ),
    ),
    resampling=BICUBIC,  # util/pos_embed.py, interpolate_pos_embed
    omissions=(Omission("decoder_**", DECODER), Omission("mask_token", DECODER)),
    fixed={"act": "gelu", "norm_eps": 1e-6, "pos_embed_prefix": True},
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


def _flax(positions: str, norm2: str, attention: str, mlp: str) -> tuple[Rule, ...]:
    """The names that vit_jax and big_vision share."""
    pool, parts = "MAPHead_0/MultiHeadDotProductAttention_0", ("query", "key", "value")
    block = "Transformer/encoderblock_#"
    attn = f"{block}/{attention}"
    return (
        Rule("cls_token", "cls"),
        Rule("pos_embed", positions),
        Rule("patch_embed.proj.weight", "embedding/kernel", "h w i o -> o i h w"),
        Rule("patch_embed.proj.bias", "embedding/bias"),
        Rule("blocks.#.norm1.weight", f"{block}/LayerNorm_0/scale"),
        Rule("blocks.#.norm1.bias", f"{block}/LayerNorm_0/bias"),
        Rule("blocks.#.attn.qkv.weight", tuple(f"{attn}/{part}/kernel" for part in parts), "i heads k -> (heads k) i"),
        Rule("blocks.#.attn.qkv.bias", tuple(f"{attn}/{part}/bias" for part in parts), "heads k -> (heads k)"),
        Rule("blocks.#.attn.proj.weight", f"{attn}/out/kernel", "heads k o -> o (heads k)"),
        Rule("blocks.#.attn.proj.bias", f"{attn}/out/bias"),
        Rule("blocks.#.norm2.weight", f"{block}/{norm2}/scale"),
        Rule("blocks.#.norm2.bias", f"{block}/{norm2}/bias"),
        Rule("blocks.#.mlp.fc1.weight", f"{block}/{mlp}/Dense_0/kernel", "i o -> o i"),
        Rule("blocks.#.mlp.fc1.bias", f"{block}/{mlp}/Dense_0/bias"),
        Rule("blocks.#.mlp.fc2.weight", f"{block}/{mlp}/Dense_1/kernel", "i o -> o i"),
        Rule("blocks.#.mlp.fc2.bias", f"{block}/{mlp}/Dense_1/bias"),
        Rule("norm.weight", "Transformer/encoder_norm/scale"),
        Rule("norm.bias", "Transformer/encoder_norm/bias"),
        Rule("head.weight", "head/kernel", "i o -> o i"),
        Rule("head.bias", "head/bias"),
        Rule("attn_pool.latent", "MAPHead_0/probe"),
        Rule(
            "attn_pool.qkv.weight",
            tuple(f"{pool}/{part}/kernel" for part in parts),
            "i pool_heads k -> (pool_heads k) i",
        ),
        Rule("attn_pool.qkv.bias", tuple(f"{pool}/{part}/bias" for part in parts), "pool_heads k -> (pool_heads k)"),
        Rule("attn_pool.proj.weight", f"{pool}/out/kernel", "pool_heads k o -> o (pool_heads k)"),
        Rule("attn_pool.proj.bias", f"{pool}/out/bias"),
        Rule("attn_pool.norm.weight", "MAPHead_0/LayerNorm_0/scale"),
        Rule("attn_pool.norm.bias", "MAPHead_0/LayerNorm_0/bias"),
        *(
            Rule(f"attn_pool.mlp.fc{i + 1}.weight", f"MAPHead_0/MlpBlock_0/Dense_{i}/kernel", "i o -> o i")
            for i in (0, 1)
        ),
        *(Rule(f"attn_pool.mlp.fc{i + 1}.bias", f"MAPHead_0/MlpBlock_0/Dense_{i}/bias") for i in (0, 1)),
    )


VIT_JAX = Format(
    name="vit_jax",
    title="AugReg and the original ViT (google-research/vision_transformer, vit_jax/models_vit.py)",
    rules=_flax(
        "Transformer/posembed_input/pos_embedding", "LayerNorm_2", "MultiHeadDotProductAttention_1", "MlpBlock_3"
    ),
    signatures=(Signature(has=("embedding/kernel", "Transformer/posembed_input/pos_embedding")),),
    # scipy.ndimage.zoom at order 1, vit_jax/checkpoint.py; timm does without the alignment, with these files too.
    resampling=Resampling("bilinear", align_corners=True),
    omissions=(Omission("pre_logits/**", PRE_LOGITS),),
    fixed=PLAIN,
    num_heads="Transformer/encoderblock_#/MultiHeadDotProductAttention_1/query/kernel",
    container="npz",
)

BIG_VISION = replace(
    VIT_JAX,
    name="big_vision",
    title="big_vision's ViT (google-research/big_vision, models/vit.py)",
    rules=_flax("pos_embedding", "LayerNorm_1", "MultiHeadDotProductAttention_0", "MlpBlock_0"),
    signatures=(Signature(has=("embedding/kernel", "pos_embedding")),),
    fixed={"norm_eps": 1e-6, "pool_norm": "before"},
    num_heads="Transformer/encoderblock_#/MultiHeadDotProductAttention_0/query/kernel",
)


class _Layers(NamedTuple):
    """How transformers names a block: in its files, and since version 5 in a model's own state dict."""

    suffix: str
    block: str
    qkv: tuple[str, str, str]
    proj: str
    fc1: str
    fc2: str


_LAYERS = (
    _Layers(
        "",
        "encoder.layer.#",
        ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    _Layers(
        "_v5",
        "layers.#",
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attention.o_proj",
        "mlp.fc1",
        "mlp.fc2",
    ),
)
_DIST_TOKEN = "embeddings.distillation_token"
_DECODER = "decoder.decoder_embed.weight"
_CLASSIFIERS = ("classifier.**", "cls_classifier.**")


def _transformers(
    name: str,
    title: str,
    prefix: str,
    heads: tuple[Rule, ...] = (),
    *,
    dist_token: str | None = None,
    decoder: bool = False,
    bare_too: bool = True,
    variant_of: str | None = None,
) -> Iterator[Format]:
    """A model of transformers with what stands on it, and the bare model, whose names lack the prefix."""
    for layers in _LAYERS:
        for bare, start in (("", prefix), ("_model", ""))[: 1 + bare_too]:
            block = f"{start}{layers.block}"
            has: tuple[str, ...] = (f"{start}embeddings.cls_token", f"{block}.layernorm_before.weight")
            lacks: tuple[str, ...] = (f"{start}{_DIST_TOKEN}",)
            has, lacks = (has + lacks, ()) if dist_token else (has, lacks)
            signatures = [Signature(has, lacks)]
            if not bare:
                on_top = [_DECODER] if decoder else [rule.sources[0].replace("*", "**") for rule in heads]
                signatures = [Signature((*has, *on_top), lacks if decoder else (*lacks, _DECODER))]
                if bare_too:  # with the prefix, yet with nothing on top
                    signatures.append(Signature(has, (*lacks, _DECODER, *_CLASSIFIERS)))
            yield Format(
                name=f"{name}{bare}{layers.suffix}",
                title=title,
                rules=(
                    Rule("cls_token", f"{start}embeddings.cls_token"),
                    *((Rule(dist_token, f"{start}{_DIST_TOKEN}"),) if dist_token else ()),
                    Rule("pos_embed", f"{start}embeddings.position_embeddings"),
                    Rule("patch_embed.proj.*", f"{start}embeddings.patch_embeddings.projection.*"),
                    Rule("blocks.#.norm1.*", f"{block}.layernorm_before.*"),
                    Rule("blocks.#.attn.qkv.*", tuple(f"{block}.{part}.*" for part in layers.qkv)),
                    Rule("blocks.#.attn.proj.*", f"{block}.{layers.proj}.*"),
                    Rule("blocks.#.norm2.*", f"{block}.layernorm_after.*"),
                    Rule("blocks.#.mlp.fc1.*", f"{block}.{layers.fc1}.*"),
                    Rule("blocks.#.mlp.fc2.*", f"{block}.{layers.fc2}.*"),
                    Rule("norm.*", f"{start}layernorm.*"),
                    *(heads if not bare else ()),
                ),
                signatures=tuple(signatures),
                resampling=BICUBIC,  # interpolate_pos_encoding there
                omissions=(
                    Omission(f"{start}pooler.dense.*", PRE_LOGITS),
                    Omission(f"{start}embeddings.mask_token", MASK_TOKEN),
                    *((Omission("decoder.**", DECODER),) if decoder else ()),
                ),
                variant_of=variant_of or (name if bare or layers.suffix else None),
                fixed={"pool": "token", "pool_norm": "before", "pos_embed_prefix": True},
            )


# DINOv2 and DINOv3

DINOV2 = Format(
    name="dinov2",
    title="DINOv2 (facebookresearch/dinov2, dinov2/models/vision_transformer.py)",
    rules=(
        Rule("reg_token", "register_tokens"),
        *_SAME_NAMES,
        *_LAYER_SCALE,
        Rule("blocks.#.mlp.fc1.*", "blocks.#.mlp.w12.*"),
        Rule("blocks.#.mlp.fc2.*", "blocks.#.mlp.w3.*"),
    ),
    signatures=(Signature(has=(*_TIMM_HAS, "blocks.#.ls1.gamma", "mask_token"), lacks=("register_tokens",)),),
    resampling=Resampling("bicubic", offset=0.1),  # interpolate_pos_encoding there
    omissions=(Omission("mask_token", MASK_TOKEN),),
    fixed={"norm_eps": 1e-6, "pool_norm": "before"},
    beside_mean=True,
    container="torch",
)
DINOV2 = replace(
    DINOV2,
    rules=tuple(
        replace(rule, when={"mlp": "swiglu" if ".mlp.w" in rule.sources[0] else "mlp"})
        if ".mlp." in rule.native
        else rule
        for rule in DINOV2.rules
    ),
)
DINOV2_REG = replace(
    DINOV2,
    name="dinov2_reg",
    title="DINOv2 with registers, whose positions are resampled otherwise",
    signatures=(Signature(has=(*_TIMM_HAS, "blocks.#.ls1.gamma", "mask_token", "register_tokens")),),
    resampling=Resampling("bicubic", antialias=True),
    variant_of="dinov2",
)

NO_BIAS = "it is 0, and the model does without it"
ROTATIONS = "positions that are rotations are computed, not learned"
DINOV3 = Format(
    name="dinov3",
    title="DINOv3 (facebookresearch/dinov3, dinov3/models/vision_transformer.py)",
    rules=(
        Rule("reg_token", "storage_tokens"),
        *_same("cls_token patch_embed.proj.* norm.* head.* blocks.#.norm1.* blocks.#.norm2.*"),
        *_same("blocks.#.attn.qkv.weight blocks.#.attn.proj.*"),
        *_LAYER_SCALE,
        Rule("blocks.#.mlp.fc1.*", "blocks.#.mlp.fc1.*", when={"mlp": "mlp"}),
        Rule("blocks.#.mlp.fc2.*", "blocks.#.mlp.fc2.*", when={"mlp": "mlp"}),
        Rule("blocks.#.mlp.fc1.*", ("blocks.#.mlp.w1.*", "blocks.#.mlp.w2.*")),
        Rule("blocks.#.mlp.fc2.*", "blocks.#.mlp.w3.*"),
    ),
    signatures=(Signature(has=("patch_embed.proj.weight", "storage_tokens", "blocks.#.attn.qkv.weight")),),
    resampling=BICUBIC,  # there is nothing to resample
    omissions=(
        Omission("mask_token", MASK_TOKEN),
        Omission("blocks.#.attn.qkv.bias", NO_BIAS, zero=True, like="blocks.#.attn.qkv.weight"),
        Omission("blocks.#.attn.qkv.bias_mask", NO_BIAS),
        Omission("rope_embed.periods", ROTATIONS),
        Omission("local_cls_norm.*", "it norms the class tokens of small crops in pre-training"),
    ),
    fixed={"rope": "dinov3", "norm_eps": 1e-5, "pool_norm": "before"},
    beside_mean=True,
    container="torch",
)

# EVA-02


def _eva(attention: tuple[Rule, ...], fc1: str | tuple[str, ...], fc2: str) -> tuple[Rule, ...]:
    return (
        *(rule for rule in _SAME_NAMES if "attn.qkv" not in rule.native and "mlp." not in rule.native),
        *attention,
        Rule("blocks.#.attn.qkv.bias", ("blocks.#.attn.q_bias", None, "blocks.#.attn.v_bias")),
        Rule("blocks.#.mlp.fc1.*", fc1),
        Rule("blocks.#.mlp.norm.*", "blocks.#.mlp.ffn_ln.*"),
        Rule("blocks.#.mlp.fc2.*", fc2),
    )


EVA02 = Format(
    name="eva02",
    title="EVA-02 B and L (baaivision/EVA, EVA-02/asuka/modeling_finetune.py)",
    rules=_eva(
        (Rule("blocks.#.attn.qkv.weight", tuple(f"blocks.#.attn.{x}_proj.weight" for x in "qkv")),),
        ("blocks.#.mlp.w1.*", "blocks.#.mlp.w2.*"),
        "blocks.#.mlp.w3.*",
    ),
    signatures=(Signature(has=("patch_embed.proj.weight", "blocks.#.attn.q_proj.weight", "blocks.#.mlp.w1.weight")),),
    resampling=BICUBIC,
    omissions=(
        Omission("mask_token", MASK_TOKEN),
        Omission("lm_head.*", MASK_TOKEN),
        Omission("rope.freqs_**", ROTATIONS),
        Omission("blocks.#.attn.rope.freqs_**", ROTATIONS),
    ),
    fixed={"rope": "eva", "norm_eps": 1e-6},
    container="torch:module",
)
EVA02_SMALL = replace(
    EVA02,
    name="eva02_small",
    title="EVA-02 Ti and S, with fused layers",
    rules=_eva(
        _same("blocks.#.attn.qkv.weight"),
        "blocks.#.mlp.w12.*",
        "blocks.#.mlp.w3.*",
    ),
    signatures=(Signature(has=(*_TIMM_HAS, "blocks.#.attn.q_bias", "blocks.#.mlp.w12.weight")),),
    variant_of="eva02",
)

# CLIP and what is named like it

TEXT = "texts are encoded elsewhere"
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
    fixed={"norm_eps": 1e-5, "pre_norm": True, "num_classes": 0},
    container="torch",
)


def _hf_towers() -> Iterator[Format]:
    """The image towers of transformers' CLIP and SigLIP, with what stands beside them, and bare."""
    for bare, start in (("", "vision_model."), ("_model", "")):
        block = f"{start}encoder.layers.#"
        layers = (
            Rule("blocks.#.norm1.*", f"{block}.layer_norm1.*"),
            Rule("blocks.#.attn.qkv.*", tuple(f"{block}.self_attn.{x}_proj.*" for x in "qkv")),
            Rule("blocks.#.attn.proj.*", f"{block}.self_attn.out_proj.*"),
            Rule("blocks.#.norm2.*", f"{block}.layer_norm2.*"),
            Rule("blocks.#.mlp.fc1.*", f"{block}.mlp.fc1.*"),
            Rule("blocks.#.mlp.fc2.*", f"{block}.mlp.fc2.*"),
            Rule("norm.*", f"{start}post_layernorm.*"),
            Rule("pos_embed", f"{start}embeddings.position_embedding.weight", "n d -> 1 n d"),
        )
        omissions = (
            Omission(f"{start}embeddings.position_ids", "it counts from 0"),
            *(
                Omission(name, TEXT)
                for name in ("text_model.**", "text_projection.weight", "logit_scale", "logit_bias")
            ),
        )
        clip = Format(
            name=f"hf_clip{bare}",
            title="transformers' CLIP (huggingface/transformers, models/clip/modeling_clip.py)",
            rules=(
                *layers,
                Rule("cls_token", f"{start}embeddings.class_embedding", "d -> 1 1 d"),
                Rule("patch_embed.proj.weight", f"{start}embeddings.patch_embedding.weight"),
                Rule("norm_pre.*", f"{start}pre_layrnorm.*"),
                *(
                    _same("")
                    if bare
                    else (Rule("proj.weight", "visual_projection.weight"), Rule("head.*", "classifier.*"))
                ),
            ),
            signatures=(Signature(has=(f"{start}embeddings.class_embedding", f"{block}.self_attn.q_proj.weight")),),
            resampling=BICUBIC,
            omissions=omissions,
            variant_of="hf_clip" if bare else None,
            fixed={"pre_norm": True, "pool_norm": "before"},
        )
        yield clip
        images = (*layers, Rule("patch_embed.proj.*", f"{start}embeddings.patch_embedding.*"))
        has = (f"{start}embeddings.patch_embedding.bias", f"{block}.self_attn.q_proj.weight")
        lacks = (f"{start}embeddings.class_embedding", "classifier.weight")
        siglip = replace(
            clip,
            name=f"hf_siglip{bare}",
            title="transformers' SigLIP, of fixed size SigLIP 2 too (huggingface/transformers, models/siglip)",
            rules=(
                *images,
                Rule("attn_pool.latent", f"{start}head.probe"),
                Rule("attn_pool.qkv.*", f"{start}head.attention.in_proj_*"),
                Rule("attn_pool.proj.*", f"{start}head.attention.out_proj.*"),
                Rule("attn_pool.norm.*", f"{start}head.layernorm.*"),
                Rule("attn_pool.mlp.fc1.*", f"{start}head.mlp.fc1.*"),
                Rule("attn_pool.mlp.fc2.*", f"{start}head.mlp.fc2.*"),
            ),
            signatures=(Signature(has=has, lacks=lacks),),
            variant_of="hf_siglip" if bare else None,
            fixed={"class_token": False, "pool_norm": "before", "num_classes": 0},
        )
        yield siglip
        if not bare:
            yield replace(
                siglip,
                name="hf_siglip_classifier",
                title="transformers' SiglipForImageClassification, which reads the mean patch",
                rules=(*images, Rule("head.*", "classifier.*")),
                signatures=(Signature(has=(*has, "classifier.weight"), lacks=lacks[:1]),),
                omissions=(*omissions, Omission(f"{start}head.**", "the classifier reads the mean patch instead")),
                variant_of="hf_siglip",
                fixed={"class_token": False, "pool_norm": "before", "pool": "avg"},
            )


def _hf_dinov2() -> Iterator[Format]:
    """The library transformers' DINOv2, without registers and with; as in its files, and as in a model of version 5."""
    for kind, registers in (("dinov2", False), ("dinov2_with_registers", True)):
        for suffix, attention, proj, gate in (
            ("", "attention.attention.query attention.attention.key attention.attention.value", "output.dense", None),
            ("_v5", "attention.q_proj attention.k_proj attention.v_proj", "o_proj", "mlp.gate_proj.* mlp.up_proj.*"),
        ):
            for bare, start in (("", f"{kind}."), ("_model", "")):
                block, embeddings = f"{start}encoder.layer.#", f"{start}embeddings"
                gated, out = (
                    ((f"{block}.mlp.weights_in.*",), "weights_out")
                    if gate is None
                    else (tuple(f"{block}.{name}" for name in gate.split()), "down_proj")
                )
                name = f"hf_{kind}"
                register = f"{embeddings}.register_tokens"
                yield Format(
                    name=f"{name}{bare}{suffix}",
                    title=f"transformers' DINOv2 (huggingface/transformers, models/{kind})",
                    rules=(
                        Rule("cls_token", f"{embeddings}.cls_token"),
                        Rule("reg_token", register),
                        Rule("pos_embed", f"{embeddings}.position_embeddings"),
                        Rule("patch_embed.proj.*", f"{embeddings}.patch_embeddings.projection.*"),
                        Rule("blocks.#.norm1.*", f"{block}.norm1.*"),
                        Rule("blocks.#.attn.qkv.*", tuple(f"{block}.{part}.*" for part in attention.split())),
                        Rule("blocks.#.attn.proj.*", f"{block}.attention.{proj}.*"),
                        Rule("blocks.#.ls1.gamma", f"{block}.layer_scale1.lambda1"),
                        Rule("blocks.#.norm2.*", f"{block}.norm2.*"),
                        Rule("blocks.#.mlp.fc1.*", f"{block}.mlp.fc1.*", when={"mlp": "mlp"}),
                        Rule("blocks.#.mlp.fc2.*", f"{block}.mlp.fc2.*", when={"mlp": "mlp"}),
                        Rule("blocks.#.mlp.fc1.*", gated),
                        Rule("blocks.#.mlp.fc2.*", f"{block}.mlp.{out}.*"),
                        Rule("blocks.#.ls2.gamma", f"{block}.layer_scale2.lambda1"),
                        Rule("norm.*", f"{start}layernorm.*"),
                        *(() if bare else (Rule("head.*", "classifier.*"),)),
                    ),
                    signatures=(
                        Signature(
                            has=(
                                f"{embeddings}.cls_token",
                                f"{block}.layer_scale1.lambda1",
                                f"{block}.{attention.split()[0]}.weight",
                                *((register,) if registers else ()),
                            ),
                            lacks=() if registers else (register,),
                        ),
                    ),
                    resampling=Resampling("bicubic", antialias=registers),  # interpolate_pos_encoding there
                    omissions=(Omission(f"{embeddings}.mask_token", MASK_TOKEN),),
                    variant_of=None if not bare and not suffix and not registers else "hf_dinov2",
                    fixed={"pool_norm": "before", "norm_eps": 1e-6},
                    beside_mean=True,
                )


def _hf_dinov3() -> Iterator[Format]:
    """The library transformers' DINOv3: its files, and a model of version 5, in which the blocks lie one deeper."""
    for suffix, block in (("", "layer.#"), ("_v5", "model.layer.#")):
        yield Format(
            name=f"hf_dinov3{suffix}",
            title="transformers' DINOv3 (huggingface/transformers, models/dinov3_vit)",
            rules=(
                Rule("cls_token", "embeddings.cls_token"),
                Rule("reg_token", "embeddings.register_tokens"),
                Rule("patch_embed.proj.*", "embeddings.patch_embeddings.*"),
                Rule("blocks.#.norm1.*", f"{block}.norm1.*"),
                Rule("blocks.#.attn.qkv.weight", tuple(f"{block}.attention.{x}_proj.weight" for x in "qkv")),
                Rule("blocks.#.attn.proj.*", f"{block}.attention.o_proj.*"),
                Rule("blocks.#.ls1.gamma", f"{block}.layer_scale1.lambda1"),
                Rule("blocks.#.norm2.*", f"{block}.norm2.*"),
                Rule(
                    "blocks.#.mlp.fc1.*", (f"{block}.mlp.gate_proj.*", f"{block}.mlp.up_proj.*"), when={"mlp": "swiglu"}
                ),
                Rule("blocks.#.mlp.fc1.*", f"{block}.mlp.up_proj.*"),
                Rule("blocks.#.mlp.fc2.*", f"{block}.mlp.down_proj.*"),
                Rule("blocks.#.ls2.gamma", f"{block}.layer_scale2.lambda1"),
                Rule("norm.*", "norm.*"),
            ),
            signatures=(Signature(has=("embeddings.register_tokens", f"{block}.attention.o_proj.weight")),),
            resampling=BICUBIC,  # there is nothing to resample
            omissions=(
                Omission("embeddings.mask_token", MASK_TOKEN),
                *(
                    Omission(f"{block}.attention.{x}_proj.bias", NO_BIAS, zero=True, like="blocks.#.attn.proj.weight")
                    for x in "qv"
                ),
            ),
            variant_of="hf_dinov3" if suffix else None,
            fixed={"rope": "dinov3", "norm_eps": 1e-5, "pool_norm": "before", "num_classes": 0},
        )


FORMATS = {
    table.name: table
    for table in (
        *(TIMM, TIMM_CLIP, TIMM_EVA, DEIT, DEIT3, MAE, SWAG, TORCHVISION, TORCHVISION_LINEAR, VIT_JAX, BIG_VISION),
        *(DINOV2, DINOV2_REG, DINOV3, EVA02, EVA02_SMALL, OPEN_CLIP),
        *_transformers(
            "hf_vit",
            "transformers' ViT (huggingface/transformers, models/vit/modeling_vit.py)",
            "vit.",
            (Rule("head.*", "classifier.*"),),
        ),
        *_transformers(
            "hf_deit",
            "transformers' DeiT (huggingface/transformers, models/deit/modeling_deit.py)",
            "deit.",
            (Rule("head.*", "cls_classifier.*"), Rule("head_dist.*", "distillation_classifier.*")),
            dist_token="dist_token",
        ),
        *_transformers(
            "hf_deit_single",
            "transformers' DeiTForImageClassification: one head, to which the distillation token is a register",
            "deit.",
            (Rule("head.*", "classifier.*"),),
            dist_token="reg_token",
            bare_too=False,
            variant_of="hf_deit",
        ),
        *_transformers(
            "hf_vit_mae",
            "transformers' ViTMAE (huggingface/transformers, models/vit_mae/modeling_vit_mae.py)",
            "vit.",
            decoder=True,
        ),
        *_hf_towers(),
        *_hf_dinov2(),
        *_hf_dinov3(),
    )
}
