"""Machines that lack what commands could take for granted: a home, a place to write, an encoding, an open stream."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

import click
import pytest
import torch
from PIL import Image

import tomevit
from tests.faults.terminal import run_at_terminal
from tests.helpers import PLAIN
from tests.outcomes import survives
from tests.tasks.test_cli import run
from tomevit import cli
from tomevit.cli.console import STAND_INS, Console, echo, open_console
from tomevit.data import images
from tomevit.data.distributed import join_process_group, on_this_machine
from tomevit.data.workers import load_batches
from tomevit.deploy.programs.trace import quiet
from tomevit.errors import DownloadError, OutputError
from tomevit.tasks.demo import held_out
from tomevit.transform import transform
from tomevit.weights import cache

ENCODING = survives(
    "machine",
    "a console or a pipe of another encoding: ASCII, Latin 1, code pages 437, 932 and 1252, UTF-16",
    "what it has not is shown otherwise, -> for an arrow; the command does its work, with its usual status",
)
CLOSED = survives(
    "machine",
    "standard output full, closed or left by its reader; input and error closed",
    "results in files are written all the same; what cannot be printed is one sentence, or nothing if nobody reads",
)
HOMELESS = survives(
    "machine",
    "a user of any number, without home, name or environment, as in a container",
    "commands work; where a directory is needed, a sentence names the variable that says which",
)
NOWHERE = survives(
    "machine",
    "no temporary directory, nothing to write to, no shared memory or little of it",
    "images are read all the same, in one process or by way of a pipe; else a sentence says what cannot be written",
)
NUMBERS = survives(
    "machine",
    "numbers of threads, processes, images and pixels that no machine has",
    "are refused in a line with the range that there is",
)
VARIABLES = survives(
    "machine",
    "variables that are empty, nonsense or another program's: RANK, COLUMNS, TERM, NO_COLOR, OMP_NUM_THREADS",
    "change nothing, or are named in a sentence",
)
MEMORY = survives("machine", "no memory, threads or files left", "one sentence, and no traceback")
GLOBAL = survives(
    "machine",
    "commands and functions called within another program, from several threads",
    "its streams, filters of warnings and settings are as before",
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images in folders of their classes."""
    folder = tmp_path_factory.mktemp("digits")
    for image, label in zip(*held_out(), strict=True):
        place = folder / str(label.item())
        if not place.exists():
            place.mkdir()
            Image.fromarray(image[0].numpy()).save(place / "a.png")
    return folder


def child(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """`tomevit ARGUMENTS` in a process of its own."""
    return subprocess.run([sys.executable, "-m", "tomevit", *arguments], check=False, **options)


def leave(full: TextIO) -> None:
    """Close a file on a full disk, to which something is still to be written."""
    with suppress(OSError):
        full.close()


# ------------------------------------------------------------------------------------------------------------ encodings


@ENCODING
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "cp932", "cp1252", "cp037", "utf-16", "utf-8"])
def test_every_text_can_be_printed_in_every_encoding(tmp_path: Path, encoding: str) -> None:
    text = "".join(STAND_INS) + "\N{PILE OF POO}é\udce9"
    with pytest.MonkeyPatch.context() as patch, (tmp_path / "out").open("w", encoding=encoding) as file:
        patch.setattr(sys, "stdout", file)
        with open_console():
            echo(text)
            click.echo(text, color=True)
        assert file.errors == "strict"
    printed = (tmp_path / "out").read_bytes()
    if encoding == "ascii":
        assert printed == 2 * b"->x...--2sqrt \\U0001f4a9\\xe9\xe9\n"
    elif encoding == "utf-8":
        assert printed == 2 * (text + "\n").encode("utf-8", "surrogateescape")
    else:
        assert printed.decode(encoding, "replace").count("\n") == 2


@ENCODING
@pytest.mark.parametrize("command", ["list", "eval", "classify"])
def test_commands_end_well_in_ascii(digits: Path, tmp_path: Path, command: str, capsys: Any) -> None:
    arguments = {
        "list": ["list", "digits*", "--weights"],
        "eval": ["eval", "--data", str(digits), "--model", PLAIN, "--workers", "0", "--r", "0", "16"],
        "classify": ["classify", str(digits), "--model", PLAIN, "--r", "28", "--compare", "--top", "1"],
    }[command]
    with pytest.MonkeyPatch.context() as patch, (tmp_path / "out").open("w", encoding="ascii") as file:
        patch.setattr(sys, "stdout", file)
        status, _, err = run(capsys, *arguments)
    assert (status, err) == (0, "")
    assert (tmp_path / "out").read_bytes().isascii()


def test_help_is_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in cli.VERBS:
        assert run(capsys, verb, "--help")[1].isascii(), verb


