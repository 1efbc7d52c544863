"""The README's table of all weights is current, and says what the cards say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tomevit
from docs import weights_table
from docs.weights_table import END, README, START, section, written


def test_the_readme_is_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert text == written(text), "stale: python docs/weights_table.py"


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
    readme.write_text(f"before\n{START}\nold\n{END}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(weights_table, "README", readme)
    assert "stale" in str(weights_table.main(["--check"]))
    assert weights_table.main([]) is None
    assert weights_table.main(["--check"]) is None
    assert readme.read_text(encoding="utf-8") == f"before\n{START}\n{section()}\n{END}\nafter\n"
    with pytest.raises(ValueError, match="start"):
        written("no markers")
