"""Pictures. Matplotlib is imported when one is drawn, and written to without pyplot's global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from colorsys import hsv_to_rgb
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tomevit.errors import printable
from tomevit.output import is_stream
from tomevit.schedule import Schedule, format_schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The palette of all pictures and of the page: text, lines behind it, what differs in kind, and what is lit.
INK = "#1f2430"
GREY = "#8a8f98"
FAINT = "#c9ccd2"
COLOURS = ("#c8553d", "#2b6cb0", "#3a7d44", "#7b4fa3")
LIGHT = "#ffb54a"

OPACITY = 0.6  # of a merged token over the image
DIM = 0.2  # how bright a patch is that is not attended to
LIT = 0.35  # the share of LIGHT in one that is attended to most

DPI = 160
FRAME_DPI = 130  # of an animation

MERGED_NOTE = (
    "Lines are around the patches of one token, tinted with its mean, and parts of it share a colour; all other "
    "patches are a token each."
)
DROPPED_NOTE = "Dark, hatched patches are dropped: no token stands for them."


def shade(place: float) -> tuple[float, float, float]:
    """The colour of a line among several of rising r: from blue, the lowest at 0, over violet to red, the highest at 1.

    Returns:
        red, green and blue in [0, 1]
    """
    blue, violet, red = (_channels(COLOURS[i]) for i in (1, 3, 0))
    low, high, share = (blue, violet, 2 * place) if place < 0.5 else (violet, red, 2 * place - 1)
    first, second, third = (a + (b - a) * share for a, b in zip(low, high, strict=True))
    return first, second, third


def _channels(colour: str) -> tuple[float, ...]:
    """Of "#c8553d", in [0, 1]."""
    return tuple(value / 255 for value in bytes.fromhex(colour[1:]))


def require_matplotlib() -> None:
    """Say so before any work is done, if pictures cannot be drawn.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("drawing pictures needs matplotlib: pip install 'tomevit[plot]'")


def paint_groups(image: Tensor, groups: Tensor) -> Tensor:
    """Every group of patches in its mean colour.

    Args:
        image: (C, H, W).
        groups: (rows, columns) int64, the group of each patch; H and W are multiples of them.

    Returns:
        (C, H, W) float32
    """
    channels, height, width = image.shape
    names, index = torch.unique(_enlarge(groups, height, width).flatten(), return_inverse=True)
    pixels = image.flatten(1).to(torch.float32)
    sums = pixels.new_zeros(channels, len(names)).index_add_(1, index, pixels)
    return (sums / index.bincount())[:, index].view(channels, height, width)


def outline(groups: Tensor, scale: int, width: int) -> Tensor:
    """Where a line runs inside each group's edge, in an image with `scale` pixels to a patch; none in dropped patches.

    Args:
        groups: (rows, columns) int64 from 0, the group of each patch; -1 if it was dropped.
        scale: pixels along a patch.
        width: of the line, in pixels.

    Returns:
        (rows * scale, columns * scale) bool
    """
    fine = _enlarge(groups, groups.shape[0] * scale, groups.shape[1] * scale)
    # Around the image stands -1, which is no group of patches, so that the image's own edge is an edge too.
    around = F.pad(fine[None, None].to(torch.float32), [width] * 4, value=-1.0)
    highest, lowest = _highest(around, 2 * width + 1), -_highest(-around, 2 * width + 1)
    return ((highest != fine) | (lowest != fine)) & (fine >= 0)


def _highest(values: Tensor, across: int) -> Tensor:
    """The highest value in the square around each pixel, one direction after the other."""
    return F.max_pool2d(F.max_pool2d(values, (across, 1), stride=1), (1, across), stride=1)[0, 0]


def edge_colours(rows: int, columns: int) -> Tensor:
    """The colour of the line around the token whose first patch is here: (rows, columns, 3) float32 in [0, 1].

    A token keeps it as it grows. The steps of the hue down and across are those that spread points best in a plane
    (powers of 1 over the plastic number), so that neighbours differ on any grid.
    """
    hues = [(row * 0.7549 + column * 0.5698) % 1 for row in range(rows) for column in range(columns)]
    colours = [hsv_to_rgb(hue, 0.75, 0.95) for hue in hues]
    return torch.tensor(colours, dtype=torch.float32, device="cpu").view(rows, columns, 3)


