"""`tensorgraph run`: text, chat, speeds, statistics."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tensorgraph.backends.cpu.executor import usable_cores
from tensorgraph.models.text.model import TextModel, load
from tensorgraph.models.text.sampling import Sampler
from tensorgraph.tools.run import Talk
from tests.layout import ROOT
from tests.models.tiny import BACKENDS
from tests.tools.commands import as_json, gguf, ok, refused, tg

PROMPT = "There is a house in a wood with a river"
FORTY_TOKENS = "There is a house in a wood with a river, and the list of all the values that it "


def continuation(n: int, sampler: Sampler | None = None) -> str:
    """What the model says, by the Python API."""
    with load(gguf("llama")) as model, model.session() as session:
        return "".join(session.generate(PROMPT, max_tokens=n, sampler=sampler))


def test_text_goes_to_stdout_and_speeds_to_stderr() -> None:
    result = tg("run", gguf("llama"), "-p", PROMPT, "-n", 30)
    assert (result.exit_code, result.stdout) == (0, continuation(30) + "\n")
    (speeds,) = result.stderr.splitlines()
    assert speeds.startswith("23 prompt tokens at ") and "30 generated at" in speeds and "first after" in speeds


@pytest.mark.parametrize("prompt", [(), ("-p", "-")])
def test_a_prompt_may_come_from_a_pipe(prompt: tuple[str, ...]) -> None:
    assert ok("run", gguf("llama"), *prompt, "-n", 10, stdin=PROMPT) == continuation(10) + "\n"


def test_every_sampling_option_counts() -> None:
    options = ("--temp", 1.3, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01, "--repeat-penalty", 1.1, "--seed", 5)
    wanted = continuation(20, Sampler(1.3, 50, 0.9, 0.01, 1.1, seed=5))
    assert ok("run", gguf("llama"), "-p", PROMPT, "-n", 20, *options) == wanted + "\n" != continuation(20) + "\n"


def test_a_stop_text_ends_it() -> None:
    whole = continuation(30)
    found = as_json("run", gguf("llama"), "-p", PROMPT, "-n", 30, "--stop", whole[12:16])
    assert found["ended"] == "stop" and found["text"] == whole[: whole.index(whole[12:16])]


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v4"])
def test_300_tokens_take_at_most_three_plans_and_every_later_step_is_a_hit(architecture: str) -> None:
    found = as_json("run", gguf(architecture), "-p", FORTY_TOKENS, "-n", 300, "--ctx", 512, "--stats")
    assert (found["prompt_tokens"], len(found["ids"]), found["ended"]) == (40, 300, "length")
    stats = found["stats"]
    assert stats["plans"] == stats["misses"] <= 3 and stats["hits"] == stats["steps"]
    assert stats["steps"] == 301 and stats["tokens"] == 340
    assert stats["state_bytes"] > 0 and stats["arena_bytes"]["cpu"] > 0 and stats["weight_bytes"] > 0
    assert (stats["splits"], stats["copies"], stats["copy_bytes"], stats["moved"]) == (1, 0, 0, [])


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_lines_on_stderr(backend: str) -> None:
    result = tg("run", gguf("llama"), "-p", PROMPT, "-n", 2, "--stats", "--backend", backend, "-t", 1)
    assert result.exit_code == 0
    lines = result.stderr.splitlines()
    assert lines[1].startswith("plans 1: 1 compiled in ") and lines[1].endswith(" 3 cache hits")
    assert lines[2].startswith("steps 3 of 25 tokens in ")
    assert lines[3].endswith(" kernels, 1 splits, 0 copies of 0 B")
    assert lines[-1].startswith("state ") and f"arena {backend} " in lines[-1]
    if backend == "cpu":
        assert lines[4].startswith("cpu for host: ") and lines[4].endswith(" calls in a decode step, threads 1")
    assert len(lines) == (6 if backend == "cpu" else 5)


def test_statistics_of_native_code_are_those_of_a_step() -> None:
    """The calls of a decode step are as many as the executor walks, and the kernels as many as the compiler was asked for."""
    counted = []
    for threads in (1, "auto"):
        (native,) = as_json("run", gguf("llama"), "-p", PROMPT, "-n", 3, "--stats", "-t", threads)["stats"]["native"]
        assert (native["device"], native["threads"]) == ("cpu", threads) and native["target"] == "host"
        assert native["max_threads"] == (1 if threads == 1 else usable_cores())
        assert native["compiled"] + native["from_disk"] > 0 and native["compile_s"] >= 0
        counted.append(native["decode_calls"])
    profiled = as_json("profile", gguf("llama"), "-p", 0, "-n", 1, "--no-roofs")["cases"][0]["calls"]
    assert counted == [profiled, profiled]
    assert as_json("run", gguf("llama"), "-p", "x", "-n", 1, "--stats", "--backend", "reference")["stats"]["native"] == []


def test_packed_weights_are_kept_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    packed = tmp_path / "tensorgraph" / "packed"
    for flags, n_files in ((), 0), (("--packed-cache",), 1), (("--packed-cache",), 1):
        assert ok("run", gguf("llama"), "-p", PROMPT, "-n", 10, *flags) == continuation(10) + "\n"
        assert len(list(packed.glob("llama-f32-*.packed"))) == n_files


def test_every_option_of_loading_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def recording(path: Any, **given: Any) -> TextModel:
        asked.append(given)
        return load(path, **given)

    monkeypatch.setattr("tensorgraph.models.text.model.load", recording)
    ok("run", gguf("llama"), "-p", "x", "-n", 1)
    ok("run", gguf("llama"), "-p", "x", "-n", 1, "--exact", "-t", 2, "--kv-type", "f32", "--backend", "reference,cpu")
    default, chosen = asked
    assert (default["backend"], default["kv_type"], default["threads"]) == ("cpu", "f16", "auto")
    assert not default["options"].exact and chosen["options"].exact
    assert (chosen["backend"], chosen["kv_type"], chosen["threads"]) == ("reference,cpu", "f32", 2)


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, str]]]:
    """The conversations that templates were given; each becomes a few ids."""
    seen: list[list[dict[str, str]]] = []

    def encode(self: TextModel, messages: Any) -> list[int]:
        seen.append([dict(m) for m in messages])
        return self.tokenizer.encode(" ".join(m["content"] for m in messages))

    monkeypatch.setattr(TextModel, "encode_chat", encode)
    return seen


def test_a_chat_question_goes_through_the_template(chat: list[list[dict[str, str]]]) -> None:
    ok("run", gguf("llama"), "--chat", "--system", "Be brief.", "-p", "Why?", "-n", 3)
    ok("run", gguf("llama"), "--chat", "-n", 3, stdin="From a pipe")
    assert chat[0] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert chat[1] == [{"role": "user", "content": "From a pipe"}]


def test_a_conversation_remembers(chat: list[list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Two questions, Ctrl-C in the second answer, a third question, end of input."""
    questions = iter(["first", "second", "third"])

    def ask(_: str) -> str:
        try:
            return next(questions)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)

    class Interrupted(Sampler):
        def sample(self, logits: Any, recent: Any, rng: Any) -> int:
            if len(chat) == 2:
                raise KeyboardInterrupt
            return super().sample(logits, recent, rng)

    with load(gguf("llama")) as model, model.session(context=256) as session:
        Talk(session, Interrupted(), 4, [], False).interactive([])
    roles = [[m["role"] for m in messages] for messages in chat]
    assert roles == [["user"], ["user", "assistant", "user"], ["user", "assistant", "user"]]
    assert [messages[-1]["content"] for messages in chat] == ["first", "second", "third"]
    assert chat[2][1]["content"] in capsys.readouterr().out


