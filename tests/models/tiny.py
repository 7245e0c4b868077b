"""The tiny models of `tests/data`, their references, and what the tests of models do with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorgraph.compiler import CompileOptions
from tensorgraph.engine import Engine
from tensorgraph.models.architecture import Model, model_from_checkpoint, model_from_gguf
from tensorgraph.models.text.checkpoint import Checkpoint
from tensorgraph.models.text.gguf import GGUF
from tensorgraph.session import Session
from tests.reference import reference_path

Array = np.ndarray[Any, Any]

ARCHITECTURES = (
    *("llama", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "deepseek_v4"),
    *("qwen2", "qwen3", "qwen3moe", "gemma3", "gpt_oss"),
)
FOLDERS = ("qwen2", "gpt_oss", "bert")
"""Of which there is no GGUF file."""
BACKENDS = ("reference", "cpu")
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def bound(architecture: str) -> float:
    """Largest NMSE against the reference; V2-Lite's 27 random layers amplify rounding."""
    return 1e-8 if architecture == "deepseek_v2" else 1e-9


def nmse(got: Array, want: Array) -> float:
    """Squared error over squared size; infinite where a number is not finite or the shapes differ."""
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    error, size = got.astype(np.float64) - want, want.astype(np.float64)
    return float((error * error).sum() / (size * size).sum())


@cache
def reference(architecture: str, name: str = "reference") -> Mapping[str, Array]:
    """The arrays of `reference.npz` or `quant_refs.npz`."""
    with np.load(reference_path(f"{architecture}/{name}.npz")) as stored:
        return dict(stored)


def folder(name: str, *more: str) -> Path:
    """A published folder of the reference data: its configuration, its weights and `more` of its files."""
    weights = reference_path(f"{name}/model.safetensors")
    target = weights.parent / "folder"
    target.mkdir(exist_ok=True)
    for file in ("config.json", "model.safetensors", *more):
        with suppress(FileExistsError):  # of another process that tests
            (target / file).symlink_to(reference_path(f"{name}/{file}"))
    return target


@cache
def model(architecture: str, kind: str = "f32") -> Model:
    if architecture in FOLDERS:
        return model_from_checkpoint(Checkpoint.open(folder(architecture)))
    return model_from_gguf(GGUF.open(reference_path(f"{architecture}/{architecture}-{kind}.gguf")))


@cache
def engine(architecture: str, kind: str = "f32", kv_dtype: str = "f32", backend: str = "reference", exact: bool = True) -> Engine:
    """One for all tests of a model, so that its plans are made once."""
    return Engine(model(architecture, kind), backend, kv_dtype=kv_dtype, options=CompileOptions(exact=exact))


def tokens(architecture: str) -> Array:
    return reference(architecture)["input_ids"]


def whole(on: Engine, ids: Sequence[int] | Array) -> Array:
    """Logits of every token, evaluated in one step by a session of its own."""
    with Session(on) as session:
        logits: Array = session.eval(ids, all_logits=True)
    return logits


def selections(stored: Mapping[str, Array], ratios: Sequence[int] = ()) -> Iterator[tuple[str, Array, int]]:
    """Each recorded selection that has a tap: the tap's name, the ids [T, K], and tokens in a row (0: not rows, experts).

    A router's last call chooses the experts; those before it choose groups.
    """
    last = {key.rsplit(":", 1)[0]: key for key in sorted(stored) if key.startswith("topk:")}
    for module, key in last.items():
        layer, is_router = int(module.split(".")[2]), module.endswith("gate")
        every = 0 if is_router else ratios[layer] if ratios else 1
        yield f"blk.{layer}.{'experts' if is_router else 'index_ids'}", stored[key].reshape(-1, stored[key].shape[-1]), every


def same_sets(got: Array, want: Array, every: int) -> bool:
    """Whether each token selects the same, nothing twice; -1, and rows that are not complete at its position, do not count.

    Shapes: got, want [T, K], of all tokens from position 0 on.
    """
    for t, (mine, theirs) in enumerate(zip(got.tolist(), want.tolist(), strict=True)):
        chosen = [row for row in mine if row >= 0]
        complete = {row for row in theirs if not every or row < (t + 1) // every}
        if len(set(chosen)) < len(chosen) or set(chosen) != complete:
            return False
    return True
