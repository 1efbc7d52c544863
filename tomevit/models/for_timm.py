"""What timm's helpers look for on a model, and would otherwise guess, without a word."""

from __future__ import annotations

from typing import Any

from torch import nn

from tomevit.cards import Card
from tomevit.config import Config


def group_matcher(prefix: str = "") -> dict[str, Any]:
    """Patterns of the names of a transformer's parameters, layer by layer, as timm's ViTs have them.

    The final norm is with the last block, and what no pattern fits is the last layer.
    """
    stem = rf"^{prefix}(?:cls_token|dist_token|reg_token|pos_embed|patch_embed|norm_pre)"
    return {"stem": stem, "blocks": [(rf"^{prefix}blocks\.(\d+)", None), (rf"^{prefix}norm", (99999,))]}


class TimmInterface(nn.Module):
    """The attributes by which timm's optimizers, data configs, distillation and `save_for_hf` know a transformer.

    Attributes:
        in_chans, num_classes, global_pool: as timm's models have them.
        embed_dim, num_features, head_hidden_size: channels of a token, and of what the heads read.
        num_prefix_tokens, has_class_token, num_reg_tokens: tokens in front of the patches.
        default_cfg: `pretrained_cfg`, as timm called it first.
    """

    config: Config
    card: Card
    head_names: tuple[str, ...]
    _feature_info: list[dict[str, Any]] | None = None

    in_chans = property(lambda self: self.config.in_chans)
    num_classes = property(lambda self: self.config.num_classes)
    global_pool = property(lambda self: self.config.pool)
    embed_dim = property(lambda self: self.config.embed_dim)
    num_features = head_hidden_size = property(lambda self: self.config.num_features)
    num_prefix_tokens = property(lambda self: self.config.num_prefix)
    has_class_token = property(lambda self: self.config.class_token)
    num_reg_tokens = property(lambda self: self.config.reg_tokens)
    default_cfg = property(lambda self: self.pretrained_cfg)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """How images are prepared for the model, what its heads answer and how it is called, in timm's words."""
        images = self.card.preprocess
        cfg: dict[str, Any] = {
            "input_size": (self.config.in_chans, *self.config.img_size),
            "fixed_input_size": True,
            "pool_size": None,
            "interpolation": images.interpolation,
            "crop_pct": images.crop_pct,
            "crop_mode": {"shorter": "center", "squash": "squash"}[images.resize],
            "mean": images.mean,
            "std": images.std,
            "num_classes": self.config.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": self.head_names if len(self.head_names) > 1 else self.head_names[0],
        }
        said = {
            "architecture": self.card.timm,
            "license": self.card.licence,
            "label_names": self.card.class_names,
        }
        return cfg | {name: value for name, value in said.items() if value}

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Where each block's features are found, how many channels they have, and pixels along a patch; can be set."""
        config = self.config
        return self._feature_info or [
            {"module": f"blocks.{i}", "num_chs": config.embed_dim, "reduction": config.patch_size}
            for i in range(config.depth)
        ]

    @feature_info.setter
    def feature_info(self, value: list[dict[str, Any]]) -> None:
        self._feature_info = value

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep only what enters each block and compute the rest again in the backward pass."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are no matrices, whatever their shape: tokens and positions."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim == 3}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002 - its ViTs ignore it too
        """By which names parameters belong to which layer, for timm's layer decay."""
        return group_matcher()

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The head, or both."""
        heads = tuple(getattr(self, name) for name in self.head_names)
        return heads if len(heads) > 1 else heads[0]
