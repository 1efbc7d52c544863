"""What a user sees at a terminal: bars that leave nothing behind, and tables that fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.faults.terminal import rendered, run_at_terminal
from tests.helpers import PLAIN
from tomevit import progress
from tomevit.cli.tables import Column, Table, wrapped
from tomevit.tasks.demo import held_out


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


def tables(digits: Path) -> dict[str, list[str]]:
    """Calls of the commands that print tables, in which what must be there stands first."""
    return {
        "list": ["list"],
        "list --weights": ["list", "--weights", "--sort", "merged"],
        "info": ["info", "vit_l16_384", "--r", "8", "23", "2x late"],
        "bench": ["bench", "digits_p1", "--r", "8", "1.5x late", "--rounds", "6", "--batch", "1", "--no-timm"],
        "eval": ["eval", "--data", str(digits), "--model", PLAIN, "--r", "0", "8", "--workers", "0"],
        "classify": ["classify", str(digits), "--model", PLAIN, "--r", "16", "--compare"],
    }


KEPT = {
    "list": ("name", "top-1", "merged", "take r"),
    "list --weights": ("name", "top-1", "merged", "take r"),
    "bench": ("r", "images/s", "speed-up"),
    "eval": ("r", "top-1 %", "95 %", "vs r = 0", "speed-up"),
}


@pytest.mark.parametrize("columns", [80, 60])
@pytest.mark.parametrize("name", ["list", "list --weights", "info", "bench", "eval", "classify"])
def test_what_is_shown_fits_the_terminal(
    digits: Path, name: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(digits)
    arguments = [argument.replace(str(digits), ".") for argument in tables(digits)[name]]
    status, shown = run_at_terminal(*arguments, columns=columns)
    assert status == 0
    lines = rendered(shown)
    longest = max((line for line in lines if len(line.split()) > 1), key=len)  # an address and an r stay whole
    assert len(longest) <= columns, longest
    for heading in KEPT.get(name, ()):
        assert any(heading in line for line in lines), heading
    if name in KEPT:
        assert any(line.startswith("(without room: ") for line in lines)


def test_tables_leave_out_the_lesser_columns_first() -> None:
    table = Table(
        [Column("name"), Column("lesser", 1), Column("least", 2), Column("value")],
        [["a" * 30, "1", "22", "333"], ["b", "1", "22", "333"]],
    )
    whole = table.lines()
    assert [line.split() for line in whole[:2]] == [["name", "lesser", "least", "value"], ["a" * 30, "1", "22", "333"]]
    assert table.lines(len(whole[0])) == whole
    assert table.lines(50)[0].split() == ["name", "lesser", "value"]
    assert table.lines(50)[-1] == "(without room: least)"
    assert table.lines(40)[0].split() == ["name", "value"]
    narrow = table.lines(20)
    assert narrow[1] == f"{'a' * 12}…    333"
    assert table.lines(5)[1] == f"{'a' * 7}…    333"  # nothing is narrower


def test_lines_are_wrapped_below_their_labels() -> None:
    assert wrapped("a line of words", None) == ["a line of words"]
    assert wrapped("a line of words", 9) == ["a line of", "words"]
    assert wrapped("label  some words that go on", 18, 7) == ["label  some words", "       that go on"]
    assert wrapped("  indented words", 12, 7) == ["  indented", "  words"]
    assert wrapped("  a file's name: no image", 12) == ["  a file's name: no image"]
    assert wrapped("some\tname\nand a word", 18) == [r"some\tname\nand a", "word"]
