"""The README's table of all weights, made from the configs.

python docs/weights_table.py            write it
python docs/weights_table.py --check    exit with 1 if it is not current
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import tomevit
from tomevit.config import Card, Figure, Source

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- weights table: start -->", "<!-- weights table: end -->"
LICENCES = {"apache-2.0": "Apache-2.0", "bsd-3-clause": "BSD-3-Clause", "cc-by-nc-4.0": "CC-BY-NC-4.0"}


def section() -> str:
    """All that stands between the markers."""
    cards = [tomevit.card(name) for name in tomevit.list_models(weights=True)]
    published = [card for card in cards if any(source.url or source.hub for source in card.sources)]
    lines = [
        f"The zoo knows {len(published)} public sets of weights. Accuracies are top-1 on ImageNet-1k in per cent, as",
        "published (`tomevit info` says where); none are ours. Where a set has a figure with merging, the one without",
        "is from the same table, if it has one. Sets trained with merging (`tome_r…`) come with their r.",
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


def plain_figure(card: Card) -> Figure | None:
    """The figure at r = 0 that the merged one is compared with where it was published, else the first."""
    plain = [figure for figure in card.figures if not figure.r]
    beside = [f for f in plain if any(merged.source.startswith(f.source) for merged in merged_figures(card))]
    return next(iter(beside or plain), None)


def _plain(card: Card) -> str:
    figure = plain_figure(card)
    return f"{figure.top1:.2f}" if figure else ""


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


def written(readme: str) -> str:
    """The README with the section as it should be."""
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"the README has no {START if not start else END}")
    return f"{before}{START}\n{section()}\n{END}{after}"


def main(arguments: Iterable[str]) -> str | None:
    """What went wrong, if anything did."""
    old = README.read_text(encoding="utf-8")
    new = written(old)
    if list(arguments) == ["--check"]:
        return None if old == new else f"{README} is stale: python {Path(__file__).name}"
    if arguments:
        return str(__doc__)
    README.write_text(new, encoding="utf-8")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
