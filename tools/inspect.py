"""`tensorgraph inspect`: what a model file holds."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorgraph.tools import options

if TYPE_CHECKING:
    from tensorgraph.dtypes import DType
    from tensorgraph.models import Model
    from tensorgraph.state import StateSpec

SHOWN = 6
"""Elements of an array that are shown."""


@dataclasses.dataclass(frozen=True)
class StateCost:
    """What one sequence's state takes.

    Units: bytes. `bytes_constant` is that of full windows, without the slack and the unused part of pages.
    """

    bytes_per_token: float
    bytes_constant: int


def state_cost(specs: Mapping[str, StateSpec], kv_dtype: DType) -> StateCost:
    """What a sequence's state takes: a part that grows with every token, and windows that do not."""
    return StateCost(
        sum(s.row_bytes(kv_dtype) / s.every for s in specs.values() if s.keep is None),
        sum(s.row_bytes(kv_dtype) * s.keep for s in specs.values() if s.keep is not None),
    )


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL|CONFIG.json|NAME", help=options.DESCRIBED, show_default=False)],
    state: Annotated[bool, typer.Option("--state", help="Only what a sequence keeps: streams, and bytes per token.")] = False,
    kv_type: options.KvType = "f16",
    as_json: options.Json = False,
) -> None:
    """Print a model's metadata and its tensors with types, shapes and sizes. No weights are loaded.

    \b
    tensorgraph inspect model.gguf
    tensorgraph inspect model.gguf --json
    tensorgraph inspect deepseek-v3.2 --state
    """
    from tensorgraph.models.text.gguf import GGUF
    from tensorgraph.tools.model_argument import described_model, gguf_path

    path = gguf_path(model)
    if path is None or state:
        with described_model(model) as described:
            report: dict[str, Any] = {"state": state_report(described, kv_type)}
            if not state:
                fields = dataclasses.asdict(described.config)
                report = {"architecture": described.architecture.name, "metadata": _short(fields)} | report
    else:
        with GGUF.open(path) as file:  # its architecture need not be known
            tensors = [
                {"name": t.name, "dtype": str(t.dtype), "shape": list(t.shape), "size_bytes": t.size_bytes}
                for t in file.tensors.values()
            ]
            report = {"files": [str(p) for p in file.paths], "metadata": _short(file.metadata), "tensors": tensors}
            report["totals"] = totals(tensors)
    typer.echo(json.dumps(report) if as_json else "\n\n".join(_sections(report)))


def _short(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as JSON takes it, arrays as their length and first elements."""
    found: dict[str, Any] = {}
    for key, value in metadata.items():
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, list | tuple) and len(value) > SHOWN:
            value = {"length": len(value), "first": list(value[:SHOWN])}
        found[key] = value
    return found


def totals(tensors: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tensors, parameters and bytes by element type."""
    found: dict[str, dict[str, Any]] = {}
    for tensor in tensors:
        total = found.setdefault(tensor["dtype"], {"dtype": tensor["dtype"], "tensors": 0, "parameters": 0, "size_bytes": 0})
        total["tensors"] += 1
        total["parameters"] += math.prod(tensor["shape"])
        total["size_bytes"] += tensor["size_bytes"]
    return list(found.values())


def state_report(model: Model, kv_type: str) -> dict[str, Any]:
    """What a sequence keeps: per class of streams, and in all.

    Units: bytes; a stream that keeps a window costs `bytes_constant`, any other one `bytes_per_token`.
    """
    from tensorgraph.dtypes import as_dtype

    specs, kv_dtype = model.states(), as_dtype(kv_type)
    classes = []
    for cls in dict.fromkeys(spec.stream_class for spec in specs.values()):
        mine = {name: spec for name, spec in specs.items() if spec.stream_class == cls}
        cost = state_cost(mine, kv_dtype)
        kinds = sorted({f"{name.split('.')[-1]} {list(s.row_shape)} {s.stored_dtype(kv_dtype)}" for name, s in mine.items()})
        classes.append({"every": cls.every, "keep": cls.keep, "streams": len(mine), "kinds": kinds, **dataclasses.asdict(cost)})
    cost = state_cost(specs, kv_dtype)
    return {"kv_type": str(kv_dtype), "streams": len(specs), **dataclasses.asdict(cost), "classes": classes}


def _sections(report: Mapping[str, Any]) -> list[str]:
    """The report for people, in paragraphs."""
    found = []
    if "files" in report:
        found.append("\n".join(report["files"]))
    if "architecture" in report:
        found.append(report["architecture"])
    if "metadata" in report:
        found.append("\n".join(f"{key} = {_value_text(value)}" for key, value in report["metadata"].items()))
    if "tensors" in report:
        rows = [(t["name"], t["dtype"], str(t["shape"]), options.size_text(t["size_bytes"])) for t in report["tensors"]]
        found.append(options.table([("tensor", "type", "shape", "size"), *rows], left=3))
        rows = [
            (t["dtype"], str(t["tensors"]), f"{t['parameters']:,}", options.size_text(t["size_bytes"])) for t in report["totals"]
        ]
        found.append(options.table([("type", "tensors", "parameters", "size"), *rows]))
    if "state" in report:
        found.append(state_text(report["state"]))
    return found


def state_text(state: Mapping[str, Any]) -> str:
    if not state["classes"]:
        return "no state: nothing outlives a step"
    rows = [("a row every", "keeps", "streams", "per token", "constant", "rows")]
    for c in state["classes"]:
        keep = "all" if c["keep"] is None else f"{c['keep']} rows"
        per_token, constant = options.size_text(c["bytes_per_token"]), options.size_text(c["bytes_constant"])
        every = "token" if c["every"] == 1 else f"{c['every']} tokens"
        rows.append((every, keep, str(c["streams"]), per_token, constant, ", ".join(c["kinds"])))
    per_token, constant = state["bytes_per_token"], state["bytes_constant"]
    total = f"state in {state['kv_type']}: {per_token:,.1f} bytes per token ({options.size_text(per_token)})"
    return f"{options.table(rows)}\n{total}, {options.size_text(constant)} whatever the length"


def _value_text(value: Any) -> str:
    if isinstance(value, dict) and set(value) == {"length", "first"}:
        first = ", ".join(_cut(json.dumps(v, ensure_ascii=False)) for v in value["first"])
        return f"[{first}, ...] ({value['length']} elements)"
    return _cut(json.dumps(value, ensure_ascii=False), 200)


def _cut(text: str, length: int = 40) -> str:
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"
