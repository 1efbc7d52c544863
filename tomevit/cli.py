"""The command line: `tomevit VERB`, each verb a thin layer over a function of the library."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

import tomevit
from tomevit import zoo
from tomevit.bench import Row, with_zero
from tomevit.bench import bench as run_bench
from tomevit.config import Card, Schedule
from tomevit.flops import flops
from tomevit.layers.schedule import check_schedule, token_counts
from tomevit.models import build_meta
from tomevit.timing import environment

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. A user's mistake ends in one line on standard error and status 2, without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = cli.main(arguments, prog_name="tomevit", standalone_mode=False)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "tomevit"
        status = _fail(f"{error.format_message().rstrip('.')} (see {where} --help)", 2)
    except (ValueError, NotImplementedError, OSError) as error:
        if arguments[0] == "--traceback":
            raise
        status = _fail(str(error), 2)
    except (click.Abort, KeyboardInterrupt):
        status = _fail("interrupted", 130)
    sys.exit(status)


def _fail(message: str, status: int) -> int:
    click.echo(f"tomevit: {message}", err=True)
    return status


class R(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on only
    """8, or 8,-1 for (r, inflection), or [20,0,7] for single blocks, or 0.08 for a share."""

    name = "r"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            if value.startswith("["):
                return check_schedule(json.loads(value), depth=10**6)
            parts = value.split(",")
            number = float(parts[0]) if re.search(r"[.e]", parts[0]) else int(parts[0])
            r = number if len(parts) == 1 else (number, *(float(part) for part in parts[1:]))
        except ValueError:
            self.fail(f"{value!r} is none of 8, 8,-1, [20,0,7] and 0.08", param, ctx)
        try:
            return check_schedule(r, depth=10**6)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Size(click.ParamType):  # type: ignore[type-arg]
    """224, or 224x320 for height x width."""

    name = "pixels"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"(\d+)(?:x(\d+))?", value)
        if found is None:
            self.fail(f"{value!r} is neither 224 nor 224x320 (height x width)", param, ctx)
        return int(found[1]), int(found[2] or found[1])


class ManyR(click.Command):
    """A command whose --r takes several values: --r 0 8 13 means --r 0 --r 8 --r 13."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        follows = False
        for argument in args:
            if follows and re.match(r"[\d\[.]", argument) and spread[-1] != "--r":
                spread.append("--r")
            follows = argument == "--r" or (follows and re.match(r"[\d\[.]", argument) is not None)
            spread.append(argument)
        return super().parse_args(ctx, spread)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(tomevit.__version__, prog_name="tomevit")
