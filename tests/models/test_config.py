"""Configurations: what config.json and GGUF metadata may say, and the sentence where they say something else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tensorgraph.compiler import compile
from tensorgraph.dtypes import f16, f32
from tensorgraph.engine import Engine
from tensorgraph.errors import FormatError
from tensorgraph.extents import Extents
from tensorgraph.graph import Graph, input
from tensorgraph.models import llama
from tensorgraph.models.architecture import Model, config_of_metadata, model_from_config, model_from_gguf
from tensorgraph.models.builder import AssumedWeights, Builder
from tensorgraph.models.config import keep_layers
from tensorgraph.models.text.gguf import GGUF
from tests.models import tiny
from tests.reference import reference_path


def changed(folder: Path, architecture: str, **fields: Any) -> Model:
    """The model of a tiny config.json in which some fields are others."""
    given = json.loads(reference_path(f"{architecture}/config.json").read_text())
    path = folder / "config.json"
    path.write_text(json.dumps(given | fields))
    return model_from_config(path)


def rewritten(architecture: str, metadata: dict[str, Any], weights: dict[str, np.ndarray] | None = None) -> Any:
    """A file as `model_from_gguf` takes it: a tiny one with other metadata (None: left out), and other weights."""
    file = tiny.model(architecture).file
    assert file is not None
    texts = {**file.metadata, **metadata}
    arrays = {name: file.data(name) for name in file.tensors} if weights is None else weights
    return SimpleNamespace(
        architecture=file.architecture,
        metadata={k: v for k, v in texts.items() if v is not None},
        tensors={name: SimpleNamespace(shape=a.shape, dtype=f32) for name, a in arrays.items()},
        data=arrays.__getitem__,
    )


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "3", '{"architectures": null}', '{"architectures": "LlamaForCausalLM"}', '{"architectures": [3]}', "[" * 9**6],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(FormatError, match="architectures|not a config.json"):
        model_from_config(path)


@pytest.mark.parametrize(
    ("architecture", "fields", "named"),
    [
        ("llama", {"hidden_size": 1.5}, "hidden_size must be int; got 1.5"),
        ("llama", {"hidden_size": 0}, "hidden_size must be from 1 to 2147483647; got 0"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers must be int; got True"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers must be from 1 to 1024"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps must be float"),
        ("llama", {"rope_scaling": "x"}, "rope_scaling must be an object"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters must be an object"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type must be 'default' or .*; got 'dynamic'"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "rope_scaling.factor must be float; got '2'"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor of rope scaling must be above 0"),
        ("deepseek_v3", {"scoring_func": "sqrtsoftplus"}, "scoring_func must be 'softmax' or 'sigmoid'"),
        ("deepseek_v3", {"norm_topk_prob": "no"}, "norm_topk_prob must be bool"),
        ("deepseek_v4", {"compress_ratios": [0, 4]}, "compress_ratios must have a ratio"),
        ("deepseek_v4", {"compress_ratios": "x"}, "compress_ratios must be tuple"),
        ("deepseek_v4", {"o_groups": 0}, "o_groups must be from 1"),
        ("deepseek_v4", {"hc_sinkhorn_iters": 10**9}, "hc_sinkhorn_iters must be from 1 to 1024"),
        ("glm_moe_dsa", {"indexer_types": ["full"]}, "indexer_types must have one a layer"),
        ("glm_moe_dsa", {"indexer_types": ["shared"] * 3}, "the first 'full'"),
        ("glm_moe_dsa", {"indexer_types": ["some"] * 3}, "indexer_types must be 'full' or 'shared'"),
    ],
)
def test_a_value_that_does_not_fit_is_named(tmp_path: Path, architecture: str, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(FormatError, match=named):
        changed(tmp_path, architecture, **fields)


@pytest.mark.parametrize(
    ("architecture", "metadata", "named"),
    [
        ("llama", {"llama.attention.head_count": np.array([4, 2], np.int32)}, "must be the same in all layers"),
        ("llama", {"llama.block_count": 2**31}, "llama.block_count must be from 1 to 1024"),
        ("llama", {"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.rope_type must be"),
        ("deepseek_v3", {"deepseek2.attention.key_length_mla": "x"}, "deepseek2.attention.key_length_mla must be int"),
        (
            "deepseek_v3",
            {"deepseek2.attention.key_length_mla": None, "deepseek2.attention.key_length": None},
            "no 'deepseek2.attention.key_length_mla'",
        ),
        ("deepseek_v3", {"deepseek2.nextn_predict_layers": 9}, "num_hidden_layers must be from 1 to 1024; got -"),
        ("deepseek_v3", {"deepseek2.expert_gating_func": 4}, "must be 'softmax' or 'sigmoid'; got 4"),
        ("deepseek_v4", {"deepseek4.swiglu_clamp_exp": np.arange(6.0)}, "swiglu_clamp_exp must be the same in all layers"),
    ],
)
def test_metadata_that_does_not_fit_is_named(architecture: str, metadata: dict[str, Any], named: str) -> None:
    with pytest.raises(FormatError, match=named):
        model_from_gguf(rewritten(architecture, metadata))


def test_a_size_given_for_every_layer_is_read_where_all_are_the_same() -> None:
    plain = tiny.model("llama").config
    heads = {"llama.attention.head_count": np.full(2, plain.num_attention_heads)}
    assert model_from_gguf(rewritten("llama", heads)).config == plain


def test_a_window_of_0_is_none(tmp_path: Path) -> None:
    assert changed(tmp_path, "llama", sliding_window=0).config.sliding_window is None


def test_a_factor_without_a_type_is_linear() -> None:
    """Files of the time before YaRN give the factor alone, the oldest under `rope.scale_linear`."""
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        scaling = model_from_gguf(rewritten("llama", {f"llama.{key}": 4.0})).config.rope_scaling
        assert (scaling.rope_type, scaling.factor) == ("linear", 4.0)


def rotated(model: Model, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """What Llama's rotary positions make of x [T, H, Dh]."""
    g = Builder.begin(AssumedWeights(f16), Extents(len(x), 512), f16, {})
    y = llama.rotate(g, input("x", (g.T, *x.shape[1:]), f32), model.config)
    return compile(Graph(y=y)).bind().run({"x": x, "positions": positions})["y"]


