"""A model as it runs fastest on its device."""

from __future__ import annotations

import ctypes
import math
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from inspect import signature
from itertools import chain, cycle, takewhile
from typing import Any, TypeVar, cast

import torch
from torch import nn

from tomevit import private
from tomevit.deploy.graphs import Driver, GraphedCalls, cuda_driver
from tomevit.layers import Block, backends
from tomevit.layers.mlp import LayerScale
from tomevit.layers.packed import MOST_ROWS, PackedLinear, can_pack
from tomevit.models import VisionTransformer, unwrap_transformer

K = TypeVar("K", bound=Hashable)
L = TypeVar("L", bound=nn.Module)

#: Products of so many rows are timed, with weights packed and as they are: those of an image, of merged ones, of many.
ROWS = (128, 512, 1536)
ROUNDS = 5

#: mallopt's numbers in glibc's malloc.h, and what they are set to.
KEEP_FREED_MEMORY = {-1: 2**31 - 1, -4: 0}  # M_TRIM_THRESHOLD, M_MMAP_MAX: never return, never map

FOLDED = "LayerScale folded into the layers before it"
WIDENED = {
    dtype: f"float32: this processor emulates {str(dtype).removeprefix('torch.')}"
    for dtype in (torch.bfloat16, torch.float16)
}
FUSED = "matching and merging in two Triton kernels"
GRAPHS = "captured as one CUDA graph for each r and batch, into which smaller batches are padded"
LASTING = {FOLDED, *WIDENED.values(), FUSED}  # what a copy of an optimized model still has


@torch.inference_mode(False)  # tensors made in that mode do not tell when new weights are written into them
def optimize(
    model: nn.Module,
    *,
    compiled: bool | None = None,
    packed: bool | None = None,
    fused_merge: bool = False,
    keep_memory: bool = False,
) -> VisionTransformer:
    """A copy for inference, as it runs fastest where the model is; its `optimizations` say what was done.

    Exact but for rounding: LayerScale is folded into the layer before it, except in float16, whose small numbers end
    too soon, and half precision becomes float32 on processors that have no instructions for it. The copy takes the same
    calls, any r among them, and can be saved.

    Args:
        model: on the device and in the dtype that it is to run in, in a wrapper of torch's or not.
        compiled: through torch.compile; None: on a GPU. There the whole model, captured as a CUDA graph for each r and
            batch, which any number of threads call (`tomevit.deploy.graphs`); calls of the model alone, not of
            `forward_features`, and a copy of the copy is not compiled. Hooks must be there before. On a CPU all blocks
            but the first and the last, with shapes left open, so that one program serves every r; the other two would
            be programs of their own, and of a model of two blocks none is compiled.
        packed: keep a second copy of the blocks' weights in the order in which oneDNN multiplies by them. None: for
            products of as many rows as are faster so, timed on the spot with the model's own layers, if nothing is
            compiled. True: of fewer than 1024 rows, those of a small batch or of merged tokens. It rounds otherwise
            than torch's own product: say True or False where two runs must agree to the bit.
        fused_merge: match and merge in two Triton kernels (`tomevit.layers.triton_merge`), on a GPU.
        keep_memory: on a CPU under glibc, have the process keep the memory that it frees: large activations that go
            back to the system are fetched again, page by page, in every call. It holds for the whole process, whatever
            else runs in it, and for good: so it is done on request alone.

    Raises:
        ValueError: it is no VisionTransformer, or fused merges or packed weights were asked for where they cannot run.
        ImportError: it was asked for without Triton.
    """
    model = deepcopy(unwrap_transformer(model)).eval().requires_grad_(False)
    device, dtype = model.device, model.dtype
    done = [each for each in model.optimizations if each in LASTING]
    _unpack(model)
    if device.type == "cpu" and dtype in backends.EMULATED:
        model.float()
        done.append(WIDENED[dtype])
    if model.config.layer_scale is not None and model.dtype != torch.float16 and _fold_layer_scale(model):
        done.append(FOLDED)
    if fused_merge and FUSED not in done:
        _fuse_merge(model)
        done.append(FUSED)
    compiled = device.type == "cuda" if compiled is None else compiled
    if compiled and packed:
        raise ValueError("packed weights are not for compiled models: choose one of the two")
    if compiled and (programs := _compile(model)):
        done.append(programs)
    elif packed is not False and (gain := _pack(model, required=packed is True)):
        done.append(f"weights packed: {gain}")
    if keep_memory and device.type == "cpu" and _keep_freed_memory():
        done.append("freed memory kept by the process")
    model.optimizations = tuple(done)
    return model


