"""The tables of README.md and docs/speed.md are current; that of all weights says what the cards say.

The README and the changelog stay short.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tomevit
from docs import speed_table, written_tables
from docs.weights_table import section, summary
from docs.written_tables import PAGES, ROOT, written


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_pages_are_current(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == written(text, PAGES[path]), "stale: python -m docs.written_tables"


def test_the_readme_is_short_and_so_is_what_is_new() -> None:
    readme, changes = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CHANGELOG.md"))
    assert len(readme.splitlines()) <= 180
    assert len(re.split(r"^## ", changes, flags=re.MULTILINE)[1].split()) < 200


def test_the_readme_shows_published_accuracies_beside_what_was_measured() -> None:
    table = speed_table.three_models()
    # The speed is that of vit_b16_384, whose architecture it is; only fresh weights are drawn otherwise.
    assert "| `swag_b16_384` | 45 | 85.30 | 84.59 | −0.71 | 1.96 | 1.85 | CC-BY-NC-4.0 |" in table
    assert "| `vit_b16` | 13 | 84.57 | 82.60 | −1.97 | 1.69 | 1.56 | Apache-2.0 |" in table
    # Others of its r were measured, which says nothing of this one.
    assert speed_table.measured_speed_up(tomevit.card("vit_b16").config, 7) == "not measured"
    assert speed_table.measured_speed_up(tomevit.card("vit_b16_384").config, 23) == "1.30"


def test_every_family_has_one_row() -> None:
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \|", summary(), re.MULTILINE)
    assert len(rows) == len(dict(rows))
    assert f"{sum(int(count) for _, count in rows)} public sets" in section()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{sum(int(count) for _, count in rows)} sets of public weights" in readme


def test_every_published_set_has_one_row() -> None:
    rows = re.findall(r"^\| `(.*?)` \|", section(), re.MULTILINE)
    published = {name for name in tomevit.list_models(weights=True) if "." in name and not name.startswith("digits")}
    assert sorted(rows) == sorted(published)
    assert f"{len(rows)} public sets" in section()


@pytest.mark.parametrize(
    "row",
    [
        # Both figures from one table, though timm measured 84.534.
        r"`vit_b16.augreg_in21k_ft_in1k` \| 84\.57 \| 82\.60 \(r = 13\) \| Apache-2\.0 \| "
        r"\[timm/vit_base_patch16_224\.augreg_in21k_ft_in1k\]\(https://huggingface\.co/timm/[\w.]+\), "
        r"\[vit_jax\]\(https://storage\.googleapis\.com/\S+\.npz\) \|",
        # Nobody published what models trained with merging reach without.
        r"`deit_s16.tome_r13` \|  \| 79\.36 \(r = 13\) \| CC-BY-NC-4\.0 \| "
        r"\[f367470145_deit_S_r13\.pth\]\(https://\S+\) \|",
        r"`mae_cls_b16.pretrain` \|  \|  \| CC-BY-NC-4\.0 \|",
    ],
)
def test_rows(row: str) -> None:
    assert len(re.findall(row, section())) == 1


def test_stale_tables_are_found_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tables,) = [tables for path, tables in PAGES.items() if path.name == "speed.md"]
    page = tmp_path / "page.md"
    parts = [f"<!-- {name}: start -->\n{{}}\n<!-- {name}: end -->\n" for name in tables]
    page.write_text("before\n" + "".join(part.format("old") for part in parts) + "after\n", encoding="utf-8")
    monkeypatch.setattr(written_tables, "PAGES", {page: tables})
    assert written_tables.main(["--check"]) == "stale: page.md; python -m docs.written_tables renews them"
    assert written_tables.main([]) is None
    assert written_tables.main(["--check"]) is None
    found = [part.format(table()) for part, table in zip(parts, tables.values(), strict=True)]
    assert page.read_text(encoding="utf-8") == f"before\n{''.join(found)}after\n"
    with pytest.raises(ValueError, match="first table: start"):
        written("no markers", tables)
