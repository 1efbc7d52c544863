"""What is measured where nobody says."""

from __future__ import annotations

from tomevit.cards import Card
from tomevit.schedule import Schedule


def default_r(card: Card) -> list[Schedule]:
    """Half, four fifths, and all of the r that leaves next to nothing; and every r that the card has figures for."""
    most = max(1, card.config.num_patches // card.config.depth)
    published = {figure.r for figure in card.figures} - {0}
    numbers = {max(1, most // 2), round(0.8 * most), most} | {r for r in published if isinstance(r, int)}
    return [*sorted(numbers), *sorted(r for r in published if isinstance(r, str))]
