"""The `flashbias` command: its subcommands, and what happens when one cannot go on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import flashbias
from flashbias.cli.analyze import analyze
from flashbias.cli.bench import bench
from flashbias.cli.demo import demo
from flashbias.cli.factor import factor
from flashbias.cli.info import info
from flashbias.decompose import NotLowRankError

__all__ = ["app", "run"]

BAD_ARGUMENT, INTERRUPTED, FAILED = 2, 130, 1

app = typer.Typer(
    name="flashbias",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(info)
app.command()(demo)
app.command()(analyze)
app.command()(factor)
app.command()(bench)


@app.callback(invoke_without_command=True)
def flashbias_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Attention with an additive bias in linear memory: factors, not matrices.

    Begin with `flashbias info`, which says what can run here, then `flashbias demo`. For a bias of your own,
    `flashbias analyze` says what form it should have and `flashbias factor` stores it so.
    """
    if version:
        typer.echo(f"flashbias {flashbias.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(arguments: Sequence[str]) -> int:
    """Run the command line.

    Whatever stands against going on is said in one line on the standard error stream.

    Args:
        arguments: what follows the program's name.

    Returns:
        The exit code: 0 done, 2 an argument cannot be used, 1 something else went wrong, 130 interrupted.
    """
    try:
        return app(args=list(arguments), prog_name="flashbias", standalone_mode=False) or 0
    except typer.TyperException as error:  # what the parser of arguments says
        return _complain(error.format_message(), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return _complain("interrupted", INTERRUPTED)
    except NotLowRankError as error:  # a result rather than a mistake: there is nothing to write
        return _complain(str(error), FAILED)
    except (ValueError, TypeError, NotImplementedError) as error:  # what the library says of an argument
        if "--debug" in arguments:
            raise
        return _complain(str(error), BAD_ARGUMENT)
    except (OSError, RuntimeError, MemoryError, ModuleNotFoundError) as error:
        if "--debug" in arguments:
            raise
        return _complain(str(error), FAILED)


def _complain(message: str, code: int) -> int:
    sys.stderr.write(f"flashbias: {' '.join(message.split())}\n")
    return code
