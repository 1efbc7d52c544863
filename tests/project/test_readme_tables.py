"""The README's tables are current; that of all weights says what the cards say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tomevit
from docs import readme_tables
from docs.readme_tables import README, TABLES, written
from docs.weights_table import section


def test_the_readme_is_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert text == written(text), "stale: python -m docs.readme_tables"


def test_every_published_set_has_one_row() -> None:
    rows = re.findall(r"^\| `(.*?)` \|", section(), re.MULTILINE)
    ours = {"digits_p1.plain", "digits_p1.tome_r16"}
    assert sorted(rows) == sorted(name for name in set(tomevit.list_models(weights=True)) - ours if "." in name)
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
    readme = tmp_path / "README.md"
    parts = [f"<!-- {name}: start -->\n{{}}\n<!-- {name}: end -->\n" for name in TABLES]
    readme.write_text("before\n" + "".join(part.format("old") for part in parts) + "after\n", encoding="utf-8")
    monkeypatch.setattr(readme_tables, "README", readme)
    assert "stale" in str(readme_tables.main(["--check"]))
    assert readme_tables.main([]) is None
    assert readme_tables.main(["--check"]) is None
    found = [part.format(table()) for part, table in zip(parts, TABLES.values(), strict=True)]
    assert readme.read_text(encoding="utf-8") == f"before\n{''.join(found)}after\n"
    with pytest.raises(ValueError, match="first table: start"):
        written("no markers")
