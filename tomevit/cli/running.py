"""What commands run models on: their weights, devices, dtypes, and processes that read images."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace

import torch

from tomevit import zoo
from tomevit.cards import Card, is_ours, read_contents
from tomevit.data.distributed import on_this_machine
from tomevit.errors import why_no_device
from tomevit.factory import create
from tomevit.flops import plain_steps
from tomevit.models import VisionTransformer
from tomevit.schedule import Schedule
from tomevit.weights import checkpoint
from tomevit.weights.convert import adapt_weights, weights_of
from tomevit.weights.sources import card_of_source

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def card_of_argument(
    model: str, r_values: Iterable[Schedule | None] = (), img_size: tuple[int, int] | None = None
) -> Card:
    """What is known of a --model at that image size, before its weights are fetched.

    Args:
        model: a name or a file.
        r_values: what it is to run at; None: its own.
        img_size: what it is to run at; None: its own.

    Raises:
        ValueError, OSError: there is no such model or file, or it cannot have such an r or image size.
    """
    card = read_contents(model).card if is_ours(model) else _card_in_zoo(model) or weights_of(model).card
    if img_size is not None:
        card = replace(card, config=replace(card.config, img_size=img_size))
    for r in r_values:
        plain_steps(card.r if r is None else r, card.config, card.presets)
    return card


def _card_in_zoo(model: str) -> Card | None:
    """The card of a name or an address that the zoo has; None: only the weights say what they are of."""
    card = card_of_source(model) if zoo.is_elsewhere(model) else None
    return card if card is not None and (card.weights or not card.sources) else None


def trained(model: str, r: Schedule | None = None, img_size: tuple[int, int] | None = None) -> VisionTransformer:
    """A model with its weights, as `weights_of` finds them, in their dtype; of the zoo's they are fetched on first use.

    Raises:
        ValueError, OSError: there is no such model or file, or the weights cannot be had; the message says more.
    """
    card, tensors, report = adapt_weights(weights_of(model), {"img_size": img_size})
    loaded = checkpoint.assemble(card, tensors, report.source)
    if r is not None:
        loaded.r = r
    return loaded


def untrained(model: str, img_size: tuple[int, int] | None = None) -> VisionTransformer:
    """A model to measure the speed of: the zoo's have fresh weights, which cost no download; others have their own."""
    card = _card_in_zoo(model)
    return trained(model, img_size=img_size) if card is None else create(card.full_name, img_size=img_size)


def device_of(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: there is none here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # what is on meta cannot be had
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"there is no device {name!r} here{why_no_device(error)}") from error
    return device


def own_device(name: str) -> torch.device:
    """As `device_of`; but of several processes on this machine, "cuda" is for each a GPU of its own."""
    number, count = on_this_machine()
    if count > 1 and name == "cuda":
        if (gpus := torch.cuda.device_count()) < count:
            raise ValueError(
                f"there are {count} processes on this machine and {gpus} GPUs; start one for each, with "
                f"torchrun --nproc-per-node {gpus}"
            )
        name = f"cuda:{number}"
    return device_of(name)


def readers(device: torch.device) -> int:
    """Processes to read images: as many as this process has CPUs, half of them where the model needs them too."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpus //= on_this_machine()[1]
    return max(1, min(8, cpus // 2 if device.type == "cpu" else cpus))
