"""Pages of memory that a step touches, beside those in which what it reads lies."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys

import numpy as np
import pytest

from tensorgraph.models.text.model import load
from tensorgraph.tools.bench.ours import fill_randomly, read_bytes
from tensorgraph.tools.bench.touched import PAGE, Memory, forget, pages_of, referenced
from tests.tools.commands import gguf

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux says which pages were touched")


def test_pages_that_are_touched_are_counted() -> None:
    memory = mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(memory, np.uint8)
    array[:] = 1
    part = Memory.of(array)
    part.stand_apart(True)
    forget()
    assert referenced([part]) == 0
    assert array[[3 * PAGE, 3 * PAGE + 9, 7 * PAGE - 1, 40 * PAGE]].sum() == 4
    assert referenced([part]) == 3 * PAGE and referenced([]) == 0
    part.stand_apart(False)


def program(*given: str) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own: it forbids large pages, which a process cannot take back for memory that it holds."""
    wanted = [sys.executable, "-m", "tensorgraph.tools.bench.touched", *given]
    return subprocess.run(wanted, capture_output=True, text=True, check=True, timeout=300)


def test_a_step_touches_what_it_counts() -> None:
    """A tiny V3.2 after 900 tokens: every key of the indexer, and the latents that are listed, a few pages more at their ends."""
    found = json.loads(program(str(gguf("deepseek_v32")), "-d", "900", "--json").stdout)["rows"][0]
    with load(gguf("deepseek_v32"), threads=1) as model, model.session(context=902) as session:
        config, n_layers = model.model.config, len([name for name in session._store.specs if name.endswith("latent")])
        fill_randomly(session, [1] * 902)
        held = session.state_bytes
    row_bytes = 2 * (config.kv_lora_rank + config.qk_rope_head_dim)
    assert found["latent"]["counted"] == n_layers * config.index_topk * row_bytes
    assert found["index_k"]["counted"] == n_layers * 901 * config.index_head_dim * 2
    for sizes in (found["latent"], found["index_k"]):
        assert sizes["counted"] <= sizes["in_pages"] + PAGE and sizes["in_pages"] <= sizes["touched"] + 2 * n_layers * PAGE
        assert sizes["touched"] <= sizes["in_pages"] + 12 * n_layers * PAGE
    assert found["latent"]["touched"] < held  # not all of it


def test_pages_of_rows() -> None:
    with load(gguf("deepseek_v32"), threads=1) as model, model.session(context=1000) as session:
        fill_randomly(session, [1] * 900)
        stream = next(name for name in session._store.specs if name.endswith("latent"))
        rows = session._store.pages(stream)
        ids = np.array([0, 5, 5, 899, -1])
        row_bytes = rows.nbytes // (len(rows) * 16)
        bytes_of = {rows.ctypes.data + i * row_bytes + b for i in (0, 5, 899) for b in range(row_bytes)}
        assert pages_of(session, stream, ids) == PAGE * len({b // PAGE for b in bytes_of})
        weights, streams = read_bytes(session.plan, model.model, 900, 1)
        assert weights > 0 and set(streams) == set(session._store.specs)


def test_steps_that_see_all_rows_and_some() -> None:
    lines = program(str(gguf("deepseek_v32")), "-d", "10", "-d", "300").stdout.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith(("10 ", "300 "))] == [
        [n, what] for n in ("10", "300") for what in ("weights", "latent", "index_k")
    ]


def test_bytes_of_attention_to_several_streams() -> None:
    """V4's layers see a window, and compressed rows beside it: those of one kind are listed, those of the other all seen."""
    with load(gguf("deepseek_v4"), threads=1) as model, model.session(context=1000) as session:
        _, streams = read_bytes(session.plan, model.model, 900, 1)
        config = model.model.config
        for i, ratio in enumerate(config.compress_ratios[: config.num_hidden_layers]):
            assert streams[f"blk.{i}.window"] == config.sliding_window * config.head_dim * 2
            if ratio:
                n_rows = min(config.index_topk, 900 // ratio) if f"blk.{i}.index_rows" in streams else 900 // ratio
                assert streams[f"blk.{i}.rows"] == n_rows * config.head_dim * 2
