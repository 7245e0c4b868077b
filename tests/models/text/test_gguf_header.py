"""GGUF headers written byte by byte: what the `gguf` package cannot write, hostile files, and 2,000 damaged ones."""

from __future__ import annotations

import signal
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorgraph.errors import FormatError
from tensorgraph.models.text.gguf import GGML_TYPES, GGUF
from tensorgraph.models.text.gguf_header import read_header


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0, n_dims: int | None = None) -> bytes:
    count = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


def build(
    pairs: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = bytes(256),
    counts: tuple[int, int] | None = None,
    version: int = 3,
) -> bytes:
    n_tensors, n_pairs = counts or (len(tensors), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_pairs) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def test_version_2_and_a_wider_alignment(tmp_path: Path) -> None:
    path = tmp_path / "v2.gguf"
    alignment = pair("general.alignment", 4, struct.pack("<I", 256))
    head = build((alignment,), (tensor("w", [2, 3]),), b"", version=2)
    values = np.arange(6, dtype=np.float32)
    path.write_bytes(head + bytes(256 - len(head)) + values.tobytes())
    with GGUF.open(str(path)) as got:
        assert got.version == 2 and got.tensors["w"].offset == 256
        assert np.array_equal(got.data("w"), values.reshape(3, 2))


def test_arrays_of_arrays_and_empty_arrays(tmp_path: Path) -> None:
    path = tmp_path / "nested.gguf"
    inner = [struct.pack("<IQ", 0, len(row)) + bytes(row) for row in ([1, 2], [], [3])]
    nested = pair("nested", 9, struct.pack("<IQ", 9, 3) + b"".join(inner))
    words = pair("words", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 8, 2) + text("a") + text("b"))
    empty = pair("empty", 9, struct.pack("<IQ", 8, 0))
    path.write_bytes(build((nested, words, empty)))
    with GGUF.open(path) as got:
        assert [plain(row) for row in got.metadata["nested"]] == [[1, 2], [], [3]]
        assert got.metadata["words"] == [["a", "b"]] and got.metadata["empty"] == []


