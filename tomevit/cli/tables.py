"""Reports of lines, tables and legends: whole in a file or a pipe, and fitted to a terminal's columns."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tomevit.cli.console import echo, is_terminal
from tomevit.errors import printable

LEAST_WIDTH = 8  # that a column is shortened to


class Column(NamedTuple):
    """Of a table: what stands above it, and how early it is left out where there is no room."""

    name: str
    rank: int = 0  # 0: it stays; of the others the highest goes first


@dataclass(frozen=True)
class Table:
    """The first column, of names, to the left, and the others to the right."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]

    def lines(self, width: int | None = None) -> list[str]:
        """It aligned, each row a line.

        Args:
            width: characters that a line may have: columns are left out until it fits, which a line below says, and
                at last what is left is shortened. None: any number.
        """
        cells, (widths, shown) = self._cells(), self._fit(width)
        lines = []
        for row in cells:
            first, *others = (_shorten(row[i], widths[i]) for i in shown)
            right = (cell.rjust(widths[i]) for cell, i in zip(others, shown[1:], strict=True))
            lines.append("  ".join([first.ljust(widths[shown[0]]), *right]))
        if left_out := [column.name for i, column in enumerate(self.columns) if i not in shown]:
            lines += wrapped(f"(without room: {', '.join(dict.fromkeys(left_out))})", width)
        return lines

    def shown(self, width: int | None = None) -> set[str]:
        """The columns for which there is room."""
        return {self.columns[i].name for i in self._fit(width)[1]}

    def _cells(self) -> list[list[str]]:
        return [[column.name for column in self.columns], *(list(map(str, row)) for row in self.rows)]

    def _fit(self, width: int | None) -> tuple[list[int], list[int]]:
        """How wide each column is, and which are shown."""
        cells = self._cells()
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        shown = [*range(len(self.columns))]
        while width is not None and _total(widths, shown) > width:
            least = max(shown, key=lambda i: (self.columns[i].rank, i))
            if self.columns[least].rank == 0:
                _shrink(widths, shown, width)
                break
            shown.remove(least)
        return widths, shown

    def markdown(self) -> Iterator[str]:
        """Its lines in Markdown, which a bare asterisk could take for emphasis; aligned in the same way."""
        columns = [column.name for column in self.columns]
        for cells in (columns, ["---", *["---:"] * (len(columns) - 1)], *self.rows):
            yield f"| {' | '.join(map(str, cells))} |".replace("*", r"\*")


class Legend(NamedTuple):
    """What is said below tables: sentences, each with the column that it is of, or "" for any."""

    sentences: Sequence[tuple[str, str]]

    def text(self, shown: Collection[str] | None = None) -> str:
        """The sentences on columns that are shown; None: on all."""
        return " ".join(text for column, text in self.sentences if not column or shown is None or column in shown)


Part = str | Table | Legend


def _total(widths: Sequence[int], shown: Sequence[int]) -> int:
    return sum(widths[i] for i in shown) + 2 * (len(shown) - 1)


def _shrink(widths: list[int], shown: Sequence[int], width: int) -> None:
    """Make the widest columns narrower until all fit, or none can be; the first last, whose names are to be copied."""
    first, *others = shown
    while (over := _total(widths, shown) - width) > 0:
        widest = max(others, key=lambda i: widths[i], default=first)
        if widths[widest] <= LEAST_WIDTH:
            widest = first
        if widths[widest] <= LEAST_WIDTH:
            return
        widths[widest] = max(LEAST_WIDTH, widths[widest] - over)


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def wrapped(line: str, width: int | None, hanging: int = 0) -> list[str]:
    """A line in as many as it takes, each as a terminal may show it.

    One that is indented stays whole unless it may hang: it names a file.

    Args:
        width: characters that each may have, but that no word is cut, such as an address; None: any number.
        hanging: characters of the label, with the spaces after it, that a line may begin with: what follows stands
            below what is behind it.
    """
    if width is None:
        return [line]
    line = printable(line)  # or a line end in a name would be taken for a space
    indented = len(line) - len(line.lstrip())
    if len(line) <= width or (indented and not hanging):
        return [line]
    label = line[:hanging] if line[:hanging].endswith("  ") else line[:indented]
    found = textwrap.wrap(
        line[len(label) :], max(1, width - len(label)), break_long_words=False, break_on_hyphens=False
    )
    return [(" " * len(label) if i else label) + text for i, text in enumerate(found)]


def fitted(parts: Iterable[Part], width: int | None, hanging: int = 0) -> list[str]:
    """The lines of a report: its tables, and what stands between them. Arguments as `wrapped`."""
    lines: list[str] = []
    shown: set[str] = set()
    for part in parts:
        if isinstance(part, Table):
            lines += part.lines(width)
            shown |= part.shown(width)
        else:
            lines += wrapped(part.text(shown) if isinstance(part, Legend) else part, width, hanging)
    return lines


def terminal_width() -> int | None:
    """The columns of the terminal that standard output is; None: it is none."""
    if not is_terminal(sys.stdout):
        return None
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def show(parts: Iterable[Part], hanging: int = 0) -> None:
    """Print a report, fitted where that is to a terminal."""
    echo(*fitted(parts, terminal_width(), hanging))
