"""embed, eval, classify and plot: what lies in their way, what they left behind, and each other."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import tomevit
from tests.faults.special import SPECIAL, each_special
from tests.outcomes import survives
from tests.tasks.test_cli import run
from tests.tools.test_shards import digit, write_shard
from tomevit.models import VisionTransformer
from tomevit.tasks import embed as module
from tomevit.tasks import embedding_files
from tomevit.tasks.embed import embed
from tomevit.tasks.embedding_files import read
from tomevit.tasks.evaluate import evaluate

DIGITS = "digits_p1.tome_r16"
CHANGED = survives(
    "images",
    "an image or a shard replaced by another of the same size while embed is stopped",
    "the next run names it, and what to do; a copy with another time is the same",
)
TWO_RUNS = survives(
    "machine",
    "two runs of embed to one output at a time",
    "the second says that it waits, and then finds the work done",
)
NO_LOCKS = survives("machine", "embed on a file system without locks", "goes on, and says that no other run must do so")
LEFT_BEHIND = survives(
    "machine",
    "a plan, part, state or report that is damaged, of another kind, or no file",
    "is made again, or named in one sentence; never waited for",
)
NAMES = survives(
    "text from files",
    "line feeds, quotes, commas and bytes that are no UTF-8 in names, in CSV",
    "whoever reads the CSV gets the names as they are on disk",
)
MANY = survives("images", "20,000 images for classify", "take no more memory than 2,000")
ALL_BROKEN = survives(
    "images", "a folder of which no image can be read", "ends in a sentence, with a line for each, in every command"
)


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    return tomevit.create(DIGITS, pretrained=True)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    found = [tmp_path / "in" / f"{i}.png" for i in range(6)]
    found[0].parent.mkdir()
    for i, path in enumerate(found):
        path.write_bytes(digit(i))
    return found


def stop_at(count: int) -> Callable[[str, int, int | None], None]:
    def progress(stage: str, done: int, total: int | None) -> None:
        if done >= count:
            raise KeyboardInterrupt

    return progress


def begin(model: VisionTransformer, sources: list[Path], out: Path, **more: Any) -> Path:
    """A run that is stopped in its middle; the directory of its parts."""
    with pytest.raises(KeyboardInterrupt):
        embed(model, sources, out, batch=2, progress=stop_at(4), **more)
    return out.with_name(f"{out.name}.parts")


# ------------------------------------------------------------------------------------------------------ other contents


def altered(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@CHANGED
@pytest.mark.parametrize("size", [0, 200_000])
@pytest.mark.parametrize("at", [0, -1])
def test_another_image_of_the_same_size_is_noticed(
    size: int, at: int, model: VisionTransformer, files: list[Path], tmp_path: Path
) -> None:
    files[1].write_bytes(digit(1) + bytes(size))
    out = tmp_path / "a.safetensors"
    begin(model, files, out)
    os.utime(files[0], (1, 1))
    os.utime(files[1], (1, 1))
    before = files[1].read_bytes()
    altered(files[1], at)
    says = f"was begun with data 6 files, .*the first file that is not as it was is {files[1]}: give the same again, "
    with pytest.raises(ValueError, match=says):
        embed(model, files, out, batch=2)
    files[1].write_bytes(before)
    done = []
    embed(model, files, out, batch=2, progress=lambda stage, count, total: done.append(count))
    assert done[0] == 4
    altered(files[1], at)
    with pytest.raises(ValueError, match=r"was made with data 6 files, .*overwrite"):
        embed(model, files, out, batch=2)


@CHANGED
def test_another_shard_of_the_same_size_is_noticed(model: VisionTransformer, tmp_path: Path) -> None:
    shards = [write_shard(tmp_path / f"{i}.tar", [(f"{j}.png", digit(j)) for j in range(8)]) for i in range(3)]
    begin(model, shards, tmp_path / "a.safetensors")
    write_shard(shards[1], [(f"{j}.png", digit(j if j != 5 else 4)) for j in range(8)])
    with pytest.raises(ValueError, match=f"was begun with data 3 shards, .* is {shards[1]}: give"):
        embed(model, shards, tmp_path / "a.safetensors", batch=2)


@CHANGED
def test_without_what_it_was_begun_with_a_change_is_noticed_still(
    model: VisionTransformer, files: list[Path], tmp_path: Path
) -> None:
    parts = begin(model, files, tmp_path / "a.safetensors")
    (parts / module.DIGESTS).unlink()
    with pytest.raises(ValueError, match=r"was begun with data 6 files, sha256 \w+, not 5 files, sha256 \w+: give"):
        embed(model, files[:5], tmp_path / "a.safetensors", batch=2)


# ------------------------------------------------------------------------------------------------------------- two runs


def command(files: list[Path], out: Path, *more: str) -> list[str]:
    arguments = ["embed", str(files[0].parent), "-o", str(out), "--model", DIGITS, "--batch", "2", "--workers", "0"]
    return [sys.executable, "-m", "tomevit", *arguments, *more]


@TWO_RUNS
@pytest.mark.parametrize("r", [16, 8])
def test_the_second_run_waits_and_finds_the_work_done(
    r: int,
    model: VisionTransformer,
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first stops in its middle until the other one waits, which then is told if its settings are others."""
    monkeypatch.setattr("tomevit.locks.PATIENCE", 0.1)
    out = tmp_path / "a.safetensors"
    seen, go_on = threading.Event(), threading.Event()

    def stop(stage: str, done: int, total: int | None) -> None:
        if done == 4:
            seen.set()
            assert go_on.wait(60)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(embed, model, files, out, batch=2, progress=stop)
        assert seen.wait(60)
        second = pool.submit(embed, model, files, out, batch=2, r=r)
        while not caplog.messages and not second.done():
            time.sleep(0.01)
        go_on.set()
        assert first.result(60).rows == 6
        if r == 16:
            assert second.result(60) == first.result()
        else:
            with pytest.raises(ValueError, match="was made with r 16, not 8: give the same again"):
                second.result(60)
    assert caplog.messages == [
        f"waiting for another process, which is writing to {out}.parts (it holds {out}.parts/.lock)"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "in"]