ONE = struct.pack("<Q", 1)
HUGE = 2**64 - 1
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"the file is empty \(byte 0\)"),
    "text": (b"<html>404</html>", r"not a GGUF file: wanted the first bytes b'GGUF'; got b'<htm' \(byte 0\)"),
    "only magic": (b"GGUF", r"the version takes 4 bytes; 0 are left in the file \(byte 4\)"),
    "version 1": (build(version=1), r"wanted GGUF version 2 or 3; got 1 \(byte 4\)"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), r"a big-endian file.*\(byte 4\)"),
    "cut counts": (build()[:20], r"the metadata count takes 8 bytes; 4 are left in the file \(byte 16\)"),
    "tensor count": (build(counts=(HUGE, 0)), rf"{HUGE} tensors and 0 metadata pairs in a file of .*\(byte 8\)"),
    "pair count": (build(counts=(0, 60_000)), r"0 tensors and 60000 metadata pairs in a file of .*\(byte 8\)"),
    "key length": (
        build((struct.pack("<Q", HUGE) + b"x",)),
        rf"a metadata key takes {HUGE} bytes; \d+ are left in the file \(byte 32\)",
    ),
    "key is not UTF-8": (build((ONE + b"\xff" + bytes(20),)), r"a metadata key is not UTF-8 \(byte 32\)"),
    "key twice": (build((pair("k", 0, b"1"),) * 2), r"metadata key 'k' occurs twice \(byte 38\)"),
    "value type": (build((pair("k", 13, b"1"),)), r"metadata 'k' has the unknown type 13 \(byte 37\)"),
    "string length": (build((pair("k", 8, struct.pack("<Q", 2**63)),)), rf"metadata 'k' takes {2**63} bytes"),
    "array type": (
        build((pair("k", 9, struct.pack("<IQ", 99, 1)),)),
        r"metadata 'k' is an array of the unknown type 99 \(byte 49\)",
    ),
    "array count": (
        build((pair("k", 9, struct.pack("<IQ", 12, 2**61)),)),
        rf"metadata 'k' takes {2**64} bytes; \d+ are left in the file \(byte 49\)",
    ),
    "string array count": (
        build((pair("k", 9, struct.pack("<IQ", 8, 2**61)),)),
        rf"metadata 'k' cannot have {2**61} elements in a file of \d+ bytes \(byte 49\)",
    ),
    "string in array": (
        build((pair("k", 9, struct.pack("<IQ", 8, 3) + text("a") + struct.pack("<Q", HUGE)),)),
        r"metadata 'k', an array of 3 strings, runs past the end of the file \(byte 49\)",
    ),
    "nesting": (
        build((pair("k", 9, struct.pack("<IQ", 9, 1) * 9),)),
        r"metadata 'k' is nested deeper than 4 arrays \(byte 97\)",
    ),
    "alignment 0": (
        build((pair("general.alignment", 4, bytes(4)),)),
        r"general.alignment wants a power of two from 8 on; got 0 \(byte 53\)",
    ),
    "alignment 24": (
        build((pair("general.alignment", 4, struct.pack("<I", 24)),)),
        r"general.alignment wants a power of two from 8 on; got 24 \(byte 53\)",
    ),
    "alignment is text": (
        build((pair("general.alignment", 8, text("32")),)),
        r"'general.alignment' wants an integer from 0 on; got '32' \(byte 53\)",
    ),
    "alignment past the end": (
        build((pair("general.alignment", 4, struct.pack("<I", 2**31)),), (tensor("w", [1]),)),
        rf"tensor 'w' ends at byte {2**31 + 4} of a file of \d+ \(byte 57\)",
    ),
    "dimensions": (build((), (tensor("w", [], n_dims=HUGE >> 32),)), r"tensor 'w' has 4294967295 dimensions.*byte 24"),
    "five dimensions": (build((), (tensor("w", [1] * 5),)), r"tensor 'w' has 5 dimensions; at most 4 are allowed"),
    "no elements": (build((), (tensor("w", [2**62, 0]),)), r"tensor 'w' has no elements: dimensions \[4611.*, 0\]"),
    "overflow": (build((), (tensor("w", [2**32, 2**32]),)), rf"tensor 'w' ends at byte {96 + 2**66} of a file of 352"),
    "type": (build((), (tensor("blk.0.w", [4], kind=4),)), r"tensor 'blk.0.w' has the unknown ggml type 4 \(byte 24\)"),
    "half a block": (
        build((), (tensor("w", [33, 2], kind=2),)),
        r"tensor 'w' of type q4_0 wants rows of a multiple of 32; got \[33, 2\] \(byte 24\)",
    ),
    "offset": (build((), (tensor("w", [4], offset=4),)), r"tensor 'w' has offset 4, not a multiple of 32 \(byte 24\)"),
    "offset past the end": (
        build((), (tensor("w", [4], offset=256),)),
        r"tensor 'w' ends at byte 336 of a file of 320 \(byte 24\)",
    ),
    "offset wraps": (
        build((), (tensor("w", [4], offset=2**64 - 32),)),
        r"tensor 'w' ends at byte 184467440737095516\d\d of",
    ),
    "overlap": (
        build((), (tensor("v", [4], offset=32), tensor("w", [9]))),
        r"tensor 'v' overlaps the one stored before it \(byte 24\)",
    ),
    "tensor twice": (build((), (tensor("w", [4]),) * 2), r"tensor 'w' occurs twice \(byte 57\)"),
    "cut tensor": (build((), (tensor("w", [4]),), b"")[:45], r"the type of tensor 'w' takes 4 bytes; 0 are left"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_with_file_and_offset(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"^\[gguf\] .*hostile\.gguf: .*\(byte \d+\)$") as caught:
        GGUF.open(path)
    caught.match(message)


STRINGS = st.lists(st.text(st.sampled_from("a\0\1Ġ🦙"), max_size=2) | st.integers(250, 260).map("b".__mul__), max_size=6)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STRINGS, STRINGS)
def test_strings_are_those_that_were_written(tmp_path: Path, some: list[str], others: list[str]) -> None:
    """Short ones are decoded all at once: empty ones, long ones, zero bytes, and arrays in arrays must not be."""
    path = tmp_path / "strings.gguf"
    arrays = [struct.pack("<IQ", 8, len(words)) + b"".join(map(text, words)) for words in (some, others)]
    path.write_bytes(build((pair("some", 9, arrays[0]), pair("both", 9, struct.pack("<IQ", 9, 2) + b"".join(arrays)))))
    with GGUF.open(path) as got:
        assert got.metadata["some"] == some and got.metadata["both"] == [some, others]


