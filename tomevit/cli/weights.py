"""Weights in, checked, and out: `tomevit convert`, `tomevit verify`, `tomevit export`, `tomevit push`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import click

from tomevit.cli.options import DTYPES, Size
from tomevit.errors import AmbiguousCheckpointError
from tomevit.weights import convert as conversion
from tomevit.weights.convert import Report
from tomevit.weights.export import export as run_export
from tomevit.weights.formats import FORMATS
from tomevit.weights.verify import verify as run_verify

FORMAT = click.Choice(list(FORMATS))


@click.command()
@click.argument("source")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write; default MODEL.safetensors."
)
@click.option("--model", help="What the checkpoint is, as in deit_s16 or deit_s16.tome_r13; default: as recognised.")
@click.option("--format", "format_name", type=FORMAT, metavar="NAME", help="Its format; default: as recognised.")
@click.option("--key", help="Where in the file the state dict lies, as in model_ema, if it holds several.")
@click.option("--num-classes", type=click.IntRange(0), help="Replace the head, or both heads, by fresh weights.")
@click.option("--img-size", type=Size(), help="Resample the positions: pixels, as in 384 or 224x320.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Round the weights; default: the source's.")
@click.option("--json", "as_json", is_flag=True, help="The whole report as JSON.")
def convert(
    source: str,
    out: Path | None,
    model: str | None,
    format_name: str | None,
    key: str | None,
    num_classes: int | None,
    img_size: tuple[int, int] | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Write a checkpoint of any known format as one self-describing file.

    SOURCE is a file, a directory with model.safetensors and config.json, a URL, hf-hub:owner/repo[@revision], or a name
    of the zoo with its weights, as in vit_b16.augreg_in21k_ft_in1k.
    """
    chosen: dict[str, str | None] = {"model": model, "format": format_name, "key": key}
    while True:
        try:
            report = conversion.convert(
                source,
                out,
                **chosen,
                num_classes=num_classes,
                img_size=img_size,
                dtype=DTYPES[dtype] if dtype else None,
            )
            break
        except AmbiguousCheckpointError as error:
            if not sys.stdin.isatty() or not sys.stderr.isatty():
                raise
            click.echo(str(error), err=True)
            chosen[error.option] = click.prompt(error.option, type=click.Choice(error.choices), err=True)
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2))
    else:
        _print(report)


def _print(report: Report) -> None:
    click.echo(f"source      {report.source}\nsha256      {report.sha256}\nrecognised  {report.recognised}")
    click.echo(f"model       {report.model}")
    renamed = {name: sources for name, sources in report.names.items() if sources != (name,)}
    click.echo(
        f"tensors     {len(report.names)} parameters, of which {len(report.names) - len(renamed)} keep their names"
    )
    for line in _by_pattern(f"{' + '.join(sources)} -> {name}" for name, sources in renamed.items()):
        click.echo(f"            {line}")
    for what, why in _grouped(report.left_out).items():
        click.echo(f"left out    {', '.join(_by_pattern(what))}: {why}")
    for change in report.changes:
        click.echo(f"changed     {change}")
    click.echo(f"written     {report.out}")


def _by_pattern(names: Iterable[str]) -> list[str]:
    """Each name once, however many blocks have it."""
    return list(dict.fromkeys(re.sub(r"(?<=[._/])\d+|(?<=_)\d+(?=/)", "{i}", name) for name in names))


def _grouped(left_out: Mapping[str, str]) -> dict[tuple[str, ...], str]:
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    return {tuple(names): reason for reason, names in reasons.items()}


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--against", metavar="SOURCE", help="A source, as convert takes it, that every tensor must agree with.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_context
def verify(ctx: click.Context, file: Path, against: str | None, as_json: bool) -> None:
    """Check a file that tomevit wrote: structure, shapes, digest, values, and a forward pass; status 1 if any fails."""
    checks = run_verify(file, against=against)
    if as_json:
        click.echo(json.dumps([check._asdict() for check in checks], indent=2))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            click.echo(f"{'ok  ' if check.passed else 'FAIL'}  {check.name.ljust(width)}  {check.found}")
    ctx.exit(0 if all(check.passed for check in checks) else 1)


@click.command()
@click.argument("source")
@click.option(
    "--format", "format_name", type=FORMAT, required=True, metavar="NAME", help=f"One of {', '.join(FORMATS)}."
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="A file, or a directory for timm and transformers.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def export(source: str, format_name: str, out: Path, as_json: bool) -> None:
    """Write a model's weights in another project's format.

    SOURCE is a file that tomevit wrote, or a name of the zoo with its weights. The suffix of OUT says what is written:
    .safetensors, .npz, or .pth, .pt, .bin, .torch; a directory gets model.safetensors and its config.json.
    """
    written, unsaid = run_export(source, out, format_name)
    if as_json:
        click.echo(json.dumps({"written": list(map(str, written)), "unsaid": unsaid}, indent=2))
        return
    for path in written:
        click.echo(f"written     {path}")
    for sentence in unsaid:
        click.echo(f"left out    {sentence}")


COMMANDS: tuple[click.Command, ...] = (convert, verify, export)
