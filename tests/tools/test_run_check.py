"""`tensorgraph run --check` and `check-node`: a planted mistake in a real model is found and named; right models agree."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tensorgraph.models.text.model import load
from tests.ops.kernel_devices import registered
from tests.reference import reference_path
from tests.tools.commands import as_json, gguf, ok, refused, tg
from tests.tools.testing.wrong_devices import WrongCpu, last_element_off, reads, wrong_node

PROMPT = "There is a house in a wood with a river"
LAYER = "blk.17"


def test_a_model_that_agrees_says_how_far() -> None:
    text = ok("run", gguf("llama"), "-p", PROMPT, "--check", "reference", "--kv-type", "f32")
    first, second = text.splitlines()
    assert first.startswith("cpu beside reference, exact, 3 steps: 38 nodes agree, worst NMSE ") and "(llama.py:" in first
    assert second.startswith("  the steps as they are: NMSE ")


def test_as_json_all_of_it_is_there() -> None:
    found = as_json("run", gguf("llama"), "-p", PROMPT, "--check", "reference", "--check-tokens", 5, "--check-steps", 1)
    with load(gguf("llama")) as model:
        assert found["ids"] == model.tokenizer.encode(PROMPT, add_special=True)[:5]
    (check,) = found["checks"]
    assert found["ok"] and check["ok"] and check["first"] is None and (check["steps"], check["nodes"]) == (2, 38)
    assert 0 < check["worst"]["mul_mat"]["nmse"] < 1e-12 and check["whole"]["logits"] < 1e-6


def test_quantised_weights_are_checked_exactly_and_as_they_run() -> None:
    model = reference_path("llama/llama-q8_0.gguf")
    for exact, modes in (((), [True, False]), (("--exact",), [True])):
        found = as_json("run", model, "-p", PROMPT, "--check", "reference", *exact)
        assert found["ok"] and [check["exact"] for check in found["checks"]] == modes


def planted(name: str) -> WrongCpu:
    with load("smollm2") as model:
        return WrongCpu(name, weight=np.array(model.model.weight(f"{LAYER}.ffn_down.weight")))


def test_a_planted_wrong_node_in_a_real_model_is_found_and_named(tmp_path: Path) -> None:
    """Two rows of one of 211 matrices are exchanged when it is packed."""
    with registered("planted", planted):
        options = ("--chat", "--backend", "planted", "--check", "reference", "--check-folder", tmp_path)
        result = tg("run", "smollm2", "-p", "Why is the sky blue?", *options, "--json")
        assert result.exit_code == 1, result.output
        (check,) = json.loads(result.stdout)["checks"]
        first = check["first"]
        assert (first["node"]["op"], first["node"]["name"]) == ("mul_mat", f"{LAYER}.ffn_down.weight")
        assert first["node"]["where"].startswith("llama.py:") and first["block"].startswith("blocks.py:")
        assert first["alone"] and first["difference"]["at"][1] in (5, 6) and first["verdict"] == "wrong by itself"
        again = tg("check-node", first["reproduction"])
        assert again.exit_code == 1 and again.stdout.count(f"{LAYER}.ffn_down.weight: wrong by itself") == 2
    now = ok("check-node", first["reproduction"], "--backend", "cpu")
    assert "now: cpu beside reference, exact, 1 step: 1 node agrees" in now


def test_a_real_model_agrees(tmp_path: Path) -> None:
    """The model that `make run` asks, exactly and as it runs."""
    options = ("--check", "reference", "--check-steps", 1, "--check-folder", tmp_path)
    exact, rounded = as_json("run", "smollm2", "--chat", "-p", "Hello", *options)["checks"]
    assert exact["ok"] and rounded["ok"] and exact["nodes"] == rounded["nodes"] == 514
    assert max(worst["nmse"] for worst in exact["worst"].values()) < 1e-11 and max(exact["whole"].values()) < 1e-5
    assert rounded["worst"]["flash_attn"]["nmse"] < 1e-11 and max(rounded["whole"].values()) < 0.05


def test_an_encoder_agrees_and_a_wrong_node_of_it_is_named(tmp_path: Path) -> None:
    """It has no state and gives no logits: one step, the rows of all tokens."""
    (check,) = as_json("run", "minilm", "-p", "Two cats sit on a wall", "--check", "reference")["checks"]
    assert check["ok"] and (check["steps"], check["nodes"]) == (1, 115) and 0 < check["whole"]["norm"] < 1e-11
    with registered("wrong", lambda name: wrong_node(name, reads("blk.3.ffn_up.weight"), last_element_off)):
        options = ("--backend", "wrong", "--check", "reference", "--check-folder", tmp_path)
        result = tg("run", "minilm", "-p", "Two cats", *options)
    assert result.exit_code == 1 and "bert.py:" in result.stdout
    assert "mul_mat blk.3.ffn_up.weight: wrong by itself" in result.stdout


def test_what_is_saved_is_computed_again(tmp_path: Path) -> None:
    with registered("wrong", lambda name: wrong_node(name, reads("blk.0.ffn_up.weight"), last_element_off)):
        options = ("--backend", "wrong", "--check", "reference", "--check-folder", tmp_path)
        result = tg("run", gguf("llama"), "-p", PROMPT, *options)
    assert result.exit_code == 1 and "mul_mat blk.0.ffn_up.weight: wrong by itself" in result.stdout
    (file,) = tmp_path.iterdir()
    assert f"  saved  {file}" in result.stdout
    found = as_json("check-node", file, "--backend", "cpu")
    assert found["ok"] and found["nodes"] == 1
    assert found["saved"][0].endswith("mul_mat blk.0.ffn_up.weight: wrong by itself")


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    assert "wanted a prompt of at least one token" in refused("run", "smollm2", "-p", "", "--check", "reference")
    assert "there is no 'refrence'" in refused("run", gguf("llama"), "-p", "x", "--check", "refrence")
    assert "there is no file" in refused("check-node", tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 and no more")
    assert "is damaged, or no reproduction" in refused("check-node", tmp_path / "bad.npz")
