"""r in words: the numbers and words that an r is made of, taken apart and checked."""

from __future__ import annotations

import reprlib
from numbers import Integral, Real
from typing import Any, NamedTuple

#: The names of `tomevit.layers.MATCHINGS`.
MATCHING_NAMES = ("bipartite", "every_kth", "random", "importance", "diffrate", "redundant", "pitome", "grid")
SHAPES = ("late", "deferred")

ALLOWED = (
    "an int (tokens per block), (r, inflection), a list with one int per block, "
    "a float up to 0.5 (share of the patches entering each block), or words such as '2x' (half of the FLOPs), "
    "'60%', '2x late' or '8 pitome'"
)

#: Beyond what any image has, and what every reader of JSON and TOML can hold.
MOST = 2**63 - 1
MOST_DIGITS = 18  # of numbers within it


class Words(NamedTuple):
    """An r in words, taken apart: how much, in which shape, by which matching."""

    amount: int | float | str  # tokens per block on average, a share of the patches, or "" where ratio says how much
    ratio: float | None = None  # at least so many times fewer FLOPs
    inflection: float | None = None
    shape: str | None = None  # one of SHAPES
    number: float | None = None  # the power of "late", the first blocks that "deferred" leaves alone
    matching: str | None = None
    preset: str | None = None  # all else is in the card then


def check_count(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{what} is {reprlib.repr(value)}; give {ALLOWED}")
    count = int(value)
    if abs(count) > MOST:
        raise ValueError(f"{what} is beyond 2**63, and no image has so many tokens; give {ALLOWED}")
    if count < 0:
        raise ValueError(f"{what} is {count}, and cannot be negative: 0 merges nothing")
    return count


def check_inflection(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or value < -1 or not value <= 1:
        raise ValueError(f"the inflection is {value}, and must lie between -1 (early) and 1 (late)")
    return float(value)


def check_share(value: Any, what: str) -> float:
    if value <= 0 or not value <= 0.5:  # before it is made a float, which a large fraction cannot be
        raise ValueError(
            f"{what} is {value}; a float is the share of the patches that merge in each block, above 0 and at most "
            f"0.5; for a number of tokens give an int"
        )
    return float(value)


def parse_words(text: str) -> Words:
    """An r in words, taken apart.

    Raises:
        ValueError: it is none; the message says what would be.
    """
    first, *others = text.lower().replace("\N{MULTIPLICATION SIGN}", "x").replace(", ", ",").split() or [""]
    name, _, gflops = first.rpartition("-")
    if name in MATCHING_NAMES and gflops.endswith("g") and _number(gflops[:-1]) is not None and not others:
        return Words("", preset=first)
    amount, comma, inflection = first.partition(",")
    words = _parse_amount(amount, text)
    if comma:
        if isinstance(words.amount, float) or (at := _number(inflection)) is None:
            raise _no_r(text)
        words = words._replace(inflection=check_inflection(at))
    for word in others:
        shape, colon, number = word.partition(":")
        if shape in SHAPES and words.shape is None and words.matching is None:
            words = words._replace(shape=shape, number=_shape_number(shape, number, text) if colon else None)
        elif word in MATCHING_NAMES and words.matching is None:
            words = words._replace(matching=word)
        else:
            raise ValueError(
                f"r = {quoted(text)}: {quoted(word)} is neither a shape ({', '.join(SHAPES)}) nor a matching "
                f"({', '.join(MATCHING_NAMES)}), or comes twice or too late: first how much, then the shape, then the "
                f"matching, as in '2x late pitome'"
            )
    if words.shape is not None and (words.inflection is not None or isinstance(words.amount, float)):
        raise ValueError(f"r = {quoted(text)} asks for two shapes: {words.shape} goes with an int, '2x' or '60%'")
    if words.matching == "grid" and (words.ratio is None or words.shape or words.inflection is not None):
        raise ValueError(
            f"r = {quoted(text)}: grid merges every 2x2 neighbours once: say '1.5x grid', or name the block, as in "
            f"[0, 0, 'grid']"
        )
    return words


def _parse_amount(amount: str, text: str) -> Words:
    if amount.endswith(("x", "%")):
        number = _number(amount[:-1])
        if number is None:
            raise _no_r(text)
        ratio = number if amount.endswith("x") else 100 / number if number else 0.0
        if not 1 <= ratio < float("inf"):
            raise ValueError(
                f"r = {quoted(text)} is no budget: '2x' asks for at least twice fewer FLOPs, '60%' for at most that "
                f"share of them; give 1x or more, or a share above 0% and up to 100%"
            )
        return Words(amount, ratio)
    number = _number(amount)
    if number is None:
        raise _no_r(text)
    if "." in amount or "e" in amount:
        return Words(check_share(number, "r"))
    return Words(check_count(int(amount), "r"))


def _number(text: str) -> float | None:
    if len(text) > 40 or not text.isascii() or not set(text) <= set("0123456789.+-e"):
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _shape_number(shape: str, text: str, whole: str) -> float:
    number = _number(text)
    if shape == "late" and number is not None and 0 < number <= 100:
        return number
    if shape == "deferred" and number is not None and 0 <= number <= MOST and number == int(number):
        return int(number)
    raise ValueError(
        f"r = {quoted(whole)}: late:2 grows with the square of the depth, the power above 0 and up to 100; deferred:3 "
        f"merges nothing in the first 3 blocks"
    )


def _no_r(text: str) -> ValueError:
    return ValueError(f"r = {quoted(text)} is none; give {ALLOWED}")


def quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:50]}...")


def format_words(words: Words) -> str:
    """Words as `parse_words` reads them."""
    if words.preset is not None:
        return words.preset
    first = str(words.amount) + ("" if words.inflection is None else f",{number_text(words.inflection)}")
    number = "" if words.number is None else f":{number_text(words.number)}"
    shape = [] if words.shape is None else [words.shape + number]
    return " ".join([first, *shape, *([] if words.matching is None else [words.matching])])


def number_text(number: float) -> str:
    """As short as `_number` reads the same from it."""
    text = f"{number:g}"
    return text if float(text) == number else repr(number)


def shaped(total: int, depth: int, shape: str, number: float | None = None) -> list[int]:
    """So many tokens in all, over the blocks.

    "late" grows with a power of the depth, the block's number over the depth, 2 if none is given (cf. the schedules of
    token merging that are concentrated late); "deferred" leaves the first blocks alone, a quarter if no number is
    given, and is flat then. Sums up to each block are rounded, so that more in all is nowhere less so far.

    Raises:
        ValueError: no block is left to merge in.
    """
    if shape == "late":
        power = 2.0 if number is None else number
        weights = [((block + 1) / depth) ** power for block in range(depth)]
    else:
        first = depth // 4 if number is None else int(number)
        if first >= depth:
            raise ValueError(f"deferred:{first} leaves {first} blocks alone, and the model has {depth}")
        weights = [float(block >= first) for block in range(depth)]
    whole, so_far, done, out = sum(weights), 0.0, 0, []
    for weight in weights:
        so_far += weight
        reached = int(total * (so_far / whole) + 0.5)
        out.append(reached - done)
        done = reached
    return out
