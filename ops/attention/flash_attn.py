"""Attention over one or more streams of rows, with its masks as predicates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tensorgraph.dims import Bindings, Extent, Shape, divide_exact, evaluate, shape_text
from tensorgraph.dtypes import DType, f32
from tensorgraph.errors import AttributeValueError, DTypeError, GraphError, ShapeError
from tensorgraph.graph import Node
from tensorgraph.op import Attr, Op, node_bytes
from tensorgraph.ops.attention.attend import Rule, attend
from tensorgraph.ops.cases import INTS, a_type, indices
from tensorgraph.source import source_line

Array = np.ndarray[Any, Any]


class Segment(NamedTuple):
    """One stream that queries attend to, and which of its rows they see.

    Row s is visible to query t iff all that is given holds: `seq[s] == seq[t]`; `(pos[s] + 1) * every - 1 <= pos[t]`
    where causal; `pos[s] > pos[t] - window`; s is in `ids[t]` (-1 is none). `mask` is added to the scaled product.

    Shapes: k [S, Hkv, Dk], v [S, Hkv, Dv] (None: the first d_v channels of k), pos, seq [S], ids [T, K], mask [T, S] or
    [H, T, S]. S may be 0.
    """

    k: Node
    v: Node | None = None
    pos: Node | None = None
    seq: Node | None = None
    window: int | None = None
    every: int = 1
    causal: bool = True
    ids: Node | None = None
    mask: Node | None = None


flash_attn = Op(
    "flash_attn",
    attrs={
        "scale": Attr(float),
        "softcap": Attr(float, 0.0, low=0.0),
        "d_v": Attr(int, None, low=0),
        "segments": Attr(tuple),
    },
    source="arXiv:2205.14135; sinks arXiv:2309.17453; ggml_flash_attn_ext",
)
"""`soft_max(cap(scale * q k^T) + mask) v`: one soft-max over the visible rows of all segments together.

Call: `flash_attn(q, *segments, scale, softcap=0.0, sinks=None, pos=None, seq=None, d_v=None)`, `segments` of `Segment`.
Head h reads kv head `h // (H / Hkv)`. `cap(x)` is `softcap * tanh(x / softcap)` where softcap is not 0. A sink is one
more logit of its head, in the maximum and the denominator only. A query that sees no row gives 0.

