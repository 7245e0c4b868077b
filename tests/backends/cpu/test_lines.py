"""Lines: the same elements in the same order as the shape and strides that they were made from, in as few axes as can be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from math import prod

from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.backends.cpu.lines import LONG, PIECE, SHORT, arrange
from tensorgraph.dims import Dim
from tensorgraph.views import IndexMap


def elements(index_map: IndexMap) -> Iterator[int]:
    """Where the elements of a map lie, in row order."""
    shape, strides, offset = index_map.resolve({})
    for index in itertools.product(*map(range, shape)):
        yield offset + sum(i * s for i, s in zip(index, strides, strict=True))


@settings(deadline=None)
@given(st.data())
def test_the_same_elements_in_the_same_order(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from((0, 1, 2, 3, 4, 17)), max_size=4)))
    given = [IndexMap.dense(shape)]
    for _ in range(data.draw(st.integers(0, 3))):
        repeated = [1 if data.draw(st.booleans()) else n for n in shape]
        order = data.draw(st.permutations(range(len(shape))))
        turned = IndexMap.dense(tuple(repeated[a] for a in order)).permute([order.index(a) for a in range(len(shape))])
        given.append(IndexMap(turned.shape, turned.strides, data.draw(st.integers(0, 9))).broadcast(shape))
    lines = arrange(shape, given)
    assert prod((*lines.rows, lines.line)) == prod(shape)
    assert lines.maps[0].is_dense
    for before, after in zip(given, lines.maps, strict=True):
        assert list(elements(after)) == list(elements(before))
        assert after.shape in ((*lines.rows, lines.line), (*lines.rows, lines.line // prod(lines.inner), *lines.inner))


def test_dense_operands_are_one_line() -> None:
    t = Dim("T", 9)
    dense = IndexMap.dense((t, 3, 1, 5))
    lines = arrange(dense.shape, [dense, dense])
    assert (lines.rows, lines.line, lines.inner) == ((), t * 15, ())
    assert lines.pieces
    assert lines.items == (t * 15 + PIECE - 1) // PIECE


def test_a_row_for_every_token_is_a_line() -> None:
    t = Dim("T", 9)
    shape = (t, 4, 4 * SHORT)
    lines = arrange(shape, [IndexMap.dense(shape), IndexMap.dense((4 * SHORT,)).broadcast(shape)])
    assert (lines.rows, lines.line) == ((t * 4,), 4 * SHORT)
    assert [m.strides for m in lines.maps] == [(4 * SHORT, 1), (0, 1)]
    assert (lines.items, lines.item_size) == (t * 4, 4 * SHORT)


def test_short_axes_are_walked_together() -> None:
    t = Dim("T", 9)
    shape = (t, 4, 3)
    lines = arrange(
        shape, [IndexMap.dense(shape), IndexMap.dense((t, 4, 1)).broadcast(shape), IndexMap.dense((1,)).broadcast(shape)]
    )
    assert (lines.rows, lines.line, lines.inner) == ((), t * 12, (3,))
    assert [m.strides for m in lines.maps] == [(1,), (1, 0), (0,)]
    wide = (LONG, LONG, 3)
    assert arrange(wide, [IndexMap.dense(wide), IndexMap.dense((LONG, 1, 3)).broadcast(wide)]).rows == (LONG,)
