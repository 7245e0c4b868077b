"""`tensorgraph`: the command line. Each command is a file of this folder."""

from __future__ import annotations

import gc
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tensorgraph import __version__
from tensorgraph.errors import TensorGraphError
from tensorgraph.tools import inspect, logits, ops, plan, profile, run, test_ops, tokenize
from tensorgraph.tools.bench import command as bench

INTERRUPTED = 130
BAD_INPUT = 2
OBJECTS = 100_000
"""New objects between two searches for cycles: a vocabulary and a plan have 10^6 that stay, and are searched each time."""


class Commands(TyperGroup):
    """Commands whose errors are a line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of our output has had enough, which click ends quietly
            raise
        except (TensorGraphError, OSError) as error:
            typer.echo(f"tensorgraph: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(BAD_INPUT) from error
        except KeyboardInterrupt:
            typer.echo("", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    name="tensorgraph",
    help="Graphs, plans and models: run them, evaluate them, look into them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS = (
    *(run.run, logits.logits, tokenize.tokenize, inspect.inspect, plan.plan, bench.bench, profile.profile),
    test_ops.test_ops,
    ops.ops,
)
for command in COMMANDS:
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Graphs, plans and models: run them, evaluate them, look into them."""


def main() -> None:
    """The console script."""
    gc.set_threshold(OBJECTS)
    app()


if __name__ == "__main__":
    main()
