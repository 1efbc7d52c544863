"""Images from files, folders and globs: found, read, and prepared for a model by several processes.

A file that cannot be read is named and does not end the work on all others.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
import struct
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import SEEK_END, BytesIO
from os import PathLike, fspath
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from tomevit.data.workers import load_batches
from tomevit.errors import ImageError, NotRegularFileError
from tomevit.opening import open_file, special_kind
from tomevit.transform import Transform, convert

if TYPE_CHECKING:
    from PIL.Image import Image

#: What counts as an image in a folder; a file named for itself is read whatever its name.
SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)  # torchvision's IMG_EXTENSIONS, and two more

#: Bytes that the file of an image may have: six for each of the pixels that Pillow takes, which is colour of 16 bits.
MOST_BYTES = 2**29
#: Bytes of a file that is read once more without what describes its image.
MOST_BYTES_AGAIN = 2**27

#: What begins with a dot, among what is passed over.
HIDDEN = "hidden"


# ---------------------------------------------------------------------------------------------------------------- files


class Found(NamedTuple):
    """The image files that sources name."""

    files: list[str]
    left_out: Counter[str]  # what was passed over, though it is named as an image, by kind: {"hidden": 2, "a pipe": 1}

    def passed_over(self) -> str:
        """What was passed over, as a sentence without its end; "" if nothing was."""
        count = self.left_out.total()
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in self.left_out.most_common() if number)
        return f"{count:,} file{' was' if count == 1 else 's were'} passed over: {kinds}" if count else ""


def find(sources: Iterable[str | PathLike[str]]) -> list[str]:
    """The image files that sources name, in order, each folder and pattern sorted.

    Links to files and folders are followed; a folder to which several paths lead is searched once. What begins with a
    dot is passed over wherever a folder is searched, and so is what is no regular file.

    Args:
        sources: files, taken as they are; folders, searched with all below them for the SUFFIXES; patterns with the
            shell's wildcards, ** among them.

    Raises:
        ValueError: a source names nothing, or a folder holds no image.
    """
    return search(sources).files


def search(sources: Iterable[str | PathLike[str]]) -> Found:
    """`find`, with what it passed over."""
    found = Found([], Counter())
    for source in sources:
        path, source = Path(source), fspath(source)
        if not source:
            raise ValueError("the path of an image is empty; the current folder is .")
        if path.is_dir():
            _extend(found, _in_folder(path), f"{source}: no image in this folder; looked for {_suffixes()}")
        elif path.exists():
            found.files.append(source)
        elif glob.has_magic(source):
            _extend(found, _matching(source), f"{source}: no file matches this pattern")
        else:
            raise ValueError(f"{source}: {os.strerror(errno.ENOENT)}")
    return found


def _suffixes() -> str:
    return ", ".join(sorted(SUFFIXES))


def _extend(found: Found, more: Found, complaint: str) -> None:
    if not more.files:
        passed_over = more.passed_over()
        raise ValueError(f"{complaint}; {passed_over}" if passed_over else complaint)
    found.files.extend(sorted(more.files))
    found.left_out.update(more.left_out)


def _in_folder(top: Path) -> Found:
    """The images at any depth below a folder."""
    found = Found([], Counter())
    for folder, files in _folders(str(top), found.left_out):
        for entry in files:
            path = os.path.join(folder, entry.name)  # noqa: PTH118  # which adds no "./"
            if _holds(entry.is_file):  # as the folder has it: no question for each file
                found.files.append(path)
            else:
                _add(found, path)
    return found


def _matching(pattern: str) -> Found:
    """The files that a pattern names, whatever their suffix."""
    found = Found([], Counter())
    for path in set(_names(pattern)):
        _add(found, path)
    return found


def _add(found: Found, path: str) -> None:
    """Add what is a file, or cannot be looked at: reading it will say why."""
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        mode = stat.S_IFREG
    if stat.S_ISREG(mode):
        found.files.append(path)
    else:
        found.left_out["a folder" if stat.S_ISDIR(mode) else special_kind(mode)] += 1


def _folders(top: str, left_out: Counter[str]) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """A folder and all below it, each once, with what is named as an image; without what begins with a dot.

    Links come last: of several paths to a folder the one without links is taken, and links may lead in circles.
    """
    folders = ["" if top == os.curdir else top]
    links: list[str] = []
    seen: set[tuple[int, int]] = set()
    while folders or links:
        folder = folders.pop() if folders else links.pop()
        try:
            status = Path(folder).stat()
            with os.scandir(folder or os.curdir) as inside:
                entries = sorted(inside, key=lambda entry: entry.name)
        except OSError:
            left_out["a folder that cannot be opened"] += 1
            continue
        if (status.st_dev, status.st_ino) in seen:
            left_out["a link to a folder that was searched"] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        files = []
        for entry in entries:
            is_folder = _holds(entry.is_dir)
            if not is_folder and Path(entry.name).suffix.lower() not in SUFFIXES:
                continue
            if entry.name.startswith("."):
                left_out[HIDDEN] += 1
            elif is_folder:
                path = os.path.join(folder, entry.name)  # noqa: PTH118
                (links if entry.is_symlink() else folders).append(path)
            else:
                files.append(entry)
        yield folder, files


def _holds(ask: Callable[[], bool]) -> bool:
    """What an entry of a folder answers; not where it is a link to itself."""
    try:
        return ask()
    except OSError:
        return False


def _names(pattern: str) -> Iterator[str]:
    """`glob.glob`, but that ** follows no link in circles."""
    around = re.search(r"(?:^|(?<=/))\*\*(?:/|$)", pattern)
    if around is None:
        yield from glob.glob(pattern)  # noqa: PTH207  # Path.glob takes no absolute pattern
        return
    head, tail = pattern[: around.start()], pattern[around.end() :] or "*"
    for top in glob.glob(head) if head else [""]:  # noqa: PTH207
        for folder, _ in _folders(top, Counter()):
            yield from _names(os.path.join(glob.escape(folder), tail))  # noqa: PTH118


# --------------------------------------------------------------------------------------------------------------- pixels


def read(source: str | PathLike[str] | bytes, *, mode: str = "RGB", upright: bool = False, name: str = "") -> Image:
    """One image, decoded whole, as timm's and torchvision's loaders do it: the first frame, converted to a mode.

    Only the formats of SUFFIXES are decoded, by Pillow itself: no other program is started, whatever the file holds.
    Data beside the pixels (EXIF, texts, profiles) makes no image unreadable. Unlike in those loaders grey of 16 bits
    keeps its high byte, where they make it white.

    JPEGs are decoded at full size. At a fourth of it, which their format offers, a photograph of 5,120 × 3,416 becomes
    an input whose values are 0.25 to 0.4 of 255 levels off in the mean and up to 5: no longer what published
    accuracies were measured with.

    Args:
        source: a file, or what is in one.
        mode: "RGB", or "L" for a model of one channel.
        upright: turn photographs as their EXIF data says. The loaders that published accuracies were measured with do
            not.
        name: what to call it in an error; default: the file's name.

    Raises:
        ImageError: it is no image, or damaged, or cannot be read, or has more pixels than PIL.Image.MAX_IMAGE_PIXELS.
    """
    from PIL import Image

    name = name or (fspath(source) if not isinstance(source, bytes) else "image")
    try:
        with BytesIO(source) if isinstance(source, bytes) else open_file(source) as file:
            size = file.seek(0, SEEK_END)
            if not 0 < size <= MOST_BYTES:
                many = f"the file has {size:,} bytes, and no image has more than {MOST_BYTES:,}"
                raise ImageError(name, many if size else "the file is empty")
            try:
                return _decode(file, mode, upright)
            except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError):
                raise
            except Exception:
                if (pixels := _pixels_alone(file, size)) is None:
                    raise
                return _decode(pixels, mode, upright)
    except ImageError:
        raise
    except Exception as error:  # decoders raise whatever they come upon: KeyError, RecursionError, …
        raise ImageError(name, _reason(error)) from error


def _decode(file: IO[bytes], mode: str, upright: bool) -> Image:
    from PIL import Image

    known = Image.registered_extensions()
    formats = sorted({known[suffix] for suffix in SUFFIXES if suffix in known})
    with Image.open(file, formats=formats) as image:
        width, height = image.size
        most = Image.MAX_IMAGE_PIXELS
        if most is not None and width * height > most:
            raise Image.DecompressionBombError(f"{width:,} × {height:,}, and {most:,} may be decoded")
        # What libtiff asks memory for, whatever the size of the image.
        tile = getattr(image, "tag_v2", {}).get(322, 0) * getattr(image, "tag_v2", {}).get(323, 0)
        if tile > max(4 * width * height, 2**22):
            raise ValueError(f"it has tiles of {tile:,} pixels, and is {width:,} × {height:,}")
        image.load()
        image.info.pop("transparency", None)  # of a palette: it changes no colour, and Pillow would warn of it
        turned = _turned(image) if upright else image
        if turned.mode in ("I", "F"):
            turned = _grey(turned, image.format)
        return convert(turned, mode)


def _turned(image: Image) -> Image:
    """As the orientation says that is in its EXIF data, whatever else is there."""
    from PIL.ExifTags import Base
    from PIL.Image import Transpose

    turns = (
        Transpose.FLIP_LEFT_RIGHT,
        Transpose.ROTATE_180,
        Transpose.FLIP_TOP_BOTTOM,
        Transpose.TRANSPOSE,
        Transpose.ROTATE_270,
        Transpose.TRANSVERSE,
        Transpose.ROTATE_90,
    )  # of orientations 2 to 8
    orientation = None
    with suppress(Exception):  # whatever Pillow comes upon there: then it says nothing
        orientation = image.getexif().get(Base.Orientation)
    return image.transpose(turns[orientation - 2]) if isinstance(orientation, int) and 2 <= orientation <= 8 else image


def _grey(image: Image, kind: str | None) -> Image:
    """Of grey in 32 bits: Pillow's older versions have that of 16 bits in them."""
    from PIL import Image

    if image.mode == "I" and kind in ("PNG", "PPM"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    raise NotImplementedError(
        "its pixels have 32 bits, of which nothing says what is white: make it one of 8 or 16 bits"
    )


def _reason(error: Exception) -> str:
    """Why an image cannot be read, in words."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"too many pixels: {error}"
    if isinstance(error, MemoryError):
        return "there is too little memory for it"
    if isinstance(error, NotImplementedError):
        return str(error)
    if isinstance(error, NotRegularFileError):
        return str(error).rpartition(" is ")[2]
    if isinstance(error, IsADirectoryError):
        return os.strerror(errno.EISDIR)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"damaged: {str(error) or type(error).__name__}"


def _pixels_alone(file: IO[bytes], size: int) -> IO[bytes] | None:
    """A PNG or JPEG without what only describes it; None of others, and where there is nothing of the kind.

    Pillow gives an image up for a text or a profile that is long or damaged, though its pixels are whole.
    """
    if size > MOST_BYTES_AGAIN:
        return None
    file.seek(0)
    data = file.read()
    parts = _png_chunks(data) if data.startswith(b"\x89PNG\r\n\x1a\n") else _jpeg_segments(data)
    alone = b"".join(parts)
    return BytesIO(alone) if 0 < len(alone) < len(data) else None


def _png_chunks(data: bytes) -> Iterator[bytes]:
    yield data[:8]
    at = 8
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data.ljust(at + 8, b"\0"), at)
        if kind[:1].isupper() or kind == b"eXIf":  # a capital letter: no pixels without it
            yield data[at : at + 12 + length]
        at += 12 + length


def _jpeg_segments(data: bytes) -> Iterator[bytes]:
    if not data.startswith(b"\xff\xd8"):
        return
    yield data[:2]
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"", b"\xda"):  # where pixels begin
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if (
            not (0xE0 <= data[at + 1] < 0xF0 or data[at + 1] == 0xFE) or data[at + 1] == 0xEE
        ):  # it says what colours are
            yield data[at:end]
        at = end
    yield data[at:]


# -------------------------------------------------------------------------------------------------------------- streams


class Batch(NamedTuple):
    """Images that were read, and those that were not, by their place among all files."""

    places: Tensor  # (B,) int64
    images: Tensor  # (B, C, H, W) float32, prepared for the model
    unreadable: list[tuple[int, str]]  # places and reasons


class Strings(Sequence[str]):
    """A sequence of strings in two arrays: processes that are forked share it for good, however many there are.

    Of a list they would own a copy each, in time: looking at a string counts as writing to it.

    Attributes:
        data: all strings one after the other, uint8, in UTF-8; bytes that are none, as in names of files, are kept.
        ends: where each ends in it, int64, and a 0 in front.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        self.data = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    @classmethod
    def packed(cls, data: NDArray[np.uint8], ends: NDArray[np.int64]) -> Strings:
        """From the arrays of another."""
        strings = cls(())
        strings.data, strings.ends = data, ends
        return strings

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # of one string
        begin, end = self.ends[: len(self)][index], self.ends[1:][index]
        return self.data[begin:end].tobytes().decode("utf-8", "surrogateescape")


def stream(
    files: Sequence[str | bytes | Image | Tensor],
    transform: Transform,
    *,
    batch: int = 32,
    workers: int = 0,
    indices: Sequence[int] | None = None,
    upright: bool = False,
) -> Generator[Batch]:
    """Files as batches for a model, in order, read and prepared by several processes.

    What cannot be read is reported in its batch, which is so much smaller and may be empty.

    Args:
        files: to read; or what is in one, or an image in memory as the transform takes it.
        transform: the model's (`tomevit.transform`).
        batch: files per batch.
        workers: processes that read; 0: this one.
        indices: the places of the files to read, in this order; None: all.
        upright: as in `read`.
    """
    dataset = _Files(files, transform, upright)
    sampler = range(len(files)) if indices is None else indices
    yield from load_batches(dataset, workers, _collate, batch_size=batch, sampler=sampler, worker_init_fn=quiet)


@contextmanager
def reading() -> Iterator[None]:
    """While images are streamed: raises OSError when a process that reads them dies, as torch tells it anywhere."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(f"a process that reads images died: {str(error).splitlines()[0]}") from error
    except (ConnectionError, EOFError) as error:  # it died while it handed over a batch
        raise OSError(f"a process that reads images died: {_last_words() or error}") from error


def _last_words() -> str:
    """What torch says of the process that died: as an exception, in whatever line its signal arrives."""
    try:
        time.sleep(1)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def quiet(_: int) -> None:
    """Of a process that reads images: what Pillow warns of there (EXIF data, palettes) changes no pixel."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


class _Files(Dataset[tuple[int, Tensor | str]]):
    def __init__(self, files: Sequence[str | bytes | Image | Tensor], transform: Transform, upright: bool) -> None:
        names = [file for file in files if isinstance(file, str)]
        self.files = Strings(names) if len(names) == len(files) else files
        self.transform = transform
        self.upright = upright

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        return index, prepare_image(self.files[index], self.transform, upright=self.upright)


def prepare_image(source: str | bytes | Image | Tensor, transform: Transform, *, upright: bool = False) -> Tensor | str:
    """An image as a model takes it, (C, H, W) float32; or why it cannot be read. Arguments as `stream`."""
    mode = "L" if len(transform.preprocess.mean) == 1 else "RGB"
    try:
        image = read(source, mode=mode, upright=upright) if isinstance(source, str | bytes) else source
    except ImageError as error:
        return error.reason
    try:
        return transform(image)
    except ValueError:  # no fault of the image: it is of another kind than the model takes
        raise
    except Exception as error:  # too little memory; or the image was opened elsewhere, and is decoded only now
        return _reason(error)


def _collate(items: Sequence[tuple[int, Tensor | str]]) -> Batch:
    places = torch.tensor([i for i, image in items if isinstance(image, Tensor)], dtype=torch.int64, device="cpu")
    images = [image for _, image in items if isinstance(image, Tensor)]
    unreadable = [(i, reason) for i, reason in items if isinstance(reason, str)]
    return Batch(places, torch.stack(images) if images else torch.empty(0, device="cpu"), unreadable)
