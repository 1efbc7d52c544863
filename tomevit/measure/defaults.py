"""What is measured where nobody says."""

from __future__ import annotations

from typing import NamedTuple

from tomevit.cards import Card
from tomevit.config import Figure
from tomevit.flops import flops, plain_schedule
from tomevit.schedule import Schedule


def default_r(card: Card) -> list[Schedule]:
    """Half, four fifths, and all of the r that leaves next to nothing; and every r that the card has figures for."""
    most = max(1, card.config.num_patches // card.config.depth)
    published = {figure.r for figure in card.figures} - {0}
    numbers = {max(1, most // 2), round(0.8 * most), most} | {r for r in published if isinstance(r, int)}
    return [*sorted(numbers), *sorted(r for r in published if isinstance(r, str))]


#: Points of accuracy that merging may cost, and an r be recommended.
SMALL_DROP = 1.0


class Recommended(NamedTuple):
    """An r to begin with."""

    r: Schedule
    top1: float | None  # of these weights then, in per cent, as published; None: no figure is known


def recommended_r(card: Card) -> Recommended:
    """An r to begin with, by what is published of the weights.

    That which they were trained with. Else, of those with a published accuracy that lose `SMALL_DROP` points at most,
    that of the fewest FLOPs. Else half of the r that leaves next to nothing after the last block, of which no
    accuracy is known.
    """
    figures = {figure.r: figure.top1 for figure in card.figures if figure.by == "head"}
    if card.r:
        return Recommended(card.r, figures.get(card.r) if isinstance(card.r, int | str) else None)
    cheap = [
        figure
        for figure in card.figures
        if figure.r and (drop := drop_of(figure, card)) is not None and drop <= SMALL_DROP
    ]
    if cheap:
        best = min(cheap, key=lambda figure: flops(card.config, plain_schedule(figure.r, card.config, card.presets)))
        return Recommended(best.r, best.top1)
    return Recommended(max(1, card.config.num_patches // card.config.depth // 2), None)


def drop_of(merged: Figure, card: Card) -> float | None:
    """What a published accuracy is below that without merging which it is compared with, in points."""
    plain = plain_figure(card, merged)
    return plain.top1 - merged.top1 if plain is not None and plain.by == merged.by else None


def plain_figure(card: Card, merged: Figure | None = None) -> Figure | None:
    """The published accuracy without merging of a card's weights; None: there is none.

    Args:
        card: of the weights.
        merged: an accuracy with merging: wanted is what it is compared with, of the same source where that has one.
    """
    plain = [figure for figure in card.figures if not figure.r]
    by = "head" if merged is None else merged.by

    def is_unlike(figure: Figure) -> tuple[bool, bool]:
        return figure.by != by, merged is not None and not merged.source.startswith(figure.source)

    return min(plain, key=is_unlike, default=None)
