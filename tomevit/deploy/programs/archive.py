"""Programs as torch's own .pt2 files: exported, to be run or compiled by torch, or compiled already."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tomevit import private
from tomevit.deploy.programs.trace import Settings, quiet

if TYPE_CHECKING:
    from torch.export import ExportedProgram

METADATA = "tomevit.json"  # the file within an archive


def check_nothing(opset: int | None, dtype: str) -> None:
    """Nothing but torch is needed."""


def check_compiler(opset: int | None, dtype: str) -> None:  # noqa: ARG001
    """Raises ValueError if there is no C++ compiler."""
    if private.missing_compiler():
        raise ValueError("aoti compiles C++, and no compiler was found: install g++ or clang, or set CXX")


def write_exported(
    program: ExportedProgram,
    path: Path,
    metadata: dict[str, str],
    settings: Settings,  # noqa: ARG001
) -> None:
    """An archive for `torch.export.load`, with the metadata as a file within."""
    with quiet():
        torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata, indent=2)})


def load_exported(path: Path) -> tuple[str, Callable[[Tensor], Tensor]]:
    with quiet():
        module = torch.export.load(path).module()
    return f"torch {torch.__version__}", module


def write_compiled(
    program: ExportedProgram,
    path: Path,
    metadata: dict[str, str],
    settings: Settings,  # noqa: ARG001
) -> None:
    """A package for `torch._inductor.aoti_load_package`, whose `get_metadata()` has the metadata."""
    with quiet():
        private.compile_package(program, path, metadata)


def load_compiled(path: Path) -> tuple[str, Callable[[Tensor], Tensor]]:
    return f"AOTInductor of torch {torch.__version__}", private.load_package(path)
