"""Models, from a config."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from tomevit.cards import Card
from tomevit.config import Config
from tomevit.errors import check_type
from tomevit.models.deit import DistilledLogits, DistilledVisionTransformer
from tomevit.models.init import initial_heads, initial_weights
from tomevit.models.mae import MaskedAutoencoder, Reconstruction, patchify, unpatchify
from tomevit.models.vit import VisionTransformer
from tomevit.private import WRAPPED
from tomevit.schedule import Schedule

__all__ = [
    "DistilledLogits",
    "DistilledVisionTransformer",
    "MaskedAutoencoder",
    "Reconstruction",
    "VisionTransformer",
    "build",
    "build_meta",
    "initial_heads",
    "patchify",
    "unpatchify",
    "unwrap",
    "unwrap_transformer",
]


def unwrap(model: nn.Module) -> nn.Module:
    """The model within torch's wrappers: torch.compile, data parallelism, averaged models.

    Raises:
        ValueError: it is no module; or r was set on a wrapper. Any module lets itself be given any attribute, and
            nothing of ours runs when that happens, or sees the wrapper when it is called: this is the first place that
            can say so.
    """
    check_type("model", model, nn.Module, "a model of tomevit's")
    if "r" in vars(model):  # ours is a property
        raise ValueError(
            f"r was set on a {type(model).__name__}, where it acts on nothing: pass it with the call, as in "
            f"model(images, r=0), or set it on the model within, and delete this one (del model.r)"
        )
    for name in WRAPPED:
        if (inner := getattr(model, name, None)) is not None:
            return unwrap(inner)
    return model


def unwrap_transformer(model: nn.Module) -> VisionTransformer:
    """The vision transformer within torch's wrappers, whose weights are all there is to it.

    Raises:
        ValueError: it is another module, or has adapters.
    """
    inner = unwrap(model)
    if not isinstance(inner, VisionTransformer):
        hint = ": give its encoder" if isinstance(inner, MaskedAutoencoder) else ""
        if has_adapters(inner):
            hint = ": give what its merge_and_unload() returns"
        raise ValueError(f"model is a {type(inner).__name__}, and must be a VisionTransformer of tomevit's{hint}")
    if has_adapters(inner):
        raise ValueError(
            "model has adapters beside its weights: give what merge_and_unload() of the peft model around it returns"
        )
    return inner


def unwrap_replicas(model: nn.Module) -> VisionTransformer:
    """The model to call within data parallelism and averaged models, whose own forward waits for other processes.

    What torch.compile made of it stays, and adapters too.

    Raises:
        ValueError: there is no model of tomevit's within; or r was set on a wrapper.
    """
    inner = unwrap(model)
    check_type("model", getattr(inner, "card", inner), Card, "a model of tomevit's")
    children: dict[str, Any] = dict(model.named_children())
    for name in WRAPPED:
        if name in children:
            within = unwrap_replicas(children[name])
            compiled = name == "_orig_mod" and within is children[name]
            return cast("VisionTransformer", model) if compiled else within
    return cast("VisionTransformer", model)


def has_adapters(model: nn.Module) -> bool:
    """Whether peft put adapters into it: they keep the layers that they stand for under this name."""
    return any(name.endswith(".base_layer") for name, _ in model.named_modules())


def build_meta(config: Config, r: Schedule = 0) -> VisionTransformer:
    """The model without storage, for weights that are assigned to it."""
    with torch.device("meta"):
        return (DistilledVisionTransformer if config.dist_token else VisionTransformer)(config, r)


def build(config: Config, r: Schedule = 0) -> VisionTransformer:
    """The model with fresh weights, drawn once from torch's default generator; in training mode, on the CPU."""
    model = build_meta(config, r)
    model.load_state_dict(initial_weights(model, config), assign=True)
    return model
