"""`tensorgraph logits` against the references."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tensorgraph.tools.logits import cuts
from tests.models.tiny import nmse, reference
from tests.reference import reference_path
from tests.tools.commands import arrays, as_json, gguf, ok, refused, tg

EXACT = ("--kv-type", "f32", "--exact")


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", ()),
        ("llama", ("--prefill", 64, "--threads", 1)),
        ("llama", ("--chunk", 7, "--backend", "reference", "--threads", "auto")),
        ("deepseek_v4", ("--prefill", 300, "--chunk", 130)),
    ],
)
def test_logits_are_the_references(architecture: str, options: tuple[object, ...], tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    ids = reference_path(f"{architecture}/reference.npz")
    assert ok("logits", gguf(architecture), "--ids", ids, *options, *EXACT, "--out", out) == ""
    written = arrays(out)
    assert list(written) == ["logits"] and written["logits"].dtype == np.float32
    assert nmse(written["logits"], reference(architecture)["logits"]) <= 1e-9


@pytest.mark.parametrize(("backend", "largest"), [("reference", 1e-20), ("cpu", 1e-11)])
@pytest.mark.parametrize("architecture", ["llama", "deepseek_v4"])
def test_a_ragged_batch_is_each_sequence_alone(architecture: str, backend: str, largest: float, tmp_path: Path) -> None:
    """Sequences of 70, 37 and 4 tokens: chunks of 16 of the first 40, then one by one until each is at its end."""
    ids = reference(architecture)["input_ids"][:70]
    (tmp_path / "short.json").write_text(json.dumps(ids[30:67].tolist()))
    np.savez(tmp_path / "two.npz", long=ids, tiny=ids[:4])
    names = [f"{tmp_path}/two.npz:long", f"{tmp_path}/short.json", f"{tmp_path}/two.npz:tiny"]
    options = ("--prefill", 40, "--chunk", 16, *EXACT, "--dump", "blk.1.attn_out", "--backend", backend)
    given = [part for name in names for part in ("--ids", name)]
    report = as_json("logits", gguf(architecture), *given, *options, "--out", tmp_path / "all.npz")
    together = arrays(tmp_path / "all.npz")
    assert set(together) == {f"{what}_{i}" for what in ("logits", "blk.1.attn_out") for i in range(3)} == set(report["arrays"])
    for i, name in enumerate(names):
        ok("logits", gguf(architecture), "--ids", name, *options, "--out", tmp_path / "one.npz")
        for what, alone in arrays(tmp_path / "one.npz").items():
            assert len(alone) == (70, 37, 4)[i] and nmse(together[f"{what}_{i}"], alone) <= largest


def test_dumped_nodes_are_the_references_rows(tmp_path: Path) -> None:
    """The residual stream after each layer."""
    out, stored = tmp_path / "out.npz", reference("llama")
    taps = ("--dump", "blk.0.out", "--dump", "blk.1.out", "--chunk", 10)
    ok("logits", gguf("llama"), "--ids", reference_path("llama/reference.npz"), *taps, *EXACT, "--out", out)
    written = arrays(out)
    for i in range(2):
        assert nmse(written[f"blk.{i}.out"][stored["hidden_pos"]], stored[f"hidden_layer{i}"]) <= 1e-9


def test_the_kv_type_is_the_one_asked_for(tmp_path: Path) -> None:
    ids, errors = reference_path("llama/reference.npz"), {}
    for kv_type in ("f32", "f16", "bf16", "q8_0"):
        ok("logits", gguf("llama"), "--ids", ids, "--kv-type", kv_type, "--out", tmp_path / "out.npz")
        errors[kv_type] = nmse(arrays(tmp_path / "out.npz")["logits"], reference("llama")["logits"])
    assert errors["f32"] < 1e-10 < errors["f16"] < 1e-6 < errors["bf16"] < errors["q8_0"] < 1e-3


def test_exact_is_what_was_asked_for(tmp_path: Path) -> None:
    """Quantised weights against their dequantised values: with f32 activations, and with activations in int8."""
    stored, out = reference("llama", "quant_refs"), tmp_path / "out.npz"
    ids, errors = reference_path("llama/reference.npz"), []
    for options in (("--exact",), ()):
        ok("logits", reference_path("llama/llama-q4_1.gguf"), "--ids", ids, "--kv-type", "f32", *options, "--out", out)
        errors.append(nmse(arrays(out)["logits"][stored["pos"]], stored["llama-q4_1/deq"]))
    assert errors[0] <= 1e-9 and 1e-6 < errors[1] < 1e-2


def test_json_says_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text("[1, 2, 3]")
    report = as_json("logits", gguf("llama"), "--ids", tmp_path / "ids.json", "--out", tmp_path / "name")
    assert report == {"out": f"{tmp_path}/name", "arrays": {"logits": {"shape": [3, 512], "dtype": "float32"}}}
    assert arrays(tmp_path / "name")["logits"].shape == (3, 512)


@pytest.mark.parametrize(
    ("length", "prefill", "chunk", "wanted"),
    [
        (5, None, None, [(0, 5)]),
        (5, None, 2, [(0, 2), (2, 4), (4, 5)]),
        (5, 3, None, [(0, 3), (3, 4), (4, 5)]),
        (5, 3, 2, [(0, 2), (2, 3), (3, 4), (4, 5)]),
        (2, 7, 4, [(0, 2)]),
        (2, 0, None, [(0, 1), (1, 2)]),
    ],
)
def test_where_steps_are_cut(length: int, prefill: int | None, chunk: int | None, wanted: list[tuple[int, int]]) -> None:
    assert list(cuts(length, prefill, chunk)) == wanted


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("ids.json", None, "no file"),
        ("ids.json", b"[1, 512]", "token id 512 (number 1) is outside the vocabulary of 512"),
        ("ids.json", b"[1, -2]", "token id -2"),
        ("ids.json", b"[]", "whole numbers"),
        ("ids.json", b"[1.5]", "whole numbers"),
        ("ids.json", b"[[1], [2]]", "whole numbers"),
        ("ids.json", b'"text"', "whole numbers"),
        ("ids.json", b"[1, [2]]", "no token ids"),
        ("ids.json", b"[1", "no token ids"),
        ("ids.json", b"\xff\xfe\x00", "no token ids"),
        ("ids.json", b"[" * 200_000, "no token ids"),
        ("ids.npz", None, "no file"),
        ("ids.npz", b"[1, 2]", "it is no .npz file"),
        ("ids.npz", b"PK\x03\x04", "no token ids"),
        ("ids.npz", b"", "no token ids"),
    ],
)
def test_ids_that_are_none_are_a_sentence(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    out = tmp_path / "out.npz"
    assert said in refused("logits", gguf("llama"), "--ids", tmp_path / name, "--out", out)
    assert not out.exists()


def test_an_array_must_be_there_and_be_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", a=[1], b=[2])
    for name in ("two.npz", "two.npz:c"):
        line = refused("logits", gguf("llama"), "--ids", f"{tmp_path}/{name}", "--out", tmp_path / "out.npz")
        assert "one of its arrays a, b" in line


def test_a_node_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text("[1]")
    line = refused("logits", gguf("llama"), "--ids", tmp_path / "ids.json", "--dump", "blk.9.out", "--out", tmp_path / "o")
    assert "'blk.9.out'" in line and "blk.1.attn_out" in line


def test_a_sequence_longer_than_the_context_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text(json.dumps([1] * 5000))
    line = refused("logits", gguf("llama"), "--ids", tmp_path / "ids.json", "--out", tmp_path / "out.npz")
    assert "the context holds" in line and "5000 are new" in line


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text("[1]")
    for out in (tmp_path / "no/out", tmp_path):
        line = refused("logits", tmp_path / "none.gguf", "--ids", tmp_path / "ids.json", "--out", out)
        assert "a file in a folder that is there" in line  # before the model is looked for


def test_a_wrong_option_shows_the_usage() -> None:
    result = tg("logits", gguf("llama"))
    assert result.exit_code == 2 and "--ids" in result.stderr
