"""`tomevit tune`: what it prints, writes and refuses, with times made up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tomevit
from tests.helpers import PLAIN, tiny
from tests.tasks.test_cli import run
from tests.tasks.test_tune import clock
from tomevit.cli.tune import Latency
from tomevit.tasks.demo import held_out
from tomevit.tasks.tune import Front, answers, costs

QUICKLY = ("--matchings", "bipartite", "--rounds", "6", "--batch", "2", "--workers", "0")
Tuned = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 of the held-out digits, in folders by class."""
    folder = tmp_path_factory.mktemp("digits")
    for i, (image, label) in enumerate(zip(*held_out(), strict=True)):
        if i < 100:
            place = folder / str(int(label))
            place.mkdir(exist_ok=True)
            Image.fromarray(image[0].numpy()).save(place / f"{i:03}.png")
    return folder


@pytest.fixture
def tuned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, digits: Path) -> Tuned:
    """Runs the command on the digits, with the times of a formula."""
    monkeypatch.setattr(costs, "time_rounds", clock(tomevit.create(PLAIN, pretrained=True)))
    return lambda *options, folder=digits: run(capsys, "tune", str(folder), "--model", PLAIN, *QUICKLY, *options)


def rows_of(out: str) -> list[str]:
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("r "))
    return lines[first : lines.index("", first)]


