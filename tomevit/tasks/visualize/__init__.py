"""What merging does to one image: which patches are one token after each block, and where the class token looks.

`visualize` and `observe` compute it, as plain data. `pictures.draw` makes a picture of it, `page.html` a page to look
around in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from tomevit.cards import Card
from tomevit.config import Config
from tomevit.data.class_names import class_names
from tomevit.data.images import read
from tomevit.errors import check_path, check_type, printable
from tomevit.flops import flops_by_step
from tomevit.layers.block import Block
from tomevit.layers.merge import Tokens
from tomevit.measure.defaults import default_r
from tomevit.models import VisionTransformer, unwrap
from tomevit.output import is_stream, new_file
from tomevit.schedule import Schedule, distinct_schedules, format_schedule
from tomevit.subject import subject_of
from tomevit.tasks import plots
from tomevit.tasks.visualize.film import SUFFIXES as ANIMATIONS
from tomevit.tasks.visualize.film import require_encoder
from tomevit.transform import Transform, transform

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from tomevit.tasks.visualize.pictures import Show

__all__ = [
    "Observation",
    "Prediction",
    "Run",
    "attention_weights",
    "file_kind",
    "group_sizes",
    "observe",
    "prefix_names",
    "undo_normalisation",
    "visualize",
]

PAGE = ".html"

ANSWERS = 3  # the most probable classes of each run


class Prediction(NamedTuple):
    """A class that a model takes an image for."""

    number: int
    name: str  # the class's, or "class 17" where no names are known
    probability: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """What became of an image at one r. Step 0 is the patch embedding, step i block i."""

    r: Schedule  # as it was asked for
    plain: Schedule  # in numbers: what "2x" means for this model
    tokens: tuple[int, ...]  # that leave each step, prefix included: depth + 1
    flops: tuple[int, ...]  # multiply-adds of each step, as the paper counts them: depth + 1
    #: (depth + 1, rows, columns) int64: the token that each patch is part of after each step, from 0; -1 if dropped
    groups: Tensor
    attention: Tensor | None  # (depth, rows, columns) float32: of the class token in each block, each patch's share
    prefix_attention: (
        Tensor | None
    )  # (depth, num_prefix) float32: the shares of the prefix, the class token's own first
    answers: tuple[Prediction, ...]  # the most probable first; none from a model without a head

    @property
    def dropped(self) -> tuple[int, ...]:
        """How many patches are part of no token after each step: depth + 1 numbers."""
        return tuple((self.groups < 0).sum((1, 2)).tolist())


@dataclass(frozen=True, eq=False, kw_only=True)
class Observation:
    """One image in one model, at several r."""

    card: Card
    config: Config
    image: Tensor  # (C, H, W) uint8: the pixels that the model saw, after the resize and the crop
    runs: tuple[Run, ...]
    title: str = ""  # above pages and pictures: the name of the image's file, say

    def __repr__(self) -> str:
        tokens = ", ".join(
            f"r = {format_schedule(run.r)}: {run.tokens[0]} to {run.tokens[-1]} tokens" for run in self.runs
        )
        image = printable(self.title) or "an image"
        return f"<Observation of {image} in {printable(self.card.full_name) or 'a model without a name'}; {tokens}>"

    def _repr_html_(self) -> str:
        from tomevit.tasks.visualize import page

        content = escape(page.html(self, self.title or self.card.full_name))
        return f'<iframe srcdoc="{content}" sandbox="allow-scripts" style="width:100%;height:52em;border:0"></iframe>'

    def figure(self, *, show: Show = "strip", blocks: Sequence[int] = ()) -> Figure:
        """A figure of matplotlib's, which a notebook shows.

        Args:
            show: "picture": the image, and what the last block leaves of it at each r. "strip": the tokens after some
                blocks, a row for each r. "attention": where the class token looks in these blocks.
            blocks: of a strip or of attention: which blocks, from 1; empty: four, evenly spaced, the last among them.

        Raises:
            ValueError: matplotlib is not installed; there is no such block; or no class token whose attention could be
                shown.
        """
        from tomevit.tasks.visualize import pictures

        plots.require_matplotlib()
        return pictures.figure(self, self._heading(), show=show, blocks=blocks)

    def save(self, path: str | PathLike[str], *, show: Show | None = None, blocks: Sequence[int] = ()) -> None:
        """Write it, as the name's ending says.

        A page, .html, is one file without network: a slider over blocks, the token of each patch, tokens and FLOPs.
        A picture, .png, .svg or .pdf, is one for print; an animation, .gif or .mp4, goes through the blocks.

        Args:
            path: the file; what was there is replaced.
            show, blocks: of a picture, as `figure` takes them; None: "strip". An animation takes show, and no blocks.

        Raises:
            ValueError: the name ends otherwise; or show or blocks do not fit.
            OSError: nothing can be written there.
        """
        from tomevit.tasks.visualize import page, pictures

        check_path("path", path, "the file to write")
        kind = file_kind(Path(path), as_picture=bool(show or blocks))
        if kind == PAGE and (show or blocks):
            raise ValueError(f"show and blocks are for pictures, and {path} is none: it shows everything")
        if kind in ANIMATIONS and blocks:
            raise ValueError(f"blocks are for strips, and {path} is an animation over all blocks")
        pictures.blocks_to_show(self.config, show or "strip", blocks)
        with new_file(path) as draft:
            if kind == PAGE:
                draft.write_text(page.html(self, self.title or self.card.full_name), encoding="utf-8")
            elif kind in ANIMATIONS:
                pictures.animation(draft, kind, self, self._heading(), show=show or "strip")
            else:
                pictures.draw(draft, kind, self, self._heading(), show=show or "strip", blocks=blocks)

    def _heading(self) -> str:
        return " in ".join(filter(None, (self.title, self.card.full_name)))


def file_kind(path: Path, *, as_picture: bool = False) -> str:
    """The kind of file that `Observation.save` will write: ".html", one of ANIMATIONS, or a picture's, as in ".png".

    Args:
        path: whose name says it.
        as_picture: a pipe without such a name gets a PNG, and not a page.

    Raises:
        ValueError: there is no such kind, or what draws it is not installed.
    """
    suffix = path.suffix.lower()
    if suffix in (PAGE, ".htm") or (is_stream(path) and not suffix and not as_picture):
        return PAGE
    plots.require_matplotlib()
    if suffix in ANIMATIONS:
        require_encoder(suffix)
        return suffix
    try:
        return plots.picture_kind(path)
    except ValueError as error:
        raise ValueError(f"{error}, a page's in {PAGE}, an animation's in {' or '.join(ANIMATIONS)}") from None


def visualize(
    model: nn.Module,
    image: str | PathLike[str] | bytes | Image | Tensor,
    r_values: Sequence[Schedule] | None = None,
    *,
    title: str | None = None,
    upright: bool = True,
    progress: Callable[[], object] = lambda: None,
) -> Observation:
    """What merging does to one image, at each r, to look at.

    A notebook shows the result as a page with a slider over the blocks; `.figure()` is a figure of it, and
    `.save(path)` writes a page, a picture or an animation.

    Args:
        model: in evaluation mode, of one or three channels; in a wrapper of torch's or not.
        image: a file, what is in one (bytes), a PIL image, or a uint8 tensor (C, H, W).
        r_values: one or more, as `model.r`; None: 0, three that fit the depth, those with published accuracies, and the
            model's own.
        title: above pages and pictures; None: the file's name.
        upright: turn a photograph as its EXIF data says; PIL images and tensors are taken as they are.
        progress: called after each r.

    Raises:
        ValueError: as `observe`; or the file is no image.
    """
    subject = subject_of(model, "a model of tomevit's")
    if r_values is None:
        r_values = distinct_schedules([0, *default_r(subject.card), subject.r])
    check_type("r_values", r_values, (list, tuple), "a list of r, as in [0, 8, '2x']")
    if isinstance(image, str | PathLike | bytes):
        name = "" if isinstance(image, bytes) else Path(image).name
        photograph: Image | Tensor = read(image, upright=upright)
    else:
        name, photograph = "", image
    found = observe(model, photograph, r_values, progress=progress)
    return replace(found, title=name if title is None else title)


@torch.inference_mode()
def observe(
    model: nn.Module,
    image: Image | Tensor,
    r_values: Sequence[Schedule],
    *,
    progress: Callable[[], object] = lambda: None,
) -> Observation:
    """What merging does to one image, at each r.

    Attention is averaged over the heads. A merged token's share is divided among its patches, so that the shares of all
    patches and of the prefix sum to 1; a dropped patch has none. Where there is no class token, there is none.

    Args:
        model: in evaluation mode, of one or three channels; in a wrapper of torch's or not.
        image: as `tomevit.transform(model)` takes it: a PIL image, or a uint8 tensor (C, H, W).
        r_values: one or more, as `model.r`.
        progress: called after each r.

    Raises:
        ValueError: the model is in training mode or takes no pictures, the image does not fit, or an r has no known
            form or is not for this depth.
    """
    check_type("model", unwrap(model), VisionTransformer, "a VisionTransformer of tomevit's")
    model = cast("VisionTransformer", unwrap(model))
    config = model.config
    if model.training:
        raise ValueError("the model is in training mode, in which answers are random: call model.eval()")
    if config.in_chans not in (1, 3):
        raise ValueError(f"a picture has one or three channels, and the model takes {config.in_chans}")
    if not r_values:
        raise ValueError("r_values is empty; give one r at least")
    for r in r_values:
        model.schedule(r)  # a wrong one ends it here
    prepare = transform(model)
    images = prepare(image)[None]
    if images.ndim != 4:
        raise ValueError(f"the image is a tensor of {images.ndim - 1} dimensions; give one image, (C, H, W)")
    pixels = undo_normalisation(images[0], prepare)
    images = images.to(model.device)
    embedded = model._embed(images, trace=True)
    runs = []
    for r in r_values:
        runs.append(_run(model, [embedded, *model.forward_intermediates(images, r)], r))
        progress()
    return Observation(card=model.card, config=config, image=pixels, runs=tuple(runs))


def _run(model: VisionTransformer, steps: Sequence[Tokens], r: Schedule) -> Run:
    """From the tokens of one image after each step."""
    config, prefix, plain = model.config, model.config.num_prefix, model.plain(r)
    slots = [step.slots for step in steps if step.slots is not None]  # traced, so all of them
    groups = torch.cat(slots)[:, prefix:].sub(prefix).clamp(min=-1).view(-1, *config.grid).cpu()
    attention = prefix_attention = None
    if config.class_token:
        blocks: Any = model.blocks
        weights = [attention_weights(*entering)[0, :, 0].mean(0).cpu() for entering in zip(blocks, steps, strict=False)]
        prefix_attention = torch.stack([weight[:prefix] for weight in weights])
        entering = groups[:-1]
        shares = torch.stack([weight[prefix:][into] for weight, into in zip(weights, entering, strict=True)])
        attention = torch.where(entering < 0, 0.0, shares / group_sizes(entering))
    return Run(
        r=r,
        plain=plain,
        tokens=tuple(step.x.shape[1] for step in steps),
        flops=flops_by_step(config, plain),
        groups=groups,
        attention=attention,
        prefix_attention=prefix_attention,
        answers=_answers(model, steps[-1]),
    )


def _answers(model: VisionTransformer, last: Tokens) -> tuple[Prediction, ...]:
    if not model.config.num_classes:
        return ()
    logits = model.forward_head(last._replace(x=model.norm(last.x)))[0]
    best = logits.to(torch.float32).softmax(0).topk(min(ANSWERS, len(logits)))
    names = class_names(model.card)
    return tuple(
        Prediction(number, names.short(number), probability)
        for probability, number in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )


def attention_weights(block: Block, tokens: Tokens, num_queries: int = 1) -> Tensor:
    """The attention weights of the first tokens in a block, which fused attention never shows; they sum to 1.

    Args:
        block: in evaluation mode.
        tokens: that enter it, x (B, N, D); their weights count, and without such their sizes where the block's
            attention is proportional.
        num_queries: how many tokens, from the front, to ask for. The first is the class token, where there is one.

    Returns:
        (B, H, num_queries, N) float32
    """
    attention = block.attn
    qkv = attention.qkv(block.norm1(tokens.x))
    q, k, _ = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, d=attention.head_dim)
    q, k = attention.q_norm(q[:, :, :num_queries]), attention.k_norm(k)
    if tokens.rope is not None:
        q, k = attention.rotate(q, tokens.rope[:, :num_queries]), attention.rotate(k, tokens.rope)
    scores = q.to(torch.float32) @ k.to(torch.float32).transpose(-2, -1) * attention.head_dim**-0.5
    counts = (tokens.size if block.prop_attn else None) if tokens.weight is None else tokens.weight
    if counts is not None:
        scores += rearrange(counts.log(), "b n 1 -> b 1 1 n")
    return scores.softmax(-1)


def group_sizes(groups: Tensor) -> Tensor:
    """How many patches each patch's group has; 0 for a patch that was dropped.

    Args:
        groups: (..., rows, columns) int64 from 0, the group of each patch; -1 if it was dropped.

    Returns:
        As groups.
    """
    flat = groups.flatten(-2)
    there, group = (flat >= 0).to(torch.int64), flat.clamp(min=0)
    count = torch.zeros_like(flat).scatter_add_(-1, group, there)
    return (count.gather(-1, group) * there).view_as(groups)


def prefix_names(config: Config) -> list[str]:
    """What the tokens in front of the patches are called, which never merge and are counted among all tokens."""
    names = ["class"] * config.class_token + ["distillation"] * config.dist_token
    return names + [f"register {i}" for i in range(1, config.reg_tokens + 1)]


def undo_normalisation(image: Tensor, prepared_by: Transform) -> Tensor:
    """The pixels of an image that a transform has prepared, (C, H, W) uint8, to the bit."""
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=image.device)[:, None, None]
        for values in (prepared_by.preprocess.mean, prepared_by.preprocess.std)
    )
    return image.mul(std).add(mean).mul(255).round().clamp(0, 255).to(torch.uint8)
