"""Which format a checkpoint has, and which model it is, from the names and shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from tomevit import zoo
from tomevit.cards import Card
from tomevit.config import Act, Config
from tomevit.errors import AmbiguousCheckpointError, CheckpointError, check_type, join_with_or
from tomevit.weights.formats import FORMATS
from tomevit.weights.rules import Format, enumerate_names, without_wrappers

#: The formats by which users name a file's; their variants are told apart by what the file has.
MAIN_FORMATS = tuple(form.name for form in FORMATS.values() if not form.variant_of)

#: What other vision transformers have at the top, and compute with: left out, it would be missed in every answer.
PARTS = re.compile(r"attn_pool|rope|\w*rel_pos\w*|\w*relative_position\w*|\w*pos_emb\w*|\w*_tokens?|\w*norm|patch_\w+")
#: Others' models that people take for one of ours: what their names have, and what they are.
OTHER_MODELS = {
    r"lora_[AB]\.|base_layer\.": "an adapter beside a model (peft): load both, and save model.merge_and_unload()",
    r"patch_embed\.projection\.": "MMPretrain's or MMSegmentation's vision transformer, which tomevit does not read",
    r"visual\.(layer1|attnpool)\.": "the ResNet of a CLIP, which tomevit does not read",
    r"relative_position_bias_table|rel_pos_bias": "a transformer of relative positions, which tomevit does not read",
    r"attn\.lepe|layers\.\d+\.blocks\.\d+": "a transformer in stages, which tomevit does not read",
}


#: How a layer is called that classifies the features of a model beside it, with a number where it is in a Sequential.
HEAD_BESIDE = re.compile(r"(^|[._])(heads?|fc|classifier|cls|linear)(\.\d+)?\.(weight|bias)$")


class Found(NamedTuple):
    """Where in a state dict a model lies."""

    form: Format
    prefix: str  # what its names begin with, wrappers aside
    names: dict[str, str]  # by the format's names: the file's
    left_out: dict[str, str]  # by the file's names: why they are not of the model


def check_format(name: str) -> str:
    """The name of a format.

    Raises:
        ValueError: it is none; the message has all that users need.
    """
    check_type("format", name, str, "a name")
    if name not in FORMATS:
        raise ValueError(f"there is no format {name!r}; there are {', '.join(MAIN_FORMATS)}")
    return name


def find_prefixes(names: Collection[str], told: str | None = None) -> list[str]:
    """What the names of each whole model begin with; "" for plain ones.

    Args:
        names: of tensors, without wrappers.
        told: the format, if the user said it.
    """
    forms = [form for form in FORMATS.values() if told in (None, form.name, form.variant_of)]
    found: dict[str, list[Format]] = {}
    for form in forms:
        for prefix in {prefix for signature in form.signatures for prefix in signature.prefixes(names)}:
            found.setdefault(prefix, []).append(form)

    def anchors(prefix: str) -> set[str]:
        return {signature.has[0] for form in found[prefix] for signature in form.signatures}

    # The bare models of transformers are seen within the whole ones as well.
    within = {
        longer
        for longer in found
        for shorter, forms in found.items()
        if shorter != longer and longer.startswith(shorter)
        if any(form.has_place_for(longer.removeprefix(shorter) + name) for form in forms for name in anchors(longer))
    }
    return sorted(found.keys() - within)


def holds_model(names: Collection[str], told: str | None = None) -> bool:
    """Whether tensors of these names are a vision transformer of a known format, and what else may lie beside it."""
    return bool(find_prefixes([without_wrappers(name) for name in names], told))


def find_model(
    names: Collection[str],
    key: str = "",
    *,
    told_format: str | None = None,
    told_prefix: str | None = None,
    model: Card | None = None,
) -> Found:
    """The one model in a state dict, and what lies beside it.

    Args:
        names: of the tensors, as the file has them.
        key, told_format, model: see `find_format`.
        told_prefix: what the model's names begin with, with its last dot or without; "." for nothing.

    Raises:
        ValueError, CheckpointError, AmbiguousCheckpointError: as `find_format`; it lies there in parts; several do.
    """
    plain: dict[str, str] = {}
    for name in names:
        if (other := plain.setdefault(without_wrappers(name), name)) != name:
            raise CheckpointError(f"it holds {other} and {name}: one parameter twice, but for wrappers: save one alone")
    prefix = _choose_prefix(plain, told_format, told_prefix)
    inside = {name.removeprefix(prefix): theirs for name, theirs in plain.items() if name.startswith(prefix)}
    form = find_format(inside, key, told_format, model=model)
    beside = {
        name: theirs
        for name, theirs in plain.items()
        if not name.startswith(prefix)
        or not ((top := _first_part(name, prefix)) in form.components or PARTS.fullmatch(top))
    }
    for under, numbers in form.find_blocks(beside).items():
        if 0 not in numbers:
            raise CheckpointError(f"it holds a model in parts: its blocks from {min(numbers)} on lie under {under!r}")
    left_out = {theirs: _explain_beside(name, prefix) for name, theirs in beside.items()}
    return Found(form, prefix, {ours: name for ours, name in inside.items() if name not in left_out}, left_out)


def _choose_prefix(names: Collection[str], told_format: str | None, told: str | None) -> str:
    found = find_prefixes(names, told_format)
    if told is not None:
        wanted = without_wrappers(told)
        wanted = f"{wanted}." if wanted and not wanted.endswith((".", "/")) else wanted.removeprefix(".")
        if not any(name.startswith(wanted) for name in names):
            models = f"; a model's names begin with {join_with_or(map(repr, found))}" if found else ""
            raise CheckpointError(f"it has no names that begin with {told!r}{models}")
        if wanted in found or not (found := [prefix for prefix in found if prefix.startswith(wanted)]):
            return wanted
    if len(found) > 1:
        choices = [prefix or "." for prefix in found]
        plain = " ('.' for those whose names begin with nothing)" if "" in found else ""
        raise AmbiguousCheckpointError(
            f"it holds several models, whose names begin with {' and '.join(map(repr, choices))}{plain}: name one with "
            f"prefix= (--prefix)",
            "prefix",
            choices,
        )
    return found[0] if found else ""


def _first_part(name: str, prefix: str) -> str:
    return re.split(r"[./]", name.removeprefix(prefix))[0]


def _explain_beside(name: str, prefix: str) -> str:
    """Why a name is not of the model whose names begin with the prefix: up to where the two part."""
    parts, common = name.split("."), prefix.split(".")
    shared = next((i for i, (ours, theirs) in enumerate(zip(parts, common, strict=False)) if ours != theirs), 0)
    above = ".".join(parts[: shared + 1])
    return f"beside the model, under {f'{above}.'!r}" if above != name else "beside the model"


def find_heads(form: Format, tensors: Mapping[str, Tensor]) -> tuple[dict[str, str], list[str]]:
    """Heads in other shapes than the format's: a linear layer in their place, or in a Sequential, or more than that.

    Args:
        form: of the tensors.
        tensors: by the format's names.

    Returns:
        The format's names for what is one linear layer, by the names that it has; and the names of all that is not.
    """
    renamed: dict[str, str] = {}
    unusable: list[str] = []
    for top, head in form.heads.items():
        names = [name for name in tensors if _first_part(name, "") == top]
        if set(names) <= {f"{head}.weight", f"{head}.bias"}:
            continue
        layer, *others = {name.rpartition(".")[0] for name in names}
        kinds = {f"{layer}.weight": 2, f"{layer}.bias": 1}
        if others or f"{layer}.weight" not in names or any(tensors[name].ndim != kinds.get(name) for name in names):
            unusable += names
        else:
            renamed |= {name: f"{head}.{name.rpartition('.')[2]}" for name in names}
    return renamed, unusable


def find_head_beside(beside: Mapping[str, Tensor], widths: Collection[int]) -> str | None:
    """The one linear layer beside a model that is called as heads are and reads its features: `fc`, beside `backbone.`.

    Args:
        beside: what lies beside the model, by the file's names.
        widths: that its features have.
    """
    layers = {name.rpartition(".")[0] for name in beside if HEAD_BESIDE.search(without_wrappers(name))}
    if len(layers) != 1:
        return None
    (layer,) = layers
    weight, bias = beside.get(f"{layer}.weight"), beside.get(f"{layer}.bias")
    if weight is None or weight.ndim != 2 or weight.shape[1] not in widths:
        return None
    return layer if bias is None or bias.shape == weight.shape[:1] else None


#: What DINOv2's heads of four layers read (dinov2/hub/classifiers.py): four class tokens and a mean patch.
OF_FOUR_BLOCKS = 5


def check_not_head_alone(tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError if tensors are a linear layer alone, as the authors of DINOv2 and DINOv3 publish heads."""
    weight = tensors.get("weight")
    if weight is None or not tensors.keys() <= {"weight", "bias"} or weight.ndim != 2:
        return
    outputs, inputs = weight.shape
    sets = [
        name for parts in (2, OF_FOUR_BLOCKS) if not inputs % parts for name in name_sets_with_heads(inputs // parts)
    ]
    have = f": the zoo's {join_with_or(sets)} has both" if sets else ""
    raise CheckpointError(
        f"it is one linear layer, from {inputs} channels to {outputs}, without the model whose features it reads"
        f"{have}; of your own, save the state dict of the model and its head together"
    )


def name_sets_with_heads(dim: int) -> list[str]:
    """Published weights of that width whose head reads the class token beside the mean patch."""
    cards = (card for card, _ in zoo.published_sources() if card.config.pool == "token_avg")
    return list(dict.fromkeys(card.full_name for card in cards if card.config.embed_dim == dim))


def find_projection_beside(prefix: str, beside: Mapping[str, Tensor]) -> str | None:
    """The projection that open_clip puts after a trunk of timm's.

    Args:
        prefix: what the trunk's names begin with, wrappers aside.
        beside: what lies beside the trunk, by the file's names.

    Raises:
        CheckpointError: it is more than one matrix, or has a bias: without it the vector is another.
    """
    if not prefix.endswith("visual.trunk."):
        return None
    head = f"{prefix.removesuffix('trunk.')}head."
    found = [name for name in beside if without_wrappers(name).startswith(head)]
    if found and (len(found) > 1 or not found[0].endswith("proj.weight") or beside[found[0]].ndim != 2):
        raise CheckpointError(f"its {enumerate_names(found)} after the trunk is not one projection without a bias")
    return found[0] if found else None


def find_format(names: Collection[str], key: str = "", told: str | None = None, *, model: Card | None = None) -> Format:
    """The one format that the tensors are of.

    Args:
        names: of the tensors.
        key: where in its file the state dict lay.
        told: the user's word; the variants of a format count as it.
        model: what it is, if that is known: of several formats it is that in which such weights are published, and
            formats that differ only in what models they stand for are the same then.

    Raises:
        ValueError: told is no format.
        CheckpointError: no format fits, or not the one that was told.
        AmbiguousCheckpointError: several fit.
    """
    fits = [form for form in FORMATS.values() if any(s.fits(names, key) for s in form.signatures)]
    if told is not None:
        check_format(told)
        named = [form for form in FORMATS.values() if told in (form.name, form.variant_of)]
        for form in named:
            if any(not signature.misses(names) for signature in form.signatures):
                return form
        why = "; ".join(dict.fromkeys(" and ".join(s.misses(names)) for s in named[0].signatures))
        looks = f"; it looks like {' or '.join(form.name for form in fits)}" if fits else ""
        raise CheckpointError(f"not of the format {told}: it has {why}{looks}")
    if not fits:
        for pattern, what in OTHER_MODELS.items():
            if any(re.search(pattern, name) for name in names):
                raise CheckpointError(f"of no known format: it looks like {what}; known are {', '.join(MAIN_FORMATS)}")
        raise CheckpointError(
            f"of no known format: it holds {len(names)} tensors such as {enumerate_names(names, 4)}; "
            f"known are {', '.join(MAIN_FORMATS)}"
        )
    if model is not None:
        # Whose code wrote it, says where in its file the state dict lies: less than a user who names the model.
        alike = [form for form in FORMATS.values() if any(not s.misses(names) for s in form.signatures)]
        fits, alike = _as_it_projects(fits, model), _as_it_projects(alike, model)
        fits = _published_in(fits, model) or _published_in(alike, model) or fits
    if len(fits) > 1 and not (model is not None and len({form.resampling for form in fits}) == 1):
        raise AmbiguousCheckpointError(
            f"its names fit {' and '.join(form.name for form in fits)}, which stand for other models or resample "
            f"positions differently: say which it is with format=, or --format",
            "format",
            [form.name for form in fits],
        )
    return fits[0]


def _as_it_projects(formats: list[Format], model: Card) -> list[Format]:
    """Those formats that have a projection, if the model does: timm gives it the name of a classifier."""
    projects = model.config.proj_dim > 0
    return [form for form in formats if form.has_native("proj.weight") == projects] or formats


def _published_in(formats: Iterable[Format], model: Card) -> list[Format]:
    """Those formats in which weights of the model's family are published."""
    known = {source.format for card, source in zoo.published_sources() if card.title == model.title}
    return [form for form in formats if known & {form.name, form.variant_of}]


def explain_recognition(form: Format, names: Collection[str], key: str, prefix: str = "") -> str:
    """The tensors by which a format was recognised, and where they lie."""
    signature = next(s for s in form.signatures if not s.misses(names))
    place = f" under {key!r}" if key else ""
    place += f", in names that begin with {prefix!r}" if prefix else ""
    return f"{form.name}{place}: it has {', '.join(signature.has)}"


def infer_architecture(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of Config that native names and shapes tell.

    The number of heads cannot be seen; nor can, of `layer_scale`, more than whether it is there.

    Raises:
        CheckpointError: a parameter that every model has is missing, or of another rank.
    """
    ranks = {"patch_embed.proj.weight": 4, "blocks.0.attn.qkv.weight": 2}
    ranks |= {"blocks.0.mlp.fc1.weight": 2, "blocks.0.mlp.fc2.weight": 2}
    ranks |= {name: rank for name, rank in {"pos_embed": 3, "attn_pool.mlp.fc1.weight": 2}.items() if name in tensors}
    for name, rank in ranks.items():
        if name not in tensors:
            raise CheckpointError(f"it has no {name}, which every vision transformer here has")
        if tensors[name].ndim != rank or 0 in tensors[name].shape:
            raise CheckpointError(
                f"its {name} is {tuple(tensors[name].shape)}, and must have {rank} dimensions, none 0"
            )
    dim, channels, _, patch = tensors["patch_embed.proj.weight"].shape
    inner, hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0], tensors["blocks.0.mlp.fc2.weight"].shape[1]
    head, pool = tensors.get("head.weight"), tensors.get("attn_pool.mlp.fc1.weight")
    proj = tensors.get("proj.weight")
    norm = {"fc_norm.weight": "after", "norm.weight": "before"}
    return {
        "patch_size": patch,
        "in_chans": channels,
        "embed_dim": dim,
        "depth": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        "mlp": "swiglu" if inner == 2 * hidden else "mlp",
        "mlp_ratio": hidden / dim,
        "mlp_norm": "blocks.0.mlp.norm.weight" in tensors,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
        "attn_norm": "blocks.0.attn.norm.weight" in tensors,
        "layer_scale": "blocks.0.ls1.gamma" in tensors,
        "pre_norm": "norm_pre.weight" in tensors,
        "class_token": "cls_token" in tensors,
        "dist_token": "dist_token" in tensors,
        "reg_tokens": tensors["reg_token"].shape[1] if "reg_token" in tensors and tensors["reg_token"].ndim == 3 else 0,
        "pos_embed": "learned" if "pos_embed" in tensors else "none",
        "attention_pool": None if pool is None else pool.shape[0] / dim,
        "pool_norm": next((kind for name, kind in norm.items() if name in tensors), "none"),
        "proj_dim": 0 if proj is None else proj.shape[0],
        "proj_bias": "proj.bias" in tensors,
        "num_classes": head.shape[0] if head is not None and head.ndim == 2 else 0,
        "beside_mean": head is not None and head.shape[1:] == (2 * dim,),
        "positions": tensors["pos_embed"].shape[1] if "pos_embed" in tensors else 0,
    }


#: The fields of Config that weights of one architecture may have otherwise: they are taken from the tensors.
ADOPTED = ("img_size", "in_chans", "num_classes", "pool", "pool_norm", "pos_embed_prefix", "proj_dim", "proj_bias")


def comparable_fields(config: Config) -> dict[str, Any]:
    """An architecture, as far as `infer_architecture` sees it in tensors, and what cannot be seen there."""
    names = (
        *("patch_size", "embed_dim", "depth", "qkv_bias", "qk_norm", "attn_norm", "pre_norm"),
        *("class_token", "dist_token", "reg_tokens", "pos_embed", "pool_norm", "mlp", "mlp_norm"),
        *("num_heads", "act", "pos_embed_prefix", "rope", "pool_heads"),  # not to be seen in tensors
    )
    pooled = int(config.embed_dim * (config.pool_mlp_ratio or config.mlp_ratio))
    return {name: getattr(config, name) for name in names} | {
        "mlp_ratio": config.mlp_hidden / config.embed_dim,
        "layer_scale": config.layer_scale is not None,
        "attention_pool": pooled / config.embed_dim if config.pool == "map" else None,
    }


def fields_of_named(config: Config, name: str | Card | None) -> dict[str, Any]:
    """What of an architecture must be as a name says: weights of one architecture have this activation or that one."""
    names_weights = isinstance(name, Card) or (name is not None and "." in name)
    return {k: v for k, v in comparable_fields(config).items() if k != "act" or names_weights}


def differences(
    described: Mapping[str, Any], config: Config, *, headless: bool = False, averaged: bool = False
) -> list[str]:
    """Where an architecture, as `infer_architecture` or `comparable_fields` has it, is not the config's.

    Args:
        headless: the weights have no head: a fresh one may bring a norm of its own, after the pooling.
        averaged: they may pool the mean patch where the config reads the class token: timm's ViT then has its last norm
            after the pooling. MAE has a card for either.
    """
    ours = comparable_fields(config)
    averaged = averaged and not config.dist_token and config.init != "mae"
    if ours["pos_embed_prefix"] == "class" and described.get("pos_embed_prefix") is False:
        del ours["pos_embed_prefix"]  # as timm has it: the class token's is added to the token
    if (headless and described["pool_norm"] == "before") or (averaged and described["pool_norm"] == "after"):
        del ours["pool_norm"]
    return [
        f"{name} {value} where the model has {ours[name]}"
        for name, value in described.items()
        if name in ours and ours[name] != value
    ]


def adopt_inferred(config: Config, observed: Mapping[str, Any], img_size: tuple[int, int] | None = None) -> Config:
    """The config with the image size, class count and channels that the tensors have.

    Args:
        config: of the same architecture, see `differences`.
        observed: by `infer_architecture`.
        img_size: taken as the weights' own, if it has as many patches as they have positions.

    Raises:
        CheckpointError: the patches make no square, and img_size does not say what they make.
    """
    config = replace(config, **{name: observed[name] for name in ("in_chans", "num_classes", "proj_dim", "proj_bias")})
    if observed["num_classes"] and config.class_token and config.pool != "map":
        pool = "token" if config.pool == "token_avg" else config.pool
        config = replace(config, pool="token_avg" if observed["beside_mean"] else pool)
    if observed["pool_norm"] != config.pool_norm:
        # Weights without a head end in a norm of every token; with fc_norm, timm's ViT reads the mean patch.
        token = observed["pool_norm"] == "before" and config.class_token
        config = replace(config, pool_norm=observed["pool_norm"], pool="token" if token else "avg")
    if config.pos_embed == "none":
        return config if img_size is None else replace(config, img_size=img_size)
    if (
        config.pos_embed_prefix == "class"
        and config.reg_tokens
        and _are_of_patches(observed["positions"], config, img_size)
    ):
        config = replace(config, pos_embed_prefix=False)  # as timm has it: the class token's is added to the token
    patches = observed["positions"] - config.num_positions_prefix
    if img_size is not None and (asked := replace(config, img_size=img_size)).num_patches == patches:
        return asked
    if patches == config.num_patches:
        return config
    edge = math.isqrt(max(patches, 0))
    if not edge or edge * edge != patches:
        raise CheckpointError(
            f"it has positions for {patches} patches, which make no square: say img_size=(height, width) in pixels, "
            f"or --img-size"
        )
    return replace(config, img_size=(edge * config.patch_size, edge * config.patch_size))


def _are_of_patches(positions: int, config: Config, img_size: tuple[int, int] | None) -> bool:
    """Whether so many positions are those of patches alone, in a square or as the image size says."""
    sizes = [config, *([] if img_size is None else [replace(config, img_size=img_size)])]
    patches = [size.num_patches for size in sizes]
    return positions - 1 not in patches and (math.isqrt(positions) ** 2 == positions or positions in patches)


#: What OpenAI's CLIP archives hold beside the two towers, and no other project's.
OF_OPENAI = frozenset(("input_resolution", "context_length", "vocab_size"))


def choose_card(
    observed: Mapping[str, Any],
    form: Format,
    *,
    told: str | Card | None,
    known: Card | None,
    file: str | None,
    format_told: bool = False,
    act: Act | None = None,
) -> Card:
    """The card of what was observed: the one that was told, the one that is known, or the only one that fits.

    Args:
        observed: by `infer_architecture`.
        form: the checkpoint's format.
        told: the user's word.
        known: as published, or as the files beside it describe it.
        file: its name, which may be that of a published file.
        format_told: the format is the user's word too, and not only what the names are like.
        act: the activation, where what lies beside the tensors tells it.

    Raises:
        CheckpointError: it does not fit; the message says what would.
        AmbiguousCheckpointError: several fit, or weights of the only one that differ in their activation.
    """
    card = known if told is None else complete_told(told, known)
    if card is None:
        # MAE's fine-tuned weights and those of timm's ViT with average pooling have the same names.
        alike = {form.name, form.variant_of}
        if form.name == "mae" and observed["pool_norm"] == "after" and not format_told:
            alike.add("timm")
        return _choose_act(_choose_fitting(observed, alike, file), observed, act)
    own = isinstance(told, Card)  # which says how it pools
    if wrong := differences(observed, card.config, headless=not observed["num_classes"], averaged=not own):
        fits = _find_fitting(observed)
        instead = f"It fits {join_with_or(card.name for card in fits)}" if fits else _describe_nearest(observed)
        raise CheckpointError(f"it does not fit {card.name}: {'; '.join(wrong)}. {instead}")
    settled = own or known is not None or (isinstance(told, str) and "." in told)
    return card if settled else _choose_act(card, observed, act)


def _choose_act(card: Card, observed: Mapping[str, Any], act: Act | None) -> Card:
    """The card with the activation that all weights of its architecture have: no tensor tells QuickGELU from GELU.

    Raises:
        AmbiguousCheckpointError: some have another than others.
    """
    acts: dict[Act, str] = {}
    for name in dict.fromkeys([card.name, *(fit.name for fit in _find_fitting(observed) if fit.title == card.title)]):
        for published in zoo.cards(name):
            if published.weights and (published.config.num_classes > 0) == (observed["num_classes"] > 0):
                acts.setdefault(published.config.act, published.full_name)
    if act is None and len(acts) > 1:
        named = join_with_or(f"{name} ({kind})" for kind, name in acts.items())
        raise AmbiguousCheckpointError(
            f"it fits {named}, which differ in their activation, and no tensor tells it: say which it is like with "
            f"model=, or --model",
            "model",
            list(acts.values()),
        )
    found: Act = next(iter(acts), card.config.act) if act is None else act
    return replace(card, config=replace(card.config, act=found))


def is_same_model(known: Card, asked: Card) -> bool:
    """Of the same name, or an encoder without a head for one that pools otherwise."""
    if known.name == asked.name:
        return True
    encoder = not known.config.num_classes and known.config.pool_norm != asked.config.pool_norm
    return encoder and not differences(comparable_fields(known.config), asked.config, headless=True)


def complete_told(told: str | Card, known: Card | None) -> Card:
    """The user's word, completed by what is known of the file.

    Raises:
        CheckpointError: it is known to be something else.
    """
    if isinstance(told, Card):
        return told
    card = zoo.card(told) if "." in told else zoo.architecture(told)
    if known is None:
        # Figures are of the published file, and this may be another.
        return replace(card, figures=())
    if known.weights:
        if not is_same_model(known, card) or card.weights not in (None, known.weights):
            raise CheckpointError(f"it is {known.full_name} by its address or hash, and not {told}")
        return known
    described = fields_of_named(known.config, told)
    if wrong := differences(described, card.config, averaged=known.title == card.title):
        raise CheckpointError(f"it is {known.name} by the files beside it, and no {card.name}: {'; '.join(wrong)}")
    return replace(
        card,
        config=replace(known.config, prop_attn=card.config.prop_attn, init=card.config.init),
        preprocess=known.preprocess,
        licence=known.licence or card.licence,
        figures=(),
        class_names=known.class_names,
    )


def _choose_fitting(observed: Mapping[str, Any], formats: Collection[str | None], file: str | None) -> Card:
    """The one architecture that was observed, of the families that are published in one of some formats."""
    families = {card.title for card, source in zoo.published_sources() if source.format in formats}
    fits = [card for card in _find_fitting(observed) if card.title in families] or _find_fitting(observed)
    if not fits:
        raise CheckpointError(
            f"it fits no model here. {_describe_nearest(observed)}, or describe yours by a Card as model="
        )
    # One per family: other resolutions of the same differ in nothing that weights have.
    one = {card.title: card for card in reversed(fits)}
    one |= {card.title: card for card in fits if card.config.num_positions == observed["positions"]}
    same_file = [
        card.full_name
        for card, source in zoo.published_sources()
        if file and (source.url or "").endswith(f"/{file}") and not source.sha256
    ]
    choices = [*same_file, *sorted(card.name for card in one.values())]
    if len(choices) > 1:
        named = " (by its name it is the first)" if same_file else ""
        raise AmbiguousCheckpointError(
            f"it fits {join_with_or(choices)}{named}, which differ in preprocessing, merging or licence: "
            f"say which it is with model=, or --model",
            "model",
            choices,
        )
    return next(iter(one.values()))


def _find_fitting(observed: Mapping[str, Any]) -> list[Card]:
    return [card for card in zoo.architectures() if not differences(observed, card.config, averaged=True)]


def _describe_nearest(observed: Mapping[str, Any]) -> str:
    def distance(card: Card) -> tuple[int, float]:
        config = card.config
        sizes = abs(config.embed_dim - observed["embed_dim"]) / config.embed_dim
        sizes += abs(config.depth - observed["depth"]) / config.depth
        return len(differences(observed, config)), sizes

    card = min(zoo.architectures(), key=distance)
    return f"The nearest is {card.name}: {'; '.join(differences(observed, card.config))}"
