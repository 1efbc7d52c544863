"""See it run: `tomevit demo`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tomevit.cli.options import FORMS_OF_R, Command, FilePath, R
from tomevit.cli.tables import Column, Part, Table, show
from tomevit.schedule import Schedule
from tomevit.tasks.demo import MODELS, format_stored_r, run, setting

COLUMNS = (
    *(Column("r"), Column("tokens", 2), Column("GFLOPs", 4), Column("off the shelf %"), Column("trained %")),
    *(Column("images/s", 3), Column("speed-up"), Column("FLOP ratio", 1)),
)


@click.command(cls=Command)
@click.option(
    "-o",
    "--out",
    type=FilePath(file_okay=False),
    default=Path("demo"),
    show_default=True,
    help="Directory for the pictures.",
)
@click.option(
    "--model",
    type=click.Choice(MODELS),
    default=MODELS[0],
    show_default=True,
    help=f"{MODELS[0]} has the tokens and blocks of a ViT-B/16; {MODELS[1]} takes seconds.",
)
@click.option("--r", "r_values", type=R(), multiple=True, help=f"Values to compare with r = 0. An r: {FORMS_OF_R}.")
def demo(out: Path, model: str, r_values: tuple[Schedule, ...]) -> None:
    """Classify held-out images with a small model that ships with tomevit, at several r; needs no network."""
    results = run(out, r_values, model=model)
    show([*_report(results), "", f"written to {out}: merged_tokens.png, accuracy_throughput.png, results.json"])


def _report(results: dict[str, Any]) -> Iterator[Part]:
    where = results["environment"]
    yield (
        f"{results['images']} held-out handwritten digits. Accuracy of {results['off_the_shelf']} off the shelf, "
        f"and of {results['trained_with_merging']}, trained with merging."
    )
    yield f"{setting(results)}."
    yield f"{where['device']}, tomevit {where['tomevit']}, torch {where['torch']}, Python {where['python']}."
    yield "FLOPs are multiply-adds as they are computed; speed-up cannot pass the FLOP ratio by much."
    yield ""
    yield Table(COLUMNS, [_cells(row) for row in results["rows"]])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        format_stored_r(row["r"]),
        str(row["tokens"]),
        f"{row['gflops_computed']:.4f}",
        f"{row['accuracy']['off_the_shelf']:.2f}",
        f"{row['accuracy']['trained_with_merging']:.2f}",
        f"{row['images_per_second']:.0f}",
        f"{row['speed_up']:.2f}",
        f"{row['flop_ratio_computed']:.2f}",
    )
