"""Where commands put what they find: the form is the name's, no input is overwritten, and pipes and links are kept."""

from __future__ import annotations

import csv
import io
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tomevit.measure.bounds
from tests.helpers import PLAIN, tiny
from tests.tasks.test_cli import run
from tomevit.errors import OutputError
from tomevit.tasks.demo import held_out
from tomevit.tasks.embedding_files import read

#: How the output of each command may end, the simplest first.
KINDS = {
    "classify": ".txt",
    "eval": ".json",
    "bench": ".md",
    "visualize": ".html",
    "plot": ".png",
    "embed": ".safetensors",
}
BEGINNINGS = {
    "classify": f"{PLAIN}, r = 0".encode(),
    "eval": b"{",
    "bench": b"### tomevit bench",
    "visualize": b"<!doctype html>",
    "plot": b"\x89PNG",
}


@pytest.fixture(autouse=True)
def _small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bench measures the bandwidth of memory with a large copy, and no test here looks at it."""
    monkeypatch.setattr(tomevit.measure.bounds, "COPIED", 2**20)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, folder by class, and the result of an evaluation."""
    folder = tmp_path_factory.mktemp("stored")
    images, labels = held_out()
    for i in range(12):
        place = folder / "digits" / str(int(labels[i]))
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i, 0].numpy()).save(place / f"{i:02}.png")
    row = {"r": 0, "images_per_second": 9.0, "gflops": 1.0, "top1": {"value": 80.0, "lower": 79.0, "upper": 81.0}}
    where = {"img_size": [8, 8], "device": "a device", "torch": "2", "evaluated": 12}
    result = {"schema": 1, "command": "eval", "model": PLAIN, "rows": [row], **where}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def arguments_of(name: str, stored: Path) -> list[str]:
    digits = stored / "digits"
    first = next(digits.rglob("*.png"))
    return {
        "classify": ["classify", str(digits), "--model", PLAIN],
        "eval": ["eval", "--data", str(digits), "--model", PLAIN, "--workers", "0"],
        "bench": ["bench", PLAIN.partition(".")[0], "--batch", "1", "--rounds", "1", "--r", "8", "--no-timm"],
        "visualize": ["visualize", str(first), "--model", PLAIN, "--r", "8"],
        "plot": ["plot", str(stored / "result.json")],
        "embed": ["embed", str(digits), "--model", PLAIN, "--workers", "0"],
    }[name]


# --------------------------------------------------------------------------------------------------------------- forms


def form_of(text: str) -> str:
    try:
        json.loads(text)
    except ValueError:
        pass
    else:
        return "json"
    if text.startswith("image,rank,"):
        return "csv"
    return "markdown" if text.startswith("### ") else "text"


