"""What the time of a forward pass goes to: what the device can do, measured, against the work there is, counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tomevit import private
from tomevit.config import Config
from tomevit.layers import backends
from tomevit.layers.packed import PackedLinear, can_pack
from tomevit.layers.uninitialised import linear
from tomevit.measure.timing import seconds, seconds_of_host
from tomevit.models import build

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")  # and every kind of attention
COPIED = 2**27  # bytes: more than a cache holds
REPEATS = 3

#: What to do, by what binds.
ADVICE = {
    "arithmetic": "merging saves arithmetic, so that a larger r gives nearly what its FLOPs promise",
    "memory": "a compiled model moves less between its operators (--mode compiled)",
    "launches": "a larger batch, a compiled model or a captured graph starts fewer operators for each image "
    "(--mode compiled, or whole)",
    "allocation": "freed memory goes back to the system and is fetched again on every call; glibc keeps it with "
    "MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 in the environment, and a smaller batch needs less",
    "none of them": "no single limit explains it: look at a profile, at what else runs, and at the number of threads",
}


SHARES = ("arithmetic", "memory", "launches", "allocation")


class Bounds(NamedTuple):
    """The time that each kind of work would take alone, as a share of the time measured.

    All are estimates. They may overlap, as on a device that computes while it loads, and then sum to more than 1.
    """

    arithmetic: float  # matrix products, at the rate they reach alone in the model's own shapes
    memory: float | None  # reading all weights once, and what the other operators read and write; None: not counted
    launches: float | None  # starting operators; None: not counted
    allocation: float | None  # memory that the system hands out anew on every call; None: not on this device or system
    rate: float  # of those products, in multiply-adds per second
    bandwidth: float  # of a large copy, in bytes read and written per second

    @property
    def bound_by(self) -> str:
        """The largest share, if it is at least a third: a key of ADVICE."""
        largest = max(self.shares, key=lambda kind: self.shares[kind])
        return largest if self.shares[largest] >= 1 / 3 else "none of them"

    @property
    def shares(self) -> dict[str, float]:
        """Those that are known, by their names."""
        shares = {name: getattr(self, name) for name in SHARES}
        return {name: share for name, share in shares.items() if share is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name} {100 * share:.0f} %" for name, share in self.shares.items())


class Limits:
    """What a device can do, each measured once, when it is first asked for."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._rates: dict[tuple[Any, ...], float] = {}

    def rate(self, config: Config, tokens: int, dtype: torch.dtype) -> float:
        """Multiply-adds per second that the linear layers of a block reach alone, packed or not, for so many tokens."""
        key = (config.embed_dim, config.mlp_hidden, config.mlp, tokens, dtype, torch.get_float32_matmul_precision())
        if key not in self._rates:
            dim, hidden = config.embed_dim, config.mlp_hidden
            first = 2 * hidden if config.mlp == "swiglu" else hidden
            layers = []
            for width, out in ((dim, 3 * dim), (dim, dim), (dim, first), (hidden, dim)):
                layer = linear(width, out, bias=False, device=self.device, dtype=dtype).requires_grad_(False)
                nn.init.normal_(layer.weight)
                layers.append(layer)
            inputs = [torch.randn(tokens, layer.in_features, device=self.device, dtype=dtype) for layer in layers]
            ways: list[Sequence[nn.Linear]] = [layers]
            if can_pack(layers[0].weight):
                ways.append([PackedLinear(layer, math.inf) for layer in layers])

            def products(layers: Sequence[nn.Linear]) -> None:
                for layer, x in zip(layers, inputs, strict=True):
                    layer(x)

            with torch.inference_mode():
                calls = [without_launches(partial(products, way), self.device) for way in ways]
                best = min(map(self._best, calls))
            self._rates[key] = tokens * sum(layer.weight.numel() for layer in layers) / best
        return self._rates[key]

    @cached_property
    def bandwidth(self) -> float:
        """Bytes per second that a large copy reads and writes."""
        source = torch.zeros(COPIED, dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        return 2 * COPIED / self._best(lambda: target.copy_(source))

    @cached_property
    def overhead(self) -> float:
        """Seconds that an operator takes on the host, Python included, in a model that computes next to nothing."""
        small = Config(img_size=(4, 4), patch_size=1, embed_dim=8, depth=4, num_heads=1, num_classes=1)
        model, image, times = build(small, r=1).eval(), torch.zeros(1, 3, 4, 4, device="cpu"), 20

        def forwards() -> None:
            for _ in range(times):
                model(image)

        with torch.inference_mode():
            best = self._best(forwards)
        counted = _count_operators(lambda: model(image))
        assert counted is not None  # who asks has counted others
        return best / times / counted.operators

    @cached_property
    def fault(self) -> float:
        """Seconds that the system takes to hand out a page of memory."""
        target = torch.empty(COPIED, dtype=torch.uint8, device="cpu")
        before = _page_faults()
        fresh = seconds(lambda: target.fill_(1))
        faults = _page_faults() - before
        return max(0.0, fresh - self._best(lambda: target.fill_(1))) / max(1, faults)

    def _best(self, call: Callable[[], object]) -> float:
        """The least time of several runs, which is what the device can do; a run before them does not count."""
        call()
        return min(seconds(call, self.device) for _ in range(REPEATS))


def without_launches(call: Callable[[], object], device: torch.device, pool: Any = None) -> Callable[[], object]:
    """The same call; on CUDA as a captured graph, since small products take less time than starting them does.

    Args:
        call: that can be captured, in the inference mode in which it is to run.
        device: where it runs.
        pool: of `torch.cuda.graph_pool_handle`, in which calls share their memory that never run at the same time.
    """
    if device.type != "cuda":
        return call
    with torch.cuda.device(device):
        call()  # libraries allocate their workspace on first use, which capture does not allow
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            call()
    return graph.replay


def bounds(
    forward: Callable[[], object],
    measured: float,
    limits: Limits,
    *,
    config: Config,
    dtype: torch.dtype,
    flops: int,
    tokens: int,
    weights: int | None,
) -> Bounds:
    """What a forward pass's time goes to.

    Args:
        forward: the pass.
        measured: the seconds it takes.
        limits: of its device.
        config, dtype: the model's.
        flops: multiply-adds in the whole batch.
        tokens: in the whole batch, on average over the blocks.
        weights: bytes of all weights; None if operators cannot be counted, because the pass is compiled.
    """
    rate, memory, launches, allocation = limits.rate(config, tokens, dtype), None, None, None
    counted = None if weights is None else _count_operators(forward)
    if weights is not None and counted is not None:
        memory = (weights + counted.moved) / limits.bandwidth / measured
        launches = counted.operators * limits.overhead / measured
    with torch.inference_mode():
        if limits.device.type == "cpu" and resource is not None:
            before = _page_faults()
            for _ in range(REPEATS):  # the allocator does not do the same on every call
                forward()
            allocation = (_page_faults() - before) / REPEATS * limits.fault / measured
        elif limits.device.type != "cpu":
            # Better than an estimate: how long the host alone is busy.
            launches = min(seconds_of_host(forward, limits.device) for _ in range(REPEATS)) / measured
    return Bounds(flops / rate / measured, memory, launches, allocation, rate, limits.bandwidth)


def _page_faults() -> int:
    """That this process has had so far, without reading from a disk."""
    assert resource is not None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class _Count:
    """The operators that run, and the bytes read and written by those that are no matrix products."""

    def __init__(self) -> None:
        self.operators = 0
        self.moved = 0

    def add(self, operator: Any, tensors: Sequence[Tensor]) -> None:
        self.operators += 1
        name = operator.overloadpacket.__name__
        if not operator.is_view and name not in PRODUCTS and "attention" not in name:
            # An expanded tensor has more elements than there are in memory.
            self.moved += sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)


