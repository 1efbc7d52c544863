"""What several test files need: a small model with nothing trivial in it, and how far apart two tensors are."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tomevit.cards import Card
from tomevit.config import Config
from tomevit.models import VisionTransformer, build, build_meta
from tomevit.schedule import Schedule
from tomevit.weights import rules
from tomevit.weights.formats import FORMATS

#: Of weights that ship the quickest: 65 tokens and four blocks.
PLAIN, TRAINED = "digits_p1.plain", "digits_p1.tome_r16"


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest deviation, as a share of the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> None:
    """Fill every parameter with noise at a scale that keeps activations near 1: no zero bias, no norm that is 1."""
    # The same draws over and over, from another place for each parameter: drawing 300 million takes long.
    length = 2**17 + 1
    noise = torch.randn(length, generator=torch.Generator().manual_seed(seed)).repeat(2)
    for i, (name, parameter) in enumerate(module.named_parameters()):
        if parameter.ndim <= 1:
            centre, deviation = (0.0 if name.endswith("bias") else 1.0), 0.2
        elif name.endswith(("_token", "pos_embed", "pos_embedding")):
            centre, deviation = 0.0, 0.5
        else:
            centre, deviation = 0.0, parameter[0].numel() ** -0.5
        start = -7919 * i % length
        values = noise[start : start + min(length, parameter.numel())] * deviation + centre
        for part in parameter.view(-1).split(length):
            part.copy_(values[: len(part)])


def tiny(r: Schedule = 0, *, seed: int = 0, **fields: Any) -> VisionTransformer:
    """A model of a few thousand parameters in evaluation mode: 64 patches, of which half can merge per block."""
    small = {"img_size": (32, 32), "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 7}
    model = build(Config(**small | fields), r)
    randomise(model, seed)
    return model.eval()


def images_for(model: VisionTransformer, batch: int = 3, *, seed: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    """Noise that a model accepts, in its dtype."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, model.config.in_chans, *model.config.img_size, generator=generator)
    return images.to(dtype or model.dtype)


#: Titles of the families that timm's plain ViT is the model of.
PLAIN_VITS = ("DeiT", "DeiT III", "Distilled DeiT", "Vision Transformer")


def format_of_timms(card: Card) -> str:
    """The format in which timm publishes a card's weights: how it names the parameters of that model."""
    return next(source.format for source in card.sources if (source.hub or "").startswith("timm/"))


def timm_on_meta(name: str, **arguments: Any) -> nn.Module:
    from benchmarks.peers import timm

    # Noise for weights without values would take most of the time.
    init = timm.layers.weight_init
    with torch.device("meta"), mock.patch.object(init, "_trunc_normal_", lambda tensor, *_: tensor):
        return timm.create_model(name, pretrained=False, **arguments)


def timms_shapes(config: Config, form: str) -> dict[str, torch.Size]:
    """What a model's parameters are called in a format, with their shapes; without memory for the large ones."""
    ours = build_meta(config).state_dict()
    # What a format has no place for must be 0, which meta tensors cannot tell: all of that has one dimension.
    ours = {name: x if x.ndim > 1 else torch.zeros(x.shape) for name, x in ours.items()}
    return {name: x.shape for name, x in rules.from_native(FORMATS[form], ours, config).items()}


def is_prepared_as_timm_does(card: Card) -> bool:
    """Whether a card follows timm's cfg: towers that embed images are prepared as their own projects do it.

    Of CLIP, SigLIP, DINOv3, EUPE and the Perception Encoder, timm's cfg has other interpolations and crops; their
    fine-tuned classifiers are timm's work. DINOv2's at 224 pixels are timm's of 518, resampled.
    """
    embedding = ("CLIP", "SigLIP", "SigLIP 2", "DINOv3", "EUPE", "Perception Encoder", "EVA-02 CLIP")
    own = card.title in embedding and not card.config.num_classes
    return not own and not (card.title == "DINOv2" and card.config.img_size == (224, 224))