@pytest.mark.parametrize("attention_factor", [None, 1.5])
def test_yarn_of_llama(tmp_path: Path, attention_factor: float | None) -> None:
    """Against arXiv:2309.00071: interpolated below beta_slow turns of the original context, as they are above beta_fast."""
    factor, original, base, width = 8.0, 64, 10000.0, 32
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    model = changed(
        tmp_path, "llama", head_dim=width, rope_theta=base, rope_scaling={**scaling, "attention_factor": attention_factor}
    )
    rng = np.random.default_rng(3)
    x, positions = rng.standard_normal((5, 2, width)).astype(np.float32), np.array([0, 1, 63, 64, 400], np.int32)
    frequency = base ** (-np.arange(0, width, 2) / width)
    low, high = (width * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(base)) for turns in (32.0, 1.0))
    low, high = max(np.floor(low), 0), min(np.ceil(high), width - 1)
    kept = 1 - np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)
    angle = positions[:, None] * (frequency / factor * (1 - kept) + frequency * kept)  # [T, Dh / 2]
    magnitude = attention_factor or 0.1 * np.log(factor) + 1
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * magnitude * np.exp(1j * angle)[:, None]
    want = np.stack([turned.real, turned.imag], -1).reshape(x.shape)
    assert tiny.nmse(rotated(model, x, positions), want) <= 1e-12


@pytest.mark.parametrize("n", [5, 96])
def test_an_unsplit_key_and_value_weight(n: int) -> None:
    """Older files hold `attn_kv_b` and the sizes of a head under the keys of a latent's."""
    file, stored = tiny.model("deepseek_v3").file, tiny.reference("deepseek_v3")
    assert file is not None
    weights = {name: file.data(name) for name in file.tensors}
    for i in range(3):
        k, v = weights.pop(f"blk.{i}.attn_k_b.weight"), weights.pop(f"blk.{i}.attn_v_b.weight")
        weights[f"blk.{i}.attn_kv_b.weight"] = np.concatenate([k.swapaxes(1, 2), v], 1).reshape(-1, k.shape[1])
    newer = {f"deepseek2.attention.{name}_length_mla": None for name in ("key", "value")}
    older = {f"deepseek2.attention.{n}_length": file.metadata[f"deepseek2.attention.{n}_length_mla"] for n in ("key", "value")}
    engine = Engine(model_from_gguf(rewritten("deepseek_v3", newer | older, weights)), kv_dtype="f32")
    logits = tiny.whole(engine, stored["input_ids"][:n])
    assert tiny.nmse(logits, stored["logits"][:n]) <= tiny.bound("deepseek_v3")


@pytest.mark.parametrize("architecture", [a for a in tiny.ARCHITECTURES if a not in tiny.FOLDERS])
def test_a_configuration_becomes_the_metadata_that_it_was_read_from(architecture: str) -> None:
    model = tiny.model(architecture)
    found = model.metadata()
    assert config_of_metadata(model.architecture, found) == model.config
    assert isinstance(model.file, GGUF)
    for key, value in model.file.metadata.items():
        if key.startswith(model.architecture.name):
            assert np.array_equal(np.float32(found[key]) if isinstance(value, float) else found[key], value), key


def test_kept_layers_take_along_what_is_said_of_them() -> None:
    gemma, v3 = tiny.model("gemma3").config, tiny.model("deepseek_v3").config
    assert [gemma.window(i) for i in range(7)] == [24, 24, 24, 24, 24, None, 24]
    kept = keep_layers(gemma, (1, 5, 6))
    assert [kept.window(i) for i in range(3)] == [24, None, 24] and kept.num_hidden_layers == 3
    assert (v3.first_k_dense_replace, v3.num_hidden_layers) == (1, 3)
    assert [keep_layers(v3, layers).first_k_dense_replace for layers in ((0, 2), (1, 2))] == [1, 0]


@pytest.mark.parametrize("value", [7, "x", [1, 2], [np.ones(2), np.ones(2)], True])
def test_a_stored_value_that_stands_for_none(value: Any) -> None:
    with pytest.raises(FormatError, match="expert_gating_func must be"):
        model_from_gguf(rewritten("deepseek_v3", {"deepseek2.expert_gating_func": value}))