@pytest.mark.parametrize(
    ("command", "name", "flags", "form"),
    [
        ("classify", "x.json", [], "json"),
        ("classify", "X.JSON", ["--json"], "json"),
        ("classify", "x.csv", [], "csv"),
        ("classify", "x.txt", [], "text"),
        ("classify", "x", [], "text"),
        ("classify", "x.result", ["--csv"], "csv"),
        ("classify", "x.txt", ["--json"], "json"),
        ("eval", "x.json", [], "json"),
        ("eval", "x.md", [], "markdown"),
        ("eval", "x.log", [], "text"),
        ("bench", "x.json", [], "json"),
        ("bench", "x.md", [], "markdown"),
        ("bench", "x.txt", [], "text"),
    ],
)
def test_the_name_of_a_file_says_its_form(
    command: str,
    name: str,
    flags: list[str],
    form: str,
    stored: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / name
    status, printed, err = run(capsys, *arguments_of(command, stored), *flags, "-o", str(out))
    assert status == 0
    assert err == f"written to {out}\n"
    text = out.read_text(encoding="utf-8")
    assert form_of(text) == form
    if command != "eval":
        assert printed == ""
    if form == "csv":
        assert len(list(csv.DictReader(io.StringIO(text)))) == 12 * 5


@pytest.mark.parametrize(
    ("command", "name", "flags", "says"),
    [
        ("classify", "x.csv", ["--json"], "would be CSV by its name, and --json asks for JSON: leave out --json"),
        ("classify", "x.md", [], "it must end in .txt, .csv or .json"),
        ("classify", "x.jpg", [], "it must end in .txt, .csv or .json"),
        ("classify", "x.safetensors", ["--json"], "would hold something else than its name says"),
        ("classify", None, ["--markdown"], "this command has no --markdown, but --json or --csv"),
        ("eval", "x.md", ["--json"], "name a file that ends in .json"),
        ("eval", "x.csv", [], "it must end in .txt, .json or .md"),
        ("eval", None, ["--csv"], "this command has no --csv, but --json or --markdown"),
        ("bench", "x.json", ["--markdown"], "would be JSON by its name, and --markdown asks for Markdown"),
        ("bench", "x.onnx", [], "it must end in .txt, .json or .md"),
        ("bench", None, ["--csv"], "this command has no --csv, but --json or --markdown"),
        ("plot", "x.json", [], ".png, .svg or .pdf"),
        ("visualize", "x.json", [], ".png, .svg or .pdf, a page's in .html"),
        ("embed", "x.json", [], ".safetensors or .parquet"),
    ],
)
def test_what_a_name_and_a_flag_promise_must_agree(
    command: str,
    name: str | None,
    flags: list[str],
    says: str,
    stored: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = [] if name is None else ["-o", str(tmp_path / name)]
    status, printed, err = run(capsys, *arguments_of(command, stored), *flags, *out)
    assert (status, printed) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------- inputs


def test_photographs_named_after_the_option_are_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`classify -o *.jpg`, as a shell expands it."""
    photographs = [tmp_path / f"{name}.jpg" for name in "abc"]
    for path in photographs:
        Image.new("L", (8, 8), 99).save(path)
    before = [path.read_bytes() for path in photographs]
    status, _, err = run(capsys, "classify", "--model", PLAIN, "-o", *map(str, photographs))
    assert status == 2
    assert "a.jpg would hold something else than its name says" in err
    assert [path.read_bytes() for path in photographs] == before


@pytest.fixture
def inputs(stored: Path, tmp_path: Path) -> Path:
    """Inputs of every kind, with names that an output may have."""
    image = next((stored / "digits").rglob("*.png")).read_bytes()
    for name in ("photo", "photo.jpg", "photo.safetensors", "set/0/photo.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(image)
    (tmp_path / "link.jpg").symlink_to("photo.jpg")
    (tmp_path / "result.png").write_bytes((stored / "result.json").read_bytes())
    (tmp_path / "classes.txt").write_text("".join(f"{i}\n" for i in range(10)))
    (tmp_path / "truth.txt").write_text("photo.png 0\n")
    tomevit.save(tiny(4), tmp_path / "mine.safetensors")
    (tmp_path / "mine.safetensors").rename(tmp_path / "mine")
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["classify", "photo", "--model", PLAIN, "-o", "photo"],
        ["classify", ".", "--model", "mine", "-o", "mine"],
        ["visualize", "photo.jpg", "--model", PLAIN, "-o", "photo.jpg"],
        ["visualize", "photo.jpg", "--model", PLAIN, "-o", "link.jpg"],
        ["visualize", "link.jpg", "--model", PLAIN, "-o", "./photo.jpg"],
        ["plot", "result.png", "-o", "result.png"],
        ["eval", "--data", "set", "--model", PLAIN, "--classes", "classes.txt", "-o", "classes.txt"],
        ["eval", "--data", "set/0", "--model", PLAIN, "--truth", "truth.txt", "-o", "truth.txt"],
        ["eval", "--data", "set", "--model", PLAIN, "--plot", "set/0/photo.png"],
        ["embed", "photo.safetensors", "--model", PLAIN, "-o", "photo.safetensors"],
        ["bench", "mine", "-o", "mine"],
    ],
    ids=" ".join,
)
def test_no_input_is_overwritten(
    arguments: list[str], inputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    before = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err == f"tomevit: {Path(arguments[-1])} is what would be read: name another file to write\n"
    assert {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()} == before


# --------------------------------------------------------------------------------------------------- pipes and links


@pytest.mark.parametrize("command", KINDS)
def test_a_link_stays_and_its_target_keeps_its_mode(
    command: str, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / f"target{KINDS[command]}", tmp_path / f"link{KINDS[command]}"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    overwrite = ["--overwrite"] if command == "embed" else []
    status, _, err = run(capsys, *arguments_of(command, stored), "-o", str(link), *overwrite)
    assert status == 0, err
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert target.read_bytes() not in (b"", b"old")
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["elsewhere", target.name, link.name])
    if command == "embed":
        assert len(read(link).keys) == 12
    else:
        assert target.read_bytes().startswith(BEGINNINGS[command])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
@pytest.mark.parametrize("command", KINDS)
def test_a_pipe_gets_the_whole_and_stays(
    command: str, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, copy = tmp_path / f"pipe{KINDS[command]}", tmp_path / f"copy{KINDS[command]}"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: copy.write_bytes(pipe.read_bytes()), daemon=True)
    reader.start()
    status, _, err = run(capsys, *arguments_of(command, stored), "-o", str(pipe))
    reader.join(timeout=60)
    assert not reader.is_alive()
    assert status == 0, err
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == [copy.name, pipe.name]
    if command == "embed":
        assert len(read(copy).keys) == 12
    else:
        assert copy.read_bytes().startswith(BEGINNINGS[command])


STREAMED = [name for name in KINDS if name != "embed"]


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="this system has no /dev/stdout")
@pytest.mark.parametrize("command", STREAMED)
def test_standard_output_can_be_named(command: str, stored: Path, capfdbinary: Any, monkeypatch: Any) -> None:
    form = {"eval": ["--json"], "bench": ["--markdown"]}.get(command, [])
    monkeypatch.setattr("click.echo", lambda *_, **__: None)  # what is printed besides
    with pytest.raises(SystemExit) as stop:
        tomevit.cli.main([*arguments_of(command, stored), *form, "-o", "/dev/stdout"])
    out, _ = capfdbinary.readouterr()
    assert not stop.value.code
    assert out.startswith(BEGINNINGS[command])


@pytest.mark.skipif(not Path("/dev/null").is_char_device(), reason="this system has no /dev/null")
@pytest.mark.parametrize("command", STREAMED)
def test_the_null_device_stays_one(command: str, stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, *arguments_of(command, stored), "-o", "/dev/null")
    assert status == 0, err
    assert Path("/dev/null").is_char_device()
    assert not [path for path in Path("/dev").iterdir() if path.name.startswith((".null", "null."))]


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="this system has no /dev/stdout")
def test_parts_of_embeddings_need_a_place_beside_the_file(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *arguments_of("embed", stored), "-o", "/dev/stdout")
    assert (status, out) == (2, "")
    assert "must end in .safetensors or .parquet" in err


def test_restart_needs_a_file_that_keeps_what_is_known(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, *arguments_of("eval", stored), "-o", "/dev/null", "--restart")
    assert status == 2
    assert "--restart is for a run with -o" in err


@pytest.mark.parametrize("command", KINDS)
def test_a_place_that_refuses_is_told_before_the_work(
    command: str, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / f"out{KINDS[command]}"

    def refused(**_: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("tomevit.output.tempfile.TemporaryFile", refused)
    status, printed, err = run(capsys, *arguments_of(command, stored), "-o", str(out))
    assert (status, printed) == (2, "")
    assert err == f"tomevit: {OutputError(13, out)}\n"


# ---------------------------------------------------------------------------------------------------------------- text


def test_names_of_classes_do_not_command_the_terminal(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny(4)
    names = tuple(f"\x1b]0;{i}\x07 class" for i in range(model.config.num_classes))
    model.card = tomevit.Card(**vars(model.card) | {"class_names": names})
    tomevit.save(model, tmp_path / "tiny.safetensors")
    images = [str(path) for path in sorted((stored / "digits").rglob("*.png"))]
    for count in (1, 11):  # in blocks, and on one line each
        status, out, _ = run(capsys, "classify", *images[:count], "--model", str(tmp_path / "tiny.safetensors"))
        assert status == 0
        assert r"\x1b]0;" in out
        assert not {"\x1b", "\x07"} & {*out}