@pytest.mark.parametrize("rare", ["", "c" * 255, "d" * 256, "e\0f", "g" * 70_000], ids=len)
def test_many_strings_that_are_passed_over_at_once(tmp_path: Path, rare: str) -> None:
    """By pieces of the file, wherever the strings' ends lie in these and wherever a rare one stands."""
    words = ["b" * (i * 7 % 40 + 1) for i in range(4000)]
    for at in (0, 3000, len(words) - 1):
        path = tmp_path / f"many{at}.gguf"
        given = [*words[:at], rare, *words[at + 1 :]]
        array = struct.pack("<IQ", 8, len(given)) + b"".join(map(text, given))
        path.write_bytes(build((pair("many", 9, array), pair("after", 4, struct.pack("<I", 7)))))
        with GGUF.open(path) as got:
            assert got.metadata["many"] == given and got.metadata["after"] == 7
        path.write_bytes(build((pair("many", 9, array[:-20]),), data=b""))
        with pytest.raises(FormatError, match="'many'"):
            GGUF.open(path)


def test_no_strings_and_then_numbers(tmp_path: Path) -> None:
    inner = struct.pack("<IQ", 8, 0), struct.pack("<IQ", 0, 257) + b"\1" * 257
    path = tmp_path / "empty.gguf"
    path.write_bytes(build((pair("mixed", 9, struct.pack("<IQ", 9, 2) + b"".join(inner)),)))
    with GGUF.open(path) as got:
        words, ones = got.metadata["mixed"]
        assert words == [] and ones.tolist() == [1] * 257


def test_one_long_string_takes_little_more_memory_than_it_has(tmp_path: Path) -> None:
    path = tmp_path / "long.gguf"
    path.write_bytes(build((pair("zeros", 9, struct.pack("<IQQ", 8, 1, 1 << 22) + bytes(1 << 22)),)))
    with GGUF.open(path) as got:
        tracemalloc.start()
        assert got.metadata["zeros"] == [chr(0) * (1 << 22)]
        assert tracemalloc.get_traced_memory()[1] < 4 << 22
        tracemalloc.stop()


def test_values_are_checked_when_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "values.gguf"
    words = struct.pack("<IQ", 8, 2) + text("ok") + struct.pack("<Q", 2) + b"a\xff"
    path.write_bytes(
        build((pair("flag", 7, b"\x02"), pair("text", 8, ONE + b"\x80"), pair("words", 9, words), pair("ok", 0, b"\5")))
    )
    with GGUF.open(path) as got:
        assert got.metadata["ok"] == 5
        for key, message in (
            ("flag", r"metadata 'flag' wants bools of 0 or 1; got 2 \(byte 40\)"),
            ("text", r"metadata 'text' is not UTF-8 \(byte 65\)"),
            ("words", r"metadata 'words': string 1 is not UTF-8 \(byte 114\)"),
        ):
            with pytest.raises(FormatError, match=message):
                got.metadata[key]
        with pytest.raises(FormatError, match=r"wanted a name in general.architecture; got None"):
            _ = got.architecture