def draw_groups(image: Tensor, groups: Tensor, scale: int = 24, width: int = 2) -> Tensor:
    """The image under its tokens: those of several patches in their mean colour, translucent, with a line inside.

    A patch that is a token of its own is as it was. Dropped patches are dark and hatched, each in its own colour.

    Args:
        image: (C, H, W) uint8, with one or three channels.
        groups: (rows, columns) int64 from 0, the group of each patch; -1 if it was dropped.
        scale: pixels along a patch.
        width: of the line, in pixels.

    Returns:
        (3, rows * scale, columns * scale) float32 in [0, 1]
    """
    height, across = groups.shape[0] * scale, groups.shape[1] * scale
    dropped = groups < 0
    alone = groups.max() + 1 + torch.arange(groups.numel(), device=groups.device).view_as(groups)
    shown = torch.where(dropped, alone, groups)
    _, index, count = torch.unique(shown.flatten(), return_inverse=True, return_counts=True)
    position = torch.arange(len(index), device=index.device)
    first = torch.full_like(count, len(index)).scatter_reduce(0, index, position, "amin")
    merged = _enlarge((count > 1)[index].view(groups.shape), height, across)
    colours = edge_colours(*groups.shape).to(index.device).flatten(0, 1)[first]
    lines = colours[_enlarge(index.view(groups.shape), height, across)].permute(2, 0, 1)
    down, right = (image.shape[i + 1] // groups.shape[i] for i in (0, 1))
    painted = paint_groups(image, shown)[:, ::down, ::right] / 255  # all pixels of a patch are the same
    painted = torch.stack([_enlarge(channel, height, across) for channel in painted])
    below = _resize(image, groups.shape[0], height, across)
    below = torch.where(
        merged, below + OPACITY * (painted - below), torch.where(_enlarge(dropped, height, across), painted, below)
    )
    picture = _hatch(below.expand(3, -1, -1), dropped, scale)
    return torch.where(outline(groups, scale, width) & merged, lines, picture)


def _resize(image: Tensor, rows: int, height: int, width: int) -> Tensor:
    """An image (C, H, W) uint8 of so many rows of patches, larger: (C, height, width) float32 in [0, 1]."""
    picture = image[None].to(torch.float32) / 255
    if image.shape[1] > 4 * rows:
        return F.interpolate(picture, (height, width), mode="bilinear", antialias=True)[0]
    return F.interpolate(picture, (height, width), mode="nearest-exact")[0]  # few pixels, which had better show as such


def _hatch(picture: Tensor, dropped: Tensor, scale: int) -> Tensor:
    """A picture (3, H, W) whose dropped patches, (rows, columns) bool, are dark with bright diagonals."""
    down, across = (torch.arange(length, device=picture.device) for length in picture.shape[1:])
    line = (down[:, None] + across) % max(4, scale // 3) < max(1, scale // 10)
    dark = torch.where(line, 0.3 * picture + 0.3, 0.3 * picture)
    return torch.where(_enlarge(dropped, *picture.shape[1:]), dark, picture)


def _enlarge(values: Tensor, height: int, width: int) -> Tensor:
    """(rows, columns) to (height, width), multiples of them, by repetition."""
    rows, columns = values.shape
    return values.repeat_interleave(height // rows, 0).repeat_interleave(width // columns, 1)


def draw_attention(image: Tensor, groups: Tensor, share: Tensor, scale: int = 24, width: int = 1) -> Tensor:
    """The image, lit where it is attended to and dim elsewhere, with a thin line inside the edge of each merged token.

    Args:
        image: (C, H, W) uint8, with one or three channels.
        groups: (rows, columns) int64 from 0, the group of each patch; -1 if it was dropped, and is hatched.
        share: (rows, columns) float32, each patch's share of the attention; the largest is brightest.
        scale: pixels along a patch.
        width: of the line, in pixels.

    Returns:
        (3, rows * scale, columns * scale) float32 in [0, 1]
    """
    height, across = groups.shape[0] * scale, groups.shape[1] * scale
    level = _enlarge(share / share.max(), height, across)
    picture = _resize(image, groups.shape[0], height, across).expand(3, -1, -1)
    light = torch.tensor(_channels(LIGHT), dtype=torch.float32, device=picture.device)[:, None, None]
    picture = DIM * picture * (1 - level) + level * (picture + LIT * (light - picture))
    _, index, count = torch.unique(groups.flatten(), return_inverse=True, return_counts=True)
    merged = _enlarge((count > 1)[index].view(groups.shape), height, across)
    picture = torch.where(outline(groups, scale, width) & merged, 0.7 * picture + 0.3, picture)
    return _hatch(picture, groups < 0, scale)


def merged_tokens(
    path: Path,
    images: Sequence[Tensor],
    groups: Sequence[Sequence[Tensor]],
    columns: Sequence[str],
    labels: Sequence[str],
    title: str,
) -> None:
    """Images in rows; beside each, what is left of it as its patches merge (as in the ToMe paper, figure 4).

    Args:
        path: the PNG to write.
        images: (C, H, W) uint8, with one or three channels.
        groups: for each image and each column but the first, (rows, columns) int64, the group of each patch, or -1.
        columns: headings; the first is the untouched image's.
        labels: one for each image.
        title: above everything.
    """
    pictures = [
        [image / 255, *(draw_groups(image, step, width=3) for step in steps)]
        for image, steps in zip(images, groups, strict=True)
    ]
    save(panels(pictures, columns, labels, title, MERGED_NOTE), path)


class Source(NamedTuple):
    """What all pictures of a figure are of."""

    picture: Tensor  # (C, H, W) in [0, 1]
    heading: str
    caption: str


def panels(
    pictures: Sequence[Sequence[Tensor]],
    columns: Sequence[str],
    labels: Sequence[str],
    title: str,
    note: str,
    *,
    captions: Sequence[Sequence[str]] = (),
    inches: float = 1.45,
    source: Source | None = None,
) -> Figure:
    """Pictures of one shape in rows and columns, for `save`.

    Args:
        pictures: rows of (C, H, W) in [0, 1], with one or three channels.
        columns: headings.
        labels: one for each row, to its left.
        title: above everything.
        note: below everything.
        captions: for each picture, a line below it; none at all if empty.
        inches: the longer edge of each picture.
        source: once, to the left of all rows.
    """
    figure, _ = _panels(pictures, columns, labels, title, note, captions=captions, inches=inches, source=source)
    _make_texts_plain(figure)
    return figure


def panels_over_time(
    pictures: Sequence[Sequence[Tensor]],
    columns: Sequence[str],
    title: str,
    note: str,
    *,
    captions: Sequence[Sequence[str]],
    inches: float,
    source: Source,
) -> list[np.ndarray]:
    """Pictures side by side that change from frame to frame, all else in place.

    Args:
        pictures: for each frame, a row of (C, H, W) in [0, 1].
        columns: headings.
        title: above everything.
        note: below everything.
        captions: for each frame and picture, as many lines in all.
        inches: the longer edge of each picture.
        source: to their left, the same in every frame.

    Returns:
        frames, (height, width, 3) uint8
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure, (axes,) = _panels(
        pictures[-1:], columns, [""], title, note, captions=captions[-1:], inches=inches, source=source
    )
    figure.set_dpi(FRAME_DPI)
    canvas: Any = FigureCanvasAgg(figure)  # its methods have no types
    _make_texts_plain(figure)
    canvas.draw()
    figure.set_layout_engine("none")  # so that nothing moves as captions change
    frames = []
    for row, words in zip(pictures, captions, strict=True):
        for axis, picture, caption in zip(axes, row, words, strict=True):
            axis.images[0].set_data(_pixels(picture))
            axis.set_xlabel(caption)
        _make_texts_plain(figure)
        canvas.draw()
        frames.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    return frames


def _panels(
    pictures: Sequence[Sequence[Tensor]],
    columns: Sequence[str],
    labels: Sequence[str],
    title: str,
    note: str,
    *,
    captions: Sequence[Sequence[str]],
    inches: float,
    source: Source | None,
) -> tuple[Figure, list[list[Axes]]]:
    """As `panels` has it, and the axes of the rows."""
    height, width = pictures[0][0].shape[1:]
    across, down = inches * width / max(height, width), inches * height / max(height, width)
    below = [caption for row in captions for caption in row]
    if source is not None and len(pictures) == 1:
        below.append(source.caption)
    lines = 0.2 * max((caption.count("\n") + 1 for caption in below), default=0)
    first = 0 if source is None else 1
    figure = _figure(across * (len(columns) + first) + 0.6, (down + lines) * len(pictures) + 1.1)
    grid = figure.add_gridspec(len(pictures), len(columns) + first, wspace=0.02, hspace=0.02)
    axes = [[figure.add_subplot(grid[i, first + j]) for j in range(len(columns))] for i in range(len(pictures))]
    if source is not None:
        _show(figure.add_subplot(grid[:, 0]), source.picture, source.caption, source.heading)
    for i, (row, label) in enumerate(zip(pictures, labels, strict=True)):
        for j, picture in enumerate(row):
            _show(axes[i][j], picture, captions[i][j] if captions else "", "" if i else columns[j])
        axes[i][0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=11, color=INK, labelpad=8)
    figure.suptitle(title, fontsize=12.5, color=INK)
    figure.supxlabel(note, fontsize=9, color=GREY)
    return figure, axes


def tokens_per_layer(path: Path, suffix: str, lines: Mapping[str, Sequence[int]], title: str, note: str = "") -> None:
    """How many tokens remain after each block, a line for each schedule.

    Args:
        path: the picture to write.
        suffix: its kind, as in ".png", whatever the path's.
        lines: for each schedule's label, the tokens that enter the first block and that leave each: depth + 1 numbers.
        title: above the plot.
        note: below it.
    """
    from matplotlib.ticker import MaxNLocator

    figure = _figure(7.6, 4.6)
    axis = figure.subplots()
    for i, (label, counts) in enumerate(lines.items()):
        colour = shade(i / max(1, len(lines) - 1))
        axis.plot(
            range(len(counts)), counts, color=colour, marker="os^Dv"[i % 5], markersize=5, linewidth=1.8, label=label
        )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.margins(x=0.03)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("block", fontsize=10.5, color=INK)
    axis.set_ylabel("tokens after it", fontsize=10.5, color=INK)
    axis.set_title(title, fontsize=12.5, color=INK, pad=12)
    _tidy(axis)
    axis.legend(frameon=False, fontsize=9.5, labelcolor=INK, loc="best")
    figure.supxlabel("\n".join(wrap(note, 92)), fontsize=9, color=GREY)
    save(figure, path, suffix[1:])


class Point(NamedTuple):
    """What one r gives."""

    label: str
    throughput: float  # images per second
    accuracy: float  # per cent
    cost: float  # FLOPs, in any unit: at one r the same for models of one architecture
    interval: tuple[float, float] | None = None  # around the accuracy; None: not drawn


def accuracy_throughput(
    path: Path, lines: Mapping[str, Sequence[Point]], title: str, note: str, *, suffix: str = ".png"
) -> None:
    """Accuracy against throughput, one line for each model, each point labelled.

    Args:
        path: the picture to write.
        lines: for each model's name, its points, the one without merging first. Points of several lines with the same
            label and cost are joined, and labelled once.
        title: above the plot.
        note: below it, what the figures must be read with.
        suffix: the picture's kind, whatever the path's.
    """
    from matplotlib.patheffects import withStroke

    figure = _figure(7.6, 4.9)
    axis = figure.subplots()
    alike: dict[tuple[str, float], list[Point]] = {}
    for i, (name, points) in enumerate(lines.items()):
        across, up = [point.throughput for point in points], [point.accuracy for point in points]
        colour = COLOURS[i % len(COLOURS)]
        axis.plot(
            across, up, color=colour, marker="os^Dv"[i % 5], markersize=6, linewidth=1.8, label=name, clip_on=False
        )
        for point in points:
            alike.setdefault((point.label, point.cost), []).append(point)
            if point.interval is not None:
                axis.vlines(point.throughput, *point.interval, color=colour, linewidth=1, alpha=0.6)
    firsts = {points[0].label for points in lines.values()}
    for (label, _), points in alike.items():
        axis.plot(
            [point.throughput for point in points],
            [point.accuracy for point in points],
            color=FAINT,
            linewidth=1,
            linestyle=(0, (3, 3)),
            zorder=1,
        )
        # The first point, without merging, is the highest: its label stands above, clear of those that follow.
        below = label not in firsts
        point = (min if below else max)(points, key=lambda point: point.accuracy)
        ends = point.interval or (point.accuracy, point.accuracy)
        text = axis.annotate(
            label,
            (point.throughput, ends[0] if below else ends[1]),
            (0, -9 if below else 9),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            fontsize=9,
            color=INK,
        )
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])
    axis.margins(x=0.07, y=0.14)
    axis.set_xlabel("throughput, images/s", fontsize=10.5, color=INK)
    axis.set_ylabel("top-1 accuracy, %", fontsize=10.5, color=INK)
    axis.set_title(title, fontsize=12.5, color=INK, pad=12)
    _tidy(axis)
    if len(lines) > 1:
        axis.legend(frameon=False, fontsize=10, labelcolor=INK, loc="best")
    figure.supxlabel(note, fontsize=9, color=GREY)
    save(figure, path, suffix[1:])


def accuracy_and_time(
    path: Path,
    across: Sequence[int],
    lines: Mapping[str, Sequence[tuple[float, float]]],
    seconds: Sequence[float],
    title: str,
    note: str,
) -> None:
    """Side by side over r: accuracies with their spread, one line for each way, and the time of a training step.

    Args:
        path: the PNG to write.
        across: the r.
        lines: for each way's name and each r, the mean in per cent and its spread to either side, nan for none.
        seconds: for each r.
        title: above both.
        note: below them, what the figures must be read with.
    """
    figure = _figure(9.6, 4.6)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": (3, 2), "wspace": 0.06})
    apart = 0.016 * (max(across) - min(across))  # so that no spread hides another
    for i, ((name, points), colour, marker) in enumerate(zip(lines.items(), COLOURS, "os^D", strict=False)):
        up, spread = zip(*points, strict=True)
        beside = [r + (i - (len(lines) - 1) / 2) * apart for r in across]
        left.errorbar(
            beside, up, spread, color=colour, marker=marker, markersize=6, linewidth=1.8, capsize=3, label=name
        )
    left.margins(x=0.05, y=0.08)
    left.set_ylabel("held-out accuracy, %", fontsize=10.5, color=INK)
    left.legend(frameon=False, fontsize=10, labelcolor=INK, loc="lower left")

    bars = right.bar([str(r) for r in across], [1000 * s for s in seconds], width=0.62, color=COLOURS[2], zorder=2)
    ratios = [f"{1000 * s:.0f} ms\n{seconds[0] / s:.2f}×" for s in seconds]
    right.bar_label(bars, ratios, padding=3, fontsize=9, color=INK)
    right.margins(y=0.2)
    right.set_ylabel("time of a training step, ms", fontsize=10.5, color=INK)
    for axis in (left, right):
        axis.set_xlabel("r, tokens merged in each block", fontsize=10.5, color=INK)
        _tidy(axis, grid="y" if axis is right else "both")
    left.set_xticks(across)
    figure.suptitle(title, fontsize=12.5, color=INK)
    figure.supxlabel(note, fontsize=9, color=GREY)
    save(figure, path)


def check_suffix(path: Path) -> None:
    """Say so before any work is done, if a picture cannot be written under this name.

    Raises:
        ValueError: its suffix names no kind of picture that matplotlib writes.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"{path} ends in {path.suffix or 'no suffix'}; a picture's name ends in .png, .svg or .pdf")


def picture_kind(path: Path) -> str:
    """The kind of picture that a path is to hold, as in ".png": by its name; in a pipe without such a name PNG.

    Raises:
        ValueError: there is no such kind, or matplotlib is not installed.
    """
    require_matplotlib()
    if is_stream(path) and not path.suffix:
        return ".png"
    check_suffix(path)
    return path.suffix


def speed_up(
    path: Path,
    suffix: str,
    panels: Mapping[str, Mapping[str, Sequence[tuple[Schedule, float, float]]]],
    title: str,
    note: str,
) -> None:
    """Speed-up over r, a line for each batch and a panel for each dtype, with what the FLOPs would give as the limit.

    Args:
        path: the picture to write.
        suffix: its kind, as in ".png", whatever the path's.
        panels: for each dtype and each line's label, points (r, speed-up, limit), in the order of falling cost.
        title: above all panels.
        note: below them, what the figures must be read with.
    """
    figure = _figure(0.8 + 5.4 * len(panels), 4.9)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (dtype, lines) in zip(axes, panels.items(), strict=True):
        longest = max(lines.values(), key=len)
        values = [r for r, _, _ in longest]
        # An r that is no number has no place on a scale: then they stand side by side.
        numbers = all(isinstance(r, int) for r in values)
        place = {str(r): float(r) if isinstance(r, int) and numbers else float(i) for i, r in enumerate(values)}
        limit = [(place[str(r)], ratio) for r, _, ratio in longest]
        axis.plot(*zip(*limit, strict=True), color=GREY, linewidth=1.6, linestyle=(0, (4, 3)), label="limit, by FLOPs")
        axis.axhline(1.0, color=FAINT, linewidth=1.2, zorder=1)
        for i, (label, points) in enumerate(lines.items()):
            colour = shade(i / max(1, len(lines) - 1))
            across, up = [place[str(r)] for r, _, _ in points], [ratio for _, ratio, _ in points]
            axis.plot(across, up, color=colour, marker="os^Dv"[i % 5], markersize=6, linewidth=1.8, label=label)
        axis.set_xticks(list(place.values()), [format_schedule(r) for r in values])
        axis.margins(x=0.05, y=0.1)
        axis.set_xlabel("r, tokens merged in each block", fontsize=10.5, color=INK)
        axis.set_title(dtype, fontsize=11, color=INK)
        _tidy(axis)
        axis.legend(frameon=False, fontsize=9.5, labelcolor=INK, loc="best")
    axes[0].set_ylabel("speed-up over the best unmerged", fontsize=10.5, color=INK)
    figure.suptitle(title, fontsize=12.5, color=INK)
    figure.supxlabel("\n".join(wrap(note, 40 + 52 * len(panels))), fontsize=9, color=GREY)
    save(figure, path, suffix[1:])


class Measured(NamedTuple):
    """What one schedule gives."""

    kept: float  # per cent: accuracy or agreement
    speed_up: float
    interval: tuple[float, float] | None = None  # around the speed-up; None: not drawn


def faithfulness(
    path: Path, suffix: str, lines: Mapping[str, Sequence[Measured]], ylabel: str, title: str, note: str
) -> None:
    """What is kept of the answers over the speed-up, a line for each way to choose a schedule.

    Args:
        path: the picture to write.
        suffix: its kind, as in ".png", whatever the path's.
        lines: points by label, in the order of rising speed-up; the first line stands out.
        ylabel: what is kept.
        title: above everything.
        note: below it, what the figures must be read with.
    """
    figure = _figure(7.6, 4.9)
    axis = figure.subplots()
    for i, (label, points) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        across, up = [point.speed_up for point in points], [point.kept for point in points]
        width = 1.2 if i else 1.8
        axis.plot(across, up, color=colour, marker="os^Dv"[i % 5], markersize=5.5, linewidth=width, label=label)
        for point in points:
            if point.interval is not None:
                axis.hlines(point.kept, *point.interval, color=colour, linewidth=1, alpha=0.6)
    axis.margins(x=0.05, y=0.08)
    axis.set_xlabel("speed-up over r = 0", fontsize=10.5, color=INK)
    axis.set_ylabel(ylabel, fontsize=10.5, color=INK)
    axis.set_title(title, fontsize=12.5, color=INK, pad=12)
    _tidy(axis)
    axis.legend(frameon=False, fontsize=10, labelcolor=INK, loc="best")
    figure.supxlabel(note, fontsize=9, color=GREY)
    save(figure, path, suffix[1:])


class Fidelity(NamedTuple):
    """What one schedule of a way gives."""

    throughput: float  # images per second
    accuracy: float  # per cent
    kl: float  # nats


def fidelity_throughput(
    path: Path,
    panels: Mapping[str, Mapping[str, Sequence[Fidelity]]],
    marked: Sequence[str],
    rulers: Mapping[str, float],
    note: str,
) -> None:
    """Accuracy above and KL divergence below, over throughput, a column for each set of weights.

    Args:
        path: the PNG to write.
        panels: for each column's title, its lines by label, of rising throughput.
        marked: labels of the few lines in colour; all others are grey, and named together.
        rulers: labelled throughputs, which are marked.
        note: below everything, what the figures must be read with.
    """
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    figure = _figure(1.6 + 4.4 * len(panels), 7.4)
    axes = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row")
    for column, (title, lines) in enumerate(panels.items()):
        above, below = axes[:, column]
        for label, points in lines.items():
            i = marked.index(label) if label in marked else None
            colour, width, layer = ("#c9ccd2", 1.0, 1) if i is None else (COLOURS[i], 1.8, 3)
            style: dict[str, Any] = {"color": colour, "linewidth": width, "zorder": layer, "markersize": 5}
            style["marker"] = "" if i is None else "os^D"[i]
            name = "other ways" if i is None else label
            above.plot([p.throughput for p in points], [p.accuracy for p in points], label=name, **style)
            # On a logarithmic axis r = 0, which does not move the answers, has no place.
            apart = [point for point in points if point.kl > 0]
            below.plot([point.throughput for point in apart], [point.kl for point in apart], **style)
        below.set_yscale("log")
        below.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        below.yaxis.set_minor_formatter(NullFormatter())
        for axis in (above, below):
            _tidy(axis)
            for at in rulers.values():
                axis.axvline(at, color=GREY, linewidth=0.9, linestyle=(0, (1, 3)), zorder=2)
        for label, at in rulers.items():
            above.annotate(
                label,
                (at, 1.0),
                (0, 3),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=GREY,
            )
        above.set_title(title, fontsize=11, color=INK, pad=18)
        below.set_xlabel("throughput, images/s", fontsize=10.5, color=INK)
    axes[0][0].set_ylabel("top-1 accuracy, %", fontsize=10.5, color=INK)
    axes[1][0].set_ylabel("KL divergence from r = 0, nats", fontsize=10.5, color=INK)
    named = dict(zip(*axes[0][0].get_legend_handles_labels()[::-1], strict=True))
    order = [label for label in (*marked, "other ways") if label in named]
    figure.legend(
        [named[label] for label in order],
        order,
        frameon=False,
        fontsize=10,
        labelcolor=INK,
        ncols=len(order),
        loc="outside upper center",
    )
    figure.supxlabel("\n".join(wrap(note, 40 + 55 * len(panels))), fontsize=9, color=GREY)
    save(figure, path)


def share_over_tokens(path: Path, lines: Mapping[str, Sequence[tuple[int, float]]], title: str, note: str) -> None:
    """A share of the time over the number of tokens that enter.

    Args:
        path: the PNG to write.
        lines: for each line's label, points (tokens, per cent).
        title: above the plot.
        note: below it, what the figures must be read with.
    """
    figure = _figure(7.6, 4.6)
    axis = figure.subplots()
    for (label, points), colour, marker in zip(lines.items(), COLOURS, "os^D", strict=False):
        across, up = zip(*points, strict=True)
        axis.plot(across, up, color=colour, marker=marker, markersize=6, linewidth=1.8, label=label)
    axis.margins(x=0.05, y=0.14)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens entering the first block", fontsize=10.5, color=INK)
    axis.set_ylabel("share of the time, %", fontsize=10.5, color=INK)
    axis.set_title(title, fontsize=12.5, color=INK, pad=12)
    _tidy(axis)
    axis.legend(frameon=False, fontsize=10, labelcolor=INK, loc="best")
    figure.supxlabel("\n".join(wrap(note, 92)), fontsize=9, color=GREY)
    save(figure, path)


def _figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.07))


