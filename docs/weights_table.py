"""The table of all weights, made from the configs."""

from __future__ import annotations

from itertools import groupby

import tomevit
from tomevit.cards import Card
from tomevit.config import Figure, Source
from tomevit.measure.defaults import plain_figure

LICENCES = {
    "apache-2.0": "Apache-2.0",
    "apple-amlr": "Apple AMLR",
    "apple-ascl": "Apple ASCL",
    "bsd-3-clause": "BSD-3-Clause",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "dinov3-license": "DINOv3 License",
    "fair-noncommercial-research-license": "FAIR Noncommercial Research License",
    "mit": "MIT",
}


def summary() -> str:
    """A row for each family."""
    lines = [
        "| family | sets | architectures | licence |",
        "|---|---:|---|---|",
    ]
    for title, family in groupby(_published(), key=lambda card: card.title):
        rows = list(family)
        names = list(dict.fromkeys(card.name for card in rows))
        shown = f"`{names[0]}`" + (f" … `{names[-1]}`" if len(names) > 1 else "")
        lines.append(f"| {title} | {len(rows)} | {shown} | {', '.join(dict.fromkeys(map(_licence, rows)))} |")
    return "\n".join(lines)


def _published() -> list[Card]:
    cards = [tomevit.card(name) for name in tomevit.list_models(weights=True)]
    return [card for card in cards if any(source.url or source.hub for source in card.sources)]


def section() -> str:
    """The table, with a few words before it."""
    published = _published()
    lines = [
        f"The zoo knows {len(published)} public sets of weights. Accuracies are top-1 on ImageNet-1k in per cent, as",
        "published (`tomevit info` says where), by the weights' own head where nothing else is said; none are ours.",
        "Where a set has a figure with merging, the one without is from the same table, if it has one. Sets trained",
        "with merging (`tome_r…`) come with their r.",
    ]
    for title, family in groupby(published, key=lambda card: card.title):
        rows = list(family)
        licences = ", ".join(dict.fromkeys(_licence(card) for card in rows))
        lines += [
            "",
            f"<details><summary><b>{title}</b>: {len(rows)} sets, {licences}</summary>",
            "",
            "| weights | r = 0 | merged | licence | source |",
            "|---|---|---|---|---|",
            *(
                f"| `{card.full_name}` | {_plain(card)} | {_merged(card)} | {_licence(card)} | {_sources(card)} |"
                for card in rows
            ),
            "",
            "</details>",
        ]
    return "\n".join(lines)


def _licence(card: Card) -> str:
    return LICENCES[card.licence or ""]


def merged_figures(card: Card) -> list[Figure]:
    return [figure for figure in card.figures if figure.r]


def _plain(card: Card) -> str:
    figure = plain_figure(card, next(iter(merged_figures(card)), None))
    by = "" if figure is None or figure.by == "head" else f" ({figure.by})"
    return f"{figure.top1:.2f}{by}" if figure else ""


def _merged(card: Card) -> str:
    cells = []
    for figure in merged_figures(card):
        _, semicolon, doubt = figure.source.partition("; ")
        cells.append(f"{figure.top1:.2f} (r = {figure.r}{semicolon}{doubt})")
    return ", ".join(cells)


def _sources(card: Card) -> str:
    """The preferred source by its name, the others by their format."""
    first, *others = card.sources
    return ", ".join([_link(first, _name(first)), *(_link(source, source.format) for source in others)])


def _name(source: Source) -> str:
    return source.hub or (source.url or "").rpartition("/")[2]


def _link(source: Source, text: str) -> str:
    return f"[{text}]({source.url or f'https://huggingface.co/{source.hub}'})"
