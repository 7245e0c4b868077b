"""The ceilings of a card: what it reads, copies and computes at most, and what starting a kernel takes."""

from __future__ import annotations

from collections.abc import Callable

from tensorgraph.backends.cuda.device import CudaDevice
from tensorgraph.backends.cuda.runtime import LaunchOf
from tensorgraph.backends.cuda.spread import WARP
from tensorgraph.tools.bench.cases import median
from tensorgraph.tools.bench.cuda.kernels import THREADS, Kernels
from tensorgraph.tools.bench.cuda.results import Ceilings, Row
from tensorgraph.tools.bench.cuda.scale import Scale

PRODUCTS = {
    "f16": ("mma.sync f16, sums in f32", "ceiling_mma_f16", 8 * 4096 / WARP),
    "s8": ("mma.sync s8", "ceiling_mma_s8", 8 * 8192 / WARP),
    "dp4a": ("dp4a", "ceiling_dp4a", 16 * 8),
    "f32": ("f32 multiply-adds", "ceiling_fma", 16 * 2),
}
"""What is computed: its name, the kernel, and operations of a thread and turn."""


def measure(device: CudaDevice, scale: Scale, rounds: int, say: Callable[[str], None]) -> tuple[Ceilings, list[Row]]:
    """Measure all of them, each once a round."""
    runtime, kernels = device.runtime, Kernels(device.runtime)
    memory, sums = runtime.take(scale.buffer_bytes), runtime.take(256)
    kernels.run(kernels.launch("fill.cu", "fill_bits", None, address=memory.address, n_words=scale.buffer_bytes // 8, seed=1))
    rows: list[Row] = []

    def timed(name: str, launches: list[LaunchOf], amount: float, unit: str, by: float = 1.0, size_bytes: int = 0) -> float:
        """Amounts a second, or with no amount seconds of a launch; the row says it in its unit."""
        say(f"ceilings: {name}")
        run = kernels.replay(launches)
        times = scale.times(runtime.seconds(run, 1))
        found = [runtime.seconds(run, times) / len(launches) for _ in range(rounds)]
        value = amount / median(found) if amount else median(found)
        rows.append(Row("ceilings", name, found, size_bytes, more={"value": value / by, "unit": unit}))
        return value

    n, half = scale.buffer_bytes, memory.address + scale.buffer_bytes // 2
    of = {"from": memory.address}
    read = [kernels.launch("ceilings.cu", "ceiling_read", None, **of, n=n // 16, to=sums.address)]
    copy = [kernels.launch("ceilings.cu", "ceiling_copy", None, **of, n=n // 32, to=half)]
    read_rate = timed("memory read", read, n, "GB/s", 1e9, n)
    copy_rate = timed("memory copied, read and written", copy, n, "GB/s", 1e9, n)
    rates = {}
    for key, (name, function, operations) in PRODUCTS.items():
        launch = kernels.launch("ceilings.cu", function, None, turns=scale.turns, to=sums.address, seed=12345)
        rates[key] = timed(name, [launch], operations * scale.turns * launch.blocks * THREADS, "TFLOP/s", 1e12)
    nothing = kernels.launch("ceilings.cu", "ceiling_nothing", 1, to=0)
    node_s = timed("a node of a graph", [nothing] * scale.nodes, 0, "us", 1e-6)
    say("ceilings: a launch")
    alone = []
    for _ in range(rounds):  # what is recorded anew is launched as it is the first time
        run = runtime.recorded(runtime.mirror(8), [nothing] * scale.nodes)
        alone.append(runtime.seconds(run, 1) / scale.nodes)
    rows.append(Row("ceilings", "a launch from Python", alone, more={"value": 1e6 * median(alone), "unit": "us"}))
    return Ceilings(read_rate, copy_rate, rates, node_s), rows
