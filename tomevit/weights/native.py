"""tomevit's own file: safetensors that describe themselves.

Tensors have the names of the model's parameters. The metadata has one entry, `tomevit`: as JSON the version of the
format and the Card, with the whole Config, so that nothing else is needed to build the model.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tomevit.config import Card, Config, Figure, Preprocess, Schedule, Source
from tomevit.layers.matching import find_matching
from tomevit.layers.schedule import check_schedule
from tomevit.models import VisionTransformer, build_meta

KEY = "tomevit"
VERSION = 1


def save(model: VisionTransformer, path: str | os.PathLike[str], *, card: Card | None = None) -> None:
    """Write a model with all that is needed to build, feed and understand it into one safetensors file.

    The file appears whole or not at all.

    Args:
        model: on any device, in any dtype.
        path: the file; its directory must exist.
        card: instead of the model's own. The architecture and r always come from the model.

    Raises:
        ValueError: the model merges by a function of your own, which a file cannot hold.
    """
    if callable(model.config.matching):
        raise ValueError(
            f"a file cannot hold the function {model.config.matching!r}: save a model whose matching has a name, "
            f"and pass the function to create() when loading"
        )
    card = replace(card or model.card, config=model.config, r=model.r)
    # One entry: safetensors writes several in any order, and equal models should make equal files.
    metadata = {KEY: json.dumps({"version": VERSION, "card": _card_to_json(card)})}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    path = Path(path)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        draft.touch(exist_ok=False)
        permissions = draft.stat().st_mode  # the user's usual ones; safetensors 0.8 makes files private
        save_file(tensors, draft, metadata)
        draft.chmod(permissions)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> VisionTransformer:
    """The model in a file that `save` wrote, in evaluation mode, on the CPU, in the file's dtype.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of tomevit's, or one of a newer version, or damaged.
    """
    card, tensors = read(path)
    return assemble(card, tensors, path)


def read(path: str | os.PathLike[str]) -> tuple[Card, dict[str, Tensor]]:
    """The card and the tensors of a file that `save` wrote.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            card = _read_metadata(path, file.metadata() or {})
            return card, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is not a whole safetensors file: {error}") from error


def assemble(card: Card, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> VisionTransformer:
    """A model of the card's config over these very tensors: nothing is initialised, nothing copied.

    Raises:
        ValueError: names or shapes do not fit; the message shows both sides.
    """
    model = build_meta(card.config, card.r)
    _check_fit({name: tuple(p.shape) for name, p in model.state_dict().items()}, tensors, path)
    model.load_state_dict(dict(tensors), assign=True)
    model.card = card
    return model.eval()


def _check_fit(
    wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    lines = []
    for name in sorted(wanted.keys() | tensors.keys()):
        ours, theirs = wanted.get(name), tuple(tensors[name].shape) if name in tensors else None
        if ours != theirs:
            lines.append(f"  {name}: model {ours or '—'}, file {theirs or '—'}")
    if lines:
        raise ValueError(f"{os.fspath(path)} does not fit the model:\n" + "\n".join(lines))


def _read_metadata(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> Card:
    path = os.fspath(path)
    if KEY not in metadata:
        raise ValueError(f"{path} was not written by tomevit: its metadata has no entry {KEY!r}")
    try:
        described = json.loads(metadata[KEY])
        version = described["version"]
        if version not in range(1, VERSION + 1):
            raise ValueError(f"it is of format version {version!r}, and this tomevit reads up to {VERSION}: upgrade it")
        return _card_from_json(described["card"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _card_to_json(card: Card) -> dict[str, Any]:
    return asdict(card) | {"r": _schedule_to_json(card.r)}


def _card_from_json(data: dict[str, Any]) -> Card:
    config = Config(**_tuples(data["config"]))
    find_matching(config.matching)
    nested = {
        "config": config,
        "preprocess": Preprocess(**_tuples(data["preprocess"])),
        "r": check_schedule(_schedule_from_json(data["r"]), config.depth),
        "sources": tuple(Source(**source) for source in data["sources"]),
        "figures": tuple(Figure(**figure) for figure in data["figures"]),
    }
    return Card(**_tuples(data) | nested)


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _schedule_to_json(r: Schedule) -> Any:
    return {"mean": r[0], "inflection": r[1]} if isinstance(r, tuple) else r


def _schedule_from_json(r: Any) -> Schedule:
    return (r["mean"], r["inflection"]) if isinstance(r, dict) else r
