"""One page of Markdown from the rows that are there: merge efficiency first, then everything by itself."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.gpu.rows import ANCHOR, Embedding, Inference, Kernels, Row, Training, key_of
from tomevit.cli.options import with_range
from tomevit.measure.timing import Quartiles, ratio_interval

#: What others published of merging at the r of a row, to be read beside it. (model, pixels, r) -> words.
PUBLISHED = {
    ("vit_b16", 224, 8): "1.10 to 1.17 where FLOPs say 1.34 (a ToMe patch of Hugging Face's ViT, float32, a GPU)",
    ("vit_l16", 224, 8): "1.68 to 1.76 where FLOPs say 1.99 (the same); 93 to 183 images/s on a V100 (the paper)",
    ("vit_b16", 224, 13): "309 to 511 images/s on a V100 (the paper)",
    ("vit_b16", 224, 16): "309 to 603 images/s on a V100 (the paper)",
    ("vit_s16", 224, 13): "953 to 1564 images/s on a V100 (the paper)",
    ("vit_h14", 224, 7): "35 to 63 images/s on a V100 (the paper, MAE)",
    ("swag_l16_512", 512, 40): "12.8 to 26.3 images/s on a V100 (the paper)",
}
Measured = dict[str, Any]
Interval = tuple[float, float] | None


class Figure(NamedTuple):
    """A candidate of inference or training, through the anchor that it took turns with."""

    row: Inference | Training
    seconds: Quartiles
    over_anchor: float  # the anchor's median time over its own
    interval: Interval
    flop_ratio: float
    step_bytes: dict[str, int]


def write_page(setting: dict[str, str], queue: Sequence[Row], stored: dict[str, Measured], tests: str = "") -> str:
    """The page.

    Args:
        setting: device, driver, versions.
        queue: all rows, in order, of which some are stored.
        stored: by key.
        tests: a sentence on those that ran on the device.
    """
    statuses = [stored.get(key_of(row), {"status": "waiting"})["status"] for row in queue]
    counts = ", ".join(f"{statuses.count(each)} {each}" for each in dict.fromkeys(statuses))
    parts = [
        f"# Merging on {setting['device']}",
        ", ".join(f"{name} {value}" for name, value in setting.items() if name != "device") + ".",
        f"{len(queue)} rows: {counts}. Medians of interleaved rounds; in brackets what the figure lies between, with "
        "95 % confidence. Each candidate took turns with our eager model at r = 0, through which rows are compared.",
        *([tests] if tests else []),
    ]
    figures = [figure for row in queue if (figure := _figure(row, stored.get(key_of(row)))) is not None]
    groups: dict[tuple[object, ...], list[Figure]] = {}
    for figure in figures:
        groups.setdefault(_group(figure.row), []).append(figure)
    of_inference = [group for group in groups.values() if isinstance(group[0].row, Inference)]
    if of_inference:
        parts += ["## Merge efficiency", _summary(of_inference)]
    parts += [_group_table(group) for group in groups.values()]
    done = {key_of(row): (row, stored[key_of(row)]) for row in queue if _is_done(stored.get(key_of(row)))}
    parts += _kernels(done.values())
    parts += _embedding(done.values())
    parts += _undone(queue, stored)
    return "\n\n".join(parts) + "\n"


def _is_done(found: Measured | None) -> bool:
    return found is not None and found["status"] == "done"


def _figure(row: Row, found: Measured | None) -> Figure | None:
    if found is None or not _is_done(found) or not isinstance(row, Inference | Training):
        return None
    mine, anchor = found["times"][row.candidate], found["times"][ANCHOR]
    return Figure(
        row,
        Quartiles.of(mine),
        statistics.median(anchor) / statistics.median(mine),
        ratio_interval([anchor], mine),
        found["flop_ratio"],
        found.get("step_bytes", {}),
    )


def _group(row: Inference | Training) -> tuple[object, ...]:
    """What rows of one table share."""
    if isinstance(row, Inference):
        return ("inference", *row[:5])
    return ("training", *row[:5])


def _best_unmerged(group: Sequence[Figure]) -> Figure | None:
    """The fastest that merges nothing; None: the anchor."""
    unmerged = [figure for figure in group if figure.row.r == 0 and figure.over_anchor > 1]
    return max(unmerged, key=lambda figure: figure.over_anchor, default=None)


def speed_up(figure: Figure, best: Figure | None) -> tuple[float, Interval]:
    """Over the fastest that merges nothing. Both were measured against the anchor, in runs of their own.

    Their errors are independent, so that their logarithms' add as squares.
    """
    ratio = figure.over_anchor / (best.over_anchor if best else 1.0)
    if figure.interval is None or (best is not None and best.interval is None) or figure is best:
        return ratio, None
    lower, upper = (
        math.log(figure.over_anchor / figure.interval[0]),
        math.log(figure.interval[1] / figure.over_anchor),
    )
    if best is not None and best.interval is not None:
        lower = math.hypot(lower, math.log(best.interval[1] / best.over_anchor))
        upper = math.hypot(upper, math.log(best.over_anchor / best.interval[0]))
    return ratio, (ratio * math.exp(-lower), ratio * math.exp(upper))


def _efficiency(figure: Figure, best: Figure | None) -> str:
    ratio, interval = speed_up(figure, best)
    share = figure.flop_ratio
    return with_range(ratio / share, None if interval is None else (interval[0] / share, interval[1] / share), 3)


def _summary(groups: Iterable[Sequence[Figure]]) -> str:
    lines = []
    for group in groups:
        best, row = _best_unmerged(group), group[0].row
        assert isinstance(row, Inference)
        for r in dict.fromkeys(figure.row.r for figure in group if figure.row.r):
            ours = [each for each in group if each.row.r == r and each.row.implementation == "tomevit"]
            if not ours:
                continue
            fastest = max(ours, key=lambda figure: figure.over_anchor)
            ratio, interval = speed_up(fastest, best)
            theirs = [each for each in group if each.row.r == r and each.row.implementation == "reference"]
            cells = [
                f"{row.model} {row.img_size} {row.dtype} b{row.batch}",
                str(r),
                best.row.candidate if best else ANCHOR,
                fastest.row.candidate,
                f"{row.batch / fastest.seconds.median:.0f}",
                with_range(ratio, interval, 2),
                f"{fastest.flop_ratio:.2f}",
                _efficiency(fastest, best),
                f"{fastest.over_anchor / theirs[0].over_anchor:.2f}" if theirs else "",
                PUBLISHED.get((row.model, row.img_size, r), ""),
            ]
            lines.append(cells)
    head = ["setting", "r", "fastest unmerged", "fastest merged", "images/s", "speed-up", "FLOPs", "efficiency"]
    return _table([*head, "over the reference design", "published elsewhere"], lines)


def _group_table(group: Sequence[Figure]) -> str:
    row, best = group[0].row, _best_unmerged(group)
    if isinstance(row, Inference):
        title = f"### {row.section}: {row.model}, {row.img_size} pixels, {row.dtype}, batch {row.batch}"
    else:
        checkpointing = "with" if row.checkpointing else "without"
        title = f"### {row.section}: {row.dtype}, batch {row.batch}, {checkpointing} checkpointing"
    lines = []
    for figure in group:
        ratio, interval = speed_up(figure, best)
        ms = Quartiles(*(1e3 * each for each in figure.seconds))
        lines.append(
            [
                figure.row.candidate,
                f"{ms.median:.4g} ({ms.lower:.4g}–{ms.upper:.4g})",
                f"{row.batch / figure.seconds.median:.0f}",
                with_range(figure.over_anchor, figure.interval, 2),
                with_range(ratio, interval, 2),
                _efficiency(figure, best) if figure.row.r else "",
                " of ".join(
                    f"{figure.step_bytes[name] / 2**30:.1f} GiB"
                    for name in (figure.row.candidate, ANCHOR)
                    if name in figure.step_bytes
                ),
            ]
        )
    head = ["candidate", "ms (quartiles)", "images/s", f"over {ANCHOR}", "over the fastest unmerged", "efficiency"]
    return f"{title}\n\n" + _table([*head, "memory of a step"], lines)


def _kernels(done: Iterable[tuple[Row, Measured]]) -> list[str]:
    lines = []
    for row, found in done:
        if isinstance(row, Kernels):
            first = statistics.median(next(iter(found["times"].values())))
            for way, times in found["times"].items():
                median = statistics.median(times)
                mark = " (with its launches)" if way in found["not_captured"] else ""
                shape = f"{row.batch} × {row.tokens} × {64 * row.heads} {row.dtype}, r={row.r}"
                lines.append([row.step, shape, way + mark, f"{1e6 * median:.1f}", f"{median / first:.2f}"])
            lines += [[row.step, "", way, "failed", reason] for way, reason in found["failed"].items()]
    return ["## Kernels\n\n" + _table(["step", "shape", "way", "µs", "over the first"], lines)] if lines else []


def _embedding(done: Iterable[tuple[Row, Measured]]) -> list[str]:
    lines = []
    for row, found in done:
        if isinstance(row, Embedding):
            rates = [f"{found['rates'][name]:.0f}" for name in ("read", "computed", "both")]
            lines.append([row.model, row.dtype, str(row.batch), str(row.workers), str(row.r), *rates, found["binds"]])
    head = ["model", "dtype", "batch", "workers", "r", "read, images/s", "computed", "both", "what binds"]
    return ["## Images read and embedded\n\n" + _table(head, lines)] if lines else []


def _undone(queue: Sequence[Row], stored: dict[str, Measured]) -> list[str]:
    lines = []
    for row in queue:
        found = stored.get(key_of(row))
        if found is not None and not _is_done(found):
            lines.append([key_of(row), found["status"], found["reason"]])
    return ["## Not measured\n\n" + _table(["row", "", "why"], lines)] if lines else []


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
