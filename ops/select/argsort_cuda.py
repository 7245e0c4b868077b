"""argsort on CUDA: rows sorted in shared memory, longer ones in pieces that are merged."""

from __future__ import annotations

from collections.abc import Sequence

from tensorgraph.backends.cuda.launches import Buffer, Call, Context, Launch, NodeKernel, Ref, Template, c_name
from tensorgraph.dims import ALWAYS, Guard, maximum, product
from tensorgraph.graph import Node
from tensorgraph.ops.select.argsort import argsort

FILE = "tensorgraph.ops.select:argsort.cu"
_PIECES = {4: 4096, 8: 2048}
"""Pairs that are sorted in shared memory, by the bytes of a key."""
_TILE = 256  # elements of a block of a merge


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def key_bytes(x: Node) -> int:
    """Of what elements are compared as: all floats but f64 in f32."""
    return 8 if c_name(x.dtype) == "double" else 4


def as_guard(given: Guard | bool) -> Guard:
    """Of what does hold in some steps."""
    return given if isinstance(given, Guard) else ALWAYS


def sorting(node: Node, *, descending: bool, select: bool) -> list[Launch]:
    """Launches that write the order of each row of a node's input; with `select` its first places, and not of -inf and NaN."""
    (x,), n, size = node.inputs, node.inputs[0].shape[-1], key_bytes(node.inputs[0])
    piece, most = _PIECES[size], maximum(n)
    short, made = n <= piece, []
    if short is not False:
        made.append(_short(node, power_of_two(min(most, piece)), descending, select, as_guard(short)))
    if short is True:
        return made
    guard, rows = as_guard(n >= piece + 1), product(node.shape[:-1])
    room = maximum(rows) * most
    operands: dict[str, Ref | None] = {"x": Ref(x), "y": Ref(node), "memory": Ref(Buffer(2 * room * (size + 4), "pairs"))}

    def launch(
        function: str, numbers: Sequence[int], tile: int, threads: int, *, of_result: bool = False, shared: int = 0
    ) -> Launch:
        template = Template(FILE, function, (f"{room}LL", *map(str, numbers)))
        items = rows * (((node.shape[-1] if of_result else n) + (tile - 1)) // tile)
        return Launch(template, operands, items=items, threads=threads, shared_bytes=shared, guard=guard, nodes=(node,))

    made.append(launch(f"sort_pieces<512, {_bool(descending)}>", [piece], piece, 512, shared=piece * (size + 4)))
    passes = 0
    while piece << passes < most:
        made.append(launch("merge_pieces", [piece << passes, passes % 2], _TILE, _TILE))
        passes += 1
    made.append(launch(f"write_merged<{_bool(select)}>", [piece], 4 * _TILE, _TILE, of_result=True))
    return made


def _short(node: Node, room: int, descending: bool, select: bool, guard: Guard) -> Launch:
    (x,), threads = node.inputs, min(max(room // 2, 32), 512)
    function = f"sort_rows<{threads}, {_bool(descending)}, {_bool(select)}>"
    return Launch(
        Template(FILE, function, (str(room),)),
        {"x": Ref(x), "y": Ref(node)},
        items=product(node.shape[:-1]),
        threads=threads,
        shared_bytes=room * (key_bytes(x) + 4),
        guard=guard,
        nodes=(node,),
    )


def _bool(value: bool) -> str:
    return "true" if value else "false"


def _calls(node: Node, context: Context) -> Sequence[Call]:
    return sorting(node, descending=node.attrs["descending"], select=False)


argsort.kernels["cuda"] = NodeKernel(_calls)
