"""What several commands share: kinds of options, and how they print."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click

from tomevit.schedule import Schedule, format_schedule, parse_schedule
from tomevit.words import ALLOWED, parse_words

#: The forms of r as they are typed.
FORMS_OF_R = (
    "8, 8,-1, [20,0,7], 0.08, a budget of FLOPs such as 2x or 60%, also '2x late', '2x deferred', '2x diffrate', "
    "'8 pitome', '1.5x grid', or a preset of the model"
)


SEVERAL_R = (
    "Several r follow one another, as in --r 8 13, or are whole numbers between commas, as in --r 8,13. 8,-1 is one r, "
    "with its inflection, and [8,13] one of two blocks."
)


class R(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on only
    """8, or 8,-1 for (r, inflection), or [20,0,7] for single blocks, or 0.08 for a share, or words, as in '2x late'."""

    name = "r"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        if not getattr(param, "multiple", False) and re.fullmatch(r"\d+(,(\d\d+|[2-9])(,\d+)*|( +\d+)+)", value):
            self.fail(f"{value!r} names several r, and this takes one", param, ctx)
        try:
            return parse_schedule(value)
        except ValueError as error:
            self.fail(str(error).replace(ALLOWED, FORMS_OF_R), param, ctx)


class Size(click.ParamType):  # type: ignore[type-arg]
    """224, or 224x320 for height x width."""

    name = "pixels"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"([1-9][0-9]{0,4})(?:x([1-9][0-9]{0,4}))?", value)
        if found is None:
            self.fail(f"{value!r} is neither 224 nor 224x320 (height x width, up to 99999)", param, ctx)
        return int(found[1]), int(found[2] or found[1])


class FilePath(click.Path):
    """A path, and never "", which would be the current directory: mostly a variable of the shell without a value."""

    def __init__(
        self, *, exists: bool = False, file_okay: bool = True, dir_okay: bool = True, path_type: type = Path
    ) -> None:
        super().__init__(exists, file_okay, dir_okay, path_type=path_type)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


#: No machine reads faster with more processes or threads than this, and many fall over.
MOST_AT_ONCE = max(64, 2 * (os.cpu_count() or 1))
BATCH = click.IntRange(1, 2**16)
WORKERS = click.IntRange(0, MOST_AT_ONCE)

# What means the same in every command that has it.
model = partial(
    click.option,
    "--model",
    metavar="NAME|FILE",
    help="A name of the zoo, whose weights are downloaded on first use, or a file.",
)
img_size = click.option("--img-size", type=Size(), help="Pixels, as in 384 or 224x320.")
batch = click.option("--batch", type=BATCH, default=32, show_default=True, help="Images per call.")
device = click.option("--device", default="cpu", show_default=True, help="As in cpu, cuda, cuda:1 or mps.")
threads = click.option(
    "--threads", type=click.IntRange(1, MOST_AT_ONCE), help="CPU threads; torch's default if not given."
)
workers = click.option("--workers", type=WORKERS, help="Processes that read images; default: as the machine has CPUs.")
truth = click.option(
    "--truth",
    type=FilePath(exists=True, dir_okay=False),
    help="The images' classes, if there are no folders for them; default: ILSVRC's file, by its name.",
)
classes = click.option(
    "--classes",
    type=FilePath(exists=True, dir_okay=False),
    help="The names of the model's classes, one on each line, in the order of its outputs.",
)
picture = click.option("--plot", "picture", type=FilePath(dir_okay=False), help="Draw it: .png, .svg or .pdf.")


class Command(click.Command):
    """A command whose repeatable options take several values at once, and which says of another r that it takes one.

    --r 0 8 13 means --r 0 --r 8 --r 13, and so do --r 0,8,13 and --r "0 8 13": whole numbers between commas are several
    values, and what has anything else, as 8,-1 and 8,0.5, is one r with its inflection. One number for each block is in
    brackets.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = [param for param in self.params if isinstance(param, click.Option)]
        kinds = {name: option.type for option in options if option.multiple for name in option.opts}
        takes_one = {name for option in options if isinstance(option.type, R) for name in option.opts} - kinds.keys()
        for name, value, another in zip(args, args[1:], args[2:], strict=False):
            if name in takes_one and re.fullmatch(r"\d[\d.,x%]*", another) and not os.path.exists(another):  # noqa: PTH110
                raise click.UsageError(f"{name} {value} {another} names several r, and {self.name} takes one", ctx)
        spread: list[str] = []
        option = None
        for argument in args:
            name, equals, value = argument.partition("=")
            if option is not None and _is_value(kinds[option], argument):
                for each in _values(kinds[option], argument, ctx):
                    spread += [each] if spread[-1] == option else [option, each]
            elif equals and name in kinds:
                option = name
                spread += [part for each in _values(kinds[name], value, ctx) for part in (name, each)]
            else:
                option = argument if argument in kinds else None
                spread.append(argument)
        return super().parse_args(ctx, spread)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if any(isinstance(param.type, R) and param.multiple for param in self.params):
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(SEVERAL_R)
        super().format_epilog(ctx, formatter)


