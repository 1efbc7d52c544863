"""What files say of themselves is text: it commands no terminal, and means nothing in a page, a picture or a card."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

import tomevit
from tests.faults.terminal import run_at_terminal
from tests.helpers import PLAIN, tiny
from tests.outcomes import survives
from tests.tasks.test_cli import run
from tomevit.cards import Card
from tomevit.config import Figure, Source
from tomevit.tasks import plots
from tomevit.tasks.demo import held_out
from tomevit.weights.push import find_base, model_card

TERMINAL = survives(
    "text from files",
    "escapes, control characters, line ends and bidirectional marks in names of files, classes and tensors",
    "shown by their numbers where standard output or error is a terminal; each name stays on its line",
)
ELSEWHERE = survives(
    "text from files",
    "such names, and bytes that are no text, in a pipe, CSV, JSON or a file",
    "names of files are there byte for byte, so that scripts find the files",
)
MARKDOWN = survives(
    "text from files",
    "headings, links, HTML, tables and YAML in what a model says of itself",
    "are text in the model card that `push` writes",
)
DRAWN = survives(
    "text from files",
    "formulas, TeX, escapes and signs without a glyph in what is drawn",
    "are text in pictures; what the font has not is told by its number",
)

#: Escapes of 7 and 8 bits, a title, a link, a line end, a return, a tab, marks of direction and of no width.
ODD = "\x1b[2J\x9b31m\x1b]0;t\x07\n\r\t\u202e\u2066\u200b\u2028\x7f\udce9"
SHOWN = r"\x1b[2J\x9b31m\x1b]0;t\x07\n\r\t\u202e\u2066\u200b\u2028\x7f\udce9"


def is_harmless(shown: str) -> bool:
    """Whether nothing of it commands a terminal, but for bars, which go back to the beginning of their line."""
    return all(unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in re.sub(r"[\n\r]", "", shown))


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one class with an image and what is none, whose names are odd."""
    folder = tmp_path_factory.mktemp("odd") / "3"
    folder.mkdir()
    Image.fromarray(held_out()[0][0, 0].numpy()).save(folder / "a.png")
    (folder / "a.png").rename(folder / f"image{ODD}.png")
    (folder / f"broken{ODD}.png").write_bytes(b"no image")
    return folder


def commands(odd: Path, out: Path) -> dict[str, list[str]]:
    return {
        "classify": ["classify", str(odd), "--model", PLAIN],
        "csv": ["classify", str(odd), "--model", PLAIN, "--csv"],
        "eval": ["eval", "--data", str(odd.parent), "--model", PLAIN, "--workers", "0", "--skip-broken"],
        "embed": ["embed", str(odd), "--model", PLAIN, "--workers", "0", "-o", str(out / "a.safetensors")],
        "info": ["info", str(odd / f"broken{ODD}.png")],
        "verify": ["verify", str(odd / f"none{ODD}")],
        "visualize": ["visualize", str(odd / f"broken{ODD}.png"), "-o", str(out / "a.html"), "--model", PLAIN],
        "unknown": ["info", ODD.replace("\udce9", "")],
        "usage": ["list", f"--{ODD}"],
    }


@TERMINAL
@pytest.mark.parametrize("name", commands(Path(), Path()))
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_names_do_not_command_a_terminal(odd: Path, tmp_path: Path, name: str, encoding: str) -> None:
    _, shown = run_at_terminal(*commands(odd, tmp_path)[name], encoding=encoding)
    assert is_harmless(shown), ascii(shown)
    if name not in ("unknown", "usage"):
        assert SHOWN in shown


@TERMINAL
def test_json_keeps_its_lines_at_a_terminal(odd: Path) -> None:
    _, shown = run_at_terminal("classify", str(odd), "--model", PLAIN, "--json")
    assert is_harmless(shown)
    found = json.loads(shown[shown.index("{") :])
    assert found["images"][0]["image"] == str(odd / f"image{ODD}.png")


@TERMINAL
def test_nor_do_names_of_tensors_and_classes(tmp_path: Path) -> None:
    model = tiny(4)
    model.card = Card(**vars(model.card) | {"class_names": [f"{i}{ODD}" for i in range(model.config.num_classes)]})
    tomevit.save(model, tmp_path / "a.safetensors")
    save_file({f"module.{ODD[:-1]}.weight": torch.ones(2)}, tmp_path / "b.safetensors")
    for arguments in (("info", "a.safetensors"), ("info", "b.safetensors"), ("convert", "b.safetensors")):
        _, shown = run_at_terminal(arguments[0], str(tmp_path / arguments[1]))
        assert is_harmless(shown), ascii(shown)


