"""An observation as one picture, for a paper or a talk: the tokens, or where the class token looks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor

from tomevit.config import Config
from tomevit.errors import join_with_or
from tomevit.schedule import format_schedule
from tomevit.tasks import plots
from tomevit.tasks.visualize import Observation, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Show = Literal["picture", "strip", "attention"]
SHOW = get_args(Show)

COLUMNS = 6  # blocks of a strip, unless asked for
ATTENTION_NOTE = (
    "Attention of the class token in a block, mean of the heads; a token's share is divided among its patches.\n"
    "Black is none, the brightest patch of a picture has the share below it. Lines are around tokens that enter."
)


def draw(
    path: Path, suffix: str, observation: Observation, title: str, *, show: Show = "strip", blocks: Sequence[int] = ()
) -> None:
    """Draw an observation into a file.

    Args:
        path: the picture to write.
        suffix: its kind, as in ".png", whatever the path's.
        observation, title, show, blocks: as `figure`.

    Raises:
        ValueError: as `blocks_to_show`.
    """
    plots.save(figure(observation, title, show=show, blocks=blocks), path, suffix[1:])


def animation(path: Path, suffix: str, observation: Observation, title: str) -> None:  # noqa: ARG001
    """Draw an observation as an animation over the blocks.

    Args:
        path: the animation to write.
        suffix: its kind, ".gif" or ".mp4", whatever the path's.
        observation: what to draw.
        title: above everything.

    Raises:
        ValueError: there is no such animation yet.
    """
    raise ValueError(f"there are no animations yet, as {suffix} would be: name a page, .html, or a picture, .png")


def figure(observation: Observation, title: str, *, show: Show = "strip", blocks: Sequence[int] = ()) -> Figure:
    """An observation as a figure of matplotlib's.

    Args:
        observation: what to draw.
        title: above everything.
        show: "picture": the image, and what the last block leaves of it at each r (ToMe, figure 4). "strip": the tokens
            behind some blocks, a row for each r. "attention": where the class token looks in these blocks.
        blocks: which blocks, from 1; empty: six, evenly spaced, the last among them.

    Raises:
        ValueError: as `blocks_to_show`.
    """
    config, runs = observation.config, observation.runs
    blocks = blocks_to_show(config, show, blocks)
    image = observation.image / 255
    any_dropped = any(run.dropped[-1] for run in runs)
    merged_note = plots.MERGED_NOTE + f" {plots.DROPPED_NOTE}" * any_dropped
    if show == "picture":
        inches = 3.2
        pictures = [[image, *(_tokens(observation, run, config.depth, inches) for run in runs)]]
        columns = ["image", *(f"r = {_short(format_schedule(run.r))}" for run in runs)]
        captions = [[f"{config.num_patches} patches", *(_outcome(run) for run in runs)]]
        labels, note = [""], merged_note
    else:
        inches = 1.9
        columns = ["image", *(f"block {block}" for block in blocks)]
        labels = [_label(run) for run in runs]
        if show == "strip":
            pictures = [[image, *(_tokens(observation, run, block, inches) for block in blocks)] for run in runs]
            captions = [[f"{config.num_patches} patches", *(_left(run, block) for block in blocks)] for run in runs]
            note = merged_note
        else:
            pictures = [[image, *(_attention(observation, run, block, inches) for block in blocks)] for run in runs]
            captions = [["", *(f"at most {_most(run, block):.2g} %" for block in blocks)] for run in runs]
            note = ATTENTION_NOTE + " Hatched patches are dropped before." * any_dropped
    return plots.panels(pictures, columns, labels, title, note, captions=captions, inches=inches)


def blocks_to_show(config: Config, show: Show, blocks: Sequence[int] = ()) -> Sequence[int]:
    """The blocks that `draw` will show, from 1.

    Raises:
        ValueError: there is no such show or block, or no class token whose attention could be shown.
    """
    if show not in SHOW:
        raise ValueError(f"show is {show!r}, and must be {join_with_or(SHOW)}")
    if show == "picture" and blocks:
        raise ValueError("blocks are for strips and attention, and show='picture' shows the last block")
    if show == "attention" and not config.class_token:
        raise ValueError("this model has no class token, so there is no attention of its to show")
    for block in blocks:
        if not 1 <= block <= config.depth:
            raise ValueError(f"there is no block {block}: the model's are 1 to {config.depth}")
    many = min(COLUMNS, config.depth)
    return blocks or [round(config.depth * i / many) for i in range(1, many + 1)]


def _tokens(observation: Observation, run: Run, block: int, inches: float) -> Tensor:
    scale = _scale(observation.config, inches)
    return plots.draw_groups(observation.image, run.groups[block], scale, max(1, round(0.09 * scale)))


def _attention(observation: Observation, run: Run, block: int, inches: float) -> Tensor:
    assert run.attention is not None
    scale = _scale(observation.config, inches)
    share = run.attention[block - 1]
    return plots.draw_attention(observation.image, run.groups[block - 1], share, scale, max(1, round(0.03 * scale)))


def _scale(config: Config, inches: float) -> int:
    """Pixels along a patch, for twice the pixels that the page has: what is scaled down has smooth edges."""
    return max(4, math.ceil(2 * inches * plots.DPI / max(config.grid)))


def _most(run: Run, block: int) -> float:
    assert run.attention is not None
    return 100 * run.attention[block - 1].max().item()


def _label(run: Run) -> str:
    lines = [f"r = {_short(format_schedule(run.r))}", _cost(run)]
    return "\n".join([*lines, *_answer(run)])


def _outcome(run: Run) -> str:
    return "\n".join([f"{_left(run, len(run.tokens) - 1)}, {_cost(run)}", *_answer(run)])


def _left(run: Run, block: int) -> str:
    dropped = f", {run.dropped[block]} dropped" if run.dropped[block] else ""
    return f"{run.tokens[block]} tokens{dropped}"


def _cost(run: Run) -> str:
    flops = sum(run.flops)
    return f"{flops / 1e9:.3g} GFLOPs" if flops >= 1e9 else f"{flops / 1e6:.3g} MFLOPs"


def _answer(run: Run) -> list[str]:
    return [f"{_short(best.name)}, {100 * best.probability:.3g} %" for best in run.answers[:1]]


def _short(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:23]}…"
