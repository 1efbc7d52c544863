"""Ways to run a model on a device: optimized, compiled, in graphs, by several threads, until memory ends."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

import tomevit
from tests.helpers import images_for, relative_error, tiny
from tomevit.deploy.optimize import compile_blocks
from tomevit.measure.bench import bench, candidates, compare
from tomevit.models import VisionTransformer

pytestmark = pytest.mark.gpu
R = (0, 8, 4, (6, -0.5))
#: The first is what most calls have; a last one of a data set is smaller.
BATCHES = (8, 8, 3, 1, 8)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def whole(model: VisionTransformer) -> nn.Module:
    return torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=False)


def by_block(model: VisionTransformer) -> nn.Module:
    model = copy.deepcopy(model)
    compile_blocks(model)
    return model


def optimized(model: VisionTransformer) -> nn.Module:
    return tomevit.optimize(model)


def eager(model: VisionTransformer) -> nn.Module:
    return tomevit.optimize(model, compiled=False)


def fused(model: VisionTransformer) -> nn.Module:
    if model.device.type != "cuda" or find_spec("triton") is None:
        pytest.skip("needs CUDA and Triton")
    return tomevit.optimize(model, fused_merge=True)


WAYS = (eager, by_block, whole, optimized, fused)
each_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


def model_on(device: torch.device, **fields: object) -> VisionTransformer:
    return tiny(**{"layer_scale": 0.5} | fields).to(device)


def answers(model: VisionTransformer, images: Tensor) -> dict[tuple[object, int], Tensor]:
    """What the plain model says, at every r, of every batch."""
    with torch.inference_mode():
        return {(r, batch): model(images[:batch], r=r) for r in R for batch in set(BATCHES)}


@each_way
def test_it_answers_alike_at_several_r_and_batches(
    device: torch.device, way: Callable[[VisionTransformer], nn.Module]
) -> None:
    model = model_on(device)
    images = images_for(model, 8).to(device)
    expected, ready = answers(model, images), way(model)
    with torch.inference_mode():
        for _ in range(2):  # the second time as captured
            for r in R:
                for batch in BATCHES:
                    found = ready(images[:batch], r=r)
                    assert relative_error(found, expected[r, batch]) < 1e-4, (r, batch)


@each_way
def test_answers_stay_as_they_were_given(device: torch.device, way: Callable[[VisionTransformer], nn.Module]) -> None:
    """A graph answers in the same memory each time: what was given out must not change with the next call."""
    if way is whole:
        pytest.skip("torch's own wrapper")
    model = model_on(device)
    first, second = (images_for(model, 4, seed=seed).to(device) for seed in (1, 2))
    ready = way(model)
    with torch.inference_mode():
        for _ in range(3):
            held = ready(first, r=8)
            kept = held.clone()
            ready(second, r=8)
            ready(second[:2], r=8)
            assert torch.equal(held, kept)


def programs() -> int:
    """How many programs torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def test_a_last_smaller_batch_costs_no_program_of_its_own(gpu: torch.device) -> None:
    model = model_on(gpu)
    images = images_for(model, 8).to(gpu)
    ready = tomevit.optimize(model)
    with torch.inference_mode():
        expected = model(images, r=8)
        ready(images, r=8)
        before = programs()
        assert before > 0
        for batch in (3, 1, 7):
            assert relative_error(ready(images[:batch], r=8), expected[:batch]) < 1e-4
        assert programs() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_optimized_in_each_dtype(device: torch.device, dtype: torch.dtype) -> None:
    model = model_on(device)
    images = images_for(model).to(device)
    with torch.inference_mode():
        expected = model(images, r=0)
        half = tomevit.optimize(copy.deepcopy(model).to(dtype))
        found = half(images.to(half.dtype), r=0)
        assert relative_error(found.float(), expected) < (1e-4 if dtype == torch.float32 else 0.1)
        assert half(images.to(half.dtype), r=8).isfinite().all()


@pytest.mark.parametrize("way", [eager, by_block, optimized, fused], ids=lambda way: way.__name__)
def test_several_threads_at_several_r(device: torch.device, way: Callable[[VisionTransformer], nn.Module]) -> None:
    model = model_on(device)
    images = images_for(model, 8).to(device)
    expected, ready = answers(model, images), way(model)
    gate = threading.Barrier(4)

    def run(which: int) -> float:
        worst = 0.0
        gate.wait()
        with torch.inference_mode():
            for turn in range(12):
                r, batch = R[(which + turn) % len(R)], BATCHES[(which + 2 * turn) % len(BATCHES)]
                found = ready(images[:batch], r=r)
                worst = max(worst, relative_error(found, expected[r, batch]))
        return worst

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(run, range(4))) < 1e-4


