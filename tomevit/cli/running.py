"""What commands run models on: their weights, devices, dtypes, and processes that read images."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from tomevit.data.distributed import on_this_machine
from tomevit.factory import create
from tomevit.models import VisionTransformer
from tomevit.schedule import Schedule
from tomevit.weights import checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def trained(model: str, r: Schedule | None = None, img_size: tuple[int, int] | None = None) -> VisionTransformer:
    """A model with its weights: by name, which downloads them on first use, or a file that tomevit wrote.

    Raises:
        ValueError, OSError: there is no such model or file, or the weights cannot be had; the message says more.
    """
    if not Path(model).is_file():
        return create(model, pretrained=True, r=r, img_size=img_size)
    if img_size is not None:
        return create(checkpoint.read(model).card.full_name, pretrained=model, r=r, img_size=img_size)
    loaded = checkpoint.load(model)
    if r is not None:
        loaded.r = r
    return loaded


def device_of(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: there is none here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # what is on meta cannot be had
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"there is no device {name!r} here: {str(error).splitlines()[0]}") from error
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
