"""What the pages show that no hand writes.

WRITTEN stands on the pages, where docs/written_tables.py puts it. What only the site has, SITE, is put in for
`<!-- generated: NAME -->` as it is built.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import click
from PIL import Image

import tomevit
from docs import weights_table
from tests.outcomes import KINDS
from tomevit import cli, zoo
from tomevit.cards import Card
from tomevit.cli.zoo import COLUMNS, cells, summary
from tomevit.config import Figure
from tomevit.flops import plain_schedule
from tomevit.measure.defaults import plain_figure
from tomevit.schedule import Schedule
from tomevit.tasks.demo import held_out
from tomevit.tasks.visualize import Observation, observe, page

HELP_WIDTH = 90  # characters
NO_BREAK, NO_BREAK_HYPHEN = "\u00a0", "\u2011"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], text: int = 1) -> str:
    """In Markdown, the first columns of text to the left and the others, numbers, to the right."""
    lines = [columns, [":---"] * text + ["---:"] * (len(columns) - text), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# ---------------------------------------------------------------------------------------------------------------- zoo


def families() -> dict[str, list[Card]]:
    """The architectures of each family, by its title."""
    cards = map(zoo.architecture, tomevit.list_models())
    return {title: list(family) for title, family in groupby(cards, key=lambda card: card.title)}


def architectures(title: str) -> str:
    """Of a family: where it is defined, and a row for each architecture."""
    columns = ("model", "pixels", "tokens", "params, M", "GFLOPs", "top-1, %", "merged, %", "take r", "in timm")
    cards = families()[title]
    papers = "; ".join(dict.fromkeys(paper for card in cards for paper in card.papers))
    return f"{papers}.\n\n{table(columns, map(_architecture, cards))}"


def _architecture(card: Card) -> Sequence[object]:
    row = summary(zoo.card(card.name))
    columns = dict(zip((column.name for column in COLUMNS), cells(row), strict=False))
    gigaflops = float(f"{row['gflops']:.3g}")
    return (
        f"`{card.name}`",
        "×".join(dict.fromkeys(map(str, card.config.img_size))),  # one number for a square
        card.config.num_tokens,
        columns["params M"],
        f"{gigaflops:g}",  # three digits, and no exponent
        columns["top-1"].replace("*", f"{NO_BREAK}({row['top1_by']})").replace("-", NO_BREAK_HYPHEN),
        *(columns[name].replace(" ", NO_BREAK) for name in ("merged", "take r")),  # to be copied, hyphens and all
        f"`{card.timm}`" if card.timm else "",
    )


# ------------------------------------------------------------------------------------------------------------- figures


class Compared(NamedTuple):
    """A published accuracy with merging, and one without."""

    card: Card
    merged: Figure
    against: Card
    plain: Figure

    @property
    def trained(self) -> bool:
        """Whether the weights were trained with merging, and so are others than those compared with."""
        return self.card.r != 0

    @property
    def flop_ratio(self) -> float:
        config = self.card.config
        return tomevit.flops(config) / tomevit.flops(config, plain_schedule(self.merged.r, config, self.card.presets))


def merged_figures() -> Iterator[Compared]:
    """All that the zoo knows; weights trained with merging are compared with the default ones of their architecture."""
    for name in tomevit.list_models(weights=True):
        card = tomevit.card(name)
        for merged in weights_table.merged_figures(card):
            against = card if plain_figure(card, merged) else tomevit.card(card.name)
            plain = plain_figure(against, merged)
            if plain is not None:
                yield Compared(card, merged, against, plain)


def published() -> str:
    columns = ("weights", "r", "FLOP ratio", "top-1, %", "without merging, %", "difference", "merging")
    return table(columns, map(_published, merged_figures()))


def _published(row: Compared) -> Sequence[object]:
    beside = "" if row.against is row.card else f" (`{row.against.weights}`)"
    return (
        f"`{row.card.full_name}`",
        row.merged.r,
        f"{row.flop_ratio:.2f}",
        f"{row.merged.top1:.2f}",
        f"{row.plain.top1:.2f}{beside}",
        f"{row.merged.top1 - row.plain.top1:+.2f}".replace("-", "−"),
        "trained" if row.trained else "off the shelf".replace(" ", NO_BREAK),
    )


# ------------------------------------------------------------------------------------------------------------ licences


def licences() -> str:
    """For each licence, what is under it."""
    cards = [tomevit.card(name) for name in tomevit.list_models(weights=True)]
    licensed = sorted((card for card in cards if card.weights), key=lambda card: card.licence or "")
    rows = []
    for licence, group in groupby(licensed, key=lambda card: card.licence or ""):
        found = list(group)
        titles = "; ".join(dict.fromkeys(card.title + (", trained with merging" if card.r else "") for card in found))
        rows.append((weights_table.LICENCES[licence].replace("-", NO_BREAK_HYPHEN), titles, len(found)))
    return table(("licence", "of", "sets"), rows, text=2)


# ------------------------------------------------------------------------------------------------------------ commands


def commands() -> str:
    """The help of every command."""
    top = click.Context(cli.cli, info_name="tomevit", terminal_width=HELP_WIDTH)
    sections = []
    for name, command in ((name, cli.load_command(name)) for name in cli.VERBS):
        text = command.get_help(click.Context(command, info_name=name, parent=top, terminal_width=HELP_WIDTH))
        sections.append(f"### tomevit {name}\n```text\n{text}\n```")
    return "\n\n".join(sections)


# ---------------------------------------------------------------------------------------------------------- visualized

VISUALIZED = "visualized.html"


def digit() -> tuple[Image.Image, str]:
    """The one on docs/looking.md, and its file's name there."""
    return Image.fromarray(held_out()[0][201, 0].numpy()), "201.png"


