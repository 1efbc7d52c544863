"""Tables as notebooks show them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from tomevit.errors import printable


def html_table(caption: str, heading: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> str:
    """A table, for `_repr_html_`. Every text may hold anything: it is escaped.

    Args:
        caption: above it.
        heading: of the columns; empty: none.
        rows: of cells; None is an empty one.
        note: below it.
    """

    def line(cells: Iterable[object], tag: str) -> str:
        return "".join(f'<{tag} style="text-align:left">{_escape(cell)}</{tag}>' for cell in cells)

    head = f"<thead><tr>{line(heading, 'th')}</tr></thead>" if heading else ""
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    below = f"<p>{_escape(note)}</p>" if note else ""
    title = f'<caption style="text-align:left"><b>{_escape(caption)}</b></caption>'
    return f"<table>{title}{head}<tbody>{body}</tbody></table>{below}"


def _escape(value: object) -> str:
    return "" if value is None else html.escape(printable(str(value)))
