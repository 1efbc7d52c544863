"""Images from files, folders and globs: found, read, and prepared for a model by several processes.

A file that cannot be read is named and does not end the work on all others.
"""

from __future__ import annotations

import glob
import struct
import time
import warnings
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from tomevit.data.workers import load_batches
from tomevit.errors import ImageError
from tomevit.transform import Transform

if TYPE_CHECKING:
    from PIL.Image import Image

#: What counts as an image in a folder; a file named for itself is read whatever its name.
SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)  # torchvision's IMG_EXTENSIONS, and two more

#: What Pillow's decoders raise at damaged files, each its own.
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    AttributeError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
)


def find(sources: Iterable[str | PathLike[str]]) -> list[str]:
    """The image files that sources name, in order, each folder and pattern sorted.

    Args:
        sources: files, taken as they are; folders, searched with all below them for the SUFFIXES; patterns with the
            shell's wildcards, ** among them.

    Raises:
        ValueError: a source names nothing, or a folder holds no image.
    """
    found: list[str] = []
    for source in sources:
        path, source = Path(source), fspath(source)
        if path.is_dir():
            inside = sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            if not inside:
                raise ValueError(f"{source}: no image in this folder; looked for {', '.join(sorted(SUFFIXES))}")
            found += inside
        elif path.exists():
            found.append(source)
        elif glob.has_magic(source):
            names = glob.glob(source, recursive=True)  # noqa: PTH207  # Path.glob takes no absolute pattern
            matches = sorted(name for name in names if not Path(name).is_dir())
            if not matches:
                raise ValueError(f"{source}: no file matches this pattern")
            found += matches
        else:
            raise ValueError(f"{source}: there is no such file or folder")
    return found


def read(source: str | PathLike[str] | bytes, *, mode: str = "RGB", upright: bool = False, name: str = "") -> Image:
    """One image, decoded whole, as timm's and torchvision's loaders do it: the first frame, converted to a mode.

    Args:
        source: a file, or what is in one.
        mode: "RGB", or "L" for a model of one channel.
        upright: turn photographs as their EXIF data says. The loaders that published accuracies were measured with do
            not.
        name: what to call it in an error; default: the file's name.

    Raises:
        ImageError: it is no image, or damaged, or cannot be read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = name or (fspath(source) if not isinstance(source, bytes) else "image")
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise ImageError(name, error.strerror or str(error)) from error
    if not data:
        raise ImageError(name, "the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about EXIF data and palettes, none of which changes a pixel
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(data)) as image:
                image.load()
                return (ImageOps.exif_transpose(image) if upright else image).convert(mode)
    except UnidentifiedImageError as error:
        raise ImageError(name, "not an image of a known format") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(name, f"too many pixels: {error}") from error
    except DAMAGED as error:
        raise ImageError(name, f"damaged: {error or type(error).__name__}") from error


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
    sampler = range(len(files)) if indices is None else indices
    yield from load_batches(_Files(files, transform, upright), workers, _collate, batch_size=batch, sampler=sampler)


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
        return transform(read(source, mode=mode, upright=upright) if isinstance(source, str | bytes) else source)
    except ImageError as error:
        return error.reason


def _collate(items: Sequence[tuple[int, Tensor | str]]) -> Batch:
    places = torch.tensor([i for i, image in items if isinstance(image, Tensor)], dtype=torch.int64, device="cpu")
    images = [image for _, image in items if isinstance(image, Tensor)]
    unreadable = [(i, reason) for i, reason in items if isinstance(reason, str)]
    return Batch(places, torch.stack(images) if images else torch.empty(0, device="cpu"), unreadable)
