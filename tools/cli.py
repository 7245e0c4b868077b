"""`tensorgraph`: the command line. Each command is a file of this folder, imported when it is wanted."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tensorgraph import __version__
from tensorgraph.errors import TensorGraphError

COMMANDS = {
    **{name: f"{name}:{name}" for name in ("run", "embed", "logits", "tokenize", "inspect", "plan")},
    "check-node": "check_node:check_node",
    **{"bench": "bench.command:bench", "quality": "quality:quality", "profile": "profile:profile"},
    "lowerings": "lowerings:lowerings",
    **{"test-ops": "test_ops:test_ops", "ops": "ops:ops"},
    "new-op": "new_op:new_op",
    **{"synth": "synth.command:synth", "quantize": "quantize:quantize"},
}
INTERRUPTED = 130
BAD_INPUT = 2


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


def application(commands: Iterable[str] = COMMANDS) -> typer.Typer:
    """The program with some of its commands."""
    app = typer.Typer(
        cls=Commands,
        name="tensorgraph",
        help="Graphs, plans and models: run them, evaluate them, look into them.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for command in commands:
        module, _, function = COMMANDS[command].partition(":")
        app.command(command)(getattr(importlib.import_module(f"tensorgraph.tools.{module}"), function))
    app.callback()(options)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Graphs, plans and models: run them, evaluate them, look into them."""


def main() -> None:
    """The program with the command that is asked for, or with all."""
    wanted = [name for name in sys.argv[1:2] if name in COMMANDS]
    application(wanted or COMMANDS)()


if __name__ == "__main__":
    main()
