"""Reports of lines and tables: whole in a file or a pipe, and fitted to a terminal's columns."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
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
        cells = [[column.name for column in self.columns], *(list(map(str, row)) for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        shown, left_out = [*range(len(self.columns))], list[int]()
        while width is not None and _total(widths, shown) > width:
            least = max(shown, key=lambda i: (self.columns[i].rank, i))
            if self.columns[least].rank == 0:
                _shrink(widths, shown, width)
                break
            shown.remove(least)
            left_out.append(least)
        lines = []
        for row in cells:
            first, *others = (_shorten(row[i], widths[i]) for i in shown)
            right = (cell.rjust(widths[i]) for cell, i in zip(others, shown[1:], strict=True))
            lines.append("  ".join([first.ljust(widths[shown[0]]), *right]))
        if left_out:
            names = ", ".join(dict.fromkeys(self.columns[i].name for i in sorted(left_out)))
            lines += wrapped(f"(without room: {names})", width)
        return lines

    def markdown(self) -> Iterator[str]:
        """Its lines in Markdown, which a bare asterisk could take for emphasis; aligned in the same way."""
        columns = [column.name for column in self.columns]
        for cells in (columns, ["---", *["---:"] * (len(columns) - 1)], *self.rows):
            yield f"| {' | '.join(map(str, cells))} |".replace("*", r"\*")


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


def fitted(parts: Iterable[str | Table], width: int | None, hanging: int = 0) -> list[str]:
    """The lines of a report: its tables, and what stands between them. Arguments as `wrapped`."""
    lines: list[str] = []
    for part in parts:
        lines += part.lines(width) if isinstance(part, Table) else wrapped(part, width, hanging)
    return lines


def terminal_width() -> int | None:
    """The columns of the terminal that standard output is; None: it is none."""
    if not is_terminal(sys.stdout):
        return None
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def show(parts: Iterable[str | Table], hanging: int = 0) -> None:
    """Print a report, fitted where that is to a terminal."""
    echo(*fitted(parts, terminal_width(), hanging))
