"""`tensorgraph check-node`: a wrong node that was saved, computed again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tensorgraph.tools import options
from tensorgraph.tools.run_check import DIFFERS


def check_node(
    file: Annotated[Path, typer.Argument(metavar="FILE.npz", help="What `run --check` saved.", show_default=False)],
    backend: Annotated[
        str | None, typer.Option(help=options.HELP["backend"], metavar="NAME", show_default="the one that was wrong")
    ] = None,
    against: Annotated[str, typer.Option(help="The backend that is trusted.", metavar="NAME")] = "reference",
    as_json: options.Json = False,
) -> None:
    """Compute a saved node, or several that are wrong together, again on a backend, and say whether that is right now.

    Exit code 1 where it is wrong still.

    \b
    tensorgraph check-node tensorgraph-check/0-mul_mat-68.npz
    tensorgraph check-node tensorgraph-check/0-mul_mat-68.npz --backend cpu:avx2 --json
    """
    from tensorgraph.tools.testing import Terms, load_reproduction, rerun

    saved = load_reproduction(file)
    on = backend or saved.backend
    report = rerun(saved, on, Terms(backends=(against, on)))
    if as_json:
        typer.echo(json.dumps(report.as_object() | {"saved": list(saved.about)}))
    else:
        typer.echo("\n".join(("as it was saved:", *saved.about, "", f"now: {report}")))
    if not report.ok:
        raise typer.Exit(DIFFERS)
