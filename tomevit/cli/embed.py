"""Images to feature vectors: `tomevit embed`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import get_args

import click

from tomevit.cli import options, running
from tomevit.cli.console import echo
from tomevit.cli.options import Command, R
from tomevit.cli.running import card_of_argument, own_device, readers, trained
from tomevit.data.distributed import fail_together, join_process_group, processes
from tomevit.models import VisionTransformer
from tomevit.output import check_output
from tomevit.progress import Bar, progress_bar
from tomevit.schedule import Schedule
from tomevit.tasks.embed import Data, Pool, Report, check_pool, check_suffix, locate
from tomevit.tasks.embed import embed as run_embed
from tomevit.tasks.embedding_files import DTYPES

NAMED = 20  # files that could not be read; the metadata has more


@click.command(cls=Command)
@click.argument(
    "sources", metavar="DIR|FILES|WEBDATASET...", nargs=-1, required=True, type=options.FilePath(path_type=str)
)
@click.option(
    "-o",
    "--out",
    type=options.FilePath(dir_okay=False),
    required=True,
    help="The .safetensors or .parquet file to write.",
)
@options.model(default="vit_b16", show_default=True)
@click.option(
    "--r", "--merge", "r", type=R(), help=f"How much merges; default: the model's own. An r: {options.FORMS_OF_R}."
)
@click.option(
    "--pool",
    type=click.Choice(get_args(Pool)),
    help="Class token, mean patch, the one beside the other, attention pooling or projection; default: the model's.",
)
@click.option(
    "--normalize/--no-normalize",
    default=None,
    help="Vectors of unit length; default: of models whose vectors are compared by angle, as CLIP's.",
)
@click.option(
    "--dtype",
    type=click.Choice(list(running.DTYPES)),
    default="float32",
    show_default=True,
    help="What the model computes in.",
)
@click.option(
    "--store",
    type=click.Choice(list(DTYPES)),
    default="float32",
    show_default=True,
    help="What the vectors are stored in.",
)
@options.img_size
@options.batch
@options.workers
@options.device
@click.option("--upright", is_flag=True, help="Turn photographs as their EXIF data says.")
@click.option("--overwrite", is_flag=True, help="Replace a file, or parts, of other settings.")
@click.pass_context
def embed(
    ctx: click.Context,
    sources: tuple[str, ...],
    out: Path,
    model: str,
    r: Schedule | None,
    pool: Pool | None,
    normalize: bool | None,
    dtype: str,
    store: str,
    img_size: tuple[int, int] | None,
    batch: int,
    workers: int | None,
    device: str,
    upright: bool,
    overwrite: bool,
) -> None:
    """A feature vector for every image, in one .safetensors or .parquet file.

    Takes images (files, folders with all below them, patterns), or WebDataset shards (also folders of them, and
    patterns such as 'train-{000..099}.tar'). Memory stays the same however many there are. Interrupted or killed, the
    same command goes on where it stopped. What cannot be read is named and left out: the status is then 1, and 2 if
    nothing can be read.

    Several processes share the work under torchrun, which takes an --r for its own option; say --merge there:

    \b
    torchrun --nproc-per-node 8 -m tomevit embed DIR -o out.parquet \\
      --device cuda --merge 16
    """  # noqa: D301  # click's mark for lines that stay as they are

    def load() -> tuple[VisionTransformer, Data]:
        # Whatever the user may have got wrong comes before a download.
        check_suffix(out)
        place, data = own_device(device), locate(sources)
        check_output(out, inputs=chain(data.names, [model]), writable=True)
        check_pool(pool, card_of_argument(model, [r], img_size).config)
        return trained(model, r, img_size).to(place, running.DTYPES[dtype]), data

    with join_process_group():
        rank, _ = processes()
        subject, data = fail_together(load)
        if data.passed_over and rank == 0:
            echo(f"tomevit: {data.passed_over}", err=True)
        with _progress(out, shown=rank == 0) as tell:
            report = run_embed(
                subject,
                data,
                out,
                pool=pool,
                normalize=normalize,
                dtype=DTYPES[store][0],
                batch=batch,
                workers=readers(subject.device) if workers is None else workers,
                upright=upright,
                overwrite=overwrite,
                progress=tell,
            )
    if rank == 0:
        _print(report, out, store)
    ctx.exit(0 if not report.num_unreadable else 1 if report.rows else 2)


def _print(report: Report, out: Path, stored: str) -> None:
    echo(f"{out}: {report.rows:,} vectors of {report.dim} {stored} numbers")
    for name, reason in report.unreadable[:NAMED]:
        echo(f"tomevit: left out: {name}: {reason}", err=True)
    if report.num_unreadable > NAMED:
        echo(f"tomevit: left out: {report.num_unreadable - NAMED:,} more, named in {out}", err=True)
    if report.num_unreadable and not report.rows:
        echo(f"tomevit: none of {report.num_unreadable:,} images can be read", err=True)


@contextmanager
def _progress(out: Path, *, shown: bool) -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar for each stage of `tomevit.tasks.embed.embed`, and what to say when it is interrupted."""
    bar: Bar | None = None
    stage, last, of = "", 0, ""

    def tell(now: str, done: int, total: int | None) -> None:
        nonlocal bar, stage, last, of
        if bar is None or now != stage:
            if bar is not None:
                bar.close()
            elif done and shown:
                echo(f"tomevit: going on after {done:,} images whose parts are in {out}.parts", err=True)
            bar = progress_bar(desc=now, total=total, initial=done, unit="image", shown=shown)
            stage, last, of = now, done, "" if total is None else f" of {total:,}"
        bar.update(done - last)
        last = done

    try:
        yield tell
    except KeyboardInterrupt:
        if bar is not None and shown:
            bar.close()
            echo(
                f"tomevit: {stage} stopped after {last:,}{of} images; {out}.parts keeps all parts that were finished, "
                f"and the same command goes on with the others",
                err=True,
            )
        raise
    finally:
        if bar is not None:
            bar.close()
