"""How fast a model is at several r, against itself at r = 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tomevit.config import Schedule
from tomevit.flops import flops
from tomevit.models import VisionTransformer
from tomevit.timing import interleave

COMPILED_AT_ONCE = 8  # torch._dynamo.config.recompile_limit


class Row(NamedTuple):
    """One r."""

    r: Schedule
    tokens: int  # leaving the last block
    gflops: float  # multiply-adds per image, in 10⁹
    images_per_second: float
    speed_up: float  # over r = 0
    flop_ratio: float  # what the speed-up would be if time followed FLOPs

    @property
    def efficiency(self) -> float:
        """The share of the FLOPs saved that became time saved; 1 is the limit."""
        return self.speed_up / self.flop_ratio


def with_zero(r_values: Sequence[Schedule]) -> list[Schedule]:
    """What a comparison runs over: 0 first, then each other r once."""
    return list({str(r): r for r in (0, *r_values)}.values())


def bench(
    model: VisionTransformer,
    r_values: Sequence[Schedule],
    *,
    batch: int = 8,
    rounds: int = 10,
    compiled: bool = False,
    progress: Callable[[], object] | None = None,
) -> list[Row]:
    """Time a model in inference, all r taking turns, on generated images.

    Args:
        model: on the device and in the dtype to measure.
        r_values: what to compare with r = 0, which is measured in any case and comes first.
        batch: images per call.
        rounds: timed calls of each; the medians are compared.
        compiled: through torch.compile, each r as a program of its own.
        progress: called after every call, two rounds of warm-up included.

    Raises:
        ValueError: an r of no known form, or too many to compile.
    """
    values = with_zero(r_values)
    if compiled and len(values) > COMPILED_AT_ONCE:
        raise ValueError(
            f"{len(values)} values of r, 0 included, are more than the {COMPILED_AT_ONCE} programs that torch.compile "
            f"keeps of one model: measure them in several runs"
        )
    parameter = next(model.parameters())
    config = model.config
    images = torch.randn(batch, config.in_chans, *config.img_size, device=parameter.device, dtype=parameter.dtype)
    # Checked before the first minute is spent; a list is no key, so calls go by position.
    outgoing = [model.token_counts(r)[-1] for r in values]
    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    calls: dict[int, Callable[[], Tensor]] = {i: partial(forward, images, r) for i, r in enumerate(values)}
    with torch.inference_mode():
        seconds = interleave(calls, rounds=rounds, device=parameter.device, progress=progress)
    plain = flops(config)
    return [
        Row(
            r=r,
            tokens=outgoing[i],
            gflops=flops(config, r) / 1e9,
            images_per_second=batch / seconds[i],
            speed_up=seconds[0] / seconds[i],
            flop_ratio=plain / flops(config, r),
        )
        for i, r in enumerate(values)
    ]
