"""flash_attn on the CPU for whatever the op allows: any segments, dtypes, strides, masks and row lists, streams in place.

Many queries go through rows in one piece as `dense_tiles_cpu` says, unless there are masks or lists. Else one piece of work is a
token, a kv head and some of its query heads; or a few tokens, where few heads share a kv head. It goes in tiles through the rows
that the token sees, with a running soft-max in f32.

Rows that no token of a piece sees are not loaded. One that only some of them see gets no weight for the others, but may hold an
infinite number or NaN, which no weight makes 0: where a piece's result has a NaN, it is computed again token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tensorgraph.backends.cpu.functions import exp
from tensorgraph.backends.cpu.ir import F32, I1, I64, Int, Value
from tensorgraph.backends.cpu.kernel import CHUNK, Call, Context, Kernel, Ref, lay_out
from tensorgraph.backends.cpu.operands import Operand
from tensorgraph.dims import ALWAYS, Extent, Guard, maximum, product
from tensorgraph.dtypes import f32
from tensorgraph.graph import Node
from tensorgraph.ops.attention.attend import Rule
from tensorgraph.ops.attention.attend_rows_cpu import (
    Lists,
    Query,
    Segment,
    element_stride,
    list_ids,
    list_tile,
    one_for_all,
    span,
)
from tensorgraph.ops.attention.attend_tile_cpu import TILE, Heads, Logits, Rows, copy_padded, whole_vectors
from tensorgraph.ops.attention.dense_tiles_cpu import emit_dense_tiles
from tensorgraph.ops.attention.paged_cpu import Heads as Paged
from tensorgraph.ops.attention.tiles_cpu import tile_call

Slots = Mapping[str, "Operand | None"]
TOKENS = {1: 8, 2: 4, 3: 4, 4: 4}
"""By heads of a kv head: the tokens that go through dense rows together."""
FEW = 3
"""Up to so many tokens in a step, each goes by itself."""


@dataclass(frozen=True)
class Sizes:
    """The extents of an attention: None where only a step knows them, and the most that they can be.

    Attributes:
        tokens: of one piece of work, at most.
        heads: query heads of one piece, at most: those of all its tokens.
        pieces: of one kv head and its tokens.
        most_ids: rows that a token's list can name in any segment.
    """

    d_k: int | None
    d_v: int | None
    group: int | None
    most_d_k: int
    most_d_v: int
    most_ids: int
    tokens: int
    heads: int
    pieces: int

    @property
    def together(self) -> int:
        """Heads that share each load of a row."""
        return min(self.heads, 4) if self.heads != 3 else 4

    @property
    def count(self) -> int:
        """Heads that scratch has room for: the last is repeated where the number is not even."""
        return -(-self.heads // self.together) * self.together


def _rooms(s: Sizes) -> dict[str, int]:
    """What a chunk's scratch holds, in order, and its bytes."""
    d_k, d_v, heads = whole_vectors(s.most_d_k), whole_vectors(s.most_d_v), s.count
    return {
        "queries": heads * d_k * 4,
        "sums": heads * d_v * 4,
        "scores": heads * TILE * 4,
        "added": heads * TILE * 4,
        "seen": TILE,
        **dict.fromkeys(("tops", "totals", "factors"), heads * 4),
        **dict.fromkeys(("keys", "values"), (TILE + 8) * 8),
        "key copy": TILE * d_k * 4,
        "value copy": TILE * d_v * 4,
        "ids": (s.most_ids + 1) * 8,
        "bits": 0,  # the last: how long it is depends on the number of rows
    }


def _known(extent: Extent) -> int | None:
    return extent if isinstance(extent, int) else None


