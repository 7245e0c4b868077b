"""Formulas of the gated units on the CPU, of a gate and what it gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensorgraph.backends.cpu import functions
from tensorgraph.backends.cpu.elementwise import Read, cpu_formula
from tensorgraph.backends.cpu.ir import F64, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.graph import Node
from tensorgraph.op import Op
from tensorgraph.ops.elementwise import glu, unary_cpu

Gated = Callable[..., Value]


def gate_and_up(node: Node) -> tuple[Read, ...]:
    """The gate and the other half: two inputs, or the halves of one."""
    a, b = node.at("a"), node.at("b")
    assert a is not None
    if b is not None:
        both = [Read(a, a.index_map), Read(b, b.index_map)]
    else:
        n, last = node.shape[-1], node.ndim - 1
        both = [Read(a, a.index_map.slice(last, start, start + n)) for start in (0, n)]
    return tuple(both[::-1] if node.attrs["swapped"] else both)


def _declare(op: Op, gated: Gated) -> None:
    @cpu_formula(op, operands=gate_and_up)
    def formula(k: Kernel, gate: Value, up: Value, *, swapped: bool, **attrs: Any) -> Value:
        return gated(k, gate, up, **attrs)


def _activated(activation: Callable[[Kernel, Value], Value]) -> Gated:
    return lambda k, gate, up: activation(k, gate) * up


def _within(k: Kernel, x: Value, limit: float) -> Value:
    return k.max(k.min(x, functions.number(k, limit, x.type)), functions.number(k, -limit, x.type))


def _clamped(k: Kernel, gate: Value, up: Value, *, limit: float) -> Value:
    return functions.silu(k, k.min(gate, functions.number(k, limit, gate.type))) * _within(k, up, limit)


def _oai(k: Kernel, gate: Value, up: Value, *, alpha: float, limit: float) -> Value:
    gate = k.min(gate, functions.number(k, limit, gate.type))
    beside = _within(k, k.convert(up, F64), limit) + 1.0  # f64: it may cancel to what f32 would round limit by
    return gate * functions.sigmoid(k, gate * functions.number(k, alpha, gate.type)) * k.convert(beside, gate.type)


_declare(glu.reglu, _activated(unary_cpu.emit_relu))
_declare(glu.geglu, _activated(unary_cpu.emit_gelu))
_declare(glu.swiglu, _activated(functions.silu))
_declare(glu.geglu_erf, _activated(functions.gelu))
_declare(glu.geglu_quick, _activated(unary_cpu.emit_gelu_quick))
_declare(glu.swiglu_clamp, _clamped)
_declare(glu.swiglu_oai, _oai)
