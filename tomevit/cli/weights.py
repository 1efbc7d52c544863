"""Weights in, checked, and shared: `tomevit convert`, `tomevit verify`, `tomevit push`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click

from tomevit.cards import by_pattern, lines_left_out
from tomevit.cli.console import echo, echo_json
from tomevit.cli.options import FilePath, R, Size
from tomevit.cli.running import DTYPES
from tomevit.cli.tables import show
from tomevit.config import Figure
from tomevit.errors import AmbiguousCheckpointError
from tomevit.weights import convert as conversion
from tomevit.weights.convert import Report
from tomevit.weights.push import push as run_push
from tomevit.weights.recognise import MAIN_FORMATS
from tomevit.weights.verify import verify as run_verify


@click.command()
@click.argument("source")
@click.option("-o", "--out", type=FilePath(dir_okay=False), help="File to write; default MODEL.safetensors.")
@click.option(
    "--model",
    metavar="NAME",
    help="What the checkpoint is, as in deit_s16 or deit_s16.tome_r13; default: as recognised.",
)
@click.option(
    "--format", "format_name", metavar="NAME", help=f"Its format, of {', '.join(MAIN_FORMATS)}; default: as recognised."
)
@click.option("--key", help="Where in the file the state dict lies, as in model_ema, if it holds several.")
@click.option("--prefix", help="What the model's names begin with, as in student.backbone, if it holds several models.")
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
    prefix: str | None,
    num_classes: int | None,
    img_size: tuple[int, int] | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Write a checkpoint of any known format as one self-describing file.

    SOURCE is a file, a directory with one checkpoint, as model.safetensors and config.json, the index of several files,
    hf-hub:owner/repo[@revision], a URL, or a name of the zoo with its weights, as in vit_b16.augreg_in21k_ft_in1k.
    """
    report = conversion.convert(
        source,
        out,
        model=model,
        format=format_name,
        key=key,
        prefix=prefix,
        num_classes=num_classes,
        img_size=img_size,
        dtype=DTYPES[dtype] if dtype else None,
        ask=_ask if sys.stdin.isatty() and sys.stderr.isatty() else None,
    )
    if as_json:
        echo_json(asdict(report))
    else:
        show(_lines(report), hanging=12)


def _ask(error: AmbiguousCheckpointError) -> str:
    echo(f"tomevit: {error}", err=True)
    answer: str = click.prompt(error.option, type=click.Choice(error.choices), err=True)
    return answer


def _lines(report: Report) -> Iterator[str]:
    yield f"source      {report.source}"
    yield f"sha256      {report.sha256}"
    yield f"recognised  {report.recognised}"
    yield f"model       {report.model}"
    renamed = {name: sources for name, sources in report.names.items() if sources != (name,)}
    yield f"tensors     {len(report.names)} parameters, of which {len(report.names) - len(renamed)} keep their names"
    patterns = (f"{' + '.join(by_pattern(sources))} -> {by_pattern([name])[0]}" for name, sources in renamed.items())
    for line in dict.fromkeys(patterns):
        yield f"            {line}"
    for line in lines_left_out(report.left_out):
        yield f"left out    {line}"
    for change in report.changes:
        yield f"changed     {change}"
    yield f"written     {report.out}"


@click.command()
@click.argument("file", type=FilePath())
@click.option("--against", metavar="SOURCE", help="A source, as convert takes it, that every tensor must agree with.")
@click.option("--key", help="Where in that source the state dict lies, if it holds several.")
@click.option("--prefix", help="What the model's names begin with there, if it holds several models.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.pass_context
def verify(
    ctx: click.Context, file: Path, against: str | None, key: str | None, prefix: str | None, as_json: bool
) -> None:
    """Check a file that tomevit wrote: structure, shapes, digest, values, and a forward pass; status 1 if any fails."""
    checks = run_verify(file, against=against, key=key, prefix=prefix)
    if as_json:
        echo_json([check._asdict() for check in checks])
    else:
        width = max(len(check.name) for check in checks)
        lines = (f"{'ok  ' if check.passed else 'FAIL'}  {check.name.ljust(width)}  {check.found}" for check in checks)
        show(lines, hanging=width + 8)
    ctx.exit(0 if all(check.passed for check in checks) else 1)


def _accuracies(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[tuple[int | str, float]]:
    found = []
    for value in values:
        match = re.fullmatch(r"(.+)=(\d+(?:\.\d+)?)", value)
        r = None if match is None else R().convert(match[1], param, ctx)
        if match is None or not isinstance(r, int | str):
            raise click.BadParameter(f"{value!r} is not like 8=81.2, for 81.2 % at r = 8", ctx, param)
        found.append((r, float(match[2])))
    return found


@click.command()
@click.argument("file", type=FilePath())
@click.argument("repo", metavar="OWNER/REPO")
@click.option("--top1", metavar="R=PERCENT", multiple=True, callback=_accuracies, help="Accuracy measured at an r.")
@click.option("--dataset", help="What it was measured on, as the hub names it; default: ImageNet-1k.")
@click.option("--licence", help="As the hub names it, as in apache-2.0; default: of the weights it was made from.")
@click.option("--notes", default="", help="What else a user should know, in Markdown.")
@click.option("--private", is_flag=True, help="If the repository is new.")
@click.option("--message", default="Upload model", help="Of the commit.")
def push(
    file: Path,
    repo: str,
    top1: list[tuple[int | str, float]],
    dataset: str | None,
    licence: str | None,
    notes: str,
    private: bool,
    message: str,
) -> None:
    """Share a file that tomevit wrote on the Hugging Face hub, with a model card.

    Log in first, with `hf auth login` or HF_TOKEN. Others then load it by the name
    hf-hub:OWNER/REPO.
    """
    measured = [Figure(top1=percent, r=r, source=f"measured by {repo.partition('/')[0]}") for r, percent in top1]
    address = run_push(
        file, repo, figures=measured, dataset=dataset, licence=licence, notes=notes, private=private, message=message
    )
    echo(f"uploaded    {address}")
