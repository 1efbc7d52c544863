"""What is counted from the answers: shares with their intervals, times, and whether they are what was expected."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from tomevit.flops import flops
from tomevit.measure.published import Expected, published_at, published_by_schedule
from tomevit.measure.timing import Quartiles
from tomevit.models import VisionTransformer
from tomevit.schedule import Schedule, entries
from tomevit.tasks.evaluate.state import NOT_FINITE, AnswerTable

Z = NormalDist().inv_cdf(0.975)  # of an interval of 95 %


class Share(NamedTuple):
    """Per cent of the images, or a difference of two such in points, and where it lies with a confidence of 95 %."""

    value: float
    lower: float
    upper: float


class Row(NamedTuple):
    """What was found at one r."""

    r: Schedule  # as it was asked for
    plain: Schedule  # in numbers: what "2x" means for this model
    schedule: tuple[int | str, ...]  # what happens in each block, as entries of a list that is an r
    tokens: int  # leaving the last block
    gflops: float  # multiply-adds per image, in 10⁹, as the paper counts them
    gflops_computed: float  # as they are computed
    flop_ratio: float  # r = 0 over this r, as they are computed
    top1: Share
    published: float | None  # top-1 of these weights at this schedule, in per cent; None: no figure is known
    top5: Share
    difference: Share | None  # top-1 less that of r = 0 on the same images; None: r = 0 was not evaluated, or is this
    agreement: Share | None  # images with the same answer as at r = 0
    seconds: Quartiles | None  # of the forward pass on a batch; None: no batch was whole
    images_per_second: float | None  # by the median: of the forward pass alone, in one process
    speed_up: float | None  # over r = 0 in this run
    not_finite: int  # images whose logits were not finite; they count as wrong


def wilson(count: int, total: int) -> Share:
    """A share with Wilson's score interval (1927), which holds near 0 and 100 per cent too.

    Args:
        count: of total, which is 1 or more.
    """
    share, spread = count / total, Z * Z / total
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    # At the ends the interval ends there too, and rounding must not leave the end out.
    lower, upper = centre - half if count else 0.0, centre + half if count < total else 1.0
    return Share(100 * count / total, 100 * lower, 100 * upper)


def paired(gained: int, lost: int, total: int) -> Share:
    """The difference of two shares of the same images, with the adjusted Wald interval of Bonett and Price (2012).

    Args:
        gained: images that count in the first share alone.
        lost: in the second alone.
        total: of all images, which is 1 or more.
    """
    more, less = (gained + 1) / (total + 2), (lost + 1) / (total + 2)
    half = Z * math.sqrt((more + less - (more - less) ** 2) / (total + 2))
    return Share(100 * (gained - lost) / total, 100 * (more - less - half), 100 * (more - less + half))


class Verdict(NamedTuple):
    """What was expected, and whether it lies within the interval of what was measured."""

    r: Schedule
    expected: float
    source: str
    measured: Share
    within: bool


def judge(rows: Iterable[Row], expected: Iterable[Expected]) -> list[Verdict]:
    """Each expectation beside the row of its r; one whose r was not evaluated is left out."""
    measured = {str(row.r): row.top1 for row in rows}
    return [
        Verdict(each.r, each.top1, each.source, found, found.lower <= each.top1 <= found.upper)
        for each in expected
        if (found := measured.get(str(each.r))) is not None
    ]


def distinct_plain(model: VisionTransformer, r_values: Iterable[Schedule]) -> list[Schedule]:
    """What the r mean for a model, in numbers, once each: the columns that `count_rows` expects."""
    found: dict[tuple[int | str, ...], Schedule] = {}
    for r in r_values:
        found.setdefault(entries(model.steps(r)), model.plain(r))
    return list(found.values())


def count_rows(
    model: VisionTransformer, r_values: Sequence[Schedule], labels: Sequence[int], table: AnswerTable, batch: int
) -> list[Row]:
    """The figures of each r; none if no image could be read.

    Args:
        model: whose answers they are.
        r_values: what the columns of the table are of; those that mean the same share one (`distinct_plain`).
        labels: the right answer for each row of the table.
        table: what is known.
        batch: images per call.
    """
    known = table.answers[:, 0] >= NOT_FINITE
    answers, total = table.answers[known], int(known.sum())
    if total == 0:
        return []
    right = answers == torch.tensor(labels, device="cpu")[known, None]
    times = [column[~column.isnan()].tolist() for column in table.seconds.T]
    seconds = [Quartiles.of(column) if column else None for column in times]
    schedules = [entries(model.steps(r)) for r in r_values]
    columns = {schedule: i for i, schedule in enumerate(dict.fromkeys(schedules))}
    zero = next((columns[schedule] for schedule in schedules if not any(schedule)), None)
    unmerged = None if zero is None else seconds[zero]
    published = published_by_schedule(model.card)
    config, rows = model.config, []
    for r, schedule in zip(r_values, schedules, strict=True):
        i, plain = columns[schedule], model.plain(r)
        taken = seconds[i]
        compare = zero is not None and i != zero
        computed = flops(config, plain, computed=True)
        rows.append(
            Row(
                r=r,
                plain=plain,
                schedule=schedule,
                tokens=model.token_counts(plain)[-1],
                gflops=flops(config, plain) / 1e9,
                gflops_computed=computed / 1e9,
                flop_ratio=flops(config, computed=True) / computed,
                top1=wilson(int(right[:, i].sum()), total),
                published=published_at(schedule, published),
                top5=wilson(int(table.among5[known, i].sum()), total),
                difference=_difference(right[:, i], right[:, zero]) if compare else None,
                agreement=wilson(int((answers[:, i] == answers[:, zero]).sum()), total) if compare else None,
                seconds=taken,
                images_per_second=None if taken is None else batch / taken.median,
                speed_up=None if taken is None or unmerged is None else unmerged.median / taken.median,
                not_finite=int((answers[:, i] == NOT_FINITE).sum()),
            )
        )
    return rows


def _difference(first: Tensor, second: Tensor) -> Share:
    """Of two columns (N,) bool, which say of each image whether the answer is right."""
    return paired(int((first & ~second).sum()), int((second & ~first).sum()), len(first))
