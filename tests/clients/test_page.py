"""The code on docs/works_with.md runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.project.test_docs import ROOT, Block, blocks

PAGE = "docs/works_with.md"


def sections() -> dict[str, list[Block]]:
    """The blocks below each heading; below the first is what all others build on."""
    lines = (ROOT / PAGE).read_text(encoding="utf-8").splitlines()
    found: dict[str, list[Block]] = {}
    for block in blocks(PAGE):
        title = next(line for line in reversed(lines[: block.line - 1]) if line.startswith("#"))
        found.setdefault(title.lstrip("# "), []).append(block)
    return found


@pytest.mark.parametrize("title", list(sections())[1:])
def test_the_code_runs(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, *_ = sections().values()
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in (*first, *sections()[title]):
        assert block.language == "python"
        code = compile("\n" * (block.line - 1) + block.text, str(ROOT / PAGE), "exec")
        try:
            exec(code, names)
        except ModuleNotFoundError as error:
            if str(error.name).startswith("tomevit"):
                raise
            pytest.skip(f"{error.name} is not installed")
    found = {name: value for name, value in names.items() if isinstance(value, torch.Tensor)}
    assert all(value.isfinite().all() for value in found.values() if value.is_floating_point())
