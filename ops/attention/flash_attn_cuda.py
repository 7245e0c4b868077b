"""flash_attn on CUDA: tiles of tensor cores where types and widths allow it, one kernel in f32 for everything else.

Either way what few tokens see is divided among blocks. The last block of a tile's puts their parts together, where that is little
for one block to read; else another launch does. Streams are read where they lie.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tensorgraph.backends.cuda.launches import Buffer, Call, Context, Launch, NodeKernel, Ref, Template
from tensorgraph.dims import ALWAYS, Guard, maximum, product
from tensorgraph.graph import Node
from tensorgraph.ops.attention.attend_cpu import is_of_rows, stored
from tensorgraph.ops.attention.flash_attn import flash_attn

HERE = "tensorgraph.ops.attention"
FEW = 8
"""Tokens up to which tiles are those of a token or two."""
BLOCKS = 528, 264
"""Blocks to divide rows among, of few tokens and of more: four and two for each multiprocessor of an H100."""
MOST_SLOTS = 64
MOST_READ = 256 << 10
"""Bytes of parts of a token, at most, that a last block reads, some 32 KB at once. A latent's 4 MB take many blocks."""
MOST_BYTES = 99 << 10
"""Shared memory of a block that every GPU since Ampere can give."""
MATHS = {"f16": "HalfMath", "bf16": "BrainMath", "f32": "FloatMath"}
IN_SHARED = 4096
"""Places of lists whose tables fit into shared memory."""
DISTINCT = ("index_top_k", "top_k", "argsort")
"""Ops whose results name a row once, and none that is not there."""


