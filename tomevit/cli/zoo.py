"""What there is: `tomevit list`, `tomevit info`. Neither needs torch to answer, but for a file of a foreign format."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from tomevit import zoo
from tomevit.cards import Card, Contents, is_ours, lines_left_out, read_contents
from tomevit.cli import options
from tomevit.cli.console import echo, echo_json
from tomevit.cli.options import Command, R
from tomevit.cli.tables import Column, Table, show
from tomevit.config import POOLED, Config, Preset, Source
from tomevit.errors import nearest, printable
from tomevit.flops import count_parameters, flops, plain_schedule, plain_steps
from tomevit.measure.defaults import default_r, plain_figure, recommended_r
from tomevit.output import check_outputs, new_file
from tomevit.schedule import (
    Schedule,
    distinct_schedules,
    entries,
    format_schedule,
    schedule_from_json,
    schedule_to_json,
    token_counts,
)

#: What models can be sorted by: the value of a row, None last; and whether the largest is first.
KEYS: dict[str, tuple[Callable[[dict[str, Any]], Any], bool]] = {
    "name": (lambda row: row["name"], False),
    "pixels": (lambda row: row["img_size"][0] * row["img_size"][1], False),
    "params": (lambda row: row["params"], False),
    "gflops": (lambda row: row["gflops"], False),
    "top1": (lambda row: row["top1"], True),
    "merged": (lambda row: row["merged"] and row["merged"]["top1"], True),
}
#: The columns that show what models were sorted by.
SORTED = {"pixels": "pixels", "params": "params M", "gflops": "GFLOPs", "merged": "merged"}
COLUMNS = (
    *(Column("name"), Column("pixels", 2), Column("params M", 3), Column("GFLOPs", 5), Column("classes", 7)),
    *(Column("top-1"), Column("merged"), Column("take r")),
)


@click.command("list")
@click.argument("pattern", default="*")
@click.option("--weights", is_flag=True, help="One line for each set of weights.")
@click.option("--sort", "key", type=click.Choice(list(KEYS)), help="The least first; of accuracies the highest.")
@click.option("--licence", metavar="L", help="Of each model the first weights of this licence, as in mit, or 'cc-*'.")
@click.option("--family", metavar="F", help="Of one family alone, as in deit, or dinov2.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def list_command(
    pattern: str, weights: bool, key: str | None, licence: str | None, family: str | None, as_json: bool
) -> None:
    """What models there are; PATTERN takes wildcards, as in 'deit*'; timm's names match too, as in 'vit_base*', where
    no name of ours does.

    Accuracies are of ImageNet-1k, as published of the weights that create() takes by default: top-1, and merged, at
    the r to take or at that which follows. What to take: the r that the weights were trained with; else, of those
    whose published accuracy is 1 point lower at most, that of the fewest FLOPs; else half of the most that can merge,
    marked ~, of which no accuracy is known: measure it on your images, by tomevit eval.
    """
    every = weights or "." in pattern
    cards = [zoo.card(name) for name in zoo.list_models(pattern, weights=every)]
    if not cards:
        raise ValueError(
            f"no model matches {pattern!r}; {nearest(pattern, zoo.list_models(), 'tomevit list shows all')}"
        )
    weights = every or licence is not None  # not the default ones, perhaps
    cards = [found for card in _of_family(cards, family) if (found := _of_licence(card, licence, every)) is not None]
    if not cards:
        raise ValueError("no model is of this licence, family and pattern together; tomevit list shows all")
    rows = [summary(card) | {"name": card.full_name if weights else card.name} for card in cards]
    if key is not None:
        value, largest_first = KEYS[key]
        known = sorted((row for row in rows if value(row) is not None), key=value, reverse=largest_first)
        rows = known + [row for row in rows if value(row) is None]
    if as_json:
        echo_json(rows)
        return
    last = (Column("trained r", 6), Column("licence", 4)) if weights else (Column("weights", 6), Column("presets", 8))
    asked = {SORTED.get(key or ""), "licence" if licence else None}
    ranks = {"merged": 1 if weights else 0} | {name: 0 for name in asked if name}
    columns = [Column(column.name, ranks.get(column.name, column.rank)) for column in (*COLUMNS, *last)]
    show([Table(columns, [cells(row, weights) for row in rows])])
    if by := sorted({row["top1_by"] for row in rows} - {None, "head"}):
        show([f"* Not by a head: {', '.join(by)}."])


def _of_family(cards: Sequence[Card], family: str | None) -> Sequence[Card]:
    """Those of one family, by the name of its file.

    Raises:
        ValueError: there is no such family.
    """
    if family is None:
        return cards
    families = zoo.families()
    known = f"there are {', '.join(families)}"
    family = family.lower()
    if family not in families:
        raise ValueError(f"there is no family {family!r}; {nearest(family, families, known)}")
    return [card for card in cards if card.name in families[family]]


def _of_licence(card: Card, licence: str | None, weights: bool) -> Card | None:
    """The card, or the first of its model's with weights of a licence; None: there is none.

    Raises:
        ValueError: nothing in the zoo has such a licence.
    """
    if licence is None:
        return card
    known = sorted({other.licence for other, _ in zoo.published_sources() if other.licence})
    matching = fnmatch.filter(known, licence.lower())
    if not matching:
        raise ValueError(f"no weights have the licence {licence!r}; there are {', '.join(known)}")
    others = [card] if weights else zoo.cards(card.name)
    return next((other for other in others if other.licence in matching), None)


def cells(row: dict[str, Any], weights: bool = False) -> list[Any]:
    """What `tomevit list` shows of a summary, in the order of its columns."""
    merged, take = row["merged"], row["recommended"]
    at = f" at {format_schedule(merged['r'])}" if merged else ""
    trained = format_schedule(schedule_from_json(row["r"]))
    return [
        row["name"],
        "x".join(dict.fromkeys(map(str, row["img_size"]))),  # one number for a square, as --img-size takes it
        f"{row['params'] / 1e6:.2f}",
        f"{row['gflops']:.2f}",
        row["num_classes"],
        "—" if row["top1"] is None else f"{row['top1']:.2f}{'' if row['top1_by'] == 'head' else '*'}",
        "—" if merged is None else f"{merged['top1']:.2f}{'' if merged['r'] == take['r'] else at}",
        f"{'' if take['known'] else '~'}{format_schedule(schedule_from_json(take['r']))}",
        *((trained, row["licence"] or "—") if weights else map(len, (row["weights"], row["presets"]))),
    ]


def summary(card: Card) -> dict[str, Any]:
    """What there is to say of a model in a line, as `tomevit list --json` has it."""
    take = recommended_r(card)
    merged = [figure for figure in card.figures if figure.r]
    # The accuracy at what is recommended, else the highest there is with merging.
    best = max(merged, key=lambda figure: (figure.r == take.r, figure.top1), default=None)
    plain = plain_figure(card, best)
    return {
        "name": card.name,
        "title": card.title,
        "img_size": card.config.img_size,
        "params": count_parameters(card.config),
        "gflops": flops(card.config) / 1e9,
        "num_classes": card.config.num_classes,
        "default_weights": zoo.cards(card.name)[0].weights,
        "weights": [other.weights for other in zoo.cards(card.name) if other.weights],
        "figures": [asdict(figure) for figure in card.figures],
        "top1": plain.top1 if plain else None,
        "top1_by": plain.by if plain else None,
        "merged": {"r": best.r, "top1": best.top1} if best else None,
        "recommended": {"r": schedule_to_json(take.r), "known": take.top1 is not None or card.r == take.r},
        "presets": _presets(card, card.config, [card]),
        "r": schedule_to_json(card.r),
        "licence": card.licence,
    }


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


@click.command(cls=Command)
@click.argument("name", metavar="NAME|FILE", type=options.FilePath(path_type=str))
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
    type=options.FilePath(dir_okay=False),
    help="Draw the tokens after each block, a line for each r: .png, .svg or .pdf.",
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
    lines = [*_architecture(name, card, config), *_costs(config, schedules), *_lines_of_presets(config, presets)]
    lines += [*_preparation(card, config), *(_weights(weights) if contents is None else _file(contents))]
    show(lines, hanging=15)


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
            f"{unmerged / preset['gflops']:.2f} times fewer, {preset['tokens'][-1]} tokens after the last block"
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