def _is_value(kind: Any, argument: str) -> bool:
    """Whether an argument is one more value: a model's name or a path, which may follow, is none."""
    if isinstance(kind, click.Choice):
        return {*argument.split(",")} <= {*kind.choices}
    looks_like_one = re.match(r"[\d\[.]", argument) is not None or _names_preset(argument.partition("=")[0])
    # Unlike pathlib's, this takes no name for too long.
    return looks_like_one and not os.path.isfile(argument)  # noqa: PTH113


def _values(kind: Any, argument: str, ctx: click.Context) -> list[str]:
    """The values of an argument that may have several, between commas.

    Raises:
        click.UsageError: two readings are as likely.
    """
    if isinstance(kind, R) and re.fullmatch(r"\d+( +\d+)+", argument):
        return argument.split()
    several = argument.split(",")
    if isinstance(kind, click.Choice | click.types.IntParamType):
        return several
    if not isinstance(kind, R) or not re.fullmatch(r"\d+(,\d+)+", argument):
        return [argument]
    apart = " ".join(several)
    if len(several) == 2 and int(several[1]) <= 1:
        raise click.UsageError(
            f"--r {argument} may be two r, or r = {several[0]} with the inflection {several[1]}: write --r {apart}, or "
            f"--r {several[0]},{several[1]}.0",
            ctx,
        )
    if len({*several}) < len(several):
        raise click.UsageError(
            f"--r {argument} may be several r, or one for each block: write --r {' '.join(dict.fromkeys(several))}, or "
            f"--r [{argument}]",
            ctx,
        )
    return several


def _names_preset(text: str) -> bool:
    try:
        return parse_words(text).preset is not None
    except ValueError:
        return False


def with_meaning(r: Schedule, plain: Schedule) -> str:
    """An r as it was asked for; after words stands what they mean for the model, as in 2x (r = 18)."""
    written, meant = format_schedule(r), format_schedule(plain)
    return written if not isinstance(r, str) or written == meant else f"{written} (r = {meant})"


def with_range(value: float, interval: tuple[float, float] | None, digits: int) -> str:
    """A figure, and what it lies between where that is known."""
    beside = "" if interval is None else " ({:.{}f}–{:.{}f})".format(interval[0], digits, interval[1], digits)
    return f"{value:.{digits}f}{beside}"


def machine(where: Mapping[str, Any]) -> str:
    """Where and with which versions something was measured, from `measure.bench.subject`, in words."""
    threads = f", {where['threads']} thread{'s' * (where['threads'] != '1')}" if "threads" in where else ""
    names = {"cuda": "CUDA", "python": "Python", "torch": "torch", "timm": "timm", "tomevit": "tomevit"}
    versions = ", ".join(f"{names[key]} {where[key]}" for key in names if key in where)
    return f"on {where['device']}{threads}; {versions}"


def described(where: Mapping[str, Any]) -> str:
    """What was measured, and where, in one line."""
    height, width = where["img_size"]
    rounds = f"{where['rounds']} round{'s' * (where['rounds'] != 1)}, " if "rounds" in where else ""
    return f"{where['model']}, {height}x{width}, {rounds}{machine(where)}"
