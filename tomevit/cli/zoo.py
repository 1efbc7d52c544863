"""What there is: `tomevit list`, `tomevit info`. Neither needs torch to answer, but for a file of a foreign format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from tomevit import zoo
from tomevit.cards import Card, Contents, is_ours, lines_left_out, read_contents
from tomevit.cli import options
from tomevit.cli.console import echo, echo_json
from tomevit.cli.options import Many, R, table
from tomevit.config import POOLED, Config, Figure, Preset, Source
from tomevit.errors import printable
from tomevit.flops import count_parameters, flops, plain_schedule, plain_steps
from tomevit.measure.defaults import default_r
from tomevit.output import check_outputs, new_file
from tomevit.schedule import Schedule, distinct_schedules, entries, format_schedule, schedule_to_json, token_counts


@click.command("list")
@click.argument("pattern", default="*")
@click.option("--weights", is_flag=True, help="One line for each set of weights.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def list_command(pattern: str, weights: bool, as_json: bool) -> None:
    """What models there are; PATTERN takes wildcards, as in 'deit*', and timm's names, as in 'vit_base*'."""
    names = zoo.list_models(pattern, weights=weights)
    if not names:
        raise ValueError(f"no model matches {pattern!r}; tomevit list shows all")
    rows = [_summary(zoo.card(name)) | {"name": name} for name in names]
    if as_json:
        echo_json(rows)
        return
    columns = ["name", "image", "params M", "GFLOPs", "classes"]
    columns += ["top-1", "r", "licence"] if weights else ["weights", "presets"]
    table(
        columns,
        [
            [
                row["name"],
                "x".join(map(str, row["img_size"])),
                f"{row['params'] / 1e6:.2f}",
                f"{row['gflops']:.2f}",
                row["num_classes"],
                *(
                    [_top1(row), row["r"], row["licence"] or "—"]
                    if weights
                    else map(len, (row["weights"], row["presets"]))
                ),
            ]
            for row in rows
        ],
    )


def _summary(card: Card) -> dict[str, Any]:
    return {
        "name": card.name,
        "title": card.title,
        "img_size": card.config.img_size,
        "params": count_parameters(card.config),
        "gflops": flops(card.config) / 1e9,
        "num_classes": card.config.num_classes,
        "default_weights": card.weights,
        "weights": [other.weights for other in zoo.cards(card.name) if other.weights],
        "figures": [asdict(figure) for figure in card.figures],
        "presets": _presets(card, card.config, [card]),
        "r": schedule_to_json(card.r),
        "licence": card.licence,
    }


def _top1(row: dict[str, Any]) -> str:
    """Of the model's own head if there is such a figure; else the first, and how classes were told."""
    figures = sorted(row["figures"], key=lambda figure: figure["by"] != "head")
    return _accuracy(Figure(**figures[0])) if figures else "—"


def _accuracy(figure: Figure) -> str:
    return f"{figure.top1:.2f}" if figure.by == "head" else f"{figure.top1:.2f} ({figure.by})"


def _at(r: Schedule, config: Config, presets: Sequence[Preset]) -> dict[str, Any]:
    """What an r means for a model, and what it costs then."""
    plain = plain_schedule(r, config, presets)
    return {
        "r": r,
        "plain": plain,
        "schedule": entries(plain_steps(plain, config)),
        "tokens": token_counts(plain, config.depth, config.num_tokens, config.num_prefix, config.grid),
        "gflops": flops(config, plain) / 1e9,
        "gflops_computed": flops(config, plain, computed=True) / 1e9,
    }


def _presets(card: Card, config: Config, weights: Sequence[Card]) -> list[dict[str, Any]]:
    """The presets of a card that fit a config: their cost, and the accuracies published of these weights at them."""
    return [
        asdict(preset)
        | _at(list(preset.r), config, card.presets)
        | {
            "figures": [
                {"weights": other.full_name, "top1": figure.top1, "source": figure.source}
                for other in weights
                for figure in other.figures
                if figure.r == preset.name
            ]
        }
        for preset in card.presets
        if preset.fits(config)
    ]


