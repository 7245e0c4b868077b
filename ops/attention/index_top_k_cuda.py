"""index_top_k on CUDA: of few tokens scores are written down and selected from; a block keeps the best of each of many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tensorgraph.backends.cuda.launches import Buffer, Call, Context, Launch, NodeKernel, Ref, Template
from tensorgraph.dims import Extent, Guard, maximum
from tensorgraph.graph import Node
from tensorgraph.ops.attention.attend_cpu import is_of_rows
from tensorgraph.ops.attention.index_top_k import index_top_k
from tensorgraph.ops.select.argsort_cuda import as_guard, power_of_two
from tensorgraph.ops.select.top_k_cuda import FEW, LONG, Operands, Selecting, lists_bytes, room_for

FILE = "tensorgraph.ops.attention:index_top_k.cu"
MOST = 2048
"""Rows of a token at most; of more, the plain ops are what this is made of."""
SCORES = 1 << 21
"""As many are written down, at most: 8 MB."""
PARTS = 16
"""Blocks of each of few tokens whose scores would be more."""
_THREADS, _ROOM = 256, 3200  # as in index_top_k.cu; pairs beside what scores take of shared memory
_QUERIES = 8192  # elements of a group of heads


@dataclass(frozen=True)
class Forms:
    """The launches of a node in its forms."""

    node: Node
    context: Context

    @cached_property
    def inputs(self) -> dict[str, Ref | None]:
        assert index_top_k.signature is not None
        slots = {a.name: _input(self.node, a.name) for a in index_top_k.signature.inputs}  # fused nodes have them in any order
        refs: dict[str, Ref | None] = {name: Ref(value, known=name in ("q", "w")) for name, value in slots.items()}
        layout = self.context.layout(slots["k"])
        if layout != "dense" and all(is_of_rows(slots[f"k_{what}"], what) for what in ("pos", "seq")):
            refs |= {"k_pos": None, "k_seq": None}  # a stream's own, which follow from the numbers of its rows
        return {**refs, "k": Ref(slots["k"], layout, known=True)}

    @property
    def tokens(self) -> Extent:
        return self.node.shape[0]

    @property
    def rows(self) -> Extent:
        return _input(self.node, "k").shape[0]

    @property
    def k(self) -> int:
        best: int = self.node.attrs["top_k"]
        return best

    def scorer(self, held: int) -> tuple[str, int, int]:
        """What scores a tile, the tile's rows, and the heads of a group: products of matrices where both sides may be rounded, of
        which a warp holds 8 times `held` shares of 32 elements of rows in registers."""
        q, k = _input(self.node, "q"), _input(self.node, "k")
        _, n_heads, width = q.shape
        assert isinstance(n_heads, int) and isinstance(width, int)
        if self.context.exact or k.dtype.name not in ("f16", "bf16") or width % 32 or not 32 <= width <= 256:
            return "InOrder", 256, 64
        columns = min(power_of_two(held * 32 // width + 1) // 2, 4)
        heads = min(-(-n_heads // 16), _QUERIES // width // 16) * 16
        return f"ByMatrices<{width // 32}, {columns}>", 64 * columns, heads

    def written(self, guard: Guard, *, long: bool) -> list[Launch]:
        """Scores to memory, then the best of them: by a block for each token, or by several."""
        by, tile, heads = self.scorer(8)  # so that two blocks run at once, of which one reads
        scores = Ref(Buffer(4 * min(SCORES, min(FEW, maximum(self.tokens)) * maximum(self.rows)), "scores"))
        lists = Ref(Buffer(min(FEW, maximum(self.tokens)) * lists_bytes(self.k), "lists")) if long else None
        template = Template(FILE, f"index_scores<{by}>", (f"{self.node.attrs['every']}LL", str(heads), str(self.k)))
        items = self.tokens * ((self.rows + (tile - 1)) // tile)
        operands: Operands = {**self.inputs, "scores": scores, "lists": lists}
        grain = 2 if long else 1  # tiles for which a block reads the queries once
        made = [Launch(template, operands, items=items, grain=grain, threads=_THREADS, guard=guard, nodes=(self.node,))]
        operands = {"scores": scores, "y": Ref(self.node), "rows": Ref(self.rows)}
        if not long:
            selecting = Selecting(self.node, FILE, self.k, min(maximum(self.rows), LONG), 4, guard)
            return [*made, selecting.by_block("index_choice<{}>", operands, few=True)]
        selecting = Selecting(self.node, FILE, self.k, self.rows, 4, guard)
        return made + selecting.divided("index_count", "index_choose", {**operands, "lists": lists})

    def at_once(self, guard: Guard, parts: int) -> list[Launch]:
        """A block for each token, or for each of some parts of its rows."""
        by, _, heads = self.scorer(16)  # more of what is read of the queries, to which keys come fast enough
        kept = Ref(Buffer(4 * min(FEW, maximum(self.tokens)) * parts * (4 + 2 * self.k), "kept")) if parts > 1 else None
        room = min(_ROOM, max(power_of_two(self.k), room_for(self.k, maximum(self.rows), 8)))
        numbers = (f"{self.node.attrs['every']}LL", str(heads), str(self.k), str(room), str(parts))
        made = [
            Launch(
                Template(FILE, f"index_best<{by}>", numbers),
                {**self.inputs, "y": Ref(self.node), "kept": kept},
                items=self.tokens * parts,
                threads=_THREADS,
                shared_bytes=room * 8,
                guard=guard,
                nodes=(self.node,),
            )
        ]
        if kept is not None:
            room = room_for(self.k, parts * self.k, 8)
            template = Template(FILE, "index_merge", (str(self.k), str(room), str(parts)))
            operands = {"kept": kept, "y": Ref(self.node)}
            call = {"threads": 512, "shared_bytes": room * 8, "guard": guard, "nodes": (self.node,)}
            made.append(Launch(template, operands, items=self.tokens, **call))  # type: ignore[arg-type]
        return made


def _input(node: Node, slot: str) -> Node:
    found = node.at(slot)
    assert found is not None
    return found


def _calls(node: Node, context: Context) -> Sequence[Call]:
    forms = Forms(node, context)
    tokens, rows = forms.tokens, forms.rows
    few, all_scores = tokens <= FEW, tokens * rows
    made: list[Call] = []
    if (short := few & (all_scores <= SCORES) & (rows <= LONG)) is not False:
        made += forms.written(as_guard(short), long=False)
    if (long := few & (all_scores <= SCORES) & (rows >= LONG + 1)) is not False and maximum(rows) > LONG:
        made += forms.written(as_guard(long), long=True)
    if (parted := few & (all_scores >= SCORES + 1)) is not False and min(FEW, maximum(tokens)) * maximum(rows) > SCORES:
        made += forms.at_once(as_guard(parted), PARTS)
    if (many := tokens >= FEW + 1) is not False and maximum(tokens) > FEW:
        made += forms.at_once(as_guard(many), 1)
    return made


def _supports(node: Node) -> bool:
    return node.attrs["top_k"] <= MOST and all(isinstance(n, int) for n in _input(node, "q").shape[1:])


def _reads(node: Node, slot: str) -> tuple[str, ...]:
    return ("rows",) if slot == "k" and not _input(node, "k").dtype.is_block else ()


index_top_k.kernels["cuda"] = NodeKernel(_calls, _supports, _reads)