@contextmanager
def bounded(seconds: float, n_bytes: int) -> Iterator[None]:
    """Fail where the body takes more processor time or more memory."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < n_bytes
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def explore(path: Path) -> int:
    """Read all that a file offers, minding no FormatError; how many bytes of tensors it had."""
    total = 0
    try:
        with GGUF.open(path) as got:
            for key in got.metadata:
                try:
                    got.metadata[key]
                except FormatError:
                    continue
            for name, info in got.tensors.items():
                data = got.data(name)
                assert data.nbytes == info.size_bytes == len(data.tobytes())
                total += info.size_bytes
            assert got.architecture
    except FormatError:
        pass
    return total


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, list[int], int]:
    """A small file, its bytes, the offsets of its counts, lengths, types and offsets, and the size of its header."""
    pairs = [pair("general.architecture", 8, text("llama")), pair("general.alignment", 4, struct.pack("<I", 32))]
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    pairs += [pair(f"number.{kind}", kind, bytes([1] * size)) for kind, size in sizes.items()]
    pairs += [pair(f"array.{kind}", 9, struct.pack("<IQ", kind, 3) + bytes(3 * size)) for kind, size in sizes.items()]
    pairs.append(pair("words", 9, struct.pack("<IQ", 8, 3) + text("a") + text("") + text("½ the 🦙")))
    pairs.append(pair("nested", 9, struct.pack("<IQ", 9, 2) + struct.pack("<IQ2B", 0, 2, 5, 6) + bytes(12)))
    tensors, data_size = [], 0
    for kind, dtype in GGML_TYPES.items():
        dims = [dtype.block_size, 3]
        tensors.append(tensor(f"blk.{dtype}", dims, kind, data_size))
        data_size += -(-dtype.block_bytes * 3 // 32) * 32
    path = tmp_path_factory.mktemp("mutations") / "small.gguf"
    path.write_bytes(build(tuple(pairs), tuple(tensors), bytes(range(256)) * (data_size // 256) + bytes(data_size % 256)))
    header = read_header(path)
    fields = [4, 8, 16, 24]
    for key in header.metadata:
        at = header.metadata.at(key)
        fields += [at - 12 - len(key), at - 4, at, at + 4, at + 12]
    for entry in header.tensors:
        dims_at = entry.at + 12 + len(entry.name)
        fields += [entry.at, dims_at - 4, *range(dims_at, dims_at + 8 * len(entry.dims) + 12, 4)]
    return path, path.read_bytes(), fields, header.data_start


EDGES = [0, 1, 2, 4, 9, 31, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**63, 2**64 - 32, HUGE]
MUTATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.integers(0, 1 << 16), st.integers(0, 7)),
        st.tuples(st.just("u32"), st.integers(0, 1 << 16), st.sampled_from(EDGES)),
        st.tuples(st.just("u64"), st.integers(0, 1 << 16), st.sampled_from(EDGES)),
        st.tuples(st.just("small"), st.integers(0, 1 << 16), st.integers(0, 64)),
        st.tuples(st.just("copy"), st.integers(0, 1 << 16), st.integers(0, 1 << 16)),
        st.tuples(st.just("drop"), st.integers(0, 1 << 16), st.integers(1, 16)),
        st.tuples(st.just("cut"), st.integers(0, 1 << 16), st.just(0)),
    ),
    min_size=1,
    max_size=3,
)


def mutate(content: bytes, fields: list[int], header_size: int, mutations: list[tuple[str, int, int]]) -> bytes:
    """Damage the header: single bits anywhere, and whole numbers where counts, lengths, types and offsets stand."""
    damaged = bytearray(content)
    for kind, place, value in mutations:
        at = fields[place % len(fields)]
        if kind == "flip":
            damaged[place % header_size % max(len(damaged), 1)] ^= 1 << value
        elif kind in ("u32", "small"):
            damaged[at : at + 4] = struct.pack("<I", value & 0xFFFFFFFF)
        elif kind == "u64":
            damaged[at : at + 8] = struct.pack("<Q", value)
        elif kind == "copy":
            source = value % header_size
            damaged[at : at + 8] = damaged[source : source + 8]
        elif kind == "drop":
            del damaged[place % header_size : place % header_size + value]
        else:
            del damaged[max(place % len(content), 1) :]
    return bytes(damaged)


@settings(deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
@given(mutations=MUTATIONS)
def test_damaged_headers_end_in_format_error(
    base: tuple[Path, bytes, list[int], int], mutations: list[tuple[str, int, int]]
) -> None:
    path, content, fields, header_size = base
    damaged = mutate(content, fields, header_size, mutations)
    target = path.with_name("damaged.gguf")
    target.write_bytes(damaged)
    with bounded(1.0, 2_000_000):
        total = explore(target)
    assert total <= len(damaged)


def test_the_undamaged_file_passes_the_same_walk(base: tuple[Path, bytes, list[int], int]) -> None:
    with bounded(1.0, 2_000_000):
        assert explore(base[0]) == sum(3 * dtype.block_bytes for dtype in GGML_TYPES.values())
