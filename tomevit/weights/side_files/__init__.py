"""The small files that lie beside a checkpoint and describe it, as other libraries write and read them.

    timm          config.json: an architecture's name, arguments that differ, how images are prepared
    transformers  config.json: the architecture in numbers; preprocessor_config.json: how images are prepared
    open_clip     open_clip_config.json: the same of an image tower; it is read, and not written
    readme        README.md, the model card: often the licence is nowhere else

Each library is a module with tables of `common.Row`, read in both directions; what no row can say is a function beside
them. `names` finds the zoo's name for what a file describes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tomevit.cards import Card
from tomevit.errors import CheckpointError, printable
from tomevit.weights.side_files import open_clip, timm, transformers
from tomevit.weights.side_files.common import JsonObject, check_unchanged
from tomevit.weights.side_files.readme import read_licence

__all__ = ["CONFIG", "CONFIG_FILES", "OPEN_CLIP", "PREPROCESSOR", "README", "card_from_configs", "configs_from_card"]

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
OPEN_CLIP = "open_clip_config.json"
README = "README.md"
CONFIG_FILES = (CONFIG, PREPROCESSOR, OPEN_CLIP, README)


def card_from_configs(files: Mapping[str, Path]) -> Card | None:
    """The card that a repository's JSON files describe.

    The card says what the files say, and no more: a fine-tuned model's config.json still has the tag of the weights it
    began with, so figures, sources, r and tag stay empty. Its name is the zoo's for the same architecture, where there
    is one.

    Args:
        files: paths by their names in the repository, of `CONFIG_FILES`.

    Returns:
        None: there is no open_clip_config.json, and no config.json, or it is neither timm's nor transformers'.

    Raises:
        CheckpointError: a file is malformed, or describes what tomevit cannot build; the message says where.
    """
    if CONFIG in files:
        card = _read_config_json(files)
    elif OPEN_CLIP in files:
        with _name_in_errors(files[OPEN_CLIP]):
            card = open_clip.read_config(JsonObject.of_file(files[OPEN_CLIP]))
    else:
        return None
    if card is not None and card.licence is None and README in files:
        card = replace(card, licence=read_licence(files[README]))
    return card


def _read_config_json(files: Mapping[str, Path]) -> Card | None:
    with _name_in_errors(files[CONFIG]):
        config = JsonObject.of_file(files[CONFIG])
        check_unchanged(config)
        if "architecture" in config:
            return timm.read_config(config)
        if "model_type" not in config:
            return None
        card = transformers.read_config(config)
    with _name_in_errors(files.get(PREPROCESSOR, PREPROCESSOR)):
        said = JsonObject.of_file(files[PREPROCESSOR]) if PREPROCESSOR in files else JsonObject({})
        return replace(card, preprocess=transformers.read_processor(said, config["model_type"], card.config))


@contextmanager
def _name_in_errors(file: str | os.PathLike[str]) -> Iterator[None]:
    """What is wrong in a file is told with its name."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{os.fspath(file)}: {printable(str(error))}") from error


def configs_from_card(card: Card, format: str) -> dict[str, dict[str, Any]]:  # noqa: A002 - the word that users know
    """The JSON files to put beside a model.safetensors of a format, so that its library loads the directory.

    r and proportional attention have no place in them: without merging they change nothing.

    Returns:
        Contents by file name; none for formats that have no such files.

    Raises:
        ValueError: the library has no such model, or prepares images otherwise; the message says in what.
    """
    if format in timm.FORMATS:
        return {CONFIG: timm.write_config(card)}
    if format in transformers.FORMATS:
        return {CONFIG: transformers.write_config(card, format), PREPROCESSOR: transformers.write_processor(card)}
    return {}
