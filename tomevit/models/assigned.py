"""Attributes that refuse what they cannot be, where it is assigned and not where it is used."""

from __future__ import annotations

from typing import Any

from torch import nn

from tomevit.cards import Card
from tomevit.config import Config
from tomevit.errors import check_type

KINDS = {"card": (Card, "a Card, as model.card is"), "config": (Config, "a Config, as model.config is")}


class CheckedAttributes(nn.Module):
    """A module whose properties see all that is assigned to them, and whose card and config are of their types.

    `nn.Module` alone would register a module under the name of a property, which then neither sees nor shows it.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign to an attribute.

        Raises:
            ValueError: it cannot be that.
        """
        if name in KINDS:
            check_type(name, value, *KINDS[name])
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)
