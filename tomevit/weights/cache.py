"""From a published source to a verified local file, and the cache of converted files.

Everything lies under `home()`, with one name per set of weights ("vit_b16.augreg_in21k_ft_in1k"):

    weights/NAME-HASH.safetensors   the converted file; HASH begins the sha256 of the file it was made from
    downloads/NAME/FILE             what someone without a network brings; only read, never removed
    unfinished/NAME/                a download under way, which the next process resumes, or one whose conversion did
                                    not come to its end (a question, Ctrl-C, a full disk): it serves the next call, and
                                    goes when a conversion is done; and a conversion's draft
    locks/NAME.lock                 held by the one process that fills the above

A file appears in weights/ whole or not at all, and its own header says what it was made from. Finding it needs no lock,
and no right to write. Nobody writes to it afterwards, so that it may be mapped into memory. What is damaged, or is no
file at all, is made again: a file has all its bytes before it has its name, also on the disk, and one with blocks of
zeros, as power failures leave them on disks that do not keep to that, must have the digest that its header tells. (To
look for such blocks takes 9 ms for 346 MB, to compute the digest 410; with other work beside.)

Each of these directories may be a link to another file system. All but the locks of living processes may be removed at
any time; on a network file system, when no process uses the weights. Files from the Hugging
Face hub stay in the cache of huggingface_hub, which reads HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE. How files
are downloaded says `tomevit.weights.download`.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np

from tomevit.cards import Card, decode_header
from tomevit.config import Source
from tomevit.errors import CheckpointError, DownloadError, UnreadableError, printable
from tomevit.headers import read_header
from tomevit.locks import hold_lock
from tomevit.opening import open_file
from tomevit.output import new_file
from tomevit.weights import checkpoint, files, shards
from tomevit.weights.disk import (
    DiskError,
    explain_disk_errors,
    no_home,
    remove,
    remove_unless_file,
    sync,
)
from tomevit.weights.download import download, is_resumable, is_web_page
from tomevit.weights.hub import UnreachableError, files_on_hub
from tomevit.weights.servers import is_offline
from tomevit.zoo import HUB_FILES

log = logging.getLogger("tomevit")

DRAFTS = "converted"  # the directory in unfinished/NAME/ that a conversion writes to
BLOCK = 4096  # bytes, of file systems


class Fetched(NamedTuple):
    """A source's file on this machine."""

    path: Path
    source: Source  # completed: the whole sha256, the file's name, and the hub's commit as revision
    ours: bool  # a download of tomevit's own, which goes when its conversion is done


def home() -> Path:
    """The directory of all that tomevit keeps: TOMEVIT_HOME, else tomevit in XDG_CACHE_HOME, else ~/.cache/tomevit.

    Raises:
        DiskError: the user has no home directory, or the current one is gone, and it would be there.
    """
    try:
        if ours := os.environ.get("TOMEVIT_HOME"):
            return Path(ours).expanduser().absolute()
        shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (shared if shared.is_absolute() else Path.home() / ".cache") / "tomevit"
    except RuntimeError as error:
        raise DiskError(no_home("TOMEVIT_HOME")) from error
    except FileNotFoundError as error:
        raise DiskError(
            f"there is no place for downloads ({error}): set TOMEVIT_HOME to a directory that you can write to"
        ) from error


def holds(path: Path) -> bool:
    """Whether a file lies in the cache, where tomevit alone writes; what comes with tomevit needs no cache."""
    try:
        return path.is_relative_to(home())
    except DiskError:
        return False


def cached(card: Card, convert: Callable[[Fetched, Path], None], *, variant: str = "") -> Path:
    """The converted file of a card's weights, fetched and converted on first use.

    One process fetches and converts; others that want the same weights wait for it.

    Args:
        card: with sources, tried in order, first those whose file someone brought to downloads/.
        convert: writes the converted file, with the card and the fetched file's source as its origin in the header;
            called with the fetched file and the path to write to. What it may write beside that path is removed.
        variant: of one download several converted files can be made: which.

    Raises:
        DownloadError: no source can be reached, or no place to write.
        CheckpointError: a file has another hash than the published one, or than on its first use here.
    """
    for source in card.sources:
        if source.package and source.format == "tomevit":
            return _packaged_file(source)
    made = replace(card, name=f"{card.name}-{variant}") if variant else card
    if (found := _find(made)) is not None:
        return found
    with _locked(card.full_name) as unfinished:
        if (found := _find(made, say=True)) is not None:  # by now, made by the process that this one waited for
            return found
        published, fetched = _first_available(card, unfinished)
        _check_unchanged(made, published, fetched)
        drafts = unfinished / DRAFTS
        with _removed_after_use(unfinished), explain_disk_errors(drafts, needed=fetched.path.stat().st_size):
            remove(drafts)  # of a process that died
            drafts.mkdir()
            draft = drafts / "converted.safetensors"
            convert(fetched, draft)
            path = home() / "weights" / _converted_name(made, str(fetched.source.sha256)[:16])
            path.parent.mkdir(exist_ok=True)
            _put_in_place(draft, path)
            return path


