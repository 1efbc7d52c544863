"""The study of training with merging: what it measures, stores, tells and draws."""

from __future__ import annotations

import json
import re
import threading
import time
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch

import tomevit

pytest.importorskip("sklearn", reason="the digits come from scikit-learn")

from examples import merging_study, train_digits
from examples.merging_study import END, START, complete_seeds, load, main, rows, versions
from tomevit.tasks.demo import one_thread

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "merging_study.json"
# Nothing is learned, and no two trainings end alike.
TRAINING = ["--epochs", "2", "--batch", "8", "--lr", "3e-4", "--limit", "32"]
SMALL = ["--r", "16", "--seeds", "2", *TRAINING]


def invented(**changed: object) -> dict:
    """A study of three seeds, and one training of a fourth, that nobody measured."""
    draw = np.random.default_rng(0)
    r_values = [0, 8, 16]
    runs = [
        {"r": r, "seed": seed, "accuracy": {str(at): round(float(draw.uniform(80, 100)), 4) for at in r_values}}
        for seed, r in [*((seed, r) for seed in range(3) for r in r_values), (3, 0)]
    ]
    with one_thread():
        where = versions()
    seconds = {"rounds": 7, "environment": where, "seconds": {"0": 0.08, "8": 0.064, "16": 0.05}}
    study = {"model": "digits_p1", "r": r_values, "epochs": 3, "batch": 64, "lr": 3e-3, "limit": None, "held_out": 360}
    return study | {"environment": where, "runs": runs, "time": seconds} | changed