def sizes_of(node: Node) -> Sizes:
    q, k0 = node.at("q"), node.at("k0")
    assert q is not None and k0 is not None
    n_heads, n_kv = q.shape[1], k0.shape[1]
    group = n_heads // max(n_kv, 1) if isinstance(n_heads, int) and isinstance(n_kv, int) else None
    most = maximum(n_heads) if group is None else group
    pieces = 1 if group is None else -(-group // (16 if group >= 64 else 8))
    lists = [ids.shape[1] for i in range(len(node.attrs["segments"])) if (ids := node.at(f"ids{i}")) is not None]
    return Sizes(
        _known(q.shape[2]),
        _known(node.shape[2]),
        group,
        maximum(q.shape[2]),
        maximum(node.shape[2]),
        max((maximum(n) for n in lists), default=0),
        1,
        max(-(-most // max(pieces, 1)), 1),
        pieces,
    )


def stored(value: Node) -> Node:
    """The stream whose rows a value is, seen through a view that only splits them another way; else the value itself."""
    base = value.base
    same = value.index_map.is_dense and value.shape[:1] == base.shape[:1]
    return base if same and base.op in ("append", "read") else value


def general_reads(node: Node, slot: str) -> tuple[str, ...]:
    """Rows of a stream where they lie, if the positions and sequences of the segment are the stream's own."""
    value = node.at(slot)
    if slot[0] not in "kv" or value is None or stored(value).op not in ("append", "read"):
        return ()
    i = slot[1:]
    pos, seq = node.at(f"pos{i}"), node.at(f"seq{i}")
    own = seq is not None and is_of_rows(seq, "seq") and (pos is None or is_of_rows(pos, "pos"))
    return ("rows",) if own and node.at(f"mask{i}") is None else ()


def is_of_rows(vector: Node, what: str) -> bool:
    """Whether this is an input `rows.CLASS.pos` or `rows.CLASS.seq`, as `extents.step_inputs` gives them."""
    name: list[str] = vector.attrs["name"].split(".") if vector.op == "input" else []
    return len(name) == 3 and (name[0], name[2]) == ("rows", what)


def general_calls(node: Node, context: Context) -> Sequence[Call]:
    """One call, or one for few and one for many tokens.

    Of a stream that stays where it is, neither positions nor sequences of its rows are read.
    """
    sizes, rules = sizes_of(node), node.attrs["segments"]
    refs: dict[str, Ref | None] = {"y": Ref(node)}
    for slot, value in zip(node.slots, node.inputs, strict=True):
        refs[slot] = Ref(value, context.layout(stored(value)) if slot[0] in "kv" else "dense")
    alone, in_place = sizes.most_ids > 0 or sizes.group not in TOKENS, False
    for i in range(len(rules)):
        if any((ref := refs.get(f"{x}{i}")) is not None and ref.layout != "dense" for x in "kv"):
            refs.pop(f"seq{i}", None)
            refs.pop(f"pos{i}", None)
            alone = in_place = True
    few, many = node.shape[0] <= FEW, node.shape[0] > FEW
    tiled = None if in_place else _tiled(node, sizes)
    if tiled is None and (alone or sizes.group is None):
        return [_call(node, refs, sizes, ALWAYS)]
    made = [] if few is False else [_call(node, refs, sizes, ALWAYS if few is True else few)]
    guard = ALWAYS if many is True else many
    if guard is not False and tiled is not None:
        made.append(tile_call(emit_dense_tiles, node, tiled, {x: ref for x, ref in refs.items() if x not in "qy"}, guard))
    elif guard is not False and sizes.group is not None:
        n_tokens = TOKENS[sizes.group]
        made.append(_call(node, refs, replace(sizes, tokens=n_tokens, heads=n_tokens * sizes.group), guard))
    return made


def _tiled(node: Node, sizes: Sizes) -> Paged | None:
    """The extents of an attention whose queries can go through all rows in tiles: neither lists of rows nor masks."""
    q, k0, rules = node.at("q"), node.at("k0"), node.attrs["segments"]
    assert q is not None and k0 is not None
    n_kv, group, d_k, d_v = k0.shape[1], sizes.group, sizes.d_k, sizes.d_v
    if any(node.at(f"{name}{i}") is not None for i in range(len(rules)) for name in ("ids", "mask")):
        return None
    if not isinstance(n_kv, int) or not group or not d_k or not d_v or any(x.dtype.name == "f64" for x in node.inputs):
        return None
    return Paged(n_kv, group, d_k, d_v, node.attrs["scale"], node.attrs["softcap"], rules)


def _call(node: Node, refs: Mapping[str, Ref | None], sizes: Sizes, guard: Guard) -> Call:
    rules = node.attrs["segments"]
    k0 = node.at("k0")
    assert k0 is not None
    most_rows = max(maximum(x.shape[0]) for slot, x in zip(node.slots, node.inputs, strict=True) if slot[0] == "k")
    bits = (-(-most_rows // 512) + 1) * 64 if sizes.most_ids else 0
    attrs = {
        "scale": node.attrs["scale"],
        "softcap": node.attrs["softcap"],
        "rules": rules,
        "by_pos": tuple(node.at(f"pos{i}") is not None for i in range(len(rules))),
        "sizes": sizes,
    }
    tiles = (node.shape[0] + (sizes.tokens - 1)) // sizes.tokens
    work = sizes.heads * (sizes.most_d_k + sizes.most_d_v) * 16
    return Call(
        emit_attention,
        refs,
        attrs,
        items=product((tiles, k0.shape[1], sizes.pieces)),
        grain=max(1, CHUNK // max(work, 1)),
        scratch_bytes=lay_out(_rooms(sizes))[1] + bits,
        guard=guard,
        nodes=(node,),
    )


def emit_attention(
    k: Kernel, operands: Slots, *, scale: float, softcap: float, rules: Sequence[Rule], by_pos: Sequence[bool], sizes: Sizes
) -> None:
    """`flash_attn`; `by_pos`: which segments' rows have positions, whether those are read or not."""
    q, k0, y = _given(operands, "q"), _given(operands, "k0"), _given(operands, "y")
    sinks, pos, seq = (operands.get(name) for name in ("sinks", "pos", "seq"))
    scratch = k.scratch()
    at = {name: scratch + offset for name, offset in lay_out(_rooms(sizes))[0].items()}
    heads = _heads(k, sizes, q, y, at)
    segments = []
    for i, rule in enumerate(rules):
        keys = _given(operands, f"k{i}")
        others = (operands.get(f"{name}{i}") for name in ("pos", "seq", "ids", "mask"))
        segments.append(Segment(i, rule, by_pos[i], keys, operands.get(f"v{i}") or keys, *others))
    lists = Lists(*(at[name] for name in ("keys", "values", "added", "seen", "ids", "bits")))
    n_tokens, n_kv = k.i64(q.shape[0]), k0.shape[1]

    def attend(first: Value, count: Value, kv_head: Value, piece: Value) -> Value:
        """Heads of `count` tokens; returns whether a result is NaN (or infinite)."""
        group: Int = sizes.group if sizes.group is not None else k.i64(q.shape[1]) // n_kv
        skipped = piece * sizes.heads
        n_heads = k.i64(group) * count if sizes.tokens > 1 else k.min(k.i64(group) - skipped, sizes.heads)
        lanes = sizes.tokens if sizes.tokens > 1 else 0
        vectors = (_of_tokens(k, x, first, count, lanes) for x in (pos, seq))
        query = Query(first, kv_head, kv_head * group + skipped, group, n_heads, lanes, *vectors)
        _begin(k, heads, q, sinks, query)
        for segment in segments:
            _attend(k, heads, segment, query, lists, at, sizes, scale, softcap)
        return _finish(k, heads, y, query)

    with k.rows(((n_tokens + (sizes.tokens - 1)) // sizes.tokens, n_kv, sizes.pieces)) as (tile, kv_head, piece):
        if sizes.tokens == 1:
            with k.when(k.i64(q.shape[1]).gt(0)):
                attend(tile, k.i64(1), kv_head, piece)
        else:
            _attempts(k, tile * sizes.tokens, n_tokens, sizes.tokens, lambda first, count: attend(first, count, kv_head, piece))


def _attempts(k: Kernel, start: Value, n_tokens: Value, most: int, attend: Callable[[Value, Value], Value]) -> None:
    """All tokens of a tile at once; where that gives a NaN, each of them again by itself."""
    with k.loop(0, most + 1, 1, [k.const(0, I1)]) as loop:
        whole, (again,) = loop.i.eq(0), loop.values
        first = k.select(whole, start, start + loop.i - 1)
        count = k.select(whole, k.min(n_tokens - start, k.i64(most)), 1)
        wanted = whole | (again & first.lt(n_tokens))
        (found,) = k.either(wanted, lambda: [attend(first, count)], lambda: [again])
        loop.next(k.select(whole, found, again))


def _of_tokens(k: Kernel, numbers: Operand | None, first: Value, count: Value, lanes: int) -> Value | None:
    """The numbers of tokens, as `Query` has them."""
    if numbers is None:
        return None
    if not lanes:
        return k.convert(numbers.load([first]), I64)
    found = k.zero(I64.x(lanes))
    for lane in range(lanes):
        found = found.with_lane(lane, k.convert(numbers.load([first + k.min(count - 1, lane)]), I64))
    return found


def _given(operands: Slots, name: str) -> Operand:
    found = operands[name]
    assert found is not None
    return found


def _heads(k: Kernel, sizes: Sizes, q: Operand, y: Operand, at: Mapping[str, Value]) -> Heads:
    names = ("queries", "sums", "scores", "tops", "totals", "factors")
    d_k, d_v = (_vectors(k, known, shape) for known, shape in ((sizes.d_k, q.shape[2]), (sizes.d_v, y.shape[2])))
    strides = whole_vectors(sizes.most_d_k), whole_vectors(sizes.most_d_v)
    return Heads(k, sizes.count, sizes.together, d_k, strides[0], d_v, strides[1], *(at[name] for name in names))


def _vectors(k: Kernel, known: int | None, width: Int) -> Int:
    """A width rounded up to a whole number of vectors."""
    n = width if known is None else known
    return (n + (k.lanes - 1)) // k.lanes * k.lanes


def _begin(k: Kernel, heads: Heads, q: Operand, sinks: Operand | None, query: Query) -> None:
    """Queries in f32, sums of nothing; a sink is a row without a value."""
    with k.loop(0, heads.count) as loop:
        loop.next()
        token, head = query.head(k, loop.i)
        copy_padded(k, q.row([token, head]), heads.queries + loop.i * (heads.query_stride * 4), q.shape[2])
        top, total = k.const(-math.inf, F32), k.const(0.0, F32)
        if sinks is not None:
            top = k.convert(sinks.load([head]), F32)
            total = exp(k, top - k.select(top.eq(-math.inf), 0.0, top))
        k.store(top, heads.tops + loop.i * 4)
        k.store(total, heads.totals + loop.i * 4)
        with k.loop(0, heads.value_width, k.lanes) as channels:
            channels.next()
            k.store(k.zero(F32.x(k.lanes)), heads.sums + (loop.i * heads.value_stride + channels.i) * 4)


def _attend(
    k: Kernel,
    heads: Heads,
    segment: Segment,
    query: Query,
    lists: Lists,
    at: Mapping[str, Value],
    sizes: Sizes,
    scale: float,
    softcap: float,
) -> None:
    """Go through the rows of a segment, tile by tile."""
    rows = span(k, segment, query)
    shared = segment.values is segment.keys
    keys = _source(k, segment.keys, sizes.d_k, sizes.heads, lists.keys, at["key copy"], heads.query_stride)
    values = keys
    if not shared:
        values = _source(k, segment.values, sizes.d_v, sizes.heads, lists.values, at["value copy"], heads.value_stride)
    n = rows.hi - rows.lo if segment.ids is None else list_ids(k, segment, query.token, rows, lists.ids, lists.bits)

    def row_of(candidate: Value) -> Value:
        return candidate + rows.lo if segment.ids is None else k.load(lists.ids + candidate * 8, I64)

    with k.loop(0, n, TILE) as tiles:
        tiles.next()
        found, by_token = list_tile(k, segment, query, rows, lists, row_of, tiles.i, k.min(tiles.i + TILE, n))
        with k.when(found.gt(0)):
            keys.fill(found, segment.keys.shape[2] if sizes.d_k is None else sizes.d_k, element_stride(segment.keys))
            heads.score(keys, found)
            if not shared:
                values.fill(found, segment.values.shape[2] if sizes.d_v is None else sizes.d_v, element_stride(segment.values))
            mask = segment.mask
            added, stride = (None, 0) if mask is None else (lists.added, 0 if one_for_all(mask, query) else TILE)
            seen = lists.seen if by_token else None
            heads.weights(found, Logits(scale, softcap, added, stride, seen, sizes.heads // sizes.tokens))
            heads.weigh(values, found)


def _source(k: Kernel, rows: Operand, width: int | None, n_heads: int, listed: Value, copy: Value, stride: int) -> Rows:
    """Rows read in place if they are whole vectors that cost little to convert, else a copy of them."""
    stride_known = element_stride(rows)
    together = isinstance(stride_known, int) and stride_known == 1 and width is not None and width % k.lanes == 0
    halves = rows.dtype.name == "bf16" or (rows.dtype.name == "f16" and bool(k.target.has & {"f16c", "neon", "avx512"}))
    cheap = rows.dtype.name == "f32" or (halves and n_heads <= 4)
    dtype = f32 if rows.dtype.is_block and rows.layout == "dense" else rows.dtype
    return Rows(k, dtype, listed, None if together and cheap else copy, stride)


def _finish(k: Kernel, heads: Heads, y: Operand, query: Query) -> Value:
    """Divide sums by totals; returns whether a result is NaN or infinite."""
    with k.loop(0, query.count, 1, [k.zero(F32.x(k.lanes))]) as loop:
        total = k.load(heads.totals + loop.i * 4, F32)
        divisor = k.splat(k.select(total.eq(0.0), 1.0, total), k.lanes)
        sums, out = heads.sums + loop.i * (heads.value_stride * 4), y.row(query.head(k, loop.i))

        def write(i: Value, mask: Value | None, carried: list[Value]) -> list[Value]:
            value = k.load(sums + i * 4, F32.x(k.lanes)) / divisor
            out.store(i, value, mask)
            return [k.fma(value, 0.0, carried[0])]

        loop.next(*k.sweep(y.shape[2], write, loop.values))
    return k.sum(loop.results[0]).is_nan()
