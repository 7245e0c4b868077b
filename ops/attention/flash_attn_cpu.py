"""flash_attn on the CPU: over dense streams by pages where it can, any other way by the general kernel."""

from __future__ import annotations

from collections.abc import Sequence

from tensorgraph.backends.cpu.kernel import Buffer, Call, Context, NodeKernel, Ref
from tensorgraph.dims import Guard, maximum, product
from tensorgraph.graph import Node
from tensorgraph.ops.attention.attend_cpu import general_calls, general_reads
from tensorgraph.ops.attention.candidates_cpu import FORMS
from tensorgraph.ops.attention.flash_attn import flash_attn
from tensorgraph.ops.attention.paged_cpu import Heads, emit_combine
from tensorgraph.ops.attention.paged_slices_cpu import emit_slices, kv_heads_at_once, slice_scratch, slices_of
from tensorgraph.ops.attention.paged_tiles_cpu import emit_tiles
from tensorgraph.ops.attention.row_tiles_cpu import row_calls, row_heads
from tensorgraph.ops.attention.tiles_cpu import tile_call

FEW = 4
"""Up to so many tokens, rows are divided among threads; above, tokens are."""


def heads_of(node: Node) -> Heads | None:
    """The extents of an attention that can be computed by pages; None where it takes more."""
    q, k0 = node.at("q"), node.at("k0")
    assert q is not None and k0 is not None
    n_heads, d_k, n_kv, d_v = q.shape[1], q.shape[2], k0.shape[1], node.shape[2]
    if not (isinstance(n_heads, int) and isinstance(d_k, int) and isinstance(n_kv, int) and isinstance(d_v, int)):
        return None
    fits = q.index_map.strides[-1] == 1 and q.index_map.strides[-2] == d_k and q.dtype.name == "f32" and d_v % 16 == 0 and d_v > 0
    group = n_heads // max(n_kv, 1)
    rules = node.attrs["segments"]
    for i, (_, window, causal) in enumerate(rules):
        k, v = node.at(f"k{i}"), node.at(f"v{i}")
        streams = all(x is not None and x.op in ("append", "read") for x in (k, v))
        known = "rows" in general_reads(node, f"k{i}") and (not (causal or window) or node.at(f"pos{i}") is not None)
        fits = fits and streams and known and node.at(f"ids{i}") is None
    if not fits or group > 16 or n_kv == 0:
        return None
    return Heads(n_kv, group, d_k, d_v, node.attrs["scale"], node.attrs["softcap"], rules)


def reads(node: Node, slot: str) -> tuple[str, ...]:
    """K with 16 rows side by side and V in panels, where all of it is read by pages."""
    if heads_of(node) is not None and slot[0] in "kv":
        return ("rows16",) if slot[0] == "k" else ("panels",)
    return general_reads(node, slot)


def paged(node: Node, context: Context) -> Heads | None:
    """`heads_of` where the streams are held as the paged kernels read them."""
    heads = heads_of(node)
    if heads is None:
        return None
    for i in range(len(heads.rules)):
        k, v = node.at(f"k{i}"), node.at(f"v{i}")
        assert k is not None and v is not None
        if context.layout(k) != "rows16" or context.layout(v) != "panels":
            return None
    return heads


def streams_of(node: Node) -> dict[str, Ref | None]:
    """The operands that paged kernels share."""
    refs: dict[str, Ref | None] = {name: None if (x := node.at(name)) is None else Ref(x) for name in ("seq", "pos", "sinks")}
    for i in range(len(node.attrs["segments"])):
        k, v = node.at(f"k{i}"), node.at(f"v{i}")
        assert k is not None and v is not None
        refs |= {f"k{i}": Ref(k, "rows16"), f"v{i}": Ref(v, "panels")}
    return refs


def slices_call(node: Node, heads: Heads, guard: Guard) -> tuple[Call, Ref, Ref]:
    """The call that leaves partial results; the buffer of these, and the number of slices."""
    q = node.at("q")
    assert q is not None
    n_slices = sum((slices_of(node.inputs[node.slots.index(f"k{i}")].shape[0]) for i in range(len(heads.rules))), start=0)
    part = Ref(Buffer(min(FEW, maximum(q.shape[0])) * heads.n_heads * maximum(n_slices) * heads.partial * 4, "partial"))
    slices = Ref(n_slices)
    operands = {"q": Ref(q, known=True), **streams_of(node), "part": part, "slices": slices}
    k0 = node.at("k0")
    assert k0 is not None
    n_kv = kv_heads_at_once(heads, k0.dtype)
    call = Call(
        emit_slices,
        operands,
        {"heads": heads, "n_kv": n_kv},
        items=product((q.shape[0], heads.n_kv, n_slices)),
        scratch_bytes=slice_scratch(heads, n_kv),
        guard=guard,
        nodes=(node,),
    )
    return call, part, slices


def tiles_call(node: Node, heads: Heads, guard: Guard) -> Call:
    """The call for many tokens."""
    return tile_call(emit_tiles, node, heads, streams_of(node), guard)


def calls(node: Node, context: Context) -> Sequence[Call]:
    heads = paged(node, context)
    if heads is None:
        by_row = row_heads(node, context)
        return general_calls(node, context) if by_row is None else row_calls(node, by_row, FEW, context)
    n_tokens = node.shape[0]
    few, many = n_tokens <= FEW, n_tokens > FEW
    made: list[Call] = []
    if few is not False:
        slices, part, number = slices_call(node, heads, Guard() if few is True else few)
        operands = {"part": part, "slices": number, "sinks": slices.operands["sinks"], "y": Ref(node, known=True)}
        items = product((n_tokens, heads.n_heads))
        made += [slices, Call(emit_combine, operands, {"heads": heads}, items=items, guard=slices.guard, nodes=(node,))]
    if many is not False:
        made.append(tiles_call(node, heads, Guard() if many is True else many))
    return made


def has_lists(node: Node) -> bool:
    return any(slot.startswith("ids") for slot in node.slots)


flash_attn.kernels["cpu"] = NodeKernel(calls, reads=reads, forms=FORMS, measures=has_lists)
