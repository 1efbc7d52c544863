"""What an optimizer needs to know of a model: which parameters decay, and how fast each block learns."""

from __future__ import annotations

from numbers import Real
from typing import Any

from torch import nn

from tomevit.errors import check_type
from tomevit.models import MaskedAutoencoder, VisionTransformer, has_adapters, unwrap


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.05, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer of torch's or timm's, with layer-wise learning rates.

    As MAE and BEiT fine-tune (arXiv:2111.06377, table 9; arXiv:2106.08254; facebookresearch/mae, util/lr_decay.py):
    the learning rate falls by `layer_decay` from each layer to the one below it. The first is the patch embedding with
    tokens and positions, then come the blocks, and the last are the final norm, attention pooling, the projection and
    the heads, or the decoder. Biases, norms, LayerScale, tokens and positions do not decay.

    Schedulers of torch's and timm's begin at each group's `lr`, which has its scale in it. A loop that sets all rates
    itself, as MAE's does, says `group["lr"] = lr * group["scale"]`.

    Args:
        model: in a wrapper of torch's or not; parameters that do not require gradients are left out.
        lr: of the heads.
        weight_decay: of matrices and kernels.
        layer_decay: 1 for the same learning rate everywhere.

    Returns:
        One dict for each layer and kind, first layers first: `params`, `lr`, `weight_decay`, and for loops and people
        `scale` (lr times this is the group's) and `name`, as in "blocks.3, no decay".

    Raises:
        ValueError: lr or weight_decay is negative, or layer_decay not above 0 and at most 1, or model is none of ours.
    """
    model = unwrap(model)
    if not isinstance(model, VisionTransformer | MaskedAutoencoder):
        adapted = ": give its get_base_model() to train the adapters in it, or what its merge_and_unload() returns"
        hint = adapted if has_adapters(model) else ""
        raise ValueError(f"model is a {type(model).__name__}, and must be a model of tomevit's{hint}")
    for said, number in (("lr", lr), ("weight_decay", weight_decay), ("layer_decay", layer_decay)):
        check_type(said, number, Real, "a number")
    if not (lr >= 0 and weight_decay >= 0):
        raise ValueError(f"lr is {lr} and weight_decay {weight_decay}, and must be 0 or more")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is {layer_decay}, and must be above 0 and at most 1")
    top, still = model.config.depth + 1, model.no_weight_decay()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer, decays = _layer(name, top), parameter.ndim > 1 and name not in still
            if (layer, decays) not in groups:
                scale = layer_decay ** (top - layer)
                groups[layer, decays] = {
                    "params": [],
                    "lr": lr * scale,
                    "weight_decay": weight_decay if decays else 0.0,
                    "scale": scale,  # timm's schedulers would multiply by an "lr_scale" once more
                    "name": f"{_name(layer, top)}{'' if decays else ', no decay'}",
                }
            groups[layer, decays]["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], not key[1]))]


def _layer(name: str, top: int) -> int:
    module, _, rest = name.removeprefix("encoder.").partition(".")
    if module == "blocks":
        return int(rest.partition(".")[0]) + 1
    return top if module in ("norm", "attn_pool", "fc_norm", "proj", "head", "head_dist", "decoder") else 0


def _name(layer: int, top: int) -> str:
    return "embedding" if layer == 0 else "head" if layer == top else f"blocks.{layer - 1}"
