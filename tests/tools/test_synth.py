"""`tensorgraph synth`: files with random weights, as others and we read them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf import quants as peer

from tensorgraph.compiler import CompileOptions
from tensorgraph.dtypes import as_dtype, f32
from tensorgraph.engine import Engine
from tensorgraph.extents import Extents
from tensorgraph.models.architecture import Model, model_from_config, model_from_gguf
from tensorgraph.models.text.gguf import GGUF
from tensorgraph.models.text.gguf_writer import NewTensor
from tensorgraph.models.text.tokenizer import Tokenizer
from tensorgraph.ops.formats import FORMATS, decode
from tensorgraph.tools.model_argument import PUBLISHED, published
from tensorgraph.tools.synth import values
from tensorgraph.tools.synth.vocabulary import vocabulary
from tests.models import tiny
from tests.models.tiny import ARCHITECTURES, FOLDERS, nmse
from tests.reference import reference_path
from tests.tools.commands import as_json, ok, refused, tg

SMALL = {
    "vocab_size": 300, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def sets(**fields: Any) -> list[str]:
    return [part for name, value in fields.items() for part in ("--set", f"{name}={json.dumps(value)}")]


def source(architecture: str) -> Path:
    if architecture in FOLDERS:
        return tiny.folder(architecture)
    return reference_path(f"{architecture}/{architecture}-f32.gguf")


def logits(path: Path, backend: str) -> np.ndarray:
    with GGUF.open(path) as file:
        on = Engine(model_from_gguf(file), backend, kv_dtype="f32", options=CompileOptions(exact=True))
        return tiny.whole(on, range(1, 12))


def graph_text(model: Model) -> str:
    """Without the types of weights, and numbers as f32 keeps them."""
    text = re.sub(r"\b(b?f\d+|q8_0)\[", "float[", str(model.graph_as_written(Extents(4, 128), f32)))
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", lambda match: f"{float(match[0]):.6g}", text)


def dtypes(path: Path) -> dict[str, str]:
    with GGUF.open(path) as file:
        return {name: str(info.dtype) for name, info in file.tensors.items()}


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "deepseek_v2"])
def test_a_model_of_every_architecture_runs_and_has_the_source_s_graph(architecture: str, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    report = as_json("synth", source(architecture), out, "--type", "q8_0/f16")
    assert report["size_bytes"] == out.stat().st_size and report["vocab"] == "gpt2" and len(report["totals"]) >= 2
    meant, cpu = logits(out, "reference"), logits(out, "cpu")
    assert np.isfinite(meant).all() and 0.5 < meant.std() < 2 and nmse(cpu, meant) < 1e-8
    with GGUF.open(out) as file:
        assert graph_text(model_from_gguf(file)) == graph_text(tiny.model(architecture))


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a not in FOLDERS])
def test_metadata_is_what_converters_write(architecture: str, tmp_path: Path) -> None:
    """All but the vocabulary and texts about the model, of files that llama.cpp's converter made."""
    ok("synth", source(architecture), tmp_path / "out.gguf", "--vocab", "none")
    with GGUF.open(source(architecture)) as theirs, GGUF.open(tmp_path / "out.gguf") as ours:
        assert ours.architecture == theirs.architecture
        for key in theirs.metadata:
            if key.startswith(theirs.architecture):
                assert np.array_equal(ours.metadata[key], theirs.metadata[key]), key
        assert {name: t.shape for name, t in ours.tensors.items()} == {name: t.shape for name, t in theirs.tensors.items()}


def test_an_encoder_gives_vectors_of_texts(tmp_path: Path) -> None:
    report = as_json("synth", tiny.folder("bert"), tmp_path / "out.gguf", "--type", "q8_0/bf16")
    assert report["vocab"] == "bert" and dtypes(tmp_path / "out.gguf")["position_embd.weight"] == "f32"
    found = as_json("embed", tmp_path / "out.gguf", "a text", "another")
    assert np.isfinite(found["vectors"]).all() and len(found["vectors"]) == 2


