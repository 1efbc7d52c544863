"""The command line: `tomevit VERB`, each verb a thin layer over a function of the library."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

import tomevit
from tomevit.cli import bench, classify, embed, evaluate, export, plot, run, visualize, weights, zoo
from tomevit.processes import ElsewhereError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. A user's mistake ends in one line on standard error and status 2, without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = cli.main(arguments, prog_name="tomevit", standalone_mode=False)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "tomevit"
        status = _fail(f"{error.format_message().rstrip('.')} (see {where} --help)", 2)
    except ElsewhereError:
        status = 2
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


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(tomevit.__version__, prog_name="tomevit")
@click.option("--traceback", is_flag=True, expose_value=False, help="Show where an error arose, for a bug report.")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Fast vision transformers with native token merging."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


COMMANDS = (
    zoo.list_command,
    zoo.info,
    run.demo,
    classify.classify,
    evaluate.eval_command,
    embed.embed,
    bench.bench,
    visualize.visualize,
    plot.plot_command,
    *weights.COMMANDS,
    export.export,
)
for command in COMMANDS:
    cli.add_command(command)