@click.option("--traceback", is_flag=True, expose_value=False, help="Show where an error arose, for a bug report.")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Fast vision transformers with native token merging."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@cli.command("list")
@click.argument("pattern", default="*")
@click.option("--weights", is_flag=True, help="One line for each set of weights.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def list_command(pattern: str, weights: bool, as_json: bool) -> None:
    """What models there are; PATTERN takes wildcards, as in 'deit*'."""
    names = zoo.list_models(pattern, weights=weights)
    if not names:
        raise ValueError(f"no model matches {pattern!r}; tomevit list shows all")
    rows = [_summary(zoo.card(name)) | {"name": name} for name in names]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    columns = ["name", "image", "params M", "GFLOPs", "classes"]
    columns += ["top-1", "r", "licence"] if weights else ["weights"]
    _table(
        columns,
        [
            [
                row["name"],
                "x".join(map(str, row["img_size"])),
                f"{row['params'] / 1e6:.2f}",
                f"{row['gflops']:.2f}",
                row["num_classes"],
                *([_top1(row), row["r"], row["licence"] or "—"] if weights else [len(row["weights"])]),
            ]
            for row in rows
        ],
    )


def _summary(card: Card) -> dict[str, Any]:
    return {
        "name": card.name,
        "title": card.title,
        "img_size": card.config.img_size,
        "params": sum(p.numel() for p in build_meta(card.config).parameters()),
        "gflops": flops(card.config) / 1e9,
        "num_classes": card.config.num_classes,
        "default_weights": card.weights,
        "weights": [other.weights for other in zoo.cards(card.name) if other.weights],
        "figures": [asdict(figure) for figure in card.figures],
        "r": card.r,
        "licence": card.licence,
    }


def _top1(row: dict[str, Any]) -> str:
    return f"{row['figures'][0]['top1']:.2f}" if row["figures"] else "—"


@cli.command()
@click.argument("name")
@click.option("--r", type=R(), help="Tokens to merge per block: 8, or 8,-1, or [20,0,7], or 0.08.")
@click.option("--img-size", type=Size(), help="Pixels, as in 384 or 224x320.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def info(name: str, r: Schedule | None, img_size: tuple[int, int] | None, as_json: bool) -> None:
    """One model: architecture, cost and tokens at an r, preprocessing, weights, licence."""
    card = zoo.card(name)
    config = card.config if img_size is None else replace(card.config, img_size=img_size)
    r = card.r if r is None else r
    counts = token_counts(r, config.depth, config.num_tokens, config.num_prefix)
    cost: dict[str, Any] = {
        "params": sum(p.numel() for p in build_meta(config).parameters()),
        "r": r,
        "tokens": counts,
        "gflops": flops(config, r) / 1e9,
        "gflops_unmerged": flops(config) / 1e9,
    }
    weights = [other for other in zoo.cards(name) if other.weights and ("." not in name or other == card)]
    if as_json:
        described = asdict(replace(card, config=config)) | cost
        described["all_weights"] = [asdict(other) for other in weights]
        click.echo(json.dumps(described, indent=2))
        return
    click.echo(f"{card.name}: {card.title}{f' ({card.timm} in timm)' if card.timm else ''}")
    for paper in card.papers:
        click.echo(f"  {paper}")
    height, width = config.img_size
    click.echo(
        f"\narchitecture   {config.depth} blocks, width {config.embed_dim}, {config.num_heads} heads, "
        f"MLP x{config.mlp_ratio:g}, patch {config.patch_size}, image {height}x{width}x{config.in_chans}\n"
        f"tokens         {config.num_prefix} prefix + {config.num_patches} patches; the head reads the "
        f"{'class token' if config.pool == 'token' else 'mean patch'}\n"
        f"parameters     {cost['params'] / 1e6:.2f} M, {config.num_classes} classes\n"
        f"r = {r!s:<11}{cost['gflops']:.4g} GFLOPs, {cost['gflops_unmerged'] / cost['gflops']:.2f} times fewer than "
        f"the {cost['gflops_unmerged']:.4g} of r = 0\n"
        f"               tokens {' '.join(map(str, counts))}"
    )
    prepare = card.preprocess
    how = "shorter edge" if prepare.resize == "shorter" else "both edges"
    click.echo(
        f"preprocessing  {how} to {int(min(height, width) / prepare.crop_pct)} pixels ({prepare.interpolation}), "
        f"centre crop {height}x{width}, mean {prepare.mean}, std {prepare.std}"
    )
    click.echo(f"\nweights{'' if weights else '        none are published; create() draws fresh ones'}")
    for other in weights:
        attention = "proportional" if other.config.prop_attn else "plain"
        click.echo(
            f"  {other.full_name}  {other.config.num_classes} classes, {other.licence}, "
            f"trained at r = {other.r}, {attention} attention"
        )
        for figure in other.figures:
            click.echo(f"      top-1 {figure.top1:.2f} % at r = {figure.r} ({figure.source})")
        for source in other.sources:
            click.echo(f"      {source.url or source.hub or source.package} [{source.format}]")
        if other.notes:
            click.echo(f"      {other.notes}")


@cli.command(cls=ManyR)
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


@cli.command(cls=ManyR)
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
    model = tomevit.create(name, img_size=img_size).to(_device(device), DTYPES[dtype])
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
    _table(["r", "tokens", "GFLOPs", "images/s", "speed-up", "FLOP ratio", "efficiency"], map(_bench_cells, rows))


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


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print aligned: the first column to the left, the others to the right."""
    cells = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for first, *others in cells:
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        click.echo("  ".join([first.ljust(widths[0]), *right]))
