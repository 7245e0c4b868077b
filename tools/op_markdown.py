"""Ops as one Markdown document: a table of contents by family, and a section for each op."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from tensorgraph.tools.conformance.support import Types, computed_text, types_text
from tensorgraph.tools.op_pages import KINDS, Declared, Runs, tolerance_text

HEAD = """# Ops

Written by `tensorgraph ops --markdown > docs/ops.md` from the ops' declarations; edit those.

A signature reads `x[..., D]: real, weight[D]?: real -> y[..., D]: x`. A name among the axes has one length throughout,
`...` and `*NAME` stand for any leading axes, and `?` marks an input that may be left out. Types are a dtype, the name of an
input or attribute that has the same type, or

KINDS

The last table says which types each input may have, and which of them the backends compute.

Backends run an op by a kernel of its own (*yes*); for all shapes and types, or for those that its kernel does not take, by
the ops it is made of (*by expansion*); or only for some (*partly*).
""".replace("KINDS", "\n".join(f"- `{kind}`: {meaning}" for kind, meaning in KINDS.items()))
_LABEL = re.compile(r"^([A-Z][a-z]+):(?= |$)", re.MULTILINE)


def document(pages: Sequence[tuple[Declared, Runs]], backends: Sequence[str], types: Sequence[Types] = ()) -> str:
    """The whole document, of ops in order; `backends` are the columns of its tables."""
    families: dict[str, list[tuple[Declared, Runs]]] = {}
    for page in pages:
        families.setdefault(page[0].family, []).append(page)
    ordered = sorted(families.items())
    parts = [HEAD, *(_contents(family, its, backends) for family, its in ordered)]
    for family, its in ordered:
        parts += [f"## Family {family}\n", *(_section(op, runs) for op, runs in its)]
    parts += [_types(types, backends)] * bool(types)
    return "\n".join(parts).rstrip() + "\n"


def _contents(family: str, pages: Sequence[tuple[Declared, Runs]], backends: Sequence[str]) -> str:
    lines = [f"| [{family}](#family-{_anchor(family)}) | | {' | '.join(backends)} |", "|---|---|" + "---|" * len(backends)]
    for op, runs in pages:
        cells = (f"[{op.name}](#{_anchor(op.name)})", prose(op.summary), *(runs.backends.get(b, "unknown") for b in backends))
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def _types(types: Sequence[Types], backends: Sequence[str]) -> str:
    rows = [(f"`{t.op}`", f"`{t.slot}`", types_text(t.accepted), *(computed_text(t, name) for name in backends)) for t in types]
    head = f"| op | input | types | {' | '.join(backends)} |\n|---|---|---|" + "---|" * len(backends)
    return "\n".join(("## Types\n", head, *map(_row, rows)))


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _section(op: Declared, runs: Runs) -> str:
    parts = [f"### {op.name}", _fenced("\n".join(filter(None, (op.call, op.signature))), "text")]
    if op.text:
        parts.append(_LABEL.sub(r"\n**\1:**", prose(op.text)).replace("\n\n\n", "\n\n"))
    if op.code:
        parts.append(_fenced(op.code, "python"))
    if op.attributes:
        rows = [(f"`{a.name}`", a.type, f"`{a.default}`" if a.default else a.default_text, a.allowed) for a in op.attributes]
        parts.append("\n".join(("| attribute | type | default | allowed |", "|---|---|---|---|", *map(_row, rows))))
    parts.append("\n".join(f"- {name}: {value}" for name, value in _facts(op, runs)))
    return "\n\n".join(parts) + "\n"


def _facts(op: Declared, runs: Runs) -> Iterator[tuple[str, str]]:
    if op.in_place:
        yield "In place", f"the result may lie where {' or '.join(f'`{slot}`' for slot in op.in_place)} does"
    yield "Tolerance", tolerance_text(op.tolerance)
    if op.laws:
        yield "Laws", "; ".join(_law(name, said) for name, said in op.laws.items())
    if op.expansion:
        yield "Expands to", ", ".join(f"`{name}`" for name in runs.expands_to) or "unknown"
    if op.lowerings:
        yield "Lowerings", ", ".join(op.lowerings)
    if op.source:
        yield "Source", prose(op.source)
    yield "Module", f"`{op.module}`" + "".join(f", kernels in `{file}`" for file in runs.kernels)


def _law(name: str, said: str) -> str:
    return f"`{name}`" + (f" ({prose(said).rstrip('.')})" if said else "")


def _fenced(code: str, language: str) -> str:
    return f"```{language}\n{code}\n```"


def prose(text: str) -> str:
    """A docstring as Markdown that shows the same characters."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(p if i % 2 else re.sub(r"([*<\\])", r"\\\1", p) for i, p in enumerate(pieces))
