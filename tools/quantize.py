"""`tensorgraph quantize`: a GGUF file with matrices rounded to other types."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tensorgraph.errors import InputError
from tensorgraph.tools import gguf_output, options
from tensorgraph.tools.inspect import totals

if TYPE_CHECKING:
    import numpy as np

    from tensorgraph.dtypes import DType
    from tensorgraph.models.text.gguf import GGUF
    from tensorgraph.models.text.gguf_writer import NewTensor
    from tensorgraph.tools.synth.rules import TypeRules

TYPE = (
    "Type of all matrices, or GLOB=TYPE of those whose names match; the last match wins, and others stay as they are. "
    "TYPE/TYPE: where rows do not fit."
)
NO_LONGER_TRUE = ("general.file_type", "general.alignment")
"""What the new file does not say: its types are others, its alignment is the default."""
PIECE_ELEMENTS = 1 << 20


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, smollm2 or gemma3-270m.", show_default=False)],
    out: gguf_output.Out,
    types: Annotated[list[str] | None, typer.Option("--type", help=TYPE, metavar="[GLOB=]TYPE", show_default=False)] = None,
    threads: options.Threads = options.AUTO,
    force: gguf_output.Force = False,
    as_json: options.Json = False,
) -> None:
    """Write a GGUF file again with its matrices rounded to other types; metadata and all else stay as they are.

    Norms and other vectors stay, and so do routers unless a rule names them. Each block is rounded by itself, without data that
    says which weights matter; a matrix that is quantised already loses a second time. `NMSE` is the error of both together
    against what was read.

    \b
    tensorgraph quantize model-f16.gguf model-q4_k.gguf --type q4_k/q8_0 --type 'output*=q6_k'
    tensorgraph quantize smollm2 smollm2-q4_0.gguf --type 'blk.*=q4_0'
    """
    if not types:
        raise InputError("[quantize] wanted --type TYPE or --type GLOB=TYPE")
    gguf_output.check("quantize", out, force)
    count = options.thread_count(threads)
    options.limit_threads(1)
    from tensorgraph.models.text.gguf import GGUF
    from tensorgraph.tools.bench.machine import cores
    from tensorgraph.tools.model_argument import gguf_path
    from tensorgraph.tools.synth.rules import TypeRules

    path = gguf_path(model)
    if path is None:
        raise InputError(f"[quantize] wanted a GGUF file or the name of one; got {model}")
    if out.exists() and out.samefile(path):
        raise InputError(f"[quantize] {out} is the file that is read")
    rules, began = TypeRules(types, "quantize"), time.perf_counter()
    with GGUF.open(path) as file, ThreadPoolExecutor(cores() if count == options.AUTO else count) as pool:
        again = Rounding(file, rules, pool)
        size_bytes = gguf_output.write_file("quantize", out, metadata(file), again.tensors, again.content)
        tensors = [{"dtype": str(t.dtype), "shape": list(t.shape), "size_bytes": t.size_bytes} for t in again.tensors]
    report = {
        "file": str(out),
        "size_bytes": size_bytes,
        "size_bytes_before": sum(info.size_bytes for info in file.tensors.values()),
        "write_s": time.perf_counter() - began,
        "totals": [{**total, "nmse": again.nmse(total["dtype"])} for total in totals(tensors)],
    }
    typer.echo(json.dumps(report) if as_json else _report_text(report))


def metadata(file: GGUF) -> dict[str, Any]:
    """All that still holds of the new file, byte for byte."""
    from tensorgraph.models.text.gguf_header import Metadata
    from tensorgraph.models.text.gguf_writer import StoredValue

    assert isinstance(file.metadata, Metadata)
    kept = [key for key in file.metadata if key not in NO_LONGER_TRUE and not key.startswith("split.")]
    return {key: StoredValue(*file.metadata.stored(key)) for key in kept}


@dataclass
class Lost:
    """Sums of squares of what rounding changed, and of what was there."""

    error: float = 0.0
    total: float = 0.0


class Rounding:
    """A file's tensors in their new types, and the bytes of each.

    Attributes:
        tensors: in the file's order.

    Raises: InputError: no rule fits, or one names nothing.
    """

    def __init__(self, file: GGUF, rules: TypeRules, pool: ThreadPoolExecutor) -> None:
        from tensorgraph.models.text.gguf_writer import NewTensor

        self._file, self._pool, self._lost = file, pool, dict[str, Lost]()
        matrices = [t.name for t in file.tensors.values() if len(t.shape) > 1 and t.dtype.kind in ("float", "block")]
        rules.check_used(matrices)
        self.tensors = [
            NewTensor(t.name, rules.of(t.name, t.shape, t.dtype) if t.name in matrices else t.dtype, t.shape)
            for t in file.tensors.values()
        ]

    def content(self, tensor: NewTensor) -> Iterator[memoryview]:
        """A tensor's bytes, a piece of whole rows at a time."""
        from numpy import uint8

        before, stored = self._file.tensors[tensor.name].dtype, self._file.data(tensor.name)
        if before == tensor.dtype:
            yield stored.reshape(-1).view(uint8).data
            return
        rows = stored.reshape(-1, stored.shape[-1])
        n = max(1, PIECE_ELEMENTS // tensor.shape[-1])
        pieces = [rows[start : start + n] for start in range(0, len(rows), n)]
        lost = self._lost.setdefault(str(tensor.dtype), Lost())
        for raw, error, total in self._pool.map(lambda piece: rounded(piece, before, tensor.dtype), pieces):
            lost.error, lost.total = lost.error + error, lost.total + total
            yield raw.reshape(-1).view(uint8).data

    def nmse(self, dtype: str) -> float | None:
        """Of all values that were rounded to a type; None where none were."""
        lost = self._lost.get(dtype)
        return lost.error / lost.total if lost is not None and lost.total else None


def rounded(rows: np.ndarray, before: DType, after: DType) -> tuple[np.ndarray, float, float]:
    """Rows of one type in another, and the sums of squares of what that changed and of what was there."""
    import numpy as np

    from tensorgraph.ops.formats import decode, encode

    values = decode(rows, before) if before.is_block else rows.astype(np.float32)
    raw = encode(values, after) if after.is_block else values.astype(after.numpy)
    back = decode(raw, after) if after.is_block else raw.astype(np.float32)
    off = (back - values).astype(np.float64)
    return raw, float(np.vdot(off, off)), float(np.vdot(values, values))


def _report_text(report: dict[str, Any]) -> str:
    sizes = f"{options.size_text(report['size_bytes'])}, from {options.size_text(report['size_bytes_before'])} of tensors"
    errors: Sequence[str] = [f"{t['dtype']}: NMSE {t['nmse']:.2e}" for t in report["totals"] if t["nmse"] is not None]
    head = f"{report['file']}: {sizes}, in {report['write_s']:.1f} s"
    return "\n\n".join([head, gguf_output.totals_table(report["totals"]), *(["\n".join(errors)] if errors else [])])
