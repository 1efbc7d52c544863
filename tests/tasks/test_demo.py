"""The demo and its pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import redirect_stdout
from functools import partial
from io import StringIO

import pytest
import torch

import tomevit
from tests.helpers import PLAIN, TRAINED
from tomevit.cli import demo as command
from tomevit.cli import main
from tomevit.tasks import demo, plots

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A demo at its smallest: the directory, and what was printed."""
    out = tmp_path_factory.mktemp("demo") / "deep" / "out"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setattr(command, "run", partial(demo.run, rounds=1))
        with pytest.raises(SystemExit) as stop:  # what comes twice is measured once
            main(["demo", "--model", "digits_p1", "--r", "16", "4,-1.0", "16", "0", "-o", str(out)])
    assert not stop.value.code
    return out, printed.getvalue()


def test_it_writes_pictures_and_figures(small):
    out, _ = small
    assert sorted(file.name for file in out.iterdir()) == [
        "accuracy_throughput.png",
        "merged_tokens.png",
        "results.json",
    ]
    for name in ("accuracy_throughput.png", "merged_tokens.png"):
        assert (out / name).read_bytes().startswith(PNG)


def test_results_are_measured(small):
    results = json.loads((small[0] / "results.json").read_text())
    assert results["images"] == 360
    assert {"device", "threads", "torch", "tomevit"} <= results["environment"].keys()
    plain, trained = (tomevit.create(name, pretrained=True) for name in (PLAIN, TRAINED))
    assert [row["r"] for row in results["rows"]] == [0, 16, {"mean": 4, "inflection": -1.0}]
    for row, r in zip(results["rows"], (0, 16, (4, -1.0)), strict=True):
        assert row["tokens"] == plain.token_counts(r)[-1]
        assert row["gflops_computed"] == pytest.approx(tomevit.flops(plain.config, r, computed=True) / 1e9)
        assert row["accuracy"] == {
            "off_the_shelf": demo.accuracy(plain, *demo.held_out(), r),
            "trained_with_merging": demo.accuracy(trained, *demo.held_out(), r),
        }
        assert row["images_per_second"] > 0
    first = results["rows"][0]
    for row in results["rows"]:
        assert row["flop_ratio_computed"] == pytest.approx(first["gflops_computed"] / row["gflops_computed"])
        assert row["speed_up"] == pytest.approx(row["images_per_second"] / first["images_per_second"])


def test_the_table_is_aligned_and_says_how_it_was_measured(small):
    out, printed = small
    results = json.loads((out / "results.json").read_text())
    head, *rows = [line for line in printed.splitlines() if line.startswith(("r ", "0 ", "16 ", "4,-1 "))]
    assert len(rows) == 3
    assert {len(line) for line in rows} == {len(head)}
    for part in (results["environment"]["device"], results["environment"]["torch"], "1 call", "1 thread"):
        assert part in printed


@pytest.mark.parametrize("r", [-1, 0.9, "9x", [1] * 20])
def test_a_wrong_r_ends_it_before_anything_is_written(tmp_path, r):
    with pytest.raises(ValueError, match=r"^r|r\["):
        demo.run(tmp_path / "out", (r,))
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'tomevit\[plot\]'"):
        demo.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_matplotlib_comes_late_and_pyplot_never(tmp_path):
    program = f"""
import sys
from pathlib import Path
import torch, tomevit.tasks.demo
from tomevit.tasks import plots
assert "matplotlib" not in sys.modules
image, groups = torch.zeros(1, 4, 4, dtype=torch.uint8), torch.tensor([[0, 1], [1, 1]])
plots.merged_tokens(Path({str(tmp_path / "a.png")!r}), [image], [[groups]], ["image", "merged"], ["0"], "title")
lines = {{"one": [plots.Point("r = 0", 1.0, 2.0, 1.0)], "two": [plots.Point("r = 0", 1.0, 3.0, 1.0)]}}
plots.accuracy_throughput(Path({str(tmp_path / "b.png")!r}), lines, "title", "note")
assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_accuracy_does_not_depend_on_the_batch():
    model = tomevit.create(TRAINED, pretrained=True)
    assert demo.accuracy(model, *demo.held_out(), batch=77) == demo.accuracy(model, *demo.held_out())


def test_groups_are_painted_in_their_mean_colour():
    image = torch.tensor([[[0, 10, 50, 50], [20, 30, 50, 90]]], dtype=torch.uint8)
    painted = plots.paint_groups(image, torch.tensor([[7, 3]]))
    assert painted.tolist() == [[[15, 15, 60, 60], [15, 15, 60, 60]]]
    single = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    assert torch.equal(plots.paint_groups(image, single), image.float())


def test_outlines_run_inside_the_edges_of_groups():
    whole = plots.outline(torch.zeros(2, 2, dtype=torch.int64), scale=4, width=1)
    assert whole.shape == (8, 8)
    assert not whole[1:-1, 1:-1].any()
    assert whole.sum() == 8 * 8 - 6 * 6
    halves = plots.outline(torch.tensor([[0, 1], [0, 1]]), scale=4, width=1)
    assert torch.equal(halves[:, 3:5], torch.ones(8, 2, dtype=torch.bool))
    assert halves.sum() == 2 * (8 * 4 - 6 * 2)


def test_a_group_keeps_its_colour_when_it_grows():
    image = torch.full((1, 2, 2), 255, dtype=torch.uint8)
    before = plots.draw_groups(image, torch.tensor([[0, 0], [1, 2]]))
    after = plots.draw_groups(image, torch.tensor([[5, 5], [5, 2]]))
    assert before.shape == after.shape == (3, 48, 48)
    assert torch.equal(before[:, 0, 0], after[:, 0, 0])
    assert not torch.equal(before[:, -1, 0], after[:, -1, 0])  # alone, then part of the group
    assert before[:, 10, 10].tolist() == [1, 1, 1]


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with demo.one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
