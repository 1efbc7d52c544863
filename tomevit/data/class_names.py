"""What the outputs of a classifier stand for."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import NamedTuple

from tomevit.cards import Card
from tomevit.errors import check_type

#: The class lists that are known by their length alone.
IMAGENET = {1000: "ImageNet-1k", 11821: "ImageNet-12k", 21843: "ImageNet-21k"}


class ClassNames(NamedTuple):
    """One name for each output of a head."""

    names: Sequence[str]  # of ImageNet's classes all synonyms, as in "tench, Tinca tinca"; "" where none is known
    synsets: Sequence[str] = ()  # ImageNet's numbers for them, as in "n01440764"; empty for other classes
    source: str = ""  # "own", or a value of IMAGENET; "" if no names are known

    def short(self, index: int) -> str:
        """The first synonym of ImageNet's, another name whole, or else the output's number."""
        name = self.names[index]
        return (name.partition(", ")[0] if self.synsets else name) or f"class {index}"


def class_names(card: Card) -> ClassNames:
    """The names of a model's classes: its own, or ImageNet's if its head is of that size.

    A head of 1000, 11821 or 21843 outputs is taken for ImageNet's, in the order of the published weights: nothing in a
    checkpoint says so. Models that were trained on other classes should have them on their card (`Card.class_names`).
    """
    check_type("card", card, Card, "a Card, as model.card and tomevit.card(name) are")
    classes = card.config.num_classes
    if card.class_names and len(card.class_names) == classes:
        return ClassNames(card.class_names, source="own")
    if classes in IMAGENET:
        return imagenet(classes)
    return ClassNames([""] * classes)


@cache
def imagenet(classes: int) -> ClassNames:
    """ImageNet's classes, in the order of the heads of published weights.

    Args:
        classes: 1000, 21843 for all of ImageNet-21k as Google's weights have it, or 11821 for those of its classes
            that timm trains on, ImageNet-12k.
    """
    packed = (resources.files("tomevit") / "assets" / "imagenet_classes.tsv.gz").read_bytes()
    lines = (line for line in gzip.decompress(packed).decode("utf-8").splitlines() if not line.startswith("#"))
    rows = (line.split("\t") for line in lines)
    which = IMAGENET[classes].removeprefix("ImageNet-")
    synsets, names = zip(*((synset, name) for synset, lists, name in rows if which in lists.split()), strict=True)
    return ClassNames(names, synsets, IMAGENET[classes])
