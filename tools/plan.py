"""`tensorgraph plan`: what a model's step costs, without its weights."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorgraph.errors import InputError
from tensorgraph.tools import options
from tensorgraph.tools.inspect import state_report

if TYPE_CHECKING:
    from tensorgraph.extents import Extents
    from tensorgraph.models import Model
    from tensorgraph.plan import Plan

DEFAULT_CONTEXT = "the model's, at most 131072"


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL|CONFIG.json|NAME", help=options.DESCRIBED, show_default=False)],
    tokens: Annotated[int, typer.Option(min=1, help="T: new tokens of a step, all sequences together.")] = 512,
    context: Annotated[int | None, typer.Option(min=1, help="S: tokens of a sequence.", show_default=DEFAULT_CONTEXT)] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences in a step.")] = 1,
    kv_type: options.KvType = "f16",
    dtype: Annotated[str, typer.Option("--type", help="Type of matrices where there are no weights.", metavar="TYPE")] = "f16",
    backend: options.Backend = options.BACKEND,
    ops: Annotated[bool, typer.Option("--ops", help="List which ops move the bytes, those that move as many together.")] = False,
    text: Annotated[bool, typer.Option("--text", help="Print the plan itself.")] = False,
    as_json: options.Json = False,
) -> None:
    """Plan a step and say what it takes: nodes, kernels, arena, state, weights, and bytes and operations.

    Two steps at the end of S tokens are given: one of T tokens, and one of one token a sequence.

    \b
    tensorgraph plan deepseek-v4-flash --tokens 512 --context 131072
    tensorgraph plan deepseek-v4-flash --context 1048576 --ops
    tensorgraph plan config.json --type q8_0 --json
    tensorgraph plan model.gguf --text
    """
    from tensorgraph.compiler import CompileOptions, compile
    from tensorgraph.device import get_devices, stream_layouts
    from tensorgraph.dtypes import as_dtype
    from tensorgraph.extents import Extents
    from tensorgraph.tools.model_argument import described_model

    if tokens < sequences:
        raise InputError(f"[plan] wanted --tokens of at least one a sequence; got {tokens} for {sequences}")
    with described_model(model, dtype) as described:
        extents = Extents(tokens, context or min(described.context, 131072), sequences)
        if extents.context > described.context:
            raise InputError(f"[plan] the model's context holds {described.context} tokens; got --context {extents.context}")
        if tokens // sequences > extents.context:
            raise InputError(f"[plan] wanted --tokens of at most --context a sequence; got {tokens} for {extents.context}")
        began = time.perf_counter()
        with options.working("planning"):
            graph, devices = described.graph(extents, as_dtype(kv_type)), get_devices(backend)
            layouts = stream_layouts(graph, described.states(), devices)
            planned = compile(graph, devices, CompileOptions(layouts=layouts))
        plan_s = time.perf_counter() - began
        report = plan_report(described, planned, extents, kv_type, ops=ops)
    report |= {"model": model, "plan_s": plan_s}
    if as_json:
        typer.echo(json.dumps(report | ({"text": str(planned)} if text else {})))
        return
    typer.echo(f"{planned}\n\n{_report_text(report)}" if text else _report_text(report))


def step_dims(model: Model, extents: Extents, tokens: int) -> dict[str, int]:
    """The Dims of a step that ends a context: `tokens` new ones, spread evenly over the sequences, a row of logits each."""
    each, n = tokens // extents.sequences, extents.sequences
    dims = {"T": each * n, "O": n}
    for cls in {spec.stream_class for spec in model.states().values()}:
        before, now = cls.n_rows(extents.context - each), cls.n_rows(extents.context)
        seen = now - cls.first_read(extents.context - each)
        dims[extents.seen_rows(cls).name] = n * seen
        if cls.every > 1:
            dims[extents.new_rows(cls).name] = n * (now - before)
    return dims


def plan_report(model: Model, planned: Plan, extents: Extents, kv_type: str, *, ops: bool = False) -> dict[str, Any]:
    """All numbers; of each step also those of its ops. Units: bytes, operations."""
    steps = []
    for tokens in dict.fromkeys((extents.tokens, extents.sequences)):
        dims = step_dims(model, extents, tokens)
        cost = planned.report(dims)
        steps.append({"tokens": dims["T"], "dims": dims, **dataclasses.asdict(cost)})
        if ops:
            steps[-1]["ops"] = costs_of_ops(planned, dims)
    first = steps[0]
    state = state_report(model, kv_type)
    return {
        "architecture": model.architecture.name,
        "tokens": extents.tokens,
        "context": extents.context,
        "sequences": extents.sequences,
        "splits": first["splits"],
        "copies": first["copies"],
        "copy_bytes": first["copy_bytes"],
        "arena_bytes": first["arena_bytes"],
        "weight_bytes": max(step["weight_bytes"] for step in steps),
        "state": state,
        "steps": [{k: s[k] for k in (*_OF_STEPS, *(("ops",) if ops else ()))} for s in steps],
    }


_OF_STEPS = ("tokens", "dims", "nodes", "kernels", "read_write_bytes", "flops")


def costs_of_ops(planned: Plan, dims: Mapping[str, int]) -> list[dict[str, Any]]:
    """What the nodes of a step move and compute, those of an op that move as many bytes together; most bytes first."""
    from tensorgraph import registry
    from tensorgraph.graph import STRUCTURAL

    found: dict[tuple[str, int], dict[str, Any]] = {}
    for node in planned.active(planned.choose(dims)):
        if node.op not in STRUCTURAL:
            cost = registry.ops.get(node.op).cost(node, dims)
            fresh = {"op": node.op, "nodes": 0, "bytes_each": cost.size_bytes, "read_write_bytes": 0, "flops": 0}
            one = found.setdefault((node.op, cost.size_bytes), fresh)
            one["nodes"] += 1
            one["read_write_bytes"] += cost.size_bytes
            one["flops"] += cost.flops
    return sorted(found.values(), key=lambda one: (-one["read_write_bytes"], one["op"]))


def _report_text(report: Mapping[str, Any]) -> str:
    size, state = options.size_text, report["state"]
    arena = ", ".join(f"{size(n)} on {device}" for device, n in report["arena_bytes"].items())
    full = state["bytes_per_token"] * report["context"] * report["sequences"] + state["bytes_constant"] * report["sequences"]
    rows = [("step of", "nodes", "kernels", "bytes moved", "operations")]
    for s in report["steps"]:
        moved, flops = size(s["read_write_bytes"]), f"{s['flops']:.3g}"
        rows.append((_count(s["tokens"], "token"), str(s["nodes"]), str(s["kernels"]), moved, flops))
    tables = [options.table(rows)]
    for s in report["steps"]:
        listed = [(_count(s["tokens"], "token"), "nodes", "bytes each", "bytes", "operations")]
        for one in s.get("ops", ()):
            each, moved = size(one["bytes_each"]), size(one["read_write_bytes"])
            listed.append((one["op"], str(one["nodes"]), each, moved, f"{one['flops']:.3g}"))
        tables += [options.table(listed)] if len(listed) > 1 else []
    extents = f"T = {report['tokens']}, S = {report['context']}, {_count(report['sequences'], 'sequence')}"
    per_token, constant = size(state["bytes_per_token"]), size(state["bytes_constant"])
    return "\n".join(
        (
            f"{report['model']} ({report['architecture']}), {extents}, planned in {report['plan_s']:.2f} s",
            f"weights  {size(report['weight_bytes'])}",
            f"state    {per_token} per token + {constant} a sequence, in {state['kv_type']}; {size(full)} in all",
            f"arena    {arena}",
            f"splits   {report['splits']}, {_count(report['copies'], 'copy', 'copies')} of {size(report['copy_bytes'])}",
            "",
            "\n\n".join(tables),
        )
    )


def _count(n: int, one: str, several: str = "") -> str:
    return f"{n} {one if n == 1 else several or one + 's'}"
