"""The formats of Google's projects in JAX, whose files are .npz."""

from __future__ import annotations

from dataclasses import replace

from tomevit.weights.formats.common import PLAIN
from tomevit.weights.rules import PRE_LOGITS, Format, Omission, Resampling, Rule, Signature


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
    layers=("Transformer/encoderblock/", "Transformer/encoderblock_#/"),
    num_heads="Transformer/encoderblock_#/MultiHeadDotProductAttention_0/query/kernel",
)
