"""See it run: `tomevit demo`."""

from __future__ import annotations

from pathlib import Path

import click

from tomevit.cli.options import FORMS_OF_R, Many, R
from tomevit.schedule import Schedule


@click.command(cls=Many)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo"),
    help="Directory for the pictures.",
)
@click.option("--r", "r_values", type=R(), multiple=True, help=f"Values to compare with r = 0. An r: {FORMS_OF_R}.")
def demo(out: Path, r_values: tuple[Schedule, ...]) -> None:
    """Classify held-out images with a small model that ships with tomevit, at several r; needs no network."""
    from tomevit.tasks.demo import run

    run(out, r_values)
