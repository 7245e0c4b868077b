"""Models whose weights are drawn in a device's memory: tokens a second, what a step takes of the host, and what it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np

from tensorgraph.backends.cuda.device import CudaDevice
from tensorgraph.backends.cuda.runtime import OutOfMemoryError
from tensorgraph.engine import Engine
from tensorgraph.extents import Extents
from tensorgraph.models.architecture import Model
from tensorgraph.models.builder import FileWeights
from tensorgraph.models.text.gguf_writer import NewTensor
from tensorgraph.models.text.model import TextModel, TextSession
from tensorgraph.models.text.offload import SPARE_BYTES, sizes
from tensorgraph.state import StateSpec
from tensorgraph.tools.bench.cases import Case, median
from tensorgraph.tools.bench.command import random_ids
from tensorgraph.tools.bench.cuda.drawn import Drawing, middle_of, without_data
from tensorgraph.tools.bench.cuda.kernels import Kernels, Noted
from tensorgraph.tools.bench.cuda.model_cases import ModelCase
from tensorgraph.tools.bench.cuda.results import Ceilings, Row
from tensorgraph.tools.bench.ours import FILLED, read_bytes
from tensorgraph.tools.model_argument import described_model
from tensorgraph.tools.options import size_text
from tensorgraph.tools.synth.rules import TypeRules
from tensorgraph.tools.synth.shape import shape_of
from tensorgraph.tools.synth.values import contents

STEPS = 32
"""Tokens that a round decodes."""


class DrawnWeights:
    """Weights without data, but for those that are numbers with a meaning: tables of experts by token, and frequencies."""

    def __init__(self, tensors: Sequence[NewTensor], given: dict[str, np.ndarray[Any, Any]], n_experts: int) -> None:
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self._given, self._n_experts = given, n_experts

    def data(self, name: str) -> np.ndarray[Any, Any]:
        tensor = self.tensors[name]
        if name in self._given:
            return self._given[name]
        if tensor.dtype.kind == "int":
            found = b"".join(contents(tensor, 0, self._n_experts))
            return np.frombuffer(found, tensor.dtype.numpy).reshape(tensor.shape)
        return without_data(tensor.shape, tensor.dtype, middle_of(name, tensor.shape))

    def close(self) -> None:
        """There is nothing to let go of."""


def drawn_model(case: ModelCase, *, small: bool = False) -> Model:
    """The model of a case; nothing of it lies anywhere yet."""
    changes = (*case.changes, *(case.small if small else ()))
    with described_model(case.preset) as described:
        shape = shape_of(described, TypeRules(["f16", *case.types]), layers=case.layers, changes=changes)
    n_experts = next((v for k, v in shape.metadata.items() if k.endswith(".expert_count")), 0)
    file = DrawnWeights(shape.tensors, dict(shape.given), n_experts)
    catalog = FileWeights({tensor.name: (tensor.shape, tensor.dtype) for tensor in shape.tensors})
    return Model(shape.model.architecture, shape.model.config, catalog, file)


@dataclass(frozen=True)
class Bench:
    """What all models are measured with."""

    device: CudaDevice
    drawing: Drawing
    noted: Noted
    ceilings: Ceilings
    rounds: int
    small: bool
    say: Callable[[str], None]


def measure(case: ModelCase, bench: Bench) -> Iterator[Row]:
    """A row for decoding at each depth, and one for a prompt.

    Raises: OutOfMemoryError: it does not fit, by the plan's own numbers.
    """
    model = drawn_model(case, small=bench.small)
    if bench.small:
        case = replace(case, depths=tuple(min(depth, 16 * i) for i, depth in enumerate(case.depths)), prompt=8)
    steps = 4 if bench.small else STEPS
    longest = max(*case.depths, case.prompt) + 2 * steps
    context = min(longest, model.context)
    loaded = TextModel(model, Engine(model, bench.device))
    bench.say(f"{case.name}: planning")
    taken = taken_bytes(loaded, Extents(512, context))
    free = bench.device.free_bytes()
    if free is not None and taken > free:
        raise OutOfMemoryError(f"wants {size_text(taken)}; {size_text(free)} are free")
    bench.say(f"{case.name}: drawing weights")
    began = perf_counter()
    with loaded, closing(loaded.session(context=context)) as session:
        ids = random_ids(context, model.vocab_size)
        session.eval(ids[: case.prompt])
        about = {"model": case.name, "taken_bytes": taken, "ready_s": perf_counter() - began, "target": case.target}
        bench.say(f"{case.name}: a prompt")
        yield _prompt(session, ids[: case.prompt], bench, about)
        for depth in case.depths:
            depth = min(depth, context - 2 * steps)
            bench.say(f"{case.name}: decoding behind {depth} tokens")
            _fill(session, ids[:depth], bench.drawing)
            yield _decode(session, ids[depth : depth + steps], bench, about)


def taken_bytes(model: TextModel, extents: Extents) -> int:
    """What the plan says that it takes of the device: weights as they are held there, state and arena; and what is left free."""
    engine = model.engine
    options = replace(engine.options, layouts=engine.layouts(extents))
    plan = engine.cache.get(engine.graph(extents), engine.devices, options)
    n_layers = model.model.config.num_hidden_layers
    found = sizes(model.model, engine.graph(extents), plan, extents, engine.kv_dtype, n_layers)
    return found.taken(n_layers, False) + (SPARE_BYTES if engine.devices[0].name != "cuda-host" else 0)


def _fill(session: TextSession, ids: Sequence[int], drawing: Drawing) -> None:
    """Make a session hold so many tokens, with state that is drawn."""
    session.trim(0)

    def rows(stream: str, spec: StateSpec, n: int) -> np.ndarray[Any, Any]:
        return np.zeros((n, *spec.row_shape), np.float32)

    for at in range(0, len(ids), FILLED):
        session.fill(ids[at : at + FILLED], rows)
    for stream in session._store.specs if ids else ():
        drawing.pages(session._store.pages(stream))


def _prompt(session: TextSession, ids: Sequence[int], bench: Bench, about: dict[str, Any]) -> Row:
    found = []
    for i in range(bench.rounds + 1):
        session.trim(0)
        began = perf_counter()
        session.eval(ids)
        if i:
            found.append(perf_counter() - began)
    kernels = len(bench.noted.launches)
    more = {**about, "test": str(Case("pp", len(ids))), "tokens": len(ids), "target": "", "device_s": _device_s(bench)}
    return Row("models", f"{about['model']}, {more['test']}", found, kernels=kernels, more=more)


def _decode(session: TextSession, ids: Sequence[int], bench: Bench, about: dict[str, Any]) -> Row:
    """Rounds of steps of one token each after what the session holds."""
    before, depth = session.snapshot(), session.length
    found: list[float] = []
    walls: list[float] = []
    for i in range(bench.rounds + 1):
        session.restore(before)
        began = perf_counter()
        for token in ids:
            step_began = perf_counter()
            session.eval([token])
            if i:
                walls.append(perf_counter() - step_began)
        if i:
            found.append(perf_counter() - began)
    kernels, device_s = len(bench.noted.launches), _device_s(bench)
    weights, streams = read_bytes(session.plan, session.model.model, depth + (len(ids) + 1) // 2, 1)
    session.restore(before)
    before.release()
    size_bytes = weights + sum(streams.values())
    step_s = median(found) / len(ids)
    host_s = max(median(walls) - device_s, 0.0)  # of what a step takes beside its kernels: to write, launch, wait and read
    times = {"memory": size_bytes / bench.ceilings.read, "launches": kernels * bench.ceilings.node_s, "host": host_s}
    limit: Any = max(times, key=lambda name: times[name])
    more = {**about, "test": str(Case("tg", len(ids), depth)), "tokens": len(ids), "device_s": device_s, "host_s": host_s}
    more |= {"streams_bytes": sum(streams.values()), "wall_s_by_step": walls}
    name, of_limit = f"{about['model']}, {more['test']}", times[limit] / step_s
    return Row("models", name, found, size_bytes, limit=limit, of_limit=of_limit, kernels=kernels, more=more)


def _device_s(bench: Bench) -> float:
    """What the kernels of the step that was started last take, one after another; what it wrote is written again."""
    runtime = bench.device.runtime
    run = Kernels(runtime).replay(bench.noted.launches)
    return median([runtime.seconds(run, 1 if bench.small else 10) for _ in range(bench.rounds)])
