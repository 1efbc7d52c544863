"""Random tokens for any matching: what each one declares that it needs, and how many of them it takes away."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tomevit.layers import MATCHINGS, Merge

#: Those that can be a model's own; neighbours merge in the one block that a list names.
OWN = [name for name in MATCHINGS if name != "grid"]
DETERMINISTIC = [name for name in MATCHINGS if name != "random"]


@dataclass(frozen=True)
class Case:
    """What a matching may look at: B images of N tokens. The fields have the names of `tomevit.layers.NEEDS`."""

    key: Tensor
    x: Tensor
    size: Tensor
    importance: Tensor
    drop: int
    grid: tuple[int, int]
    depth: float
    r: int
    prefix: int

    @property
    def tokens(self) -> int:
        return self.key.shape[1]

    def merges(self, matching: str) -> int:
        """How many tokens join another: r, but that neighbours merge all together."""
        height, width = self.grid
        return self.r if matching != "grid" else height * width - halved(height) * halved(width)

    def drops(self, matching: str) -> int:
        return self.drop if "drop" in needs_of(matching) else 0

    def arguments(self, matching: str) -> list[Any]:
        return [*(getattr(self, need) for need in needs_of(matching)), self.merges(matching), self.prefix]

    def find(self, matching: str) -> Merge:
        """What it finds, being given what it needs."""
        return MATCHINGS[matching](*self.arguments(matching))

    def images(self, which: slice | list[int]) -> Case:
        """The same of other images only, or in another order."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: x[which] for name, x in tensors.items() if isinstance(x, Tensor)})

    def behind(self, matching: str, x: Tensor, size: Tensor) -> Case:
        """A case of the tokens that a merge left, of which half can merge in turn, or a tenth is dropped first."""
        height, width = self.grid
        patches = x.shape[1] - self.prefix
        drop = patches // 10
        r = (patches - (drop if "drop" in needs_of(matching) else 0)) // 2
        grid = (halved(height), halved(width))
        importance = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(patches))
        return replace(self, key=x, x=x, size=size, importance=importance, drop=drop, grid=grid, r=r)


def needs_of(matching: str) -> tuple[str, ...]:
    return getattr(MATCHINGS[matching], "needs", ("key",))


def halved(edge: int) -> int:
    return (edge + 1) // 2


def case_of(key: Tensor, r: int, prefix: int, *, x: Tensor | None = None, drop: int = 0, seed: int = 0) -> Case:
    """A case of these keys, in which patches are one row of a grid."""
    batch, tokens, _ = key.shape
    generator = torch.Generator().manual_seed(seed)
    size = torch.randint(1, 300, (batch, tokens, 1), generator=generator).float()
    size[:, :prefix] = 1  # nothing ever joins the prefix
    importance = torch.rand(tokens, generator=generator).expand(batch, -1).contiguous()
    return Case(key, key if x is None else x, size, importance, drop, (1, tokens - prefix), 0.25, r, prefix)


@st.composite
def cases(draw: st.DrawFn, min_patches: int = 4, max_patches: int = 60) -> Case:
    """Tokens with sizes; often with equal keys, so that similarities tie. x is float64."""
    batch, prefix = draw(st.integers(1, 3)), draw(st.integers(0, 6))
    patches = draw(st.integers(min_patches, max_patches))
    r = draw(st.integers(1, patches // 2))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    tokens = prefix + patches
    kinds = draw(st.sampled_from([1, 3, tokens]))
    key = torch.randn(batch, kinds, 8, generator=generator)
    if kinds < tokens:
        kind = torch.randint(kinds, (batch, tokens, 1), generator=generator)
        key = key.gather(1, kind.expand(-1, -1, 8))
    x = torch.randn(batch, tokens, 5, generator=generator, dtype=torch.float64)
    importance = torch.rand(batch, tokens, generator=generator)
    if draw(st.booleans()):
        importance = (importance * 4).floor() / 4 + 0.25  # ties, too
    height = draw(st.sampled_from([edge for edge in range(1, patches + 1) if patches % edge == 0]))
    return replace(
        case_of(key, r, prefix, x=x, seed=seed, drop=draw(st.integers(0, min(patches - 2 * r, patches - 1)))),
        importance=importance,
        grid=(height, patches // height),
        depth=draw(st.sampled_from([0.0, 0.25, 11 / 12])),
    )
