"""Normalisation over groups of channels on the CPU: a group is one piece of work."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tensorgraph.backends.cpu.emit import Values
from tensorgraph.backends.cpu.ir import F64, Value
from tensorgraph.backends.cpu.kernel import Kernel, cpu_kernel
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.dims import Extent, maximum, product
from tensorgraph.graph import Node
from tensorgraph.ops.norms.group_norm import group_norm
from tensorgraph.ops.norms.norms_cpu import Visit, normalise, root_of_mean


def _groups(node: Node) -> Sequence[Extent]:
    return (*node.shape[:-3], node.attrs["n_groups"])


def _group_work(node: Node) -> int:
    n_groups: int = node.attrs["n_groups"]
    return maximum(product(node.shape[-3:])) // n_groups


@cpu_kernel(group_norm, rows=_groups, work=_group_work)
def emit_group_norm(k: Kernel, x: Operand, y: Operand, *, n_groups: int, eps: float) -> None:
    *lead, channels, height, width = y.shape
    each = (k.i64(channels) + (n_groups - 1)) // n_groups
    with k.rows([*lead, n_groups]) as [*index, group]:
        first = group * each
        last = k.min(first + each, channels)

        def walk(visit: Visit, carried: Values) -> list[Value]:
            with k.loop(first, last, 1, carried) as planes:
                with k.loop(0, k.i64(height), 1, planes.values) as lines:
                    at = [*index, planes.i, lines.i]
                    lines.next(*k.sweep(width, partial(visit, x.row(at), y.row(at)), lines.values))
                planes.next(*lines.results)
            return planes.results

        length = k.convert((last - first) * height * width, F64)
        normalise(k, walk, length, centred=True, divisor=root_of_mean(k, eps))