def test_a_table_of_the_front_and_a_file_for_every_command(
    tuned: Tuned, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out_file, picture, kept = tmp_path / "tuned.safetensors", tmp_path / "front.png", tmp_path / "front.json"
    wanted = ("-o", str(out_file), "--plot", str(picture), "--front", str(kept), "--speed-up", "1.2")
    status, out, err = tuned(*wanted, "--dtype", "bfloat16")
    assert status == 0
    assert err.splitlines() == [f"written to {picture}", f"written to {out_file}"]
    front = Front.load(kept)
    chosen = front.at(speed_up=1.2)
    head, *rows = rows_of(out)
    assert head.split() == ["r", "speed-up", "ms", "agree", "%", "KL", "top-1", "%"]
    assert all(len(row) <= 80 for row in (head, *rows))
    assert len(rows) == len(front.points)
    (marked,) = (i for i, row in enumerate(rows) if " * " in row)
    assert front.points[marked] == chosen
    assert f"{chosen.speed_up:.2f} (" in rows[marked]
    assert f"{chosen.agreement:.1f}" in rows[marked]
    assert front.note in out
    for says in (
        f"{PLAIN}, 8x8, 6 rounds",
        "torch",
        "bfloat16, batch 2, eager",
        "50 images searched on, figures of 50",
    ):
        assert says in out
    for name in re.findall(r"^(?:found|shape|constant) \d+", "\n".join(rows), re.MULTILINE):
        assert f"\n{name}: r = " in out
    assert picture.read_bytes().startswith(b"\x89PNG")

    model = tomevit.load(out_file)
    assert model.r == chosen.r
    assert model.dtype == torch.bfloat16
    assert run(capsys, "verify", str(out_file))[0] == 0
    _, said, _ = run(capsys, "info", str(out_file), "--json")
    assert json.loads(said)["r"] == front.to_json()["points"][marked]["r"]


def test_json_is_the_front_and_what_was_chosen(tuned: Tuned) -> None:
    status, out, _ = tuned("--json", "--max-drop", "5")
    assert status == 0
    found = json.loads(out)
    front = Front.from_json(found)
    assert found["chosen"] == found["points"][front.points.index(front.at(max_drop=5))]
    assert front.points[0].top1 is not None
    assert (front.setting["batch"], front.setting["matchings"]) == (2, ["bipartite"])


def test_a_latency_has_its_unit(tuned: Tuned) -> None:
    assert [Latency().convert(time, None, None) for time in ("20ms", "0.02s", ".02 s", "2.5 ms")] == pytest.approx(
        [0.02, 0.02, 0.02, 0.0025]
    )
    status, out, _ = tuned("--json", "--latency", "200ms")
    assert status == 0
    assert 0.1 < json.loads(out)["chosen"]["seconds"] <= 0.2


def test_a_single_image_is_too_few_in_one_line(tuned: Tuned, digits: Path) -> None:
    status, out, err = tuned(folder=next(digits.rglob("*.png")))
    assert (status, out) == (2, "")
    assert re.fullmatch(r"tomevit: \S+ has 1 image, too few to tell schedules apart: 32 at least\n", err)


def test_without_a_promise_there_is_the_front_alone(tuned: Tuned, digits: Path, tmp_path: Path) -> None:
    for i, path in enumerate(sorted(digits.rglob("*.png"))):
        (tmp_path / f"{i}.png").write_bytes(path.read_bytes())
    (tmp_path / "0.png").write_bytes(b"no image")
    status, out, err = tuned("--seed", "1", folder=tmp_path)
    assert status == 0
    assert "top-1" not in rows_of(out)[0]
    assert "*" not in "".join(rows_of(out))
    assert "accuracy is not measured, but agreement with r = 0" in err
    assert err.count("left out: ") == 1
    assert f"left out: {tmp_path / '0.png'}: " in err
    assert "49 images searched on, figures of 50 others" in out


def test_what_cannot_be_had_is_said_beside_the_front(tuned: Tuned, tmp_path: Path) -> None:
    out_file = tmp_path / "tuned.safetensors"
    status, out, err = tuned("--speed-up", "50", "-o", str(out_file))
    assert status == 2
    assert len(rows_of(out)) > 2
    assert err.startswith("tomevit: no schedule is 50 times as fast as r = 0 on ")
    assert "the most is " in err
    assert not out_file.exists()
    status, out, err = tuned("--latency", "1ms", "--json")
    assert (status, json.loads(out)["chosen"]) == (2, None)
    assert "the fastest takes " in err


@pytest.mark.parametrize("keeps", [True, False])
def test_an_interrupted_search_goes_on_from_its_file(
    tuned: Tuned, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keeps: bool
) -> None:
    tried: list[Any] = []
    compare = answers.Faithfulness._compare

    def interrupt(self: answers.Faithfulness, r: Any) -> Any:
        if len(tried) == 12:
            raise KeyboardInterrupt
        tried.append(r)
        return compare(self, r)

    kept = ("--front", str(tmp_path / "front.json")) if keeps else ()
    monkeypatch.setattr(answers.Faithfulness, "_compare", interrupt)
    status, out, err = tuned(*kept)
    assert (status, out) == (130, "")
    assert ("the same command goes on from there" if keeps else "with --front the next run would go on") in err
    monkeypatch.setattr(answers.Faithfulness, "_compare", compare)
    if keeps:
        before = len(tried)
        assert tuned(*kept)[0] == 0
        assert len(tried) == before == 12
        monkeypatch.setattr(answers.Faithfulness, "_compare", interrupt)  # which would end it: nothing is left to do
        assert tuned(*kept)[0] == 0
        status, _, err = tuned(*kept, "--batch", "4")
        assert status == 2
        assert "was measured with batch = 2, and this call has 4" in err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--latency", "20"], "'20' is no time with its unit, as in 20ms or 0.02s"),
        (
            ["--speed-up", "2", "--max-drop", "1"],
            "give one of --speed-up, --max-drop or --latency, and not --speed-up",
        ),
        (["--speed-up", "nan"], "must be a number above 0"),
        (["--max-drop", "-1"], "must be a number of at least 0"),
        (["-o", "x.safetensors"], "name --speed-up, --max-drop or --latency"),
        (["-o", "here.safetensors", "--speed-up", "2"], "here.safetensors is there already"),
        (["-o", "x.pth", "--speed-up", "2"], "must end in .safetensors"),
        (["--front", "x.txt"], "must end in .json"),
        (["--front", "x.json", "--plot", "x.json"], ".png, .svg or .pdf"),
        (["--limit", "20"], "--limit"),
        (["--matchings", "grid"], "grid"),
        (["--csv"], "this command has no --csv, but --json"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_a_mistake_ends_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    digits: Path,
    options: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(costs, "time_rounds", None)
    Path("here.safetensors").write_bytes(b"a file of somebody's")
    status, out, err = run(capsys, "tune", str(digits), "--model", PLAIN, *options)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("tomevit: ")
    assert says in err
    assert Path("here.safetensors").read_bytes() == b"a file of somebody's"


@pytest.mark.parametrize(
    ("folder", "model", "says"),
    [
        ("none", PLAIN, "none: No such file or directory"),
        ("empty", PLAIN, "empty: no image in this folder"),
        ("few", PLAIN, "few has 3 images, too few to tell schedules apart: 32 at least"),
        ("broken", PLAIN, "0 of 40 images can be read, and 32 are needed at least"),
        ("few", "many.safetensors", "the model takes images of 4 channels, and files have 1 or 3"),
    ],
)
def test_images_that_do_not_do(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    folder: str,
    model: str,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(costs, "time_rounds", None)
    for name, count in (("empty", 0), ("few", 3), ("broken", 40)):
        Path(name).mkdir()
        for i in range(count):
            Path(name, f"{i}.png").write_bytes(b"no image")
    tomevit.save(tiny(in_chans=4), "many.safetensors")
    status, out, err = run(capsys, "tune", folder, "--model", model, "--workers", "0")
    assert (status, out) == (2, "")
    assert says in err.splitlines()[-1]


def test_bench_suggests_by_a_front(
    tuned: Tuned, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "front.json"
    assert tuned("--front", str(path))[0] == 0
    front = Front.load(path)
    monkeypatch.setattr(tomevit.measure.bounds, "COPIED", 2**20)
    options = ("--front", str(path), "--batch", "2", "--rounds", "1", "--no-timm")
    status, out, _ = run(capsys, "bench", PLAIN, *options, "--json")
    assert status == 0
    (comparison,) = json.loads(out)["comparisons"]
    model = tomevit.create(PLAIN)
    assert [row["schedule"] for row in comparison["rows"]] == [
        [step.entry for step in model.steps(point.r)] for point in front.points
    ]
    suggestion = comparison["suggestion"]
    assert "on 50 images" in suggestion["why"] if suggestion["r"] else "does not pay here" in suggestion["why"]
    status, _, err = run(capsys, "bench", "deit_ti16", *options)
    assert status == 2
    assert "measured with a model of 65 tokens" in err
