"""From what a user calls r to what merges in each block: r checked, read, written, resolved.

A budget ("2x") and a preset ("diffrate-2.9g") need to know the model: `tomevit.flops.plain_schedule` makes numbers of
them.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

from tomevit.typed import parse_json
from tomevit.words import (
    MATCHING_NAMES,
    MOST_DIGITS,
    check_count,
    check_inflection,
    check_share,
    format_words,
    number_text,
    parse_words,
    quoted,
    shaped,
)

#: What r may be: an int for every block, a share of the patches, (r, inflection), a list block by block, or words.
Schedule = int | float | str | tuple[int, float] | list[int] | list[int | str]


class Step(NamedTuple):
    """What happens between attention and MLP in one block."""

    merge: int = 0  # tokens that join another
    drop: int = 0  # tokens that are left out
    matching: str | None = None  # a name of MATCHING_NAMES; None: the model's own
    grid: tuple[int, int] | None = None  # patches along height and width, for a matching of neighbours
    depth: float = 0.0  # blocks before this one, as a share of all

    @property
    def total(self) -> int:
        """Tokens that fewer leave than enter."""
        return self.merge + self.drop

    @property
    def entry(self) -> int | str:
        """As an entry of a list that is an r: 8, "8 pitome", or "8+3 diffrate" where 8 merge and 3 are dropped."""
        if self.matching is None or not self.total:
            return self.merge
        dropped = f"+{self.drop}" if self.drop else ""
        return self.matching if self.matching == "grid" else f"{self.merge}{dropped} {self.matching}"


def check_schedule(r: object, depth: int) -> Schedule:
    """The same r with plain Python numbers; words that say no more than a number become it.

    Raises:
        ValueError: r has none of the forms, or is negative, beyond 2**63, or a list longer than the model is deep.
    """
    if isinstance(r, str):
        return _check_words(r, depth)
    if isinstance(r, list):
        if len(r) > depth:
            raise ValueError(f"r lists {len(r)} blocks, and the model has {depth}")
        return [_check_entry(value, f"r[{i}]") for i, value in enumerate(r)]
    if isinstance(r, tuple):
        if len(r) == 2 and isinstance(r[0], str):
            return _check_words(f"{r[0]},{number_text(check_inflection(r[1]))}", depth)
        if len(r) != 2 or isinstance(r[1], bool) or not isinstance(r[1], Real):
            raise ValueError(f"r is {reprlib.repr(r)}; a tuple is (r, inflection); one int per block goes into a list")
        return check_count(r[0], "r[0]"), check_inflection(r[1])
    if isinstance(r, Real) and not isinstance(r, Integral):
        return check_share(r, "r")
    return check_count(r, "r")


def _check_entry(value: object, what: str) -> int | str:
    if not isinstance(value, str):
        return check_count(value, what)
    step = _parse_entry(value)
    if step is None:
        raise ValueError(
            f"{what} is {reprlib.repr(value)}; a block's entry is an int, 'grid', '8 pitome', or '8+3 diffrate' where "
            f"8 merge and 3 are dropped; the matchings are {', '.join(MATCHING_NAMES)}"
        )
    return step.entry


def _parse_entry(text: str) -> Step | None:
    # Plain methods of str: torch.compile follows them, and no regular expression.
    counts, *others = text.lower().split() or [""]
    if counts == "grid" and not others:
        return Step(1, matching="grid")  # how many merge follows from the grid
    merge, _, drop = counts.partition("+")
    if not (merge.isdecimal() and (drop or "0").isdecimal()) or max(len(merge), len(drop)) > MOST_DIGITS:
        return None
    if len(others) != 1 or others[0] not in MATCHING_NAMES or others[0] == "grid":
        return None
    if drop and others[0] != "diffrate":
        return None
    return Step(int(merge), int(drop or 0), others[0])


def _check_words(text: str, depth: int) -> Schedule:
    text = text.strip()
    if text.startswith("["):
        try:
            entries = parse_json(text)
        except ValueError:
            raise ValueError(f"{quoted(text)} is no list as in r = [20,0,7]") from None
        return check_schedule(entries, depth)
    words = parse_words(text)
    if words.ratio is None and words.shape is None and words.matching is None and words.preset is None:
        assert not isinstance(words.amount, str)
        if words.inflection is None:
            return words.amount
        return int(words.amount), words.inflection
    return format_words(words)


def parse_schedule(text: str) -> Schedule:
    """An r as it is typed: 8, or 8,-1 for (8, -1), or [20,0,7] for single blocks, or 0.08 for a share, or words.

    Raises:
        ValueError: it is none of these.
    """
    return _check_words(text, depth=10**6)


def format_schedule(r: Schedule) -> str:
    """An r as `parse_schedule` reads it."""
    if isinstance(r, list):
        return json.dumps(r, separators=(",", ":"))
    return f"{r[0]},{number_text(r[1])}" if isinstance(r, tuple) else str(r)


def schedule_to_json(r: Schedule) -> Any:
    """An r as JSON holds it, in every file: (8, -1.0) as {"mean": 8, "inflection": -1.0}, the others as they are."""
    return {"mean": r[0], "inflection": r[1]} if isinstance(r, tuple) else r


def schedule_from_json(value: Any, depth: int = 10**6) -> Schedule:
    """The inverse of `schedule_to_json`.

    Raises:
        ValueError: it is no r, or none for this depth.
    """
    if isinstance(value, dict):
        value = (value.get("mean"), value.get("inflection"))
    return check_schedule(value, depth)


def entries(steps: Iterable[Step]) -> tuple[int | str, ...]:
    """What happens in each block, as the entries of a list that is an r. Two r that mean the same have the same."""
    return tuple(step.entry for step in steps)


def distinct_schedules(r_values: Iterable[Schedule]) -> list[Schedule]:
    """Each r once, in the order in which they first come."""
    return list({str(r): r for r in r_values}.values())


def resolve_steps(
    r: Schedule, depth: int, num_tokens: int, num_prefix: int, grid: tuple[int, int] | None = None
) -> tuple[Step, ...]:
    """What happens in each block, in plain integers, so that a forward has static shapes.

    In each block at most all patches but one are dropped, and of the others at most half merge; what goes beyond is
    clamped. Neighbours merge 2 x 2, which is more, while the patches are a whole grid.

    Args:
        r: an int: that many in every block. (r, inflection): a line through the blocks with mean r, flat at 0, falling
            from 2r to 0 at -1, rising from 0 to 2r at 1 (`parse_r` in facebookresearch/ToMe). A list: block by block,
            0 for the blocks it does not reach. A float in (0, 0.5]: that share of the patches entering each block,
            rounded down. Words without a budget: "8 late" has mean 8 and grows with the square of the depth, "8
            deferred" has mean 8 and leaves the first quarter of the blocks alone, "8 pitome" is of that matching.
        depth: number of blocks.
        num_tokens: tokens that enter the first block, prefix included.
        num_prefix: tokens that are never merged.
        grid: patches along height and width, where all are there.

    Raises:
        ValueError: r has none of these forms, or is a budget or a preset, or asks for neighbours where there is no
            whole grid.
    """
    patches, steps = num_tokens - num_prefix, []
    for block, (want, drop, matching) in enumerate(_per_block(check_schedule(r, depth), depth)):
        if matching == "grid":
            if grid is None or grid[0] * grid[1] != patches or patches < 2:
                raise ValueError(
                    f"block {block} cannot merge neighbours 2x2: they need the whole grid of patches, and here "
                    f"{patches} patches are left of it"
                )
            halved = (grid[0] + 1) // 2, (grid[1] + 1) // 2
            step = Step(patches - halved[0] * halved[1], 0, matching, grid, block / depth)
            grid = halved
        else:
            drop = min(drop, max(0, patches - 1))
            # What 0.29 lacks of 29/100 in binary does not cost a token.
            merge = min(int(want * patches + 1e-9) if isinstance(want, float) else want, (patches - drop) // 2)
            # torch.compile takes an r that it has seen change for a symbol, and a dozen merges in one symbol are hours
            # of algebra. The length of a range is a constant to it.
            step = Step(len(range(merge)), len(range(drop)), matching, None, block / depth)
            grid = None if step.total else grid
        steps.append(step)
        patches -= step.total
    return tuple(steps)


def resolve_schedule(
    r: Schedule, depth: int, num_tokens: int, num_prefix: int, grid: tuple[int, int] | None = None
) -> tuple[int, ...]:
    """By how many tokens fewer leave each block than enter it. Arguments as `resolve_steps`."""
    return tuple(step.total for step in resolve_steps(r, depth, num_tokens, num_prefix, grid))


def token_counts(
    r: Schedule, depth: int, num_tokens: int, num_prefix: int, grid: tuple[int, int] | None = None
) -> tuple[int, ...]:
    """Tokens entering each block, and leaving the last: depth + 1 numbers. Arguments as `resolve_steps`."""
    counts = [num_tokens]
    for fewer in resolve_schedule(r, depth, num_tokens, num_prefix, grid):
        counts.append(counts[-1] - fewer)
    return tuple(counts)


#: Of a block: tokens or the share of the patches that merge, tokens that are dropped, and the matching.
_Wanted = tuple[int | float, int, str | None]


def _per_block(r: Schedule, depth: int) -> Sequence[_Wanted]:
    if isinstance(r, str):
        return _words_per_block(r, depth)
    if isinstance(r, list):
        entries = [_parse_entry(entry) or Step() if isinstance(entry, str) else Step(entry) for entry in r]
        return [(step.merge, step.drop, step.matching) for step in (*entries, *[Step()] * (depth - len(r)))]
    if isinstance(r, tuple) and depth > 1:
        mean, inflection = r
        first = int(mean * (1.0 - inflection))
        step = (2 * mean - 2 * first) / (depth - 1)
        return [(int(first + step * i), 0, None) for i in range(depth)]
    return [(r[0] if isinstance(r, tuple) else r, 0, None)] * depth


def _words_per_block(text: str, depth: int) -> Sequence[_Wanted]:
    words = parse_words(text)
    if words.ratio is not None or words.preset is not None:
        raise ValueError(f"{text!r} needs to know the model: tomevit.flops.plain_schedule makes a plain r of it")
    assert not isinstance(words.amount, str)
    r: Schedule = words.amount
    if words.shape is not None:
        # Beyond, all is clamped anyway, and a float would lose digits.
        r = shaped(min(int(words.amount), 10**9) * depth, depth, words.shape, words.number)
    elif words.inflection is not None:
        r = int(words.amount), words.inflection
    return [(amount, 0, words.matching) for amount, *_ in _per_block(r, depth)]
