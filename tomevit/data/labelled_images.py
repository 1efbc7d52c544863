"""Images with their classes, from the layouts in which such sets come: a folder per class, or one folder and a list.

A wrong class for a folder is a wrong accuracy, and nothing else shows it. So nothing is guessed here: what the names do
not settle is refused, with what would settle it.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from tomevit.data.images import HIDDEN, SUFFIXES, Found, search
from tomevit.errors import join_with_or, printable
from tomevit.opening import read_small_file

#: Where the images to evaluate lie, below a set's folder: as Kaggle has ILSVRC, as torchvision has it, or right there.
PLACES = ("ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val", "val", "validation", ".")

#: Files that say which class each image of ILSVRC's flat validation folder has: Kaggle's, the development kits', TF's.
TRUTHS = (
    "LOC_val_solution.csv",
    "ILSVRC2012_validation_ground_truth.txt",
    "ILSVRC2015_clsloc_validation_ground_truth.txt",
    "imagenet_2012_validation_synset_labels.txt",
)
KITS = (".", "ILSVRC2012_devkit_t12/data", "devkit/data")  # where those files lie, beside the images or above them

#: The ground truth of ILSVRC 2012 to 2017, by the name of its file or by how it begins.
GROUND_TRUTH = re.compile(r"ILSVRC201[2-7]\w*_validation_ground_truth", re.IGNORECASE)
BEGINNING = ["490", "361", "171", "822", "297", "482", "13", "704"]

NUMBERED = re.compile(r"ILSVRC201\d_val_0*(\d+)$")
#: Bytes that a list may have.
MOST = 2**28
#: How texts in several encodings begin; without such a mark they are in UTF-8. The longer one comes first.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
#: How Excel says what is between the cells, on a line of its own; and a cell that is quoted whole.
SEPARATOR = re.compile(r'"?sep=(.)"?', re.IGNORECASE)
QUOTED = re.compile(r'"([^"]|"")*"')

HEADINGS = {"imageid", "image_id", "image", "id", "file", "filename", "file_name", "name", "path"}


class Labelled(NamedTuple):
    """Images with their classes."""

    files: list[str]
    labels: list[int]  # what the model's output has to be, one for each file
    how: str  # where the labels come from, in words
    notes: tuple[str, ...] = ()  # what else should be known of this set
    passed_over: str = ""  # what is no image there, in words


class Classes(NamedTuple):
    """The class that each name stands for."""

    of: dict[str, int]
    how: str


@cache
def ilsvrc_wnids() -> tuple[str, ...]:
    """The WordNet ids of ILSVRC 2012's classes in the order of their ILSVRC2012_ID, from 1.

    Models have their classes in another order, that of the sorted ids. Both orders are facts that can be checked: over
    all 50,000 validation images the numbers in ILSVRC2012_validation_ground_truth.txt and the ids in Kaggle's
    LOC_val_solution.csv give exactly this list, which is that of map_clsloc.txt in the development kit of 2015.
    """
    text = resources.files("tomevit").joinpath("assets", "ilsvrc2012_wnids.txt").read_text(encoding="ascii")
    return tuple(text.split())


@cache
def imagenet_classes() -> dict[str, int]:
    """The class of each WordNet id, as models trained on ImageNet-1k have it: its place among the sorted ids."""
    return {wnid: i for i, wnid in enumerate(sorted(ilsvrc_wnids()))}


def labelled(
    data: str | PathLike[str],
    num_classes: int,
    class_names: Sequence[str] = (),
    *,
    truth: str | PathLike[str] | None = None,
) -> Labelled:
    """The images below a folder, with the class that a model should answer for each.

    Args:
        data: a folder for each class; or images and a list of their classes, given as `truth` or found by its name
            (TRUTHS); or a folder that has either of them in one of PLACES.
        num_classes: of the model.
        class_names: of the model, in the order of its outputs; none: not known.
        truth: a file with a line "image class" for each image (also with a comma or a tab between, and of a .csv the
            first two columns); or a line with the class alone for each image in order. A class is a WordNet id, one of
            class_names, or the number of an output, from 0. In the ground truth of ILSVRC 2012 it is an ILSVRC2012_ID.
            The file is in UTF-8, or begins with the mark of another Unicode; paths may be written as on Windows.

    Raises:
        ValueError, OSError: there are no images, or it is not certain which class each has; the message says what is
            missing.
    """
    root = Path(data)
    if not root.is_dir():
        raise ValueError(f"{root}: there is no such folder")
    if num_classes < 2:
        raise ValueError(f"the model has {num_classes} classes: nothing that could be right or wrong")
    folder = next(root / place for place in PLACES if (root / place).is_dir())
    folders, images = _contents(folder)
    if truth is None and folders and images:
        raise ValueError(
            f"{folder}: both folders and images, as {folders[0].name}/ and {images[0].name}; there must be a folder "
            f"for each class, or images and a list of their classes (--truth)"
        )
    if truth is None and folders:
        return _from_folders(folder, folders, num_classes, class_names)
    if truth is None:
        truth = _find_truth(folder)
    found = search([folder])
    if truth is None:
        raise ValueError(
            f"{folder}: no folder for each class, and no list of the images' classes: name it with --truth, or put one "
            f"of {', '.join(TRUTHS)} beside the images"
        )
    listed = _from_truth(folder, found.files, Path(truth), num_classes, class_names)
    return listed._replace(passed_over=found.passed_over())


def _contents(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders and the images right in a folder, sorted by name."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    folders = [entry for entry in entries if entry.is_dir()]
    return folders, [entry for entry in entries if entry.suffix.lower() in SUFFIXES and entry.is_file()]


def _from_folders(folder: Path, folders: Sequence[Path], num_classes: int, class_names: Sequence[str]) -> Labelled:
    names = [path.name for path in folders]
    classes = _classes(names, num_classes, class_names, f"{folder}: the folders", complete=len(names) == num_classes)
    found = Found([], Counter({HIDDEN: sum(path.name.startswith(".") for path in folder.iterdir() if path.is_dir())}))
    labels: list[int] = []
    for path in folders:
        files, left_out = search([path])
        found.files.extend(files)
        found.left_out.update(left_out)
        labels += [classes.of[path.name]] * len(files)
    missing = num_classes - len(names)
    notes = (f"Images of {len(names)} classes; answers are among all {num_classes}.",) if missing else ()
    return Labelled(found.files, labels, f"{len(names)} folders, {classes.how}", notes, found.passed_over())


# -------------------------------------------------------------------------------------------------------------- classes


def is_imagenet(num_classes: int, class_names: Sequence[str]) -> bool:
    """Whether a model's classes are those of ImageNet-1k in the usual order, as far as they say.

    The first is a tench and the last is toilet tissue in every list of names that is about.
    """
    if num_classes != len(imagenet_classes()):
        return False
    if not class_names or list(class_names) == list(imagenet_classes()):
        return True
    return class_names[0].lower().startswith("tench") and class_names[-1].lower().startswith("toilet")


def _classes(
    names: Collection[str], num_classes: int, class_names: Sequence[str], what: str, *, complete: bool
) -> Classes:
    """The class of each name.

    Args:
        names: each once, sorted.
        what: has them, for the message.
        complete: there is a name for each class, and the order of names may be that of the classes.
    """
    imagenet = is_imagenet(num_classes, class_names)
    known: list[tuple[dict[str, int], str]] = []
    if class_names:
        count = Counter(class_names)  # "crane" and "maillot" are two classes each in some lists
        own = {name: i for i, name in enumerate(class_names) if count[name] == 1}
        known.append((own, "named as the model's classes"))
    if imagenet:
        known.append((imagenet_classes(), "by WordNet id"))
    for index, how in known:
        if all(name in index for name in names):
            return Classes({name: index[name] for name in names}, how)

    numbers = {name: int(name) for name in names if re.fullmatch(r"[0-9]{1,9}", name)}
    if imagenet and len(set(numbers.values())) == len(names) and max(numbers.values()) < num_classes:
        return Classes(numbers, "numbered as the model's outputs, from 0")  # as ImageNetV2 has them
    if complete and not class_names and not imagenet:
        if len(numbers) == len(names) and sorted(names) != sorted(names, key=int):
            raise ValueError(
                f"{what} are numbers, which most loaders take in the order of text, 0, 1, 10, …: which order the model "
                f"was trained with must be said, by a file with its classes in order (--classes)"
            )
        return Classes({name: i for i, name in enumerate(sorted(names))}, "sorted by name, in the order of the outputs")
    expected = []
    if class_names:
        expected.append(f"names of the model's {num_classes} classes, such as {class_names[0]!r}")
    if imagenet:
        expected.append("WordNet ids of ImageNet-1k, such as n01440764")
    if not expected:
        raise ValueError(
            f"{what} are {len(names)}, as {next(iter(names))!r}, and the model's {num_classes} classes have no names; "
            f"a file with its classes in order (--classes) would say which is which"
        )
    nearest, _ = max(known, key=lambda pair: sum(name in pair[0] for name in names))
    strange = next(name for name in names if name not in nearest)
    raise ValueError(
        f"{what} should be {join_with_or(expected)}, and {strange!r} is not; if the model has such a class, a file "
        f"with its classes in order (--classes) would say which"
    )


def read_class_names(path: str | PathLike[str], num_classes: int) -> tuple[str, ...]:
    """The names of a model's classes from a file with one on each line, in the order of its outputs.

    Raises:
        ValueError: there are not as many as classes, or one comes twice.
        OSError: the file cannot be read.
    """
    names = tuple(map(_unquoted, _lines(Path(path))))
    if len(names) != num_classes:
        raise ValueError(f"{path} names {len(names)} classes, and the model has {num_classes}")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{path} names {name!r} twice")
        seen.add(name)
    return names


# ---------------------------------------------------------------------------------------------------------------- truth


def _find_truth(folder: Path) -> Path | None:
    """A list of classes by its usual name: beside the images, or above them, as far as Kaggle's is."""
    for place in (folder, *folder.absolute().parents[:4]):
        for kit in KITS:
            for name in TRUTHS:
                if (place / kit / name).is_file():
                    return place / kit / name
    return None