def test_a_thread_of_its_own_for_the_first_call_and_for_the_second(device: torch.device) -> None:
    model = model_on(device)
    images = images_for(model, 4).to(device)
    ready = tomevit.optimize(model)

    def run() -> Tensor:
        with torch.inference_mode():
            return ready(images, r=8)

    found = []
    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(run).result())
    assert all(relative_error(each, model(images, r=8)) < 1e-4 for each in found)


def test_a_graph_reads_weights_that_were_loaded_later(device: torch.device) -> None:
    model = tiny().to(device)
    images = images_for(model).to(device)
    ready, other = tomevit.optimize(model), tiny(seed=5).to(device)
    with torch.inference_mode():
        ready(images, r=8)
    ready.load_state_dict(other.state_dict())
    with torch.inference_mode():
        assert relative_error(ready(images, r=8), other(images, r=8)) < 1e-4


@each_way
def test_memory_stays_flat(gpu: torch.device, way: Callable[[VisionTransformer], nn.Module]) -> None:
    model = model_on(gpu)
    images = images_for(model, 8).to(gpu)
    ready = way(model)

    def run() -> int:
        with torch.inference_mode():
            for r in R:
                for batch in BATCHES:
                    ready(images[:batch], r=r)
        gc.collect()
        torch.cuda.synchronize(gpu)
        return torch.cuda.memory_allocated(gpu)

    run()
    first = run()
    for _ in range(5):
        last = run()
    assert last <= first


def test_training_memory_stays_flat(gpu: torch.device) -> None:
    model = model_on(gpu).train()
    images = images_for(model, 8).to(gpu)
    optimizer = torch.optim.AdamW(tomevit.param_groups(model, lr=1e-5))
    taken = []
    for step in range(8):
        model(images, r=R[step % 3]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize(gpu)
        taken.append(torch.cuda.memory_allocated(gpu))
    assert taken[-1] <= taken[3]


def test_merging_takes_less_memory_in_training(gpu: torch.device) -> None:
    model = tiny(img_size=(128, 128), embed_dim=96).to(gpu).train()
    images = images_for(model, 8).to(gpu)
    peaks = []
    for r in (0, 256):
        model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats(gpu)
        model(images, r=r).square().mean().backward()
        peaks.append(torch.cuda.max_memory_allocated(gpu))
    assert peaks[1] < 0.8 * peaks[0]


def test_a_device_that_is_full(gpu: torch.device) -> None:
    """The batch and the device are named; a smaller batch runs right after."""
    model = tiny().to(gpu)
    total = torch.cuda.get_device_properties(gpu).total_memory
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved(gpu) + 2**28
    torch.cuda.set_per_process_memory_fraction(room / total, gpu)
    try:
        with torch.inference_mode():
            result = compare(candidates(model, [8]), model, batch=2**16, rounds=1)
            assert result.rows == []
            assert f"a batch of {2**16} does not fit into the memory of cuda" in result.note
        with pytest.raises(ValueError, match="does not fit into the memory"):
            bench(model, [8], batch=2**16, rounds=1)
        with torch.inference_mode():
            assert model(images_for(model, 2).to(gpu), r=8).isfinite().all()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, gpu)
        torch.cuda.empty_cache()


def test_the_last_device(gpu: torch.device) -> None:
    """A model that is not on the current device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    model = model_on(last)
    images = images_for(model, 4).to(last)
    with torch.inference_mode():
        expected = model(images, r=8)
        for way in WAYS:
            assert relative_error(way(model)(images, r=8), expected) < 1e-4


def test_deterministic_mode(device: torch.device) -> None:
    model = model_on(device).train()
    images = images_for(model, 4).to(device)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS asks for a variable of the environment
    try:
        found = []
        for _ in range(3):
            loss = model(images, r=8).square().mean()
            found.append(torch.autograd.grad(loss, list(model.parameters())))
    finally:
        torch.use_deterministic_algorithms(before)
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
