"""Several processes agree, and where they do not, the first one says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tomevit.cli import main
from tomevit.cli.running import own_device
from tomevit.data import distributed as processes
from tomevit.data.distributed import OtherProcessError, broadcast_from_rank0, fail_together, require_same


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, others: str | None = None, first: Any = None) -> None:
    """This one is one of two; what goes wrong in the other, and what the first one sends."""

    def gather(into: list[Any], value: Any) -> None:
        into[rank], into[1 - rank] = value, others

    def broadcast(values: list[Any], src: int) -> None:
        assert src == 0
        if rank:
            values[0] = first

    monkeypatch.setattr(processes, "processes", lambda: (rank, 2))
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)


@pytest.mark.parametrize("of", ["no folder", ""])
@pytest.mark.parametrize(
    ("rank", "fails", "others", "raises", "says"),
    [
        (0, True, None, ValueError, "{}"),
        (0, True, "no folder", ValueError, "{}"),
        (1, True, None, OtherProcessError, "{}"),
        (1, True, "no GPU", OtherProcessError, "no GPU"),
        (0, False, "no GPU", ValueError, "process 1: no GPU"),
        (1, False, "no folder", OtherProcessError, "no folder"),
    ],
)
def test_of_several_processes_the_first_says_what_is_wrong(
    of: str, rank: int, fails: bool, others: str | None, raises: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call() -> str:
        if fails:
            raise ValueError(of)
        return "ready"

    as_process(monkeypatch, rank, others)
    with pytest.raises(raises) as caught:
        fail_together(call)
    assert type(caught.value) is raises
    assert str(caught.value) == says.format(of)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_each_has_and_what_the_first_has(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    as_process(monkeypatch, rank, first="of the first")
    assert fail_together(lambda: "mine") == "mine"
    calls: list[int] = []
    assert broadcast_from_rank0(lambda: calls.append(rank) or "of the first") == "of the first"
    assert calls == [0] * (rank == 0)


def test_settings_must_be_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"weights": "abc", "r": 8, "data": "x"}
    require_same(settings)  # alone
    as_process(monkeypatch, 1, first=settings)
    require_same(settings)
    with pytest.raises(OtherProcessError, match=r"^other weights and data than in the first process$"):
        require_same({"weights": "abd", "r": 8, "data": "y"})


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
