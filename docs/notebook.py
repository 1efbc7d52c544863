"""docs/tour.py as a notebook with its results: `python -m docs.notebook tour.ipynb` writes one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import jupytext
import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

SCRIPT = Path(__file__).parent / "tour.py"


def executed(script: str) -> nbformat.NotebookNode:
    """Run a script whose cells begin with `# %%`, in a directory that is gone afterwards.

    Raises:
        CellExecutionError: a cell failed; it says which, and how.
    """
    notebook = jupytext.reads(script, fmt="py:percent")
    with TemporaryDirectory() as folder:
        # Between processes of one machine, sockets in files do: no port that others could listen at.
        manager = {"transport": "ipc", "ip": f"{folder}/kernel"} if os.name == "posix" else {}
        config = Config({"KernelManager": manager})
        where = {"metadata": {"path": folder}}
        NotebookClient(notebook, config=config, resources=where, timeout=600, startup_timeout=600).execute()
    return notebook


if __name__ == "__main__":
    notebook = executed(SCRIPT.read_text(encoding="utf-8"))
    nbformat.write(notebook, sys.argv[1])  # type: ignore[no-untyped-call]
