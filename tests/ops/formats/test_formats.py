"""Block formats against the `gguf` package's own NumPy code, and against ggml's output where that package has none."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import quants as peer
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tensorgraph.dtypes import as_dtype, f16
from tensorgraph.errors import DTypeError, ShapeError
from tensorgraph.graph import input
from tensorgraph.ops import cast, set_rows
from tensorgraph.ops.formats import FORMATS, block_format, decode, encode
from tests.ops.formats.extreme_blocks import UNITS, extreme_codes, special_scales, with_scales
from tests.ops.formats.peer_values import WITHOUT_PEER, assert_same_bits, peer_type, peer_values
from tests.reference import reference_path

AFFINE = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]
BY_PEER = [*AFFINE, "tq1_0", "tq2_0", "mxfp4"]
"""Types that the peer encodes too."""
ALL = list(FORMATS)
BOTH = [name for name in FORMATS if name not in WITHOUT_PEER]


def test_every_format_has_the_layout_that_files_use() -> None:
    sizes = {each.name.lower(): size for each, size in GGML_QUANT_SIZES.items()}
    sizes["q2_0"] = (64, 18)
    for name, form in FORMATS.items():
        assert (form.dtype.block_size, form.dtype.block_bytes) == sizes[name]
        assert as_dtype(name.upper()) is form.dtype and form.dtype.is_block
    assert all(form.encode for form in FORMATS.values())


@pytest.mark.parametrize("name", BOTH)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_decode_equals_the_peer_bit_for_bit(name: str, data: st.DataObject) -> None:
    n_blocks, rows = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 3))
    seed = data.draw(st.integers(0, 2**32 - 1))
    block_bytes = block_format(name).dtype.block_bytes
    raw = np.random.default_rng(seed).integers(0, 256, (rows, n_blocks * block_bytes), np.uint8)
    got = decode(raw, name)
    assert got.shape == (rows, n_blocks * block_format(name).dtype.block_size)
    if n_blocks:
        assert_same_bits(got, peer_values(raw, name))


@pytest.mark.parametrize("name", BOTH)
def test_extreme_blocks_decode_as_the_peer_does(name: str) -> None:
    for made in (extreme_codes, special_scales):
        raw = made(name, 90, 256).reshape(90, -1)
        assert_same_bits(decode(raw, name), peer_values(raw, name))


@pytest.mark.parametrize("name", BOTH)
def test_every_value_of_every_byte_decodes_as_the_peer_does(name: str) -> None:
    """Beside bytes of zeros, of ones, and any."""
    size = block_format(name).dtype.block_bytes
    unit = UNITS.get(block_format(name).scales[0].kind, 1.0)
    for start in (np.zeros(size), np.full(size, 255), np.random.default_rng(6).integers(0, 256, size)):
        raw = np.tile(with_scales(name, start[None].astype(np.uint8), unit), (size, 256, 1))
        raw[np.arange(size), :, np.arange(size)] = np.arange(256)
        assert_same_bits(decode(raw.reshape(-1, size), name), peer_values(raw.reshape(-1, size), name))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_every_scale_byte_decodes_as_the_peer_does(name: str) -> None:
    form = block_format(name).dtype
    raw = np.full((256, form.block_bytes), 0x71, np.uint8)
    raw[:, : 1 if name == "mxfp4" else 4] = np.arange(256)[:, None]
    assert_same_bits(decode(raw, name), peer_values(raw, name))


def test_many_blocks_decode_as_few_do() -> None:
    raw = np.random.default_rng(5).integers(0, 60, (2, 5001 * 18), np.uint8)
    assert_same_bits(decode(raw, "q4_0"), peer_values(raw, "q4_0"))
    assert_same_bits(decode(raw[:, 18:], "q4_0"), decode(raw, "q4_0")[:, 32:])


@pytest.mark.parametrize(
    ("name", "block", "codes"),
    [
        (
            "q1_0",
            "4d37a20846b3f8042f964cdf0d616d543e2c",
            "-+---+-+---+-----++---+-++--++-+---+++++--+-----++++-+---++-+--+"
            "--++--+-+++++-+++-++----+----++-+-++-++---+-+-+--+++++----++-+--",
        ),
        (
            "q2_0",
            "ff3b6a18a441159a8648512865661a212591",
            "+++0-+0--0++0--0000-++0++0-+-+-00-00-++-00+0+0+0++0-0-+-00+-0-0+",
        ),
    ],
)
def test_sign_and_ternary_blocks_decode_as_ggml_does(name: str, block: str, codes: str) -> None:
    raw = np.frombuffer(bytes.fromhex(block), np.uint8)  # one block that ggml wrote, and what its get_rows read from it
    scale = raw[:2].view(np.float16).astype(np.float32)
    assert_same_bits(decode(raw, name), np.array(["-0+".index(code) - 1 for code in codes], np.float32) * scale)


def finite(limit: float) -> st.SearchStrategy[float]:
    """Zero and numbers of ordinary magnitude: where 1 / scale overflows, the peer's result is undefined."""
    sizes = st.floats(2.0**-60, limit, width=32)
    ties = st.sampled_from([0.0, 0.5, 1.5, 2.5, -3.5, 5.0, 7.0, -10.0])
    return st.one_of(ties, sizes, sizes.map(lambda x: -x))


