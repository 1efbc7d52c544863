"""Which architecture of the zoo a config is: its name, its papers, and how it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tomevit import zoo
from tomevit.cards import Card
from tomevit.config import ARCHITECTURE, Config

# Architectures differ in no other field from models of one name: these have each user's own values.
_OPEN = ("img_size", "in_chans", "num_classes", "norm_eps", "pool", "pool_norm", "proj_dim")


def kin_of(name: str) -> str:
    """How the names of a model's kin begin in the zoo."""
    return f"{name.partition('_')[0]}_"


def is_same_architecture(card: Card, config: Config, kin: str) -> bool:
    """Whether a card of the zoo is of a config's architecture; `kin` is of the config."""

    def told(config: Config) -> list[Any]:
        fields = vars(config) | {"layer_scale": config.layer_scale is not None, "maps": config.pool == "map"}
        if config.pos_embed_prefix == "class" and config.reg_tokens:
            fields["pos_embed_prefix"] = False  # as timm has it: the class token's is added to the token
        return [fields[name] for name in (*ARCHITECTURE, "maps") if name not in (*_OPEN, "act")]

    acts = {found.config.act for found in zoo.cards(card.name)}
    if kin.startswith("siglip"):
        acts |= {"gelu", "gelu_tanh"}  # timm runs them with the one, all others with the other
    return told(card.config) == told(config) and config.act in acts


def named_card(config: Config, kin: str, **rest: Any) -> Card:
    """A card with the zoo's name for the architecture; of several, one that begins as `kin` does, and pools as this."""
    same = [card for card in zoo.architectures() if is_same_architecture(card, config, kin)]
    if same:

        def distance(card: Card) -> tuple[bool, bool, bool]:
            pooled = card.config.pool_norm == config.pool_norm
            return not card.name.startswith(kin), not pooled, card.config.img_size != config.img_size

        near = min(same, key=distance)
        config = replace(config, prop_attn=near.config.prop_attn, init=near.config.init)
    else:
        family = "deit_distilled" if config.dist_token else "vit"
        name = f"{family}_{config.embed_dim}x{config.depth}_p{config.patch_size}"
        near = Card(name=name, title="Vision Transformer")
    of_architecture = {field: getattr(near, field) for field in ("name", "timm", "title", "papers", "presets")}
    return Card(**of_architecture, config=config, **rest)
