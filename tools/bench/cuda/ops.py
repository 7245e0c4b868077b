"""Ops one by one: several instances of each in one graph, over constants of their own, so that caches hold none of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tensorgraph import registry
from tensorgraph.backends.cuda.device import CudaDevice
from tensorgraph.compiler import CompileOptions, compile
from tensorgraph.graph import Graph, Node
from tensorgraph.plan import Executable
from tensorgraph.tools.bench.cases import median
from tensorgraph.tools.bench.cuda.kernels import Kernels, Noted
from tensorgraph.tools.bench.cuda.op_cases import Inputs, OpCase
from tensorgraph.tools.bench.cuda.peers import Seconds, peers
from tensorgraph.tools.bench.cuda.results import Ceilings, Row
from tensorgraph.tools.bench.cuda.scale import Scale

OPTIONS = CompileOptions(fuse=False, without=("fold_constants",))


def measure(case: OpCase, device: CudaDevice, noted: Noted, scale: Scale, ceilings: Ceilings, rounds: int) -> Row:
    """One op, and what others take for it, by turns.

    Raises: OutOfMemoryError, KernelError, UnsupportedError.
    """
    cost = registry.ops.get((first := case.build(Inputs(0), scale)).op).cost(first, {})
    least, most = scale.instances
    instances = min(max(-(-scale.instances_bytes // max(cost.size_bytes, 1)), least), most)
    given: dict[str, np.ndarray[Any, Any]] = {}
    nodes: dict[str, Node] = {}
    for n in range(instances):
        inputs = Inputs(n)
        nodes[f"y{n}"] = case.build(inputs, scale)
        given |= inputs.given
    run, launched, held = _replayed(nodes, given, device, noted)
    others, failed = _others(case, scale, instances)
    times = scale.times(device.runtime.seconds(run, 1))
    ours: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in others}
    for i in range(rounds):
        turns: list[tuple[list[float], Seconds]] = [(ours, lambda n: device.runtime.seconds(run, n) / instances)]
        turns += [(theirs[name], seconds) for name, seconds in others.items()]
        for found, seconds in turns[:: 1 if i % 2 == 0 else -1]:
            found.append(seconds(times))
    kernels = launched / instances
    limit, least_s = ceilings.limit(cost.size_bytes, cost.flops, case.kind, kernels)
    of_limit, more = least_s / median(ours), {"instances": instances, "times": times, **({"failed": failed} if failed else {})}
    del held
    return Row("ops", case.name, ours, cost.size_bytes, cost.flops, limit, of_limit, kernels, theirs, more)


def _replayed(
    nodes: Mapping[str, Node], given: Mapping[str, np.ndarray[Any, Any]], device: CudaDevice, noted: Noted
) -> tuple[Callable[[], object], int, Executable]:
    """What starts their kernels, how many these are, and what holds the memory that they use."""
    bound = compile(Graph(dict(nodes)), device, OPTIONS).bind(given)
    bound.run({})
    launches = noted.launches
    return Kernels(device.runtime).replay(launches), len(launches), bound


def _others(case: OpCase, scale: Scale, instances: int) -> tuple[dict[str, Seconds], list[str]]:
    """Others that are ready, and a sentence for each that is not."""
    ready: dict[str, Seconds] = {}
    failed = []
    for name, prepare in peers(case.work(scale), instances) if case.work is not None else ():
        try:
            ready[name] = prepare()
        except Exception as error:  # theirs, whatever it is: ours is measured all the same
            failed.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return ready, failed
