"""What a model takes images for: the likeliest classes at an r, and beside r = 0, which merges nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from os import PathLike
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tomevit import zoo
from tomevit.cards import Card
from tomevit.data.class_names import ClassNames, class_names
from tomevit.data.images import Batch, find, stream
from tomevit.errors import check_type, join_with_or, printable
from tomevit.flops import plain_schedule, plain_steps
from tomevit.measure.defaults import default_r
from tomevit.measure.memory import explain_out_of_memory
from tomevit.measure.timing import WARMUP
from tomevit.models import VisionTransformer, unwrap_replicas
from tomevit.notebook import html_table
from tomevit.schedule import Schedule, entries, format_schedule
from tomevit.tasks.launching import batches_in_flight, launch_ahead, launch_timed, read_back, to_device
from tomevit.transform import transform
from tomevit.weights.checkpoint import card_of

if TYPE_CHECKING:
    from PIL.Image import Image


class Guess(NamedTuple):
    """A class that an image may show."""

    class_index: int  # the output of the head
    name: str  # of ImageNet's classes all synonyms; "" if no names are known
    synset: str  # WordNet's number of an ImageNet class, as in "n01440764"; "" of others
    probability: float
    unmerged: float | None = None  # its probability at r = 0, where that was asked for

    @property
    def label(self) -> str:
        """The first synonym of ImageNet's names, another name whole, or else the output's number."""
        return (self.name.partition(", ")[0] if self.synset else self.name) or f"class {self.class_index}"


class Answer(NamedTuple):
    """What a model says of one image."""

    image: str  # the file; "" for an image in memory
    top: tuple[Guess, ...]  # the likeliest first
    tokens: int  # that remain after the last block
    seconds: float | None = None  # of the model, per image of its batch; without reading and preparing
    top_unmerged: tuple[Guess, ...] = ()  # the likeliest at r = 0 first, with the same two probabilities
    seconds_unmerged: float | None = None
    error: str = ""  # why the image cannot be read: then there is nothing else

    @property
    def changed(self) -> bool | None:
        """Whether the likeliest class is another at r = 0; None if that is not known."""
        return self.top[0].class_index != self.top_unmerged[0].class_index if self.top and self.top_unmerged else None

    def __repr__(self) -> str:
        said = self.error or ", ".join(f"{guess.label} {100 * guess.probability:.3g} %" for guess in self.top[:3])
        return f"<Answer {printable(f'{self.image}: ' if self.image else '')}{printable(said)}>"

    def _repr_html_(self) -> str:
        return Answers([self])._repr_html_()


class Answers(list[Answer]):
    """A list of answers, which a notebook shows as a table."""

    def _repr_html_(self) -> str:
        compared = any(answer.top_unmerged for answer in self)
        rows: list[tuple[object, ...]] = []
        for answer in self:
            if answer.error:
                rows.append((answer.image, answer.error, None, None))
            for i, guess in enumerate(answer.top):
                unmerged = "" if guess.unmerged is None else f"{100 * guess.unmerged:.2f} %"
                rows.append(("" if i else answer.image, guess.label, f"{100 * guess.probability:.2f} %", unmerged))
        heading = ("image", "class", "probability", "at r = 0")
        columns = len(heading) if compared else 3
        return html_table("Classes", heading[:columns], (row[:columns] for row in rows))


class Summary(NamedTuple):
    """All answers together."""

    images: int  # that were read
    unreadable: int
    seconds: float | None  # of the model per image: the mean
    seconds_unmerged: float | None
    kept: int | None  # images whose likeliest class is the same at r = 0

    @property
    def speed_up(self) -> float | None:
        """Over r = 0, on the same batches, in turn."""
        return self.seconds_unmerged / self.seconds if self.seconds and self.seconds_unmerged else None


def classify(
    model: VisionTransformer,
    images: str | PathLike[str] | bytes | Image | Tensor | Iterable[str | PathLike[str] | bytes | Image | Tensor],
    *,
    r: Schedule | None = None,
    top: int = 5,
    compare: bool = False,
    batch: int = 32,
    workers: int = 0,
    upright: bool = True,
) -> Answers:
    """The likeliest classes of images, in order.

    An image that cannot be read does not end the work on the others: its answer has an `error`, and no classes.

    Args:
        model: with a head, on any device, in any dtype; in a wrapper of torch's or not.
        images: one or several: files, folders and patterns (as `tomevit.data.images.find` takes them), what is in a
            file (bytes), PIL images, and tensors (C, H, W) uint8. The last two are taken as they are.
        r: instead of the model's own.
        top: classes for each image, if the model has so many.
        compare: say what the model answers at r = 0 as well, and how long that takes.
        batch: images per call.
        workers: processes that read images; 0: this one.
        upright: turn photographs as their EXIF data says. The loaders that published accuracies were measured with do
            not, and with False the model sees what it saw there.

    Raises:
        ValueError: the model has no head; its answers are not finite; a batch does not fit into its device's memory; r
            is of no known form, or is to be compared with r = 0 and merges nothing; a source names nothing; or Pillow
            is not installed.
    """
    model, sources = unwrap_replicas(model), _sources(images)
    return Answers(
        answers(model, sources, r=r, top=top, compare=compare, batch=batch, workers=workers, upright=upright)
    )


def answers(
    model: VisionTransformer,
    images: Sequence[str | bytes | Image | Tensor],
    *,
    r: Schedule | None = None,
    top: int = 5,
    compare: bool = False,
    batch: int = 32,
    workers: int = 0,
    upright: bool = True,
) -> Iterator[Answer]:
    """`classify`, each answer as soon as it is known; of files, not of folders and patterns."""
    model = unwrap_replicas(model)
    r = check_classifiable(card_of(model), r, compare=compare)
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    names, tokens = class_names(model.card), model.token_counts(r)[-1]
    values: list[Schedule] = [r, 0] if compare else [r]
    step = 0
    warm: set[int] = set()  # sizes of batches

    def launch(part: Batch) -> Callable[[], list[Answer]]:
        nonlocal step
        places, unreadable = part.places.tolist(), part.unreadable
        runs: list[Callable[[], _Run]] = []
        if places:
            prepared = to_device(part.images, model.device)
            # What the first calls set up, and those of a new size, is not the time of an image.
            if compare and len(prepared) not in warm:
                for value in values * WARMUP:
                    _launch(model, prepared, value)()
            elif not warm:
                _launch(model, prepared[:1], r)()
            warm.add(len(prepared))
            step = -1 if step == 1 else 1  # first the one, then the other, so that a trend slows both alike
            runs = [_launch(model, prepared, value) for value in values[::step]][::step]

        def read() -> list[Answer]:
            found = {place: Answer(_name(images[place]), (), tokens, error=reason) for place, reason in unreadable}
            if runs:
                merged, *plain = (run() for run in runs)
                said = _answers(tokens, names, merged, plain[0] if plain else None, top)
                for place, answer in zip(places, said, strict=True):
                    found[place] = answer._replace(image=_name(images[place]))
            return [found[place] for place in sorted(found)]

        return read

    parts = stream(images, transform(model), batch=batch, workers=workers, upright=upright)
    for said in launch_ahead(parts, launch, in_flight=batches_in_flight(model.device)):
        yield from said


def check_classifiable(card: Card, r: Schedule | None = None, *, compare: bool = False) -> Schedule:
    """The r that a model will classify at, in numbers; before its weights are fetched, to say if it cannot.

    Args:
        card: of the model.
        r, compare: as in `classify`.

    Raises:
        ValueError: as `classify`, as far as it can be known from these.
    """
    if find_spec("PIL") is None:
        raise ValueError("reading images needs Pillow: pip install pillow")
    config = card.config
    check_head(card)
    if config.in_chans not in (1, 3):
        raise ValueError(f"the model takes images of {config.in_chans} channels, and files have 1 or 3")
    r = card.r if r is None else r
    merges = any(entries(plain_steps(r, config, card.presets)))
    if compare and not merges:
        others = join_with_or(map(format_schedule, default_r(card)))
        raise ValueError(
            f"r = {format_schedule(r)} merges nothing, and would be compared with itself: give an r such as {others}"
        )
    return plain_schedule(r, config, card.presets)


def check_head(card: Card) -> None:
    """Raises ValueError, saying what to do, if a model has no head to classify with."""
    if not card.config.num_classes:
        raise ValueError(f"{card.full_name or 'the model'} has no head to classify with: {_with_head(card)}")


class Tally:
    """Answers counted as they come, none of which is kept."""

    def __init__(self) -> None:
        self.images = self.unreadable = self.kept = self.compared = 0
        self.seconds, self.seconds_unmerged = _Mean(), _Mean()

    def add(self, answer: Answer) -> None:
        if answer.error:
            self.unreadable += 1
            return
        self.images += 1
        self.compared += answer.changed is not None
        self.kept += answer.changed is False
        self.seconds.add(answer.seconds)
        self.seconds_unmerged.add(answer.seconds_unmerged)

    def summary(self) -> Summary:
        return Summary(
            images=self.images,
            unreadable=self.unreadable,
            seconds=self.seconds.value(),
            seconds_unmerged=self.seconds_unmerged.value(),
            kept=self.kept if self.images and self.compared == self.images else None,
        )


class _Mean:
    """Of numbers that come one by one, without those that are not known."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, number: float | None) -> None:
        if number is not None:
            self.total += number
            self.count += 1

    def value(self) -> float | None:
        return self.total / self.count if self.count else None