def dequantized(raw: np.ndarray, name: str) -> np.ndarray:
    """By the `gguf` package."""
    found: np.ndarray = peer.dequantize(raw.view(np.uint8), GGMLQuantizationType[name.upper()])
    return found


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", *FORMATS])
def test_every_type(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    ok("synth", "llama-3.1-8b", out, "--type", name, *sets(**SMALL))
    meant, cpu = logits(out, "reference"), logits(out, "cpu")
    assert 0.5 < meant.std() < 2 and nmse(cpu, meant) < 1e-8
    with GGUF.open(out) as file:
        for tensor in ("blk.0.ffn_up.weight", "blk.0.ffn_down.weight"):
            raw, shape = file.data(tensor), file.tensors[tensor].shape
            assert str(file.tensors[tensor].dtype) == name
            found = decode(raw, name) if name in ("q1_0", "q2_0") else dequantized(raw, name)
            assert found.shape == shape and found.std() == pytest.approx(shape[-1] ** -0.5, rel=0.06)
        assert file.data("output_norm.weight").mean() == pytest.approx(1, abs=0.05)


def test_rules_the_last_match_wins_and_the_rest_stays(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    rules = ["*attn_*=q8_0", "q4_k/q5_0", "blk.*.attn_q.*=q6_k/bf16", "output*=f16"]
    small = sets(vocab_size=64, num_experts=4, num_experts_per_tok=2, hidden_size=256, moe_intermediate_size=96, head_dim=32)
    ok("synth", "qwen3-30b-a3b", out, "--layers", "2", *small, *(part for rule in rules for part in ("--type", rule)))
    found = dtypes(out)
    wanted = {
        "token_embd": "q4_k", "output": "f16", "output_norm": "f32", "blk.1.attn_q": "q6_k", "blk.1.attn_k": "q8_0",
        "blk.1.attn_output": "q8_0", "blk.0.ffn_up_exps": "q4_k", "blk.0.ffn_down_exps": "q5_0", "blk.0.ffn_gate_inp": "f32",
        "blk.0.attn_q_norm": "f32",
    }  # fmt: skip
    assert {name: found[f"{name}.weight"] for name in wanted} == wanted


def test_layers_keep_what_depends_on_them(tmp_path: Path) -> None:
    """V4's ratios and layers that route by token, and V3's dense layers, beside configurations written for it by hand."""
    v4 = json.loads((PUBLISHED / "deepseek-v4-flash.json").read_text())
    small = {
        "vocab_size": 64, "hidden_size": 128, "moe_intermediate_size": 64, "num_attention_heads": 4, "head_dim": 64,
        "qk_rope_head_dim": 32, "q_lora_rank": 64, "o_lora_rank": 32, "o_groups": 2, "index_n_heads": 4, "index_head_dim": 64,
        "sliding_window": 32, "index_topk": 16, "max_position_embeddings": 256,
    }  # fmt: skip
    ok("synth", "deepseek-v4-flash", tmp_path / "v4.gguf", *sets(**small), "--layers", "1-3,40", "--experts", 8)
    meant = v4 | small | {"num_hidden_layers": 4, "compress_ratios": [0, 4, 128, 4], "num_hash_layers": 2, "n_routed_experts": 8}
    (tmp_path / "v4.json").write_text(json.dumps(meant))
    assert v4["compress_ratios"][1:4] + [v4["compress_ratios"][40]] == meant["compress_ratios"]
    v3 = json.loads((PUBLISHED / "deepseek-v3.json").read_text())
    small = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_attention_heads": 2,
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
        "max_position_embeddings": 256,
    }  # fmt: skip
    ok("synth", "deepseek-v3", tmp_path / "v3.gguf", *sets(**small), "--layers", "0,2,3-4", "--experts", 16)
    meant = v3 | small | {"num_hidden_layers": 4, "first_k_dense_replace": 2, "n_routed_experts": 16}
    (tmp_path / "v3.json").write_text(json.dumps(meant))
    for name in ("v3", "v4"):
        with GGUF.open(tmp_path / f"{name}.gguf") as file:
            assert graph_text(model_from_gguf(file)) == graph_text(model_from_config(tmp_path / f"{name}.json"))


def test_layers_whose_kinds_files_cannot_say_are_refused(tmp_path: Path) -> None:
    ok("synth", source("gemma3"), tmp_path / "out.gguf", "--layers", "0-5")
    assert "no key for layer_types" in refused("synth", source("gemma3"), tmp_path / "b.gguf", "--layers", "1,5")
    assert not (tmp_path / "b.gguf").exists()


def test_changed_fields_are_as_in_config_json(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    more = sets(tie_word_embeddings=True, rope_theta=1e4, **{"rope_scaling.rope_type": "linear", "rope_scaling.factor": 4})
    ok("synth", "llama-3.1-8b", out, *sets(**SMALL | {"num_hidden_layers": 3}), *more)
    with GGUF.open(out) as file:
        c = model_from_gguf(file).config
        assert (c.num_hidden_layers, c.hidden_size, c.rope_theta) == (3, 256, 1e4)
        assert (c.rope_scaling.rope_type, c.rope_scaling.factor) == ("linear", 4.0)
        assert "output.weight" not in file.tensors and "rope_freqs.weight" not in file.tensors
    ok("synth", out, tmp_path / "longer.gguf", *sets(num_hidden_layers=5))
    assert "blk.4.ffn_up.weight" in dtypes(tmp_path / "longer.gguf")


def test_frequencies_that_files_hold_as_a_tensor_are_the_published_ones(tmp_path: Path) -> None:
    """Llama 3.1's, computed here as published: low frequencies are divided by 8, high ones kept, with a ramp between them."""
    small = {**SMALL, "hidden_size": 512}  # heads of 128, as published
    ok("synth", "llama-3.1-8b", tmp_path / "a.gguf", *sets(**small))
    ok("synth", tmp_path / "a.gguf", tmp_path / "b.gguf")
    wave = 2 * math.pi * 500000.0 ** (np.arange(64) / 64)
    ramp = np.clip((8192 / wave - 1) / (4 - 1), 0, 1)
    for name in ("a", "b"):
        with GGUF.open(tmp_path / f"{name}.gguf") as file:
            assert np.allclose(file.data("rope_freqs.weight"), 1 / ((1 - ramp) / 8 + ramp), rtol=1e-5)


def test_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        ok("synth", source("llama"), tmp_path / name, "--seed", seed, "--type", "q8_0")
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b and len(a) == len(c) and a != c


@pytest.mark.parametrize("name", ["q4_k", "mxfp4", "f16"])
def test_a_tensor_of_several_pieces_has_no_row_twice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "PIECE_BYTES", 1 << 17)
    tensor = NewTensor("blk.0.ffn_up.weight", as_dtype(name), (4, 100, 1024))
    pieces = [bytes(piece) for piece in values.contents(tensor, 0, 0)]
    rows = np.frombuffer(b"".join(pieces), np.uint8).reshape(400, -1)
    assert len(pieces) > 1 and rows.size == tensor.size_bytes and len(np.unique(rows, axis=0)) == 400


def test_experts_by_token_are_different_ones() -> None:
    (piece,) = values.contents(NewTensor("blk.0.ffn_gate_tid2eid.weight", as_dtype("i32"), (500, 6)), 0, 8)
    ids = np.frombuffer(piece, np.int32).reshape(500, 6)
    assert all(len(set(row)) == 6 for row in ids.tolist()) and set(ids.ravel()) == set(range(8))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("n_tokens", [262, 1000, 70000])
def test_vocabularies_spell_every_text(kind: str, n_tokens: int) -> None:
    tokens = Tokenizer.from_gguf(vocabulary(kind, n_tokens))
    assert tokens.vocab_size == n_tokens == len({tokens.token(i) for i in range(n_tokens)})
    for text in ("the rest", "A cafè, 42 µm\n\n  东京 🙂"):
        ids = tokens.encode(text, add_special=False)
        assert kind == "bert" or tokens.decode(ids) == text
        assert kind == "bert" or n_tokens < 1000 or len(tokens.encode("there then")) < len("there then")
    assert kind != "bert" or tokens.decode(tokens.encode("the rest", add_special=False)).strip() == "the rest"


def test_too_few_tokens_for_a_vocabulary(tmp_path: Path) -> None:
    small = sets(**SMALL | {"vocab_size": 100})
    assert as_json("synth", "llama-3.1-8b", tmp_path / "a.gguf", *small)["vocab"] == "no_vocab"
    assert "258 tokens; got 100" in refused("synth", "llama-3.1-8b", tmp_path / "b.gguf", *small, "--vocab", "gpt2")
    assert "got 'x'" in refused("synth", "llama-3.1-8b", tmp_path / "b.gguf", *small, "--vocab", "x")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--type", "q9"], "with types of f32, f16"),
        (["--type", "q8_k"], "with types of f32, f16"),
        (["--type", "f64"], "with types of f32, f16"),
        (["--type", "foo*=q4_0"], "no matrix is named 'foo*'"),
        (["--type", "q4_k"], "blk.0.ffn_down.weight is 352 wide; wanted a multiple of 256 (q4_k): --type q4_k/f16 makes"),
        (["--type", "*up*=q4_k/q5_k"], "128 wide; wanted a multiple of 256 (q4_k) or 256 (q5_k): --type '*up*=q4_k/f16'"),
        (["--layers", "3"], "of 2 layers; got '3'"),
        (["--layers", "1,0"], "rising numbers"),
        (["--layers", "0"], "got '0'"),
        (["--layers", "1-x"], "got '1-x'"),
        (["--experts", "4"], "mixtures of experts"),
        (["--set", "hidden=3"], "with a name of vocab_size, hidden_size"),
        (["--set", "rope_scaling.x=3"], "with a name of vocab_size"),
        (["--set", "hidden_size"], "NAME=VALUE"),
        (["--set", "hidden_size=big"], "hidden_size must be int"),
        (["--set", "num_key_value_heads=3"], "a divisor of 4"),
    ],
)
def test_what_is_refused_writes_nothing(arguments: list[str], said: str, tmp_path: Path) -> None:
    if "q4_k" in arguments:
        arguments = [*arguments, *sets(hidden_size=256, head_dim=64)]
    assert said in refused("synth", source("llama"), tmp_path / "out.gguf", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_kept_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    assert "--force replaces it" in refused("synth", source("llama"), out) and out.read_text() == "mine"
    ok("synth", source("llama"), out, "--force")
    assert dtypes(out)["output_norm.weight"] == "f32" and list(tmp_path.iterdir()) == [out]
    assert "a folder that is there" in refused("synth", source("llama"), tmp_path, "--force")
    assert "a folder that is there" in refused("synth", source("llama"), tmp_path / "none" / "out.gguf")


def _raise(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


def test_no_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(values, "contents", _raise(AssertionError("it was written")))
    assert "takes 990.6 KiB; there is room for 1000 B" in refused("synth", source("llama"), tmp_path / "out.gguf")


@pytest.mark.parametrize(("error", "code"), [(OSError("no space left"), 2), (KeyboardInterrupt(), 130)])
def test_a_failure_leaves_no_part(error: BaseException, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    monkeypatch.setattr(values, "contents", _raise(error))
    assert tg("synth", source("llama"), out, "--force").exit_code == code
    assert out.read_text() == "mine" and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("deepseek-v2-lite", 15.7), ("gemma3-1b", 1.0), ("gpt-oss-20b", 20.9), ("llama-3.1-8b", 8.03), ("qwen2.5-0.5b", 0.494),
        ("qwen3-0.6b", 0.596), ("qwen3-30b-a3b", 30.5),
    ],
)  # fmt: skip
def test_published_shapes_have_the_published_number_of_parameters(name: str, billions: float) -> None:
    assert name in published()
    weights = as_json("plan", name, "--tokens", 1, "--context", 256, "--type", "bf16")["weight_bytes"] / 2e9
    assert weights == pytest.approx(billions, rel=5e-3)


def test_a_written_file_generates(tmp_path: Path) -> None:
    ok("synth", "llama-3.1-8b", tmp_path / "out.gguf", "--type", "q4_k", *sets(**SMALL))
    found = as_json("run", tmp_path / "out.gguf", "-p", "the rest", "-n", 4)
    assert 0 < len(found["ids"]) <= 4 and found["prompt_tokens"] < len("the rest")
