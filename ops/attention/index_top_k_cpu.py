"""index_top_k on the CPU: tiles of the rows that a token sees are scored, and the best so far are kept.

For few tokens the tiles are divided among threads: all scores are written down, then the best selected from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tensorgraph.backends.cpu.ir import F32, I32, I64, Value
from tensorgraph.backends.cpu.kernel import CHUNK, Buffer, Call, Context, Kernel, NodeKernel, Ref
from tensorgraph.backends.cpu.operands import Row
from tensorgraph.backends.cpu.sorting import TILE, Least, least_bytes, lowest_key, ordered_key
from tensorgraph.dims import ALWAYS, Extent, Guard, maximum
from tensorgraph.dtypes import f32
from tensorgraph.graph import Node
from tensorgraph.ops.attention.attend_cpu import is_of_rows
from tensorgraph.ops.attention.index_scores_cpu import Place, Scorer, Slots, Tiling
from tensorgraph.ops.attention.index_top_k import index_top_k
from tensorgraph.ops.select.top_k_cpu import select_best

_SCORES_BYTES = 1 << 24  # as many of scores are written down, at most
_FEW = 64  # tokens
OF_ONE = 256
"""Rows that are scored at once where there is one token, so that threads end together."""


@dataclass(frozen=True)
class Forms:
    """The calls of a node in its two forms."""

    node: Node
    context: Context

    @property
    def few(self) -> int:
        """Up to so many tokens, scores are written down."""
        return min(_FEW, max(1, _SCORES_BYTES // (4 * max(maximum(self._rows), 1))), maximum(self.node.shape[0]))

    @property
    def _rows(self) -> Extent:
        return self._slots["k"].shape[0]

    @property
    def _slots(self) -> dict[str, Node]:
        return dict(zip(self.node.slots, self.node.inputs, strict=True))

    @property
    def _inputs(self) -> dict[str, Ref | None]:
        refs: dict[str, Ref | None] = {name: Ref(value, known=name in ("q", "w")) for name, value in self._slots.items()}
        layout, own = self.context.layout(self._slots["k"]), [self._slots[f"k_{what}"] for what in ("pos", "seq")]
        if layout != "dense" and is_of_rows(own[0], "pos") and is_of_rows(own[1], "seq"):
            refs |= {"k_pos": None, "k_seq": None}  # a stream's own, which follow from the numbers of its rows
        return {**refs, "k": Ref(self._slots["k"], layout, known=True)}

    @property
    def _scratch(self) -> int:
        _, n_heads, width = self._slots["q"].shape
        assert isinstance(n_heads, int) and isinstance(width, int)
        return 4 * sum(Tiling.of(n_heads, width, self.context.target).sizes)

    def at_once(self, guard: Guard = ALWAYS) -> Call:
        best, operands = self.node.attrs["top_k"], {**self._inputs, "y": Ref(self.node)}
        scratch = self._scratch + least_bytes(best, I32)
        attrs = {"best": best, "every": self.node.attrs["every"]}
        return Call(emit_at_once, operands, attrs, self.node.shape[0], scratch_bytes=scratch, guard=guard, nodes=(self.node,))

    def divided(self, most: int, guard: Guard = ALWAYS) -> list[Call]:
        """Of up to `most` tokens."""
        node, inputs, best = self.node, self._inputs, self.node.attrs["top_k"]
        scores, each = Ref(Buffer(4 * most * maximum(self._rows), "scores")), OF_ONE if most == 1 else TILE
        attrs, tiles = {"every": node.attrs["every"], "each": each}, node.shape[0] * ((self._rows + (each - 1)) // each)
        chosen = {"scores": scores, "rows": Ref(self._rows), "y": Ref(node)}
        grain = max(1, CHUNK // (4 * maximum(self._rows) + 1))
        sort = least_bytes(best, I32)
        return [
            Call(
                emit_scores, {**inputs, "scores": scores}, attrs, tiles, scratch_bytes=self._scratch, guard=guard, nodes=(node,)
            ),
            Call(emit_choice, chosen, {"best": best}, node.shape[0], grain, scratch_bytes=sort, guard=guard, nodes=(node,)),
        ]


def _calls(node: Node, context: Context) -> Sequence[Call]:
    forms, n = Forms(node, context), node.shape[0]
    made: list[Call] = []
    one, some, many = n <= 1, (n >= 2) & (n <= forms.few), n >= max(2, forms.few + 1)
    if one is not False:
        made += forms.divided(1, _guard(one))
    if some is not False:
        made += forms.divided(forms.few, _guard(some))
    if many is not False:
        made.append(forms.at_once(_guard(many)))
    return made


def _guard(given: Guard | bool) -> Guard:
    return given if isinstance(given, Guard) else ALWAYS


def emit_at_once(k: Kernel, operands: Slots, *, best: int, every: int) -> None:
    """Scores and selection of a token, tile by tile."""
    scorer = Scorer.of(k, operands, every, k.scratch() + least_bytes(best, I32))
    least, y, n_rows = Least(k, k.scratch(), best, I32), operands["y"], k.i64(operands["k"].shape[0])
    with k.rows(y.shape[:1]) as index:
        token = scorer.begin(index[0])
        with k.loop(0, n_rows, TILE, least.begin(lowest_key(I32))) as loop:

            def offer(start: Value, n: Value, place: Place, state: list[Value]) -> list[Value]:
                count = scorer.tile(token, start, n, place)

                def key(i: Value, mask: Value | None) -> tuple[Value, Value]:
                    score = k.load(scorer.scores + i * 4, F32.x(k.lanes), mask=mask)
                    return ordered_key(k, score, descending=True), k.load(scorer.numbers + i * 4, I32.x(k.lanes), mask=mask)

                return least.offer(count, key, state)

            left = n_rows - loop.i
            state = scorer.each_part(token, loop.i, k.min(left, TILE), offer, loop.values)
            loop.next(*least.cut(state, left.le(TILE)))
        least.write(loop.results, y.row(index).store)


def emit_scores(k: Kernel, operands: Slots, *, every: int, each: int) -> None:
    """The scores of `each` rows (a tile of them at most) for a token, -inf where it does not see them, to `scores` [T, S].

    Where there are fewer than a tile's, there is one token alone, whose queries a thread packs once in a step.
    """
    scorer = Scorer.of(k, operands, every, k.scratch())
    n_rows = k.i64(operands["k"].shape[0])
    if each < TILE:
        with k.when(k.first & k.i64(operands["q"].shape[0]).gt(0)):
            scorer.pack(k.i64(0))
    with k.rows([operands["q"].shape[0], (n_rows + (each - 1)) // each]) as (t, i):
        token, first = scorer.begin(t) if each == TILE else scorer.token(t), i * each
        n, to = k.min(n_rows - first, each), operands["scores"].address + t * n_rows * 4

        def clear(i: Value, mask: Value | None, _: list[Value]) -> None:
            k.store(k.const(-math.inf, F32.x(k.lanes)), to + (first + i) * 4, mask=mask)

        def write(start: Value, n: Value, place: Place, _: list[Value]) -> list[Value]:
            with k.loop(0, scorer.tile(token, start, n, place)) as each:
                each.next()
                row = k.convert(k.load(scorer.numbers + each.i * 4, I32), I64)
                k.store(k.load(scorer.scores + each.i * 4, F32), to + row * 4)
            return []

        k.sweep(n, clear)
        scorer.each_part(token, first, n, write, [])


def emit_choice(k: Kernel, operands: Slots, *, best: int) -> None:
    """The best of each token's scores."""
    least, y, n_rows = Least(k, k.scratch(), best, I32), operands["y"], k.i64(operands["rows"].shape[0])
    with k.rows(y.shape[:1]) as index:
        row = Row(k, f32, operands["scores"].address + index[0] * n_rows * 4, 1)
        select_best(k, least, row, n_rows, y.row(index))


def _known_heads(node: Node) -> bool:
    return all(isinstance(n, int) for n in node.inputs[0].shape[1:])


index_top_k.kernels["cpu"] = NodeKernel(_calls, _known_heads, lambda node, slot: ("rows",) if slot == "k" else ())
