"""DeiT with a distillation token (arXiv:2012.12877, section 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch.fx
from torch import Tensor, nn

from tomevit.layers.merge import Tokens, check_tokens
from tomevit.models.vit import VisionTransformer

# What looks at values is no part of a graph of torch.fx.
torch.fx.wrap("check_tokens")


class DistilledLogits(NamedTuple):
    """What a distilled model returns in training: the loss treats the two heads differently."""

    cls: Tensor  # (B, num_classes), to compare with the labels
    dist: Tensor  # (B, num_classes), to compare with the teacher


class DistilledVisionTransformer(VisionTransformer):
    """A second token and a second head beside the class token's; in evaluation the mean of both heads' logits."""

    head_names = ("head", "head_dist")
    head_dist: nn.Module

    def forward_head(self, tokens: Tokens, pre_logits: bool = False) -> Tensor | DistilledLogits:  # type: ignore[override]
        check_tokens(tokens)
        cls, dist = (self.fc_norm(tokens.x[:, i]) for i in (0, 1))
        if pre_logits:
            return (cls + dist) / 2
        logits = DistilledLogits(self.head(cls), self.head_dist(dist))
        return logits if self.training else (logits.cls + logits.dist) / 2
