"""Which rows a tile goes through where each of its tokens has a list of its own.

What it takes is counted in units of what a query does with a row: queries that share registers go together, and a row is first
copied, for so many units (`RowCosts`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tensorgraph.backends.cpu.ir import I32, I64, Value
from tensorgraph.backends.cpu.kernel import Kernel
from tensorgraph.ops.attention.listed_rows_cpu import WORD, write_rows
from tensorgraph.ops.attention.paged_cpu import Seen

FORMS = ("gather", "union", "masked")
"""Each token through its own list; all of a tile through the rows of all its lists; all through all that one of them may see."""
SCALE = 100


class RowCosts(NamedTuple):
    """What it takes to copy a row that is listed, or one that lies behind the last one, in hundredths of what a query does with
    it."""

    listed: int
    next: int


@dataclass(frozen=True)
class Lists:
    """Of each token how many rows it has listed, and which, upwards: i32 [T, stride]."""

    k: Kernel
    address: Value
    stride: int

    def count(self, token: Value) -> Value:
        return self.k.convert(self.k.load(self.address + token * (self.stride * 4), I32), I64)

    def rows(self, token: Value) -> Value:
        """Where they stand."""
        return self.address + (token * self.stride + 1) * 4

    def row(self, token: Value, i: Value) -> Value:
        """The i-th of them; behind the last, anything."""
        return self.k.convert(self.k.load(self.rows(token) + self.k.min(i, self.stride - 2) * 4, I32), I64)

    def below(self, token: Value, row: Value) -> Value:
        """How many of them are below a row."""
        k = self.k
        with k.loop(0, self.stride.bit_length(), 1, [k.i64(0), self.count(token)]) as halves:
            low, high = halves.values
            middle = (low + high) // 2
            less = self.row(token, middle).lt(row)
            halves.next(k.select(low.lt(high) & less, middle + 1, low), k.select(low.lt(high) & less.invert(), middle, high))
        return halves.results[0]

    def bits(self, token: Value, i: Value, rows: Value, n: Value) -> tuple[Value, Value]:
        """Which of n rows (i64, upwards) are among them, the i-th being the first that may be; and which is the next such."""
        k, count = self.k, self.count(token)
        with k.loop(0, n, 1, [i, k.i64(0)]) as each:
            i, found = each.values
            listed = i.lt(count) & self.row(token, i).eq(k.load(rows + each.i * 8, I64))
            hit = k.convert(listed, I64, signed=False)
            each.next(i + hit, found | (hit << each.i))
        return each.results[1], each.results[0]

    def unite(self, token: Value, n_tokens: Value, span: Seen, to: Value, bits: Value) -> tuple[Value, Value]:
        """Write the rows that any of these tokens has listed, all within a span, to `to`; `bits`: room for one each.

        Returns how many they are, and how many the tokens have listed together.
        """
        k, n_rows = self.k, extent(self.k, span)
        with k.loop(0, (n_rows + (WORD - 1)) // WORD) as words:
            words.next()
            k.store(k.i64(0), bits + words.i * 8)
        with k.loop(0, n_tokens, 1, [k.i64(0)]) as each:
            n = self.count(token + each.i)
            with k.loop(0, n) as rows:
                rows.next()
                number = self.row(token + each.i, rows.i) - span.lo
                at = bits + number // WORD * 8
                k.store(k.load(at, I64) | (k.i64(1) << number % WORD), at)
            each.next(each.values[0] + n)
        return write_rows(k, bits, span.lo, n_rows, to), each.results[0]


def extent(k: Kernel, span: Seen) -> Value:
    """The rows of a span."""
    return k.max(span.hi - span.lo, 0)


@dataclass(frozen=True)
class Candidates:
    """Rows that a tile goes through, upwards: all from `first` on where `all`, else those at `listed`; `cost`: of all that."""

    k: Kernel
    all: Value
    first: Value
    listed: Value
    count: Value
    cost: Value

    def row(self, i: Value) -> Value:
        """The i-th of them."""
        k = self.k
        return k.select(self.all, self.first + i, k.convert(k.load(self.listed + k.select(self.all, k.i64(0), i) * 4, I32), I64))


@dataclass(frozen=True)
class Way:
    """How rows are gone through. `form`: one of `FORMS`, or what takes least by `costs`."""

    costs: RowCosts
    form: str | None

    def candidates(self, k: Kernel, queries: Value, span: Seen, listed: Value, n: Value) -> Candidates:
        """Those of n listed rows, or all of a span, for so many queries."""
        between = extent(k, span)
        all_cost, cost = (rows * self.each(queries, copy) for rows, copy in ((between, self.costs.next), (n, self.costs.listed)))
        whole = all_cost.lt(cost)
        if self.form is not None:
            whole = n.ge(0) if self.form == "masked" else n.lt(0)
        return Candidates(k, whole, span.lo, listed, k.select(whole, between, n), k.select(whole, all_cost, cost))

    def each(self, queries: Value, copy: int) -> Value:
        """Of a row."""
        return queries * SCALE + copy
