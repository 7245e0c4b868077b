"""The memory planner: nothing that is still needed is overwritten, in any graph."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.dims import ALWAYS, Dim
from tensorgraph.dtypes import f16, f32
from tensorgraph.extents import Extents
from tensorgraph.graph import Node, append, choose, constant, input, topological
from tensorgraph.memory import ALIGNMENT, MemoryPlan, needs_storage, plan_memory
from tensorgraph.ops import add, cast, concat, cont, mul_mat, relu, scale, soft_max
from tests.core.arena import play, play_plan
from tests.core.devices import pair
from tests.models import tiny

T = Dim("T", 5)


@st.composite
def programs(draw: Any) -> tuple[list[Node], list[Node]]:
    """An order of nodes of many sizes, with views, choices, state and in-place ops; and what is kept."""
    nodes: list[Node] = [input("x", (T, 8)), constant("w", shape=(8, 8)), input("z", (40, 16))]
    for i in range(draw(st.integers(1, 25))):
        a = nodes[draw(st.integers(max(0, len(nodes) - 6), len(nodes) - 1))]
        kind = draw(st.integers(0, 9))
        same = [n for n in nodes if (n.shape, n.dtype) == (a.shape, a.dtype)]
        if kind <= 2:
            nodes.append(
                draw(st.sampled_from((relu, lambda v: scale(v, scale=2.0), soft_max)))(a)
                if a.dtype == f32
                else cast(a, dtype=f32)
            )
        elif kind <= 4 and a.dtype == f32:
            nodes.append(add(a, draw(st.sampled_from(same))))
        elif kind == 5:
            nodes.append(a.permute(*reversed(range(a.ndim))))
        elif kind == 6 and isinstance(a.shape[0], int) and a.shape[0] > 1:
            nodes.append(a[: a.shape[0] // 2])
        elif kind == 7 and len(same) > 1:
            forms = draw(st.lists(st.sampled_from(same), min_size=2, max_size=3))
            guards = [T <= k for k in range(len(forms) - 1)]
            nodes.append(choose({f"f{k}": form for k, form in enumerate(zip(forms, [*guards, ALWAYS], strict=True))}))
        elif kind == 8:
            nodes.append(append(f"s{i}", a, T * 2, f16))
        else:
            nodes.append(cast(cont(a), dtype=draw(st.sampled_from((f16, f32)))))
    kept = draw(st.lists(st.sampled_from(nodes), max_size=3))
    order = topological([*draw(st.permutations(nodes))[:8], *kept])
    return [n for n in order if n.op not in ("input", "constant")], kept


def test_a_large_last_value_takes_the_place_of_all_before_it() -> None:
    """256, 768 and 1,024 bytes, of which the last lives beside 24,576: in order these would come behind 2,048."""
    first = relu(input("x", (1, 64)))
    second = mul_mat(constant("v", shape=(192, 64)), first)
    both = concat(first, second, axis=-1)
    largest = mul_mat(constant("w", shape=(6144, 256)), both)
    plan = plan_memory([first, second, both, largest], kept=[largest])
    assert plan.peak_bytes == 1024 + 24_576
    play([first, second, both, largest], [largest], [plan])


@given(programs())
@settings(max_examples=300)
def test_no_value_is_overwritten_before_its_last_use(program: tuple[list[Node], list[Node]]) -> None:
    order, kept = program
    memory = plan_memory(order, kept)
    play(order, kept, [memory])
    assert set(memory.buffers) == {n for n in order if needs_storage(n)}


@given(programs())
@settings(max_examples=150)
def test_buffers_that_are_alive_together_do_not_overlap(program: tuple[list[Node], list[Node]]) -> None:
    order, kept = program
    memory = plan_memory(order, kept)
    held = list(memory.buffers.items())
    for i, (a, mine) in enumerate(held):
        assert mine.start <= mine.end
        for b, other in held[:i]:
            in_place = other.end == mine.start and b in [s.base for s in a.inputs]
            apart = mine.offset + mine.size_bytes <= other.offset or other.offset + other.size_bytes <= mine.offset
            assert apart or mine.end < other.start or other.end < mine.start or (in_place and mine.offset == other.offset)
    assert memory.peak_bytes == max((b.offset + b.size_bytes for _, b in held), default=0)
    assert memory.total_bytes == sum(b.size_bytes for _, b in held)


def plan_of(*order: Node, kept: tuple[Node, ...] = ()) -> MemoryPlan:
    return plan_memory(topological(order), kept)


X = input("x", (T, 8))


def shares(op_input: Node, result: Node, *later: Node, kept: tuple[Node, ...] = ()) -> bool:
    memory = plan_of(result, *later, kept=kept)
    return memory.buffers[op_input].offset == memory.buffers[result].offset


def test_in_place_where_the_op_allows_it_and_nothing_else_needs_the_input() -> None:
    h, g = soft_max(X), soft_max(X * 2.0)
    assert shares(h, relu(h))
    assert shares(h, add(h, X)) and shares(h, add(h, g)) and not shares(g, add(h, g))  # only the first input
    assert not shares(h, relu(h), h * 3.0)  # needed later
    assert not shares(h, relu(h), kept=(h,)) and not shares(h, relu(h), kept=(h.permute(1, 0),))
    assert not shares(h, add(h, h.reshape(T, 8)[:, :1]))  # read in another order while it is written
    assert not shares(h, cast(h, dtype="f16"))  # another size
    assert not shares(h, mul_mat(constant("w", shape=(8, 8)), h))  # not declared
    assert not shares(h, scale(h.permute(1, 0), scale=2.0))  # not dense


def test_inputs_and_weights_are_never_written() -> None:
    w = constant("w", shape=(8,))
    y, v = relu(X), scale(w, scale=2.0)
    memory = plan_of(y, v, kept=(y, v))
    assert set(memory.buffers) == {y, v} and memory.peak_bytes == memory.total_bytes == 192 + 64


def test_a_chain_needs_one_buffer_and_a_tree_two() -> None:
    size = -(-5 * 8 * 4 // ALIGNMENT) * ALIGNMENT
    h = soft_max(X)
    for _ in range(6):
        h = relu(h)
    assert plan_of(h).peak_bytes == size and plan_of(h).total_bytes == 7 * size
    g = soft_max(X)
    for _ in range(6):
        g = cont(g)  # never in place
    assert plan_of(g).peak_bytes == 2 * size


def test_free_ranges_are_joined_and_the_best_fitting_is_taken() -> None:
    a, b, c, d, e = (soft_max(input(name, (1, 16))) for name in "abcde")  # 64 bytes each, from 0 on
    dd, wide_a, wide_b = mul_mat(d, d), cont(a.broadcast(8, 16)), cont(b.broadcast(8, 16))  # d, a and b fall free in turn
    small, large = soft_max(input("s", (1, 16))), soft_max(input("l", (1, 32)))
    memory = plan_memory([a, b, c, d, e, dd, wide_a, wide_b, small, large], [c, e, dd, wide_a, wide_b, small, large])
    assert [memory.buffers[n].offset for n in (a, b, c, d, e, dd, wide_a, wide_b)] == [0, 64, 128, 192, 256, 320, 384, 896]
    assert memory.buffers[small].offset == 192  # where d was, not in the 128 bytes of a and b
    assert memory.buffers[large].offset == 0 and memory.peak_bytes == 896 + 512


def test_results_without_elements_take_nothing() -> None:
    memory = plan_of(relu(soft_max(input("e", (0, 8)))))
    assert memory.peak_bytes == memory.total_bytes == 0


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("two", [False, True])
def test_no_model_overwrites_what_it_needs(architecture: str, two: bool) -> None:
    graph = tiny.model(architecture).graph(Extents(64, 512), f16)
    options = CompileOptions(placement={"blk.?[13579].*": "reference:1", "blk.[13579].*": "reference:1"})
    plan = compile(graph, pair(), options) if two else compile(graph)
    play_plan(plan)
    assert sum(m.peak_bytes for m in plan.memory.values()) < sum(m.total_bytes for m in plan.memory.values()) / 2


def test_the_check_itself_sees_an_overwrite() -> None:
    a = soft_max(X)
    b = cont(a)
    order = [n for n in topological([add(b, a)]) if n is not X]
    memory = plan_memory(order)
    play(order, [], [memory])
    broken = MemoryPlan({n: memory.buffers[a] for n in memory.buffers}, memory.peak_bytes, memory.total_bytes)
    with pytest.raises(AssertionError, match="is overwritten before"):
        play(order, [], [broken])
