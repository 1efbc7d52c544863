"""The forms in which commands report, chosen by a flag or by the name of the file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from tomevit.cli.console import echo
from tomevit.cli.options import FilePath
from tomevit.cli.tables import Part, fitted
from tomevit.errors import join_with_or
from tomevit.output import check_output, new_file

F = TypeVar("F", bound=Callable[..., Any])

#: How the name of a file in each form ends. A file whose name says nothing else has text, or what a flag asks for.
SUFFIXES = {"text": ".txt", "json": ".json", "csv": ".csv", "markdown": ".md"}
#: The forms that a flag or a name asks for, as a message calls them.
NAMES = {"json": "JSON", "csv": "CSV", "markdown": "Markdown"}

out = click.option(
    "-o",
    "--out",
    type=FilePath(dir_okay=False),
    help="Write to a file what is printed, in the form that its name asks for.",
)


def form_flags(**helps: str) -> Callable[[F], F]:
    """A flag for each form that a command has beside text, by its help.

    Flags for other forms are taken and not shown, so that `report_form` can say what there is instead.
    """

    def decorate(function: F) -> F:
        for form in reversed(NAMES):
            flag = click.option(
                f"--{form}",
                is_flag=True,
                expose_value=False,
                callback=_take_form,
                hidden=form not in helps,
                help=helps.get(form),
            )
            function = flag(function)
        return function

    return decorate


def _take_form(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    """Hand the form of a flag that was given to the command, as its `flag`.

    Raises:
        click.UsageError: a flag for another form was given too.
    """
    before = ctx.params.setdefault("flag", None)
    if not wanted:
        return
    if before is not None:
        raise click.UsageError(f"--{before} and --{param.name} ask for two forms of one report: give one of them", ctx)
    ctx.params["flag"] = param.name


def report_form(out: Path | None, flag: str | None, forms: Collection[str]) -> str:
    """The form of a report, one of a command's.

    Args:
        out: the file for it, if there is one.
        flag: the form that was asked for by a flag, if any was.
        forms: those that the command has, keys of SUFFIXES, "text" among them.

    Raises:
        ValueError: the command has no such form, or the name of the file promises another.
        OSError: as `tomevit.output.check_output`.
    """
    if flag is not None and flag not in forms:
        flags = [f"--{form}" for form in NAMES if form in forms]
        raise ValueError(f"this command has no --{flag}, but {join_with_or(flags)}")
    if out is None:
        return flag or "text"
    check_output(out, endings=[SUFFIXES[form] for form in forms])
    named = next((form for form in NAMES if form in forms and SUFFIXES[form] == out.suffix.lower()), None)
    if flag is not None and named not in (None, flag):
        raise ValueError(
            f"{out} would be {NAMES[named]} by its name, and --{flag} asks for {NAMES[flag]}: "
            f"leave out --{flag}, or name a file that ends in {SUFFIXES[flag]}"
        )
    return flag or named or "text"


def write_report(out: Path, parts: Iterable[Part]) -> None:
    """Put a report in place, and say so."""
    text = "\n".join(fitted(parts, None))
    with new_file(out) as draft:
        draft.write_text(f"{text}\n", encoding="utf-8", errors="surrogateescape")  # names are as they are on disk
    echo(f"written to {out}", err=True)
