"""`python -m benchmarks.gpu` without a GPU: its queue, what it keeps when it is cut off, its slices of tests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as programme
from benchmarks.gpu import rows as measures
from benchmarks.gpu.device_tests import run_tests
from benchmarks.gpu.page import _figure as figure_of
from benchmarks.gpu.page import speed_up, write_page
from benchmarks.gpu.rows import ANCHOR, Inference, Kernels, Skipped, Training, key_of, queue
from benchmarks.gpu.slices import read_records
from benchmarks.gpu.store import ROWS, Store, open_store

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SETTING = {"device": "a test", "torch": "1"}


def later(seconds: float) -> float:
    return time.monotonic() + seconds


class Stand:
    """A row that does what a test says."""

    def __init__(self, name: str, answer: Any = None, kind: str = "stand") -> None:
        self.name, self.answer, self.kind, self.calls = name, answer, kind, 0

    def __getitem__(self, _: slice) -> list[str]:
        return [self.name]

    def measure(self, device: torch.device, *, small: bool) -> dict[str, Any]:
        self.calls += 1
        if isinstance(self.answer, BaseException):
            raise self.answer
        if isinstance(self.answer, float):
            time.sleep(self.answer)
        return {"times": {}}


def statuses(store: Store) -> dict[str, str]:
    return {key.removeprefix("Stand "): row["status"] for key, row in store.rows.items()}


@pytest.fixture(autouse=True)
def _no_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of no known length take no time."""
    monkeypatch.setattr(programme, "guess", lambda kind: 0.0)


# --------------------------------------------------------------------------------------------------------- the whole


