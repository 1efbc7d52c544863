"""Several processes agree, and where they do not, the first one says why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tomevit.cli import main
from tomevit.cli.running import own_device
from tomevit.data.distributed import OtherProcessError, broadcast_from_rank0, fail_together, require_same

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes under torchrun got (tests/agreeing.py)."""
    folder = tmp_path_factory.mktemp("agreeing")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, "-m", "tests.agreeing", str(folder)], cwd=ROOT, check=True, capture_output=True)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("of", ["no folder", ""])
def test_of_several_processes_the_first_says_what_is_wrong(of: str, found: list[dict[str, Any]]) -> None:
    first, second = found
    assert (first[f"none {of}"], second[f"none {of}"]) == (["", "ready 0"], ["", "ready 1"])
    for which, said in (("first", of), ("both", of), ("second", f"process 1: {of}")):
        assert first[f"{which} {of}"] == ["ValueError", said]
        assert second[f"{which} {of}"] == ["OtherProcessError", of]


def test_what_the_first_has_is_made_there_alone(found: list[dict[str, Any]]) -> None:
    assert [each["broadcast"] for each in found] == [["", "of the first"]] * 2
    assert [each["calls"] for each in found] == [[0], []]
    assert [each["world"] for each in found] == [2, 2]


def test_settings_must_be_the_same(found: list[dict[str, Any]]) -> None:
    said = "other weights and data than in the first process"
    assert [each["same"] for each in found] == [["", None]] * 2
    assert found[0]["other"] == ["ValueError", f"process 1: {said}"]
    assert found[1]["other"] == ["OtherProcessError", said]


def test_a_process_alone_agrees_with_itself() -> None:
    assert fail_together(lambda: "mine") == broadcast_from_rank0(lambda: "mine") == "mine"
    require_same({"weights": "abc"})


def test_what_another_says_is_not_said_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def elsewhere(*_: Any, **__: Any) -> None:
        raise OtherProcessError("no folder")

    monkeypatch.setattr("tomevit.cli.cli.main", elsewhere)
    with pytest.raises(SystemExit) as stop:
        main(["list"])
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("gpus", "name"), [(4, "cuda:2"), (3, None)])
def test_each_process_has_a_gpu_of_its_own(gpus: int, name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("tomevit.cli.running.device_of", lambda name: name)
    assert own_device("cpu") == "cpu"
    assert own_device("cuda:1") == "cuda:1"
    if name is None:
        with pytest.raises(ValueError, match="there are 4 processes on this machine and 3 GPUs; start one for each"):
            own_device("cuda")
    else:
        assert own_device("cuda") == name
