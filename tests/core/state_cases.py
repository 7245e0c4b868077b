"""Streams of every kind, and how the tests of state fill and see them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from tensorgraph.dtypes import as_dtype, bf16, f16, f32
from tensorgraph.ops.formats import decode, encode
from tensorgraph.state import StateSpec
from tensorgraph.state_step import Step
from tensorgraph.state_store import StateStore

q8_0 = as_dtype("q8_0")
SPECS = {
    "k": StateSpec((2, 3)),
    "v": StateSpec((4,), bf16),
    "near": StateSpec((3,), keep=8),
    "comp": StateSpec((2,), f32, keep=32),
    "c4": StateSpec((5,), every=4),
    "c4near": StateSpec((), f32, every=4, keep=8),
    "c128": StateSpec((2,), bf16, every=128),
    "c128one": StateSpec((2,), every=128, keep=1),
    "wide": StateSpec((3, 16)),
    "coded": StateSpec((2, 32), q8_0),
    "c4coded": StateSpec((64,), q8_0, every=4, keep=8),
}
NUMPY = {None: np.float16, f16: np.float16, bf16: ml_dtypes.bfloat16, f32: np.float32, q8_0: np.float32}
IN_PANELS = ("wide", "coded", "c4coded")
"""Those that can be held so."""


def numpy_type(spec: StateSpec) -> Any:
    return NUMPY[spec.dtype]


def look_back(spec: StateSpec, position: int) -> range:
    """The rows that a reader at `position` looks at, once every token up to it is in."""
    done = (position + 1) // spec.every
    return range(0 if spec.keep is None else max(0, done - spec.keep), done)


def fill(step: Step, specs: dict[str, StateSpec], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Append random rows to every stream, and say what was stored."""
    stored = {}
    for name, spec in specs.items():
        rows = rng.standard_normal((len(step.classes[spec.stream_class].new), *spec.row_shape), np.float32)
        step.append(name, rows)
        stored[name] = decode(encode(rows, spec.dtype), spec.dtype) if spec.dtype is q8_0 else rows.astype(numpy_type(spec))
    return stored


def extend(store: StateStore, seq: int, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    with store.begin([(seq, n)]) as step:
        stored = fill(step, store.specs, rng)
        step.commit()
    return stored


def visible(store: StateStore, seq: int) -> dict[str, np.ndarray]:
    with store.begin([(seq, 0)]) as step:
        return {name: step.read(name) for name in store.specs}


def assert_same(got: np.ndarray, wanted: np.ndarray) -> None:
    assert got.dtype == wanted.dtype and got.shape == wanted.shape and got.tobytes() == wanted.tobytes()
