"""The peer's side: llama.cpp through llama-cpp-python's low-level functions, run by file path in the peer's own interpreter.

Requests and replies are JSON, a line each, on stdin and stdout; what the library prints there goes to stderr. Nothing but
the standard library and llama_cpp is used, and nothing newer than Python 3.9.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import struct
import sys
import time
from typing import Any

BATCH = 512
REPEATED = 128  # tokens
KV_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}
FLASH_ATTN = {"off": 0, "on": 1}
LOG_ERROR = 4


def wait_until_quiet(limit_s: float = 1.0, step_s: float = 0.02) -> bool:
    """Wait until this process's threads sleep, at most `limit_s`; whether they do."""
    end = time.monotonic() + limit_s
    while True:
        before = time.process_time()
        time.sleep(step_s)
        if time.process_time() - before < 0.1 * step_s:
            return True
        if time.monotonic() > end:
            return False


def positions(start: int, n: int) -> bytes:
    """How llama.cpp writes down the tokens of one sequence: the position, and that there is one sequence, number 0."""
    return b"".join(struct.pack("<3i", start + i, 1, 0) for i in range(n))


class Llama:
    """A model with a context for each setting of flash attention that it takes; the faster one is used, by kind of round.

    `copies`: of what comes before rounds only the beginning is evaluated; the rest are copies of its state.
    """

    def __init__(self, api: Any, path: str, threads: int, context: int, kv_type: str, copies: bool = False) -> None:
        self.api, self.depth, self.prefix, self.copies = api, 0, [0], copies
        self.best: dict[str, str] = {}
        self.said: list[str] = []
        self._log = api.llama_log_callback(self._keep_error)
        api.llama_log_set(self._log, None)
        api.llama_backend_init()
        wanted = api.llama_model_default_params()
        wanted.n_gpu_layers = 0
        if hasattr(wanted, "load_mode"):
            wanted.load_mode = api.LLAMA_LOAD_MODE_MMAP
        else:
            wanted.use_mmap = True
        self.model = api.llama_model_load_from_file(os.fsencode(path), wanted)
        if not self.model:
            raise RuntimeError(self._with_errors(f"llama.cpp cannot load {path}"))
        self.contexts: dict[str, Any] = {}
        for name, value in FLASH_ATTN.items():
            given = api.llama_context_default_params()
            given.n_ctx, given.n_batch, given.n_ubatch = context, BATCH, BATCH
            given.n_threads = given.n_threads_batch = threads
            given.type_k = given.type_v = KV_TYPES[kv_type]
            given.offload_kqv = given.op_offload = False
            given.no_perf = True
            if copies:  # which come in by a second sequence of the same memory
                given.n_seq_max, given.kv_unified = 2, True
            if hasattr(given, "flash_attn_type"):
                given.flash_attn_type = value
            else:
                given.flash_attn = bool(value)
            made = api.llama_init_from_model(self.model, given)
            if made:
                self.contexts[name] = made
        if not self.contexts:
            raise RuntimeError(self._with_errors(f"llama.cpp makes no context of {context} tokens for {path}"))

    def _keep_error(self, level: int, text: bytes, _: Any) -> None:
        if level == LOG_ERROR:
            self.said = [*self.said[-4:], text.decode(errors="replace").strip()]

    def _with_errors(self, what: str) -> str:
        return "; ".join([what, *self.said])

    def description(self) -> dict[str, Any]:
        """What was loaded, and by what."""
        api = self.api
        vocabulary = api.llama_model_get_vocab(self.model)
        version = getattr(api, "llama_version", None)
        return {
            "library": version().decode() if version else "",
            "features": api.llama_print_system_info().decode(),
            "vocab_size": api.llama_vocab_n_tokens(vocabulary),
            "parameters": api.llama_model_n_params(self.model),
            "size_bytes": api.llama_model_size(self.model),
            "flash_attn": list(self.contexts),
        }

    def begin(self, ids: list[int]) -> None:
        """Make `ids` what every context holds."""
        self.prefix = ids
        for name in self.contexts:
            self._fill(name)

    def _fill(self, name: str) -> None:
        memory = self.api.llama_get_memory(self.contexts[name])
        self.api.llama_memory_clear(memory, True)
        start = min(REPEATED, len(self.prefix)) if self.copies else 0
        if start:
            self._decode(name, "pp", self.prefix[:start], 0)
            start = self._copy(name, start)
        if self.prefix[start:]:
            self._decode(name, "pp", self.prefix[start:], start)

    def _copy(self, name: str, n: int) -> int:
        """Repeat the state of the first n tokens, at the positions that follow, as often as the prefix has room for; returns how
        many tokens are there then."""
        api, context = self.api, self.contexts[name]
        memory, size = api.llama_get_memory(context), api.llama_state_seq_get_size(context, 0)
        buffer = (ctypes.c_uint8 * size)()
        written = api.llama_state_seq_get_data(context, buffer, size, 0)
        state = bytes(buffer)[:written]
        if positions(0, n) not in state:
            raise RuntimeError("llama.cpp's state is not as it is known: positions of tokens do not stand in it")
        for start in range(n, len(self.prefix) - n + 1, n):
            ctypes.memmove(buffer, state.replace(positions(0, n), positions(start, n)), len(state))
            if not api.llama_state_seq_set_data(context, buffer, len(state), 1):
                raise RuntimeError(self._with_errors("llama.cpp does not take a state"))
            api.llama_memory_seq_cp(memory, 1, 0, -1, -1)
            api.llama_memory_seq_rm(memory, 1, -1, -1)
        held, wanted = api.llama_memory_seq_pos_max(memory, 0) + 1, len(self.prefix) // n * n
        if held != wanted:
            raise RuntimeError(f"llama.cpp holds {held} tokens after their state was repeated; wanted {wanted}")
        return wanted

    def warm_up(self, kind: str, ids: list[int]) -> dict[str, float]:
        """A round in every context, in seconds; later rounds of the kind run where it took least."""
        took = {name: self._round(name, kind, ids) for name in self.contexts}
        self.best[kind] = min(took, key=lambda name: took[name])
        return took

    def run(self, kind: str, ids: list[int]) -> float:
        """Seconds of one round after the prefix."""
        return self._round(self.best[kind], kind, ids)

    def write_logits(self, ids: list[int], start: int, to: str) -> None:
        """Logits of every one of `ids`, which follow the `start` before, with flash attention: f32 in a file, row by row."""
        if "on" not in self.contexts:
            raise RuntimeError("llama.cpp makes no context with flash attention for this model")
        api, context = self.api, self.contexts["on"]
        if not start:
            api.llama_memory_clear(api.llama_get_memory(context), True)
        row_bytes = 4 * api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        with open(to, "wb") as file:
            for at in range(0, len(ids), BATCH):
                some = ids[at : at + BATCH]
                batch = self._batch(some, start + at, len(some))
                try:
                    self._checked(api.llama_decode(context, batch))
                    file.write(ctypes.string_at(api.llama_get_logits(context), len(some) * row_bytes))
                finally:
                    api.llama_batch_free(batch)

    def _round(self, name: str, kind: str, ids: list[int]) -> float:
        memory = self.api.llama_get_memory(self.contexts[name])
        if not self.api.llama_memory_seq_rm(memory, 0, len(self.prefix), -1):
            self._fill(name)
        return self._decode(name, kind, ids, len(self.prefix))

    def _decode(self, name: str, kind: str, ids: list[int], start: int) -> float:
        api, context = self.api, self.contexts[name]
        step = BATCH if kind == "pp" else 1
        batches = []
        try:
            for at in range(0, len(ids), step):
                batches.append(self._batch(ids[at : at + step], start + at, int(kind == "tg" or at + step >= len(ids))))
            began = time.perf_counter()
            for batch in batches:
                self._checked(api.llama_decode(context, batch))
                if kind == "tg":
                    api.llama_synchronize(context)
            api.llama_synchronize(context)
            return time.perf_counter() - began
        finally:
            for batch in batches:
                api.llama_batch_free(batch)

    def _checked(self, status: int) -> None:
        if status:
            raise RuntimeError(self._with_errors(f"llama_decode returned {status}"))

    def _batch(self, ids: list[int], start: int, wanted: int) -> Any:
        """Logits are wanted of so many of the last."""
        batch = self.api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = int(i >= len(ids) - wanted)
        return batch


def answer(state: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request."""
    do = request.pop("do")
    if do == "load":
        try:
            package, api = importlib.import_module("llama_cpp"), importlib.import_module("llama_cpp.llama_cpp")
        except Exception as error:  # whatever a broken installation raises
            raise RuntimeError(f"llama_cpp cannot be imported: {error}") from error
        state["llama"] = Llama(api, **request)
        return {"package": package.__version__, **state["llama"].description()}
    llama: Llama = state["llama"]
    if do == "begin":
        llama.begin(request["ids"])
        return {}
    if do == "warm_up":
        took = llama.warm_up(request["kind"], request["ids"])
        return {"seconds": took, "flash_attn": llama.best[request["kind"]]}
    if do == "write_logits":
        llama.write_logits(**request)
        return {}
    return {"seconds": llama.run(request["kind"], request["ids"])}


def main() -> None:
    """Answer requests until there are no more."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if path != here]  # our modules are not to be found by the peer's
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    state: dict[str, Any] = {}
    for line in sys.stdin:
        try:
            reply = answer(state, json.loads(line))
            reply["quiet"] = wait_until_quiet()
        except Exception as error:
            reply = {"error": f"{error}" or type(error).__name__}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
