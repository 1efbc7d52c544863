"""From a model to the graph of torch.export that all programs are made of."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from tomevit.config import Preprocess
from tomevit.models import VisionTransformer

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_ONE_AT_A_TIME = threading.RLock()

MOST_IMAGES = 2**16  # at a time: torch 2.6 wants a number


class Settings(NamedTuple):
    """How a program is written, besides what its graph and its metadata say."""

    dtype: str
    opset: int | None  # of ONNX; None: what torch's exporter recommends
    calibration: Sequence[Tensor]  # batches as the program takes them, by which int8 is scaled; () if there are none


class FromPixels(nn.Module):
    """A model whose first layer has taken the normalisation upon itself: it sees pixels from 0 to 1."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> what the model answers."""
        # Not 1/255 in the weights too: in float16 a good part of them would be below its normal range.
        return self.model(images.to(self.model.dtype) / 255)


def from_pixels(model: VisionTransformer) -> FromPixels:
    """The model after a normalisation that is part of its patch embedding; the model's own weights change."""
    fold_normalisation(model.patch_embed.proj, model.card.preprocess)
    return FromPixels(model)


@torch.no_grad()
def fold_normalisation(proj: nn.Conv2d, preprocess: Preprocess) -> None:
    """Have a layer without padding take x where it took (x - mean) / std; exact but for rounding.

    Args:
        proj: (D, C, P, P), with a bias or without; it has one afterwards.
        preprocess: with mean and std of C channels.
    """
    weight = proj.weight.double()
    mean, std = (
        torch.tensor(values, dtype=torch.float64, device=weight.device)[:, None, None]
        for values in (preprocess.mean, preprocess.std)
    )
    shift = -(weight * (mean / std)).sum((1, 2, 3))
    bias = shift if proj.bias is None else shift + proj.bias.double()
    dtype = proj.weight.dtype
    proj.weight = nn.Parameter((weight / std).to(dtype))
    proj.bias = nn.Parameter(bias.to(dtype))


def trace(model: nn.Module, images: Tensor, *, dynamic: bool) -> ExportedProgram:
    """The graph of a model in evaluation mode.

    Args:
        model: with one argument, `images`.
        images: an example; of two images or more if dynamic.
        dynamic: leave the number of images open.
    """
    shapes = {"images": {0: torch.export.Dim("batch", min=1, max=MOST_IMAGES)}} if dynamic else None
    with quiet():
        program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it would tell the directories of this machine
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that torch gives itself: nothing that a user could act on.

    One thread at a time: of two that change the filters of warnings, one would leave them changed.
    """
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        # torch 2.13's exporter copies its own TreeSpec, whose copying goes by way of its own deprecated LeafSpec.
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        yield