@dataclass(frozen=True)
class Tiles:
    """How queries are tiled, and what is divided among `slots`, as `Cut` in attention.cuh; `math` is empty for the kernel in f32.

    Attributes:
        wm, wn: warps along queries, and along rows and channels.
        block, stages: rows of a tile, and tiles that are in shared memory.
        tokens, heads: of a tile.
    """

    math: str
    wm: int
    wn: int
    block: int
    stages: int
    tokens: int
    heads: int
    slots: int = 1

    @property
    def rows(self) -> int:
        return 16 * self.wm

    def cut_to(self, rows: int, group: int | None, listed: bool) -> Tiles:
        """With tokens and heads for so many queries; each token by itself where it has a list of its own."""
        heads = rows if group is None else max(1, min(group, rows))
        return replace(self, heads=heads, tokens=1 if listed or group is None else rows // heads)

    def combines(self, d_v: int) -> bool:
        """Whether the last block puts together what the others left; not in tiles of many tokens."""
        return self.rows == 16 and self.heads * d_v * 4 * self.slots <= MOST_READ

    def split(self, blocks: int, n_kv: int, group: int) -> Tiles:
        parts = max(n_kv * -(-group // self.heads), 1)
        return replace(self, slots=max(1, min(MOST_SLOTS, blocks // parts)))


@dataclass(frozen=True)
class Widths:
    """Of keys and values, and bytes of an element; whether some segment has values of its own, and some does not."""

    d_k: int
    d_v: int
    size: int
    own: bool
    shared: bool

    def shared_bytes(self, t: Tiles) -> tuple[int, int]:
        """Dynamic and static shared memory, as flash_attn_tiles.cu lays it out."""
        step = 32 // self.size
        wide_k, wide_v = -(-self.d_k // step) * step, -(-self.d_v // (16 * t.wn)) * 16 * t.wn
        longer = max(wide_k, wide_v) if self.shared else wide_k
        stage = t.block * (longer * self.size + 16 + (wide_v * self.size + 16 if self.own else 0))
        exchanged = t.rows * (t.block * self.size + 16) + 4 * t.wn * t.rows if t.wn > 1 else 0
        small = t.block * (3 * 12 + 16) + 4 * t.rows + 24 * t.tokens + 256
        return t.rows * (wide_k * self.size + 16) + exchanged + t.stages * stage, small


# Warps along queries and along channels, rows of a tile, tiles in shared memory: by preference.
_FEW = ((1, 4, 64, 2), (1, 4, 32, 2), (1, 4, 32, 1))
_WIDE = ((2, 4, 32, 2), (2, 4, 32, 1), (1, 4, 32, 2), (1, 4, 32, 1))
_MANY = ((4, 1, 64, 2), (4, 1, 32, 2), (4, 1, 32, 1), *_WIDE)


def reads(node: Node, slot: str) -> tuple[str, ...]:
    """Rows of a stream where they lie."""
    value = node.at(slot)
    if slot[0] not in "kv" or value is None or value.dtype.is_block or stored(value).op not in ("append", "read"):
        return ()
    return ("rows",)


def calls(node: Node, context: Context) -> Sequence[Call]:
    rules = node.attrs["segments"]
    operands: dict[str, Ref | None] = {slot: _ref(node, slot) for slot in ("q", "sinks", "pos", "seq")}
    made: list[Call] = []
    segments: dict[str, Ref | None] = {}
    templates = []
    for i, (every, window, causal) in enumerate(rules):
        k, ids = node.at(f"k{i}"), node.at(f"ids{i}")
        assert k is not None
        for slot in ("k", "v", "pos", "seq", "ids"):
            value = node.at(f"{slot}{i}")
            layout = context.layout(stored(value)) if slot in "kv" and value is not None else "dense"
            segments[f"{slot}{i}"] = None if value is None else Ref(value, "rows" if layout == "rows" else "dense")
        segments[f"count{i}"] = None if ids is None else Ref(ids.shape[1])
        segments[f"mask{i}"] = _ref(node, f"mask{i}")
        by_pos = node.at("pos") is not None and node.at(f"pos{i}") is not None
        own = segments[f"k{i}"] == Ref(k, "rows") and _own(node, i, by_pos and (causal or window is not None))
        if own:
            segments[f"pos{i}"] = segments[f"seq{i}"] = None
        if ids is not None and not _distinct(ids, k):
            made.append(_listing(node, i))
            segments[f"ids{i}"] = made[-1].operands["listed"]
        flags = ", ".join(str(bool(flag)).lower() for flag in (causal, by_pos, own))
        templates.append(f"Rule<{every}, {min(window or 0, 1 << 60)}ll, {flags}>")
    numbers = (_bits(node.attrs["scale"]), _bits(node.attrs["softcap"]))
    logits = f"Logits<{numbers[0]}u, {numbers[1]}u>, Rules<{', '.join(templates)}>"
    for tiles, guard in _ways(node, context):
        made += _attending(node, tiles, guard, operands, segments, logits)
    return made


def _ref(node: Node, slot: str) -> Ref | None:
    value = node.at(slot)
    return None if value is None else Ref(value)


def _bits(x: float) -> int:
    """A number as f32."""
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    return int(bits)


def _own(node: Node, i: int, by_pos: bool) -> bool:
    """Whether the positions (where they matter) and sequences of a segment are those of its stream."""
    pos, seq = node.at(f"pos{i}"), node.at(f"seq{i}")
    return seq is not None and is_of_rows(seq, "seq") and (not by_pos or (pos is not None and is_of_rows(pos, "pos")))


def _distinct(ids: Node, k: Node) -> bool:
    """Whether ids name rows of k, none twice, whatever they are computed from."""
    if ids.op not in DISTINCT:
        return False
    scored = ids.at("k")
    return (scored.shape[0] if ids.op == "index_top_k" and scored is not None else ids.inputs[0].shape[-1]) == k.shape[0]


def _listing(node: Node, i: int) -> Launch:
    """Writes `listed` i32 [T, K]: the ids of a segment, each once, -1 in place of the others."""
    ids, k = node.at(f"ids{i}"), node.at(f"k{i}")
    assert ids is not None and k is not None
    n, n_tokens = maximum(ids.shape[1]), maximum(ids.shape[0])
    size = 1 << max(2 * n - 1, 1).bit_length()
    tables = None if n <= IN_SHARED else Ref(Buffer(n_tokens * size * 8, f"tables{i}"))
    message = f"[flash_attn] ids{i} must be below {{2}}, or -1 for none; got {{0}} to {{1}}"
    return Launch(
        Template(f"{HERE}:listed_rows.cu", f"listed_rows<{size}>", messages=(message,)),
        {"ids": Ref(ids), "n": Ref(k.shape[0]), "listed": Ref(Buffer(max(n_tokens * n, 1) * 4, f"listed{i}")), "tables": tables},
        items=ids.shape[0],
        threads=256 if n > 64 else 32,
        shared_bytes=size * 8 if tables is None else 0,
        nodes=(node,),
    )


def _ways(node: Node, context: Context) -> list[tuple[Tiles, Guard]]:
    """Tiles for few tokens and for more, and when each are taken."""
    q, k0, n = node.at("q"), node.at("k0"), range(len(node.attrs["segments"]))
    assert q is not None and k0 is not None
    n_heads, n_kv, group = q.shape[1], k0.shape[1], _group(q, k0)
    listed = any(node.at(f"ids{i}") is not None for i in n)
    most = maximum(n_kv), maximum(n_heads) if group is None else group
    widths = None if context.exact or group is None else _widths(node)
    few, many = (None, None) if widths is None or not group else _tiles(widths, _math(node), group, listed)
    if few is None or many is None:
        plain = Tiles("", 1, 1, 32, 1, 1, 16).cut_to(16, group, listed)
        return [(plain.split(BLOCKS[0], *most), ALWAYS)]
    same = few == many
    few, many = (tiles.split(blocks, *most) for tiles, blocks in zip((few, many), BLOCKS, strict=True))
    if same:
        return [(few, ALWAYS)]
    ways = ((few, node.shape[0] <= FEW), (many, node.shape[0] > FEW))
    return [(tiles, ALWAYS if guard is True else guard) for tiles, guard in ways if guard is not False]


def _math(node: Node) -> str:
    """Of the tensor cores, by the one type of all keys and values; empty where there is none."""
    streams = [x.dtype for slot, x in zip(node.slots, node.inputs, strict=True) if slot[0] in "kv"]
    found = {"f32" if dtype.is_block else dtype.name for dtype in streams}
    return MATHS.get(found.pop(), "") if len(found) == 1 else ""


def _widths(node: Node) -> Widths | None:
    """Widths that tensor cores can have, where types let them."""
    q, math = node.at("q"), _math(node)
    assert q is not None
    d_k, d_v = q.shape[2], node.shape[2]
    if not (isinstance(d_k, int) and isinstance(d_v, int) and math and d_k and d_v and d_v <= 512):
        return None
    own = [node.at(f"v{i}") is not None for i in range(len(node.attrs["segments"]))]
    return Widths(d_k, d_v, 4 if math == "FloatMath" else 2, any(own), not all(own))


def _tiles(widths: Widths, math: str, group: int, listed: bool) -> tuple[Tiles | None, Tiles | None]:
    """For few tokens and for many; None where shared memory has no room for rows so wide."""

    def first(shapes: Sequence[tuple[int, int, int, int]]) -> Tiles | None:
        for shape in shapes:
            tiles = Tiles(math, *shape, 1, 1).cut_to(16 * shape[0], group, listed)
            if sum(widths.shared_bytes(tiles)) <= MOST_BYTES:
                return tiles
        return None

    narrow = max(widths.d_k, widths.d_v) * widths.size <= 128
    few = first((_FEW if narrow else _FEW[1:]) if group <= 16 else _WIDE)
    many = few if listed and group <= 16 else first(_MANY if widths.d_v <= 128 else _WIDE)
    return few, many


def _attending(
    node: Node, t: Tiles, guard: Guard, operands: dict[str, Ref | None], segments: dict[str, Ref | None], logits: str
) -> list[Call]:
    """What leaves the result, or parts of it and the launch that puts those together."""
    q, k0, y = node.at("q"), node.at("k0"), Ref(node)
    assert q is not None and k0 is not None
    n_tokens, n_kv, d_v, group = q.shape[0], k0.shape[1], node.shape[2], _group(q, k0)
    parts = product((n_kv, -(-(maximum(q.shape[1]) if group is None else group) // t.heads)))
    partial = Ref(Buffer(t.slots * maximum(parts) * t.rows * (maximum(d_v) + 2) * 4, "partial")) if t.slots > 1 else None
    own = {**operands, "y": y, "partial": partial, "n_kv": Ref(n_kv), **segments}
    tiles = (n_tokens + (t.tokens - 1)) // t.tokens
    cut = f"{t.tokens}, {t.heads}, {t.slots}"
    combines = t.slots > 1 and t.combines(maximum(d_v))
    counters = t.slots // 2 * maximum(parts) if combines else 0  # more tiles than half the slots are not divided
    if t.math:
        widths = _widths(node)
        assert widths is not None
        both = f"{widths.d_k}, {widths.d_v}, {str(widths.shared).lower()}"
        shape = f"Shape<{t.math}, {t.wm}, {t.wn}, {t.block}, {t.stages}, {both}>"
        resident = 4 if t.wm == 1 and max(widths.d_k, widths.d_v) <= 256 else 2
        if widths.d_v > 256 and not _plain(node):
            resident = 1
        function = f"flash_attn_tiles<{shape}, {cut}, {logits}>"
        template = Template(f"{HERE}:flash_attn_tiles.cu", function, resident=resident, counters=counters)
        items, threads, shared_bytes = product((tiles, parts)), 32 * t.wm * t.wn, widths.shared_bytes(t)[0]
    else:
        channels = next((n for n in (64, 128, 256) if n >= maximum(d_v)), 512)
        template = Template(f"{HERE}:flash_attn.cu", f"flash_attn<{cut}, {channels}, {logits}>", resident=2, counters=counters)
        items, threads, shared_bytes = product((tiles, parts, -(-maximum(d_v) // channels))), 128, 0
    attend = Launch(template, own, items=items * t.slots, threads=threads, shared_bytes=shared_bytes, guard=guard, nodes=(node,))
    divided = (n_tokens <= t.tokens * (t.slots // 2)) & guard
    if counters or t.slots == 1 or divided is False:
        return [attend]
    divided = guard if divided is True else divided
    combine = Template(
        f"{HERE}:attention_combine.cu", f"combine<{t.tokens}, {t.heads}, {t.rows}, {t.slots}, {str(bool(t.math)).lower()}>"
    )
    given = {"partial": partial, "sinks": operands["sinks"], "y": y, "n_kv": Ref(n_kv)}
    items = product((*node.shape[:2], -(-maximum(d_v) // 128)))
    return [attend, Launch(combine, given, items=items, guard=divided, nodes=(node,))]


def _plain(node: Node) -> bool:
    """Whether a kernel of wide values gets by with the registers that two blocks of it leave each other."""
    masked = any(slot.startswith("mask") for slot in node.slots)
    return not masked and not node.attrs["softcap"] and len(node.attrs["segments"]) <= 2


def _group(q: Node, k0: Node) -> int | None:
    """Query heads of a kv head, where they are known."""
    n_heads, n_kv = q.shape[1], k0.shape[1]
    return n_heads // max(n_kv, 1) if isinstance(n_heads, int) and isinstance(n_kv, int) else None


flash_attn.kernels["cuda"] = NodeKernel(calls, reads=reads)
