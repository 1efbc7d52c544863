"""The images to train on, and to measure on: handwritten digits, a folder of images, or generated noise.

    data = load_data("digits", tomevit.transform(model))
    for images, labels in torch.utils.data.DataLoader(data.train, batch_size=64, shuffle=True): ...

A folder has train/ and val/ in it, and in each of them a folder for every class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from tomevit.errors import import_extra
from tomevit.training.digits import DIGITS, SPLIT_SEED, load_split, move_digits
from tomevit.transform import TrainingTransform, Transform

if TYPE_CHECKING:
    from PIL.Image import Image


class DataError(ValueError):
    """There are no such data, or an image is none; one sentence."""

    def __init__(self, message: str) -> None:
        # A loader's worker wraps what it met in a traceback, and ends it with the error's name and message.
        super().__init__(message.strip().rpartition("\n")[2].removeprefix(f"{__name__}.DataError: "))


class Images(Dataset[tuple[Tensor, int]]):
    """Images ready for a model, (C, H, W) float32, and their labels.

    What `transform` draws from torch's default generator depends on (seed, epoch, index) alone: not on the order, nor
    on the number of workers, nor on what was drawn before. Outside, the generator stays as it was.

    Args:
        source: has a length, and gives an image and a label at an index.
        transform: from the source's image to the model's.
        seed: 0 or more.
        repeats: the indices from len(self) on begin again, so many times in all, with other draws (repeated
            augmentation, arXiv:1902.05509). A sampler has to ask for them: the length does not count them.
    """

    def __init__(
        self, source: Dataset[Any], transform: Callable[[Any], Tensor], *, seed: int = 0, repeats: int = 1
    ) -> None:
        assert isinstance(source, Sized)
        self.source, self.transform, self.seed = source, transform, seed
        self.length, self.repeats = len(source), repeats
        # Shared, so that workers that live on see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Call it before each pass, as for a DistributedSampler."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self.length * self.repeats:
            raise IndexError(f"there is no image {index}: there are {self.length}, {self.repeats} times")
        image, label = self.source[index % self.length]
        with seeded(self.seed, int(self._epoch), index):
            return self.transform(image), int(label)


class Data(NamedTuple):
    train: Images
    test: Images
    classes: tuple[str, ...]


def load_data(
    source: str,
    preprocess: Transform,
    augment: Callable[[Any], Tensor] | None = None,
    *,
    seed: int = 0,
    repeats: int = 1,
    validate: bool = False,
    limit: int | None = None,
    measure: int | None = None,
) -> Data:
    """Images to train on, and to measure on.

    Args:
        source: "digits", "mnist", or a folder.
        preprocess: the model's, `tomevit.transform(model)`.
        augment: instead of it in training, from the source's image (digits: (1, H, W) uint8; a folder: PIL, RGB) to the
            model's; it may draw from torch's default generator, and from no other. See `augmentation`.
        seed: of the augmentation.
        repeats: see `Images`.
        validate: of the digits, leave the held-out images aside and measure on a part of the others. A folder's val/
            is what is measured on either way.
        limit: train on so many images only, the same at every call.
        measure: measure on so many only, likewise.

    Raises:
        DataError: there are no such data; the message says what is missing. Reading an image raises it too, if the file
            is none.
        ValueError: a package is missing.
    """
    check_source(source)
    train: Dataset[Any]
    test: Dataset[Any]
    if source in DIGITS:
        train, test = (TensorDataset(*digits) for digits in load_split(source, validate=validate))
        classes = tuple("0123456789")
    else:
        train, test, classes = _folders(Path(source))
    train, test = _some(train, limit), _some(test, measure)
    return Data(Images(train, augment or preprocess, seed=seed, repeats=repeats), Images(test, preprocess), classes)


def _some(images: Dataset[Any], limit: int | None) -> Dataset[Any]:
    if limit is None:
        return images
    assert isinstance(images, Sized)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return Subset(images, order[:limit].tolist())


def augmentation(
    source: str, preprocess: Transform, *, randaugment: tuple[int, int] | None = None, erasing: float = 0.0
) -> Callable[[Any], Tensor]:
    """What to do to the images of a source in training, up to the model's input.

    The digits move a little (`move_digits`). Images of a folder are cropped and flipped by chance, as networks are
    trained on ImageNet ever since (arXiv:1409.4842, section 6).

    Args:
        randaugment: number of operations and their magnitude out of 30, as torchvision counts; None: without
            (arXiv:1909.13719).
        erasing: the probability that a rectangle is replaced by noise (arXiv:1708.04896).
    """
    digits = source in DIGITS
    trained = TrainingTransform(
        preprocess.preprocess, preprocess.size, crop=not digits, randaugment=randaugment, erasing=erasing
    )
    return _Chain([_move_one, trained]) if digits else trained


def _move_one(image: Tensor) -> Tensor:
    return move_digits(image[None])[0]


class _Chain:
    """One after the other; a class, so that it travels to workers."""

    def __init__(self, steps: list[Callable[[Any], Any]]) -> None:
        self.steps = steps

    def __call__(self, image: Any) -> Tensor:
        for step in self.steps:
            image = step(image)
        return image


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Let torch's default generator on the CPU depend on these numbers alone; afterwards it is as it was."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0]))
    try:
        yield
    finally:
        torch.set_rng_state(before)


class _Noise(Dataset[tuple[Any, int]]):
    """PIL images."""

    def __init__(self, length: int, classes: int, size: tuple[int, int]) -> None:
        self.length, self.classes, self.size = length, classes, size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Any, int]:
        import PIL.Image

        pixels = np.random.default_rng(index).integers(256, size=(*self.size, 3), dtype=np.uint8)
        return PIL.Image.fromarray(pixels), index % self.classes


def noise_data(
    preprocess: Transform,
    augment: Callable[[Any], Tensor],
    *,
    length: int,
    classes: int = 1000,
    seed: int = 0,
    repeats: int = 1,
) -> Data:
    """Generated images that take the way of a folder's, to see what a training needs; arguments as `load_data`."""
    height, width = (round(1.25 * pixels) for pixels in preprocess.size)
    noise = _Noise(length, classes, (height, width))
    return Data(
        Images(noise, augment, seed=seed, repeats=repeats), Images(noise, preprocess), tuple(map(str, range(classes)))
    )