def _tidy(axis: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    """A light grid behind what is drawn, and no frame."""
    axis.grid(axis=grid, color="#e4e6ea", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, labelsize=9.5, length=0)
    for side in axis.spines.values():
        side.set_visible(False)


def _show(axis: Axes, picture: Tensor, caption: str, heading: str) -> None:
    """A picture (C, H, W) in [0, 1], with one or three channels, a caption below and a heading above."""
    axis.imshow(_pixels(picture), interpolation="antialiased")
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_visible(False)
    axis.set_xlabel(caption, fontsize=9.5, color=INK, labelpad=4)
    axis.set_title(heading, fontsize=11, color=INK, pad=6)


def _pixels(picture: Tensor) -> np.ndarray:
    return np.asarray(picture.expand(3, -1, -1).permute(1, 2, 0))


def save(figure: Figure, path: Path, kind: str = "png") -> None:
    """Write a figure as a picture of that kind, whatever the path's name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    _make_texts_plain(figure)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=DPI, format=kind, facecolor="white", bbox_inches="tight", pad_inches=0.15)


def _make_texts_plain(figure: Figure) -> None:
    """Names of files and classes are no mathematics, and no TeX; what the font has not is told by its number."""
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.text import Text

    drawn = get_font(findfont(FontProperties())).get_charmap()
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_usetex(False)
        lines = (printable(line, lambda c: c.isprintable() and ord(c) in drawn) for line in text.get_text().split("\n"))
        text.set_text("\n".join(lines))
