"""What a user sees at a terminal: bars that leave nothing behind, and tables that fit."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

import tomevit.cli.demo
import tomevit.measure.bounds
from tests.faults.terminal import rendered, run_at_terminal
from tests.helpers import PLAIN
from tests.server import Server
from tests.tasks.test_tune import clock
from tomevit import cli, progress
from tomevit.cli.tables import Column, Legend, Table, fitted, wrapped
from tomevit.tasks.demo import held_out
from tomevit.tasks.tune import costs

# huggingface_hub's way to send a large file is one that its HTTP library no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

COUNT = 40  # of images: more than tune needs


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few digits as files, a folder for each class."""
    root = tmp_path_factory.mktemp("digits")
    images, labels = held_out()
    for i in range(COUNT):
        (root / str(labels[i].item())).mkdir(exist_ok=True)
        Image.fromarray(images[i, 0].numpy()).save(root / str(labels[i].item()) / f"{i:03}.png")
    return root


@pytest.fixture
def ready(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_environment: Callable[..., None], server: Server
) -> None:
    """In a folder with images/, image.png, mine.safetensors and eval.json; a hub; little is timed."""
    (tmp_path / "images").symlink_to(digits)
    (tmp_path / "image.png").symlink_to(next(digits.rglob("*.png")))
    model = tomevit.create(PLAIN, pretrained=True)
    tomevit.save(model, tmp_path / "mine.safetensors")
    row = {"r": 0, "images_per_second": 9.0, "gflops": 1.0, "top1": {"value": 80.0, "lower": 79.0, "upper": 81.0}}
    where = {"command": "eval", "model": PLAIN, "img_size": [8, 8], "device": "a device", "evaluated": COUNT}
    (tmp_path / "eval.json").write_text(json.dumps(where | {"rows": [row]}))
    server.put("/mine.safetensors", (tmp_path / "mine.safetensors").read_bytes())
    server.put_hub("owner/name", "model.safetensors", (tmp_path / "mine.safetensors").read_bytes())
    server.accounts["hf_token"] = "owner"
    set_environment(HF_HUB_DISABLE_XET="1", HF_TOKEN="hf_token")
    monkeypatch.setattr(costs, "time_rounds", clock(model))
    monkeypatch.setattr(cli.demo, "run", partial(cli.demo.run, rounds=1))
    monkeypatch.setattr(tomevit.measure.bounds, "COPIED", 2**20)
    monkeypatch.chdir(tmp_path)


#: Of every command that may draw a bar short calls, in which what must be there stands first.
WITH_BARS = {
    "bench": "bench digits_p1 --r 8 '1.5x late' --rounds 6 --batch 1 --no-timm",
    "classify": f"classify images --model {PLAIN} --r 16 --compare",
    "classify one": f"classify image.png --model {PLAIN}",
    "convert": f"convert {PLAIN} -o converted.safetensors",
    "convert from an address": "convert {url}/mine.safetensors -o converted.safetensors",
    "convert from the hub": "convert hf-hub:owner/name -o converted.safetensors",
    "demo": "demo --model digits_p1 --r 2x",
    "embed": f"embed images --model {PLAIN} --workers 0 -o a.safetensors --overwrite",
    "eval": f"eval --data images --model {PLAIN} --r 0 8 --workers 0",
    "export": f"export {PLAIN} --format pt2 -o a.pt2",
    "push": "push mine.safetensors owner/name",
    "train": "train digits --model digits_p1 --r 16 --epochs 1 --limit 64 --measure 64 --batch 32 -o run",
    "tune": f"tune images --model {PLAIN} --speed-up 1.2 --matchings bipartite --rounds 6 --workers 0 -o t.safetensors",
    "verify": "verify mine.safetensors --against {url}/mine.safetensors",
    "visualize": f"visualize image.png --model {PLAIN} -o a.html",
}

#: And of those that draw none.
WITHOUT_BARS = {
    "info": "info vit_l16_384 --r 8 23 '2x late'",
    "info of a file": "info mine.safetensors",
    "list": "list",  # reads the zoo's tables
    "list --weights": "list --weights --sort merged",
    "plot": "plot eval.json -o eval.png",
}

