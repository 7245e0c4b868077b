"""What others take for the same work, where they are installed: torch (cuBLAS behind its products), and a kernel of Triton's.

Each runs as many instances as ours, over as many inputs, in one CUDA graph of its own, timed by events.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Seconds = Callable[[int], float]
"""`seconds(times)`: of one instance, the mean of so many replays."""


class Work(NamedTuple):
    """mm: rows, K, M. sdpa: tokens, rows, heads, kv heads, width. topk: rows, width, k. rms_norm: rows, width."""

    kind: str
    extents: tuple[int, ...]


def installed() -> dict[str, str]:
    """Versions of those that are here."""
    found = {}
    for name in ("torch", "triton"):
        try:
            found[name] = str(importlib.import_module(name).__version__)
        except Exception:  # a package that is broken is as good as none
            continue
    return found


def peers(work: Work, instances: int) -> Iterator[tuple[str, Callable[[], Seconds]]]:
    """Those that can do it: a name each, and what prepares it."""
    here = installed()
    if "torch" not in here or not importlib.import_module("torch").cuda.is_available():
        return
    torch = importlib.import_module("torch")
    label = {"mm": "torch mm f16", "sdpa": "torch sdpa f16", "topk": "torch topk", "rms_norm": "torch rms_norm"}[work.kind]
    yield label, lambda: _recorded(torch, _torch(torch, work, instances))
    if work.kind == "rms_norm" and "triton" in here:
        from tensorgraph.tools.bench.cuda.triton_norm import norms

        rows, width = work.extents
        yield "triton rms_norm", lambda: _recorded(torch, norms(torch, rows, width, instances))


def give_back() -> None:
    """Memory that torch keeps for itself, which ours cannot have then."""
    if "torch" in sys.modules and (torch := sys.modules["torch"]).cuda.is_available():
        torch.cuda.empty_cache()


def _torch(torch: Any, work: Work, instances: int) -> list[Callable[[], Any]]:
    """A call for each instance, over inputs of its own; those of products and attention are f16."""

    def drawn(*shape: int, dtype: Any = torch.float16) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)

    def one() -> Callable[[], Any]:
        if work.kind == "mm":
            rows, k, m = work.extents
            x, w = drawn(rows, k), drawn(m, k)
            return lambda: torch.mm(x, w.t())
        if work.kind == "sdpa":
            tokens, rows, heads, kv_heads, width = work.extents
            q, k, v = drawn(1, heads, tokens, width), drawn(1, kv_heads, rows, width), drawn(1, kv_heads, rows, width)
            mask = None
            if tokens > 1:
                mask = torch.ones(tokens, rows, device="cuda", dtype=torch.bool).tril(rows - tokens)
            attend = torch.nn.functional.scaled_dot_product_attention
            return lambda: attend(q, k, v, attn_mask=mask, enable_gqa=True)
        if work.kind == "topk":
            rows, width, k = work.extents
            x = drawn(rows, width, dtype=torch.float32)
            return lambda: torch.topk(x, k)
        rows, width = work.extents
        x = drawn(rows, width, dtype=torch.float32)
        return lambda: torch.nn.functional.rms_norm(x, (width,), eps=1e-6)

    return [one() for _ in range(instances)]


def _recorded(torch: Any, calls: list[Callable[[], Any]]) -> Seconds:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # noqa: F841  (results live as long as the graph)

    def seconds(times: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        for _ in range(times):
            graph.replay()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / times / len(calls)

    return seconds
