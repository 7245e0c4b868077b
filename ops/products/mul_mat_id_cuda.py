"""mul_mat_id on CUDA: few pairs of a token and an expert each by themselves, more of them sorted by expert, in tiles."""

from __future__ import annotations

from collections.abc import Sequence

from tensorgraph.backends.cuda.launches import Buffer, Call, Context, Launch, NodeKernel, Ref, Template
from tensorgraph.backends.cuda.weights import LAYOUT
from tensorgraph.dims import Extent, Guard, maximum, product
from tensorgraph.graph import Node
from tensorgraph.ops.products.mat_vec_cuda import THREADS, plan_vec
from tensorgraph.ops.products.mul_mat_cuda import ROWS_THREADS, SIDE, STEP, guarded, literal, prepared, reads, tilings, up
from tensorgraph.ops.products.mul_mat_id import mul_mat_id

FILE = "tensorgraph.ops.products:mul_mat_id.cu"
MESSAGES = ("[mul_mat_id] ids must be below {1}, or -1 for none; got {0}",)
FEW, MOST_FEW = 16, 64
"""Pairs up to which each reads its expert's weights by itself: as many as there are experts, within these bounds."""
SORT_THREADS = 1024
MOST_EXPERTS = 10000
"""That the block which sorts has shared memory for."""


def calls(node: Node, context: Context) -> Sequence[Call]:
    a, b, ids = node.inputs
    planes, known = context.layout(a) == LAYOUT, a.base.op == "constant"
    n_experts, height, width = maximum(a.shape[0]), a.shape[1], b.shape[2]
    pairs = product(ids.shape)
    operands = {"a": Ref(a, LAYOUT if planes else "dense", known), "b": Ref(b), "ids": Ref(ids), "y": Ref(node, known=known)}
    few: Guard | bool = pairs <= min(max(FEW, n_experts), MOST_FEW) if n_experts <= MOST_EXPERTS else True
    many: Guard | bool = pairs > min(max(FEW, n_experts), MOST_FEW) if n_experts <= MOST_EXPERTS else False
    plan = plan_vec(a.dtype, planes, context.exact, height * ids.shape[1], width, 1)
    function = f"mul_mat_id_few<{plan.lanes}, {plan.depth}, {plan.rows}, {plan.x}>"
    found = guarded(
        Launch(
            Template(FILE, function, (str(plan.chunk),), MESSAGES, resident=plan.resident),
            operands,
            items=pairs * up(height, plan.per_block),
            threads=THREADS,
            shared_bytes=plan.shared_bytes,
        ),
        few,
        node,
    )
    if context.exact or not (planes or a.dtype.block_bytes == 2 and a.index_map.strides[-1] == 1):
        order, sort = sorted_pairs(a, ids, SIDE)
        template = Template(FILE, "mul_mat_id_exact", resident=2)
        tiles = most_pieces(a.shape[0], pairs, SIDE) * up(height, SIDE)
        given = {"a": operands["a"], "b": operands["b"], "ids": operands["ids"], "order": order, "y": operands["y"]}
        whole = Launch(template, given, items=tiles, threads=2 * SIDE)
        return found + guarded(sort, many, node) + guarded(whole, many, node)
    padded = -(-maximum(width) // STEP) * STEP
    n_rows, brain = b.shape[0] * b.shape[1], a.dtype.name == "bf16"
    rows = Ref(prepared(n_rows, padded))
    written = Launch(
        Template(FILE, f"mul_mat_id_rows<{literal(brain)}>", (str(padded),), resident=4),
        {"b": operands["b"], "ids": operands["ids"], "n_experts": Ref(a.shape[0]), "rows": rows, "y": operands["y"]},
        items=n_rows + pairs,
        threads=ROWS_THREADS,
    )
    found += guarded(written, many, node)
    each = pairs // max(n_experts, 1)  # of an expert, where all have as many
    for tiling, guard in tilings(each, many, known):
        guard = guard & many if not isinstance(guard, bool) else many if guard else False
        order, sort = sorted_pairs(a, ids, tiling.tokens)
        given = {name: operands[name] for name in ("a", "b", "ids")} | {"order": order, "rows": rows, "y": operands["y"]}
        template = Template(FILE, f"mul_mat_id_many<{tiling.constants}>", (str(padded),), resident=tiling.resident)
        items = most_pieces(a.shape[0], pairs, tiling.tokens) * up(height, tiling.rows)
        found += guarded(sort, guard, node) + guarded(Launch(template, given, items=items, threads=tiling.threads), guard, node)
    return found


def most_pieces(n_experts: Extent, n_pairs: Extent, tokens: int) -> Extent:
    return n_pairs // tokens + n_experts


def sorted_pairs(a: Node, ids: Node, tokens: int) -> tuple[Ref, Launch]:
    """The order of pairs by expert, in pieces of at most so many, and what makes it."""
    pairs = product(ids.shape)
    order = Ref(Buffer((most_pieces(a.shape[0], pairs, tokens) * 4 + pairs + 4) * 4, "order"))
    template = Template(FILE, "mul_mat_id_sort", (str(tokens),), MESSAGES)
    given = {"ids": Ref(ids), "order": order, "n_experts": Ref(a.shape[0])}
    sort = Launch(template, given, threads=SORT_THREADS, shared_bytes=4 * maximum(a.shape[0]))
    return order, sort


mul_mat_id.kernels["cuda"] = NodeKernel(calls, reads=reads)
