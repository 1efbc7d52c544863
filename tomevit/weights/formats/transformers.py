"""The formats of the library transformers: of its files, and of its models in memory since version 5."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from tomevit.weights.formats.common import BICUBIC, DECODER, MASK_TOKEN, NO_BIAS, TEXT
from tomevit.weights.rules import PRE_LOGITS, Format, Omission, Resampling, Rule, Signature


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


def _tower(start: str) -> tuple[Rule, ...]:
    """What the image towers of CLIP and SigLIP share, but for the norm at the end."""
    block = f"{start}encoder.layers.#"
    return (
        Rule("pos_embed", f"{start}embeddings.position_embedding.weight", "n d -> 1 n d"),
        Rule("blocks.#.norm1.*", f"{block}.layer_norm1.*"),
        Rule("blocks.#.attn.qkv.*", tuple(f"{block}.self_attn.{x}_proj.*" for x in "qkv")),
        Rule("blocks.#.attn.proj.*", f"{block}.self_attn.out_proj.*"),
        Rule("blocks.#.norm2.*", f"{block}.layer_norm2.*"),
        Rule("blocks.#.mlp.fc1.*", f"{block}.mlp.fc1.*"),
        Rule("blocks.#.mlp.fc2.*", f"{block}.mlp.fc2.*"),
    )


_BESIDE_TOWER = (
    Omission("vision_model.embeddings.position_ids", "it counts from 0"),
    Omission("embeddings.position_ids", "it counts from 0"),
    *(Omission(name, TEXT) for name in ("text_model.**", "text_projection.weight", "logit_scale", "logit_bias")),
)


def _hf_clip() -> Iterator[Format]:
    """The image tower of transformers' CLIP with what stands beside it, bare, and with a classifier."""
    for bare, start in (("", "vision_model."), ("_model", "")):
        trunk = (
            *_tower(start),
            Rule("cls_token", f"{start}embeddings.class_embedding", "d -> 1 1 d"),
            Rule("patch_embed.proj.weight", f"{start}embeddings.patch_embedding.weight"),
            Rule("norm_pre.*", f"{start}pre_layrnorm.*"),
        )
        norm = f"{start}post_layernorm.*"
        has = (f"{start}embeddings.class_embedding", f"{start}encoder.layers.#.self_attn.q_proj.weight")
        clip = Format(
            name=f"hf_clip{bare}",
            title="transformers' CLIP (huggingface/transformers, models/clip/modeling_clip.py)",
            rules=(*trunk, Rule("norm.*", norm), *(() if bare else (Rule("proj.weight", "visual_projection.weight"),))),
            signatures=(Signature(has=has, lacks=("classifier.weight",)),),
            resampling=BICUBIC,  # interpolate_pos_encoding there
            omissions=_BESIDE_TOWER,
            variant_of="hf_clip" if bare else None,
            fixed={"pre_norm": True, "pool": "token", "pool_norm": "before", "num_classes": 0, "qkv_bias": True},
        )
        yield clip
        if not bare:
            yield replace(
                clip,
                name="hf_clip_classifier",
                title="transformers' CLIPForImageClassification, which reads the mean patch without a last norm",
                rules=(*trunk, Rule("head.*", "classifier.*")),
                signatures=(Signature(has=(*has, "classifier.weight")),),
                omissions=(*_BESIDE_TOWER, Omission(norm, "the classifier reads tokens without it")),
                variant_of="hf_clip",
                fixed={"pre_norm": True, "pool": "avg", "pool_norm": "none"},
            )


def _hf_siglip() -> Iterator[Format]:
    """The image tower of transformers' SigLIP with what stands beside it, bare, and with a classifier."""
    for bare, start in (("", "vision_model."), ("_model", "")):
        trunk = (
            *_tower(start),
            Rule("patch_embed.proj.*", f"{start}embeddings.patch_embedding.*"),
            Rule("norm.*", f"{start}post_layernorm.*"),
        )
        has = (f"{start}embeddings.patch_embedding.bias", f"{start}encoder.layers.#.self_attn.q_proj.weight")
        lacks = (f"{start}embeddings.class_embedding",)
        siglip = Format(
            name=f"hf_siglip{bare}",
            title="transformers' SigLIP, of fixed size SigLIP 2 too (huggingface/transformers, models/siglip)",
            rules=(
                *trunk,
                Rule("attn_pool.latent", f"{start}head.probe"),
                Rule("attn_pool.qkv.*", f"{start}head.attention.in_proj_*"),
                Rule("attn_pool.proj.*", f"{start}head.attention.out_proj.*"),
                Rule("attn_pool.norm.*", f"{start}head.layernorm.*"),
                Rule("attn_pool.mlp.fc1.*", f"{start}head.mlp.fc1.*"),
                Rule("attn_pool.mlp.fc2.*", f"{start}head.mlp.fc2.*"),
            ),
            signatures=(Signature(has=has, lacks=(*lacks, "classifier.weight")),),
            resampling=BICUBIC,  # interpolate_pos_encoding there
            omissions=_BESIDE_TOWER,
            variant_of="hf_siglip" if bare else None,
            fixed={"class_token": False, "pool": "map", "pool_norm": "before", "num_classes": 0, "qkv_bias": True},
        )
        yield siglip
        if not bare:
            yield replace(
                siglip,
                name="hf_siglip_classifier",
                title="transformers' SiglipForImageClassification, which reads the mean patch",
                rules=(*trunk, Rule("head.*", "classifier.*")),
                signatures=(Signature(has=(*has, "classifier.weight"), lacks=lacks),),
                omissions=(*_BESIDE_TOWER, Omission(f"{start}head.**", "the classifier reads the mean patch instead")),
                variant_of="hf_siglip",
                fixed={"class_token": False, "pool_norm": "before", "pool": "avg"},
            )