# --- Folders ----------------------------------------------------------------------------------------------------------


def check_source(source: str) -> None:
    """Whether it is one, as far as a glance can tell.

    Raises:
        DataError: there is no such folder, or there are not the folders in it.
    """
    root = Path(source)
    if source in DIGITS:
        return
    if not root.is_dir():
        raise DataError(
            f"there is no folder {source}; the data are 'digits', 'mnist', or a folder with train/ and val/ in it"
        )
    for path in (root / "train", root / "val"):
        if not path.is_dir():
            raise DataError(
                f"{root} has no {path.name}/ in it; it must have train/ and val/, a folder per class in each"
            )
        if not any(entry.is_dir() for entry in path.iterdir()):
            raise DataError(f"{path} has no folders in it; it must have one per class, with the images of that class")


def _folders(root: Path) -> tuple[Dataset[Any], Dataset[Any], tuple[str, ...]]:
    folder = import_extra("torchvision.datasets", "folders of images").ImageFolder
    try:
        train, test = (folder(str(root / part), loader=_read_image) for part in ("train", "val"))
    except FileNotFoundError as error:  # a class without images: torchvision names it
        raise DataError(f"{root}: {str(error).splitlines()[0]}") from error
    for has, lacks, parts in ((train, test, ("train", "val")), (test, train, ("val", "train"))):
        if more := sorted({*has.classes} - {*lacks.classes}):
            raise DataError(
                f"{root}: {parts[0]}/ has a class {more[0]} and {parts[1]}/ has not; both need the same classes"
            )
    if len(train.classes) < 2:
        raise DataError(f"{root / 'train'} has one class alone; there must be two or more to tell apart")
    return train, test, tuple(train.classes)


def _read_image(path: str) -> Image:
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            return image.convert("RGB")
    # What Pillow raises for a damaged file depends on the format, and is any of these.
    except (OSError, SyntaxError, ValueError, EOFError, PIL.Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error
