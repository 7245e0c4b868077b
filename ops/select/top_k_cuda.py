"""top_k on CUDA: by warps, by a block for each row, or by several where rows are long and few; of very many, a sort."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tensorgraph.backends.cuda.described import emit_best, selects
from tensorgraph.backends.cuda.launches import CHUNK, Buffer, Call, Context, Launch, NodeKernel, Ref, Template
from tensorgraph.dims import Extent, Guard, maximum, product
from tensorgraph.graph import Node
from tensorgraph.ops.select.argsort_cuda import as_guard, key_bytes, power_of_two, sorting
from tensorgraph.ops.select.top_k import top_k

FILE = "tensorgraph.ops.select:top_k.cu"
LONG = 16384
"""Elements of a row from which on it is divided among blocks."""
FEW = 64
"""Rows up to which it is."""
_PART, _DIGITS, _COUNTERS, _LISTED = 2048, 4096, 16, 16384  # as in top_k.cu
_ROOM_BYTES = 43 << 10
_OF_WARPS = 1024, 16  # elements of a row, and k, up to which a warp has it in registers
_MOST = {4: 4096, 8: 2048}
"""k up to which pairs are held in shared memory, by the bytes of a key."""

Operands = Mapping[str, Ref | None]


def room_for(k: int, n: int, pair_bytes: int) -> int:
    """Pairs that a block's selection of k of at most n elements has room for: all of a short row, else some times k."""
    wanted = min(max(4 * k, 2048), -(-max(n, 1) // 64) * 64)
    return min(max(wanted, power_of_two(min(k, max(n, 1)))), _ROOM_BYTES // pair_bytes // 64 * 64)


def lists_bytes(k: int) -> int:
    """Memory of a row that is divided among blocks."""
    return 4 * (_DIGITS + _COUNTERS + -(-k // 4) * 4 + _LISTED)


@dataclass(frozen=True)
class Selecting:
    """The k best of each of a node's rows of n elements, whose keys have `size` bytes; functions of a file of sources."""

    node: Node
    file: str
    k: int
    n: Extent
    size: int
    guard: Guard | bool = True

    def by_block(self, function: str, operands: Operands, *, few: bool) -> Launch:
        """A block for each row; `function` takes the number of threads."""
        threads, room = 512 if few and maximum(self.n) > 2048 else 256, room_for(self.k, maximum(self.n), self.size + 4)
        return self._launch(function.format(threads), operands, product(self.node.shape[:-1]), threads, room)

    def divided(self, count: str, choose: str, operands: Operands) -> list[Launch]:
        """Several blocks for each row of keys of four bytes, whose lists a launch before has cleared."""
        items, room = product(self.node.shape[:-1]) * ((self.n + _PART) // _PART), room_for(self.k, maximum(self.n), 8)
        return [self._launch(count, operands, items, 512, 0), self._launch(choose, operands, items, 512, room)]

    def _launch(self, function: str, operands: Operands, items: Extent, threads: int, room: int) -> Launch:
        template = Template(self.file, function, (str(self.k), *([str(room)] if room else [])))
        shared, guard = room * (self.size + 4), as_guard(self.guard)
        return Launch(template, operands, items=items, threads=threads, shared_bytes=shared, guard=guard, nodes=(self.node,))


def _calls(node: Node, context: Context) -> Sequence[Call]:
    (x,), k, rows, n = node.inputs, node.attrs["k"], product(node.shape[:-1]), node.inputs[0].shape[-1]
    size, most = key_bytes(x), maximum(n)
    operands: Operands = {"x": Ref(x), "y": Ref(node)}
    if context.by_row:  # a step of a row program
        return [Call(emit_best, operands, {"best": k}, items=rows, grain=max(1, CHUNK // max(k * most, 1)), nodes=(node,))]
    if k > _MOST[size]:
        return sorting(node, descending=True, select=True)
    if most <= _OF_WARPS[0] and k <= _OF_WARPS[1]:
        return [_by_warps(node, k, most)]
    few, long = (rows <= FEW, n >= LONG + 1) if size == 4 and most > LONG else (False, False)
    split, selecting = few & long, Selecting(node, FILE, k, n, size)
    if split is False:
        return [selecting.by_block("top_k_of_blocks<{}>", operands, few=maximum(rows) <= FEW)]
    made: list[Launch] = []
    for guard, is_few in ((few & (n <= LONG), True), (rows >= FEW + 1, False)):
        if guard is not False:
            made.append(replace(selecting, guard=guard).by_block("top_k_of_blocks<{}>", operands, few=is_few))
    lists = Ref(Buffer(min(FEW, maximum(rows)) * lists_bytes(k), "lists"))
    cleared: Operands = {"memory": lists, "y": Ref(node)}
    clear = Template(FILE, "top_k_clear", (str(k),))
    made.append(Launch(clear, cleared, items=rows * 8, threads=512, guard=as_guard(split), nodes=(node,)))
    return made + replace(selecting, guard=split).divided("top_k_count", "top_k_choose", {**operands, "memory": lists})


def _by_warps(node: Node, k: int, n: int) -> Launch:
    each = power_of_two(-(-max(n, 1) // 32))
    template = Template(FILE, f"top_k_of_warps<{each}>", (str(k),))
    operands = {"x": Ref(node.inputs[0]), "y": Ref(node)}
    return Launch(template, operands, items=product(node.shape[:-1]), grain=4, threads=128, nodes=(node,))


def _by_row(node: Node) -> bool:
    (x,) = node.inputs
    return selects(x.dtype, x.shape[-1], node.attrs["k"])


top_k.kernels["cuda"] = NodeKernel(_calls, by_row=_by_row)
