"""torch's modules without initial weights: a model's are all drawn, or read, at once when it is whole."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def bare(kind: type[Module], *args: Any, **kwargs: Any) -> Module:
    """A module whose own `reset_parameters` does not run; on the meta device that is half of the time to build it."""
    module = kind.__new__(kind)
    module.__dict__["reset_parameters"] = lambda: None  # hides the method while __init__ calls it
    kind.__init__(module, *args, **kwargs)
    del module.__dict__["reset_parameters"]
    return module


linear = partial(bare, nn.Linear)
layer_norm = partial(bare, nn.LayerNorm)