@TWO_RUNS
@pytest.mark.soak
@pytest.mark.parametrize("suffix", embedding_files.SUFFIXES)
def test_many_runs_at_once_write_one_file(suffix: str, files: list[Path], tmp_path: Path) -> None:
    for turn in range(10):
        out = tmp_path / f"{turn}{suffix}"
        runs = [
            subprocess.Popen(command(files, out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for _ in range(4)
        ]
        said = [each.communicate()[0] for each in runs]
        assert [each.returncode for each in runs] == [0] * 4, said
        assert list(tmp_path.glob("*.parts")) == []
        assert len(read(out).keys) == 6


@NO_LOCKS
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_it_goes_on(
    number: int,
    model: VisionTransformer,
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert embed(model, files, tmp_path / "a.safetensors").rows == 6
    parts = tmp_path / "a.safetensors.parts"
    assert caplog.messages == [
        f"{parts}/.lock cannot be locked where it lies: no other process must be writing to {parts} now"
    ]


# --------------------------------------------------------------------------------------------------------- left behind

PLANS: dict[str, bytes] = {
    "empty": b"",
    "zeros": bytes(300),
    "half": b'{"settings": {"model": ',
    "other JSON": b'["settings", "size"]',
    "wrong types": b'{"settings": [], "size": "2"}',
    "no size": b'{"settings": {}, "size": 0}',
    "deep": b"[" * 10**5,
    "another encoding": "{ü}".encode("utf-16"),
}


@LEFT_BEHIND
@pytest.mark.parametrize("kind", PLANS)
def test_a_damaged_plan_is_one_sentence(kind: str, model: VisionTransformer, files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    parts = begin(model, files, out)
    (parts / module.PLAN).write_bytes(PLANS[kind])
    for overwrite in (False, True):  # it may be another's
        with pytest.raises(
            ValueError, match=r"run\.json is damaged, or no plan of embeddings: remove .* to begin anew$"
        ):
            embed(model, files, out, batch=2, overwrite=overwrite)
    assert len(list(parts.glob("*.safetensors"))) == 2


@LEFT_BEHIND
@each_special
@pytest.mark.parametrize("name", [module.PLAN, "00000000-00000001.safetensors"])
def test_what_is_no_file_among_the_parts_is_never_waited_for(
    special: str, name: str, model: VisionTransformer, files: list[Path], tmp_path: Path
) -> None:
    parts = begin(model, files, tmp_path / "a.safetensors")
    (parts / name).unlink(missing_ok=True)
    SPECIAL[special](parts / name)
    with pytest.raises(OSError, match=f"{name} is {special}, not a regular file"):
        embed(model, files, tmp_path / "a.safetensors", batch=2)


def zeroed(content: bytes) -> bytes:
    return bytes(len(content))


def zeroed_after_its_header(content: bytes) -> bytes:
    length = 8 + int.from_bytes(content[:8], "little")
    return content[:length] + bytes(len(content) - length)


def other_count(content: bytes) -> bytes:
    return content.replace(rb"\"rows\": 2", rb"\"rows\": 3")


def wrong_types(content: bytes) -> bytes:
    return content.replace(rb"\"unreadable\": []", rb"\"unreadable\": 17")


@LEFT_BEHIND
@pytest.mark.parametrize("damage", [zeroed, zeroed_after_its_header, other_count, wrong_types, lambda _: b""])
def test_a_damaged_part_is_made_again(
    damage: Callable[[bytes], bytes], model: VisionTransformer, files: list[Path], tmp_path: Path
) -> None:
    embed(model, files, tmp_path / "whole.safetensors", batch=2)
    parts = begin(model, files, tmp_path / "a.safetensors")
    part = parts / "00000000-00000000.safetensors"
    before = part.read_bytes()
    part.write_bytes(damage(before))
    assert part.read_bytes() != before
    embed(model, files, tmp_path / "a.safetensors", batch=2)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@LEFT_BEHIND
@pytest.mark.parametrize("info", ["{", "[]", '{"version": []}', '{"version": 1}', "[" * 10**5])
def test_a_damaged_output_is_one_sentence(
    info: str, model: VisionTransformer, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "a.safetensors"
    save_file({"keys": torch.zeros(3)}, out, {"tomevit_embeddings": info})
    for call in (lambda: embed(model, files, out), lambda: read(out)):
        with pytest.raises(ValueError, match="holds no embeddings of tomevit's, or is damaged"):
            call()


def state_of(model: VisionTransformer, files: list[Path], state: Path) -> None:
    """The state of an evaluation that was stopped."""
    evaluate(model, list(map(str, files)), [0] * len(files), batch=2, state=state, progress=lambda step: None)


@LEFT_BEHIND
@pytest.mark.parametrize("kind", ["empty", "zeros", "other tensors", "another kind", "no reason", "list", "deep"])
def test_a_damaged_state_is_one_sentence(
    kind: str, model: VisionTransformer, files: list[Path], tmp_path: Path
) -> None:
    files[2].write_bytes(b"no image")
    state = tmp_path / "state"
    state_of(model, files, state)
    with safe_open(state, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    if kind in ("empty", "zeros"):
        state.write_bytes(bytes(2000 * (kind == "zeros")))
    else:
        if kind == "other tensors":
            del tensors["among5"]
        elif kind == "another kind":
            tensors["answers"] = tensors["answers"].float()
        elif kind == "no reason":
            metadata["unreadable"] = "{}"
        elif kind == "list":
            metadata["evaluation"] = "[1, 2]"
        elif kind == "deep":
            metadata["evaluation"] = "[" * 10**5
        save_file(tensors, state, metadata)
    with pytest.raises(ValueError, match=r"damaged: remove it to begin anew"):
        state_of(model, files, state)


@LEFT_BEHIND
@each_special
def test_a_state_that_is_no_file_is_never_waited_for(
    special: str, model: VisionTransformer, files: list[Path], tmp_path: Path
) -> None:
    SPECIAL[special](tmp_path / "state")
    with pytest.raises(OSError, match=f"state is {special}, not a regular file"):
        state_of(model, files, tmp_path / "state")


REPORT = {
    "command": "eval",
    "model": "m",
    "img_size": [8, 8],
    "evaluated": 3,
    "rows": [{"r": 0, "images_per_second": 3.0, "gflops": 1.0, "top1": {"value": 50, "lower": 40, "upper": 60}}],
}


@LEFT_BEHIND
@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(100),
        b"[" * 10**5,
        b"[]",
        b'{"comparisons": 5}',
        b'{"comparisons": [{}], "model": "m"}',
        json.dumps(REPORT | {"rows": 3}).encode(),
        json.dumps(REPORT | {"model": None}).encode(),
        json.dumps(REPORT).replace("3.0", "1" * 400).encode(),
        json.dumps({key: value for key, value in REPORT.items() if key != "rows"}).encode(),
        "latin-ü".encode("latin-1"),
    ],
)
def test_a_damaged_report_is_one_line(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_bytes(content)
    status, out, err = run(capsys, "plot", str(tmp_path / "a.json"), "-o", str(tmp_path / "a.png"))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.match(r"tomevit: .*a\.json is (no result of|damaged, or of another)", err)
    assert not (tmp_path / "a.png").exists()


@LEFT_BEHIND
@each_special
def test_a_report_that_is_no_file_is_never_waited_for(
    special: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SPECIAL[special](tmp_path / "a.json")
    status, _, err = run(capsys, "plot", str(tmp_path / "a.json"), "-o", str(tmp_path / "a.png"))
    assert (status, err) == (2, f"tomevit: {tmp_path}/a.json is {special}, not a regular file\n")


@LEFT_BEHIND
@each_special
@pytest.mark.parametrize("option", ["--truth", "--classes"])
def test_a_list_for_eval_that_is_no_file_is_never_waited_for(
    special: str, option: str, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SPECIAL[special](tmp_path / "list")
    arguments = ["eval", "--data", str(files[0].parent), "--model", DIGITS, option, str(tmp_path / "list")]
    status, _, err = run(capsys, *arguments)
    assert (status, err) == (2, f"tomevit: {tmp_path}/list is {special}, not a regular file\n")


# ------------------------------------------------------------------------------------------------------------- classify

ODD = [
    b"a\nb.png",
    b"a\rb.png",
    b'a"b.png',
    b"a,b;c.png",
    b"\xff\xfe.png",
    "ü \u2028.png".encode(),
    b" .png",
    b"'=1.png",
]


@NAMES
def test_names_in_csv_are_those_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for name in ODD:
        try:
            (tmp_path / "in" / os.fsdecode(name)).write_bytes(digit(0))
        except OSError:
            pytest.skip("this file system takes UTF-8 only")
    out = tmp_path / "a.csv"
    arguments = ["classify", str(tmp_path / "in"), "--model", DIGITS, "--csv", "--top", "1"]
    assert run(capsys, *arguments, "-o", str(out))[0] == 0
    printed = subprocess.run(
        [sys.executable, "-m", "tomevit", *arguments],
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    for content in (out.read_bytes(), printed):
        text = content.decode("utf-8", "surrogateescape")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        assert sorted(os.fsencode(Path(row["image"]).name) for row in rows) == sorted(ODD)
        assert {row["rank"] for row in rows} == {"1"}


MEMORY = """
import resource, sys
from tomevit.cli import main
try:
    main(sys.argv[1:])
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)
"""


@MANY
@pytest.mark.soak
@pytest.mark.parametrize("form", [[], ["--csv"], ["-o", "out.csv"]], ids=str)
def test_memory_does_not_grow_with_the_answers(form: list[str], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    peaks, lines = [], []
    for count in (2000, 20_000):
        for i in range(count):
            (tmp_path / "in" / f"{i:05}.png").write_bytes(digit(i % 10))
        arguments = ["classify", "in", "--model", DIGITS, "--top", "10", "--batch", "64", *form]
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stderr.split()[-1]))
        lines.append(((tmp_path / "out.csv").read_text() if "-o" in form else done.stdout).count("\n"))
    assert lines[1] - lines[0] == 18_000 * (10 if form else 1)
    assert peaks[1] - peaks[0] < 20, peaks  # names and places of 18,000 files are 3 MB


@ALL_BROKEN
def test_a_folder_of_broken_images_ends_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        (tmp_path / "in" / str(i)).mkdir(parents=True)
        (tmp_path / "in" / str(i) / "a.png").write_bytes(b"no image")
    folder, model = str(tmp_path / "in"), ["--model", DIGITS]
    status, out, err = run(capsys, "embed", folder, "-o", str(tmp_path / "a.safetensors"), *model, "--workers", "0")
    assert (status, err.count("left out: ")) == (2, 3)
    assert err.endswith("tomevit: none of 3 images can be read\n")
    assert out.endswith("a.safetensors: 0 vectors of 64 float32 numbers\n")
    status, _, err = run(capsys, "classify", folder, *model)
    assert (status, err.splitlines()[-1]) == (2, "tomevit: none of 3 images can be read")
    assert err.count("\n") == 4
    status, _, err = run(capsys, "eval", "--data", folder, *model, "--workers", "0")
    assert status == 2
    assert re.fullmatch(r"tomevit: none of the 3 images can be read, as .*\n", err)


@ALL_BROKEN
def test_an_image_that_comes_twice_counts_twice(
    files: list[Path], tmp_path: Path, model: VisionTransformer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed(model, [files[0], files[0]], tmp_path / "a.safetensors").rows == 2
    _, out, _ = run(capsys, "classify", str(files[0]), str(files[0]), "--model", DIGITS, "--csv", "--top", "1")
    assert out.count(str(files[0])) == 2


@pytest.fixture(autouse=True)
def _leave_no_warning(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level("WARNING", logger="tomevit"):
        yield
