"""Models by name: a card from the zoo, and weights fresh or read."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Callable
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tomevit import zoo
from tomevit.cards import Card, lines_left_out
from tomevit.config import Config, Pool
from tomevit.errors import check_type, why_no_device
from tomevit.flops import plain_schedule
from tomevit.models import VisionTransformer, build
from tomevit.schedule import Schedule
from tomevit.weights import checkpoint
from tomevit.weights.convert import adapt_weights, open_weights, published_weights

log = logging.getLogger("tomevit")


def create(
    name: str | Card,
    *,
    r: Schedule | None = None,
    pretrained: bool | str | PathLike[str] | nn.Module = False,
    format: str | None = None,  # noqa: A002
    key: str | None = None,
    prefix: str | None = None,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    prop_attn: bool | None = None,
    pool: Pool | None = None,
    matching: str | Callable[..., Any] | None = None,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    attn_dropout: float = 0.0,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
) -> VisionTransformer:
    """A model by name, in evaluation mode, ready to use.

    Args:
        name: family_size[_resolution][.weights], as in "vit_b16", "deit_s16.tome_r13", or timm's name for the same; or
            a card of the zoo's.
        r: tokens to merge in each block: an int, (r, inflection), a list with one entry per block, or a float up to
            0.5, the share of the patches entering each block; or words: "2x", at least twice fewer FLOPs, "60%", at
            most that share of them, "1.5x late", "8 pitome", the name of a preset on the card. Words become plain
            numbers (docs, Choosing r). None: what the weights were trained with, 0 for most.
        pretrained: False: fresh weights from torch's default generator. True: the name's weights, downloaded and
            converted on first use. Else a checkpoint of any known format: a file, a URL, hf-hub:owner/repo[@revision],
            or a name of the zoo with its weights' tag; or a model, in a wrapper of torch's or not, whose weights and
            card are copied: one of tomevit's, or of another library's as `tomevit.from_module` takes it. It must have
            the name's architecture, and brings its own image size and class count. Of an encoder without a head a model
            can be made that norms after the pooling, as MAE fine-tunes: "mae_b16" from "mae_cls_b16.pretrain".
        format, key, prefix: of a checkpoint given as pretrained, where it does not say itself what `tomevit.convert`
            asks for by these names.
        num_classes: outputs of the head, or of both heads; 0 leaves them out. Fresh weights replace pretrained ones
            for another number.
        img_size: pixels, one number or (height, width), divisible by the patch size. Pretrained positions are
            resampled as the project does it that they come from.
        in_chans: image channels; a pretrained patch embedding is summed or repeated over them.
        prop_attn: proportional attention; None: as the weights ask.
        pool: what the head reads, the class token or the mean patch.
        matching: a name in `tomevit.layers.MATCHINGS`, or a function of the keys, r and the number of prefix tokens, or
            of what it declares (`tomevit.layers.needs`), that returns a Merge. Where r names a matching, that one.
        drop_path, dropout, attn_dropout: probabilities, for training.
        device, dtype: where the weights go, and as what, in one step; None: the CPU, and float32, whatever torch's
            defaults are. Fresh weights are drawn on the CPU, and are the same for every device.

    Raises:
        ValueError: there is no such model, or an argument does not fit; the message says what would.
        CheckpointError: pretrained weights are damaged, hostile, of another model, or in need of one more argument.
        DownloadError: they could not be had; the message says how to bring them.
    """
    chosen = _card_of(name)
    name = chosen.full_name if isinstance(name, Card) else name
    place = _check_place(device, dtype)
    for said, text in (("format", format), ("key", key), ("prefix", prefix)):
        check_type(said, text, str | None, "a text")
    check_type("img_size", img_size, int | tuple | list | None, "pixels, as in 384 or (height, width)")
    size: Any = tuple(img_size) if isinstance(img_size, list) else img_size
    if isinstance(img_size, int):
        size = (img_size, img_size)
    shape: dict[str, Any] = {"img_size": size, "num_classes": num_classes, "in_chans": in_chans}
    run: dict[str, Any] = {"prop_attn": prop_attn, "pool": pool, "matching": matching}
    run |= {"drop_path": drop_path, "dropout": dropout, "attn_dropout": attn_dropout}
    config = _with(chosen.config, shape | run)  # before any download: it says what is wrong
    if r is not None:
        plain_schedule(r, config, chosen.presets)

    if isinstance(pretrained, bool) and (format or key or prefix):
        raise ValueError("format, key and prefix say what a checkpoint is: give it as pretrained=")
    if pretrained is False:
        model = build(config, chosen.r)
        model.eval().card = replace(zoo.architecture(name), config=config, preprocess=chosen.preprocess, r=chosen.r)
    elif pretrained is True or isinstance(pretrained, str | PathLike | nn.Module):
        if pretrained is True:
            weights = published_weights(chosen)
        else:
            weights = open_weights(
                pretrained,
                name,
                format=format,
                key=key,
                prefix=prefix,
                img_size=size,
                fresh_head=num_classes is not None,
            )
        if isinstance(pretrained, nn.Module):
            copies = {parameter: tensor.to("cpu", copy=True) for parameter, tensor in weights.tensors.items()}
            weights = weights._replace(tensors=copies)
        weights = adapt_weights(weights, shape, chosen)
        card = replace(weights.card, config=_with(weights.card.config, run))
        model = checkpoint.assemble(card, weights.tensors, weights.report.source)
    else:
        raise ValueError(
            f"pretrained is {reprlib.repr(pretrained)}, and must be True, False, a file, a URL, hf-hub:owner/repo or a "
            f"model"
        )
    if r is not None:
        model.r = r
    return model.to(*place)


def from_module(module: nn.Module, r: Schedule = 0) -> VisionTransformer:
    """A model with token merging of another library's model that is in memory: one line to try merging in your own.

    Taken are timm's VisionTransformer, its distilled one and Eva; of transformers ViT, DeiT, ViTMAE, DINOv2 (with
    registers too), DINOv3, and the image towers of CLIP and SigLIP; torchvision's VisionTransformer; open_clip's models
    with such a tower or one of timm's. With r = 0 it answers as the module does in evaluation mode: with logits, or
    the vector of an image, before it is normalised. What was taken for what, and what was left out, goes to the logger
    "tomevit" as INFO.

    Args:
        module: on any device, in a wrapper of torch's or not. A model of tomevit's is copied.
        r: tokens to merge in each block, as in `tomevit.create`.

    Returns:
        A model in evaluation mode, on the CPU, in float32, whose weights are copies: training one does not change the
        other. Its card has the images' preparation where the module says it, else the usual one of its library.

    Raises:
        CheckpointError: it computes what no model here does, or layers were replaced (adapters, quantised ones), which
            are named.
        ValueError: it is of no such library, or r does not fit.
    """
    check_type("module", module, nn.Module, "a model of timm, transformers, torchvision, open_clip or tomevit")
    weights = open_weights(module)
    plain_schedule(r, weights.card.config, weights.card.presets)
    copies = {name: tensor.to("cpu", copy=True) for name, tensor in weights.tensors.items()}
    report = weights.report
    model = checkpoint.assemble(weights.card, copies, report.source).float()
    model.r = r
    log.info("%s is %s (%s)", report.source, report.model, report.recognised)
    for sentence in (*report.changes, *(f"left out: {line}" for line in lines_left_out(report.left_out))):
        log.info("%s: %s", report.source, sentence)
    return model


def _card_of(name: str | Card) -> Card:
    """As `zoo.card`; a card stands for itself, and what is a file is told from a name."""
    if isinstance(name, Card):
        return zoo.card(name.full_name)
    file = fspath(name) if isinstance(name, str | PathLike) else ""
    if (Path(file).suffix in zoo.CHECKPOINTS or Path(file).is_file()) and not zoo.names_model(file):
        raise ValueError(
            f"{file} names a file, and create takes a model's name: tomevit.load({file!r}) reads a file of tomevit's, "
            f"create(NAME, pretrained={file!r}) any other"
        )
    return zoo.card(name)


def _check_place(
    device: torch.device | str | int | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Where weights go, and as what, before any are fetched.

    Raises:
        ValueError: there is no such device here, or weights cannot have that dtype.
    """
    dtype = torch.float32 if dtype is None else dtype
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}, and must be a floating one of torch's, as in torch.bfloat16")
    try:
        place = torch.device("cpu" if device is None else device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(f"device is {reprlib.repr(device)}, which there is not here{why_no_device(error)}") from error
    return place, dtype


def _with(config: Config, fields: dict[str, Any]) -> Config:
    return replace(config, **{name: value for name, value in fields.items() if value is not None})