def _from_truth(
    folder: Path, files: Sequence[str], truth: Path, num_classes: int, class_names: Sequence[str]
) -> Labelled:
    """Images anywhere below a folder, and a list of their classes."""
    rows = list(_rows(truth))
    if not rows:
        raise ValueError(f"{truth} is empty; it must have a line for each image")
    alone = [len(row) == 1 for row in rows]
    if any(alone) and not all(alone):
        line = alone.index(not alone[0])
        raise ValueError(
            f"{truth} has lines of two kinds, as {' '.join(rows[0])!r} and {' '.join(rows[line])!r}; each must be an "
            f"image and its class, or each a class alone"
        )
    values = [row[-1] for row in rows]
    if all(alone) and _is_ground_truth(truth, values):
        if not is_imagenet(num_classes, class_names):
            raise ValueError(f"{truth} has the classes of ImageNet-1k, and the model has {num_classes} others")
        classes = _ilsvrc_numbers(truth, values)
    else:
        classes = _listed_classes(truth, values, num_classes, class_names)
    of_file = _by_place(truth, values, folder, files) if all(alone) else _by_name(truth, rows, folder, files)

    labels, missing = [], []
    for file in files:
        value = of_file(file)
        if value is None:
            missing.append(file)
        else:
            labels.append(classes.of[value])
    if missing:
        raise ValueError(f"{truth} has no class for {len(missing)} of {len(files)} images, as {missing[0]}")
    without = len(rows) - len(files)
    notes = (f"{truth.name} has {len(rows)} classes, and there are {len(files)} images.",) if without else ()
    return Labelled(list(files), labels, f"{truth.name}, {classes.how}", notes)


