"""A llama-cpp-python that is none: it takes down what it is asked to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# What the fake peer's functions do is written to LOG, a line of JSON each. Flash attention (context 2) takes less of its clock.
FAKE = """
import ctypes, json, os, struct, sys, time
from types import SimpleNamespace as Space
LOG, MODE = {log!r}, {mode!r}
LLAMA_LOAD_MODE_MMAP = 1
decodes, clock = 0, 0.0
time.perf_counter = lambda: clock
def note(**what):
    with open(LOG, "a") as log: log.write(json.dumps(what) + "\\n")
if MODE == "broken": raise OSError("libllama.so is not there")
def llama_log_callback(function): return function
def llama_log_set(function, data): global say; say = function
def llama_backend_init(): print("noise on stdout")
def llama_model_default_params(): return Space(n_gpu_layers=-1, load_mode=-1)
def llama_context_default_params():
    names = "n_ctx n_batch n_ubatch n_threads n_threads_batch type_k type_v offload_kqv op_offload no_perf flash_attn_type"
    names += " n_seq_max kv_unified"
    return Space(**dict.fromkeys(names.split()))
def llama_model_load_from_file(path, params):
    note(load=path.decode(), environment=sorted(k for k in os.environ if k.startswith(("OMP_", "GOMP_"))), **vars(params))
    if MODE == "unreadable": say(4, b"wrong magic\\n", None)
    return None if MODE == "unreadable" else "model"
def llama_init_from_model(model, params):
    note(**vars(params))
    return None if MODE == "no flash" and params.flash_attn_type else params.flash_attn_type + 1
def llama_version(): return b"b1"
def llama_print_system_info(): return b"FAKE = 1"
def llama_model_get_vocab(model): return model
def llama_vocab_n_tokens(vocabulary): return 5 if MODE == "small" else 512
def llama_model_n_params(model): return 7
def llama_model_size(model): return 8
def llama_get_memory(context): return context
held = dict()  # what a context's sequences hold, as (position, token)
def of(memory, seq): return held.setdefault((memory, seq), set())
def llama_memory_clear(memory, data):
    note(clear=memory)
    for key in held:
        if key[0] == memory: held[key].clear()
def llama_memory_seq_rm(memory, seq, start, end):
    note(cut=memory, at=[seq, start, end])
    held[memory, seq] = {{entry for entry in of(memory, seq) if entry[0] < start}}
    return MODE != "recurrent"
def llama_memory_seq_cp(memory, seq, other, start, end): of(memory, other).update(of(memory, seq))
def llama_memory_seq_pos_max(memory, seq): return max((at for at, token in of(memory, seq)), default=-1)
def llama_state_seq_get_size(context, seq): return 8 + 16 * len(of(context, seq))
def llama_state_seq_get_data(context, buffer, size, seq):
    cells = sorted(of(context, seq))
    word = 2 if MODE == "other state" else 1
    data = struct.pack("<i", len(cells)) + b"".join(struct.pack("<3i", at, word, 0) for at, token in cells)
    data += struct.pack(f"<{{len(cells)}}i", *(token for at, token in cells))
    ctypes.memmove(buffer, data, len(data))
    return len(data)
def llama_state_seq_set_data(context, buffer, size, seq):
    if MODE == "full": return 0
    words = struct.unpack(f"<{{size // 4}}i", bytes(buffer)[:size])
    n = words[0]
    held[context, seq] = set(zip(words[1 : 3 * n : 3], words[1 + 3 * n :]))
    note(repeated=sorted(held[context, seq]), context=context)
    return size
def llama_batch_init(n, embeddings, sequences):
    return Space(token=[0] * n, pos=[0] * n, n_seq_id=[0] * n, seq_id=[[9] for _ in range(n)], logits=[9] * n)
def llama_batch_free(batch): batch.token = None
def llama_decode(context, batch):
    global decodes, clock, wanted
    wanted = [(token, at) for token, at, flag in zip(batch.token, batch.pos, batch.logits) if flag]
    decodes += 1
    rows = list(zip(batch.token, batch.pos, batch.n_seq_id, [s[0] for s in batch.seq_id], batch.logits))
    note(context=context, rows=rows, n=batch.n_tokens, pid=os.getpid())
    of(context, 0).update(zip(batch.pos, batch.token))
    if MODE == "dies" and decodes > 6: print("GGML_ASSERT failed", file=sys.stderr, flush=True); os._exit(3)
    if MODE == "refuses" and decodes > 6: say(4, b"no slot", None); return 1
    if MODE == "hangs": time.sleep(600)
    clock += 0.5 if context == 2 else 0.75
    return 0
def llama_synchronize(context): note(synchronize=context)
def llama_get_logits(context):
    numbers = [(31 * token + 7 * at + n * n) % 97 / 16 for token, at in wanted for n in range(512)]
    return (ctypes.c_float * len(numbers))(*numbers)
"""


def fake_logits(ids: Sequence[int], start: int) -> np.ndarray:
    """What its `llama_get_logits` has for tokens at positions from `start` on."""
    token, at = np.array(ids)[:, None], start + np.arange(len(ids))[:, None]
    return ((31 * token + 7 * at + np.arange(512) ** 2) % 97 / 16).astype(np.float32)


class FakePeer:
    """An interpreter whose llama_cpp is `FAKE`."""

    def __init__(self, folder: Path, mode: str = "") -> None:
        self.log, self.python = folder / "log", folder / "python"
        (folder / "llama_cpp").mkdir()
        (folder / "llama_cpp/__init__.py").write_text('__version__ = "9.9"')
        (folder / "llama_cpp/llama_cpp.py").write_text(FAKE.format(log=str(self.log), mode=mode))
        self.log.touch()
        self.python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
        self.python.chmod(0o755)

    def notes(self, key: str) -> list[dict[str, Any]]:
        return [note for note in map(json.loads, self.log.read_text().splitlines()) if key in note]
