"""Which file in a directory is the checkpoint; or what a directory is that tomevit does not read, and the way out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from tomevit.errors import CheckpointError
from tomevit.weights.rules import enumerate_names
from tomevit.weights.shards import INDICES, PART
from tomevit.zoo import HUB_FILES

#: How the names of files end that may be read, and of those whose reader says what they are.
READ = (".safetensors", ".pth", ".pt", ".bin", ".torch", ".tar", ".ckpt", ".npz")
NAMED = (".msgpack", ".h5", ".keras", ".onnx", ".gguf", ".pt2")
#: What trainers write beside the weights, in files that end like them.
NO_WEIGHTS = re.compile(
    r"(optimizer|optim|scheduler|lr_scheduler|scaler|sampler|dl_state_dict|rng_state|random_states|training_args|args)"
    r"[-_.].*"
)
#: Directories of a run in which checkpoints lie: "checkpoint-500", "lightning_logs", "version_0", "global_step100".
INNER = re.compile(
    r"(checkpoint|ckpt|epoch|step|global_?step|version|lightning_logs|pytorch_model_fsdp|best|last|final|weights|model).*"
    r"|snapshots|[0-9a-f]{40}"  # of the hub's cache
)
MOST_LEVELS = 3  # lightning_logs/version_0/checkpoints

ADAPTER = "an adapter of peft, without the model that it was trained on"
DISTRIBUTED = (
    "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {directory} weights.pth` makes a file of it"
)
#: What else a directory may be, by names in it: what it is called, and what makes a file of it.
LAYOUTS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("adapter_config.json", "adapter_model.*"),
        ADAPTER,
        "load both there, call merge_and_unload() and save_pretrained(), and give the directory that this writes",
    ),
    (
        ("zero_to_fp32.py", "*zero_pp_rank_*", "*_optim_states.pt"),
        "a checkpoint of DeepSpeed ZeRO, spread over processes",
        "`python zero_to_fp32.py . OUT`, run where that script lies, makes OUT of it, which tomevit reads",
    ),
    (
        ("pytorch_model_fsdp_*rank*.bin",),
        "a checkpoint of FSDP with a part for each process",
        "save it anew with the state dict type FULL_STATE_DICT",
    ),
    (
        (".metadata", "*.distcp"),
        "a distributed checkpoint of torch",
        DISTRIBUTED,
    ),
    (
        ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"),
        "a checkpoint of Orbax (JAX)",
        "restore it there, and write its parameters by numpy.savez, under names as vit_jax has them",
    ),
    (
        ("saved_model.pb", "*.data-?????-of-?????"),
        "a checkpoint of TensorFlow, which tomevit does not read",
        "bring its weights into the same model of torch, and save its state_dict()",
    ),
    (
        ("data.pkl",),
        "the unpacked contents of a file of torch.save",
        "pack them again: `zip -0 -r weights.pth {name}`, run in the directory above",
    ),
)


def find_checkpoint(directory: Path) -> Path:
    """The one checkpoint in a directory: a file, or the index of several.

    The hub's names come first: model.safetensors, else pytorch_model.bin, each also in several files. Else it is the
    only file that ends like a checkpoint, there or in the directories of a training run.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: there are several, of which one must be named; or what there is tomevit does not read: the
            message says what it is, and what makes a file of it.
    """
    found = _find(directory, MOST_LEVELS)
    if len(found) == 1:
        return found[0]
    if found:
        names = enumerate_names([file.relative_to(directory).as_posix() for file in found], 8)
        raise CheckpointError(f"{directory} holds several checkpoints: give one of them, {names}")
    if parts := [name for name in _names(directory) if PART.search(name)]:
        raise CheckpointError(
            f"{directory} holds parts of one checkpoint, {enumerate_names(parts)}, without the index that lists them: "
            f"bring {INDICES[parts[0].endswith('.bin')]} too"
        )
    there = enumerate_names(_names(directory), 8) or "nothing"
    raise FileNotFoundError(
        f"{directory} is a directory without model.safetensors, or another checkpoint (it holds {there}): name the "
        f"checkpoint file"
    )


def check_layout(path: Path) -> None:
    """Raises CheckpointError if a file is, by its name, a part of what tomevit does not read."""
    for what, way in _layouts_among([path.name]):
        raise CheckpointError(f"{path} belongs to {what}: {_complete(way, path.parent)}")


def _find(directory: Path, levels: int) -> list[Path]:
    names = _names(directory)
    layout = next(_layouts_among(names), None)
    found = _files_of_the_hub(names)
    if not found:
        # Where DeepSpeed spreads weights over processes, its *_model_states.pt are not whole.
        whole = [name for name in _files_with_weights(directory, names) if not next(_layouts_among([name]), None)]
        found = [name for name in whole if not (layout and name.endswith("_model_states.pt"))]
    if layout and (not found or layout[0] == ADAPTER):
        raise CheckpointError(f"{directory} holds {layout[0]}: {_complete(layout[1], directory)}")
    if found:
        return [directory / name for name in found]
    # Flax names its files checkpoint_10000.
    named = [name for name in names if name.lower().endswith(NAMED) or re.fullmatch(r"checkpoint_\d+", name)]
    return (
        _find_in_run(directory, names, levels)
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
    return [
        name
        for name in names
        if (name.lower().endswith(READ) or (".index." in name and name.endswith(".json")))
        and not (PART.search(name) or NO_WEIGHTS.fullmatch(name))
        and (directory / name).is_file()
    ]


def _find_in_run(directory: Path, names: list[str], levels: int) -> list[Path]:
    found: list[Path] = []
    unread: CheckpointError | None = None
    for name in names:
        if levels and INNER.fullmatch(name) and (directory / name).is_dir():
            try:
                found += _find(directory / name, levels - 1)
            except CheckpointError as error:
                unread = unread or error
    if unread is not None and not found:
        raise unread
    return found


def _layouts_among(names: list[str]) -> Iterator[tuple[str, str]]:
    for patterns, what, way in LAYOUTS:
        if any(fnmatchcase(name, pattern) for name in names for pattern in patterns):
            yield what, way


def _complete(way: str, directory: Path) -> str:
    if way is DISTRIBUTED and directory.name.startswith("pytorch_model_fsdp"):
        way = "`accelerate merge-weights {directory} OUT` makes OUT/model.safetensors of it"
    return way.format(directory=directory, name=directory.resolve().name)


def _names(directory: Path) -> list[str]:
    """All that a directory holds, but for what macOS puts beside files."""
    return sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("._"))