def test_ctrl_c_ends_the_program_with_130() -> None:
    command = [sys.executable, "-m", "tensorgraph.tools.cli", "run", gguf("llama"), "-p", PROMPT, "-n", "100000"]
    command += ["--temp", "1", "--seed", "1", "--ctx", "1000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(8)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(60) == 130 and b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-p", PROMPT, "--ctx", 5), "the context holds 5 tokens; 0 tokens are there and 23 are new"),
        (("-p", PROMPT, "--temp", -1), "temperature"),
        (("-p", PROMPT, "--top-p", 0), "top_p"),
        (("-p", PROMPT, "--kv-type", "q4_0"), "wanted f16, bf16, f32 or q8_0 for a stream; got q4_0"),
        (("-p", PROMPT, "--kv-type", "wide"), "'wide'"),
        (("-p", PROMPT, "--backend", "abacus"), "'abacus'"),
        (("-p", PROMPT, "--stop", ""), "stop texts"),
        (("-p", PROMPT, "-t", 0), "wanted a number from 1 to 1024, or auto; got '0'"),
        (("-p", PROMPT, "--threads", "1025"), "got '1025'"),
        (("-p", PROMPT, "--threads", "all"), "got 'all'"),
        (("-p", PROMPT, "--system", "Be brief."), "--chat"),
        (("--chat", "-p", "x"), "chat template"),
    ],
)
def test_what_cannot_be_is_a_sentence(options: tuple[object, ...], said: str) -> None:
    assert said in refused("run", gguf("llama"), *options)


def test_a_missing_file_shard_or_architecture_is_a_sentence(tmp_path: Path) -> None:
    import gguf as writer

    assert "there is no file" in refused("run", tmp_path / "none.gguf", "-p", "x")
    alone = tmp_path / "part-00001-of-00002.gguf"
    out = writer.GGUFWriter(alone, "mamba9")
    out.add_uint16("split.count", 2)
    out.add_uint16("split.no", 0)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.close()
    assert "part-00002-of-00002.gguf is missing" in refused("run", alone, "-p", "x")
    strange = tmp_path / "strange.gguf"
    out = writer.GGUFWriter(strange, "mamba9")
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.close()
    line = refused("run", strange, "-p", "x")
    assert "'mamba9'" in line and "deepseek4" in line and "llama" in line