@contextmanager
def fetch(card: Card) -> Iterator[Fetched]:
    """The verified file of a card's weights as published; a download of tomevit's own lasts as long as the context, or,
    if that ends with an error that is not the file's, until the next call has used it.

    Raises:
        DownloadError, CheckpointError: as `cached`.
    """
    with _locked(card.full_name) as unfinished:
        published, fetched = _first_available(card, unfinished)
        _check_unchanged(card, published, fetched)
        with _removed_after_use(unfinished):
            yield fetched


@contextmanager
def _removed_after_use(unfinished: Path) -> Iterator[None]:
    """A directory goes when the block ends well, or finds the download in it to be no checkpoint.

    Else the download stays: the user may say more of it, or free some space, and gigabytes need not come again.
    """
    keep = True
    try:
        yield
        keep = False
    except UnreadableError:
        keep = False
        raise
    finally:
        shutil.rmtree(unfinished / DRAFTS if keep else unfinished, ignore_errors=True)


def beside(source: Source, names: Iterable[str]) -> dict[str, Path]:
    """Those of some files that lie in the same repository and revision on the hub; offline, those in its cache.

    Raises:
        DownloadError: the hub has the repository, and fails.
    """
    found: dict[str, Path] = {}
    with suppress(UnreachableError):
        found.update(files_on_hub(source, names))  # what was found before the error stays
    return found


@contextmanager
def _explain_unreadable() -> Iterator[None]:
    """That the caches' files cannot be read, where another user made them, is told in one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP):
            raise
        variable = "TOMEVIT_HOME" if Path(error.filename).is_relative_to(home()) else "HF_HOME"
        raise DiskError(
            f"{printable(os.fsdecode(error.filename))} cannot be read: {error.strerror}: "
            f"set {variable} to a directory of your own"
        ) from error


def _put_in_place(draft: Path, path: Path) -> None:
    """A file gets its final name once a power failure can no longer take its content, also on another file system."""
    remove_unless_file(path)
    sync(draft)
    try:
        draft.replace(path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with new_file(path) as copy:
            shutil.copyfile(draft, copy)
            sync(copy)
    with suppress(OSError):  # of a directory that may be written to, and not read
        sync(path.parent)


def _find(card: Card, *, say: bool = False) -> Path | None:
    """The converted file of one of a card's sources; say which are damaged."""
    there = _look(card)
    for source in card.sources:
        for path, origin in _made_from(source, card, there).items():
            if _wrong_hash(source, origin) is None:
                return path
    for path in (path for path, known in there.items() if known is None and say):
        log.warning("%s is damaged, or of a newer version: it is made again", printable(str(path)))
    return None


@_explain_unreadable()
def _look(card: Card) -> dict[Path, Card | None]:
    """What lies in weights/ under a card's name, and the card in its header; None: it is damaged."""
    found: dict[Path, Card | None] = {}
    weights, name = home() / "weights", re.compile(re.escape(_converted_name(card, "#")).replace("\\#", "[0-9a-f]{16}"))
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in sorted(weights / each for each in os.listdir(weights) if name.fullmatch(each)):  # noqa: PTH208
            try:
                with open_file(path) as file:
                    header = decode_header(path, read_header(file)[0])
                whole = header.sha256 is None or not _has_block_of_zeros(path) or _has_digest(path, header.sha256)
                found[path] = header.card if whole else None
            except FileNotFoundError:  # a link to nothing, or removed meanwhile
                continue
            except PermissionError:
                raise
            except (OSError, ValueError):
                found[path] = None
    return found


