"""Packages that training needs, and nothing else does."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def import_extra(module: str, what: str) -> Any:
    """A module of a package that only training needs.

    Args:
        what: needs it, in the plural.

    Raises:
        ValueError: it cannot be imported.
    """
    try:
        return import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision, of one that was built for another torch
        package = {"sklearn": "scikit-learn"}.get(found := module.partition(".")[0], found)
        reason = "" if isinstance(error, ModuleNotFoundError) else f" ({str(error).splitlines()[0]})"
        raise ValueError(f"{what} need {package}{reason}: pip install 'tomevit[train]'") from error
