"""`tensorgraph quality`: figures against plain float64, what is fed to whom, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorgraph.compiler import CompileOptions
from tensorgraph.models.text.model import load
from tensorgraph.tools import divergence, quality
from tensorgraph.tools.divergence import Summary, compare, join
from tests.reference import reference_path
from tests.tools.commands import as_json, gguf, ok, refused, tg
from tests.tools.fake_peer import FakePeer, fake_logits

Array = np.ndarray[Any, Any]
Q4_1 = reference_path("llama/llama-q4_1.gguf")
TEXT = "All happy windows are alike; each unhappy window is unhappy in its own way. " * 9


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality.options, "limit_threads", lambda count: None)


def softmax(logits: Array) -> Array:
    e = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True).astype(np.float64))
    return e / e.sum(-1, keepdims=True)


def divergences(exact: Array, other: Array) -> Array:
    """By the definition, of probabilities."""
    p, q = softmax(exact), softmax(other)
    return (p * np.log(p / q)).sum(-1)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(2, 70), st.sampled_from([0.0, 1e-3, 0.3, 3.0]), st.integers(0, 2**32 - 1))
def test_figures_are_those_of_the_definition(n: int, width: int, noise: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    exact = (rng.standard_normal((n, width)) * 4 + 900).astype(np.float32)
    other = (exact + noise * rng.standard_normal((n, width)) - 700).astype(np.float32)
    following: list[int | None] = [*map(int, rng.integers(0, width, n - 1)), None]
    rows = compare(exact, other, following)
    want = divergences(exact, other)
    np.testing.assert_allclose(rows.kl, want, rtol=1e-9, atol=1e-13)
    assert rows.same_first.tolist() == (exact.argmax(-1) == other.argmax(-1)).tolist()
    found = Summary.of(join([rows, rows]))
    twice = np.concatenate([want, want])
    assert found.mean == pytest.approx(want.mean(), rel=1e-9, abs=1e-13) and found.largest == pytest.approx(want.max(), abs=1e-13)
    assert found.standard_error == pytest.approx(twice.std(ddof=1) / math.sqrt(2 * n), rel=1e-6, abs=1e-13)
    assert found.p99 == pytest.approx(np.quantile(twice, 0.99), rel=1e-6, abs=1e-13)
    q = softmax(other)
    if n > 1:
        mean = np.mean([-np.log(q[i, token]) for i, token in enumerate(following) if token is not None])
        assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-9)
    else:
        assert math.isnan(found.perplexity)


def test_impossible_tokens_and_parts_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A logit of minus infinity in both is no difference; rows are taken in parts."""
    exact = np.random.default_rng(0).standard_normal((7, 11)).astype(np.float32)
    exact[:, 3] = -np.inf
    other = exact * np.float32(1.1)
    whole = compare(exact, other, [None] * 7)
    np.testing.assert_allclose(whole.kl, divergences(np.delete(exact, 3, 1), np.delete(other, 3, 1)), rtol=1e-9)
    monkeypatch.setattr(divergence, "_AT_ONCE", 25)
    np.testing.assert_array_equal(compare(exact, other, [None] * 7).kl, whole.kl)


def written(folder: Path, text: str = TEXT) -> Path:
    (folder / "text.txt").write_text(text)
    return folder / "text.txt"


def test_a_model_is_no_way_from_itself(tmp_path: Path) -> None:
    """Weights in f32 are multiplied in f32 in either mode."""
    options = ("--text", written(tmp_path), "--positions", 150, "--window", 64, "--kv-type", "f32")
    found = as_json("quality", gguf("llama"), *options)
    assert found["figures"]["ours"]["same_first"] == 1 and found["figures"]["ours"]["largest"] == 0
    assert found["figures"]["ours"]["perplexity"] == found["figures"]["exact"]["perplexity"] > 1
    assert (found["positions"], found["window"], found["ratio"], found["peer_is"]) == (150, 64, None, None)


def windows(model: Any, positions: int, window: int) -> list[list[int]]:
    """Each begins with BOS, which takes one of its places."""
    ids = model.tokenizer.encode(TEXT, add_special=False)
    cut = [[model.tokenizer.bos_id, *ids[at : at + window - 1]] for at in range(0, len(ids), window - 1)]
    kept = []
    for each in cut:
        kept.append(each[: positions - sum(map(len, kept))])
    return [each for each in kept if each]


