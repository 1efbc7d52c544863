"""Graphs for each r and batch, with a driver that captures and replays on a CPU."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

import tomevit
from tests.helpers import images_for, relative_error, tiny
from tomevit.deploy.graphs import GraphedCalls
from tomevit.deploy.optimize import compile_whole


class FakeDriver:
    """Replays by calling again, into the same memory, and notices turns that overlap."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.captured: list[int] = []  # images in each
        self.replays = self.finished = 0
        self.somebody_captures = self.in_turn = False
        self.lacks_memory: Callable[[], bool] = lambda: False
        self.answers: list[weakref.ref[Tensor]] = []

    def is_capturing(self) -> bool:
        return self.somebody_captures

    def capture(self, call: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        assert not self.in_turn
        if self.lacks_memory():
            raise RuntimeError("CUDA out of memory.\nMore lines.")
        answer = call()
        self.captured.append(len(answer))
        self.answers.append(weakref.ref(answer))

        def replay() -> None:
            assert self.in_turn
            self.replays += 1
            with torch.inference_mode(False), torch.no_grad():
                answer.copy_(call())

        return replay, answer

    @contextmanager
    def turn(self) -> Iterator[None]:
        assert not self.in_turn, "two replays at a time, in memory that they share"
        self.in_turn = True
        yield
        self.in_turn = False

    def finish(self) -> None:
        self.finished += 1


class Case:
    """A model whose calls go through graphs, and the same one plain."""

    def __init__(self, most: int = 32, **fields: Any) -> None:
        self.plain = tiny(4, depth=3, **fields)
        self.model = copy.deepcopy(self.plain).eval().requires_grad_(False)
        self.images = images_for(self.plain).repeat(4, 1, 1, 1)
        self.images += torch.randn(self.images.shape)
        self.drivers: list[FakeDriver] = []
        self.called: list[int] = []  # images of each call of the program

        def program(images: Tensor, r: list[int | str]) -> Tensor:
            self.called.append(len(images))
            return self.model(images, r)

        self.call = GraphedCalls(self.model, program, self._driver, most)

    def _driver(self, device: torch.device) -> FakeDriver:
        self.drivers.append(FakeDriver(device))
        return self.drivers[-1]

    @property
    def driver(self) -> FakeDriver:
        return self.drivers[-1]

    def check(self, batch: int, r: Any = None) -> Tensor:
        with torch.inference_mode():
            answer, expected = self.call(self.images[:batch], r), self.plain(self.images[:batch], r)
        assert answer.shape == expected.shape
        assert relative_error(answer, expected) < 1e-5
        return answer


def test_each_r_and_batch_is_captured_once() -> None:
    case = Case()
    for r in (0, 4, [8, 0, 3], 4, 0, [4, 4, 4]):
        case.check(4, r)
    assert case.driver.captured == [4, 4, 4]
    assert case.driver.replays == 6
    case.check(6, 4)
    assert case.driver.captured == [4, 4, 4, 6]
    with pytest.raises(ValueError, match="r"):
        case.call(case.images[:4], -1)


def test_an_r_keeps_the_matchings_that_it_names() -> None:
    case = Case()
    schedules: list[Any] = [[4, 4], [4, "4 pitome"], [4, "3+1 diffrate"], ["grid", 4], "1.3x", "1.3x late diffrate"]
    answers = [case.check(4, r) for r in schedules]
    assert case.driver.captured == [4] * len(schedules), "what drops and what merges by another matching was mistaken"
    for i, answer in enumerate(answers):
        assert all(relative_error(answer, other) > 1e-4 for other in answers[:i])
    case.check(4, [4, "4 pitome", 0])
    case.check(4, case.model.plain("1.3x late diffrate"))
    assert len(case.driver.captured) == len(schedules)


def test_an_answer_stays_when_the_next_call_comes() -> None:
    case = Case()
    first = case.check(4)
    kept = first.clone()
    case.images = case.images.flip(0)
    case.check(4)
    assert torch.equal(first, kept)


def test_a_last_smaller_batch_is_padded() -> None:
    case = Case()
    for _ in range(3):  # three times over data of 8, 8 and 3 images, at two r
        for batch in (8, 8, 3):
            for r in (0, 4):
                case.check(batch, r)
    assert case.driver.captured == [8, 8]
    for _ in range(3):
        case.check(5)  # more than half
    assert case.driver.captured == [8, 8]


def test_small_batches_in_a_row_get_a_graph_of_their_own() -> None:
    case = Case()
    for batch in (8, 1, 1, 1, 8, 1, 2):
        case.check(batch)
    assert case.driver.captured == [8, 1]
    case.check(2)
    assert case.driver.captured == [8, 1, 2]


def test_the_graph_that_was_not_called_for_longest_goes() -> None:
    case = Case(most=2)
    for batch, captured in ((4, [4]), (6, [4, 6]), (4, [4, 6]), (8, [4, 6, 8]), (4, [4, 6, 8]), (5, [4, 6, 8])):
        case.check(batch)
        assert case.driver.captured == captured
    assert case.driver.finished == 1, "memory was given back that the device may still have used"
    gc.collect()
    assert [ref() is None for ref in case.driver.answers] == [False, True, False]


def test_several_threads_call_at_several_r() -> None:
    case = Case()
    schedules: list[Any] = [0, 4, 8, [8, 0, 3]]
    with torch.inference_mode():
        expected = {(i, n): case.plain(case.images[:n], r) for i, r in enumerate(schedules) for n in (3, 6)}
    barrier = threading.Barrier(4)

    def work(number: int) -> None:
        barrier.wait()
        for turn in range(12):
            i, n = (number + turn) % 4, 3 if turn % 5 == number else 6
            with torch.inference_mode():
                assert relative_error(case.call(case.images[:n], schedules[i]), expected[i, n]) < 1e-5

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert case.driver.replays == 48
    assert len(case.drivers) == 1


def test_new_weights_are_read_and_moved_ones_drop_the_graphs() -> None:
    case = Case()
    case.check(4)
    new = {name: tensor * 0.5 for name, tensor in case.plain.state_dict().items()}
    for each in (case.plain, case.model):
        each.load_state_dict(new)
    case.check(4)
    assert case.driver.captured == [4]
    first, driver = case.driver.answers[0], case.driver
    for each in (case.plain, case.model):
        each.double()
    case.images = case.images.double()
    case.check(4)
    gc.collect()
    assert first() is None
    assert driver.finished == 1
    assert [each.captured for each in case.drivers] == [[4], [4]]
    for each in (case.plain, case.model):
        each.blocks[0].mlp.fc1 = nn.Sequential(each.blocks[0].mlp.fc1, nn.Tanh())
    case.check(4)
    case.model.blocks[0].norm1.weight = nn.Parameter(case.model.blocks[0].norm1.weight * 1, requires_grad=False)
    case.check(4)
    assert [each.captured for each in case.drivers] == [[4]] * 4


def test_what_graphs_cannot_do_goes_to_the_program() -> None:
    case = Case()
    case.check(4)
    replays, images = case.driver.replays, case.images[:4]
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            case.call(images)
        case.model.train()
        case.call(images)
        case.model.eval()
        case.driver.somebody_captures = True
        case.call(images)
        case.driver.somebody_captures = False
        assert case.call(images[:0]).shape == (0, case.plain.config.num_classes)
        with pytest.raises(ValueError, match="images"):
            case.call(images[..., 1:])
        with FlopCounterMode(display=False) as counter:
            case.call(images)
        assert counter.get_total_flops() > 0
    learning = images.clone().requires_grad_()
    case.call(learning).sum().backward()
    assert learning.grad is not None
    case.model.head.weight.requires_grad_()
    case.call(images).sum().backward()
    assert case.model.head.weight.grad is not None
    assert case.driver.replays == replays
    case.model.requires_grad_(False)
    meta = Case()
    meta.model.to("meta")
    assert meta.call(images.to("meta")).device.type == "meta"
    case.call(images)  # gradients are on, and nothing asks for them
    assert case.driver.replays == replays + 1


def test_settings_that_change_kernels_have_graphs_of_their_own() -> None:
    case = Case()
    case.check(4)
    try:
        torch.set_float32_matmul_precision("high")
        case.check(4)
    finally:
        torch.set_float32_matmul_precision("highest")
    case.check(4)
    assert case.driver.captured == [4, 4]


def test_hooks_and_matchings_of_ones_own_are_called_each_time() -> None:
    case, seen = Case(), []
    case.model.blocks[1].register_forward_hook(lambda *_: seen.append("block"))
    case.check(4)
    case.check(4)
    assert seen == ["block"] * 2

    def matching(key: Tensor, r: int, num_prefix: int) -> Any:
        seen.append("matching")
        return tomevit.layers.bipartite_soft_matching(key, r, num_prefix)

    seen.clear()
    case = Case(matching=matching)
    case.check(4)
    called = len(seen)
    case.check(4)
    assert len(seen) == 2 * called > 0


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no rule for its attention on CPUs
def test_transforms_and_wrapped_weights_take_the_program() -> None:
    case = Case()
    case.check(4)
    with torch.no_grad():
        each = torch.func.vmap(lambda image: case.call(image[None])[0])(case.images[:4])
        assert relative_error(each, case.plain(case.images[:4])) < 1e-5
    for model in (case.plain, case.model):
        weight = model.head.weight.detach()
        model.head.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    with torch.no_grad():
        for _ in range(2):
            assert isinstance(case.call(case.images[:4]), TwoTensor)
    assert [driver.replays for driver in case.drivers] == [1]


def test_without_memory_for_a_graph_the_program_answers(caplog: pytest.LogCaptureFixture) -> None:
    case = Case()
    case.check(4)
    case.driver.lacks_memory = lambda: True
    case.check(6)
    case.check(6)
    assert [record.message for record in caplog.records] == [
        "no CUDA graph for 6 images at r = [4, 4, 4]: CUDA out of memory."
    ]
    assert len(case.drivers) == 2, "the other graphs hold memory"
    case.check(4)
    assert case.driver.captured == [4]
    assert case.called[-3:] == [6, 4, 4]


@pytest.fixture
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_follows_an_r_that_names_matchings() -> None:
    plain, driver = tiny(depth=2, pool="avg"), FakeDriver()
    model = copy.deepcopy(plain).eval().requires_grad_(False)
    assert compile_whole(model, backend="eager", driver=lambda _: driver)
    images, schedules = images_for(plain), [["4+3 diffrate", "4 pitome"], ["grid"], "1.2x late", "1.2x pitome"]
    with torch.inference_mode():
        for r in schedules * 2:
            assert relative_error(model(images, r=r), plain(images, r)) < 1e-5
    assert driver.captured == [len(images)] * len(schedules)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_is_replayed_and_its_copies_are_plain() -> None:
    plain, drivers = tiny(4, depth=2), []
    model = copy.deepcopy(plain).eval().requires_grad_(False)

    def make(device: torch.device) -> FakeDriver:
        drivers.append(FakeDriver(device))
        return drivers[-1]

    assert compile_whole(model, backend="eager", driver=make)
    images = images_for(plain)
    with torch.inference_mode():
        for r in (4, 0, 4):
            assert relative_error(model(images, r=r), plain(images, r)) < 1e-5
        assert drivers[-1].captured == [len(images)] * 2
        for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
            assert relative_error(same(images), plain(images)) < 1e-5
        assert drivers[-1].replays == 3
        with FlopCounterMode(display=False) as counter:
            model(images)
        with FlopCounterMode(display=False) as of_plain:
            plain(images)
        assert counter.get_total_flops() == of_plain.get_total_flops() > 0
        expected = {r: plain(images, r) for r in (0, 2, 4, 8)}

    def call(r: int) -> float:
        return relative_error(model(images, r).detach(), expected[r])

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(call, [0, 2, 4, 8] * 4)) < 1e-5
    assert drivers[-1].captured == [len(images)] * 4
    replays = drivers[-1].replays
    program = torch.export.export(model, (images,))
    assert relative_error(program.module()(images), plain(images)) < 1e-5
    assert drivers[-1].replays == replays
