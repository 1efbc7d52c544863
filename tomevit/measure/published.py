"""Accuracies that are published of weights, found by what happens in each block: however an r is written, it is one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from tomevit.cards import Card
from tomevit.flops import plain_steps
from tomevit.schedule import Schedule, entries


class Expected(NamedTuple):
    """A top-1 accuracy that was measured elsewhere."""

    r: Schedule
    top1: float  # per cent
    source: str


#: Each accuracy after what happens in each block then, as entries of a list that is an r.
BySchedule = Sequence[tuple[tuple[int | str, ...], Expected]]


def published_accuracies(card: Card) -> list[Expected]:
    """What a card has of the accuracy of its own head, which may be a linear probe; not of k-NN, and not zero-shot."""
    heads = ("head", "linear probe") if card.config.num_classes else ()
    return [Expected(figure.r, figure.top1, figure.source) for figure in card.figures if figure.by in heads]


def published_by_schedule(card: Card) -> BySchedule:
    """`published_accuracies`, each after what happens in each block at its r; none of presets that it lacks."""
    found = []
    for each in published_accuracies(card):
        with suppress(ValueError):
            found.append((entries(plain_steps(each.r, card.config, card.presets)), each))
    return found


def published_at(schedule: tuple[int | str, ...], known: BySchedule) -> float | None:
    """The accuracy at what happens in each block, in per cent: of several the first; None: there is none."""
    return next((each.top1 for at, each in known if at == schedule), None)