Shapes: q [T, H, Dk], sinks [H], pos, seq [T] -> [T, H, Dv].
Dtypes: any float -> f32; sums in f32.
Raises: InputError, when run, for an id below -1 or not below S.
"""


@flash_attn.prepare
def prepare(
    q: Node,
    *segments: Segment,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Node | None = None,
    pos: Node | None = None,
    seq: Node | None = None,
    d_v: int | None = None,
) -> tuple[dict[str, Node | None], dict[str, Any]]:
    if scale is None:
        raise AttributeValueError(f"[flash_attn] scale is missing ({source_line()})")
    slots: dict[str, Node | None] = {"q": q, "sinks": sinks, "pos": pos, "seq": seq}
    rules = []
    for i, s in enumerate(segments):
        if not isinstance(s, Segment):
            raise GraphError(f"[flash_attn] wanted a Segment after q; got {s!r} ({source_line()})")
        for slot in ("k", "v", "pos", "seq", "ids", "mask"):
            slots[f"{slot}{i}"] = getattr(s, slot)
        rules.append((s.every, s.window, s.causal))
    return slots, {"scale": scale, "softcap": softcap, "d_v": d_v, "segments": tuple(rules)}


@flash_attn.shape
def shape(slots: Mapping[str, Node], attrs: Mapping[str, Any]) -> tuple[Shape, DType]:
    if "q" not in slots or not attrs["segments"]:
        raise GraphError(f"[flash_attn] wanted q and at least one segment ({source_line()})")
    q = slots["q"]
    if len(q.shape) != 3:
        raise ShapeError(f"[flash_attn] q must be [T, H, Dk]; got {shape_text(q.shape)} ({source_line()})")
    n_tokens, n_heads, d_k = q.shape
    width: Extent | None = None
    for i, (every, window, causal) in enumerate(attrs["segments"]):
        k = slots.get(f"k{i}")
        n_kv = slots["k0"].shape[1] if i and len(slots["k0"].shape) == 3 else None
        fits = k is not None and len(k.shape) == 3 and k.shape[2] == d_k
        if k is None or not fits or divide_exact(n_heads, k.shape[1]) is None or n_kv not in (None, k.shape[1]):
            wanted = f"[S, {f'a divisor of {n_heads}' if n_kv is None else n_kv}, {d_k}]"
            got = "none" if k is None else shape_text(k.shape)
            raise ShapeError(f"[flash_attn] k{i} must be {wanted}; got {got} ({source_line()})")
        v = slots.get(f"v{i}")
        d_v: Extent = v.shape[-1] if v is not None else d_k if attrs["d_v"] is None else attrs["d_v"]
        if attrs["d_v"] not in (None, d_v) or width not in (None, d_v):
            wide = attrs["d_v"] if width is None else width
            raise ShapeError(f"[flash_attn] values must be {wide} wide; segment {i}'s are {d_v} ({source_line()})")
        if v is None and isinstance(d_v, int) and isinstance(d_k, int) and d_v > d_k:
            raise ShapeError(f"[flash_attn] d_v must be at most k{i}'s width {d_k}; got {d_v} ({source_line()})")
        width = d_v
        n_rows = k.shape[0]
        ids = slots.get(f"ids{i}")
        wanted_shapes = {f"v{i}": (n_rows, k.shape[1], d_v), f"pos{i}": (n_rows,), f"seq{i}": (n_rows,)}
        if ids is not None:
            wanted_shapes[f"ids{i}"] = (n_tokens, ids.shape[-1])
        _check(slots, wanted_shapes)
        mask = slots.get(f"mask{i}")
        if mask is not None and mask.shape not in ((n_tokens, n_rows), (n_heads, n_tokens, n_rows)):
            wanted = f"{shape_text((n_tokens, n_rows))} or {shape_text((n_heads, n_tokens, n_rows))}"
            raise ShapeError(f"[flash_attn] mask{i} must be {wanted}; got {shape_text(mask.shape)} ({source_line()})")
        _check_predicates(slots, i, every, window, causal)
    _check(slots, {"sinks": (n_heads,), "pos": (n_tokens,), "seq": (n_tokens,)})
    assert width is not None
    return (n_tokens, n_heads, width), f32


def _check(slots: Mapping[str, Node], wanted: Mapping[str, Shape]) -> None:
    for slot, extents in wanted.items():
        if slot in slots and slots[slot].shape != extents:
            got = shape_text(slots[slot].shape)
            raise ShapeError(f"[flash_attn] {slot} must be {shape_text(extents)}; got {got} ({source_line()})")
    for slot, node in slots.items():
        is_index = slot.rstrip("0123456789") in ("pos", "seq", "ids")
        if node.dtype.kind != "int" if is_index else not node.dtype.is_float:
            kind = "int" if is_index else "float"
            raise DTypeError(f"[flash_attn] {slot} must be {kind}; got {node.dtype} ({source_line()})")


def _check_predicates(slots: Mapping[str, Node], i: int, every: Any, window: Any, causal: Any) -> None:
    """A predicate whose one side is missing would silently not restrict anything."""
    if not isinstance(every, int) or every < 1 or not (window is None or (isinstance(window, int) and window >= 1)):
        given = f"every={every}, window={window}"
        raise GraphError(f"[flash_attn] segment {i} wanted every >= 1 and window >= 1; got {given} ({source_line()})")
    if ("seq" in slots) != (f"seq{i}" in slots):
        wanted = f"seq of the queries and of segment {i}, or neither"
        raise GraphError(f"[flash_attn] wanted {wanted}; got one of them ({source_line()})")
    sides = ("pos" in slots) + (f"pos{i}" in slots)
    if (window is not None and sides < 2) or (causal and sides == 1):
        wanted = f"pos of the queries and of segment {i}, which is causal or has a window"
        raise GraphError(f"[flash_attn] wanted {wanted}; got {('neither', 'one of them')[sides]} ({source_line()})")


@flash_attn.reference
def reference(slots: Mapping[str, Array], *, scale: float, softcap: float, d_v: int | None, segments: Sequence[Rule]) -> Array:
    return attend(slots, scale, softcap, d_v, segments)


@flash_attn.flops
def flops(node: Node) -> Extent:
    n_tokens, n_heads, d_v = node.shape
    rows: Extent = 0
    for i in range(len(node.attrs["segments"])):
        ids = node.at(f"ids{i}")
        rows = rows + (node.inputs[node.slots.index(f"k{i}")].shape[0] if ids is None else ids.shape[1])
    return n_tokens * n_heads * rows * (node.inputs[0].shape[2] + d_v) * 2


@flash_attn.bytes_moved
def bytes_moved(node: Node, dims: Bindings) -> int:
    """Of rows that are listed as many as are, each once."""
    return sum(node_bytes(x, dims) for x in (node, *node.inputs)) - sum(unread(node, dims).values())


def unread(node: Node, dims: Bindings) -> dict[Node, int]:
    """Of what segments with lists have of each row, the bytes of the rows that are in no list, where all lists differ."""
    found = {}
    for i in range(len(node.attrs["segments"])):
        ids = node.at(f"ids{i}")
        for rows in (node.at(f"{slot}{i}") for slot in ("k", "v", "pos", "seq")):
            if ids is not None and rows is not None:
                n_rows = evaluate(rows.shape[0], dims)
                found[rows] = node_bytes(rows, dims) // max(n_rows, 1) * max(0, n_rows - evaluate(ids.size, dims))
    return found


@flash_attn.law
def segments_in_any_order(run: Callable[..., Array], slots: Mapping[str, Array], **attrs: Any) -> None:
    """There is one soft-max over all segments: their order is free, and no result exceeds the largest value."""
    rules = attrs["segments"]
    turned = {slot: x for slot, x in slots.items() if not slot[-1].isdigit()}
    for i in range(len(rules)):
        turned |= {f"{slot[:-1]}{len(rules) - 1 - i}": x for slot, x in slots.items() if slot.endswith(str(i))}
    y = run(slots, **attrs)
    bound = max(np.abs(np.float64(x)).max(initial=0.0) for slot, x in slots.items() if slot[0] in "kv")
    np.testing.assert_allclose(run(turned, **{**attrs, "segments": rules[::-1]}), y, rtol=0, atol=1e-4 * bound)
    assert np.all(np.abs(y) <= bound * (1 + 1e-5))


@flash_attn.cases
def cases(draw: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    from hypothesis import strategies as st

    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_kv, group, n_tokens = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 2, 4))), draw(st.integers(0, 6))
    d_k = draw(st.sampled_from((1, 8, 17, 64)))
    d_v = draw(st.integers(1, d_k))
    half = a_type(draw)
    predicates, n_seq = draw(st.booleans()), draw(st.integers(1, 3))
    slots: dict[str, Array] = {"q": rng.standard_normal((n_tokens, n_kv * group, d_k)).astype(a_type(draw))}
    if draw(st.booleans()):
        slots["sinks"] = rng.standard_normal(n_kv * group).astype(a_type(draw))
    if predicates:
        slots["pos"] = rng.integers(0, 40, n_tokens).astype(a_type(draw, INTS))
        slots["seq"] = rng.integers(0, n_seq, n_tokens).astype(a_type(draw, INTS))
    rules = []
    for i in range(draw(st.integers(1, 3))):
        n = draw(st.sampled_from((0, 1, 5, 16, 37)))
        slots[f"k{i}"] = rng.standard_normal((n, n_kv, d_k)).astype(half)
        if draw(st.booleans()):
            slots[f"v{i}"] = rng.standard_normal((n, n_kv, d_v)).astype(half)
        if predicates:
            slots[f"pos{i}"] = rng.permutation(n).astype(a_type(draw, INTS))
            slots[f"seq{i}"] = rng.integers(0, n_seq, n).astype(a_type(draw, INTS))
            rules.append((draw(st.sampled_from((1, 4))), draw(st.sampled_from((None, 1, 9))), draw(st.booleans())))
        else:
            rules.append((1, None, True))
        if draw(st.booleans()):
            least = draw(st.sampled_from((-1, 0))) if n else -1
            slots[f"ids{i}"] = indices(draw, least, n, (n_tokens, draw(st.sampled_from((1, 3, 8)))))
        if draw(st.booleans()):
            heads = draw(st.sampled_from(((), (n_kv * group,))))
            mask = rng.standard_normal((*heads, n_tokens, n)).astype(half)
            slots[f"mask{i}"] = np.where(rng.random(mask.shape) < 0.3, np.asarray(-np.inf, half), mask)
    attrs = {"scale": 0.3, "softcap": draw(st.sampled_from((0.0, 2.0))), "d_v": d_v, "segments": tuple(rules)}
    return slots, attrs


@flash_attn.typical
def typical(rng: np.random.Generator) -> list[tuple[dict[str, Array], dict[str, Any]]]:
    """One new token after 32767 others, and a prompt of 512."""

    def one(n_tokens: int, n_rows: int) -> tuple[dict[str, Array], dict[str, Any]]:
        pos, row_pos = (np.arange(n_rows - n, n_rows, dtype=np.int32) for n in (n_tokens, n_rows))
        slots = {"q": np.zeros((n_tokens, 32, 128), np.float32), "pos": pos, "seq": np.zeros_like(pos)}
        slots |= {name: np.zeros((n_rows, 8, 128), np.float16) for name in ("k0", "v0")}
        return slots | {"pos0": row_pos, "seq0": np.zeros_like(row_pos)}, {"scale": 128**-0.5, "segments": ((1, None, True),)}

    return [one(1, 32768), one(512, 512)]