@click.command(cls=Many)
@click.argument("name", metavar="NAME|FILE")
@click.option(
    "--r",
    "r_values",
    type=R(),
    multiple=True,
    help=f"Values to show; default: the model's own, and with --plot 0 and those that fit the depth. "
    f"An r: {options.FORMS_OF_R}.",
)
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
    """One model, or all that a file says of itself: architecture, cost and tokens at each r, preprocessing, licence.

    FILE is a file that tomevit wrote, or a checkpoint of any known format.
    """
    check_outputs(picture, inputs=[name])
    contents = _contents(name)
    card = zoo.card_of_no_file(name) if contents is None else contents.card
    config = card.config if img_size is None else replace(card.config, img_size=img_size)
    if not r_values:
        sized = replace(card, config=config, figures=card.figures if img_size is None else ())
        fitting = [0, *default_r(sized)] if picture else []
        r_values = tuple(distinct_schedules([card.r, *fitting]))
    schedules = [_at(r, config, card.presets) for r in r_values]
    if picture is not None:
        _draw(picture, card, config, schedules)
    weights = []
    if contents is None:
        one = zoo.names_weights(name)
        weights = [other for other in zoo.cards(name) if other.weights and (other == card or not one)]
    presets = _presets(card, config, weights if contents is None else [card])
    if as_json:
        echo_json(_as_json(card, config, schedules, presets, weights, contents))
        return
    name = card.name if contents is None else card.full_name
    echo(*_architecture(name, card, config), *_costs(config, schedules), *_lines_of_presets(config, presets))
    echo(*_preparation(card, config))
    echo(*(_weights(weights) if contents is None else _file(contents)))


def _contents(name: str) -> Contents | None:
    """What a file says of itself; None for the name of a model.

    Raises:
        CheckpointError: it is damaged, or of no known format.
    """
    path = Path(name)
    if zoo.is_elsewhere(name):
        return None
    if is_ours(path):
        return read_contents(path)
    from tomevit.cli import import_torch

    import_torch()
    from tomevit.weights.convert import inspect

    return inspect(path)


def _draw(picture: Path, card: Card, config: Config, schedules: Sequence[dict[str, Any]]) -> None:
    from tomevit.cli import import_torch

    import_torch()
    from tomevit.tasks import plots

    plots.require_matplotlib()
    plots.check_suffix(picture)
    dearest_first = sorted(schedules, key=lambda at: -at["gflops"])
    lines = {f"r = {format_schedule(at['r'])}: {at['gflops']:.4g} GFLOPs": at["tokens"] for at in dearest_first}
    with new_file(picture) as draft:
        plots.tokens_per_layer(draft, picture.suffix, lines, f"{card.name}, {config.num_tokens} tokens at first")
    echo(f"written to {picture}", err=True)


def _as_json(
    card: Card,
    config: Config,
    schedules: list[dict[str, Any]],
    presets: list[dict[str, Any]],
    weights: Sequence[Card],
    contents: Contents | None,
) -> dict[str, Any]:
    schedules = [at | {name: schedule_to_json(at[name]) for name in ("r", "plain")} for at in schedules]
    described = asdict(replace(card, config=config))
    described |= {"params": count_parameters(config), **schedules[0], "gflops_unmerged": flops(config) / 1e9}
    described |= {"schedules": schedules, "presets": presets}
    described["all_weights"] = [asdict(other) | {"r": schedule_to_json(other.r)} for other in weights]
    if contents is not None:
        described["file"] = contents._asdict() | {"card": None, "path": str(contents.path)}
        del described["file"]["card"]
    return described


def _architecture(name: str, card: Card, config: Config) -> Iterator[str]:
    title = f": {printable(card.title)}" if card.title else ""
    yield f"{printable(name or 'a model without a name')}{title}" + (
        f" ({printable(card.timm)} in timm)" if card.timm else ""
    )
    for paper in card.papers:
        yield f"  {printable(paper)}"
    height, width = config.img_size
    reads = POOLED[config.pool] + (f", projected to {config.proj_dim} channels" if config.proj_dim else "")
    mlp = "gated MLP" if config.mlp == "swiglu" else "MLP"
    yield ""
    yield (
        f"architecture   {config.depth} blocks, width {config.embed_dim}, {config.num_heads} heads, "
        f"{mlp} x{config.mlp_ratio:g}, patch {config.patch_size}, image {height}x{width}x{config.in_chans}"
    )
    yield f"tokens         {config.num_prefix} prefix + {config.num_patches} patches; the head reads the {reads}"
    yield f"parameters     {count_parameters(config) / 1e6:.2f} M, {config.num_classes} classes"


