"""Which file in a directory is the checkpoint; or what a directory is that tomevit does not read, and the way out."""

from __future__ import annotations

import re
from pathlib import Path

from tomevit.errors import CheckpointError
from tomevit.weights.other_files import describe_directory
from tomevit.weights.rules import enumerate_names
from tomevit.weights.shards import INDICES, PART
from tomevit.zoo import HUB_FILES

#: How the names of files end that may be read, and of those whose reader says what they are.
READ = (".safetensors", ".pth", ".pt", ".bin", ".torch", ".tar", ".ckpt", ".npz")
NAMED = (".msgpack", ".h5", ".keras", ".onnx", ".gguf", ".pt2")
#: What trainers write beside the weights, or of them for each process, in files that end alike.
NO_WEIGHTS = re.compile(
    r"(optimizer|optim|scheduler|lr_scheduler|scaler|sampler|dl_state_dict|rng_state|random_states|training_args|args)"
    r"[-_.].*|.*zero_pp_rank_.*|pytorch_model_fsdp_.*rank\d+\.bin"
)
#: Directories of a run in which checkpoints lie: "checkpoint-500", "lightning_logs", "version_0", "global_step100".
INNER = re.compile(
    r"(checkpoint|ckpt|epoch|step|global_?step|version|lightning_logs|pytorch_model_fsdp|best|last|final|weights|model).*"
    r"|snapshots|[0-9a-f]{40}"  # of the hub's cache
)
MOST_LEVELS = 3  # lightning_logs/version_0/checkpoints
MOST_DIRECTORIES = 1000  # to look into: links can make endless ones of three


def find_checkpoint(directory: Path) -> Path:
    """The one checkpoint in a directory: a file, or the index of several.

    The hub's names come first: model.safetensors, else pytorch_model.bin, each also in several files. Else it is the
    only file that ends like a checkpoint, there or in the directories of a training run.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: there are several, of which one must be named; or what there is tomevit does not read: the
            message says what it is, and what makes a file of it.
    """
    found = _find(directory, MOST_LEVELS, [])
    if len(found) == 1:
        return found[0]
    if found:
        choices = enumerate_names([file.relative_to(directory).as_posix() for file in found], 8)
        raise CheckpointError(f"{directory} holds several checkpoints: give one of them, {choices}")
    names = sorted(entry.name for entry in directory.iterdir())
    if parts := [name for name in names if PART.search(name)]:
        raise CheckpointError(
            f"{directory} holds parts of one checkpoint, {enumerate_names(parts)}, without the index that lists them: "
            f"bring {INDICES[parts[0].endswith('.bin')]} too"
        )
    there = enumerate_names(names, 8) or "nothing"
    raise FileNotFoundError(
        f"{directory} is a directory without model.safetensors, or another checkpoint (it holds {there}): name the "
        f"checkpoint file"
    )


def _find(directory: Path, levels: int, seen: list[Path]) -> list[Path]:
    seen.append(directory)
    if len(seen) > MOST_DIRECTORIES:
        raise CheckpointError(f"{seen[0]} holds more than {MOST_DIRECTORIES} directories of a run: name the checkpoint")
    names = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("._"))  # those are of macOS
    adapter = any(re.fullmatch(r"adapter_config\.json|adapter_model\..*", name) for name in names)
    found = [] if adapter else _files_of_the_hub(names) or _files_with_weights(directory, names)
    if not found and (what := describe_directory(directory)) is not None:
        raise CheckpointError(f"{directory} {what}")
    # Flax names its files checkpoint_10000.
    named = [name for name in names if name.lower().endswith(NAMED) or re.fullmatch(r"checkpoint_\d+", name)]
    return (
        [directory / name for name in found]
        or _find_in_run(directory, names, levels, seen)
        or [directory / name for name in named if (directory / name).is_file()][:1]
    )


def _files_of_the_hub(names: list[str]) -> list[str]:
    """The files that a repository of the hub with these names would be read from; several where it is no one model."""
    for kind in (HUB_FILES[:2], HUB_FILES[2:]):
        if whole := [name for name in kind if name in names]:
            # accelerate numbers the models of one training: model.safetensors, model_1.safetensors.
            stem, _, ending = kind[0].partition(".")
            return whole + [name for name in names if re.fullmatch(rf"{stem}_\d+\.{ending}", name)]
    return []


def _files_with_weights(directory: Path, names: list[str]) -> list[str]:
    """The files that end like checkpoints, and the indices of such in several files."""
    if any(name.endswith("_optim_states.pt") for name in names):
        return []  # DeepSpeed's ZeRO, whose *_model_states.pt need not be whole
    return [
        name
        for name in names
        if (name.lower().endswith(READ) or (".index." in name and name.endswith(".json")))
        and not (PART.search(name) or NO_WEIGHTS.fullmatch(name))
        and (directory / name).is_file()
    ]


def _find_in_run(directory: Path, names: list[str], levels: int, seen: list[Path]) -> list[Path]:
    found: list[Path] = []
    unread: CheckpointError | None = None
    for name in names:
        if levels and INNER.fullmatch(name) and (directory / name).is_dir():
            try:
                found += _find(directory / name, levels - 1, seen)
            except CheckpointError as error:
                if len(seen) > MOST_DIRECTORIES:
                    raise
                unread = unread or error
    if unread is not None and not found:
        raise unread
    return found
