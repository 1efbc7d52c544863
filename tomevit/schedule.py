"""From what a user calls r to the number of tokens that merge in each block: r checked, read, written, resolved."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

#: What r may be: an int for every block, (r, inflection), a list with one int per block, or a share of the patches.
Schedule = int | float | tuple[int, float] | list[int]

ALLOWED = (
    "an int (tokens per block), (r, inflection), a list with one int per block, "
    "or a float up to 0.5 (share of the patches entering each block)"
)

#: Beyond what any image has, and what every reader of JSON and TOML can hold.
MOST = 2**63 - 1


def _count(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{what} is {value!r}; give {ALLOWED}")
    count = int(value)
    if abs(count) > MOST:
        raise ValueError(f"{what} is beyond 2**63, and no image has so many tokens; give {ALLOWED}")
    if count < 0:
        raise ValueError(f"{what} is {count}, and cannot be negative: 0 merges nothing")
    return count


def check_schedule(r: object, depth: int) -> Schedule:
    """The same r with plain Python numbers.

    Raises:
        ValueError: r is none of the four forms, negative, beyond 2**63, or a list longer than the model is deep.
    """
    if isinstance(r, list):
        if len(r) > depth:
            raise ValueError(f"r lists {len(r)} blocks, and the model has {depth}")
        return [_count(value, f"r[{i}]") for i, value in enumerate(r)]
    if isinstance(r, tuple):
        if len(r) != 2 or isinstance(r[1], bool) or not isinstance(r[1], Real):
            raise ValueError(f"r is {r!r}; a tuple is (r, inflection); one int per block goes into a list")
        if r[1] < -1 or not r[1] <= 1:
            raise ValueError(f"the inflection is {r[1]}, and must lie between -1 (early) and 1 (late)")
        return _count(r[0], "r[0]"), float(r[1])
    if isinstance(r, Real) and not isinstance(r, Integral):
        if r <= 0 or not r <= 0.5:
            raise ValueError(
                f"r is {r}; a float is the share of the patches that merge in each block, above 0 and at most "
                f"0.5; for a number of tokens give an int"
            )
        return float(r)
    return _count(r, "r")


def parse_schedule(text: str) -> Schedule:
    """An r as it is typed: 8, or 8,-1 for (8, -1), or [20,0,7] for single blocks, or 0.08 for a share.

    Raises:
        ValueError: it is none of these.
    """
    try:
        if text.startswith("["):
            r: object = json.loads(text)
        else:
            first, *others = text.split(",")
            number = float(first) if re.search(r"[.e]", first) else int(first)
            r = (number, *map(float, others)) if others else number
    except ValueError:
        raise ValueError(f"{text!r} is none of 8, 8,-1, [20,0,7] and 0.08") from None
    return check_schedule(r, depth=10**6)


def format_schedule(r: Schedule) -> str:
    """An r as `parse_schedule` reads it."""
    return f"{r[0]},{r[1]:g}" if isinstance(r, tuple) else str(r).replace(" ", "")


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


def distinct_schedules(r_values: Iterable[Schedule]) -> list[Schedule]:
    """Each r once, in the order in which they first come."""
    return list({str(r): r for r in r_values}.values())


def resolve_schedule(r: Schedule, depth: int, num_tokens: int, num_prefix: int) -> tuple[int, ...]:
    """Tokens that merge in each block, as plain integers, so that a forward has static shapes.

    Each entry is clamped to half of the unprotected tokens that enter its block.

    Args:
        r: an int: that many in every block. (r, inflection): a line through the blocks with mean r, flat at 0, falling
            from 2r to 0 at -1, rising from 0 to 2r at 1 (`parse_r` in facebookresearch/ToMe). A list: block by block,
            0 for the blocks it does not reach. A float in (0, 0.5]: that share of the patches entering each block,
            rounded down.
        depth: number of blocks.
        num_tokens: tokens that enter the first block, prefix included.
        num_prefix: tokens that are never merged.

    Raises:
        ValueError: r has none of these forms.
    """
    wanted = _per_block(check_schedule(r, depth), depth)
    patches, merged = num_tokens - num_prefix, []
    for want in wanted:
        # What 0.29 lacks of 29/100 in binary does not cost a token.
        count = min(int(want * patches + 1e-9) if isinstance(want, float) else want, patches // 2)
        # torch.compile takes an r that it has seen change for a symbol, and a dozen merges in one symbol are hours of
        # algebra. The length of a range is a constant to it.
        count = len(range(count))
        merged.append(count)
        patches -= count
    return tuple(merged)


def token_counts(r: Schedule, depth: int, num_tokens: int, num_prefix: int) -> tuple[int, ...]:
    """Tokens entering each block, and leaving the last: depth + 1 numbers. Arguments as `resolve_schedule`."""
    counts = [num_tokens]
    for merged in resolve_schedule(r, depth, num_tokens, num_prefix):
        counts.append(counts[-1] - merged)
    return tuple(counts)


def _per_block(r: Schedule, depth: int) -> Sequence[int | float]:
    if isinstance(r, list):
        return r + [0] * (depth - len(r))
    if isinstance(r, tuple) and depth > 1:
        mean, inflection = r
        first = int(mean * (1.0 - inflection))
        step = (2 * mean - 2 * first) / (depth - 1)
        return [int(first + step * i) for i in range(depth)]
    return [r[0] if isinstance(r, tuple) else r] * depth
