"""What a user means by a file, a directory, a URL, a repository or a name: where it lies, and what is known of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tomevit import zoo
from tomevit.cards import Card, is_ours
from tomevit.config import Source
from tomevit.errors import CheckpointError, check_path
from tomevit.weights import cache, directories, shards
from tomevit.weights.files import check_is_checkpoint
from tomevit.weights.reading import explain_lack_of_memory
from tomevit.weights.shards import OpenFiles
from tomevit.weights.side_files import CONFIG_FILES, OPEN_CLIP, README, card_from_configs


class Located(NamedTuple):
    """A checkpoint on this machine, and what is known of it beforehand."""

    path: Path  # of the file, or of the index of several
    origin: Source  # with the whole sha256, unless the file is ours; its format is empty unless it is published
    card: Card | None = None  # as published, or as the files beside it describe it
    downloaded: bool = False
    files: OpenFiles | None = None  # open as long as the context; None of a file of ours, and of a download

    @property
    def name(self) -> str:
        """By which the user knows it: a download's own path is soon gone."""
        repo = f"hf-hub:{self.origin.hub}@{self.origin.revision}" if self.origin.hub else None
        return (self.downloaded and (self.origin.url or repo)) or str(self.path)

    @property
    def paths(self) -> tuple[Path, ...]:
        """All that it is read from: the file alone, or the index and the files that it lists."""
        return shards.files_of(self.path) if self.files is None else (self.path, *self.files.parts)


@contextmanager
def locate(source: str | os.PathLike[str]) -> Iterator[Located]:
    """The file that a user means, downloaded if need be; a download lasts as long as the context.

    Raises:
        FileNotFoundError: there is no such file, or no weights in the directory.
        ValueError: there is no such model.
        CheckpointError: it is one file of several, or a part of what tomevit does not read, or there are several.
        DownloadError: it could not be had.
    """
    check_path("source", source, "a file, a URL, hf-hub:owner/repo or a name of the zoo")
    name = os.fspath(source)
    path = Path(name)
    if zoo.is_elsewhere(name):
        card = card_of_source(name)
        with cache.fetch(card) as fetched:
            yield locate_fetched(fetched, card)
    elif path.is_dir():
        with _open_local(directories.find_checkpoint(path), beside=True) as located:
            yield located
    elif is_ours(path):
        yield Located(path, Source(format="tomevit", file=path.name))
    else:
        shards.check_whole(path)
        with _open_local(path, beside=path.name in zoo.HUB_FILES or path.name.startswith("open_clip_")) as located:
            yield located


def locate_fetched(fetched: cache.Fetched, card: Card) -> Located:
    """What was fetched for a card of `card_of_source`: as the zoo knows it if it is published, else by what it is."""
    if card.weights:
        return Located(fetched.path, fetched.source, zoo.card(card.full_name), downloaded=True)
    beside = cache.beside(fetched.source, _names_beside(fetched.source.file)) if fetched.source.hub else {}
    return _identify(fetched.path, fetched.source, beside, downloaded=True)


def card_of_source(name: str) -> Card:
    """What is known beforehand of an address or of what is no file: a card with its sources.

    Of a URL or hf-hub:owner/repo[@revision] it has this one source: that of the weights published there, so that their
    hash is checked, or no more than the address.

    Raises:
        FileNotFoundError: the name looks like a file's.
        ValueError: it names no repository, or there is no such model.
    """
    if not name:
        raise ValueError("the source's name is empty: give a file, a URL, hf-hub:owner/repo or a name of the zoo")
    if not name.startswith(zoo.ADDRESSES):
        return zoo.card_of_no_file(name)
    repo, _, revision = name.removeprefix("hf-hub:").partition("@")
    on_hub = name.startswith("hf-hub:")
    for card, source in zoo.published_sources():
        if (on_hub and repo == source.hub and revision in ("", source.revision)) or name == source.url:
            return replace(card, sources=(source,))
    if not on_hub:
        distinct = hashlib.sha256(name.encode()).hexdigest()[:16]
        return Card(name=f"url-{distinct}", sources=(Source(format="", url=name),))
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ValueError(f"{name} names no repository: it must be hf-hub:owner/repo or hf-hub:owner/repo@revision")
    return Card(name=repo.replace("/", "--"), sources=(Source(format="", hub=repo, revision=revision or None),))


@contextmanager
def name_errors_after(located: Located) -> Iterator[None]:
    """Errors about a file begin with the name that its user knows."""
    try:
        yield
    except CheckpointError as error:
        said = str(error)
        if said.startswith(str(located.path)):
            error.args = (located.name + said.removeprefix(str(located.path)),)
        else:
            error.args = (f"{located.name}: {said}",)
        raise


@contextmanager
def _open_local(path: Path, *, beside: bool) -> Iterator[Located]:
    """A checkpoint that is no file of ours, with what the files beside it say if these are its own."""
    with shards.open_files(path) as files:
        check_is_checkpoint(files)
        with explain_lack_of_memory(path):
            origin = Source(format="", file=path.name, sha256=files.sha256())
        located = _identify(path, origin, _files_beside(path) if beside else {})
        yield located._replace(files=files)


def _files_beside(path: Path) -> dict[str, Path]:
    return {name: path.parent / name for name in _names_beside(path.name) if (path.parent / name).is_file()}


def _names_beside(file: str | None) -> tuple[str, ...]:
    """The files that describe a checkpoint of that name, if they lie beside it.

    The hub's repositories hold one model as transformers or timm has it and as open_clip has it, each described apart.
    """
    return (OPEN_CLIP, README) if (file or "").startswith("open_clip_") else CONFIG_FILES


def _identify(path: Path, origin: Source, beside: Mapping[str, Path], *, downloaded: bool = False) -> Located:
    """What the zoo knows of a file by its hash, or else what the files beside it say."""
    if (published := find_published(origin)) is not None:
        card, source = published
        origin = replace(source, sha256=origin.sha256, revision=origin.revision, file=origin.file)
        return Located(path, origin, card, downloaded)
    return Located(path, origin, card_from_configs(beside) if beside else None, downloaded)


def find_published(origin: Source | None) -> tuple[Card, Source] | None:
    """What the zoo knows of a file by its hash."""
    if origin is not None and origin.sha256 is not None:
        for card, source in zoo.published_sources():
            if source.sha256 is not None and origin.sha256.startswith(source.sha256):
                return card, source
    return None
