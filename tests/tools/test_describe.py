"""`tensorgraph inspect`, `plan` and `tokenize`, and what all commands have in common."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.device import get_devices, stream_layouts
from tensorgraph.dtypes import f16
from tensorgraph.errors import InputError
from tensorgraph.extents import Extents, StepInputs
from tensorgraph.models.text.gguf import GGUF
from tensorgraph.models.text.model import load
from tensorgraph.state_store import StateStore
from tensorgraph.tools.model_argument import PUBLISHED, described_model, published
from tensorgraph.tools.options import size_text, table, thread_count, working
from tensorgraph.tools.plan import plan_report
from tests.layout import ROOT
from tests.models import tiny
from tests.models.tiny import ARCHITECTURES
from tests.reference import reference_path
from tests.tools.commands import as_json, gguf, ok, refused, tg

COMMANDS = ("run", "embed", "logits", "tokenize", "inspect", "plan", "bench", "profile")
WITHOUT_MODEL = ("test-ops", "ops")


@pytest.mark.parametrize("command", (*COMMANDS, *WITHOUT_MODEL, "synth"))
def test_help_has_a_sentence_examples_and_every_option(command: str) -> None:
    text = ok(command, "--help")
    assert f"tensorgraph {command} " in text and "--json" in text
    options = [line for line in text.splitlines() if line.startswith("  -")]
    assert options and all(len(line.split()) > 2 or line.split()[0].startswith("--") for line in options)
    assert command in ok("--help")


def test_help_imports_neither_numpy_nor_models() -> None:
    code = "import sys, tensorgraph.tools.cli; print([m for m in ('numpy', 'tokenizers', 'rich.progress') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_threads_reach_blas() -> None:
    """In a process of its own, since BLAS reads the number once."""
    code = (
        "import os, sys; from tensorgraph.tools.options import limit_threads; assert 'numpy' not in sys.modules;"
        "limit_threads(3); print(os.environ['OPENBLAS_NUM_THREADS'], os.environ['OMP_NUM_THREADS'])"
    )
    env = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "3"]


def test_threads_are_a_number_or_auto() -> None:
    assert [thread_count(text) for text in ("1", "08", "1024", "auto")] == [1, 8, 1024, "auto"]
    for text in ("", "0", "-1", "1025", "1.5", "Auto", "\u0661", "9" * 5000):
        with pytest.raises(InputError, match="wanted a number from 1 to 1024, or auto"):
            thread_count(text)


def test_the_version_is_the_packages() -> None:
    assert ok("--version").strip() == "0.1.0"


def test_inspect_lists_metadata_and_tensors() -> None:
    found = as_json("inspect", gguf("deepseek_v4"))
    with GGUF.open(gguf("deepseek_v4")) as file:
        assert [t["name"] for t in found["tensors"]] == list(file.tensors)
        assert sum(t["size_bytes"] for t in found["totals"]) == sum(t.size_bytes for t in file.tensors.values())
        assert set(found["metadata"]) == set(file.metadata)
    assert found["metadata"]["tokenizer.ggml.tokens"]["length"] == 512
    assert len(found["metadata"]["tokenizer.ggml.tokens"]["first"]) == 6
    (embedding,) = [t for t in found["tensors"] if t["name"] == "token_embd.weight"]
    assert embedding == {"name": "token_embd.weight", "dtype": "f32", "shape": [512, 96], "size_bytes": 512 * 96 * 4}


def test_inspect_prints_the_same_for_people() -> None:
    text = ok("inspect", reference_path("llama/llama-q4_1.gguf"))
    lines = text.splitlines()
    assert 'general.architecture = "llama"' in lines
    assert any(line.split() == ["token_embd.weight", "q4_1", "[512,", "128]", "40.0", "KiB"] for line in lines)
    assert any(line.startswith("tokenizer.ggml.tokens = [") and line.endswith("(512 elements)") for line in lines)
    assert all(ord(c) >= 32 for line in lines for c in line), "a value with line breaks stays on its line"


def test_inspect_needs_no_known_architecture(tmp_path: Path) -> None:
    import gguf as writer

    out = writer.GGUFWriter(tmp_path / "strange.gguf", "mamba9")
    out.add_string("note", "a\nb\x1b[31m")
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.close()
    text = ok("inspect", tmp_path / "strange.gguf")
    assert 'general.architecture = "mamba9"' in text and r'note = "a\nb\u001b[31m"' in text
    assert "Known: " in refused("inspect", tmp_path / "strange.gguf", "--state")


@pytest.mark.parametrize(
    ("name", "kv_type", "per_token", "constant"),
    [
        ("deepseek-v3", "f16", 61 * 576 * 2, 0),  # 68.6 KiB
        ("deepseek-v3", "f32", 61 * 576 * 4, 0),
        ("deepseek-v3", "q8_0", 61 * 576 // 32 * 34, 0),
        ("deepseek-v3.2", "f16", 61 * (576 + 128) * 2, 0),  # 83.9 KiB
        ("deepseek-v4-flash", "f16", 21 * (512 + 128) * 2 / 4 + 20 * 512 * 2 / 128,  # 6.9 kB
         43 * 128 * 512 * 2 + 20 * 128 * 2 * 512 * 4 + 21 * 8 * 2 * (1024 + 256) * 4),
    ],
)  # fmt: skip
def test_state_of_the_published_configurations(name: str, kv_type: str, per_token: float, constant: int) -> None:
    state = as_json("inspect", name, "--state", "--kv-type", kv_type)["state"]
    assert (state["bytes_per_token"], state["bytes_constant"]) == (per_token, constant)
    assert sum(c["streams"] for c in state["classes"]) == state["streams"]
    assert sum(c["bytes_per_token"] for c in state["classes"]) == per_token


def test_state_for_people_and_of_a_file() -> None:
    assert "70,272.0 bytes per token (68.6 KiB)" in ok("inspect", "deepseek-v3", "--state")
    assert as_json("inspect", gguf("llama"), "--state")["state"]["bytes_per_token"] == 2 * 2 * 2 * 32 * 2
    found = as_json("inspect", "deepseek-v3.2")
    assert found["architecture"] == "deepseek32" and found["metadata"]["index_topk"] == 2048 and "state" in found


def test_every_published_configuration_is_named_in_the_help() -> None:
    assert {"deepseek-v3", "deepseek-v3.2", "deepseek-v4-flash"} < set(published())
    text = " ".join(ok("plan", "--help").split()).replace("- ", "-")  # lines are broken after hyphens, too
    assert all(name in text for name in published())
    v4 = json.loads((PUBLISHED / "deepseek-v4-flash.json").read_text())
    ratios = v4["compress_ratios"]
    assert (len(ratios), ratios.count(0), ratios.count(4), ratios.count(128)) == (43, 2, 21, 20)


@pytest.mark.parametrize(
    ("name", "backend"),
    [("deepseek-v3", "reference"), ("deepseek-v3.2", "reference"), ("deepseek-v4-flash", "reference"), ("deepseek-v3", "cpu")],
)
def test_a_full_size_model_is_planned_without_weights(name: str, backend: str) -> None:
    """Bytes and operations against counts by hand: every matrix once, and 2 operations a weight and token where it is used."""
    found = as_json("plan", name, "--tokens", 512, "--context", 131072, "--backend", backend)
    config = json.loads((PUBLISHED / f"{name}.json").read_text())
    experts = config["n_routed_experts"] * 3 * config["moe_intermediate_size"] * config["hidden_size"]
    n_moe = config["num_hidden_layers"] - config.get("first_k_dense_replace", 0)
    billions = {"deepseek-v3": 671, "deepseek-v3.2": 672, "deepseek-v4-flash": 284}[name]
    assert found["weight_bytes"] > 2 * n_moe * experts
    assert abs(found["weight_bytes"] / 2e9 - billions) < 0.01 * billions
    assert (found["tokens"], found["context"], found["sequences"]) == (512, 131072, 1)
    prefill, decode = found["steps"]
    assert (prefill["tokens"], decode["tokens"]) == (512, 1)
    active = {"deepseek-v3": 37, "deepseek-v3.2": 37, "deepseek-v4-flash": 13}[name]  # billions of weights a token
    assert decode["flops"] > 2e9 * (active - 2) and prefill["flops"] > 300 * decode["flops"]
    assert 0 < found["arena_bytes"][backend] < 2**31 and found["plan_s"] > 0
    assert found["splits"] == 1 and found["copies"] == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_plan_of_a_file_and_of_its_configuration_are_of_one_shape(architecture: str) -> None:
    """And that of a published folder."""
    options = ("--tokens", 8, "--context", 256, "--type", "f32")
    config = as_json("plan", reference_path(f"{architecture}/config.json"), *options)
    folder = as_json("plan", tiny.folder(architecture), *options)
    assert folder["state"] == config["state"] and folder["architecture"] == config["architecture"]
    if architecture not in tiny.FOLDERS:
        file = as_json("plan", gguf(architecture), *options)
        assert file["state"] == config["state"] and file["architecture"] == config["architecture"]
        assert abs(file["weight_bytes"] / config["weight_bytes"] - 1) < 0.01


def test_a_plan_can_be_printed() -> None:
    given = ("--tokens", 8, "--context", 64, "--sequences", 2, "--text")
    text = ok("plan", gguf("llama"), *given)
    assert text.startswith("plan ") and "split 0 on cpu" in text and "flash_attn(" in text
    assert "split 0 on reference" in ok("plan", gguf("llama"), *given, "--backend", "reference")
    assert "T = 8, S = 64, 2 sequences" in text
    found = as_json("plan", gguf("llama"), *given)
    assert [step["dims"] for step in found["steps"]] == [{"T": 8, "O": 2, "S": 128}, {"T": 2, "O": 2, "S": 128}]
    assert found["text"].startswith("plan ")


def test_what_a_step_of_v4_moves() -> None:
    """Of all 43 layers: how many kernels, and that index keys and rows of 128 tokens alone are read more behind more tokens."""
    steps = []
    with described_model("deepseek-v4-flash", "f16") as model:
        extents = Extents(8, 1 << 20, 1)
        graph, devices = model.graph(extents, f16), get_devices("cpu")
        layouts = stream_layouts(graph, model.states(), devices)
        planned = compile(graph, devices, CompileOptions(layouts=layouts))
        for context in (1 << 16, 1 << 20):
            (found,) = plan_report(model, planned, Extents(1, context, 1), "f16", ops=True)["steps"]
            assert found["kernels"] <= 1200
            assert sum(one["read_write_bytes"] for one in found["ops"]) == found["read_write_bytes"]
            steps.append({op: sum(o["read_write_bytes"] for o in found["ops"] if o["op"] == op) for op in ops_of(found)})
    more = {op: steps[1][op] - n for op, n in steps[0].items() if steps[1][op] != n}
    added = (1 << 20) - (1 << 16)
    assert more == {"index_top_k": 21 * added // 4 * (128 * 2 + 8), "flash_attn": 20 * added // 128 * (512 * 2 + 8)}


@pytest.mark.parametrize(("name", "most"), [("smollm2", 160), ("deepseek-v4-flash", 1200)])
def test_kernels_of_a_token_on_cuda(name: str, most: int) -> None:
    """Of attention of few heads one: no other puts together what its blocks leave."""
    found = as_json("plan", name, "--backend", "cuda")
    assert found["steps"][-1]["tokens"] == 1 and found["steps"][-1]["kernels"] <= most


def ops_of(step: dict[str, Any]) -> set[str]:
    return {one["op"] for one in step["ops"]}


def test_a_plan_lists_its_ops() -> None:
    given = ("--tokens", 8, "--context", 64, "--ops")
    found = as_json("plan", gguf("llama"), *given)["steps"]
    for step in found:
        listed = step["ops"]
        assert sum(one["read_write_bytes"] for one in listed) == step["read_write_bytes"]
        assert all(one["bytes_each"] * one["nodes"] == one["read_write_bytes"] for one in listed)
        assert sum(one["flops"] for one in listed) == step["flops"]
    text = ok("plan", gguf("llama"), *given)
    assert text.count("bytes each") == 2 and "flash_attn" in text


def test_the_dims_of_a_step_are_those_of_a_session() -> None:
    """V4's windows and blocks at the end of 250 tokens, as `plan` says and as the store counts them."""
    found = as_json("plan", gguf("deepseek_v4"), "--tokens", 10, "--context", 250)["steps"]
    with load(gguf("deepseek_v4")) as model:
        for step, n_new in zip(found, (10, 1), strict=True):
            store = StateStore(model.model.states(), kv_dtype=f16, slack=0)
            with store.begin([(store.new(), 250 - n_new)]) as before:
                before.commit()
            with store.begin([(0, n_new)]) as last:
                _, dims = StepInputs(())(last, np.zeros(n_new), np.zeros(1))
            assert step["dims"] == dims


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("deepseek-v9",), "deepseek-v3, deepseek-v3.2, deepseek-v4-flash"),
        (("none.json",), "no file 'none.json'"),
        (("deepseek-v3", "--type", "q99"), "'q99'"),
        (("deepseek-v3", "--context", 10**7), "holds 163840 tokens"),
        (("deepseek-v3", "--tokens", 2, "--sequences", 3), "one a sequence"),
        (("deepseek-v3", "--tokens", 20, "--context", 10), "at most --context"),
        (("deepseek-v3", "--backend", "abacus"), "'abacus'"),
    ],
)
def test_a_plan_that_cannot_be_is_a_sentence(arguments: tuple[object, ...], said: str) -> None:
    assert said in refused("plan", *arguments)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"architectures": ["Mamba9ForCausalLM"]}', "there is no Mamba9ForCausalLM. Known: BertForMaskedLM, "),
        ('{"architectures": ["LlamaForCausalLM"]}', "no 'vocab_size'"),
        ("{}", "config.json"),
        ("[1]", "config.json"),
        ("{", "config.json"),
    ],
)
def test_a_configuration_that_is_none_is_a_sentence(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    for command in (("plan",), ("inspect", "--state")):
        assert said in refused(command[0], tmp_path / "config.json", *command[1:])


def test_tokenize_gives_ids_and_their_bytes() -> None:
    cases = json.loads(reference_path("llama/tokenizer_ref.json").read_text())["cases"]
    for case in cases[:20]:
        if not case["text"].startswith("-"):
            assert as_json("tokenize", gguf("llama"), "--bare", "--", case["text"])["ids"] == case["ids"]
    lines = ok("tokenize", gguf("llama"), stdin="héllo").splitlines()
    assert lines == ["0\t'<|bos|>'", "74\t'h'", "130\tb'\\xc3'", "105\tb'\\xa9'", "379\t'll'", "81\t'o'"]


def test_tokenize_goes_back() -> None:
    ids = as_json("tokenize", gguf("llama"), "Hello, wörld")["ids"]
    assert ok("tokenize", gguf("llama"), "--decode", stdin=str(ids)) == "<|bos|>Hello, wörld\n"
    assert as_json("tokenize", gguf("llama"), "--decode", "42 71")["ids"] == [42, 71]
    special = as_json("tokenize", gguf("llama"), "--special", "--bare", "<|bos|>")["ids"]
    assert special == [0] and len(as_json("tokenize", gguf("llama"), "--bare", "<|bos|>")["ids"]) > 1


@pytest.mark.parametrize(("text", "said"), [("1 x", "'x'"), ("512", "below 512"), ("9" * 30, "below 512"), ("-1", "'-1'")])
def test_ids_that_are_none_are_a_sentence(text: str, said: str) -> None:
    assert said in refused("tokenize", gguf("llama"), "--decode", "--", text)


def test_a_damaged_file_is_a_sentence(tmp_path: Path) -> None:
    cut = gguf("llama").read_bytes()[:5000]
    (tmp_path / "cut.gguf").write_bytes(cut)
    for command in COMMANDS:
        more = {"logits": ("--ids", tmp_path / "ids.json", "--out", tmp_path / "out.npz"), "run": ("-p", "x")}.get(command, ())
        (tmp_path / "ids.json").write_text("[1]")
        assert "cut.gguf" in refused(command, tmp_path / "cut.gguf", *more, stdin="x")


def test_a_reader_that_has_had_enough_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("tensorgraph.tools.plan.plan_report", stopped)
    result = tg("plan", gguf("llama"))
    assert (result.exit_code, result.stderr) == (1, "")


def test_an_unknown_command_shows_the_usage() -> None:
    result = tg("dance")
    assert result.exit_code == 2 and "dance" in result.stderr


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (1023, "1023 B"), (70272, "68.6 KiB"), (3 << 40, "3.0 TiB"), (1 << 60, "1048576.0 TiB")]
)
def test_sizes_are_readable(n: int, text: str) -> None:
    assert size_text(n) == text


def test_what_takes_long_is_said_on_terminals_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is gone afterwards, whatever happened; a file gets nothing."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    before = threading.active_count()
    for stream, shown in ((Terminal(), "loading ...\r\x1b[K"), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", stream)
        with pytest.raises(KeyError), working("loading"):
            assert threading.active_count() == before
            raise KeyError
        assert stream.getvalue() == shown


def test_a_table_aligns_its_columns() -> None:
    assert table([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc   d"
