"""What there is: `tomevit list`, `tomevit info`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from tomevit import zoo
from tomevit.cli import options
from tomevit.cli.options import Many, R, table
from tomevit.config import Card
from tomevit.flops import flops
from tomevit.models import build_meta
from tomevit.output import check_outputs, new_file
from tomevit.schedule import Schedule, format_schedule, token_counts
from tomevit.tasks import plots


@click.command("list")
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
    table(
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


@click.command(cls=Many)
@click.argument("name")
@click.option("--r", "r_values", type=R(), multiple=True, help="Tokens to merge per block: 8, 8,-1, [20,0,7] or 0.08.")
@options.img_size
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option(
    "--plot",
    "picture",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the tokens behind each block, a line for each r: .png, .svg or .pdf.",
)
def info(
    name: str,
    r_values: tuple[Schedule, ...],
    img_size: tuple[int, int] | None,
    as_json: bool,
    picture: Path | None,
) -> None:
    """One model: architecture, cost and tokens at each r, preprocessing, weights, licence."""
    if picture is not None:
        check_outputs(picture)
        plots.require_matplotlib()
        plots.check_suffix(picture)
    card = zoo.card(name)
    config = card.config if img_size is None else replace(card.config, img_size=img_size)
    schedules: list[dict[str, Any]] = [
        {
            "r": r,
            "tokens": token_counts(r, config.depth, config.num_tokens, config.num_prefix),
            "gflops": flops(config, r) / 1e9,
        }
        for r in r_values or (card.r,)
    ]
    params, unmerged = sum(p.numel() for p in build_meta(config).parameters()), flops(config) / 1e9
    if picture is not None:
        lines = {f"r = {format_schedule(at['r'])}: {at['gflops']:.4g} GFLOPs": at["tokens"] for at in schedules}
        with new_file(picture) as unfinished:
            plots.tokens_per_layer(
                unfinished, picture.suffix, lines, f"{card.name}, {config.num_tokens} tokens at first"
            )
        click.echo(f"written to {picture}", err=True)
    weights = [other for other in zoo.cards(name) if other.weights and ("." not in name or other == card)]
    if as_json:
        described = asdict(replace(card, config=config)) | {
            "params": params,
            **schedules[0],
            "gflops_unmerged": unmerged,
        }
        described["schedules"] = schedules
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
        f"parameters     {params / 1e6:.2f} M, {config.num_classes} classes"
    )
    for at in schedules:
        click.echo(
            f"r = {format_schedule(at['r']):<11}{at['gflops']:.4g} GFLOPs, {unmerged / at['gflops']:.2f} times fewer than "
            f"the {unmerged:.4g} of r = 0\n"
            f"               tokens {' '.join(map(str, at['tokens']))}"
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
