"""What several benchmarks take on their command line."""

from __future__ import annotations

import argparse

from tomevit.schedule import parse_schedule


def number_or_words(text: str) -> int | str:
    """An r that names a row of a table: 13, or 2x, or '2x late'."""
    try:
        r = parse_schedule(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not isinstance(r, int | str):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor words, as in 13, 2x or '2x late'")
    return r
