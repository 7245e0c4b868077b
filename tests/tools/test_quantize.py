"""`tensorgraph quantize`: what is rounded, by ggml's rounding, and that all else stays byte for byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf import quants as peer

from tensorgraph.models.text.gguf import GGUF
from tests.tools.commands import as_json, gguf, ok, refused

SOURCE = gguf("llama")


def stored(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Of each tensor its type, shape and bytes, by the `gguf` package."""
    return {
        t.name: (t.tensor_type.name.lower(), tuple(int(n) for n in t.shape[::-1]), t.data.tobytes())
        for t in GGUFReader(path).tensors
    }


@pytest.mark.parametrize("name", ["q4_0", "q8_0", "q5_1", "bf16", "f16"])
def test_matrices_are_rounded_as_ggml_does_and_the_rest_stays(name: str, tmp_path: Path) -> None:
    """Against the `gguf` package's own rounding."""
    out = tmp_path / "out.gguf"
    report = as_json("quantize", SOURCE, out, "--type", name)
    before, after = stored(SOURCE), stored(out)
    assert report["size_bytes"] == out.stat().st_size and list(after) == list(before)
    error = total = 0.0
    for tensor, (_, shape, content) in before.items():
        if len(shape) == 1:
            assert after[tensor] == before[tensor]
            continue
        values = np.frombuffer(content, np.float32).reshape(shape)
        kind = GGMLQuantizationType[name.upper()]
        raw = peer.quantize(values, kind)
        assert after[tensor] == (name, shape, raw.tobytes()), tensor
        back = peer.dequantize(raw, kind).reshape(shape)
        error += float(((back - values) ** 2).sum(dtype=np.float64))
        total += float((values**2).sum(dtype=np.float64))
    found = {t["dtype"]: t["nmse"] for t in report["totals"]}
    assert found == {name: pytest.approx(error / total, rel=1e-5), "f32": None}


def test_rules_are_those_of_synth_and_what_none_names_stays(tmp_path: Path) -> None:
    out, again = tmp_path / "out.gguf", tmp_path / "again.gguf"
    ok("quantize", SOURCE, out, "--type", "blk.*=q4_0", "--type", "blk.1.ffn_down*=q6_k/q8_0", "-t", 1)
    found, before = stored(out), stored(SOURCE)
    assert {name: kind for name, (kind, _, _) in found.items() if "blk.1.ffn_" in name} == {
        "blk.1.ffn_gate.weight": "q4_0", "blk.1.ffn_up.weight": "q4_0", "blk.1.ffn_down.weight": "q8_0",
        "blk.1.ffn_norm.weight": "f32",
    }  # fmt: skip
    assert found["token_embd.weight"] == before["token_embd.weight"]
    ok("quantize", out, again, "--type", "blk.0.attn_q.*=f32")  # what is quantised already is read, too
    raw = np.frombuffer(found["blk.0.attn_q.weight"][2], np.uint8).reshape(*found["blk.0.attn_q.weight"][1][:-1], -1)
    meant = peer.dequantize(raw, GGMLQuantizationType.Q4_0)
    assert stored(again)["blk.0.attn_q.weight"][2] == meant.tobytes()
    assert stored(again)["blk.0.attn_k.weight"] == found["blk.0.attn_k.weight"]


def test_metadata_is_the_same_but_for_what_no_longer_holds(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    ok("quantize", SOURCE, out, "--type", "q8_0")
    before, after = GGUFReader(SOURCE).fields, GGUFReader(out).fields
    kept = {key for key in before if not key.startswith("GGUF.")} - {"general.file_type", "general.alignment"}
    assert {key for key in after if not key.startswith("GGUF.")} == kept and "tokenizer.ggml.tokens" in kept
    for key in kept:
        assert after[key].types == before[key].types and after[key].contents() == before[key].contents(), key


def test_routers_stay_and_experts_do_not(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    ok("quantize", gguf("deepseek_v3"), out, "--type", "q8_0/f16")
    with GGUF.open(gguf("deepseek_v3")) as source, GGUF.open(out) as file:
        types = {name: str(info.dtype) for name, info in file.tensors.items()}
        assert any("ffn_gate_inp" in name for name in types)
        for name, info in source.tensors.items():
            rounds = len(info.shape) > 1 and "ffn_gate_inp" not in name and not name.endswith(".bias")
            assert types[name] == ("f32" if not rounds else "q8_0" if info.shape[-1] % 32 == 0 else "f16"), name
            assert file.tensors[name].shape == info.shape


def test_a_quantised_model_speaks(tmp_path: Path) -> None:
    ok("quantize", "smollm2", tmp_path / "out.gguf", "--type", "blk.*=q8_0")
    assert "Paris" in ok("run", tmp_path / "out.gguf", "-p", "The capital of France is", "-n", 4, "--temp", 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "wanted --type TYPE"),
        (("--type", "q3"), "[quantize] --type wants TYPE or GLOB=TYPE"),
        (("--type", "q4_k"), "[quantize] "),
        (("--type", "*.nothing=q8_0"), "[quantize] no matrix is named '*.nothing'"),
    ],
)
def test_what_cannot_be_is_a_sentence(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    assert said in refused("quantize", SOURCE, tmp_path / "out.gguf", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_files_are_not_written_over(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    ok("quantize", SOURCE, out, "--type", "f16")
    assert "--force replaces it" in refused("quantize", SOURCE, out, "--type", "f16")
    assert "is the file that is read" in refused("quantize", out, out, "--type", "q8_0", "--force")
    assert "wanted a GGUF file" in refused("quantize", "deepseek-v3", tmp_path / "other.gguf", "--type", "f16")