def _count_operators(call: Callable[[], object]) -> _Count | None:
    """What runs in a call; None if this torch does not show it."""
    count = _Count()
    watch = private.watch_operators(count.add)
    if watch is None:
        return None
    with torch.no_grad(), watch:
        call()
    return count


def faster_dtype(limits: Limits, config: Config, dtype: torch.dtype, tokens: int) -> str | None:
    """A sentence on the dtype whose matrix products are clearly faster here, if it is another one.

    Args:
        limits: of the device.
        config: the model's.
        dtype: what was chosen.
        tokens: to multiply by the weights; a few hundred are enough.
    """
    others = (torch.float32, torch.bfloat16) if limits.device.type == "cpu" else (torch.bfloat16,)
    rates = {other: limits.rate(config, tokens, other) for other in {dtype, *others}}
    best = max(rates, key=lambda other: rates[other])
    factor = rates[best] / rates[dtype]
    if factor < 1.2:
        return None
    names = [str(each).removeprefix("torch.") for each in (best, dtype)]
    why = ""
    if limits.device.type == "cpu" and dtype == torch.bfloat16 and dtype in backends.EMULATED:
        why = "; this processor has no instructions for bfloat16"
    return f"matrix products are {factor:.1f} times faster here in {names[0]} than in {names[1]}{why}"
