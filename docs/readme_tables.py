"""The README's tables that no hand writes, each between markers of its name.

python -m docs.readme_tables            write them
python -m docs.readme_tables --check    exit with 1 if one is not current
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from docs import speed_table, weights_table

README = Path(__file__).parent.parent / "README.md"
TABLES = {
    "first table": speed_table.first,
    "speed table": speed_table.section,
    "weights table": weights_table.summary,
}


def written(readme: str) -> str:
    """The README with its tables as they should be."""
    for name, section in TABLES.items():
        start, end = (f"<!-- {name}: {which} -->" for which in ("start", "end"))
        before, found, rest = readme.partition(start)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"the README has no {end if found else start}")
        readme = f"{before}{start}\n{section()}\n{end}{after}"
    return readme


def main(arguments: Iterable[str]) -> str | None:
    """What went wrong, if anything did."""
    old = README.read_text(encoding="utf-8")
    new = written(old)
    if list(arguments) == ["--check"]:
        return None if old == new else f"{README} is stale: python -m docs.readme_tables"
    if arguments:
        return str(__doc__)
    README.write_text(new, encoding="utf-8")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