def test_figures_are_those_of_the_models(tmp_path: Path) -> None:
    """Quantised weights, windows longer than a step and one that is cut short, against whole windows and plain float64."""
    positions, window = 330, 150
    found = as_json("quality", Q4_1, "--text", written(tmp_path), "--positions", positions, "--window", window)["figures"]
    kl, same, nll = [], [], {"exact": [], "ours": []}  # type: ignore[var-annotated]
    with load(Q4_1, kv_type="f32", options=CompileOptions(exact=True)) as exact, load(Q4_1) as ours:
        text = exact.tokenizer.encode(TEXT, add_special=False)
        at = 0
        for ids in windows(exact, positions, window):
            with exact.session() as a, ours.session() as b:
                p, q = a.eval(ids, all_logits=True), b.eval(ids, all_logits=True)
            kl += [*divergences(p, q)]
            same += [*(p.argmax(-1) == q.argmax(-1))]
            after = text[at : at + len(ids)]
            at += len(ids) - 1
            for name, logits in (("exact", p), ("ours", q)):
                nll[name] += [*-np.log(softmax(logits)[np.arange(len(ids)), after])]
    assert len(kl) == positions and 1e-6 < np.mean(kl) < 0.1
    assert found["ours"]["mean"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert found["ours"]["largest"] == pytest.approx(np.max(kl), rel=1e-2)
    assert found["ours"]["same_first"] == pytest.approx(np.mean(same), abs=1 / positions)
    for name, values in nll.items():
        assert found[name]["perplexity"] == pytest.approx(math.exp(np.mean(values)), rel=1e-6)


def test_the_peer_sees_the_same_windows(tmp_path: Path) -> None:
    fake = FakePeer(tmp_path)
    options = ("--text", written(tmp_path), "--positions", 200, "--window", 140, "-t", 2, "--peer", fake.python)
    found = as_json("quality", gguf("llama"), *options)
    with load(gguf("llama"), kv_type="f32", options=CompileOptions(exact=True)) as model:
        want = windows(model, 200, 140)
        kl = []
        for ids in want:
            with model.session() as session:
                kl += [*divergences(session.eval(ids, all_logits=True), fake_logits(ids, 0))]
    decodes = fake.notes("rows")
    assert [[row[0] for row in note["rows"]] for note in decodes] == [want[0][:128], want[0][128:], want[1]]
    assert [note["rows"][0][1] for note in decodes] == [0, 128, 0]
    assert all(note["context"] == 2 and {row[4] for row in note["rows"]} == {1} for note in decodes)
    assert [note["clear"] for note in fake.notes("clear")] == [2, 2]
    assert {note["n_threads"] for note in fake.notes("n_ctx")} == {2} and fake.notes("n_ctx")[1]["n_ctx"] >= 140
    assert found["figures"]["peer"]["mean"] == pytest.approx(np.mean(kl), rel=1e-6)
    assert found["ratio"] == pytest.approx(found["figures"]["ours"]["mean"] / np.mean(kl), rel=1e-6)
    assert found["peer_is"]["package"] == "9.9" and not list(tmp_path.glob("tmp*"))


def test_the_table_says_what_it_is_of(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("b.md", "a.txt", "c.png"):
        (folder / name).write_text(name * 40)
    fake = FakePeer(tmp_path)
    lines = ok("quality", Q4_1, "--text", folder, "--positions", 60, "--peer", fake.python).splitlines()
    assert lines[0].split() == ["KL,", "mean", "±", "median", "99", "%", "largest", "same", "first", "perplexity"]
    assert [line.split()[0] for line in lines[1:4]] == ["exact", "ours", "peer"] and len(lines[2].split()) == 8
    assert lines[5].startswith("mean KL, ours / peer: 0.0")
    content, about = quality.read_text([folder])
    assert content == "a.txt" * 40 + "\n" + "b.md" * 40 and about["files"] == 2
    assert lines[6] == f"60 positions in windows of 512 of {folder} (sha256 {about['sha256'][:12]})"
    assert lines[8] == "peer: llama-cpp-python 9.9 (llama.cpp b1), flash attention on, cache f16"


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("no flash", "no context with flash attention"),
        ("small", "wanted a vocabulary of 512; got 5"),
        ("refuses", "llama_decode returned 1; no slot"),
        ("broken", "llama_cpp cannot be imported"),
    ],
)
def test_a_peer_that_fails_is_a_sentence(mode: str, said: str, tmp_path: Path) -> None:
    options = ("--text", written(tmp_path), "--positions", 90, "--window", 10, "--peer", FakePeer(tmp_path, mode).python)
    assert said in refused("quality", gguf("llama"), *options)


def test_what_cannot_be_is_a_sentence(tmp_path: Path) -> None:
    text = written(tmp_path, "A few words.")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd.txt").write_bytes(b"\xff\xfe")
    assert "wanted a text of 2000 positions; got one of" in refused("quality", gguf("llama"), "--text", text)
    assert "holds 512 tokens; wanted 513" in refused("quality", gguf("llama"), "--text", text, "--window", 513)
    assert "there is no file" in refused("quality", gguf("llama"), "--text", tmp_path / "none.txt")
    assert "there are none" in refused("quality", gguf("llama"), "--text", tmp_path / "empty")
    assert "is no UTF-8" in refused("quality", gguf("llama"), "--text", tmp_path / "odd.txt")
    assert tg("quality", gguf("llama")).exit_code == 2


def test_help_has_a_sentence_and_examples() -> None:
    text = ok("quality", "--help")
    assert "tensorgraph quality smollm2" in text and "quality" in ok("--help")
