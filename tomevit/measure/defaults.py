"""What is measured where nobody says."""

from __future__ import annotations

from tomevit.cards import Card


def default_r(card: Card) -> list[int]:
    """Half, four fifths, and all of the r that leaves next to nothing; and every int that the card has figures for."""
    most = max(1, card.config.num_patches // card.config.depth)
    published = {figure.r for figure in card.figures if isinstance(figure.r, int)}
    return sorted({max(1, most // 2), round(0.8 * most), most} | published - {0})
