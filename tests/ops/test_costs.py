"""What nodes cost, against counts by hand."""

from __future__ import annotations

from tensorgraph import registry
from tensorgraph.dims import Dim
from tensorgraph.graph import constant, input
from tensorgraph.ops.attention import Segment

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


def test_flash_attn_reads_the_rows_that_are_listed() -> None:
    rows = Dim("S", 1000)
    op, k, ids = registry.ops.get("flash_attn"), input("k", [rows, 1, 24], "f16"), input("ids", [T, 10], "i32")
    q, dense = input("q", [T, 8, 24]), Segment(input("all", [rows, 1, 24], "f16"))
    node = op(q, Segment(k, ids=ids), dense, scale=1.0, d_v=16)
    row, of_token = 24 * 2, 8 * 24 * 4 + 8 * 16 * 4 + 10 * 4
    assert op.cost(node, {"T": 3, "S": 1000}).size_bytes == 3 * of_token + (30 + 1000) * row
    assert op.cost(node, {"T": 64, "S": 300}).size_bytes == 64 * of_token + (300 + 300) * row  # each once
    assert op.cost(node, {"T": 3, "S": 1000}).flops == 3 * 8 * (10 + 1000) * (24 + 16) * 2


def test_index_top_k_multiplies_every_head_with_every_key() -> None:
    rows = Dim("S", 1000)
    op = registry.ops.get("index_top_k")
    given = {"k": input("k", [rows, 24], "f16"), "q": input("q", [T, 8, 24]), "w": input("w", [T, 8])}
    given |= {name: input(name, [T if name[0] == "q" else rows], "i32") for name in ("q_pos", "q_seq", "k_pos", "k_seq")}
    node = op.apply(given, op.check_attrs({"top_k": 5}))  # as a pattern that is replaced may order them
    assert op.cost(node, {"T": 3, "S": 500}).flops == 3 * 8 * 24 * 500 * 2
