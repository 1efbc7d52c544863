"""The command line: `tomevit VERB`, each verb a thin layer over a function of the library.

A verb's module is imported when the verb is used, and torch with it, so that the others answer at once.
"""

from __future__ import annotations

import errno
import gc
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata
from typing import NamedTuple

import click

from tomevit.cli.console import echo, open_console
from tomevit.errors import OtherProcessError, nearest
from tomevit.version import __version__


class Verb(NamedTuple):
    """Where a command is, and what the lists of commands say of it."""

    module: str  # of tomevit.cli
    function: str
    help: str  # the first sentence of its own help
    example: str  # a call of it
    torch: bool = True  # whether it cannot start without


#: The commands, below what they are for.
GROUPS = {
    "What there is": {
        "list": Verb("zoo", "list_command", "What models there are.", "list 'deit*' --sort top1", torch=False),
        "info": Verb(
            "zoo", "info", "One model, or all that a file says of itself.", "info vit_b16 --r 8 13", torch=False
        ),
        "demo": Verb(
            "demo",
            "demo",
            "Classify images at several r, with a small model that ships with tomevit.",
            "demo --r 8 13 16",
        ),
    },
    "Use a model": {
        "classify": Verb(
            "classify",
            "classify",
            "The likeliest classes of images.",
            "classify photo.jpg --model vit_b16 --r 13 --compare",
        ),
        "embed": Verb(
            "embed", "embed", "A feature vector for every image, in one file.", "embed photos/ -o photos.parquet --r 8"
        ),
    },
    "Measure, and choose r": {
        "eval": Verb(
            "evaluate",
            "eval_command",
            "Accuracy and throughput over labelled images, at several r.",
            "eval --data val/ --model vit_b16 --r 0 8 13 -o eval.json",
        ),
        "bench": Verb(
            "bench", "bench", "Throughput at several r, and what bounds it.", "bench vit_b16 --r 8 13 --batch 8"
        ),
        "tune": Verb(
            "tune",
            "tune_command",
            "Schedules for this device, searched on your images: speed against fidelity.",
            "tune photos --model vit_b16 --speed-up 1.5 -o a.safetensors",
        ),
        "visualize": Verb(
            "visualize",
            "visualize",
            "Which patches of an image are one token after each block.",
            "visualize photo.jpg --model vit_b16 --r 8 13 -o photo.html",
        ),
        "plot": Verb("plot", "plot_command", "Draw what eval and bench wrote as JSON.", "plot eval.json -o eval.png"),
    },
    "Train": {
        "train": Verb(
            "train",
            "train_command",
            "Train or fine-tune a model on a folder of images, with merging.",
            "train flowers/ --model vit_b16 --pretrained --r 13 -o run",
        ),
    },
    "Weights and programs": {
        "convert": Verb(
            "weights",
            "convert",
            "Write a checkpoint of any known format as one self-describing file.",
            "convert checkpoint.pth -o mine.safetensors",
        ),
        "verify": Verb("weights", "verify", "Check a file that tomevit wrote.", "verify mine.safetensors"),
        "push": Verb(
            "weights",
            "push",
            "Share a file that tomevit wrote on the Hugging Face hub.",
            "push mine.safetensors owner/name",
        ),
        "export": Verb(
            "export",
            "export",
            "Write a model as a program, or in another project's format.",
            "export vit_b16 --format onnx --r 8 -o vit_b16.onnx",
        ),
    },
}
VERBS = {name: verb for verbs in GROUPS.values() for name, verb in verbs.items()}


class Verbs(click.Group):
    """The commands of VERBS, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS and not ctx.resilient_parsing:
            known = f"there are {', '.join(VERBS)}"
            ctx.fail(f"there is no command {cmd_name!r}; {nearest(cmd_name, VERBS, known)}")
        return load_command(cmd_name) if cmd_name in VERBS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        widest = max(map(len, VERBS))
        for title, verbs in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(widest), verb.help) for name, verb in verbs.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        formatter.write_paragraph()
        formatter.write_text(f"tomevit VERB --help has its options and an example. Documentation: {documentation()}.")


def documentation() -> str:
    """Where the documentation is: the project's address, where its package has one."""
    try:
        urls = metadata("tomevit").get_all("Project-URL") or []
    except PackageNotFoundError:  # it runs from its repository
        urls = []
    known = dict(url.split(", ", 1) for url in urls if ", " in url)
    return known.get("Documentation") or next(iter(known.values()), "README.md and docs/ in the repository")


