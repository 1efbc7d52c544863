"""The tests marked gpu, in slices, in processes of their own: a crash or a lost device ends one of these alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS, OUTPUT, RECORDS = ROOT / "tests" / "gpu", "tests.txt", "tests.jsonl"
#: Seconds that pytest takes to begin and to end.
OVERHEAD = 15.0


def run_tests(folder: Path, until: float, *, tests: Path = TESTS, overhead: float = OVERHEAD) -> str:
    """Run what has not passed yet, until it is over or time is; its output goes to tests.txt in the folder.

    Args:
        folder: of this setting.
        until: of time.monotonic().
        tests: the folder of tests, all of them marked gpu.
        overhead: seconds that pytest takes beside the tests.

    Returns:
        A sentence.
    """
    if find_spec("pytest") is None:
        return "Tests on the device: pytest is not installed."
    folder.mkdir(parents=True, exist_ok=True)
    records, name = (folder / RECORDS).absolute(), str(time.time_ns())
    # Neither this project's other fixtures nor anybody's plugins: they may need packages that are not there.
    command = [sys.executable, "-m", "pytest", str(tests), "-m", "gpu", "-v", "-rfEs", "--tb=short"]
    command += ["--confcutdir", str(tests), "-p", "benchmarks.gpu.slices", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=", "-o", "filterwarnings=default"]
    before = -1
    while (left := until - time.monotonic() - overhead) > 0 and (after := _size(records)) != before:
        before = after
        told = {"records": str(records), "slice": name, "seconds": left}
        variables = {"TOMEVIT_GPU_SLICE": json.dumps(told), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with (folder / OUTPUT).open("ab") as output:
            try:
                ended = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=os.environ | variables,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=left + overhead,
                )
            except subprocess.TimeoutExpired:
                break
        if ended.returncode in (0, 1, 5):  # all passed, some failed, none was left
            break
    return told_of_tests(folder)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def told_of_tests(folder: Path) -> str:
    """What became of the tests so far, in sentences."""
    if find_spec("pytest") is None or not (folder / RECORDS).exists():
        return "Tests on the device: none has run."
    from benchmarks.gpu.slices import read_records

    last = {each["test"]: each["outcome"] for each in read_records(folder / RECORDS)}
    outcomes = [outcome.replace("started", "not finished") for outcome in last.values()]
    counts = ", ".join(f"{outcomes.count(each)} {each}" for each in sorted(set(outcomes)))
    wrong = [f"`{test}`" for test, outcome in last.items() if outcome in ("failed", "started")]
    return f"Tests on the device: {counts}." + (f" Not passed: {', '.join(wrong)}." if wrong else "")