def _fold_layer_scale(model: VisionTransformer) -> bool:
    """Multiply each LayerScale into the layer before it; False, and nothing done, where one is not plain."""
    pairs = [pair for b in _blocks(model) for pair in ((b.attn.proj, b.ls1), (b.mlp.fc2, b.ls2))]
    if not all(private.is_plain(layer, nn.Linear) and private.is_plain(scale, LayerScale) for layer, scale in pairs):
        return False
    for layer, scale in cast("list[tuple[nn.Linear, LayerScale]]", pairs):
        # float32 keeps half precision from being rounded twice.
        gamma = scale.gamma.to(torch.promote_types(scale.gamma.dtype, torch.float32))
        layer.weight.copy_(layer.weight * gamma[:, None])
        layer.bias.copy_(layer.bias * gamma)
    for block in _blocks(model):
        block.ls1, block.ls2 = nn.Identity(), nn.Identity()
    model.config = replace(model.config, layer_scale=None)
    model.card = replace(model.card, config=model.config)
    return True


def _pack(model: VisionTransformer, *, required: bool) -> str:
    """Pack the blocks' weights for as many rows as are faster so, and say what that gives; nothing, if none are."""
    found = ([each for each in _linears(block, nn.Linear) if can_pack(each[-1].weight)] for block in _blocks(model))
    blocks = [[(*each, PackedLinear(each[-1])) for each in block] for block in found if block]
    if required:
        if not blocks:
            raise ValueError(
                f"weights cannot be packed here: that is for float32 on x86 processors, and for bfloat16 on those that "
                f"have instructions for it; the model is {model.dtype} on {model.device}"
            )
        most, gain = float(MOST_ROWS), f"products of up to {MOST_ROWS} rows"
    else:
        gains = _gains([[pair for _, _, *pair in block] for block in blocks]) if blocks else {}
        faster = list(takewhile(lambda rows: gains[rows] > 1, gains))
        if not faster:
            return ""
        # Half way, in ratio, to the least number for which they were not faster.
        most = math.inf if len(faster) == len(ROWS) else math.sqrt(faster[-1] * ROWS[len(faster)])
        gain = f"products of {', '.join(f'{rows} rows {gains[rows]:.2f}' for rows in faster)} times as fast"
    for parent, name, _, packed in chain(*blocks):
        packed.most_rows = most
        setattr(parent, name, packed)
    return gain


def _gains(blocks: Sequence[Sequence[Sequence[nn.Linear]]]) -> dict[int, float]:
    """How many times as fast products of ROWS rows are, through layers that are given for each block, plain and packed.

    In every call through those of another block: in a model, too, a weight is no longer in the cache when it is needed.
    """
    calls: dict[tuple[int, int], Callable[[], None]] = {}
    for rows in ROWS:
        x = {layer.in_features: layer.weight.new_zeros(rows, layer.in_features) for layer, _ in chain(*blocks)}
        for way in (0, 1):
            # The modules' forward, since their hooks would be called.
            runs = [[partial(pair[way].forward, x[pair[way].in_features]) for pair in block] for block in blocks]
            calls[rows, way] = partial(_run_next, cycle(runs))
    with torch.inference_mode():
        times = _median_seconds(calls)
    return {rows: times[rows, 0] / times[rows, 1] for rows in ROWS}


