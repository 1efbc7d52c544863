"""The queue: what is measured, in which order, and how. Each row is a function of its parameters, which are its key."""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tomevit
from benchmarks import kernels
from benchmarks.reference import reference
from tomevit import VisionTransformer, private
from tomevit.data.images import stream
from tomevit.deploy.optimize import optimize
from tomevit.measure.bench import MODES, PRECISIONS, precision, timm_twin
from tomevit.measure.timing import seconds, turns
from tomevit.tasks.embed import embed
from tomevit.transform import transform

#: Of each candidate so many runs are timed, as far as they take no longer than SECONDS together.
LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 12, 50, 8.0
#: A kernel runs so often in one captured graph, so that its launch does not count.
REPEATS = 10
#: Each row of inference and training takes turns with this one, through which all rows of a table are compared.
ANCHOR = "tomevit eager, r=0"


class Skipped(Exception):  # noqa: N818  # no error: the row does not apply here, and the message says why
    """A row that cannot be measured on this machine."""


def take_turns(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, small: bool, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of every run of each call, in interleaved rounds, after those that compile and capture."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    once = sum(seconds(call, device) for call in calls.values())
    rounds = 2 if small else max(LEAST_ROUNDS, min(MOST_ROUNDS, int(SECONDS / once)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in turns(calls, rounds=rounds, warmup=0 if small else 2, device=device):
        if turn.counts:
            times[turn.key].append(turn.seconds)
    return times


@lru_cache(maxsize=1)
def model_of(name: str, img_size: int, dtype: str, device: torch.device) -> VisionTransformer:
    """A model with fresh weights; the last one is kept, since the next row is mostly of the same."""
    torch.manual_seed(0)
    return tomevit.create(name, img_size=img_size).to(device, PRECISIONS[dtype][0]).eval()


def clear() -> None:
    """Give back what a row took: compiled programs, captured graphs, memory."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------------------------------- inference


class Inference(NamedTuple):
    """One candidate, against our eager model that merges nothing."""

    section: str
    model: str
    img_size: int
    dtype: str  # a name in PRECISIONS
    batch: int
    implementation: str  # "tomevit", "timm", "reference"
    mode: str  # as in `_ready`
    r: int

    @property
    def kind(self) -> str:
        """Rows of one kind take about as long."""
        return f"inference, {self.mode}"

    def measure(self, device: torch.device, *, small: bool) -> dict[str, Any]:
        """Times of a batch, and how many FLOPs merging leaves."""
        model = model_of(self.model, self.img_size, self.dtype, device)
        images = torch.randn(
            self.batch, model.config.in_chans, *model.config.img_size, device=device, dtype=model.dtype
        )
        many = private.allow_many_programs() if self.mode != "eager" else nullcontext()
        with many, precision(self.dtype):
            forward = self._forward(model)
            calls = {self.candidate: partial(forward, images), ANCHOR: partial(model, images, r=0)}
            with torch.inference_mode():
                times = take_turns(calls, device, small=small)
        before, after = (tomevit.flops(model.config, r, computed=True) for r in (0, self.r))
        return {"times": times, "flop_ratio": before / after}

    @property
    def candidate(self) -> str:
        """As the tables name it."""
        return f"{self.implementation} {self.mode}, r={self.r}"

    def _forward(self, model: VisionTransformer) -> Callable[[Tensor], object]:
        if self.implementation == "reference":
            return partial(reference, model, r=self.r)
        if self.implementation == "timm":
            try:
                return _ready(timm_twin(model), self.mode, model.device)
            except ValueError as error:
                raise Skipped(str(error)) from error
        return partial(_ready(model, self.mode, model.device), r=self.r)


def _ready(model: nn.Module, mode: str, device: torch.device) -> nn.Module:
    """A model that runs in this way."""
    if mode == "eager":
        return model
    if device.type == "cpu":
        if mode == "optimized":
            return optimize(model, compiled=False, packed=False)
        raise Skipped(f"{mode}: on a GPU only")
    if mode == "fused":
        if find_spec("triton") is None:
            raise Skipped("Triton is not installed")
        return optimize(model, fused_merge=True)
    if mode == "max-autotune":
        compiled: Any = torch.compile(model, fullgraph=True, dynamic=False, mode="max-autotune")
        return compiled
    return MODES[mode].make(model)


def inference(section: str, model: str, img_size: int, dtype: str, batch: int, r: Sequence[int]) -> Iterator[Inference]:
    """All candidates of one setting: first those that merge nothing, of which the fastest counts."""
    row = partial(Inference, section, model, img_size, dtype, batch)
    yield row("timm", "eager", 0)
    yield row("timm", "whole", 0)
    yield row("timm", "max-autotune", 0)
    yield row("tomevit", "optimized", 0)
    for each in r:
        for mode in ("eager", "optimized", "fused"):
            yield row("tomevit", mode, each)
        yield row("reference", "eager", each)


# ------------------------------------------------------------------------------------------------------------ training


class Training(NamedTuple):
    """A training step of one candidate, against our eager one that merges nothing; bfloat16 is autocast."""

    section: str
    model: str
    dtype: str  # "float32", "bfloat16"
    batch: int
    checkpointing: bool
    implementation: str  # "tomevit", "timm", "reference"
    mode: str  # "eager", "compiled"
    r: int

    @property
    def kind(self) -> str:
        """Rows of one kind take about as long."""
        return f"training of {self.model}, {self.mode}"

    @property
    def candidate(self) -> str:
        """As the tables name it."""
        return f"{self.implementation} {self.mode}, r={self.r}"

    def measure(self, device: torch.device, *, small: bool) -> dict[str, Any]:
        """Times of a step, and on a GPU the bytes that it takes beyond weights and optimizer state."""
        try:
            from benchmarks import train_step
        except ImportError as error:
            raise Skipped(f"{error.name} is not installed") from error
        if device.type == "cpu" and self.mode != "eager":
            raise Skipped(f"{self.mode}: on a GPU only")
        model_of.cache_clear()
        asked = {name: getattr(self, name) for name in ("model", "dtype", "batch", "r")}
        asked |= {"device": str(device), "grad_checkpointing": self.checkpointing}
        steps, _ = train_step.training(argparse.Namespace(**asked, compile=False))
        calls = {ANCHOR: steps["r=0"]}
        if self.mode != "eager":
            steps, _ = train_step.training(argparse.Namespace(**asked, compile=True))
        name = {"tomevit": f"r={self.r}", "reference": f"reference, r={self.r}"}.get(self.implementation, "timm")
        calls[self.candidate] = steps[name]
        del steps
        times = take_turns(calls, device, small=small, warmup=1 if small else 2)
        found: dict[str, Any] = {"times": times}
        if device.type == "cuda":
            found["step_bytes"] = {name: _peak(call, device) for name, call in calls.items()}
        config = tomevit.card(self.model).config
        return found | {"flop_ratio": tomevit.flops(config) / tomevit.flops(config, self.r, computed=True)}


def _peak(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a call takes beyond those that were taken before it."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def training(section: str, model: str, dtype: str, batch: int, r: Sequence[int]) -> Iterator[Training]:
    """With and without checkpointing, eager; and compiled without."""
    for mode, checkpointing in (("eager", False), ("eager", True), ("compiled", False)):
        row = partial(Training, section, model, dtype, batch, checkpointing)
        for each in r:
            yield row("tomevit", mode, each)
        if mode == "compiled":
            yield row("tomevit", mode, 0)
        yield row("timm", mode, 0)
        if mode == "eager":
            yield row("reference", mode, r[0])


# ------------------------------------------------------------------------------------------------------------- kernels


class Kernels(NamedTuple):
    """All ways of one step of a block, against each other."""

    section: str
    step: str  # "match and merge", "merge", "attention"
    dtype: str
    batch: int
    tokens: int
    heads: int
    r: int

    @property
    def kind(self) -> str:
        """Rows of one kind take about as long."""
        return f"kernels, {self.step}"

    def measure(self, device: torch.device, *, small: bool) -> dict[str, Any]:
        """Times of one run of each way; on a GPU of its work alone, captured in a graph where that can be done."""
        torch.manual_seed(0)
        dtype = PRECISIONS[self.dtype][0]
        qkv = torch.randn(self.batch, self.tokens, 3, self.heads, 64, device=device).to(dtype)
        q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))  # strided as in a block
        x = torch.randn(self.batch, self.tokens, 64 * self.heads, device=device).to(dtype)
        size = torch.randint(1, 9, (self.batch, self.tokens, 1), device=device).float()
        if self.step == "attention":
            ways = kernels.attentions(q, k, v, size)
            if device.type == "cpu":
                del ways["FlexAttention"]
        elif self.step == "merge":
            ways = kernels.merges(x, size, k, self.r)
        else:
            ways = kernels.matches(x, size, k, self.r)
        ready: dict[str, Callable[[], object]] = {}
        failed, not_captured = {}, []
        with torch.inference_mode():
            for name, way in ways.items():
                try:
                    way()
                    ready[name], captured = _repeated(way, device)
                # One way that this device or version cannot run is no reason to lose the others.
                except Exception as error:
                    failed[name] = first_line(error)
                    if is_lasting(error):
                        raise
                else:
                    not_captured += [] if captured or device.type != "cuda" else [name]
            times = take_turns(ready, device, small=small)
        once = {name: [each / REPEATS for each in taken] for name, taken in times.items()}
        return {"times": once, "failed": failed, "not_captured": not_captured}


def _repeated(way: Callable[[], object], device: torch.device) -> tuple[Callable[[], object], bool]:
    """REPEATS runs of it as one call, and whether they are a captured graph."""

    def run() -> None:
        for _ in range(REPEATS):
            way()

    if device.type != "cuda":
        return run, False
    run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        if private.lacks_memory(error):
            raise
        return run, False  # it waits for the device, which no graph can
    return graph.replay, True


# ------------------------------------------------------------------------------------------------ reading, embedding


class Embedding(NamedTuple):
    """Photographs to vectors: what reading gives by itself, the device by itself, and both together."""

    section: str
    model: str
    dtype: str
    batch: int
    images: int
    workers: int
    r: int

    @property
    def kind(self) -> str:
        """Rows of one kind take about as long."""
        return "images read and embedded"

    def measure(self, device: torch.device, *, small: bool) -> dict[str, Any]:
        """Images per second, and what binds."""
        if find_spec("PIL") is None:
            raise Skipped("Pillow is not installed")
        model = model_of(self.model, 64 if small else 224, self.dtype, device)
        with tempfile.TemporaryDirectory() as folder:
            files = _photographs(Path(folder), self.images)

            def read() -> None:
                for _ in stream(files, transform(model), batch=self.batch, workers=self.workers):
                    pass

            images = torch.randn(self.batch, 3, *model.config.img_size, device=device, dtype=model.dtype)

            def answer() -> None:
                with torch.inference_mode():
                    for _ in range(max(1, self.images // self.batch)):
                        model(images, r=self.r)

            write = partial(
                embed,
                model,
                files,
                Path(folder) / "vectors.safetensors",
                r=self.r,
                batch=self.batch,
                workers=self.workers,
                overwrite=True,
            )
            answer()
            computed = max(1, self.images // self.batch) * self.batch
            rates = {
                "read": len(files) / seconds(read, device),
                "computed": computed / seconds(answer, device),
                "both": len(files) / seconds(write, device),
            }
        binds = "reading" if rates["read"] < rates["computed"] else "the device"
        return {"rates": rates, "binds": binds}


def _photographs(folder: Path, count: int) -> list[str]:
    """JPEGs of the size of ImageNet's, of smooth noise, which compresses about as photographs do."""
    from PIL import Image

    files: list[str] = []
    for i in range(count):
        path = folder / f"{i:05}.jpg"
        if i < 16:
            draw = torch.Generator().manual_seed(i)
            coarse = torch.randint(0, 256, (40, 50, 3), generator=draw, dtype=torch.uint8)
            Image.fromarray(coarse.numpy()).resize((500, 400), Image.Resampling.BICUBIC).save(path, quality=90)
        else:
            path.write_bytes(Path(files[i % 16]).read_bytes())
        files.append(str(path))
    return files


# --------------------------------------------------------------------------------------------------------------- queue

Row = Inference | Training | Kernels | Embedding

#: Seconds that a row of a kind takes, until one has been measured; of a kind that is not here, 20.
FIRST_GUESS = {"whole": 75, "optimized": 75, "fused": 75, "compiled": 90, "max-autotune": 240, "embedded": 60}


def key_of(row: Row) -> str:
    """All parameters but the section, which is a heading."""
    return " ".join([type(row).__name__, *map(str, row[1:])])


def guess(kind: str) -> float:
    """Seconds that a row of a kind takes where none was measured yet."""
    return next((taken for word, taken in FIRST_GUESS.items() if kind.endswith(word)), 20.0)


def first_line(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"[:300]


def is_lasting(error: BaseException) -> bool:
    """Whether the process can no longer use its device after an error, such as an access to an illegal address."""
    return "CUDA error" in str(error) and not private.lacks_memory(error)


def queue(*, small: bool) -> list[Row]:
    """Best rows first. Small: the same kinds of rows, of toy size, to try the programme on a CPU."""
    if small:
        rows: list[Row] = [*inference("ViT, batch 2", "vit_ti16", 64, "float32", 2, (2,))]
        rows += training("Training steps", "vit_ti16", "float32", 1, (8,))
        rows += [Kernels("Kernels", step, "float32", 1, 17, 2, 4) for step in ("match and merge", "merge", "attention")]
        return [*rows, Embedding("Images", "vit_ti16", "float32", 2, 4, 0, 2)]
    rows = []
    for batch in (256, 1, 8, 32):
        rows += inference(f"ViT-B/16, batch {batch}", "vit_b16", 224, "bfloat16", batch, (16, 8, 13))
    rows += inference("ViT-L/16", "vit_l16", 224, "bfloat16", 256, (8, 4))
    rows += inference("ViT-B/16 at 384 pixels", "vit_b16", 384, "bfloat16", 128, (45, 23))
    rows += inference("ViT-S/16", "vit_s16", 224, "bfloat16", 256, (13,))
    rows += inference("ViT-H/14", "vit_h14", 224, "bfloat16", 128, (7, 4))
    rows += inference("SWAG ViT-L/16 at 512 pixels", "swag_l16_512", 512, "bfloat16", 32, (40, 21))
    rows += training("Training steps of ViT-B/16", "vit_b16", "bfloat16", 128, (16,))
    rows += training("Training steps of ViT-L/16", "vit_l16", "bfloat16", 128, (8, 16))
    for tokens, heads, r in ((197, 12, 16), (577, 12, 45), (197, 16, 8)):
        for step in ("match and merge", "merge", "attention"):
            for batch in (256, 8):
                rows.append(Kernels("Kernels", step, "bfloat16", batch, tokens, heads, r))
    for r, workers in ((0, 8), (16, 8), (16, 15)):
        rows.append(Embedding("Images read and embedded", "vit_b16", "bfloat16", 256, 4096, workers, r))
    for dtype in ("float16", "tf32", "float32"):
        rows += inference(f"ViT-B/16, {dtype}", "vit_b16", 224, dtype, 256, (16, 8))
    return rows