def start(out: Path) -> subprocess.Popen[str]:
    options = ["--device", "cpu", "--small", "--part", "tables", "--minutes", "8", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_it_is_killed_and_goes_on(tmp_path: Path) -> None:
    with start(tmp_path) as first:
        assert first.stdout is not None
        for line in first.stdout:
            if "reference eager 2" in line:
                break
        first.kill()
    before = (tmp_path / ROWS).read_text().splitlines()
    assert len(before) >= 8
    second = start(tmp_path)
    told, _ = second.communicate(timeout=400)
    assert second.returncode == 0, told
    after = (tmp_path / ROWS).read_text().splitlines()
    assert after[: len(before)] == before, "a row was measured again"
    _, *rows = map(json.loads, after)
    assert [row["key"] for row in rows] == [key_of(row) for row in queue(small=True)]
    wrong = [row for row in rows if row["status"] not in ("done", "skipped")]
    assert wrong == []
    assert {row["reason"].partition(": ")[2] for row in rows if row["status"] == "skipped"} == {"on a GPU only"}
    page = (tmp_path / "page.md").read_text()
    for heading in ("## Merge efficiency", "### Training steps", "## Kernels", "## Images", "## Not measured"):
        assert heading in page
    assert "to try the programme: no figures" in page
    assert len(list(tmp_path.iterdir())) == 2, "no draft stays"


def test_terminated_it_writes_its_page(tmp_path: Path) -> None:
    with start(tmp_path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("done"):
                break
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "waiting" in (tmp_path / "page.md").read_text()


def test_the_queue_is_in_order_and_has_each_row_once() -> None:
    for small in (False, True):
        keys = [key_of(row) for row in queue(small=small)]
        assert len(set(keys)) == len(keys)
    rows = queue(small=False)
    assert rows[0] == Inference("ViT-B/16, batch 256", "vit_b16", 224, "bfloat16", 256, "timm", "eager", 0)
    order = [(type(row).__name__, getattr(row, "model", ""), getattr(row, "dtype", "")) for row in rows]
    order = [each for each in dict.fromkeys(order) if each[0] != "Kernels"]
    inference = [each[1:] for each in order if each[0] == "Inference"]
    assert inference == [
        *((name, "bfloat16") for name in ("vit_b16", "vit_l16", "vit_s16", "vit_h14", "swag_l16_512")),
        *(("vit_b16", dtype) for dtype in ("float16", "tf32", "float32")),
    ]
    assert {row.batch for row in rows if isinstance(row, Inference) and row.model == "vit_b16"} == {256, 128, 32, 8, 1}
    assert {row.mode for row in rows if isinstance(row, Inference)} == {
        *("eager", "whole", "max-autotune", "optimized", "fused")
    }
    assert {(row.model, row.checkpointing) for row in rows if isinstance(row, Training)} == {
        (name, checkpointing) for name in ("vit_b16", "vit_l16") for checkpointing in (False, True)
    }
    assert {row.step for row in rows if isinstance(row, Kernels)} == {"match and merge", "merge", "attention"}


# --------------------------------------------------------------------------------------------------------- one by one


def test_a_row_that_fails_is_stored_and_the_others_are_measured(tmp_path: Path) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
    rows = [Stand("a"), Stand("b", full), Stand("c", Skipped("no such thing")), Stand("d")]
    store = Store(tmp_path, SETTING)
    programme.run_rows(rows, store, CPU, later(60))
    assert statuses(store) == {"a": "done", "b": "failed", "c": "skipped", "d": "done"}
    assert store.rows["Stand b"]["reason"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    again, told = open_store(tmp_path, SETTING)
    assert (again.rows, told) == (store.rows, "")
    programme.run_rows(rows, again, CPU, later(60))
    assert [row.calls for row in rows] == [1, 1, 1, 1]
    programme.run_rows(rows, again, CPU, later(60), again=True)
    assert [row.calls for row in rows] == [1, 2, 2, 1]


def test_only_a_row_that_fits_is_begun(tmp_path: Path) -> None:
    store = Store(tmp_path, SETTING)
    rows = [Stand("a", 1.0, "long"), Stand("b", 1.0, "long"), Stand("c", None, "short")]
    programme.run_rows(rows[:1], store, CPU, later(60))
    said = programme.run_rows(rows, store, CPU, later(1))
    assert statuses(store) == {"a": "done", "c": "done"}
    assert said == "2 of 3 rows are there; 1 would take longer than is left"
    programme.run_rows(rows, store, CPU, later(60))
    assert statuses(store)["b"] == "done"


def test_time_that_ends_in_a_row_is_remembered(tmp_path: Path) -> None:
    store, row = Store(tmp_path, SETTING), Stand("a", 9.0)
    programme.run_rows([row], store, CPU, later(0.3))
    assert statuses(store) == {"a": "unfinished"}
    programme.run_rows([row], store, CPU, later(0.3))
    assert row.calls == 1, "it is begun with more time only"
    programme.run_rows([row], store, CPU, later(2.5))
    assert statuses(store) == {"a": "failed"}
    assert re.fullmatch(r"not finished in \d s", store.rows["Stand a"]["reason"])


def test_a_lost_device_ends_the_process_and_not_the_run(tmp_path: Path) -> None:
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    rows, store = [Stand("a", lost), Stand("b")], Store(tmp_path, SETTING)
    with pytest.raises(programme.DeviceLostError, match="illegal memory access"):
        programme.run_rows(rows, store, CPU, later(60))
    programme.run_rows(rows, Store(tmp_path, SETTING), CPU, later(60))
    assert [row.calls for row in rows] == [1, 1]


def test_another_setting_has_a_folder_of_its_own(tmp_path: Path) -> None:
    programme.run_rows([Stand("a")], Store(tmp_path, SETTING), CPU, later(60))
    newer = SETTING | {"torch": "2"}
    store, told = open_store(tmp_path, newer)
    assert store.folder == tmp_path / "2"
    assert told == f"{tmp_path} has rows of torch 1, and this is 2: these go to {tmp_path / '2'}"
    programme.run_rows([Stand("b")], store, CPU, later(60))
    assert open_store(tmp_path, newer)[0].rows.keys() == {"Stand b"}
    assert open_store(tmp_path, SETTING)[0].rows.keys() == {"Stand a"}


def test_each_way_of_a_kernel_fails_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def bad() -> torch.Tensor:
        raise NotImplementedError("not on this device")

    ways = {"good": lambda: torch.ones(1), "bad": bad}
    monkeypatch.setattr(measures.kernels, "merges", lambda *_: ways)
    found = Kernels("", "merge", "float32", 1, 9, 1, 2).measure(CPU, small=True)
    assert found["times"].keys() == {"good"}
    assert found["failed"] == {"bad": "NotImplementedError: not on this device"}


# ------------------------------------------------------------------------------------------------------------- the page


def stored(row: Inference, over_anchor: float, flop_ratio: float = 1.0) -> tuple[str, dict[str, Any]]:
    noise = [1.0, 1.02, 0.98, 1.01, 0.99, 1.0, 1.03, 0.97]
    times = {row.candidate: [each / over_anchor for each in noise], ANCHOR: noise[::-1]}
    return key_of(row), {"status": "done", "times": times, "flop_ratio": flop_ratio, "reason": ""}


def test_efficiency_is_over_the_fastest_that_merges_nothing() -> None:
    def row(*candidate: Any) -> Inference:
        return Inference("ViT-B", "vit_b16", 224, "bfloat16", 256, *candidate)

    timm, ours, merged = row("timm", "whole", 0), row("tomevit", "optimized", 0), row("tomevit", "fused", 8)
    rows = dict([stored(timm, 1.25), stored(ours, 1.1), stored(merged, 2.0, 2.0)])
    page = write_page(SETTING, [timm, ours, merged], rows, "Tests on the device: 3 passed.")
    line = next(line for line in page.splitlines() if line.startswith("| vit_b16 224 bfloat16 b256 | 8 |"))
    assert "timm whole, r=0 | tomevit fused, r=8" in line
    assert "| 1.60 (" in line  # 2 / 1.25
    assert "| 0.800 (" in line
    assert "1.10 to 1.17 where FLOPs say 1.34" in line
    assert "3 passed" in page
    best, fastest = figure_of(timm, rows[key_of(timm)]), figure_of(merged, rows[key_of(merged)])
    assert best is not None
    assert fastest is not None
    ratio, interval = speed_up(fastest, best)
    assert interval is not None
    assert interval[0] < ratio < interval[1]
    alone = speed_up(fastest, None)[1]
    assert alone is not None
    assert interval[1] / interval[0] > alone[1] / alone[0], "two errors are more than one"


# ---------------------------------------------------------------------------------------------------- tests on a device


TESTS = """
import os, time, pytest
pytestmark = pytest.mark.gpu
def test_good(): pass
def test_bad(): assert os.path.exists({flag!r})
def test_crash():
    if not os.path.exists({flag!r}): os._exit(77)
def test_after(): pass
def test_elsewhere(): pytest.skip("needs two GPUs")
"""


def test_tests_that_passed_are_not_run_again(tmp_path: Path) -> None:
    tests, out, flag = tmp_path / "tests", tmp_path / "out", tmp_path / "mended"
    tests.mkdir()
    (tests / "test_some.py").write_text(TESTS.format(flag=str(flag)))
    said = run_tests(out, later(120), tests=tests, overhead=0)
    assert "1 failed, 1 not finished, 2 passed, 1 skipped" in said, (out / "tests.txt").read_text()
    assert "test_crash" in said
    assert "needs two GPUs" in (out / "tests.txt").read_text()
    before = len(read_records(out / "tests.jsonl"))
    flag.touch()
    assert "4 passed, 1 skipped." in run_tests(out, later(120), tests=tests, overhead=0)
    again = [each["test"].partition("::")[2] for each in read_records(out / "tests.jsonl")[before:]]
    assert list(dict.fromkeys(again)) == ["test_elsewhere", "test_bad", "test_crash"]


@pytest.mark.soak
def test_time_ends_the_tests_too(tmp_path: Path) -> None:
    (tmp_path / "test_long.py").write_text(
        "import time, pytest\npytestmark = pytest.mark.gpu\n"
        "@pytest.mark.parametrize('n', range(60))\ndef test_one(n): time.sleep(1)\n"
    )
    begun = time.monotonic()
    said = run_tests(tmp_path / "out", later(8), tests=tmp_path, overhead=1)
    assert time.monotonic() - begun < 30
    assert "passed" in said or "none has run" in said


def collected(*options: str) -> list[str]:
    """What pytest finds in tests/gpu, without the packages that a machine with a GPU may lack."""
    without = ["hypothesis", "timm", "onnx", "onnxruntime", "openvino", "torchvision"]
    hide = f"import sys; sys.modules.update(dict.fromkeys({without}))"
    arguments = ["tests/gpu", "--collect-only", "-q", "--confcutdir", "tests/gpu", "-o", "addopts=", *options]
    child = subprocess.run(
        [sys.executable, "-c", f"{hide}; import pytest; sys.exit(pytest.main({arguments}))"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode in (0, 5), child.stdout + child.stderr
    return [line for line in child.stdout.splitlines() if "::" in line]


def test_the_tests_for_a_gpu_are_there_and_marked() -> None:
    marked = collected("-m", "gpu")
    assert len(marked) > 300
    assert {name.partition("::")[0] for name in marked} == {
        f"tests/gpu/{path.name}" for path in (ROOT / "tests/gpu").glob("test_*.py")
    }
    assert collected("-m", "not gpu") == []
