"""The tables that no hand writes and that stand on the pages, each between markers of its name.

python -m docs.written_tables            write them
python -m docs.written_tables --check    exit with 1 if one is not current
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from docs import speed_table
from docs.tables import WRITTEN

ROOT = Path(__file__).parent.parent
Tables = Mapping[str, Callable[[], str]]
TABLES: Tables = {
    **WRITTEN,
    "three models": speed_table.three_models,
    "first table": speed_table.first,
    "speed table": speed_table.section,
    "bfloat16 table": partial(speed_table.section, speed_table.NATIVE),
}
MARKER = re.compile(r"^<!-- (.+): start -->$", re.MULTILINE)


def _on_pages() -> dict[Path, Tables]:
    """The tables of each page that has any. Others are their programs': benchmarks/ has those that measure."""
    found: dict[Path, Tables] = {}
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        names = MARKER.findall(path.read_text(encoding="utf-8"))
        if tables := {name: TABLES[name] for name in names if name in TABLES}:
            found[path] = tables
    return found


PAGES = _on_pages()


def written(page: str, tables: Tables) -> str:
    """A page's text with its tables as they should be."""
    for name, section in tables.items():
        start, end = (f"<!-- {name}: {which} -->" for which in ("start", "end"))
        before, found, rest = page.partition(start)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"the page has no {end if found else start}")
        page = f"{before}{start}\n{section()}\n{end}{after}"
    return page


def main(arguments: Iterable[str]) -> str | None:
    """What went wrong, if anything did."""
    given = list(arguments)
    if given not in ([], ["--check"]):
        return str(__doc__)
    stale = []
    for path, tables in PAGES.items():
        old = path.read_text(encoding="utf-8")
        new = written(old, tables)
        if old != new:
            stale.append(path.name)
            if not given:
                path.write_text(new, encoding="utf-8")
    return f"stale: {', '.join(stale)}; python -m docs.written_tables renews them" if given and stale else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
