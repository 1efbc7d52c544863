"""See it run: `tomevit demo`, `tomevit bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from tomevit.bench import Row, with_zero
from tomevit.bench import bench as run_bench
from tomevit.cli.options import DTYPES, ManyR, R, Size, table
from tomevit.config import Schedule
from tomevit.factory import create
from tomevit.timing import environment


@click.command(cls=ManyR)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo"),
    help="Directory for the pictures.",
)
@click.option("--r", "r_values", type=R(), multiple=True, help="Values to compare with r = 0.")
def demo(out: Path, r_values: tuple[Schedule, ...]) -> None:
    """Classify held-out images with a small model that ships with tomevit, at several r; needs no network."""
    from tomevit.demo import run

    run(out, r_values)


@click.command(cls=ManyR)
@click.argument("name", default="vit_b16")
@click.option("--r", "r_values", type=R(), multiple=True, default=(8, 13, 16), help="Values to compare with r = 0.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Images per call.")
@click.option("--img-size", type=Size(), help="Pixels, as in 384 or 224x320.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, mps, …")
@click.option("--compile", "compiled", is_flag=True, help="Through torch.compile.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; torch's default if not given.")
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Timed calls of each r.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def bench(
    name: str,
    r_values: tuple[Schedule, ...],
    batch: int,
    img_size: tuple[int, int] | None,
    dtype: str,
    device: str,
    compiled: bool,
    threads: int | None,
    rounds: int,
    as_json: bool,
) -> None:
    """Throughput of a model at several r against itself at r = 0: interleaved, medians, fresh weights."""
    if threads is not None:
        torch.set_num_threads(threads)
    model = create(name, img_size=img_size).to(_device(device), DTYPES[dtype])
    values = with_zero(r_values)
    with tqdm(total=len(values) * (rounds + 2), delay=2, unit="call", leave=False, disable=None) as bar:
        rows = run_bench(model, values, batch=batch, rounds=rounds, compiled=compiled, progress=bar.update)
    setting = {
        "model": name,
        "img_size": model.config.img_size,
        "batch": batch,
        "dtype": dtype,
        "mode": "compiled" if compiled else "eager",
        "rounds": rounds,
        **environment(device),
    }
    if as_json:
        rows_out = [row._asdict() | {"efficiency": row.efficiency} for row in rows]
        click.echo(json.dumps(setting | {"rows": rows_out}, indent=2))
        return
    click.echo(", ".join(f"{key} {value}" for key, value in setting.items()))
    table(["r", "tokens", "GFLOPs", "images/s", "speed-up", "FLOP ratio", "efficiency"], map(_bench_cells, rows))


def _bench_cells(row: Row) -> list[Any]:
    return [
        row.r,
        row.tokens,
        f"{row.gflops:.2f}",
        f"{row.images_per_second:.1f}",
        f"{row.speed_up:.2f}",
        f"{row.flop_ratio:.2f}",
        f"{row.efficiency:.2f}",
    ]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {name!r} here: {str(error).splitlines()[0]}") from error
    return device