def summarise(found: Iterable[Answer]) -> Summary:
    """All answers of one call together."""
    tally = Tally()
    for answer in found:
        tally.add(answer)
    return tally.summary()


def _sources(
    images: str | PathLike[str] | bytes | Image | Tensor | Iterable[str | PathLike[str] | bytes | Image | Tensor],
) -> list[str | bytes | Image | Tensor]:
    """One or several images, folders and patterns, as a list of images."""
    from PIL.Image import Image

    if isinstance(images, str | PathLike | bytes | Image) or (isinstance(images, Tensor) and images.ndim == 3):
        images = [images]
    right = "images: files, bytes, PIL images, tensors (C, H, W) uint8, or several of them"
    check_type("images", images, Iterable, right)
    found: list[str | bytes | Image | Tensor] = []
    for image in images:
        check_type(
            "an image",
            image,
            (str, PathLike, bytes, Image, Tensor),
            "a file, bytes, a PIL image or a tensor (C, H, W) uint8",
        )
        found += find([image]) if isinstance(image, str | PathLike) else [image]
    return found


def _name(image: object) -> str:
    return image if isinstance(image, str) else ""


def _with_head(card: Card) -> str:
    """What to take instead of a model without a head."""
    others = zoo.cards(card.name) if card.name in zoo.list_models() else ()
    for other in others:
        if other.config.num_classes and other.sources:
            return f"take {other.full_name}, or another of tomevit list '{card.name}*' --weights"
    return "give it one, with num_classes, and train it; tomevit embed takes it as it is"