def _costs(config: Config, schedules: Sequence[dict[str, Any]]) -> Iterator[str]:
    unmerged, computed = flops(config) / 1e9, flops(config, computed=True) / 1e9
    for at in schedules:
        r = format_schedule(at["r"])
        yield (
            f"r = {r:<10} {at['gflops']:.4g} GFLOPs, {unmerged / at['gflops']:.2f} times fewer "
            f"than the {unmerged:.4g} of r = 0"
        )
        if at["plain"] != at["r"]:
            yield (
                f"               as computed {at['gflops_computed']:.4g}, {computed / at['gflops_computed']:.2f} times "
                f"fewer; here r = {format_schedule(at['plain'])}"
            )
        yield f"               tokens {' '.join(map(str, at['tokens']))}"


def _lines_of_presets(config: Config, presets: Sequence[dict[str, Any]]) -> Iterator[str]:
    unmerged = flops(config) / 1e9
    for i, preset in enumerate(presets):
        published = [f"; top-1 {figure['top1']:.2f} % ({printable(figure['weights'])})" for figure in preset["figures"]]
        yield (
            f"{'' if i else 'presets':<15}{printable(preset['name'])}: {preset['gflops']:.4g} GFLOPs, "
            f"{unmerged / preset['gflops']:.2f} times fewer, {preset['tokens'][-1]} tokens leave the last block"
            f"{''.join(published)}"
        )
    for source in dict.fromkeys(preset["source"] for preset in presets):
        yield f"               from {printable(source)}"


def _preparation(card: Card, config: Config) -> Iterator[str]:
    prepare, (height, width) = card.preprocess, config.img_size
    how = "shorter edge" if prepare.resize == "shorter" else "both edges"
    yield (
        f"preprocessing  {how} to {int(min(height, width) / prepare.crop_pct)} pixels ({prepare.interpolation}), "
        f"centre crop {height}x{width}, mean {prepare.mean}, std {prepare.std}"
    )


def _weights(weights: Sequence[Card]) -> Iterator[str]:
    yield ""
    yield f"weights{'' if weights else '        none are published; create() draws fresh ones'}"
    for other in weights:
        attention = "proportional" if other.config.prop_attn else "plain"
        yield (
            f"  {other.full_name}  {other.config.num_classes} classes, {other.licence}, "
            f"trained at r = {format_schedule(other.r)}, {attention} attention"
        )
        for figure in other.figures:
            yield f"      top-1 {figure.top1:.2f} {figure.unit} at r = {figure.r} ({figure.source})"
        for source in other.sources:
            yield f"      {_place(source)} [{source.format}]"
        if other.notes:
            yield f"      {other.notes}"


def _file(contents: Contents) -> Iterator[str]:
    """What a file says of itself beside its model."""
    card = contents.card
    attention = "proportional" if card.config.prop_attn else "plain"
    yield f"merging        r = {format_schedule(card.r)}, {attention} attention"
    yield f"licence        {printable(card.licence or 'not stated')}"
    yield ""
    yield f"file           {contents.size:,} bytes, {contents.format}"
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in contents.dtypes.items())
    yield f"tensors        {sum(contents.dtypes.values())}: {dtypes}"
    if contents.sha256 is not None:
        yield f"digest         sha256 {contents.sha256} of the tensors; tomevit verify checks it"
    if card.origin is not None:
        sha256 = f", sha256 {card.origin.sha256}" if card.origin.sha256 else ""
        yield f"made from      {printable(_place(card.origin))} [{printable(card.origin.format or 'unknown')}]{sha256}"
    for source in card.sources:
        yield f"published      {printable(_place(source))} [{printable(source.format)}]"
    for figure in card.figures:
        said = printable(f"at r = {figure.r} ({figure.source})")
        yield f"top-1          {figure.top1:.2f} {figure.unit} {said}"
    if card.class_names:
        names = ", ".join(card.class_names[:10])
        more = f" and {len(card.class_names) - 10} more" if len(card.class_names) > 10 else ""
        yield f"class names    {printable(names)}{more}"
    if card.notes:
        yield f"notes          {printable(card.notes)}"
    for line in lines_left_out(contents.left_out):
        yield f"left out       {printable(line)}"


def _place(source: Source) -> str:
    revision = f"@{source.revision}" if source.hub and source.revision else ""
    return source.url or (source.hub and source.hub + revision) or source.package or source.file or "a file"
