"""What a user sees at a terminal: bars that leave nothing behind, and tables that fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.faults.terminal import rendered, run_at_terminal
from tomevit import progress
from tomevit.tasks.demo import PLAIN, held_out


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few digits as files, a folder for each class."""
    root = tmp_path_factory.mktemp("digits")
    images, labels = held_out()
    for i in range(12):
        (root / str(labels[i].item())).mkdir(exist_ok=True)
        Image.fromarray(images[i, 0].numpy()).save(root / str(labels[i].item()) / f"{i:03}.png")
    return root


def commands(digits: Path, out: Path) -> dict[str, list[str]]:
    """A short call of every command with a bar."""
    image = str(next(digits.rglob("*.png")))
    return {
        "classify": ["classify", str(digits), "--model", PLAIN],
        "classify one": ["classify", image, "--model", PLAIN],
        "eval": ["eval", "--data", str(digits), "--model", PLAIN, "--r", "0", "8", "--workers", "0"],
        "embed": ["embed", str(digits), "--model", PLAIN, "--workers", "0", "-o", str(out / "a.safetensors")],
        "bench": ["bench", "digits_p1", "--r", "8", "--rounds", "1", "--batch", "1", "--no-timm"],
        "visualize": ["visualize", image, "--model", PLAIN, "-o", str(out / "a.html")],
        "convert": ["convert", PLAIN, "-o", str(out / "b.safetensors")],
    }


COMMANDS = ("classify", "classify one", "eval", "embed", "bench", "visualize", "convert")


@pytest.mark.parametrize("name", COMMANDS)
def test_bars_leave_nothing_behind(digits: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 1e6)
    status, shown = run_at_terminal(*commands(digits, tmp_path)[name])
    assert status == 0
    assert "\r" not in shown
    assert not [line for line in shown.splitlines() if "it/s" in line or "?" in line or "█" in line]

    monkeypatch.setattr(progress, "DELAY", 0.0)
    status, shown = run_at_terminal(*[*commands(digits, tmp_path)[name], *["--overwrite"] * (name == "embed")])
    assert status == 0
    assert not [line for line in rendered(shown) if "it/s" in line or "%|" in line or "█" in line]
    if name.startswith("classify"):
        assert "%|" in shown, "no bar was drawn: nothing was tested"
