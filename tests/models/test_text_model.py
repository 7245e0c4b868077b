"""Loading a model, and sessions that generate text."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tensorgraph
from tensorgraph.backends.cpu.constants import mapped_file
from tensorgraph.backends.cpu.device import CpuDevice
from tensorgraph.errors import FormatError, InputError, UnknownNameError
from tensorgraph.models.text import generation
from tensorgraph.models.text.generation import HeldText, whole_steps
from tensorgraph.models.text.model import TextModel, TextSession, load
from tensorgraph.models.text.sampling import Sampler
from tensorgraph.state_store import StateStore
from tests.models.tiny import folder, nmse, on_every_backend, reference
from tests.reference import reference_path

PROMPT = "There is a house in a wood with a river"


@pytest.fixture(scope="module")
def llama() -> Iterator[TextModel]:
    with load(reference_path("llama/llama-f32.gguf"), kv_type="f32") as model:
        yield model


@pytest.fixture
def session(llama: TextModel) -> Iterator[TextSession]:
    with llama.session(context=512) as session:
        yield session


def greedy(model: TextModel, ids: list[int], n: int) -> list[int]:
    """The n likeliest tokens in turn, each from an evaluation of all tokens before it."""
    found: list[int] = []
    for _ in range(n):
        with model.session() as fresh:
            found.append(int(np.argmax(fresh.eval([*ids, *found]))))
    return found


def test_the_facade_loads(llama: TextModel) -> None:
    model = tensorgraph.load(str(reference_path("llama/llama-f32.gguf")), kv_type="f32")
    with model, model.session() as session:
        logits = session.eval(reference("llama")["input_ids"], all_logits=True)
    assert nmse(logits, reference("llama")["logits"]) <= 1e-9


def test_a_generation_is_the_reference_continuation(session: TextSession) -> None:
    stored = reference("llama")
    answer = session.generate(stored["input_ids"].tolist(), max_tokens=16)
    list(answer)
    assert answer.ids == stored["greedy_tokens"].tolist() and answer.ended == "length"
    assert answer.prompt_tokens == len(stored["input_ids"]) and 0 < answer.first_text_s < 60 and answer.decode_rate > 0


def test_ids_may_be_an_array(session: TextSession) -> None:
    answer = session.generate(reference("llama")["input_ids"], max_tokens=4)
    list(answer)
    assert answer.ids == reference("llama")["greedy_tokens"][:4].tolist()


def test_text_streams_in_pieces_that_are_the_decoded_ids(llama: TextModel, session: TextSession) -> None:
    answer = session.generate(PROMPT, max_tokens=40)
    first = next(answer)
    assert first and len(answer.ids) <= 4 and answer.ended is None, "the first piece comes before the rest is evaluated"
    pieces = [first, *answer]
    assert len(pieces) > 5
    assert "".join(pieces) == llama.tokenizer.decode(answer.ids, skip_special=True)
    prompt = llama.tokenizer.encode(PROMPT)
    assert session.ids == [*prompt, *answer.ids] and answer.ids == greedy(llama, prompt, 40)


def test_a_second_text_goes_on_after_the_first(llama: TextModel, session: TextSession) -> None:
    list(session.generate(PROMPT, max_tokens=3))
    before = list(session.ids)
    answer = session.generate(" and", max_tokens=2)
    list(answer)
    more = llama.tokenizer.encode(" and", add_special=False)
    assert answer.ids == greedy(llama, [*before, *more], 2)


def test_a_token_that_ends_a_turn_ends_it(llama: TextModel, session: TextSession) -> None:
    end = min(llama.tokenizer.eog_ids)

    class Ending(Sampler):
        def sample(self, logits: np.ndarray[Any, Any], recent: Any, rng: np.random.Generator) -> int:
            return end if len(recent) >= 30 else super().sample(logits, recent, rng)

    answer = session.generate(PROMPT, sampler=Ending())
    text = "".join(answer)
    assert answer.ended == "end" and answer.ids[-1] == end and session.length == 30
    assert text == llama.tokenizer.decode(answer.ids[:-1], skip_special=True)


def test_a_stop_text_is_not_given_out(llama: TextModel, session: TextSession) -> None:
    whole = "".join(session.generate(PROMPT, max_tokens=40))
    stop = whole[17:21]
    with llama.session() as other:
        answer = other.generate(PROMPT, max_tokens=40, stop=["no such text", stop])
        assert "".join(answer) == whole[: whole.index(stop)] and answer.ended == "stop"


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_held_text_ends_at_the_first_stop_text(pieces: list[str], stop: list[str]) -> None:
    """Against a search in everything that has come so far, after each piece."""
    held, given_out, seen = HeldText(stop), "", ""
    for piece in pieces:
        given_out += held.add(piece)
        seen += piece
        places = [at for text in stop if (at := seen.find(text)) >= 0]
        assert held.found == bool(places)
        if held.found:
            assert given_out == seen[: min(places)]
            return
        kept = seen[len(given_out) :]
        assert seen.startswith(given_out) and (not kept or any(text.startswith(kept) for text in stop))
    assert given_out + held.rest() == seen


def test_a_full_context_ends_it(llama: TextModel) -> None:
    with llama.session(context=30) as session:
        answer = session.generate(PROMPT)
        list(answer)
        assert answer.ended == "context" and session.length == 30


def test_no_tokens_may_be_asked_for(session: TextSession) -> None:
    answer = session.generate(PROMPT, max_tokens=0)
    assert list(answer) == [] and answer.ended == "length" and session.length == answer.prompt_tokens


def test_seeds_draw_the_same_and_chunks_change_nothing(llama: TextModel) -> None:
    sampler, texts = Sampler(temperature=1.5, top_k=40, seed=11), []
    for step_tokens in (512, 512, 4):
        with llama.session(step_tokens=step_tokens) as session:
            texts.append("".join(session.generate(PROMPT, max_tokens=30, sampler=sampler)))
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(("architecture", "evaluated"), [("llama", 60), ("deepseek_v4", len(PROMPT) + 60)])
def test_messages_keep_what_a_session_shares_with_them(
    architecture: str, evaluated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama's session goes back to where the conversations part; V4's windows no longer reach there: it starts anew."""
    with load(reference_path(f"{architecture}/{architecture}-f32.gguf"), kv_type="f32") as model:
        monkeypatch.setattr(model, "encode_chat", lambda messages: [ord(c) for m in messages for c in m["content"]])
        first = [{"role": "user", "content": PROMPT * 3}]
        second = [{"role": "user", "content": PROMPT + "x" * 60}]
        with model.session(context=256) as session, model.session(context=256) as fresh:
            list(session.generate(first, max_tokens=5))
            again, alone = session.generate(second, max_tokens=4), fresh.generate(second, max_tokens=4)
            assert (again.prompt_tokens, alone.prompt_tokens) == (evaluated, len(PROMPT) + 60)
            assert "".join(again) == "".join(alone) and again.ids == alone.ids and session.ids == fresh.ids
            same = session.generate(second, max_tokens=1)
            assert same.prompt_tokens == 1, "the last token gives the logits again"
            list(same)
            assert same.ids == alone.ids[:1]