def _listed_classes(truth: Path, values: Sequence[str], num_classes: int, class_names: Sequence[str]) -> Classes:
    """What the values in a list mean: numbers are those of outputs, whatever order text would have."""
    names = sorted(set(values))
    if all(re.fullmatch(r"-?[0-9]{1,9}", name) for name in names) and not set(names) <= set(class_names):
        if wrong := [name for name in names if not 0 <= int(name) < num_classes]:
            furthest = max(wrong, key=lambda name: abs(int(name)))
            raise ValueError(
                f"{truth} has the class {furthest}, and the model's are 0 to {num_classes - 1}; the numbers of "
                f"ILSVRC's own ground truth, 1 to 1000, are known by its name, {TRUTHS[1]}"
            )
        return Classes({name: int(name) for name in names}, "numbers of the model's outputs, from 0")
    return _classes(names, num_classes, class_names, f"{truth}: the classes", complete=False)


def _is_ground_truth(truth: Path, values: Sequence[str]) -> bool:
    """Whether a list of classes alone is ILSVRC's own, by the name of its file or by how it begins."""
    return bool(GROUND_TRUTH.match(truth.name)) or list(values[: len(BEGINNING)]) == BEGINNING


def _ilsvrc_numbers(truth: Path, values: Sequence[str]) -> Classes:
    """The class of each ILSVRC2012_ID."""
    index = {str(i): imagenet_classes()[wnid] for i, wnid in enumerate(ilsvrc_wnids(), 1)}
    if wrong := [value for value in values if value not in index]:
        raise ValueError(f"{truth} has {wrong[0]!r}, and the numbers of ILSVRC's ground truth are 1 to {len(index)}")
    return Classes(index, "ILSVRC2012_IDs")


