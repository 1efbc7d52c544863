"""What the tables of several projects share: names, reasons for what is left out, and what a plain ViT is."""

from __future__ import annotations

from tomevit.weights.rules import Resampling, Rule

BICUBIC = Resampling("bicubic")

# What a ViT with a class token and no options is, for projects that know nothing else.
PLAIN = {"act": "gelu", "norm_eps": 1e-6, "pool": "token", "pool_norm": "before", "pos_embed_prefix": True}

MASK_TOKEN = "it stands for hidden patches in pre-training"
DECODER = "the decoder reconstructs pixels in pre-training, and an encoder does without it"
NO_BIAS = "it is 0, and the model does without it"
ROTATIONS = "positions that are rotations are computed, not learned"
TEXT = "texts are encoded elsewhere"


def same(names: str) -> tuple[Rule, ...]:
    """Parameters that are called as here."""
    return tuple(Rule(name, name) for name in names.split())


#: A plain encoder, but for the layers that projects have in several ways: qkv and fc1.
ENCODER = same("""
cls_token pos_embed patch_embed.proj.* blocks.#.norm1.* blocks.#.attn.proj.* blocks.#.norm2.* norm.* head.*
""")
QKV = same("blocks.#.attn.qkv.*")
MLP = same("blocks.#.mlp.fc1.* blocks.#.mlp.fc2.*")
LAYER_SCALE = same("blocks.#.ls1.gamma blocks.#.ls2.gamma")
LAYER_SCALE_GAMMA = tuple(Rule(f"blocks.#.ls{i}.gamma", f"blocks.#.gamma_{i}") for i in (1, 2))
#: What timm's ViT can have beside, and DeiT's and MAE's, which are made of it.
OPTIONS = same("reg_token norm_pre.* blocks.#.attn.q_norm.* blocks.#.attn.k_norm.* fc_norm.*")
VIT = (*ENCODER, *QKV, *MLP, *OPTIONS, *same("dist_token head_dist.*"))
VIT_HAS = ("patch_embed.proj.weight", "blocks.#.attn.qkv.weight")
