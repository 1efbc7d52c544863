"""Batches in flight: the order of what comes of them, and that tasks give the same with one as without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tomevit
from tests.helpers import PLAIN
from tomevit.tasks import demo
from tomevit.tasks.classify import Answer, answers
from tomevit.tasks.embed import embed
from tomevit.tasks.evaluate import evaluate
from tomevit.tasks.launching import batches_in_flight, launch_ahead, launch_timed, read_back, to_device


class Work:
    """Batches 0, 1, … that note when they are read, launched and answered, and may fail at each."""

    def __init__(self, count: int, fails: str = "", error: type[BaseException] = OSError) -> None:
        self.count, self.fails, self.error = count, fails, error
        self.log: list[str] = []

    def _note(self, what: str, i: int) -> None:
        if f"{what} {i}" == self.fails:
            raise self.error(self.fails)
        self.log.append(f"{what} {i}")

    def batches(self) -> Iterator[int]:
        for i in range(self.count):
            self._note("read", i)
            yield i

    def launch(self, i: int) -> Callable[[], int]:
        self._note("launch", i)

        def wait() -> int:
            self._note("answer", i)
            return i

        return wait

    def run(self, in_flight: int) -> list[int]:
        found: list[int] = []
        with pytest.raises(self.error, match=self.fails) if self.fails else nullcontext():
            found.extend(launch_ahead(self.batches(), self.launch, in_flight=in_flight))
        return found


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("in_flight", [0, 1, 2])
def test_answers_come_in_order(count: int, in_flight: int) -> None:
    work = Work(count)
    assert work.run(in_flight) == list(range(count))
    for i in range(count):
        at = work.log.index(f"answer {i}")
        assert sum(each.startswith("launch") for each in work.log[:at]) == min(i + 1 + in_flight, count)


@pytest.mark.parametrize("in_flight", [0, 1])
@pytest.mark.parametrize("error", [OSError, RuntimeError, ValueError])
@pytest.mark.parametrize("where", ["read", "launch"])
def test_what_was_launched_before_a_failure_is_answered(where: str, error: type[Exception], in_flight: int) -> None:
    assert Work(5, f"{where} 3", error).run(in_flight) == [0, 1, 2]


def test_nothing_comes_behind_an_answer_that_fails() -> None:
    work = Work(5, "answer 2", ValueError)
    assert work.run(1) == [0, 1]
    assert work.log[-1] == "launch 3"


def test_an_interrupt_ends_at_once() -> None:
    assert Work(5, "read 3", KeyboardInterrupt).run(1) == [0, 1]


class OnGPU:
    """What a tensor on the way to a GPU and back is asked for."""

    def __init__(self, log: list[Any]) -> None:
        self.log, self.device = log, torch.device("cuda")

    def pin_memory(self) -> OnGPU:
        self.log.append("pinned")
        return self

    def to(self, device: Any, *, non_blocking: bool) -> OnGPU:
        self.log.append((str(device), non_blocking))
        return self


class Event:
    """A CUDA event of which all are recorded in one log."""

    log: list[Any]

    def __init__(self, enable_timing: bool = False) -> None:
        self.timing = enable_timing

    def record(self, stream: Any) -> None:
        self.log.append(("recorded", stream))

    def synchronize(self) -> None:
        self.log.append("waited")

    def elapsed_time(self, end: Event) -> float:
        assert (self.timing, end.timing) == (True, True)
        return 1500.0


def test_a_gpu_is_not_waited_for_until_an_answer_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []
    gpu, image = torch.device("cuda"), OnGPU(log)
    images: Any = image
    Event.log = log
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    assert to_device(images, gpu) is images
    result, seconds = launch_timed(lambda: log.append("called"), gpu)
    assert result is None
    wait = read_back(images)
    assert log == [
        "pinned",
        ("cuda", True),
        ("recorded", "stream of cuda"),
        "called",
        ("recorded", "stream of cuda"),
        ("cpu", True),
        ("recorded", "stream of cuda"),
    ]
    assert seconds() == 1.5
    assert wait() == [images]
    assert log[7:] == ["waited", "waited"]
    assert (batches_in_flight(gpu), batches_in_flight(torch.device("cpu"))) == (1, 0)


@pytest.fixture(scope="module")
def model() -> tomevit.VisionTransformer:
    return tomevit.create(PLAIN, pretrained=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Nineteen digits, and a file that is none."""
    root = tmp_path_factory.mktemp("digits")
    for i, image in enumerate(demo.held_out()[0][:19]):
        Image.fromarray(image[0].numpy()).save(root / f"{i:02}.png")
    (root / "07a.png").write_bytes(b"no image")
    return sorted(map(str, root.glob("*.png")))


@pytest.fixture
def one_in_flight(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def change() -> None:
        for task in ("classify", "embed", "evaluate"):
            module = import_module(f"tomevit.tasks.{task}")  # a function of the same name may hide it
            monkeypatch.setattr(module, "batches_in_flight", lambda _: 1)

    return change


def test_tasks_give_the_same_with_a_batch_in_flight(
    model: tomevit.VisionTransformer, files: list[str], tmp_path: Path, one_in_flight: Callable[[], None]
) -> None:
    def everything(out: Path) -> list[Any]:
        told: list[Answer] = list(answers(model, files, r=8, compare=True, batch=4))
        steps: list[tuple[int, int]] = []
        evaluated = evaluate(
            model, files, [0] * len(files), [0, 8], batch=4, progress=lambda step: steps.append(step[0:3:2])
        )
        shown: list[int] = []
        embed(model, files, out, batch=4, progress=lambda _, done, __: shown.append(done))
        rows = [(row.top1, row.top5, row.agreement) for row in evaluated.rows]
        timeless = [answer._replace(seconds=None, seconds_unmerged=None) for answer in told]
        return [timeless, rows, evaluated.unreadable, steps, shown, out.read_bytes()]

    expected = everything(tmp_path / "a.safetensors")
    one_in_flight()
    assert everything(tmp_path / "b.safetensors") == expected


def test_interrupted_tasks_go_on_with_a_batch_in_flight(
    model: tomevit.VisionTransformer, files: list[str], tmp_path: Path, one_in_flight: Callable[[], None]
) -> None:
    whole = evaluate(model, files, [0] * len(files), [0, 8], batch=4)
    embed(model, files, tmp_path / "whole.safetensors", batch=4)
    one_in_flight()

    def interrupt(done: int) -> None:
        if done >= 8:
            raise KeyboardInterrupt

    state, out = tmp_path / "state", tmp_path / "out.safetensors"
    first = evaluate(
        model, files, [0] * len(files), [0, 8], batch=4, state=state, progress=lambda step: interrupt(step.done)
    )
    assert (first.interrupted, first.evaluated + len(first.unreadable)) == (True, 8)
    again = evaluate(model, files, [0] * len(files), [0, 8], batch=4, state=state)
    assert (again.resumed, again.complete, again.unreadable) == (8, True, whole.unreadable)
    assert [row.top1 for row in again.rows] == [row.top1 for row in whole.rows]
    with pytest.raises(KeyboardInterrupt):
        embed(model, files, out, batch=4, progress=lambda _, done, __: interrupt(done))
    assert len(list(Path(f"{out}.parts").glob("*.safetensors"))) == 2
    embed(model, files, out, batch=4)
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
