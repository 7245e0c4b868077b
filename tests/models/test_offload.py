"""Models on two kinds of device: what lies where, what is copied, and that logits are the same wherever layers run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorgraph.backends.cpu.device import CpuDevice
from tensorgraph.compiler import CompileOptions, PlanCache
from tensorgraph.device import Device
from tensorgraph.dtypes import as_dtype
from tensorgraph.engine import Engine
from tensorgraph.errors import InputError, UnsupportedError
from tensorgraph.extents import Extents
from tensorgraph.models.text import offload
from tensorgraph.models.text.model import TextModel, load
from tensorgraph.models.text.offload import Parts, place
from tensorgraph.session import Session
from tests.backends.cuda import where as cuda
from tests.backends.cuda.conftest import compiler, machine  # noqa: F401  (fixtures)
from tests.models import tiny
from tests.reference import reference_path
from tests.tools.commands import tg

pytestmark = pytest.mark.usefixtures("machine")
LARGEST = 1e-9
with_any_memory = pytest.mark.skipif(not cuda.ON_HOST, reason="a GPU has the memory that it has")


def devices(memory_bytes: int | None = None) -> tuple[Device, ...]:
    return cuda.device(memory_bytes), CpuDevice("cpu")


def engine(architecture: str, parts: Parts, given: Sequence[Device]) -> Engine:
    model, cache = tiny.model(architecture), PlanCache()
    options = place(model, given, CompileOptions(exact=True), as_dtype("f32"), cache, parts)
    return Engine(model, given, kv_dtype="f32", options=options, cache=cache)


def devices_of(engine: Engine, session: Session, op: str) -> list[str]:
    """Where nodes of an op run, in order."""
    plan = engine.executable(session.extents()).plan
    return [split.device for split in plan.scheduled.splits for node in split.nodes if node.op == op]


@pytest.mark.parametrize(("layers", "where"), [(0, ["cpu", "cpu"]), (1, ["cpu", cuda.NAME]), (2, [cuda.NAME, cuda.NAME])])
def test_the_last_layers_run_on_the_first_device(layers: int, where: list[str]) -> None:
    stored, on = tiny.reference("llama"), engine("llama", Parts(layers), devices())
    with Session(on) as session:
        assert devices_of(on, session, "flash_attn") == where
        logits = session.eval(stored["input_ids"][:20], all_logits=True)
        assert tiny.nmse(logits, stored["logits"][:20]) <= LARGEST
        logits = np.stack([session.eval([int(i)]) for i in stored["input_ids"][20:23]])
        assert tiny.nmse(logits, stored["logits"][20:23]) <= LARGEST


@pytest.mark.parametrize("architecture", ["deepseek_v3", pytest.param("deepseek_v4", marks=pytest.mark.deep)])
def test_experts_on_the_second_device(architecture: str) -> None:
    stored, on = tiny.reference(architecture), engine(architecture, Parts(cpu_experts=True), devices())
    with Session(on) as session:
        assert set(devices_of(on, session, "mul_mat_id")) == {"cpu"}
        assert set(devices_of(on, session, "flash_attn")) == {cuda.NAME}
        logits = session.eval(stored["input_ids"][:20], all_logits=True)
        assert tiny.nmse(logits, stored["logits"][:20]) <= LARGEST
        assert tiny.nmse(session.eval([int(stored["input_ids"][20])]), stored["logits"][20]) <= LARGEST
        plan = on.executable(session.extents()).plan
        report = plan.report({"T": 1, "O": 1, "S": 21, **dict.fromkeys(plan.graph.dims, 1)})
        assert 0 < report.copies <= len(devices_of(on, session, "mul_mat_id"))  # rows, experts and result, of three products


def sizes_of(architecture: str) -> offload.Sizes:
    model, given = tiny.model(architecture), devices()
    extents = Extents(512, min(4096, model.context), 1)
    graph = model.graph(extents, as_dtype("f32"))
    plan = PlanCache().get(graph, given[0], CompileOptions(exact=True))
    return offload.sizes(model, graph, plan, extents, as_dtype("f32"), 2)


def test_sizes_are_those_of_the_file() -> None:
    """Of weights: each tensor once; of state: two streams of f32 rows, twice as many as there are tokens as pages are taken."""
    found, model = sizes_of("llama"), tiny.model("llama")
    assert model.file is not None
    tensors = {name: model.weight(name).nbytes for name in ("token_embd.weight", "output.weight", "output_norm.weight")}
    of_layers = [sum(model.weight(f"blk.{i}.{name}.weight").nbytes for name in LLAMA) for i in range(2)]
    assert list(found.layers) == of_layers and list(found.experts) == [0, 0]
    stream = min(4096, model.context) * int(np.prod(model.states()["blk.0.k"].row_shape)) * 4
    assert found.rest == sum(tensors.values()) + stream
    assert list(found.states) == [2 * 2 * stream] * 2


LLAMA = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")


@with_any_memory
@pytest.mark.parametrize("n", [0, 1, 2])
def test_as_many_layers_as_fit(n: int) -> None:
    """By the numbers of the plan: with a byte less than n layers take, one fewer."""
    wanted = sizes_of("llama").taken(n, False) + offload.SPARE_BYTES
    for spare, fitting in ((0, n), (-1, max(n - 1, 0))):
        on = engine("llama", Parts(), devices(wanted + spare))
        with Session(on) as session:
            assert devices_of(on, session, "flash_attn").count(cuda.NAME) == fitting


@with_any_memory
@pytest.mark.parametrize("step_tokens", [16, pytest.param(512, marks=pytest.mark.deep)])
def test_what_is_counted_is_enough(step_tokens: int) -> None:
    """For all tokens of a long context, in steps that were told of; 2 MiB beside it are for numbers of runs and the like."""
    small = tiny.model("llama")
    model = replace(small, config=replace(small.config, max_position_embeddings=40_000))
    given, parts = devices(), Parts(2, context=40_000, step_tokens=step_tokens)
    extents, options = Extents(step_tokens, parts.context, 1), CompileOptions()
    graph = model.graph(extents, as_dtype("f32"))
    plan = PlanCache().get(graph, given[0], options)
    taken = offload.sizes(model, graph, plan, extents, as_dtype("f32"), 2).taken(2, False)
    assert taken > 40 << 20
    on = Engine(model, devices(taken + (2 << 20))[0], kv_dtype="f32", options=options)
    with TextModel(model, on).session(step_tokens=step_tokens) as session:
        for n in (33_000, 6_900):  # beyond a doubling
            session.fill([1] * n, lambda stream, spec, n: np.zeros((n, *spec.row_shape), np.float32))
        session.eval([2] * min(step_tokens, 100))


def test_what_cannot_be() -> None:
    with pytest.raises(InputError, match="the model has 2 layers; got --gpu-layers 3"):
        engine("llama", Parts(3), devices())
    with pytest.raises(UnsupportedError, match="want two devices, such as cuda,cpu; got cpu"):
        load(reference_path("llama/llama-f32.gguf"), backend="cpu", gpu_layers=1)


@with_any_memory
def test_a_device_without_room_says_so() -> None:
    from tensorgraph.backends.cuda.runtime import OutOfMemoryError

    given: Any = devices(100_000)[0]
    with pytest.raises(OutOfMemoryError, match="wanted .* bytes; .* of 100000 are free"):
        Session(Engine(tiny.model("llama"), given, kv_dtype="f32")).eval([1, 2, 3])
    on = engine("llama", Parts(), (given, CpuDevice("cpu")))  # which finds no room for a layer
    with Session(on) as session:
        assert set(devices_of(on, session, "flash_attn")) == {"cpu"}


def test_the_command_takes_both(tmp_path: Any) -> None:
    file = reference_path("llama/llama-f32.gguf")
    (tmp_path / "ids.json").write_text("[1, 5, 9, 13]")
    given = ("--ids", tmp_path / "ids.json", "--exact", "--kv-type", "f32", "--backend", f"{cuda.NAME},cpu", "--gpu-layers", 1)
    ran = tg("logits", file, *given, "--out", tmp_path / "two.npz")
    assert ran.exit_code == 0, ran.stderr
    assert tg("logits", file, *given[:5], "--out", tmp_path / "one.npz").exit_code == 0
    two, one = (np.load(tmp_path / f"{name}.npz")["logits"] for name in ("two", "one"))
    assert tiny.nmse(two, one) <= LARGEST
    wrong = tg("logits", file, *given[:-1], "many", "--out", tmp_path / "no.npz")
    assert wrong.exit_code == 2 and "[gpu-layers] wanted a number of layers, or auto; got 'many'" in wrong.stderr


def test_sizes_are_what_weights_take(tmp_path: Path) -> None:
    """In planes of their own bits, and of NVFP4, which has none, as f32: the device's memory that is taken for them."""
    path = str(tmp_path / "model.gguf")
    tg("quantize", str(reference_path("llama/llama-f32.gguf")), path, "--type", "q8_0", "--type", "*ffn_up*=nvfp4")
    with load(path, backend=cuda.NAME) as loaded, loaded.session() as session:
        session.eval([1, 2, 3])
        plan = loaded.engine.executable(session.extents()).plan
        found = offload.sizes(loaded.model, plan.graph, plan, session.extents(), as_dtype("f16"), 2)
        held = [one.memory.size_bytes for one in loaded.engine._uploaded.values()]
        spec = loaded.model.states()["blk.0.k"]
        moving = loaded.model.context * int(np.prod(spec.row_shape)) * 2
        assert sum(found.layers) + found.rest == sum(held) + moving
        up = found.layers[0] - sum(loaded.model.weight(f"blk.0.{name}.weight").nbytes for name in LLAMA if name != "ffn_up")
        n_rows, row_bytes = loaded.model.weight("blk.0.ffn_up.weight").shape
        assert up >= 4 * n_rows * row_bytes // 36 * 64 and loaded.model.file.tensors["blk.0.ffn_up.weight"].dtype.name == "nvfp4"