def _median_seconds(calls: Mapping[K, Callable[[], None]]) -> dict[K, float]:
    """The median time of each call. They take turns, so that what slows the machine for a while slows all of them."""
    times: dict[K, list[float]] = {key: [] for key in calls}
    for _ in range(1 + ROUNDS):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            times[key].append(time.perf_counter() - start)
    return {key: statistics.median(taken[1:]) for key, taken in times.items()}  # the first call warms up


def _run_next(runs: Iterator[Sequence[Callable[[], object]]]) -> None:
    for run in next(runs):
        run()


def _unpack(model: VisionTransformer) -> None:
    for block in _blocks(model):
        for parent, name, layer in _linears(block, PackedLinear):
            setattr(parent, name, layer.unpacked())


def _linears(block: Block, kind: type[L]) -> list[tuple[nn.Module, str, L]]:
    """A block's layers of this very kind, each as parent, name and layer; not those that somebody has run otherwise."""
    return [
        (parent, name, layer)
        for parent in (block.attn, block.mlp)
        for name, layer in parent.named_children()
        if type(layer) is kind and "forward" not in vars(layer)
    ]


def _fuse_merge(model: VisionTransformer) -> None:
    if model.device.type != "cuda" or model.config.matching != "bipartite":
        raise ValueError(
            f"the fused merge is bipartite matching on a GPU, and this model has {model.config.matching!r} on "
            f"{model.device}"
        )
    from tomevit.layers.triton_merge import match_and_merge_fused

    for block in _blocks(model):
        block.bipartite = match_and_merge_fused


def _compile(model: VisionTransformer) -> str:
    """Compile as suits the device, and say what was done; nothing, if nothing was."""
    if model.device.type != "cpu":
        captured = compile_whole(model)
        return "compiled whole, " + (GRAPHS if captured else "one program for each r and batch")
    return "compiled block by block, one program for every r" if compile_blocks(model) else ""


def compile_whole(
    model: VisionTransformer,
    mode: str = "default",
    *,
    backend: str | Callable[..., Any] = "inductor",
    driver: Callable[[torch.device], Driver | None] = cuda_driver,
) -> bool:
    """Compile calls of a model, in place, shapes fixed, and capture them as graphs where the device has such.

    Of its methods this is `__call__` alone: `forward_features` and the others run as they did.

    Args:
        model: in evaluation mode, on its device.
        mode: of torch.compile, without graphs of torch's own: "default", or "max-autotune-no-cudagraphs", which
            compiles for minutes.
        backend: of torch.compile.
        driver: of graphs.

    Returns:
        Whether calls are captured.
    """
    model.compile(mode=mode, backend=backend, dynamic=False, **_many_programs(isolate=True))
    if driver(model.device) is None:
        return False
    return private.wrap_compiled_call(model, lambda program: GraphedCalls(model, program, driver))


def compile_blocks(model: VisionTransformer) -> int:
    """Compile, in place, the blocks between the first and the last: one program, or two where some calls have r = 0.

    Returns:
        How many those are.
    """
    between = _blocks(model)[1:-1]
    for block in between:
        block.compile(dynamic=True, **_many_programs(isolate=False))  # isolated they would not share their program
    return len(between)


def _many_programs(*, isolate: bool) -> dict[str, Any]:
    """Past 8 programs torch.compile gives up in silence, and models share that number; torch 2.6 cannot be told."""
    asked = {"recompile_limit": 1024, "isolate_recompiles": isolate}
    return {name: value for name, value in asked.items() if name in signature(torch.compile).parameters}


def _blocks(model: VisionTransformer) -> list[Block]:
    return cast("list[Block]", list(model.blocks))


def _keep_freed_memory() -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(parameter, value) for parameter, value in KEEP_FREED_MEMORY.items())