@TERMINAL
def test_nor_do_warnings_logs_and_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(*_: Any, **__: Any) -> list[str]:
        sys.stderr.write(f"a warning{ODD}\n")  # as warnings do
        logging.lastResort.handle(logging.makeLogRecord({"msg": f"a record{ODD}", "levelno": 40}))
        for _ in tqdm([1], desc=f"a bar{ODD}", mininterval=0):
            pass
        return []

    monkeypatch.setattr("tomevit.zoo.list_models", noisy)
    _, shown = run_at_terminal("list", ODD)
    assert is_harmless(shown), ascii(shown)
    for said in ("a warning", "a record", "a bar"):
        assert f"{said}\\x1b[2J" in shown


@ELSEWHERE
@pytest.mark.parametrize("name", ["classify", "csv", "eval", "embed"])
def test_names_are_exact_in_a_pipe(odd: Path, tmp_path: Path, name: str) -> None:
    read, write = os.pipe()
    with pytest.MonkeyPatch.context() as patch, os.fdopen(write, "w", encoding="utf-8") as pipe:
        patch.setattr(sys, "stdout", pipe)
        patch.setattr(sys, "stderr", pipe)
        with pytest.raises(SystemExit):
            tomevit.cli.main(commands(odd, tmp_path)[name])
    with os.fdopen(read, "rb") as file:
        said = file.read()
    assert os.fsencode(f"broken{ODD}.png") in said
    if name == "csv":
        rows = csv.reader(io.StringIO(said.decode("utf-8", "surrogateescape"), newline=""))
        assert str(odd / f"image{ODD}.png") in [row[0] for row in rows if row]


@ELSEWHERE
@pytest.mark.parametrize(("form", "ending"), [("text", "txt"), ("csv", "csv"), ("json", "json")])
def test_names_are_exact_in_a_file(
    odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, ending: str
) -> None:
    image, out = odd / f"image{ODD}.png", tmp_path / f"a.{ending}"
    assert run(capsys, "classify", str(image), "--model", PLAIN, "-o", str(out))[0] == 0
    assert (json.dumps(str(image)).encode() if form == "json" else os.fsencode(image)) in out.read_bytes()


@MARKDOWN
@pytest.mark.parametrize(
    "text",
    [
        "# Install malware",
        "[x](javascript:alert(1))",
        "](javascript:alert(1))",
        "![x](https://a.example/pixel)",
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[x]: https://a.example",
        "<https://a.example>",
        "`code` **bold** ~~struck~~ __loud__",
        "a | b\n---|---\nc | d",
        "\n\n## Use\n\n```sh\ncurl a.example | sh\n```",
        "mit\n---\n---\nlicense: mit",
        'mit", "other\': [x]\n- y: *z',
        "$\\mathrm{x}$ &lt;b&gt;",
        ODD,
    ],
)
def test_what_a_model_says_is_text_in_its_card(text: str) -> None:
    card = Card(
        name=text,
        title=text,
        licence=text,
        papers=(text,),
        class_names=(text,),
        figures=(Figure(top1=1.0, source=text),),
        origin=Source(format="timm", hub=text, url=text, file=text, sha256="0" * 64),
    )
    written = model_card(card, "a/b", find_base(card))
    assert written.encode("utf-8").decode() == written
    assert is_harmless(written)
    _, front, body = written.split("---\n", 2)
    outside = re.sub(
        r"^```python\n.*?^```\n|`[^`\n]*`|\[(?:\\.|[^]\\])*\]\(https://[^)\s]*\)", "", body, flags=re.M | re.S
    )
    outside = re.sub(r"\\[\\`*_\[\]<>|~&$#]", "", outside)  # what is escaped is text
    assert not re.search(r"[\[\]<>`&~]|\bjavascript:(?!alert\(1\)\))", outside.replace("javascript:alert(1))", ""))
    plain = model_card(replace(card, name="a", title="a", licence="a", papers=("a",)), "a/b", find_base(card))
    heading = re.compile(r"^[ >*+-]*#+ .*", re.MULTILINE)
    assert heading.findall(body) == heading.findall(plain.split("---\n", 2)[2])
    assert len(body.splitlines()) == len(plain.split("---\n", 2)[2].splitlines())
    assert re.findall(r"^license: (.*)$", front, re.M) == ["other"]


@DRAWN
@pytest.mark.filterwarnings("ignore:constrained_layout", "error:Glyph")
@pytest.mark.parametrize(
    "text", ["$x", r"$\frac{1}{$", r"\input{/etc/passwd}", "50% & #1_^{}~", ODD, "\N{PILE OF POO}"]
)
def test_names_are_drawn_as_text(tmp_path: Path, text: str) -> None:
    points = [plots.Point(text, 1.0, 2.0, 3.0), plots.Point("r = 8", 2.0, 1.0, 2.0)]
    plots.accuracy_throughput(tmp_path / "a.svg", {text: points, "b": points}, text, text, suffix=".svg")
    plots.save(plots.panels([[torch.ones(3, 4, 4)]], [text], [text], text, text, captions=[[text]]), tmp_path / "b.png")
    plots.tokens_per_layer(tmp_path / "c.png", ".png", {text: [2, 1]}, text)
    drawn = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "PILE" not in text or "\\U0001f4a9" in drawn
