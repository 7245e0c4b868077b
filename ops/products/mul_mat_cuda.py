"""mul_mat on CUDA: a few rows against the weights as they are held, many by tensor cores, and everything exactly in f32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tensorgraph.backends.cuda.launches import Buffer, Call, Context, Launch, NodeKernel, Ref, Template
from tensorgraph.backends.cuda.weights import LAYOUT, reads_planes
from tensorgraph.dims import ALWAYS, Extent, Guard, maximum, product
from tensorgraph.graph import Node
from tensorgraph.ops.products.mat_vec_cuda import THREADS, plan_vec
from tensorgraph.ops.products.mul_mat import mul_mat

FILE = "tensorgraph.ops.products:mul_mat.cu"
FEW = 8
"""Rows up to which each weight is read once and multiplied by all of them."""
FEW_EXACT = 4
"""Where they are decoded to f32: of more rows, there would be no registers to hold."""
STEP = 32
"""Elements of K that tiles take at once."""
SIDE = 64
"""Rows of either operand in a tile of f32."""
ROWS_THREADS = 256
PIECE = 64
"""Units of a row that a block makes ready for mat-vec kernels."""


def reads(node: Node, slot: str) -> tuple[str, ...]:
    return reads_planes(node.at("a")) if slot == "a" else ()


def calls(node: Node, context: Context) -> Sequence[Call]:
    a, b = node.inputs
    planes, known = context.layout(a) == LAYOUT, a.base.op == "constant"
    single = product(a.shape[:-2]) == 1
    batch, n_rows = (1, product(b.shape[:-1])) if single else (product(b.shape[:-2]), b.shape[-2])
    operands = {"a": Ref(a, LAYOUT if planes else "dense", known), "b": Ref(b, known=known), "y": Ref(node, known=known)}
    found: list[Call] = []
    vec = planes or a.index_map.strides[-1] == 1
    most = FEW_EXACT if planes and context.exact else FEW
    for tokens, guard in token_counts(n_rows) if vec else ():
        if tokens > most:
            continue
        plan = plan_vec(a.dtype, planes, context.exact, a.shape[-2], b.shape[-1], tokens)
        function = f"mul_mat_few<{plan.lanes}, {plan.depth}, {plan.rows}, {plan.x}, {literal(single)}>"
        items, ready = batch * up(a.shape[-2], plan.per_block), None
        if not plan.fits:
            ready = Ref(Buffer(batch * (-(-plan.units * plan.unit_bytes // 16) * 16), "x"))
            template = Template(FILE, f"mul_mat_x<{plan.x}, {literal(single)}>")
            pieces = batch * n_rows * up(plan.units, PIECE)
            found += guarded(Launch(template, {"b": operands["b"], "to": ready}, items=pieces, threads=THREADS), guard, node)
        template = Template(FILE, function, (str(plan.chunk),), resident=plan.resident)
        given = {"a": operands["a"], "b": operands["b"], "ready": ready, "y": operands["y"]}
        few = Launch(template, given, items=items, threads=THREADS, shared_bytes=plan.shared_bytes if plan.fits else 0)
        found += guarded(few, guard, node)
    many = n_rows > most if vec else True
    if context.exact or not (vec and (planes or a.dtype.block_bytes == 2)):
        tiles = batch * up(n_rows, SIDE) * up(a.shape[-2], SIDE)
        whole = Launch(Template(FILE, f"mul_mat_exact<{literal(single)}>", resident=2), operands, items=tiles, threads=2 * SIDE)
        return found + guarded(whole, many, node)
    padded = -(-maximum(b.shape[-1]) // STEP) * STEP
    brain = a.dtype.name == "bf16"
    rows = Ref(prepared(batch * n_rows, padded))
    written = Launch(
        Template(FILE, f"mul_mat_rows<{literal(brain)}>", (str(padded),), resident=4),
        {"b": operands["b"], "rows": rows},
        items=batch * n_rows,
        threads=ROWS_THREADS,
    )
    found += guarded(written, many, node)
    for tiling, guard in tilings(n_rows, many, known):
        function = f"mul_mat_many<{tiling.constants}, {literal(single)}>"
        items = batch * up(n_rows, tiling.tokens) * up(a.shape[-2], tiling.rows)
        operands_of = {"a": operands["a"], "b": operands["b"], "rows": rows, "y": operands["y"]}
        template = Template(FILE, function, (str(padded),), resident=tiling.resident)
        found += guarded(Launch(template, operands_of, items=items, threads=tiling.threads), guard, node)
    return found


def token_counts(n_rows: Extent) -> Sequence[tuple[int, Guard | bool]]:
    """Numbers of rows that mat-vec kernels are made for, and when each is taken."""
    pair, four, eight = (n_rows >= 2) & (n_rows <= 2), (n_rows >= 3) & (n_rows <= 4), (n_rows >= 5) & (n_rows <= FEW)
    return [(1, n_rows <= 1), (2, pair), (4, four), (8, eight)]


@dataclass(frozen=True)
class Tiling:
    """A tile of a product (`tg_mma_tile`): rows of activations and of weights, warps along the former, steps that are on their
    way of either, and blocks of a multiprocessor."""

    tokens: int
    rows: int
    warps: int
    stages: int
    depth: int
    resident: int

    @property
    def constants(self) -> str:
        return f"{self.tokens}, {self.rows}, {self.warps}, {self.stages}, {self.depth}"

    @property
    def threads(self) -> int:
        return 2 * self.rows


def tilings(n_rows: Extent, many: Guard | bool, known: bool) -> Sequence[tuple[Tiling, Guard | bool]]:
    """Tiles, and when each is taken; large ones leave no registers for strides of matrices that are not known."""
    small, middle, large = Tiling(32, 64, 1, 4, 4, 2), Tiling(64, 64, 2, 4, 2, 2), Tiling(128, 128, 2, 2, 0, 2)
    if not known:
        return [(small, many & (n_rows <= 32)), (middle, n_rows > 32)]
    return [(small, many & (n_rows <= 32)), (middle, (n_rows > 32) & (n_rows <= 256)), (large, n_rows > 256)]


def prepared(n_rows: Extent, padded: int) -> Buffer:
    """Rows in 16 bits, and an exponent for each (`Prepared`)."""
    return Buffer(n_rows * (2 * padded + 4), "rows")


def up(extent: Extent, step: int) -> Extent:
    """How many steps go over an extent."""
    return (extent + (step - 1)) // step


def literal(value: bool) -> str:
    return str(value).lower()


def guarded(call: Launch, guard: Guard | bool, node: Node) -> list[Call]:
    """A node's call for the steps of a guard; none where that is known to be false."""
    return [replace(call, nodes=(node,), guard=guard if isinstance(guard, Guard) else ALWAYS)] if guard is not False else []


mul_mat.kernels["cuda"] = NodeKernel(calls, reads=reads)