@VARIABLES
@pytest.mark.parametrize("columns", [1, 2, 0, 65535])
def test_a_terminal_may_have_any_width(digits: Path, columns: int) -> None:
    for name, value in (("COLUMNS", "nonsense"), ("COLUMNS", "0"), ("TERM", "dumb"), ("FORCE_COLOR", "1")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, value)
            assert run_at_terminal("--help", columns=columns)[0] == 0
    assert run_at_terminal("classify", str(digits), "--model", PLAIN, columns=columns)[0] == 0


# -------------------------------------------------------------------------------------------------------------- streams


@CLOSED
def test_a_full_disk_behind_standard_output_is_told(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = f"tomevit: {OutputError(errno.ENOSPC, 'standard output')}"
    for arguments in (["list"], ["--help"]):
        with Path("/dev/full").open("w", encoding="utf-8") as full:
            done = child(*arguments, stdout=full, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr.decode()) == (2, sentence + "\n")
    evaluate = ["eval", "--data", str(digits), "--model", PLAIN, "--workers", "0", "-o", str(tmp_path / "a.json")]
    full = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", full)
    status, _, err = run(capsys, *evaluate)
    leave(full)
    assert (status, err.splitlines()[-1]) == (2, sentence)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["rows"]


@CLOSED
def test_nothing_is_said_where_nobody_reads() -> None:
    read, write = os.pipe()
    os.close(read)
    done = child("list", stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@CLOSED
def test_what_is_closed_is_not_missed(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    code = f"""
import os, sys
for number in (0, 1, 2):
    os.close(number)
os.execv(sys.executable, [sys.executable, "-m", "tomevit", "embed", {str(digits)!r}, "--model", {PLAIN!r},
    "-o", {str(out)!r}, "--workers", "2"])
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert out.stat().st_size > 1000


@CLOSED
def test_a_warning_that_cannot_be_written_ends_nothing(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.txt"
    full = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", full)
    with pytest.raises(SystemExit) as stop:
        cli.main(["classify", str(digits), "--model", PLAIN, "-o", str(out)])
    leave(full)
    assert not stop.value.code
    assert out.exists()


@CLOSED
def test_a_question_is_asked_of_nobody(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert run(capsys, "convert", "nothing.pth")[0] == 2
    assert run(capsys, "classify", "-")[2].startswith("tomevit: standard input is empty")


# ----------------------------------------------------------------------------------------------------- users and places


HOMELESS_USER = """
import os, pwd
from tomevit import cli

def run(arguments):
    try:
        cli.main(arguments)
    except SystemExit as stop:
        return stop.code or 0

commands = {commands}
os.umask(0)
for arguments in commands[:-1]:  # what they import may lie where nobody else may look
    run(arguments)
os.environ.clear()
pwd.getpwuid = {{}}.__getitem__
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(12345)
    os.setuid(12345)
print("statuses", *map(run, commands))
"""


@HOMELESS
def test_a_user_whom_nobody_knows_can_work_or_is_told_which_variable_helps() -> None:
    commands = [
        ["classify", "a.png", "--model", PLAIN, "-o", "a.txt"],
        ["embed", "a.png", "--model", PLAIN, "-o", "a.safetensors", "--workers", "1"],
        ["visualize", "a.png", "--model", PLAIN, "--r", "8", "-o", "a.html"],
        ["classify", "a.png", "--model", "deit_ti16"],
    ]
    code = HOMELESS_USER.format(commands=commands)
    with TemporaryDirectory() as place:  # nobody else may look into tmp_path
        Path(place).chmod(0o777)
        Image.fromarray(held_out()[0][0, 0].numpy()).save(Path(place) / "a.png")
        done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, check=False, text=True)
    assert done.stdout.endswith("statuses 0 0 0 2\n"), done.stderr
    assert done.stderr.endswith(": set TOMEVIT_HOME to a directory that you can write to\n")
    assert "Traceback" not in done.stderr


@HOMELESS
@pytest.mark.parametrize("value", ["", "~/a", "~nobody-of-this-name/a"])
def test_a_home_that_cannot_be_found_is_told(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    def unknown(_: Path) -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    monkeypatch.setenv("TOMEVIT_HOME", value)
    with pytest.raises(DownloadError, match="set TOMEVIT_HOME"):
        cache.home()


@NOWHERE
def test_images_are_read_without_semaphores(
    digits: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused() -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(multiprocessing, "Semaphore", refused)
    model = tomevit.create(PLAIN, pretrained=True)
    files = sorted(map(str, digits.rglob("*.png")))
    found = list(images.stream(files, transform(model), workers=2, batch=4))
    assert sum(len(batch.images) for batch in found) == len(files)
    assert "/dev/shm" in caplog.text


@MEMORY
@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "Too many open files"), RuntimeError("can't start new thread")]
)
def test_processes_that_cannot_be_started_are_told(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refused(_: Any) -> None:
        raise error

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", refused)
    with pytest.raises(OSError, match=r"2 processes to read images cannot be started .*: ask for fewer"):
        list(load_batches(torch.utils.data.TensorDataset(), 2))


@NOWHERE
def test_images_are_read_without_shared_memory(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    model = tomevit.create(PLAIN, pretrained=True)
    files = sorted(map(str, digits.rglob("*.png")))
    found = list(images.stream(files, transform(model), workers=2, batch=4))
    here = list(images.stream(files, transform(model), batch=4))
    assert len(found) == len(here) == 3
    for ours, theirs in zip(found, here, strict=True):
        assert ours.images.equal(theirs.images)
        assert ours.places.equal(theirs.places)


# --------------------------------------------------------------------------------------------------- numbers, variables


@NUMBERS
@pytest.mark.parametrize("number", ["-1", "100000", "1" + "0" * 30, "1" * 5000, "0x10", "nan"])
@pytest.mark.parametrize(
    "command",
    [
        ("eval", "--data", ".", "--model", PLAIN, "--threads"),
        ("eval", "--data", ".", "--model", PLAIN, "--workers"),
        ("bench", "--threads"),
        ("bench", "--batch"),
        ("embed", ".", "-o", "a.safetensors", "--workers"),
        ("embed", ".", "-o", "a.safetensors", "--batch"),
        ("classify", ".", "--batch"),
        ("classify", ".", "--workers"),
        ("classify", ".", "--img-size"),
        ("export", PLAIN, "--format", "onnx", "-o", "a.onnx", "--batch"),
    ],
)
def test_numbers_have_bounds(capsys: pytest.CaptureFixture[str], command: tuple[str, ...], number: str) -> None:
    status, out, err = run(capsys, *command, number)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith(f"tomevit: Invalid value for '{command[-1]}'")


@NUMBERS
def test_a_long_number_is_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "info", "vit_b16", "--r", "8", "1" * 300)
    assert status == 2
    assert "File name too long" not in err


@VARIABLES
@pytest.mark.parametrize(("rank", "world"), [("nonsense", "4"), ("-1", "4"), ("3", ""), ("3", "1"), ("", "1e3")])
def test_another_programs_rank_is_not_ours(monkeypatch: pytest.MonkeyPatch, rank: str, world: str) -> None:
    for name, value in {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "RANK": "0", "WORLD_SIZE": "nonsense"}.items():
        monkeypatch.setenv(name, value)
    with join_process_group():
        assert on_this_machine() == (0, 1)


@VARIABLES
@pytest.mark.parametrize("value", [None, "nonsense", "-1", "1e3", ""])
@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT"])
def test_what_torchrun_sets_is_checked(monkeypatch: pytest.MonkeyPatch, name: str, value: str | None) -> None:
    for variable in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(variable, "1")
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^{name} is .*, where torchrun sets a number"), join_process_group():
        pass


# ---------------------------------------------------------------------------------------------- memory and global state


@MEMORY
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried …"),
        RuntimeError("Storage size calculation overflowed with sizes=[1, 2]"),
        RuntimeError("can't start new thread"),
        FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/var/tmp']"),
    ],
)
def test_what_runs_out_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("tomevit.zoo.list_models", fail)
    status, _, err = run(capsys, "list")
    assert status == 2
    assert len(err.splitlines()) == 1
    assert re.match("tomevit: there is not enough memory|tomevit: no more threads can be started|.*set TMPDIR", err)


@MEMORY
def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr("tomevit.zoo.list_models", fail)
    with pytest.raises(RuntimeError, match="a mistake"):
        cli.main(["list"])


@GLOBAL
def test_streams_are_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdin, sys.stdout, sys.stderr, sys.stdout.errors, signal.getsignal(signal.SIGINT), dict(os.environ)
    for arguments in (["list"], ["info", "nothing"], ["--traceback", "info", "nothing"]):
        with pytest.raises((SystemExit, ValueError)):
            cli.main(arguments)
        assert before == (
            *(sys.stdin, sys.stdout, sys.stderr, sys.stdout.errors),
            *(signal.getsignal(signal.SIGINT), dict(os.environ)),
        )
    assert not isinstance(sys.stdout, Console)


@GLOBAL
def test_threads_leave_the_filters_of_warnings(tmp_path: Path, digits: Path) -> None:
    model = tomevit.create(PLAIN, pretrained=True)
    before = list(warnings.filters)

    def work(number: int) -> None:
        tomevit.save(model, tmp_path / f"{number}.safetensors")
        tomevit.optimize(tomevit.load(tmp_path / f"{number}.safetensors"), compiled=False, packed=False)
        for _ in images.stream([str(path) for path in digits.rglob("*.png")], transform(model)):
            pass

    def trace(_: int) -> None:
        with quiet():
            time.sleep(0.002)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
        list(pool.map(trace, range(32)))
    assert warnings.filters == before