AS_INVENTED = ["--r", "8", "16", "--seeds", "3", "--epochs", "3"]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "study.json"
    path.write_text(json.dumps(invented()))
    return path


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "pages" / "README.md"
    path.parent.mkdir()
    path.write_text(f"before\n{START}\n{END}\nafter\n")
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command says that ends with 2."""
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    assert end.value.code == 2
    return capsys.readouterr().err


# --- Measuring --------------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_it_measures_what_the_training_script_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "study.json"
    wanted = {key: by_the_script(*key, tmp_path / "model.safetensors", capsys) for key in ((0, 0), (16, 1))}
    main([*SMALL, "--out", str(out), "--jobs", "2", "--rounds", "1"])
    study = load(out)
    found = {(run["r"], run["seed"]): run["accuracy"] for run in study["runs"]}
    assert list(found) == [(0, 0), (16, 0), (0, 1), (16, 1)]
    assert len({json.dumps(accuracy) for accuracy in found.values()}) == 4
    for key, printed in wanted.items():
        assert printed == [(at, f"{value:.2f}") for at, value in found[key].items()]
    assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "study.json", "study.png"}


def by_the_script(r: int, seed: int, out: Path, capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    """What examples/train_digits.py prints: an r, and the accuracy there."""
    options = ["--r", str(r), "--seed", str(seed), *TRAINING, "--eval-r", "0", "16"]
    train_digits.main([*options, "--out", str(out)])
    return re.findall(r"r = (\d+): ([\d.]+) %", capsys.readouterr().out)


def wait_until(true: object) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_stored_is_not_measured_again(stored: Path) -> None:
    before = stored.read_text()
    main([*AS_INVENTED, "--out", str(stored)])
    assert stored.read_text() == before


def test_a_killed_training_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(active_children())  # of an earlier test, on their way out

    def kill() -> None:
        wait_until(lambda: set(active_children()) - before)
        for child in set(active_children()) - before:
            child.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    said = refused(capsys, *SMALL, "--out", tmp_path / "study.json")
    killer.join()
    assert said == ("merging_study: a training was killed; the same command goes on with those that are missing\n")


def test_times_are_measured_anew_when_asked(stored: Path) -> None:
    before = load(stored)
    main([*AS_INVENTED, "--out", str(stored), "--only", "time", "--rounds", "2"])
    after = load(stored)
    assert after.pop("time")["rounds"] == 2
    assert before.pop("time") != load(stored)["time"]
    assert after == before
    seconds = load(stored)["time"]["seconds"]
    assert list(seconds) == ["0", "8", "16"]
    assert all(0 < value < 10 for value in seconds.values())


def test_a_timed_step_trains_at_its_r_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def step(model, optimiser, images, labels):
        before = [parameter.clone() for parameter in model.parameters()]
        train_digits.train_step(model, optimiser, images, labels)
        learned = all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        seen.append((model.r, model.training, len(images), learned, torch.get_num_threads()))

    monkeypatch.setattr(merging_study, "train_step", step)
    torch.set_num_threads(2)
    try:
        merging_study.time_steps(invented(batch=5), rounds=1)
    finally:
        torch.set_num_threads(1)
    assert set(seen) == {(r, True, 5, True, 1) for r in (0, 8, 16)}


# --- The report -------------------------------------------------------------------------------------------------------


def test_rows_are_means_and_sample_deviations_over_complete_seeds() -> None:
    study = invented()
    assert complete_seeds(study) == [0, 1, 2]
    accuracy = {(run["r"], run["seed"]): run["accuracy"] for run in study["runs"]}
    for row, r in zip(rows(study), (0, 8, 16), strict=True):
        for found, trained_at in ((row.off_the_shelf, 0), (row.trained, r)):
            values = [accuracy[trained_at, seed][str(r)] for seed in range(3)]
            assert found == pytest.approx((np.mean(values), np.std(values, ddof=1)))
        model = tomevit.create("digits_p1", r=r)
        assert row.tokens == model.token_counts()[-1]
        assert row.flop_ratio == pytest.approx(tomevit.flops(model.config) / tomevit.flops(model.config, r))
        assert row.seconds == study["time"]["seconds"][str(r)]
    assert [row.speed_up for row in rows(study)] == pytest.approx([1, 1.25, 1.6])


def test_both_tables_say_what_the_file_says(stored: Path, readme: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*AS_INVENTED, "--out", str(stored), "--readme", str(readme)])
    printed, text = capsys.readouterr().out, readme.read_text()
    assert text.startswith(f"before\n{START}\n| r |")
    assert text.endswith(f"\n\n![Accuracy and time of a training step against r](../study.png)\n{END}\nafter\n")
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| \d", line)]
    lines = printed.splitlines()[:4]
    assert [re.split(r"  +", line.strip()) for line in lines[1:]] == table
    assert len({len(line) for line in lines}) == 1
    for found, row in zip(table, rows(load(stored)), strict=True):
        spreads = [f"{middle:.2f} ± {deviation:.2f}" for middle, deviation in (row.off_the_shelf, row.trained)]
        assert found[:1] + found[3:] == [str(row.r), *spreads, f"{1000 * row.seconds:.1f}", f"{row.speed_up:.2f}"]
    for output in (printed, text):
        words = " ".join(output.split())
        assert "3 epochs at every r, batch 64" in words
        assert "360 held-out images, each of them 0.28 points: mean and standard deviation (n − 1) over 3" in words
        assert f"median of 7, all r in turn. {versions()['device']}, 1 thread" in words
    assert (stored.parent / "study.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_times_from_another_machine_say_so() -> None:
    study = invented()
    study["time"]["environment"] = study["environment"] | {"device": "another"}
    assert re.search(r"Trained on (?!another).*; timed on another, 1 thread", merging_study.notes(study)[1])


def test_one_seed_has_no_spread() -> None:
    study = invented(runs=invented()["runs"][:3])
    assert "±" not in merging_study.as_text(study)
    assert "0.28 points: one seed." in " ".join(merging_study.as_text(study).split())


def test_without_times_there_is_a_table_and_no_picture(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = invented()
    del study["time"]
    stored.write_text(json.dumps(study))
    main([*AS_INVENTED, "--out", str(stored), "--only", "train"])
    assert re.search(r"^ 8 .*  –         –$", capsys.readouterr().out, re.MULTILINE)
    assert not stored.with_suffix(".png").exists()


def test_stale_tables_are_found_and_mended(stored: Path, readme: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = ["--out", str(stored), "--check", str(readme)]
    with pytest.raises(SystemExit, match=r"does not have the table of .*; write it with --readme"):
        main(check)
    main([*AS_INVENTED, "--out", str(stored), "--readme", str(readme)])
    main(check)
    study = load(stored)
    study["runs"][4]["accuracy"]["8"] -= 0.2778
    stored.write_text(json.dumps(study))
    with pytest.raises(SystemExit, match="does not have the table"):
        main(check)


# --- Wrong use --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--r", "33"], "argument --r: 33 is not possible; it must be at least 0, and at most 32"),
        (["--r", "-1"], "argument --r: -1 is not possible"),
        (["--r", "8.5"], "argument --r: invalid int value: '8.5'"),
        (["--seeds", "0"], "argument --seeds: 0 is not possible; it must be at least 1"),
        (["--jobs", "0"], "argument --jobs: 0 is not possible; it must be at least 1"),
        (["--epochs", "0"], "argument --epochs: 0 is not possible; it must be at least 1"),
        (["--only", "draw"], "argument --only: invalid choice: 'draw'"),
        (["--out", "no/study.json"], "merging_study: there is no directory no to write study.json into"),
        (["--out", "study.png"], "merging_study: --out is study.png, and must end in .json"),
        (["--readme", "none.md"], "merging_study: [Errno 2] No such file or directory: 'none.md'"),
        (["--readme", "bare.md"], f"merging_study: bare.md has no line {START}"),
        (["--readme", "open.md"], f"merging_study: open.md has no line {END}"),
        (["--check", "open.md"], "merging_study: [Errno 2] No such file or directory: 'merging_study.json'"),
    ],
)
def test_wrong_arguments_end_it_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bare.md").write_text("nothing\n")
    Path("open.md").write_text(f"{START}\n")
    assert said in refused(capsys, *SMALL, *arguments).splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.md", "open.md"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"epochs": 4}, "has epochs 4, not 3; go on with the same, or name another file with --out"),
        ({"r": [0, 8]}, "has r [0, 8], not [0, 8, 16]; "),
        ({"limit": 9}, "has limit 9, not None; "),
        ({"environment": invented()["environment"] | {"torch": "1.13"}}, f"has torch 1.13, not {torch.__version__}; "),
    ],
)
def test_another_study_is_not_continued(
    stored: Path, capsys: pytest.CaptureFixture[str], changed: dict, said: str
) -> None:
    stored.write_text(json.dumps(invented(**changed)))
    before = stored.read_text()
    assert f"merging_study: the study in {stored} {said}" in refused(capsys, *AS_INVENTED, "--out", stored)
    assert stored.read_text() == before


@pytest.mark.parametrize(("text", "said"), [("{", "is no study: Expecting"), ("[]", "is no study of this program")])
def test_other_files_are_no_study(stored: Path, capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    stored.write_text(text)
    assert f"merging_study: {stored} {said}" in refused(capsys, "--out", stored)
    assert stored.read_text() == text


def test_an_unfinished_study_has_no_table(stored: Path, readme: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored.write_text(json.dumps(invented(runs=invented()["runs"][:2])))
    said = refused(capsys, "--out", stored, "--check", readme)
    assert said == "merging_study: the study has no seed with a training at every r yet\n"


# --- What the page shows ----------------------------------------------------------------------------------------------


def test_the_page_is_current_and_made_by_the_command_as_it_stands() -> None:
    main(["--out", str(RESULTS), "--check", str(ROOT / "docs" / "finetuning.md")])
    study, usual = load(RESULTS), merging_study.read_options([])
    assert {name: study[name] for name in merging_study.FIXED} == {
        name: getattr(usual, name, train_digits.MODEL) for name in merging_study.FIXED
    }
    assert len(complete_seeds(study)) == usual.seeds
    assert study["time"]["rounds"] == usual.rounds
