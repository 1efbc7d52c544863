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

_TIMM_NAMES = """
cls_token dist_token reg_token pos_embed patch_embed.proj.* norm_pre.* norm.* fc_norm.* head.* head_dist.*
blocks.#.norm1.* blocks.#.attn.qkv.* blocks.#.attn.q_norm.* blocks.#.attn.k_norm.* blocks.#.attn.proj.*
blocks.#.norm2.* blocks.#.mlp.fc1.* blocks.#.mlp.fc2.*
"""
_SAME_NAMES = tuple(Rule(name, name) for name in _TIMM_NAMES.split())
_TIMM_HAS = ("patch_embed.proj.weight", "blocks.#.attn.qkv.weight")

TIMM = Format(
    name="timm",
    title="timm's VisionTransformer (huggingface/pytorch-image-models, timm/models/vision_transformer.py)",
    rules=(*_SAME_NAMES, *(Rule(name, name) for name in ("blocks.#.ls1.gamma", "blocks.#.ls2.gamma"))),
    signatures=(
        Signature(
            has=_TIMM_HAS,
            lacks=("blocks.#.gamma_1", "decoder_embed.weight"),
            not_keys=("model", "model_ema"),  # as DeiT and MAE have it
        ),
        Signature(has=(*_TIMM_HAS, "blocks.#.ls1.gamma")),
    ),
    resampling=Resampling("bicubic", antialias=True),  # timm/layers/pos_embed.py, resample_abs_pos_embed
    omissions=(Omission("pre_logits.fc.*", PRE_LOGITS), Omission("mask_token", MASK_TOKEN)),
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
    signatures=(Signature(has=(*_TIMM_HAS, "blocks.#.gamma_1")),),
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
        Signature(has=(*_TIMM_HAS, "fc_norm.weight"), lacks=("blocks.#.ls1.gamma",)),
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
    block = "Transformer/encoderblock_#"
    attn, parts = f"{block}/{attention}", ("query", "key", "value")
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
    )


VIT_JAX = Format(
    name="vit_jax",
    title="AugReg and the original ViT (google-research/vision_transformer, vit_jax/models_vit.py)",
    rules=_flax(
        "Transformer/posembed_input/pos_embedding", "LayerNorm_2", "MultiHeadDotProductAttention_1", "MlpBlock_3"
    ),
    signatures=(Signature(has=("embedding/kernel", "Transformer/posembed_input/pos_embedding")),),
    resampling=Resampling("bilinear"),  # vit_jax zooms at order 1, and so does timm with these files
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


FORMATS = {
    table.name: table
    for table in (
        *(TIMM, DEIT, DEIT3, MAE, SWAG, TORCHVISION, TORCHVISION_LINEAR, VIT_JAX, BIG_VISION),
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
    )
}