def _has_block_of_zeros(path: Path) -> bool:
    count = path.stat().st_size // BLOCK
    if not count:
        return False
    blocks = np.memmap(path, np.uint64, "r", shape=(count, BLOCK // 8))
    return any(not blocks[i].any() for i in np.flatnonzero(blocks[:, 0] == 0))


def _has_digest(path: Path, sha256: str) -> bool:
    return checkpoint.digest_of(checkpoint.read(path, fitting=False)[1]) == sha256


def _made_from(source: Source, card: Card, there: Mapping[Path, Card | None]) -> dict[Path, Source]:
    """Of what lies in weights/, the files that were made from a source of a card, and the origin that they tell."""
    found = {}
    for path, made_as in there.items():
        if made_as is None:
            continue
        origin = made_as.origin or Source(format="")
        same = (origin.url, origin.hub) == (source.url, source.hub)
        # The name of a card without weights is made from its only address, so that it says the same.
        if card.weights is None or (same and _spell(source) in map(_spell, made_as.sources)):
            found[path] = origin
    return found


@_explain_unreadable()
def _first_available(card: Card, unfinished: Path) -> tuple[Source, Fetched]:
    """The first of a card's sources that can be had, as it is published, and its file."""
    if not card.sources:
        raise DownloadError(f"{card.full_name} is not published anywhere that tomevit knows of")
    sources = sorted(card.sources, key=lambda source: _find_brought(source, card.full_name) is None)
    if card.licence and re.search(r"\bnc\b", card.licence.lower()):
        log.warning(
            "%s is under %s, not for commercial use (%s)", card.full_name, card.licence, _web_address(card.sources[0])
        )
    reasons = []
    for source in sources:
        try:
            fetched = _fetch(source, card.full_name, unfinished)
        except DiskError:
            raise
        except DownloadError as error:
            reasons.append(str(error))
            continue
        if reasons:
            log.warning("%s is read from %s: %s", card.full_name, _spell(source), "; ".join(reasons))
        return source, fetched
    place = printable(str(_path_to_bring(sources[0], card.full_name)))
    bring = f"download {_web_address(sources[0])} elsewhere and put it at {place}"
    if is_offline():
        raise DownloadError(f"{card.full_name} is not in the cache, and HF_HUB_OFFLINE is set: {bring}")
    if len(reasons) == 1:
        raise DownloadError(f"{reasons[0]}; without a network, {bring}")
    raise DownloadError("\n  ".join([f"{card.full_name} could not be fetched; without a network, {bring}", *reasons]))


def _check_unchanged(card: Card, published: Source, fetched: Fetched) -> None:
    """Where no hash is published, the first one met counts."""
    before = {} if published.sha256 or published.md5 else _made_from(published, card, _look(card))
    if not before or _converted_name(card, str(fetched.source.sha256)[:16]) in [path.name for path in before]:
        return
    if fetched.ours:
        fetched.path.unlink()
    path, origin = next(iter(before.items()))
    raise CheckpointError(
        f"{_spell(published)} has changed: its sha256 was {origin.sha256} when it was first used here, and is "
        f"{fetched.source.sha256}; to accept that, delete {printable(str(path))}"
    )


# Places and names.


def _spell(source: Source) -> str:
    """A source as a user would give it."""
    if source.url:
        return source.url
    if source.hub:
        revision, file = source.revision and f"@{source.revision}", source.file and f"/{source.file}"
        return f"hf-hub:{source.hub}{revision or ''}{file or ''}"
    return f"package:{source.package}"


def _possible_names(source: Source) -> tuple[str, ...]:
    """The file names under which a source's file may be published."""
    if source.hub:
        return (source.file,) if source.file else HUB_FILES
    return (unquote(urlsplit(source.url or "").path).rpartition("/")[2] or "checkpoint",)


def _web_address(source: Source) -> str:
    """The URL that a person would open."""
    if source.hub:
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{source.hub}/resolve/{source.revision or 'main'}/{_possible_names(source)[0]}"
    return _spell(source)


def _path_to_bring(source: Source, folder: str, name: str | None = None) -> Path:
    """Where a file belongs that a user brings; by default, under the first of the source's names."""
    name = (name or _possible_names(source)[0]).rpartition("/")[2]
    return home() / "downloads" / _file_name(folder) / _file_name(name)


def _find_brought(source: Source, folder: str) -> str | None:
    """Which of a source's names a user brought a file of."""
    names = _possible_names(source)
    return next((name for name in names if _path_to_bring(source, folder, name).is_file()), None)


def _packaged_file(source: Source) -> Path:
    assert source.package
    return Path(str(resources.files("tomevit") / source.package))


def _converted_name(card: Card, digits: str) -> str:
    """In weights/, by the first 16 digits of the published file's sha256, or a pattern for them."""
    return f"{_file_name(card.full_name)}-{digits}.safetensors"


def _file_name(name: str) -> str:
    """A file name that every platform takes; different names stay different."""
    plain = re.sub(r"[^\w.-]|^[.-]+|[.]+$", "_", name, flags=re.ASCII)[:120]
    reserved = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", plain, flags=re.IGNORECASE)
    if plain == name and not reserved and name:
        return name
    distinct = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"_{Path(plain).stem[:90]}-{distinct}{Path(plain).suffix[:20]}"


@contextmanager
def _locked(name: str) -> Iterator[Path]:
    """Hold the lock of one name, and with it a directory for unfinished files."""
    unfinished = home() / "unfinished" / _file_name(name)
    path = home() / "locks" / f"{_file_name(name)}.lock"
    with ExitStack() as stack:
        with explain_disk_errors(home()):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_unless_file(path)
            stack.enter_context(hold_lock(path, f"fetching {name}"))
            if not unfinished.is_dir():
                remove(unfinished)
            unfinished.mkdir(parents=True, exist_ok=True)
        try:
            yield unfinished
        finally:
            if not any(is_resumable(note) for note in unfinished.glob("*.json")):
                shutil.rmtree(unfinished, ignore_errors=True)


# Fetching.


def _fetch(source: Source, folder: str, unfinished: Path) -> Fetched:
    found, ours, etag = source, False, ""
    if source.package:
        path = _packaged_file(source)
    elif name := _find_brought(source, folder):
        path, found = _path_to_bring(source, folder, name), replace(source, file=name)
    elif source.hub:
        path, found = _first_on_hub(source)
        etag = "" if shards.is_index(path) else _etag(path)
    else:
        assert source.url, f"{source} is neither a URL nor on the hub nor in the package"
        ours, name = True, _possible_names(source)[0]
        path, found = unfinished / _file_name(name), replace(source, file=name)
        download(source.url, path)
    found = replace(found, sha256=shards.sha256(path), md5=files.md5(path) if source.md5 else None)
    _check_etag(path, etag, found)
    if wrong := "is a web page, not weights" if is_web_page(path) else _wrong_hash(source, found):
        if ours:
            path.unlink()
        raise CheckpointError(f"{printable(str(path))}, from {_spell(source)}, {wrong}")
    return Fetched(path, found, ours)


def _first_on_hub(source: Source) -> tuple[Path, Source]:
    """The first of a source's names that its repository has, and the source with that name and the commit."""
    names = _possible_names(source)
    for name, path in files_on_hub(source, names):
        found = replace(source, file=name, revision=path.parents[name.count("/")].name)
        if shards.is_index(path):
            for part, there in {name: path, **_listed_on_hub(path, found)}.items():
                _check_etag(there, _etag(there), replace(found, file=part, sha256=files.sha256(there)))
        return path, found
    repo = f"{source.hub} at {source.revision}" if source.revision else source.hub
    wanted = [name for name in names if not name.endswith(".json")]
    raise DownloadError(f"{repo} on the hub has no {' and no '.join(wanted)}")


def _listed_on_hub(index: Path, source: Source) -> dict[str, Path]:
    """Those files of an index's that its repository has, beside it; offline, those in the hub's cache, if all are.

    Raises:
        DownloadError: the hub cannot be reached, or fails.
    """
    names, found = shards.read_index(index), dict[str, Path]()
    try:
        found.update(files_on_hub(source, names))
    except UnreachableError:
        if found.keys() != names.keys():
            raise
    return found


def _etag(path: Path) -> str:
    """…/snapshots/COMMIT/FILE is a link to …/blobs/ETAG, and the ETag of a large file is its sha256."""
    return path.readlink().name if path.is_symlink() else ""


def _check_etag(path: Path, etag: str, found: Source) -> None:
    if len(etag) == 64 and found.sha256 != etag:
        path.resolve().unlink()  # or huggingface_hub would hand it out for ever
        path.unlink()
        raise CheckpointError(
            f"{found.file} of {found.hub} came damaged: it has sha256 {found.sha256}, the hub says {etag}; try again"
        )


def _wrong_hash(published: Source, found: Source) -> str | None:
    """Which hash of a file is not the one that was published, None if all are."""
    for kind in ("sha256", "md5"):
        prefix, whole = getattr(published, kind), getattr(found, kind)
        if prefix and not (whole or "").startswith(prefix.lower()):
            return f"has {kind} {whole}, published is {prefix}"
    return None
