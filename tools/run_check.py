"""`tensorgraph run --check`: a model on two backends, node by node, instead of a text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tensorgraph.errors import InputError
from tensorgraph.tools.bench.command import progress

if TYPE_CHECKING:
    from tensorgraph.models.text.model import Prompt, TextModel
    from tensorgraph.tools.testing import Report

DIFFERS = 1


@dataclass(frozen=True)
class Wanted:
    """What `run` was asked to check: the trusted backend, most tokens of the prompt, steps after it, where files go."""

    backend: str
    tokens: int
    steps: int
    folder: Path


def check(model: TextModel, prompt: Prompt, wanted: Wanted, *, as_json: bool) -> None:
    """Compare, print what was found, and exit with code 1 where something differs."""
    ids = prompt_ids(model, prompt)[: wanted.tokens]
    reports = compare(model, ids, wanted)
    ok = all(report.ok for report in reports)
    if as_json:
        typer.echo(json.dumps({"ok": ok, "ids": ids, "checks": [report.as_object() for report in reports]}))
    else:
        typer.echo("\n".join(map(str, reports)))
    if not ok:
        raise typer.Exit(DIFFERS)


def prompt_ids(model: TextModel, prompt: Prompt) -> list[int]:
    """The ids of a text or of a conversation.

    Raises: InputError: there are none.
    """
    if isinstance(prompt, str):
        ids = model.tokenizer.encode(prompt, add_special=True)
    else:
        ids = model.encode_chat(prompt)  # type: ignore[arg-type]
    if not ids:
        raise InputError("[check] wanted a prompt of at least one token; got an empty one")
    return ids


def compare(model: TextModel, ids: Sequence[int], wanted: Wanted) -> list[Report]:
    """With exact products; then, where that agrees and makes a difference, as the model runs."""
    from tensorgraph.extents import Extents
    from tensorgraph.tools.testing import Terms, compare_model
    from tensorgraph.tools.testing.difference import steps_of

    engine = model.engine
    reports: list[Report] = []
    rounds = any(map(steps_of, model.model.graph(Extents(1, 1), engine.kv_dtype)))
    with progress() as say:
        for exact in (True, False) if rounds and not engine.options.exact else (True,):
            mode = "exact" if exact else "as it runs"
            terms = Terms(
                backends=(wanted.backend, engine.devices),
                options=replace(engine.options, exact=exact),
                folder=wanted.folder,
                say=partial(_say, say, mode),
            )
            reports.append(compare_model(model.model, ids, decode=wanted.steps, kv_type=engine.kv_dtype, terms=terms))
            if not reports[-1].ok:
                break
    return reports


def _say(say: Callable[[str], None], mode: str, text: str) -> None:
    say(f"{mode}, {text}")