class _Run(NamedTuple):
    logits: Tensor  # (B, classes) float32, on the CPU
    probabilities: Tensor  # (B, classes)
    seconds: float  # per image


@torch.inference_mode()
def _launch(model: VisionTransformer, images: Tensor, r: Schedule) -> Callable[[], _Run]:
    """What waits for what a model says of prepared images (B, C, H, W) at an r."""
    count, dtype = len(images), str(model.dtype).removeprefix("torch.")
    with explain_out_of_memory(count, images.device):
        logits, taken = launch_timed(partial(model, images, r), images.device)
        copied = read_back(logits)

    def read() -> _Run:
        logits = copied()[0].float()
        if not logits.isfinite().all():
            raise ValueError(f"the model's answers are not finite: its weights are damaged, or too large for {dtype}")
        return _Run(logits, logits.softmax(1), taken() / count)

    return read


def _answers(tokens: int, names: ClassNames, merged: _Run, plain: _Run | None, top: int) -> Iterator[Answer]:
    """What was said of each image of a batch."""

    def ranked(run: _Run) -> Iterator[tuple[Guess, ...]]:
        # By the logits: the probabilities of unlikely classes may all be 0.
        indices = run.logits.topk(min(top, run.logits.shape[1])).indices
        both = [each.probabilities.gather(1, indices).tolist() for each in (merged, plain) if each is not None]
        for row in zip(indices.tolist(), *both, strict=True):
            yield tuple(
                Guess(index, names.names[index], names.synsets[index] if names.synsets else "", *probabilities)
                for index, *probabilities in zip(*row, strict=True)
            )

    if plain is None:
        yield from (Answer("", best, tokens, merged.seconds) for best in ranked(merged))
        return
    for best, unmerged in zip(ranked(merged), ranked(plain), strict=True):
        yield Answer("", best, tokens, merged.seconds, unmerged, plain.seconds)
