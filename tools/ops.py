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

EVERYWHERE = ("cpu", "cuda", "reference")
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

    All of it is read from the ops' declarations, those of plugins too; which backends run an op is asked of them for drawn
    samples of it. In a signature `?` marks an input that may be left out; `float` takes block types, too, `real` does not.

    \b
    tensorgraph ops
    tensorgraph ops --family attention
    tensorgraph ops rms_norm soft_max
    tensorgraph ops mul_mat --json
    tensorgraph ops --markdown > docs/ops.md
    """
    import tensorgraph.ops  # noqa: F401  (importing registers)
    from tensorgraph import registry
    from tensorgraph.tools.conformance.check import hypothesis
    from tensorgraph.tools.conformance.support import support
    from tensorgraph.tools.op_markdown import document
    from tensorgraph.tools.op_pages import declared, runs

    if names and family:
        raise InputError(f"[ops] wanted names or a family; got {' '.join(names)} and --family {family}")
    if markdown and as_json:
        raise InputError("[ops] wanted --markdown or --json; got both")
    chosen = [registry.ops.get(name) for name in dict.fromkeys(names or registry.ops)]
    chosen = chosen if family is None else _of_family(chosen, family)
    described = [declared(op) for op in chosen]
    if not names and not markdown:
        typer.echo(json.dumps({"ops": [_as_json(d) for d in described]}) if as_json else _list_text(described))
        return
    if markdown:
        hypothesis()  # without it no backend could be asked of any op
    backends = EVERYWHERE if markdown else list(registry.backends)
    with options.working("asking the backends"):
        pages = [(d, runs(op, backends)) for d, op in zip(described, chosen, strict=True)]
        types = support([d.name for d in described], backends)[0] if markdown else ()
    if markdown:
        typer.echo(document(pages, backends, types), nl=False)
    elif as_json:
        typer.echo(json.dumps({"ops": [_as_json(*page) for page in pages]}))
    else:
        typer.echo("\n\n\n".join(_page_text(*page) for page in pages))


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


def _page_text(op: Declared, runs: Runs) -> str:
    parts = ["\n".join(filter(None, (op.call, op.signature))), op.text, op.code]
    if op.attributes:
        rows = [(a.name, a.type, a.default_text, a.allowed) for a in op.attributes]
        parts.append(options.table([("attribute", "type", "default", "allowed"), *rows], left=4))
    parts.append(options.table(list(_facts(op, runs)), left=2))
    return "\n\n".join(filter(None, parts))


def _facts(op: Declared, runs: Runs) -> Iterator[tuple[str, str]]:
    from tensorgraph.tools.op_pages import tolerance_text

    if op.in_place:
        yield "in place", f"the result may lie where {' or '.join(op.in_place)} does"
    yield "tolerance", tolerance_text(op.tolerance)
    for i, (name, said) in enumerate(op.laws.items()):
        yield "" if i else "laws", f"{name}: {said}" if said else name
    if op.expansion:
        yield "expands to", ", ".join(runs.expands_to) or "unknown"
    if op.lowerings:
        yield "lowerings", ", ".join(op.lowerings)
    if op.source:
        yield "source", op.source
    yield "backends", runs.unknown or ", ".join(f"{name}: {how}" for name, how in runs.backends.items())
    yield "module", op.module
    if runs.kernels:
        yield "kernels", ", ".join(runs.kernels)