def test_bos_is_not_doubled_by_a_template(llama: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    bos = llama.tokenizer.bos_id
    for text in ("hello", f"{llama.tokenizer.token(bos or 0)}hello"):
        template = type("Template", (), {"render": lambda self, messages, text=text: text})()
        monkeypatch.setitem(llama.__dict__, "chat_template", template)
        assert llama.encode_chat([]) == llama.tokenizer.encode("hello") and llama.encode_chat([])[0] == bos


def test_a_fork_generates_too(session: TextSession) -> None:
    list(session.generate(PROMPT, max_tokens=3))
    with session.fork() as fork:
        assert "".join(fork.generate(" and", max_tokens=5)) == "".join(session.generate(" and", max_tokens=5))


@on_every_backend
def test_ctrl_c_ends_a_generation_after_a_step(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes in the middle of the third step; the step is finished, and the session goes on as if nothing was."""
    steps = 0
    place, name = (StateStore, "_write") if backend == "reference" else (CpuDevice, "run")
    whole = getattr(place, name)

    def interrupted(*args: Any) -> None:
        nonlocal steps
        if backend == "cpu" or args[1] == "blk.0.k":
            steps += 1
            if steps == 3:
                os.kill(os.getpid(), signal.SIGINT)
        whole(*args)

    with load(reference_path("llama/llama-f32.gguf"), backend=backend, kv_type="f32") as model, model.session() as session:
        assert session.plan.devices[0].name == backend  # weights are packed now, which are runs of the device, too
        monkeypatch.setattr(place, name, interrupted)
        answer = session.generate(PROMPT, max_tokens=40)
        with pytest.raises(KeyboardInterrupt):
            list(answer)
        prompt = model.tokenizer.encode(PROMPT)
        assert steps == 3 and session.ids == [*prompt, *answer.ids] and len(answer.ids) == 2
        with model.session() as fresh:
            wanted = fresh.eval([*session.ids, 7])
        assert nmse(session.eval([7]), wanted) <= (1e-20 if backend == "reference" else 1e-11)


def test_other_threads_leave_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with whole_steps():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([5, 512], "token id 512 .* vocabulary of 512"),
        ([-1], "token id -1"),
        ([], "a prompt of at least one token"),
        ({"role": "user", "content": "hi"}, "a list of messages; got dict"),
        (b"hi", "a list of messages; got bytes"),
        (list(range(10, 100)), "context holds 40 tokens; 0 tokens are there and 90 are new"),
    ],
)
def test_a_prompt_that_cannot_be_is_a_sentence(llama: TextModel, prompt: Any, said: str) -> None:
    with llama.session(context=40) as session:
        with pytest.raises(InputError, match=said):
            session.generate(prompt)
        assert session.length == 0 and session.generate([5], max_tokens=1)


@pytest.mark.parametrize(("options", "said"), [({"max_tokens": -1}, "max_tokens >= 0"), ({"stop": [""]}, "stop texts")])
def test_options_that_cannot_be_are_a_sentence(session: TextSession, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        session.generate(PROMPT, **options)


def test_a_conversation_longer_than_the_context_is_a_sentence(llama: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "encode_chat", lambda messages: list(range(10, 60)))
    with llama.session(context=40) as session, pytest.raises(InputError, match="40 tokens; the conversation has 50"):
        session.generate([{"role": "user", "content": "long"}])


def test_a_file_that_is_not_there_or_no_model_is_a_sentence(tmp_path: Any) -> None:
    with pytest.raises(InputError, match="there is no file"):
        load(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(FormatError):
        load(tmp_path / "bad.gguf")
    for threads in (0, -1, "all", 1.5):
        with pytest.raises(InputError, match='from 1 on, or "auto"; got'):
            load(reference_path("llama/llama-f32.gguf"), threads=threads)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="Known: .*reference"):
        load(reference_path("llama/llama-f32.gguf"), backend="abacus")


def test_what_waits_for_ctrl_c_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    try:
        with generation.whole_steps():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            assert calls == []
        assert calls == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v2"])
def test_packed_weights_are_kept_and_change_nothing(architecture: str, tmp_path: Path) -> None:
    """Where some are folded of others, too; after an error nothing is kept."""
    path, kept = reference_path(f"{architecture}/{architecture}-f32.gguf"), tmp_path / "packed"

    def logits(fails: bool = False) -> tuple[np.ndarray, int]:
        with load(path, packed_cache=kept) as model, model.session(context=64) as session:
            found = session.eval(range(1, 30))
            held = [value for value in model.engine._uploaded.values() if getattr(value, "layout", "") == "r16"]
            if fails:
                raise InputError("no")
            return found, sum(mapped_file(value.data) is not None for value in held)

    with load(path) as model, model.session(context=64) as session:
        wanted = session.eval(range(1, 30))
    with pytest.raises(InputError):
        logits(fails=True)
    assert list(kept.iterdir()) == []
    for mapped in (False, True):
        found, n_mapped = logits()
        np.testing.assert_array_equal(found, wanted)
        assert len(list(kept.iterdir())) == 1 and (n_mapped > 10) == mapped


def test_packed_weights_are_kept_of_files_and_by_devices_that_pack(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\[load\] wanted a GGUF file whose weights are kept packed; got the folder"):
        load(folder("qwen2"), packed_cache=tmp_path)
    with load(reference_path("llama/llama-f32.gguf"), backend="reference", packed_cache=tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