KEPT = {
    "bench": ("r", "images/s", "speed-up"),
    "classify": ("image", "r = 0", "r = 16"),
    "demo": ("r", "off the shelf %", "trained %", "speed-up"),
    "eval": ("r", "top-1 %", "95 %", "vs r = 0", "speed-up"),
    "list": ("name", "top-1", "merged", "take r"),
    "list --weights": ("name", "top-1", "take r"),
    "tune": ("r", "speed-up", "agree %", "top-1 %"),
}
#: The columns at which a table leaves some out.
TOO_NARROW = {"bench": 80, "demo": 60, "eval": 80, "list": 80, "list --weights": 80}


def test_every_command_is_shown_at_a_terminal() -> None:
    drawing, others = ({call.split()[0] for call in calls.values()} for calls in (WITH_BARS, WITHOUT_BARS))
    assert not drawing & others
    assert drawing | others == set(cli.VERBS)


@pytest.mark.parametrize("name", [*WITH_BARS, *WITHOUT_BARS])
def test_what_stays_on_a_terminal_fits_and_no_bar_is_left(
    ready: None, name: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (WITH_BARS | WITHOUT_BARS)[name].format(url=server.url)
    given = {*Path().iterdir()}
    for columns, delay in ((80, 1e6), (60, 0.0)):
        monkeypatch.setattr(progress, "DELAY", delay)
        status, shown = run_at_terminal(*shlex.split(arguments), columns=columns)
        assert status == 0, shown
        lines = rendered(shown)
        assert not [line for line in lines if re.search(r"\d%\||\?it|it/s|/s\]|\[\d\d:\d\d|█", line)], shown
        assert ("\r" in shown) == (name in WITH_BARS and delay == 0.0), "a bar was drawn, or none"
        for line in lines:
            assert len(line) <= columns or stays_whole(line), line
        whole = [line for line in lines if not line.startswith("(without room: ")]
        for heading in KEPT.get(name, ()):
            assert any(heading in line for line in whole), heading
        assert any(line.startswith("(without room: ") for line in lines) == (columns <= TOO_NARROW.get(name, 0))
        for path in {*Path().iterdir()} - given:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("columns", [80, 60])
def test_a_list_has_whole_names_and_what_was_asked_for(columns: int) -> None:
    for options in ((), ("--weights",)):
        _, shown = run_at_terminal("list", *options, columns=columns)
        names = {line.split(" ")[0] for line in rendered(shown)}
        assert set(tomevit.list_models(weights=bool(options))) - names == set()
    head = rendered(run_at_terminal("list", columns=columns)[1])[0]
    assert re.split(r"  +", head)[-3:] == ["top-1", "merged", "take r"]
    assert (re.split(r"  +", head)[1:3] == ["pixels", "params M"]) == (columns == 80)
    for option, column in {"--sort pixels": "pixels", "--sort gflops": "GFLOPs", "--licence mit": "licence"}.items():
        assert column in rendered(run_at_terminal("list", *option.split(), columns=columns)[1])[0]


def stays_whole(line: str) -> bool:
    """Whether a line is too long because of one word, such as an address, or is a message on standard error."""
    return " " not in re.split(r"\s{2,}", line.strip())[-1] or line.startswith(("tomevit: ", "written to "))


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


def test_a_legend_explains_what_is_shown() -> None:
    table = Table([Column("name"), Column("value"), Column("lesser", 1)], [["a", "1", "2" * 30]])
    legend = Legend([("", "Of any."), ("value", "Of the value."), ("lesser", "Of the lesser.")])
    assert fitted([table, legend], 60)[-1] == legend.text() == "Of any. Of the value. Of the lesser."
    assert fitted([table, legend], 30)[-2:] == ["(without room: lesser)", "Of any. Of the value."]


def test_lines_are_wrapped_below_their_labels() -> None:
    assert wrapped("a line of words", None) == ["a line of words"]
    assert wrapped("a line of words", 9) == ["a line of", "words"]
    assert wrapped("label  some words that go on", 18, 7) == ["label  some words", "       that go on"]
    assert wrapped("  indented words", 12, 7) == ["  indented", "  words"]
    assert wrapped("  a file's name: no image", 12) == ["  a file's name: no image"]
    assert wrapped("some\tname\nand a word", 18) == [r"some\tname\nand a", "word"]
