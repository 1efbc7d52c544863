"""Every image counts once, whatever happens on the way, and the figures are those of the answers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.stats import binomtest
from torch import Tensor

import tomevit
import tomevit.cli
import tomevit.tasks.evaluate
from tests.helpers import PLAIN, TRAINED, tiny
from tests.project.test_torchrun import torchrun
from tests.tasks.test_cli import run
from tomevit.cli import running
from tomevit.config import Figure, Preset
from tomevit.data.labelled_images import labelled
from tomevit.measure.published import published_accuracies
from tomevit.tasks import demo, plots
from tomevit.tasks.evaluate import Expected, Step, evaluate, forget, judge, paired, wilson

COUNT = 83  # digits, of 360: no multiple of a batch


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The held-out digits as files, a folder for each class."""
    root = tmp_path_factory.mktemp("digits")
    images, labels = demo.held_out()
    for i, (image, label) in enumerate(zip(images[:COUNT], labels.tolist())):  # noqa: B905
        (root / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(root / str(label) / f"{i:03}.png")
    return root


@pytest.fixture(scope="module")
def model() -> tomevit.VisionTransformer:
    return tomevit.create(PLAIN, pretrained=True)


def files_of(root: Path) -> tuple[list[str], list[int]]:
    found = labelled(root, 10, tuple("0123456789"))
    return found.files, found.labels


def figures(path: Path) -> dict[str, Any]:
    """What is measured in a result, without times."""
    result = json.loads(path.read_text())
    timed = ("seconds", "images_per_second", "speed_up")
    rows = [{name: value for name, value in row.items() if name not in timed} for row in result["rows"]]
    return {"rows": rows, "images": result["images"], "evaluated": result["evaluated"], "bad": result["unreadable"]}


# -------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize(("batch", "workers"), [(32, 0), (7, 1), (1000, 0)])
def test_the_figures_are_those_of_a_plain_loop(
    digits: Path, model: tomevit.VisionTransformer, batch: int, workers: int
) -> None:
    r_values = [0, 16, (4, -1.0), [20, 0, 7], 16]
    found = evaluate(model, *files_of(digits), r_values, batch=batch, workers=workers)
    assert [row.r for row in found.rows] == r_values[:-1]
    assert (found.images, found.evaluated, found.unreadable, found.complete) == (COUNT, COUNT, [], True)
    images, labels = (part[:COUNT] for part in demo.held_out())
    prepared = tomevit.transform(model)(images)
    with torch.inference_mode():
        plain = model(prepared, 0).argmax(1)
        for row in found.rows:
            logits = model(prepared, row.r)
            right = logits.argmax(1) == labels
            behind = (logits > logits.gather(1, labels[:, None])).sum(1)
            assert row.top1.value == pytest.approx(100 * right.double().mean().item())
            assert row.top1.value == pytest.approx(demo.accuracy(model, images, labels, row.r))
            assert row.top5.value == pytest.approx(100 * (behind < 5).double().mean().item())
            assert row.tokens == model.token_counts(row.r)[-1]
            assert row.seconds is not None
            assert row.images_per_second == pytest.approx(min(batch, COUNT) / row.seconds.median)
            if row.r == 0:
                assert (row.difference, row.agreement, row.speed_up, row.flop_ratio) == (None, None, 1, 1)
            else:
                assert row.agreement is not None
                assert row.difference is not None
                assert row.agreement.value == pytest.approx(100 * (logits.argmax(1) == plain).double().mean().item())
                assert row.difference.value == pytest.approx(row.top1.value - found.rows[0].top1.value)
                assert row.difference.lower < row.difference.value < row.difference.upper
    assert found.rows[1].top1.value < found.rows[0].top1.value, "merging costs nothing here: nothing was tested"


def test_r_that_mean_the_same_are_evaluated_once_and_have_a_row_each(
    digits: Path, model: tomevit.VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, state = model.plain("2x"), tmp_path / "state"
    calls: list[Any] = []
    real = tomevit.tasks.evaluate._launch_batch

    def launch(model: Any, images: Tensor, labels: Tensor, r_values: Any, turn: int = 0) -> Any:
        calls.append(list(r_values))
        return real(model, images, labels, r_values, turn)

    monkeypatch.setattr("tomevit.tasks.evaluate._launch_batch", launch)
    r_values = ["2x", 0, plain, [plain] * 4, "1.5x late", "8 pitome"]
    rows = evaluate(model, *files_of(digits), r_values, state=state).rows
    assert all(each == [plain, 0, model.plain("1.5x late"), model.plain("8 pitome")] for each in calls)
    assert [row.r for row in rows] == r_values
    assert [row.plain for row in rows] == [model.plain(r) for r in r_values]
    assert [row.schedule for row in rows] == [tuple(step.entry for step in model.steps(r)) for r in r_values]
    blank = {"r": 0, "plain": 0}
    assert rows[0]._replace(**blank) == rows[2]._replace(**blank) == rows[3]._replace(**blank)
    for row in rows:
        (alone,) = evaluate(model, *files_of(digits), [row.plain]).rows
        assert (alone.top1, alone.tokens, alone.flop_ratio) == (row.top1, row.tokens, row.flop_ratio)
    assert rows[0].flop_ratio >= 2
    assert rows[0].gflops_computed == tomevit.flops(model.config, plain, computed=True) / 1e9

    again = evaluate(model, *files_of(digits), [plain, 0, "1.5x late", "8 pitome"], state=state)  # in other words
    assert again.resumed == COUNT
    with pytest.raises(ValueError, match="is of an evaluation with r "):
        evaluate(model, *files_of(digits), [plain, 0, "1.5x deferred", "8 pitome"], state=state)


def test_without_r_0_there_is_nothing_to_compare_with(digits: Path, model: tomevit.VisionTransformer) -> None:
    (row,) = evaluate(model, *files_of(digits), [8]).rows
    assert (row.difference, row.agreement, row.speed_up) == (None, None, None)


def test_every_image_is_read_once_for_all_r(
    digits: Path, model: tomevit.VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, labels = files_of(digits)
    of, read = dict(zip(files, labels, strict=True)), []
    real = tomevit.data.images.read
    monkeypatch.setattr("tomevit.data.images.read", lambda source, **how: read.append(source) or real(source, **how))
    evaluate(model, files, labels, [0, 4, 8], batch=9)
    assert sorted(read) == files
    assert len({of[file] for file in read[:20]}) > 5, "the first are of few classes"

    again: list[str] = []
    monkeypatch.setattr("tomevit.data.images.read", lambda source, **how: again.append(source) or real(source, **how))
    evaluate(model, files, labels, [0], batch=9)
    assert again == read


def test_what_cannot_be_read_is_named_and_does_not_count(
    digits: Path, model: tomevit.VisionTransformer, tmp_path: Path
) -> None:
    files, labels = files_of(digits)
    whole = Path(files[0]).read_bytes()
    broken = {"empty.png": b"", "cut.png": whole[:60], "page.png": b"<html>"}
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
    names = [str(tmp_path / name) for name in [*broken, "missing.png"]]
    mixed = [*names[:1], *files[:40], *names[1:2], *files[40:], *names[2:]]
    of = dict(zip(files, labels, strict=True))
    steps: list[Step] = []
    found = evaluate(model, mixed, [of.get(file, 0) for file in mixed], [0, 8], batch=2, progress=steps.append)
    plain = evaluate(model, files, labels, [0, 8], batch=2)
    assert [row._replace(seconds=None, images_per_second=None, speed_up=None) for row in found.rows] == [
        row._replace(seconds=None, images_per_second=None, speed_up=None) for row in plain.rows
    ]
    assert dict(found.unreadable).keys() == set(names)
    assert [Path(file).name for file, _ in found.unreadable] == ["empty.png", "cut.png", "page.png", "missing.png"]
    assert found.unreadable[0][1] == "the file is empty"
    assert (found.images, found.evaluated, found.complete) == (COUNT + 4, COUNT, True)
    assert [step.done for step in steps] == [*range(0, COUNT + 4, 2), COUNT + 4]  # of the last batch nothing is read
    assert steps[-1] == Step(COUNT + 4, COUNT + 4, 4, 0)


def test_answers_that_are_not_finite_are_wrong_and_counted(digits: Path) -> None:
    model = tomevit.create(PLAIN, pretrained=True)
    with torch.no_grad():
        model.head.weight[3] = math.nan
    row, other = evaluate(model, *files_of(digits), [0, 8]).rows
    assert (row.top1.value, row.top5.value, row.not_finite, other.not_finite) == (0, 0, COUNT, COUNT)


@pytest.mark.parametrize(("count", "total"), [(0, 1), (1, 1), (0, 50), (50, 50), (7, 9), (357, 360), (42265, 50000)])
def test_intervals_of_shares_are_wilsons(count: int, total: int) -> None:
    found, theirs = wilson(count, total), binomtest(count, total).proportion_ci(method="wilson")
    assert found.value == 100 * count / total
    assert found.lower == pytest.approx(100 * theirs.low, abs=1e-9)
    assert found.upper == pytest.approx(100 * theirs.high, abs=1e-9)
    assert 0 <= found.lower <= found.value <= found.upper <= 100


def test_intervals_of_differences_hold_as_often_as_they_say() -> None:
    """Of 95 in 100 samples the interval has the true difference, few images and rare changes included."""
    draw = np.random.default_rng(0)
    for total, gain, loss in ((50, 0.02, 0.1), (360, 0.005, 0.03), (2000, 0.01, 0.02), (100, 0.2, 0.2)):
        samples = draw.multinomial(total, [gain, loss, 1 - gain - loss], size=4000)
        intervals = [paired(int(gained), int(lost), total) for gained, lost, _ in samples]
        holds = np.mean([found.lower <= 100 * (gain - loss) <= found.upper for found in intervals])
        assert 0.94 <= holds <= 0.99, (total, gain, loss)
    assert paired(3, 5, 100).value == -2
    assert paired(0, 0, 100).lower < 0 < paired(0, 0, 100).upper


def test_expectations_are_judged_by_the_interval(digits: Path, model: tomevit.VisionTransformer) -> None:
    rows = evaluate(model, *files_of(digits), [0, (4, -1.0)]).rows
    bounds = [(row.r, row.top1.lower, row.top1.upper) for row in rows]
    asked = [
        Expected(r, value, "x") for r, lower, upper in bounds for value in (lower - 0.01, lower, upper, upper + 0.01)
    ]
    assert [verdict.within for verdict in judge(rows, asked)] == 2 * [False, True, True, False]
    assert judge(rows, [Expected(5, 99.0, "x")]) == []
    card = replace(model.card, figures=(Figure(top1=99.0, r=8, source="a paper"),))
    assert published_accuracies(card) == [Expected(8, 99.0, "a paper")]


def test_a_batch_that_does_not_fit_leaves_nothing_behind(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tomevit.create(PLAIN, pretrained=True)
    forward = type(model).forward

    def small_memory(self: Any, images: Tensor, *args: Any) -> Tensor:
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, images, *args)

    monkeypatch.setattr(type(model), "forward", small_memory)
    with pytest.raises(ValueError, match="a batch of 32 does not fit into the memory of cpu"):
        evaluate(model, *files_of(digits), state=tmp_path / "state")
    assert not list(tmp_path.iterdir())
    assert evaluate(model, *files_of(digits), batch=4, state=tmp_path / "state").complete


def test_a_reader_that_dies_is_told_and_the_run_can_go_on(
    digits: Path, model: tomevit.VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, labels = files_of(digits)
    real, state = tomevit.data.images.stream, tmp_path / "state"

    def deadly(*args: Any, **how: Any) -> Any:
        for i, batch in enumerate(real(*args, **how)):
            if i == 5:
                raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")  # as torch raises it
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(tomevit.tasks.evaluate, "stream", deadly)
        with pytest.raises(OSError, match=r"a process that reads images died: DataLoader worker .* Killed"):
            evaluate(model, files, labels, batch=8, state=state)
    found = evaluate(model, files, labels, batch=8, state=state)
    assert found.resumed == 40
    assert found.rows[0].top1 == evaluate(model, files, labels).rows[0].top1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (([], []), "0 images"),
        ((["a.png"], [1, 2]), "1 images and 2 labels"),
        ((["a.png"], [10]), "a label is 10, and the model has 10 classes"),
        ((["a.png"], [-1]), "a label is -1"),
        ((["a.png"], [1], []), "0 r"),
        ((["a.png"], [1], [-1]), "negative"),
    ],
)
def test_wrong_arguments(model: tomevit.VisionTransformer, arguments: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        evaluate(model, *arguments)


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(ValueError, match="training mode"):
        evaluate(tiny().train(), ["image.png"], [0])


def test_memory_stays_flat(tmp_path: Path) -> None:
    """Each image takes 12 KB as the model's input: to keep the last 4000, or their batches, would be 48 MB."""
    model = tiny(depth=1)
    Image.new("RGB", (32, 32), "orange").save(tmp_path / "one.png")

    def memory() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("the system does not tell how much memory a process has")
    seen: list[int] = []
    files = 5000 * [str(tmp_path / "one.png")]
    evaluate(model, files, 5000 * [0], [0, 4], batch=50, progress=lambda step: seen.append(memory()))
    assert len(seen) == 101
    assert seen[-1] - seen[20] < 2**24, [size >> 20 for size in seen[::10]]


# --------------------------------------------------------------------------------------------------------------- resume


def command(digits: Path, out: Path, *more: str) -> list[str]:
    options = ["--model", PLAIN, "--r", "0", "8", "16", "--batch", "4", "--threads", "1", "--workers", "0"]
    return ["eval", "--data", str(digits), *options, "-o", str(out), *more]


@pytest.fixture(scope="module")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The figures of a run without interruption."""
    out = tmp_path_factory.mktemp("undisturbed") / "eval.json"
    with pytest.raises(SystemExit) as stop:
        tomevit.cli.main(command(digits, out))
    assert not stop.value.code
    return figures(out)


def test_a_run_that_was_interrupted_goes_on_to_the_same_figures(
    digits: Path,
    undisturbed: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "eval.json"
    # The first call warms up, so seven batches are done before the ninth.
    interpreter = [sys.executable, "-W", "error", "-m", "tests.stopped", "SIGINT", "9"]
    done = subprocess.run(
        [*interpreter, *command(digits, out)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 130, done.stderr
    assert "Interrupted: 28 of 83 images are done." in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith(("0 ", "8 ", "16 "))]) == 3
    assert done.stderr.split("\n") == ["the same command goes on from there", "", "tomevit: interrupted", ""]
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json.progress"]

    read: list[str] = []
    real = tomevit.data.images.read
    monkeypatch.setattr("tomevit.data.images.read", lambda source, **how: read.append(source) or real(source, **how))
    code, _, err = run(capsys, *command(digits, out))
    assert code == 0
    assert "going on from 28 images of an earlier run" in err
    assert len(read) == COUNT - 28
    assert figures(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


def interrupt_after(images: int) -> Callable[[Step], None]:
    def progress(step: Step) -> None:
        if step.done >= images:
            raise KeyboardInterrupt

    return progress


def test_a_state_of_another_evaluation_is_refused(
    digits: Path, model: tomevit.VisionTransformer, tmp_path: Path
) -> None:
    files, labels = files_of(digits)
    state = tmp_path / "state"
    evaluate(model, files, labels, [0, 8], state=state, progress=interrupt_after(32))
    whole = state.read_bytes()

    other = tomevit.create(PLAIN, pretrained=True)
    with torch.no_grad():
        other.head.bias[0] += 1
    cropped = tomevit.create(PLAIN, pretrained=True)
    cropped.card = replace(cropped.card, preprocess=replace(cropped.card.preprocess, crop_pct=0.5))
    for arguments, what in (
        ((other, files, labels, [0, 8]), "weights .*, not "),
        ((cropped, files, labels, [0, 8]), "preprocessing "),
        ((tomevit.create(PLAIN, pretrained=True, prop_attn=False), files, labels, [0, 8]), "model "),
        ((deepcopy(model).double(), files, labels, [0, 8]), "dtype float32, not float64"),
        ((model, files[1:], labels[1:], [0, 8]), "images "),
        ((model, files, labels[1:] + labels[:1], [0, 8]), "images "),
        ((model, files, labels, [0, 9]), "r 0, 8, not 0, 9"),
    ):
        with pytest.raises(ValueError, match=f"of an evaluation with .*{what}"):
            evaluate(*arguments, state=state)
    with pytest.raises(ValueError, match="batch 32, not 16"):
        evaluate(model, files, labels, [0, 8], batch=16, state=state)
    assert state.read_bytes() == whole

    listed = tmp_path / "listed"
    with safe_open(state, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata["evaluation"] = json.dumps(
        {name: value for name, value in json.loads(metadata["evaluation"]).items() if name != "order"}
    )
    save_file(tensors, listed, metadata)  # as a version wrote it that went through the images as they are listed
    with pytest.raises(ValueError, match="with order as listed, not by chance; go on with the same, or remove it"):
        evaluate(model, files, labels, [0, 8], state=listed)

    moved = tmp_path / "moved"
    moved.symlink_to(digits)
    there = [str(moved / Path(file).relative_to(digits)) for file in files]
    found = evaluate(model, there, labels, [0, 8], state=state)
    assert (found.resumed, found.evaluated, found.complete) == (32, COUNT, True)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-40], lambda data: b"{}" * 200])
def test_a_damaged_state_is_named(
    digits: Path, model: tomevit.VisionTransformer, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    state = tmp_path / "state"
    evaluate(model, *files_of(digits), state=state, progress=interrupt_after(32))
    state.write_bytes(damage(state.read_bytes()))
    with pytest.raises(ValueError, match="state is no state of an evaluation, or damaged: remove it"):
        evaluate(model, *files_of(digits), state=state)


def test_unreadable_files_are_remembered(digits: Path, model: tomevit.VisionTransformer, tmp_path: Path) -> None:
    files, labels = files_of(digits)
    files, labels = [str(tmp_path / "none.png"), *files], [0, *labels]
    state = tmp_path / "state"
    steps: list[Step] = []

    def interrupt(step: Step) -> None:
        steps.append(step)
        if step.unreadable:
            raise KeyboardInterrupt

    first = evaluate(model, files, labels, batch=8, state=state, progress=interrupt)
    done = steps[-1].done
    assert 0 < done < COUNT, "nothing is left to go on with: nothing was tested"
    assert (first.interrupted, first.complete, first.evaluated) == (True, False, done - 1)
    again = evaluate(model, files, labels, batch=8, state=state)
    assert again.unreadable == first.unreadable == [(files[0], "No such file or directory")]
    assert (again.resumed, again.evaluated, again.complete) == (done, COUNT, True)
    finished = evaluate(model, files, labels, batch=8, state=state)
    assert (finished.resumed, finished.rate) == (COUNT + 1, None)
    assert finished.rows == again.rows
    forget(state)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_two_processes_count_each_image_once_and_go_on_after_kill_9(
    digits: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "eval.json"

    def launch(call: int) -> str:
        # Python 3.11's argparse in torchrun would take an --r for its own, but for the two dashes.
        return torchrun("--", "tests.stopped", "SIGKILL", str(call), *command(digits, out))

    printed = launch(4)
    parts = sorted(path.name for path in tmp_path.iterdir())
    assert "eval.json.progress" in parts or "eval.json.progress.1" in parts, printed
    printed = launch(0)
    assert figures(out) == undisturbed, printed
    result = json.loads(out.read_text())
    assert result["processes"] == 2
    assert 0 < result["resumed"] < COUNT
    assert printed.count("going on from ") == 1
    assert printed.count("written to ") == 1
    assert printed.count("0       65 ") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


# -------------------------------------------------------------------------------------------------------------- command


def test_the_table(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "eval", "--data", str(digits), "--model", TRAINED)
    assert status == 0
    lines = out.splitlines()
    assert "83 images from" in lines[1]
    assert "(10 folders, named as the model's classes)" in lines[1]
    assert lines[3].split()[:4] == ["r", "tokens", "top-1", "%"]
    assert [line.split()[:2] for line in lines[4:6]] == [["0", "65"], ["16", "9"]]  # what it was trained with
    assert len({len(line) for line in lines[3:6]}) == 1


def test_json_markdown_and_a_plot(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["eval", "--data", str(digits), "--model", PLAIN, "--r", "0", "8", "--limit", "30", "--batch", "8"]
    picture, table = tmp_path / "eval.svg", tmp_path / "eval.md"
    status, out, err = run(capsys, *base, "--json", "-o", str(tmp_path / "eval"), "--plot", str(picture))
    result = json.loads(out)
    assert status == 0
    assert json.loads((tmp_path / "eval").read_text()) == result
    assert "<svg" in picture.read_text()
    assert len(err.splitlines()) == 2
    assert {"schema", "command", "device", "threads", "torch", "tomevit", "labels", "data", "dtype"} < result.keys()
    assert (result["images"], result["limit"], result["complete"]) == (30, 30, True)
    assert result["notes"] == ["30 of 83 images, drawn by chance."]
    assert len(result["rows"]) == 2

    status, out, _ = run(capsys, *base, "-o", str(table), "--dtype", "bfloat16", "--workers", "1")
    assert status == 0
    assert not out.startswith("#")
    rows = [line for line in table.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert len({row.count("|") for row in rows}) == 1
    assert "bfloat16" in out


def test_broken_files_end_in_status_1_unless_they_may_be_skipped(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in "38":
        (tmp_path / label).symlink_to(digits / label)
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "empty.png").touch()
    base = ("eval", "--data", str(tmp_path), "--model", PLAIN)
    status, out, _ = run(capsys, *base)
    assert status == 1
    count = sum(len(list((digits / label).iterdir())) for label in "38") + 1
    assert f"1 of {count} files cannot be read, and are not counted:" in out
    assert f"  {tmp_path}/4/empty.png: the file is empty" in out
    assert "Images of 3 classes; answers are among all 10." in out
    skipped, again, _ = run(capsys, *base, "--skip-broken")
    assert skipped == 0
    assert "the file is empty" in again

    for label in "38":
        (tmp_path / label).unlink()
    status, out, err = run(capsys, *base)
    assert (status, out) == (2, "")
    assert err == f"tomevit: none of the 1 images can be read, as {tmp_path}/4/empty.png: the file is empty\n"


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (("--expect", "0=97.5"), 0, "97.50 % of --expect, which is within the interval"),
        (("--expect", "0=80", "--expect", "8=97"), 1, "80.00 % of --expect, which is not within the interval"),
        (("--expect", "--json"), 1, '"within": false'),
    ],
)
def test_what_was_expected(
    more: tuple[str, ...],
    status: int,
    says: str,
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "mine.safetensors"
    model = tomevit.create(PLAIN, pretrained=True)
    tomevit.save(model, path, card=replace(model.card, figures=(Figure(top1=50.0, r=8, source="a paper"),)))
    found, out, _ = run(capsys, "eval", "--data", str(digits), "--model", str(path), "--r", "0", "8", *more)
    assert found == status
    assert says in out


def test_published_figures_stand_beside_presets_and_budgets(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path, table = tomevit.create(PLAIN, pretrained=True), tmp_path / "mine.safetensors", tmp_path / "eval.json"
    preset = Preset(name="diffrate-0.1g", r=(4, "8+3 diffrate", 0, 0), num_tokens=65, source="a paper")
    figures = (
        Figure(top1=98.0, r=0, source="a paper"),
        Figure(top1=95.5, r=model.plain("2x"), source="a paper"),
        Figure(top1=20.0, r="diffrate-0.1g", source="another paper"),
    )
    tomevit.save(model, path, card=replace(model.card, figures=figures, presets=(preset,)))
    words = ("--r", "0", "2x", "1.5x late", "diffrate-0.1g", '[4,"8+3 diffrate"]')
    status, out, _ = run(
        capsys, "eval", "--data", str(digits), "--model", str(path), *words, "--expect", "-o", str(table)
    )
    assert status == 1, "an accuracy of 20 % is as far off as can be"
    lines = [line for line in out.splitlines() if line.startswith(("0 ", "2x ", "1.5x late", "diffrate-0", "[4,"))]
    assert ["98.00" in lines[0], "95.50" in lines[1], "20.00" in lines[3], "20.00" in lines[4]] == [True] * 4
    assert f"2x is r = {model.plain('2x')} here." in out
    assert 'diffrate-0.1g is r = [4,"8+3 diffrate",0,0] here.' in out
    result = json.loads(table.read_text())
    assert [row["r"] for row in result["rows"]] == [0, "2x", "1.5x late", "diffrate-0.1g", [4, "8+3 diffrate"]]
    assert [row["published"] for row in result["rows"]] == [98.0, 95.5, None, 20.0, 20.0]
    assert result["rows"][3]["schedule"] == result["rows"][4]["schedule"] == [4, "8+3 diffrate", 0, 0]
    assert result["rows"][2]["plain"] == model.plain("1.5x late")
    verdicts = [(each["r"], each["expected"]) for each in result["expected"]]
    assert verdicts == [(0, 98.0), ("2x", 95.5), ("diffrate-0.1g", 20.0)]

    asked = ("--expect", "2x=90", "diffrate-0.1g=30", "--r", "0", "2x", "diffrate-0.1g", "--json")
    _, out, _ = run(capsys, "eval", "--data", str(digits), "--model", str(path), *asked)
    assert [(each["r"], each["expected"]) for each in json.loads(out)["expected"]] == [
        ("2x", 90.0),
        ("diffrate-0.1g", 30.0),
    ]


def test_what_is_published_is_of_the_weights_own_image_size(tmp_path: Path) -> None:
    model, path = tiny(pos_embed="none", rope="eva"), tmp_path / "mine.safetensors"
    tomevit.save(model, path, card=replace(model.card, figures=(Figure(top1=50.0, source="a paper"),)))
    assert running.trained(str(path)).card.figures
    assert not running.trained(str(path), img_size=(64, 64)).card.figures


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((), "Missing option '--data'"),
        (("--data", "DIGITS", "--r", "0", "2x", "9x"), "r = '9x' cannot be reached"),
        (("--data", "DIGITS", "--r", "2x fast"), "'fast' is neither a shape"),
        (("--data", "DIGITS", "--r", "diffrate-0.1g"), "is no preset of this model; it has none"),
        (("--data", "DIGITS", "--expect", "2x=84", "--r", "0", "8"), "--expect has r = 2x, which --r does not have"),
        (("--data", "/nowhere"), "/nowhere: there is no such folder"),
        (("--data", "DIGITS", "--model", "vit_b61"), "did you mean vit_b16"),
        (
            ("--data", "DIGITS", "--model", "deit_s16", "--classes", "CLASSES"),
            "names 2 classes, and the model has 1000",
        ),
        (("--data", "DIGITS", "--r", "eight"), "'eight' is no r; give 8, 8,-1, "),
        (("--data", "DIGITS", "--r", "[1,1,1,1,1]"), "the model has 4"),
        (("--data", "DIGITS", "--truth", "/nowhere/val.txt"), "/nowhere/val.txt"),
        (("--data", "DIGITS", "--truth", "CLASSES"), "CLASSES"),
        (("--data", "DIGITS", "--batch", "0"), "--batch"),
        (("--data", "DIGITS", "--limit", "0"), "--limit"),
        (("--data", "DIGITS", "--workers", "-1"), "--workers"),
        (("--data", "DIGITS", "--dtype", "int8"), "bfloat16"),
        (("--data", "DIGITS", "--device", "abacus"), "abacus"),
        (("--data", "DIGITS", "--img-size", "big"), "224x320"),
        (("--data", "DIGITS", "--expect", "84.5x"), "neither 84.57 (per cent) nor 16=84.57"),
        (("--data", "DIGITS", "--expect", "184"), "neither 84.57 (per cent)"),
        (("--data", "DIGITS", "--expect", "4=84", "--r", "0", "8"), "--expect has r = 4, which --r does not have"),
        (("--data", "DIGITS", "--expect", "84", "--r", "0", "8"), "must say at which r, as in --expect 8=84"),
        (("--data", "DIGITS", "--expect"), "no accuracy is published for digits_p1.plain"),
        (("--data", "DIGITS", "--restart"), "--restart is for a run with -o"),
        (("--data", "DIGITS", "-o", "/nowhere/table.json"), "no directory /nowhere"),
        (("--data", "DIGITS", "--plot", "picture.xyz"), ".png, .svg or .pdf"),
    ],
)
def test_a_mistake_gets_one_clear_line(
    more: tuple[str, ...], says: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "CLASSES").write_text("cat\ndog\n")
    places = {"DIGITS": str(digits), "CLASSES": str(tmp_path / "CLASSES")}
    model = () if "--model" in more else ("--model", PLAIN)
    status, out, err = run(capsys, "eval", *model, *(places.get(argument, argument) for argument in more))
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("tomevit: ")
    assert says in err


def test_restart_begins_anew(
    digits: Path, model: tomevit.VisionTransformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "eval.json"
    state = tmp_path / "eval.json.progress"
    evaluate(model, *files_of(digits), [0], batch=32, state=state, progress=interrupt_after(32))
    arguments = ("eval", "--data", str(digits), "--model", PLAIN, "-o", str(out), "--r", "0", "8")
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert "r 0, not 0, 8" in err
    assert "remove it to begin anew" in err
    status, _, err = run(capsys, *arguments, "--restart")
    assert status == 0
    assert json.loads(out.read_text())["resumed"] == 0


# ----------------------------------------------------------------------------------------------------------------- plot


def evaluation(model: str, r_values: list[Any], **fields: Any) -> dict[str, Any]:
    """A result as tomevit eval writes it, with made-up figures."""
    rows = [
        {"r": r, "images_per_second": 100.0 + i, "gflops": 9.0 - i}
        | {"top1": {"value": 80.0 - i, "lower": 79.0 - i, "upper": 81.0 - i}}
        for i, r in enumerate(r_values)
    ]
    where = {"img_size": [8, 8], "device": "a device", "torch": "2", "evaluated": 360}
    return {"schema": 1, "command": "eval", "model": model, "rows": rows} | where | fields


def benchmark(model: str, r_values: list[Any], **fields: Any) -> dict[str, Any]:
    rows = [
        {"flop_ratio_computed": 1.5, "gflops": 9.0 - i}
        | {"implementation": name, "mode": mode, "r": r, "merges": r != 0, "speed_up": 1.0 + i}
        | {
            "seconds": {"lower": 1, "median": 1 / (1000 + i + speed), "upper": 1},
            "images_per_second": 1000.0 + i + speed,
        }
        for i, r in enumerate(r_values)
        for name, mode, speed in (("tomevit", "eager", 0), ("tomevit", "compiled", 100), ("timm", "eager", 500))
    ]
    where = {"img_size": [8, 8], "device": "a device", "torch": "2", "rounds": 10}
    comparisons = [{"dtype": "float32", "batch": 8, "rows": rows}]
    return {"schema": 1, "model": model, "comparisons": comparisons} | where | fields


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The lines of the pictures that are drawn."""
    seen: list[Any] = []
    for name, place in (("accuracy_throughput", 1), ("speed_up", 2)):
        real = getattr(plots, name)

        def watch(*args: Any, real: Any = real, place: int = place, **more: Any) -> None:
            seen.append(args[place])
            real(*args, **more)

        monkeypatch.setattr(plots, name, watch)
    return seen


def stored(tmp_path: Path, **results: Any) -> list[str]:
    for name, result in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    return [str(tmp_path / f"{name}.json") for name in results]


def test_stored_evaluations_are_drawn(tmp_path: Path, drawn: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    names = stored(
        tmp_path,
        plain=evaluation("vit_b16", [0, 8, {"mean": 4, "inflection": -1.0}, [20, 0]]),
        half=evaluation("vit_b16", [0, 16], device="another"),
        other=evaluation("deit_s16", [0]),
    )
    status, out, err = run(capsys, "plot", *names, "-o", str(tmp_path / "a.png"))
    assert (status, out, err) == (0, "", f"written to {tmp_path}/a.png\n")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (lines,) = drawn
    assert list(lines) == ["vit_b16, plain", "vit_b16, half", "deit_s16"]
    assert [point.label for point in lines["vit_b16, plain"]] == ["r = 0", "r = 8", "r = 4,-1", "r = [20,0]"]
    assert lines["vit_b16, plain"][1] == ("r = 8", 101.0, 79.0, 8.0, (78.0, 80.0))


def test_stored_benchmarks_are_drawn(tmp_path: Path, drawn: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    (name, *_) = stored(tmp_path, bench=benchmark("vit_b16", [0, 8, 16]))
    assert run(capsys, "plot", name, "-o", str(tmp_path / "a.pdf"))[0] == 0
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    ((_, line),) = drawn[0]["float32"].items()
    assert line == [(0, 1.0, 1.5), (8, 2.0, 1.5), (16, 3.0, 1.5)]


def test_accuracy_is_drawn_over_the_throughput_of_a_benchmark(
    tmp_path: Path, drawn: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    names = stored(tmp_path, eval=evaluation("vit_b16", [0, 8, 13]), bench=benchmark("vit_b16", [0, 8, 16]))
    assert run(capsys, "plot", *names, "-o", str(tmp_path / "a.png"))[0] == 0
    ((label, points),) = drawn[0].items()
    assert label == "vit_b16, float32, batch 8"
    assert [(point.label, point.throughput, point.accuracy) for point in points] == [
        ("r = 0", 1100.0, 80.0),  # the fastest of ours; timm's is another model
        ("r = 8", 1101.0, 79.0),
    ]


def test_what_cannot_be_drawn_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, other, empty, alone = stored(
        tmp_path,
        good=evaluation("vit_b16", [0]),
        other=benchmark("deit_s16", [0]),
        empty=benchmark("vit_b16", [], comparisons=[]),
        alone=benchmark("vit_b16", [8]),
    )
    (tmp_path / "table.json").write_text("r  tokens\n")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "plain.json").write_text('{"model": 1}')
    target = str(tmp_path / "a.png")
    for arguments, says in (
        ((), "Missing argument"),
        ((good,), "Missing option '-o'"),
        ((str(tmp_path / "none.json"), "-o", target), "none.json"),
        ((good, "-o", str(tmp_path / "a.xyz")), ".png, .svg or .pdf"),
        ((good, "-o", "/nowhere/a.png"), "no directory /nowhere"),
        ((good, other, "-o", target), "good is of vit_b16, and there is a benchmark of deit_s16 alone"),
        ((empty, "-o", target), "no row"),
        ((good, alone, "-o", target), "no r of which both accuracy and throughput are known"),
        *(((str(tmp_path / f"{name}.json"), "-o", target), "is no result") for name in ("table", "list", "plain")),
    ):
        status, out, err = run(capsys, "plot", *arguments)
        assert (status, out, len(err.splitlines())) == (2, "", 1), err
        assert says in err
    assert not (tmp_path / "a.png").exists()


def test_the_result_that_eval_writes_is_drawn(
    digits: Path, tmp_path: Path, drawn: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "eval.json"
    run(capsys, "eval", "--data", str(digits), "--model", PLAIN, "--r", "0", "2,-1", "-o", str(out))
    assert run(capsys, "plot", str(out), "-o", str(tmp_path / "a.png"))[0] == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["r"] for row in rows] == [0, {"mean": 2, "inflection": -1.0}]
    assert [(point.label, point.throughput, point.accuracy) for point in drawn[0][PLAIN]] == [
        (f"r = {r}", row["images_per_second"], row["top1"]["value"]) for r, row in zip(("0", "2,-1"), rows, strict=True)
    ]
