"""An observation as a picture or an animation: the tokens, or where the class token looks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor

from tomevit.config import Config
from tomevit.errors import join_with_or
from tomevit.schedule import format_schedule
from tomevit.tasks import plots
from tomevit.tasks.visualize import Observation, Run, film, prefix_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Show = Literal["picture", "strip", "attention"]
SHOW = get_args(Show)

COLUMNS = 4  # blocks of a strip, unless asked for
INCHES = 2.5  # the longer edge of a picture in a strip
LARGE = 3.2  # and where each r has but one
FRAME, LAST = 0.4, 2.5  # seconds that an animation stays at a block, and at the end
ATTENTION_NOTE = (
    "Attention of the class token in a block, mean of the heads; a token's share is divided among its patches.\n"
    "The brighter a patch, the more it has: the brightest as much as is said below. Lines are around merged tokens."
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


def figure(observation: Observation, title: str, *, show: Show = "strip", blocks: Sequence[int] = ()) -> Figure:
    """An observation as a figure of matplotlib's: the image once, beside it what the model makes of it at each r.

    Args:
        observation: what to draw.
        title: above everything.
        show: "picture": the image, and what the last block leaves of it at each r (ToMe, figure 4). "strip": the tokens
            after some blocks, a row for each r. "attention": where the class token looks in these blocks.
        blocks: which blocks, from 1; empty: four, evenly spaced, the last among them.

    Raises:
        ValueError: as `blocks_to_show`.
    """
    blocks = blocks_to_show(observation.config, show, blocks)
    source, runs = _source(observation, show)
    note = _note(observation, show)
    inches = LARGE if show == "picture" else INCHES
    pixels = 2 * inches * plots.DPI  # twice those on the page: what is scaled down has smooth edges
    if show == "picture":
        pictures = [[_picture(observation, run, observation.config.depth, show, pixels) for run in runs]]
        columns = [_r(run) for run in runs]
        captions = [[_outcome(run) for run in runs]]
        return plots.panels(pictures, columns, [""], title, note, captions=captions, inches=inches, source=source)
    columns = [f"block {block}" if show == "attention" else f"after block {block}" for block in blocks]
    labels = ["\n".join([_r(run), _cost(run), *_answer(run)]) for run in runs]
    pictures = [[_picture(observation, run, block, show, pixels) for block in blocks] for run in runs]
    captions = [[_caption(run, block, show) for block in blocks] for run in runs]
    return plots.panels(pictures, columns, labels, title, note, captions=captions, inches=inches, source=source)


def animation(path: Path, suffix: str, observation: Observation, title: str, *, show: Show = "strip") -> None:
    """Draw an observation block by block, every r side by side, beside the image. It stays at the last block a while.

    Args:
        path: the file to write.
        suffix: ".gif", which begins again for ever, or ".mp4", whatever the path's.
        observation: what to draw.
        title: above everything.
        show: "strip" or "picture": the tokens after each block. "attention": where the class token looks in it.

    Raises:
        ValueError: there is no class token whose attention could be shown, or no encoder (`film.require_encoder`).
    """
    film.require_encoder(suffix)
    config = observation.config
    blocks_to_show(config, show)
    source, runs = _source(observation, show)
    steps = range(show == "attention", config.depth + 1)
    inches = max(2.2, 2 * LARGE / (1 + len(runs)))
    width = round(13 * inches * (1 + len(runs)))
    frames = plots.panels_over_time(
        [[_picture(observation, run, step, show, inches * plots.FRAME_DPI) for run in runs] for step in steps],
        [f"{_r(run)}: {_cost(run)}" for run in runs],
        "\n".join(wrap(title, round(0.75 * width))),
        "\n".join(wrap(_note(observation, show), width)),
        captions=[[_moment(run, step, show) for run in runs] for step in steps],
        inches=inches,
        source=source,
    )
    film.write(path, suffix, frames, [*[min(FRAME, 6 / len(steps))] * (len(steps) - 1), LAST])


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


def _source(observation: Observation, show: Show) -> tuple[plots.Source, list[Run]]:
    """The image, and the runs to show beside it: of tokens, those that change any, if there are such."""
    config, runs = observation.config, list(observation.runs)
    lines = [f"{config.num_tokens} tokens"]
    merging = [run for run in runs if run.tokens[-1] < run.tokens[0]]
    if show != "attention" and merging:
        plain = [run for run in runs if run not in merging]
        lines += [line for run in plain[:1] for line in (_cost(run), *_answer(run))]
        runs = merging
    return plots.Source(observation.image / 255, "image", "\n".join(lines)), runs


def _note(observation: Observation, show: Show) -> str:
    """What the pictures must be read with."""
    any_dropped = any(run.dropped[-1] for run in observation.runs)
    if show == "attention":
        return ATTENTION_NOTE + " Hatched patches are dropped before." * any_dropped
    names = prefix_names(observation.config)
    kinds = " and ".join(dict.fromkeys(name.split()[0] for name in names))  # "register 1": register
    tokens = f"{kinds} token, which never merges" if len(names) == 1 else f"{kinds} tokens, which never merge"
    included = f"\nTokens are counted with the {tokens}." if names else ""
    return plots.MERGED_NOTE + f" {plots.DROPPED_NOTE}" * any_dropped + included


def _picture(observation: Observation, run: Run, step: int, show: Show, pixels: float) -> Tensor:
    """The tokens after a step, or the attention in it, with at least so many pixels along the longer edge."""
    scale = max(4, math.ceil(pixels / max(observation.config.grid)))
    if show == "attention":
        assert run.attention is not None
        groups, share = run.groups[step - 1], run.attention[step - 1]
        return plots.draw_attention(observation.image, groups, share, scale, max(1, round(0.03 * scale)))
    return plots.draw_groups(observation.image, run.groups[step], scale, max(1, round(0.11 * scale)))


def _most(run: Run, block: int) -> float:
    assert run.attention is not None
    return 100 * run.attention[block - 1].max().item()


def _r(run: Run) -> str:
    return f"r = {_short(format_schedule(run.r))}"


def _caption(run: Run, block: int, show: Show) -> str:
    return f"at most {_most(run, block):.2g} %" if show == "attention" else _left(run, block)


def _moment(run: Run, step: int, show: Show) -> str:
    """Two lines below a frame: where it is, and at the end what the model says."""
    depth = len(run.tokens) - 1
    where = f"{'in' if show == 'attention' else 'after'} block {step} of {depth}" if step else "before block 1"
    return "\n".join([f"{where}: {_caption(run, step, show)}", *(_answer(run) if step == depth else [""])])


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
