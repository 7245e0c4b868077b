"""What nodes cost, against counts by hand."""

from __future__ import annotations

from tensorgraph import registry
from tensorgraph.dims import Dim
from tensorgraph.graph import constant, input

T = Dim("T", 64)


def test_get_rows_reads_the_rows_it_takes() -> None:
    table = constant("table", shape=(1000, 64), dtype="q4_0")
    cost = registry.ops.get("get_rows").cost(registry.ops.get("get_rows")(table, input("ids", [T], "i32")), {"T": 3})
    assert cost.size_bytes == 3 * 36 + 3 * 4 + 3 * 64 * 4  # two blocks of 18 bytes a row, the ids, the result
    assert cost.flops == 0


def test_mul_mat_id_reads_each_expert_at_most_once() -> None:
    experts = constant("experts", shape=(8, 32, 64), dtype="f16")
    op = registry.ops.get("mul_mat_id")
    node = op(experts, input("x", [T, 1, 64]), input("ids", [T, 2], "i32"))
    expert, row, result = 32 * 64 * 2, 64 * 4, 2 * 32 * 4
    assert op.cost(node, {"T": 1}).size_bytes == 2 * expert + row + 8 + result
    assert op.cost(node, {"T": 64}).size_bytes == 8 * expert + 64 * (row + 8 + result)
    assert op.cost(node, {"T": 64}).flops == 64 * 2 * 32 * 64 * 2


def test_other_ops_touch_everything_once() -> None:
    op = registry.ops.get("mul_mat")
    cost = op.cost(op(constant("w", shape=(32, 64), dtype="q8_0"), input("x", [T, 64])), {"T": 5})
    assert cost.size_bytes == 32 * 2 * 34 + 5 * 64 * 4 + 5 * 32 * 4
    assert cost.flops == 5 * 32 * 64 * 2
