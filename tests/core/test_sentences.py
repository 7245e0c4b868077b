"""Mistakes that once hung or gave a traceback: each is a sentence now."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tensorgraph.compiler import compile, run_op
from tensorgraph.dims import Dim
from tensorgraph.dtypes import f16
from tensorgraph.errors import AttributeValueError, GraphError, InputError, ShapeError, UnsupportedError
from tensorgraph.extents import Extents
from tensorgraph.graph import input
from tensorgraph.models.architecture import model_from_config
from tensorgraph.models.experts import route
from tensorgraph.ops import mul_mat, relu
from tensorgraph.ops.attention import Segment
from tensorgraph.session import Session
from tests.models.tiny import engine
from tests.reference import reference_path


def test_a_node_is_not_iterated_over() -> None:
    x = input("x", [Dim("T", 8), 4])
    with pytest.raises(TypeError, match="not iterable"):
        list(x)  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        _ = 1 in x  # type: ignore[operator]


def test_only_graphs_are_compiled() -> None:
    with pytest.raises(GraphError, match=r"\[compile\] wanted a Graph; got <relu .*name the outputs"):
        compile(relu(input("x", [4])))  # type: ignore[arg-type]


def test_attention_without_a_scale() -> None:
    x = np.ones((1, 1, 4), np.float32)
    with pytest.raises(AttributeValueError, match=r"\[flash_attn\] scale is missing \(test_sentences.py:"):
        run_op("flash_attn", x, Segment(x, causal=False))  # type: ignore[arg-type]


@pytest.mark.parametrize(("k", "groups", "kept"), [(9, 1, 1), (0, 1, 1), (2, 2, 3)])
def test_no_more_experts_are_chosen_than_there_are(k: int, groups: int, kept: int) -> None:
    with pytest.raises(ShapeError, match=r"\[route\] wanted no more experts and groups than there are; got"):
        route(input("scores", [Dim("T", 8), 8]), None, k, n_group=groups, topk_group=kept)


def test_files_of_state_that_are_not_there(tmp_path: Path) -> None:
    session = Session(engine("llama"))
    session.eval([1, 2, 3])
    with pytest.raises(InputError, match=r"\[save\] .*none/state cannot be written"):
        session.save(tmp_path / "none" / "state")
    with pytest.raises(InputError, match=r"\[load\] there is no file .*state"):
        session.load(tmp_path / "state")
    assert session.ids == [1, 2, 3]


def test_one_output_by_its_name_alone() -> None:
    session = Session(engine("llama"))
    found = session.eval([1, 2, 3], outputs="blk.0.attn_out")
    assert list(found) == ["blk.0.attn_out"] and found["blk.0.attn_out"].shape == (3, 128)


def test_a_mixture_of_experts_of_the_llama_family(tmp_path: Path) -> None:
    given = json.loads(reference_path("llama/config.json").read_text()) | {"num_local_experts": 8}
    (tmp_path / "config.json").write_text(json.dumps(given))
    with pytest.raises(UnsupportedError, match=r"mixture of 8 experts \(Mixtral\)"):
        model_from_config(tmp_path / "config.json").graph(Extents(), f16)


def test_no_batch_axes_leave_no_comma() -> None:
    with pytest.raises(ShapeError, match=r"\[mul_mat\] b must be \[2, 4\]; got \[2, 3\]"):
        mul_mat(input("a", [5, 4]), input("b", [2, 3]))
