"""BERT against transformers in float64: hidden states of each layer, alone and with other sequences beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorgraph.compiler import CompileOptions
from tensorgraph.dtypes import f16
from tensorgraph.engine import Engine
from tensorgraph.errors import FormatError, InputError, ShapeError, UnknownNameError, UnsupportedError
from tensorgraph.extents import Extents
from tensorgraph.models.architecture import model_from_checkpoint, model_from_config, model_from_gguf
from tensorgraph.models.text.checkpoint import Checkpoint
from tensorgraph.models.text.gguf import GGUF
from tensorgraph.session import Session
from tests.models import encoder_file, tiny
from tests.models.text.test_checkpoint import folder_of, says, tensors
from tests.reference import reference_path

LAST = ("attn_output", "attn_output_norm", "ffn_up", "ffn_down", "layer_output_norm")
TAPS = ("embed", "blk.0.out", "blk.1.out")
N_SEQUENCES = 2


def ids(i: int) -> tiny.Array:
    return tiny.reference("bert")[f"ids/{i}"]


def hidden(engine: Engine, *sequences: tiny.Array) -> list[dict[str, tiny.Array]]:
    """The taps of sequences that are evaluated in one step, and the result."""
    first = Session(engine, step_tokens=128)
    sessions = [first, *(first.sibling() for _ in sequences[1:])]
    found: list[dict[str, tiny.Array]] = Session.batch(
        list(zip(sessions, sequences, strict=True)), outputs=(*TAPS, "norm"), all_logits=True
    )
    return found


def check(found: dict[str, tiny.Array], i: int, most: float = 1e-9) -> None:
    wanted = tiny.reference("bert")[f"hidden/{i}"]
    for tap, want in zip((*TAPS, "norm"), (*wanted, wanted[-1]), strict=True):
        error = tiny.nmse(found[tap], want)
        assert error <= most, f"{tap}: NMSE {error:.1e}"


@tiny.on_every_backend
def test_hidden_states(backend: str) -> None:
    for i in range(N_SEQUENCES):
        check(*hidden(tiny.engine("bert", backend=backend), ids(i)), i)


@tiny.on_every_backend
def test_a_ragged_batch(backend: str) -> None:
    """Beside a third sequence, of another text: rows of other sequences are wrong rows."""
    other = (ids(0)[:23] * 5 + 2) % 64
    found = hidden(tiny.engine("bert", backend=backend), other, ids(1), ids(0))
    check(found[1], 1)
    check(found[2], 0)
    (alone,) = hidden(tiny.engine("bert", backend=backend), other)
    for tap, value in alone.items():
        assert tiny.nmse(found[0][tap], value) <= 1e-12


@tiny.on_every_backend
def test_without_fusion_and_exactness(backend: str) -> None:
    """Weights are bf16: on the CPU, not exactly, each product adds some 1.4e-8."""
    most = 1e-9 if backend == "reference" else 5e-7
    check(*hidden(Engine(tiny.model("bert"), backend, options=CompileOptions(fuse=False, exact=True)), ids(0)), 0)
    for fuse in (True, False):
        check(*hidden(Engine(tiny.model("bert"), backend, options=CompileOptions(fuse=fuse)), ids(0)), 0, most)


def test_a_step_has_neither_state_nor_logits() -> None:
    model = tiny.model("bert")
    graph = model.graph(Extents(), f16)
    assert (model.encodes, dict(model.states()), dict(graph.streams)) == (True, {}, {}) and list(graph.outputs) == ["norm"]
    with pytest.raises(UnknownNameError, match="no node is named 'logits'"):
        Session(tiny.engine("bert")).eval(ids(1))
    with pytest.raises(InputError, match=r"the context holds 32 tokens; 0 tokens are there and 33 are new"):
        Session(tiny.engine("bert")).eval([1] * 33, outputs="norm")


@tiny.on_every_backend
def test_the_same_weights_from_a_gguf_file(backend: str, tmp_path: Path) -> None:
    with GGUF.open(encoder_file.write(tmp_path / "bert.gguf")) as file:
        model = model_from_gguf(file)
        assert replace(model.config, layer_norm_eps=1e-3) == tiny.model("bert").config  # the file's is rounded to f32
        assert set(file.tensors) == set(tiny.model("bert").file.tensors)  # type: ignore[union-attr]
        check(*hidden(Engine(model, backend), ids(0)), 0)


def test_a_file_says_how_many_types_of_tokens_there_are(tmp_path: Path) -> None:
    for count, types in ((None, 2), (1, 1)):
        path = encoder_file.write(tmp_path / f"{types}.gguf", **{"tokenizer.ggml.token_type_count": count})
        with GGUF.open(path) as file:
            assert model_from_gguf(file).config.type_vocab_size == types


def test_a_configuration_alone_gives_the_same_graph() -> None:
    described = model_from_config(reference_path("bert/config.json"), "bf16")
    assert described.graph(Extents(), f16).key == tiny.model("bert").graph(Extents(), f16).key


Change = Callable[[dict[str, Any]], None]


def renamed(new: Callable[[str], str]) -> Change:
    def change(held: dict[str, Any]) -> None:
        for name in list(held):
            held[new(name)] = held.pop(name)

    return change


@pytest.mark.parametrize(
    "new",
    [
        lambda name: f"bert.{name}",
        lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
        lambda name: f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma"),
    ],
)
def test_other_names_of_published_tensors(new: Callable[[str], str], tmp_path: Path) -> None:
    tensors(renamed(new))(folder_of("bert", tmp_path))
    file = Checkpoint.open(tmp_path)
    check(*hidden(Engine(model_from_checkpoint(file)), ids(1)), 1)
    assert file.unused == []


@pytest.mark.parametrize(
    ("act", "formula"),
    [
        ("gelu_new", lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
        ("gelu_pytorch_tanh", lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
        ("relu", lambda x: np.maximum(x, 0)),
    ],
)
def test_other_units(act: str, formula: Callable[[tiny.Array], tiny.Array], tmp_path: Path) -> None:
    """The last layer's feed-forward, computed here from what comes before it."""
    says("hidden_act", act)(folder_of("bert", tmp_path))
    model = model_from_checkpoint(Checkpoint.open(tmp_path))
    found = Session(Engine(model)).eval(ids(1), outputs=("blk.0.out", "blk.1.attn_out", "norm"))
    names = [f"{name}.{kind}" for name in LAST for kind in ("weight", "bias")]
    held = {name: model.weight(f"blk.1.{name}").astype(np.float64) for name in names}

    def normed(x: tiny.Array, name: str) -> tiny.Array:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-3) * held[f"{name}.weight"] + held[f"{name}.bias"]

    def linear(x: tiny.Array, name: str) -> tiny.Array:
        return x @ held[f"{name}.weight"].T + held[f"{name}.bias"]

    x = normed(found["blk.0.out"] + linear(found["blk.1.attn_out"], "attn_output"), "attn_output_norm")
    y = normed(x + linear(formula(linear(x, "ffn_up")), "ffn_down"), "layer_output_norm")
    assert tiny.nmse(found["norm"][-1], y[-1]) <= 1e-9


