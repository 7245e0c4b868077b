"""`tensorgraph ops`: what every op is, from its declaration."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorgraph.errors import InputError, UnknownNameError
from tensorgraph.tools import options

if TYPE_CHECKING:
    from tensorgraph.op import Op
    from tensorgraph.tools.op_pages import Declared, Runs

EVERYWHERE = ("cpu", "reference")
"""Backends that run on any machine: what a document says must not depend on where it was written."""
CALL_WIDTH = 44
"""Characters of a call that leave room for a summary on its line."""


def ops(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Ops to describe; without one, all are listed.", show_default=False)
    ] = None,
    family: Annotated[str | None, typer.Option(help="Only the ops of one family.", metavar="FAMILY")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print one Markdown document, a section for each op.")] = False,
    as_json: options.Json = False,
) -> None:
    """List the ops by family, or describe some of them: call, shapes, types, attributes, meaning, laws, backends.

    All of it is read from the ops' declarations, those of installed plug-ins too. Which backends run an op is asked of
    them for drawn samples of it.

    \b
    tensorgraph ops
    tensorgraph ops --family attention
    tensorgraph ops rms_norm soft_max
    tensorgraph ops mul_mat --json
    tensorgraph ops --markdown > docs/ops.md
    """
    import tensorgraph.ops  # noqa: F401  (importing registers)
    from tensorgraph import registry
    from tensorgraph.tools.op_pages import declared, runs

    if names and family:
        raise InputError(f"[ops] wanted names or a family; got {' '.join(names)} and --family {family}")
    if markdown and as_json:
        raise InputError("[ops] wanted --markdown or --json; got both")
    chosen = [registry.ops.get(name) for name in dict.fromkeys(names or registry.ops)]
    chosen = chosen if family is None else _of_family(chosen, family)
    described = [declared(op) for op in chosen]
    if markdown:
        from tensorgraph.tools.conformance.check import hypothesis
        from tensorgraph.tools.op_markdown import document

        hypothesis()  # without it no backend could be asked of any op
        with options.working("asking the backends"):
            pages = [(d, runs(op, EVERYWHERE)) for d, op in zip(described, chosen, strict=True)]
        typer.echo(document(pages, EVERYWHERE), nl=False)
    elif names:
        with options.working("asking the backends"):
            pages = [(d, runs(op, list(registry.backends))) for d, op in zip(described, chosen, strict=True)]
        typer.echo(json.dumps({"ops": [_as_json(*page) for page in pages]}) if as_json else _pages_text(pages, chosen))
    else:
        typer.echo(json.dumps({"ops": [_as_json(d) for d in described]}) if as_json else _list_text(described))


def _of_family(ops: Sequence[Op], family: str) -> list[Op]:
    """The ops of a family.

    Raises: UnknownNameError: there is none in it.
    """
    from tensorgraph.tools.op_pages import family_of

    found = [op for op in ops if family_of(op) == family]
    if not found:
        known = sorted({family_of(op) for op in ops})
        close = difflib.get_close_matches(family, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise UnknownNameError(f"[family] there is no {family!r}{hint} Known: {', '.join(known)}")
    return found


def _as_json(op: Declared, runs: Runs | None = None) -> dict[str, Any]:
    return dataclasses.asdict(op) | (dataclasses.asdict(runs) if runs is not None else {})


def _list_text(described: Sequence[Declared]) -> str:
    families: dict[str, list[Declared]] = {}
    for op in described:
        families.setdefault(op.family, []).append(op)
    width = min(CALL_WIDTH, max(len(op.short) for op in described))
    return "\n\n".join("\n".join((family, *_lines(families[family], width))) for family in sorted(families))


def _lines(described: Sequence[Declared], width: int) -> Iterator[str]:
    """A line for each op, and a second one where the call is too long for its summary to stand beside it."""
    for op in described:
        if len(op.short) > width:
            yield f"  {op.short}"
        yield f"  {op.short if len(op.short) <= width else '':<{width}}  {op.summary}".rstrip()


def _pages_text(pages: Sequence[tuple[Declared, Runs]], ops: Sequence[Op]) -> str:
    return "\n\n\n".join("\n\n".join(_sections(*page, op)) for page, op in zip(pages, ops, strict=True))


def _sections(op: Declared, runs: Runs, declaration: Op) -> Iterator[str]:
    from tensorgraph.tools.op_pages import KINDS, argument_text, axes_text

    yield op.call
    if declaration.signature is not None:
        rows = []
        for a in declaration.signature.inputs:
            kind = KINDS.get(a.type, f"as {a.type}" if a.type.isidentifier() else a.type)
            rows.append((f"  {a.name}", f"[{axes_text(a)}]", kind + ", may be left out" * a.optional))
        yield options.table([*rows, ("  ->", f"[{axes_text(declaration.signature.result)}]", declaration.signature.result.type)], 3)
    if op.text:
        yield op.text
    if op.code:
        yield "\n".join(f"    {line}".rstrip() for line in op.code.splitlines())