def load_command(name: str) -> click.Command:
    """A command of VERBS, and torch before it where it needs that."""
    verb = VERBS[name]
    if verb.torch:
        import_torch()
    command: click.Command = getattr(import_module(f"tomevit.cli.{verb.module}"), verb.function)
    command.epilog = f"Example: tomevit {verb.example}"
    return command


def import_torch() -> None:
    """Import torch as fast as it can be, and without a traceback where that is interrupted.

    Raises:
        ValueError: it cannot be imported.
    """
    if "torch" in sys.modules:
        return
    gc.disable()  # its passes would go through all that torch makes, and free none of it
    try:
        with _interrupted_at_once():
            import torch  # noqa: F401
        gc.freeze()
    except ImportError as error:
        raise ValueError(f"torch cannot be imported: {str(error).splitlines()[0]}; pip install torch") from error
    finally:
        gc.enable()


@contextmanager
def _interrupted_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process: while C++ is being initialised an exception comes out as anything, or not at all."""

    def end(*_: object) -> None:
        os.write(2, b"tomevit: interrupted\n")
        os._exit(130)

    try:
        before = signal.signal(signal.SIGINT, end)
    except ValueError:  # only the main thread sets handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. A user's mistake ends in one line on standard error and status 2, without a traceback."""
    if arguments is None:  # the process is this command's: nobody asked to be told of odd EXIF data
        warnings.filterwarnings("ignore", module=r"PIL\.")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with open_console():
        try:
            status = _run(arguments)
            sys.stdout.flush()
        except OSError as error:  # what was printed cannot be written
            status = _fail(str(error), 2) if error.errno != errno.EPIPE else 1
    sys.exit(status)


def _run(arguments: list[str]) -> int | str | None:
    """The status of a command, whose mistakes are told.

    Raises:
        OutputError: of standard output.
    """
    try:
        found: int | str | None = cli.main(arguments, prog_name="tomevit", standalone_mode=False)
    except SystemExit as stop:  # of click, where whoever read the output has left
        return stop.code
    except click.UsageError as error:
        verb = next((f"tomevit {argument}" for argument in arguments if argument in VERBS), "tomevit")
        where = error.ctx.command_path if error.ctx else verb
        return _fail(f"{error.format_message().rstrip('.')} (see {where} --help)", 2)
    except OtherProcessError:
        return 2
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message = _explain(error)
        if message is None or arguments[0] == "--traceback":
            raise
        return _fail(message, 2)
    return found


def _explain(error: Exception) -> str | None:
    """What a user is told; None: it is a mistake of tomevit's, whose traceback is of use."""
    if isinstance(error, MemoryError):
        return str(error) or "there is not enough memory"
    if not isinstance(error, RuntimeError) or isinstance(error, NotImplementedError):
        hint = "No usable temporary directory" in str(error)
        return f"{error}{': set TMPDIR to a directory that you can write to' * hint}"
    if "can't start new thread" in str(error):
        return "no more threads can be started: raise the limit of processes (ulimit -u), or lower --threads, --workers"
    from tomevit.private import lacks_memory

    return f"there is not enough memory: {str(error).splitlines()[0]}" if lacks_memory(error) else None


def _fail(message: str, status: int) -> int:
    # Lines that follow a message's first are indented; other line ends are those of a name.
    echo(*re.split(r"\n(?=  )", f"tomevit: {message}"), err=True)
    return status


@click.group(cls=Verbs, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tomevit")
@click.option("--traceback", is_flag=True, expose_value=False, help="Show where an error arose, for a bug report.")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Fast vision transformers with native token merging."""
    if ctx.invoked_subcommand is None:
        echo(*ctx.get_help().split("\n"))
