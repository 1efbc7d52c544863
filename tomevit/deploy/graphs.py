"""CUDA graphs of a compiled model, one for each r and batch, which any number of threads replay.

torch.compile captures graphs too (mode "reduce-overhead"), but keeps them by thread: a call from a second one ends in
an assertion (pytorch/pytorch, issue 123177).
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tomevit import private
from tomevit.layers import backends
from tomevit.models import VisionTransformer
from tomevit.schedule import Schedule, entries

log = logging.getLogger("tomevit")

#: Graphs that a model keeps; the one that was not called for longest goes first.
MOST_GRAPHS = 32
#: Calls before one is captured: the first compiles, and libraries prepare themselves.
WARMUP = 2


class Driver(Protocol):
    """What capturing takes of a device; tests have one without a GPU."""

    def is_capturing(self) -> bool:
        """Whether the caller's own work is being captured, by somebody else."""

    def capture(self, call: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """What replays the call, and the memory that its answer is in each time.

        Raises:
            RuntimeError: the call cannot be captured, or there is too little memory.
        """

    def turn(self) -> AbstractContextManager[object]:
        """What the caller's stream is given in this block runs behind what others were given in theirs."""

    def finish(self) -> None:
        """Wait until the device has done all turns."""


class CudaDriver:
    """Graphs on one CUDA device that share their memory, since they never run at the same time."""

    #: Of all models: torch has one capture at a time in a process.
    _one_capture = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()

    def is_capturing(self) -> bool:
        with torch.cuda.device(self._device):
            return torch.cuda.is_current_stream_capturing()

    def capture(self, call: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        # The second context gives the caller's stream back where a capture fails, which torch.cuda.graph does not.
        with self._one_capture, torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream()):
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                for _ in range(WARMUP):
                    call()
            graph = torch.cuda.CUDAGraph()
            # It waits for the device first. Only what this thread does is forbidden while it captures.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
                answer = call()
        return graph.replay, answer

    @contextmanager
    def turn(self) -> Iterator[None]:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done.record(stream)

    def finish(self) -> None:
        self._done.synchronize()


def cuda_driver(device: torch.device) -> Driver | None:
    """The driver of a device; None if it has no CUDA graphs."""
    return CudaDriver(device) if device.type == "cuda" else None


class _Setting(NamedTuple):
    """What decides, beside the batch, which kernels a program consists of."""

    schedule: tuple[int | str, ...]  # entries of a list that is an r
    tf32: bool  # in products of float32
    deterministic: bool

    @classmethod
    def of(cls, schedule: tuple[int | str, ...]) -> _Setting:
        products = torch.backends.cuda.matmul
        # Torch 2.8 has no fp32_precision; later ones raise at allow_tf32 where both names were used to set it.
        tf32 = products.fp32_precision == "tf32" if hasattr(products, "fp32_precision") else products.allow_tf32
        return cls(schedule, tf32, torch.are_deterministic_algorithms_enabled())


@dataclass
class _Graph:
    replay: Callable[[], object]
    images: Tensor  # (B, C, H, W), which it reads
    answer: Tensor  # (B, …), which it writes
    sparse: bool = False  # its last call filled less than half of it


def _addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Where each lies; for those that only stand for others, a number that is another for another tensor."""
    return [tensor.data_ptr() if type(tensor) in (nn.Parameter, Tensor) else id(tensor) for tensor in tensors]


class GraphedCalls:
    """Calls of a model, replayed from graphs where that gives the same.

    A batch that is smaller than one which was captured at this r is padded to it, so that the last of many compiles
    nothing. If it fills less than half, and the call before did so too, it has a graph of its own: only a single small
    batch between large ones costs as much as they do. What is larger than all is captured anew.

    Graphs read the weights where they lie, so new ones may be loaded into them. When weights were moved or replaced,
    or layers were, the next call drops all graphs. What cannot be replayed goes to the compiled program: calls in
    training mode, with gradients, under autocast or under a mode that sees every operator, as a FLOP counter does; in
    a program or a graph that somebody else records; of a model with hooks or a matching of the user's own; and what
    was once found not to be captured, for lack of memory among other reasons.

    Args:
        model: compiled, and what the program is of.
        program: takes images and a list with one entry per block.
        driver: of a device; None for those without graphs.
        most: graphs to keep.
    """

    def __init__(
        self,
        model: VisionTransformer,
        program: Callable[..., Tensor],
        driver: Callable[[torch.device], Driver | None] = cuda_driver,
        most: int = MOST_GRAPHS,
    ) -> None:
        self._model, self._program, self._make_driver, self._most = model, program, driver, most
        self._lock = threading.Lock()
        self._look = private.live_contents(model)
        self._contents: tuple[list[int], list[nn.Module]] = ([], [])
        self._driver: Driver | None = None
        self._graphs: OrderedDict[tuple[int, _Setting], _Graph] = OrderedDict()  # by batch, and what else decides
        self._refused: set[tuple[int, _Setting]] = set()

    def __call__(self, images: Tensor, r: Schedule | None = None) -> Tensor:
        schedule = entries(self._model.steps(r))
        if self._may_replay(images):
            with self._lock:
                answer = self._replay(images, schedule)
            if answer is not None:
                return answer
        return self._program(images, list(schedule))

    def _may_replay(self, images: Tensor) -> bool:
        """Whether a graph gives the same as the program, as far as the call says."""
        if torch.compiler.is_compiling() or backends.is_traced() or private.is_watched():
            return False
        model, config = self._model, self._model.config
        return (
            type(images) is Tensor
            and len(images) > 0
            and images.is_floating_point()
            and tuple(images.shape[1:]) == (config.in_chans, *config.img_size)
            and images.device == model.device
            and not model.training
            and isinstance(config.matching, str)
            and torch.amp.is_autocast_available(images.device.type)  # not on the meta device, which is not asked then
            and not torch.is_autocast_enabled(images.device.type)
        )

    def _replay(self, images: Tensor, schedule: tuple[int | str, ...]) -> Tensor | None:
        """The answer of a graph; None if there can be none."""
        tensors, layers = self._look()
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (images, *tensors)):
            return None
        if self._is_recorded_elsewhere():
            return None
        if self._contents != (_addresses(tensors), layers):
            self._begin_anew()
        if self._driver is None or self._is_recorded_elsewhere():
            return None
        graph = self._graph_for(len(images), _Setting.of(schedule), self._driver)
        if graph is None:
            return None
        with self._driver.turn(), torch.no_grad():
            graph.images[: len(images)].copy_(images)
            graph.replay()
            return graph.answer[: len(images)].clone()

    def _is_recorded_elsewhere(self) -> bool:
        return self._driver is not None and self._driver.is_capturing()

    def _begin_anew(self) -> None:
        """Look at what the model is made of now, and keep no graph of what it was."""
        if self._driver is not None:
            self._driver.finish()
        self._graphs.clear()
        self._refused.clear()
        self._look = private.live_contents(self._model)
        tensors, layers = self._look()
        self._contents = _addresses(tensors), layers
        plain = not private.has_hooks([self._model, *layers]) and not any(map(private.is_wrapped, tensors))
        self._driver = self._make_driver(self._model.device) if plain else None

    def _graph_for(self, batch: int, setting: _Setting, driver: Driver) -> _Graph | None:
        """The graph to replay, captured if need be; None if that cannot be."""
        sizes = (size for size, its in self._graphs if its == setting and size >= batch)
        if (size := min(sizes, default=None)) is not None:
            graph = self._graphs[size, setting]
            was_sparse, graph.sparse = graph.sparse, 2 * batch < size
            if not (was_sparse and graph.sparse):
                self._graphs.move_to_end((size, setting))
                return graph
        key = batch, setting
        if key in self._refused:
            return None
        try:
            graph = self._capture(batch, setting.schedule, driver)
        except RuntimeError as error:  # if the program cannot run either, it will say why
            why = str(error).partition("\n")[0]
            log.warning("no CUDA graph for %d images at r = %s: %s", batch, list(setting.schedule), why)
            refused = {*self._refused, key}
            self._begin_anew()  # they hold memory that may be what is lacking
            self._refused = refused
            return None
        self._graphs[key] = graph
        if len(self._graphs) > self._most:
            driver.finish()
            self._graphs.popitem(last=False)
        return graph

    @torch.inference_mode(False)  # one program, and memory that may be written in any mode, whatever the caller's is
    @torch.no_grad()
    def _capture(self, batch: int, schedule: tuple[int | str, ...], driver: Driver) -> _Graph:
        config = self._model.config
        images = next((graph.images for (size, _), graph in self._graphs.items() if size == batch), None)
        if images is None:
            shape = batch, config.in_chans, *config.img_size
            images = torch.zeros(shape, dtype=self._model.dtype, device=self._model.device)
        replay, answer = driver.capture(lambda: self._program(images, list(schedule)))
        return _Graph(replay, images, answer)