def _by_place(truth: Path, values: Sequence[str], folder: Path, files: Sequence[str]) -> Callable[[str], str | None]:
    """The class of an image in a list of classes alone: by the number in its name, or by its place."""
    numbers = [NUMBERED.match(Path(file).stem) for file in files]
    if all(numbers):
        place = {file: int(found[1]) - 1 for file, found in zip(files, numbers, strict=True) if found}
    elif len(values) == len(files):
        place = {file: i for i, file in enumerate(files)}
    else:
        raise ValueError(
            f"{truth} has {len(values)} classes, and {folder} has {len(files)} images, which are not numbered as "
            f"ILSVRC2012_val_00000001.JPEG: which class is whose is not certain"
        )
    return lambda file: values[place[file]] if 0 <= place[file] < len(values) else None


def _by_name(
    truth: Path, rows: Sequence[Sequence[str]], folder: Path, files: Sequence[str]
) -> Callable[[str], str | None]:
    """The class of an image in a list of images and classes: by its path below the folder, or its name."""
    listed: dict[str, str] = {}
    by_stem: dict[str, set[str]] = {}
    for row, value in rows:
        for name in {row, row.replace("\\", "/")}:  # as Windows writes paths
            if listed.setdefault(name, value) != value:
                raise ValueError(f"{truth} has two classes for {name}: {listed[name]} and {value}")
            by_stem.setdefault(_stem(name), set()).add(value)
    shared = {stem for stem, count in Counter(map(_stem, files)).items() if count > 1}

    def of_file(file: str) -> str | None:
        path = Path(file).relative_to(folder)
        for name in (path.as_posix(), path.with_suffix("").as_posix()):
            if name in listed:
                return listed[name]
        values = by_stem.get(_stem(file), set())
        return next(iter(values)) if len(values) == 1 and _stem(file) not in shared else None

    return of_file


def _stem(name: str) -> str:
    """The name of an image, without its suffix and the folders before it."""
    path = Path(name)
    return path.stem if path.suffix.lower() in SUFFIXES else path.name


def _rows(truth: Path) -> Iterator[tuple[str, ...]]:
    """The lines of a list, each (image, class) or (class,)."""
    lines = _lines(truth)
    separator = ";" if lines and all(";" in line for line in lines) else ","  # as Excel has it in most of Europe
    if lines and (said := SEPARATOR.fullmatch(lines[0])):
        separator, lines = said[1], lines[1:]
    for number, line in enumerate(lines):
        try:
            cells = [cell.strip() for cell in _cells(line, separator)][:2]
        except csv.Error as error:
            raise ValueError(
                f"{truth} is no list of images and classes: {error}, in {printable(line[:40])}…"
            ) from error
        if len(cells) == 2:
            if number == 0 and cells[0].lower() in HEADINGS:
                continue
            cells[1] = re.sub(r"^(n\d{8}) .*", r"\1", cells[1])  # Kaggle's has the boxes after the class
        yield tuple(cells)


def _cells(line: str, separator: str) -> list[str]:
    for between in ("\t", separator):
        if between in line:
            return next(csv.reader([line], delimiter=between))
    return [_unquoted(line)] if QUOTED.fullmatch(line.strip()) else [*map(_unquoted, line.rsplit(None, 1))]


def _unquoted(cell: str) -> str:
    """A text without the quotes that tables put around what has commas."""
    cell = cell.strip()
    return cell[1:-1].replace('""', '"') if QUOTED.fullmatch(cell) else cell


def _lines(path: Path) -> list[str]:
    """The lines of a text file that have something on them, as editors of any system write them."""
    content = read_small_file(path, MOST)
    encoding = next((encoding for mark, encoding in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is no text file in UTF-8, nor in UTF-16 with its mark: line {line} has "
            f"{content[error.start : error.start + 4]!r}; save it as UTF-8"
        ) from error
    if "\0" in text:
        raise ValueError(f"{path} is no text file in UTF-8, nor in UTF-16 with its mark; save it as UTF-8")
    # Some programs of Windows end a file with Ctrl-Z.
    return [line for line in re.split(r"\r\n|\n|\r", text.rstrip("\x1a")) if line.strip()]