def observed(r_values: Sequence[Schedule]) -> Observation:
    return observe(tomevit.create("digits_p1.tome_r16", pretrained=True), digit()[0], r_values)


def visualized() -> str:
    return page.html(observed((8, 16)), digit()[1])


def shown_page() -> str:
    frame = f'<iframe class="page" src="{VISUALIZED}" title="A digit, and what merges in it" loading="lazy"></iframe>'
    return f'{frame}\n\n<p class="page"><a href="{VISUALIZED}">The page alone</a></p>'


# ---------------------------------------------------------------------------------------------------------- works with

OUTCOMES = Path(__file__).with_name("works_with.json")  # `make clients` writes it


def works_with() -> str:
    """What was tried with other packages, and what came of it."""
    rows = [
        (f"{row['package']} {row['version']}", "yes" if row["outcome"] == "passed" else "no", row["tried"], row["why"])
        for row in json.loads(OUTCOMES.read_text(encoding="utf-8"))
    ]
    return table(("with", "works", "tried", "why not"), rows, text=4)


# ----------------------------------------------------------------------------------------------------------- promises

FAULTS = Path(__file__).with_name("promises.json")  # `make faults` writes it


def promises() -> str:
    """What is done to tomevit, and what it does then: a section for each kind of fault."""
    stored = json.loads(FAULTS.read_text(encoding="utf-8"))
    total = sum(row["tests"] for row in stored)
    sections = [f"{total:,} tests of {len(stored)} faults in the run that is stored here; all passed, or say why not."]
    for kind in KINDS:
        rows = [(row["how"], row["promise"], _result(row)) for row in stored if row["kind"] == kind]
        sections.append(
            f"## {kind.capitalize()}\n{table(('what is tried', 'what is promised', 'tests'), rows, text=2)}"
        )
    return "\n\n".join(sections)


def _result(row: dict[str, Any]) -> str:
    return f"{row['tests']}" if row["outcome"] == "passed" else f"{row['tests']}: {row['outcome']}, {row['why']}"


WRITTEN: dict[str, Callable[[], str]] = {
    **{f"architectures of {title}": partial(architectures, title) for title in families()},
    "published": published,
    "licences": licences,
    "families": weights_table.summary,
    "weights": weights_table.section,
    "works_with": works_with,
    "promises": promises,
}
SITE: dict[str, Callable[[], str]] = {"commands": commands, "page": shown_page}