def _hf_dinov2() -> Iterator[Format]:
    """The library transformers' DINOv2, without registers and with; as in its files, and as in a model of version 5."""
    ways = (
        (
            "",
            ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
            "attention.output.dense",
            ("mlp.weights_in",),
            "mlp.weights_out",
        ),
        (
            "_v5",
            ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            "attention.o_proj",
            ("mlp.gate_proj", "mlp.up_proj"),
            "mlp.down_proj",
        ),
    )
    for kind, registers in (("dinov2", False), ("dinov2_with_registers", True)):
        for suffix, qkv, proj, gated, out in ways:
            for bare, start in (("", f"{kind}."), ("_model", "")):
                block, embeddings = f"{start}encoder.layer.#", f"{start}embeddings"
                register = f"{embeddings}.register_tokens"
                has = (f"{embeddings}.cls_token", f"{block}.layer_scale1.lambda1", f"{block}.{qkv[0]}.weight")
                yield Format(
                    name=f"hf_{kind}{bare}{suffix}",
                    title=f"transformers' DINOv2 (huggingface/transformers, models/{kind})",
                    rules=(
                        Rule("cls_token", f"{embeddings}.cls_token"),
                        *((Rule("reg_token", register),) if registers else ()),
                        Rule("pos_embed", f"{embeddings}.position_embeddings"),
                        Rule("patch_embed.proj.*", f"{embeddings}.patch_embeddings.projection.*"),
                        Rule("blocks.#.norm1.*", f"{block}.norm1.*"),
                        Rule("blocks.#.attn.qkv.*", tuple(f"{block}.{part}.*" for part in qkv)),
                        Rule("blocks.#.attn.proj.*", f"{block}.{proj}.*"),
                        Rule("blocks.#.ls1.gamma", f"{block}.layer_scale1.lambda1"),
                        Rule("blocks.#.norm2.*", f"{block}.norm2.*"),
                        *(Rule(f"blocks.#.mlp.fc{i}.*", f"{block}.mlp.fc{i}.*", when={"mlp": "mlp"}) for i in (1, 2)),
                        Rule("blocks.#.mlp.fc1.*", tuple(f"{block}.{part}.*" for part in gated)),
                        Rule("blocks.#.mlp.fc2.*", f"{block}.{out}.*"),
                        Rule("blocks.#.ls2.gamma", f"{block}.layer_scale2.lambda1"),
                        Rule("norm.*", f"{start}layernorm.*"),
                        *(() if bare else (Rule("head.*", "classifier.*"),)),
                    ),
                    signatures=(Signature((*has, register)) if registers else Signature(has, lacks=(register,)),),
                    resampling=Resampling("bicubic", antialias=registers),  # interpolate_pos_encoding there
                    omissions=(
                        Omission(f"{embeddings}.mask_token", MASK_TOKEN, like="cls_token", layout="1 1 d -> 1 d"),
                    ),
                    variant_of="hf_dinov2" if bare or suffix or registers else None,
                    fixed={"pool_norm": "before", "norm_eps": 1e-6, "num_positions_prefix": 1},
                    always=("blocks.#.ls1.gamma", *(("reg_token",) if registers else ())),
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
                Omission("embeddings.mask_token", MASK_TOKEN, like="cls_token", layout="a b d -> a b d"),
                *(
                    Omission(f"{block}.attention.{x}_proj.bias", NO_BIAS, zero=True, like="blocks.#.attn.proj.weight")
                    for x in "qv"
                ),
            ),
            variant_of="hf_dinov3" if suffix else None,
            fixed={
                "rope": "dinov3",
                "pos_embed": "none",
                "norm_eps": 1e-5,
                "qkv_bias": False,
                "pool_norm": "before",
                "num_classes": 0,
            },
            always=("reg_token", "blocks.#.ls1.gamma"),
        )


FORMATS = (
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
    *_hf_clip(),
    *_hf_siglip(),
    *_hf_dinov2(),
    *_hf_dinov3(),
)