@pytest.mark.parametrize("name", BY_PEER)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_encode_equals_the_peer_byte_for_byte(name: str, data: st.DataObject) -> None:
    size = block_format(name).dtype.block_size
    shape = (data.draw(st.integers(1, 3)), size * data.draw(st.integers(1, 160 // size + 1)))
    limit = data.draw(st.sampled_from([2.0**-20, 8.0, 2.0**16]))
    x = data.draw(hnp.arrays(np.float32, shape, elements=finite(limit), fill=finite(limit)))
    got = encode(x, name)
    assert got.dtype == np.uint8
    with np.errstate(all="ignore"):
        assert np.array_equal(got, peer.quantize(x, peer_type(name)))


@pytest.mark.parametrize("name", BY_PEER)
def test_encode_of_normal_numbers_equals_the_peer(name: str) -> None:
    rng = np.random.default_rng(11)
    shape = (131_072 // block_format(name).dtype.block_size + 3, block_format(name).dtype.block_size)
    x = rng.standard_normal(shape, np.float32) * 10 ** rng.uniform(-4, 4, (shape[0], 1)).astype(np.float32)
    assert np.array_equal(encode(x, name), peer.quantize(x, peer_type(name)))


GGML: list[dict[str, Any]] = json.loads(reference_path("ops/index.json").read_text())["cases"]
WRITTEN = [
    case
    for case in GGML
    if case["op"] == "cpy" and case["compare"]["kind"] == "quantised"
    if case["srcs"][0]["dtype"] == "f32"  # ties, of which bf16 has many, ggml's vectors round to even in q8_0, its scalars do not
]


@pytest.mark.parametrize("case", WRITTEN, ids=lambda case: f"{case['id']}-{case['out']['dtype']}")
def test_encode_equals_ggml_byte_for_byte(case: dict[str, Any]) -> None:
    """Rows that ggml copied to a block type; all types are there."""
    name, (source, _) = case["out"]["dtype"], case["srcs"]
    with np.load(reference_path(f"ops/{case['file']}")) as stored:
        x, want = stored[source["decoded_key"]], stored[case["out"]["raw_key"]]
    assert np.array_equal(encode(x, name).reshape(-1), want.reshape(-1))


# Largest error as a part of the block's largest magnitude: half a step, a whole one where the far end is clipped
# (q4_0, q5_0), 8 -> 6 in mxfp4, the far end of the least scale's range in nvfp4, a scale moved by the other values in iq4_nl.
BOUNDS = {"q4_0": 1 / 8, "q4_1": 1 / 15, "q5_0": 1 / 16, "q5_1": 1 / 31, "q8_0": 0.5 / 127, "mxfp4": 1 / 4}
BOUNDS |= {"q1_0": 1.0, "q2_0": 1 / 2, "tq1_0": 1 / 2, "tq2_0": 1 / 2, "nvfp4": 1 / 4, "iq4_nl": 1 / 6, "iq4_xs": 1 / 6}
BOUNDS |= {"q2_k": 1 / 2, "q3_k": 1 / 4, "q4_k": 1 / 12, "q5_k": 1 / 20, "q6_k": 1 / 48}  # scales, too, are of few bits
BOUNDS |= {"iq2_xxs": 2 / 3, "iq2_xs": 1 / 2, "iq2_s": 1 / 2, "iq3_xxs": 1 / 3, "iq3_s": 1 / 4, "iq1_s": 2 / 3, "iq1_m": 2 / 3}
# of vectors, not of numbers, the nearest is taken


@pytest.mark.parametrize("name", ALL)
def test_a_round_trip_stays_within_the_step_of_the_format(name: str) -> None:
    size = block_format(name).dtype.block_size
    x = np.random.default_rng(3).standard_normal((7, 5 * size), np.float32)
    error = np.abs(decode(encode(x, name), name) - x).reshape(7, 5, size)
    largest = np.abs(x).reshape(7, 5, size).max(axis=2, keepdims=True)
    assert np.all(error <= largest * (BOUNDS[name] + 2.0**-10))  # the scale itself is rounded to f16
    for wider in (np.float64, np.float16, ml_dtypes.bfloat16):
        values = x.astype(wider)
        assert np.array_equal(encode(values, name), encode(values.astype(np.float32), name))


@pytest.mark.parametrize("name", ALL)
def test_zeros_and_numbers_too_small_for_the_scale_become_zero(name: str) -> None:
    assert not decode(encode(np.zeros((3, 256), np.float32), name), name).any()
    tiny = decode(encode(np.linspace(-1e-40, 1e-40, 256, dtype=np.float32)[None], name), name)
    assert np.all(np.abs(tiny) <= 2e-38)


@pytest.mark.parametrize("name", ALL)
def test_empty_arrays(name: str) -> None:
    form = block_format(name).dtype
    assert decode(np.zeros((0, 2 * form.block_bytes), np.uint8), name).shape == (0, 2 * form.block_size)
    assert encode(np.zeros((3, 0), np.float32), name).shape == (3, 0)


def test_errors_name_the_format_and_what_was_given() -> None:
    with pytest.raises(DTypeError, match="wanted a block type.*q4_0.*got f16"):
        block_format(f16)
    with pytest.raises(ShapeError, match=r"\[decode q4_0\] wanted rows of a multiple of 18 bytes; got \(2, 17\)"):
        decode(np.zeros((2, 17), np.uint8), "q4_0")
    with pytest.raises(ShapeError, match=r"\[encode q4_0\] wanted rows of a multiple of 32 elements; got \(33,\)"):
        encode(np.zeros(33, np.float32), "q4_0")
    with pytest.raises(DTypeError, match=r"\[decode q8_0\] wanted uint8; got float32"):
        decode(np.zeros(34, np.float32), "q8_0")


def test_a_type_that_is_only_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "q4_k", replace(FORMATS["q4_k"], encode=None))
    with pytest.raises(DTypeError, match="q4_k can only be decoded.*q4_0, q4_1, q5_0, q5_1, q8_0, .*iq4_xs"):
        encode(np.zeros(256, np.float32), "Q4_K")
    with pytest.raises(DTypeError, match=r"\[cast\] there is no conversion from f32 to q4_k"):
        cast(input("x", (256,)), dtype="q4_k")
    with pytest.raises(DTypeError, match="a must be of a type that can be written; q4_k is only read"):
        set_rows(input("a", (5, 256), "q4_k"), input("b", (2, 256)), input("ids", (2,), "i32"))
