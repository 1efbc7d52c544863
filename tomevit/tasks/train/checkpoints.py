"""A run that stops, and goes on to the same weights, to the bit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from tomevit.output import new_file
from tomevit.tasks.train.options import CHECKPOINT, Options, Record
from tomevit.tasks.train.setup import Run, describe


def save_checkpoint(run: Run, parts: Record, done: Record) -> None:
    """Everything that the next step depends on. The file changes all at once."""
    if run.options.dry_run:
        return
    out = Path(run.options.out)
    generators = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    found = {"options": asdict(run.options), "data": describe(run.data), "done": done, "generators": generators}
    with new_file(out / CHECKPOINT) as path:
        torch.save(found | {name: part.state_dict() for name, part in parts.items()}, path)


def read_checkpoint(out: Path) -> Record:
    """What `save_checkpoint` wrote.

    Raises:
        ValueError: there is none, or the file is something else.
    """
    path = out / CHECKPOINT
    if not path.is_file():
        raise ValueError(f"there is nothing to resume: {path} does not exist; without --resume a new run begins")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises depends on the bytes that it finds
        raise ValueError(f"{path} is no checkpoint of this program") from error
    parts = {"options", "data", "done", "generators", "model", "optimizer", "scaler"}
    if not (isinstance(found, dict) and parts <= found.keys() and found["options"].keys() == asdict(Options()).keys()):
        raise ValueError(f"{path} is no checkpoint of this program, or of another version")
    return found


def restore(checkpoint: Record, parts: Record) -> Record:
    """Put the state of a checkpoint into the parts of a run; how far it was."""
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
    cpu, *gpus = checkpoint["generators"]
    torch.set_rng_state(cpu)
    if gpus:
        torch.cuda.set_rng_state_all(gpus)
    return checkpoint["done"]