@pytest.mark.parametrize(
    ("key", "value", "error", "said"),
    [
        ("hidden_act", "silu", FormatError, "hidden_act must be 'gelu' or .*; got 'silu'"),
        ("position_embedding_type", "relative_key", FormatError, "position_embedding_type must be 'absolute'"),
        ("is_decoder", True, UnsupportedError, r"\[bert\] this model is a decoder"),
        ("num_attention_heads", 5, ShapeError, r"\[reshape\] -1 is not determined"),
    ],
)
def test_what_is_not_there_is_a_sentence(key: str, value: Any, error: type[Exception], said: str, tmp_path: Path) -> None:
    says(key, value)(folder_of("bert", tmp_path))
    with pytest.raises(error, match=said):
        model_from_checkpoint(Checkpoint.open(tmp_path)).graph(Extents(), f16)


@pytest.mark.parametrize("name", ["encoder.layer.1.output.dense.bias", "embeddings.token_type_embeddings.weight"])
def test_a_missing_tensor_is_a_sentence(name: str, tmp_path: Path) -> None:
    tensors(lambda held: held.pop(name))(folder_of("bert", tmp_path))
    with pytest.raises(UnknownNameError, match=r"ffn_down.bias is missing|token_types.weight is missing"):
        model_from_checkpoint(Checkpoint.open(tmp_path)).graph(Extents(), f16)


def test_a_causal_file_is_refused(tmp_path: Path) -> None:
    path = encoder_file.write(tmp_path / "causal.gguf", **{"bert.attention.causal": True})
    with GGUF.open(path) as file, pytest.raises(UnsupportedError, match="attention.causal"):
        model_from_gguf(file).graph(Extents(), f16)
