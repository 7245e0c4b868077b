"""Kernels of this folder: functions of its `.cu` files that take whole numbers, launched by a runtime of the backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tensorgraph.backends.cuda.launches import OperandKey, Recipe, Template, Written, write
from tensorgraph.backends.cuda.runtime import LaunchOf, Mirror, Runtime

THREADS = 256


def written(file: str, function: str, names: Sequence[str]) -> Written:
    """The kernel of a function whose parameters are whole numbers of these names."""
    keys = tuple(OperandKey(name, "i64", "number", ("n",), (), False) for name in names)
    return write(Recipe(Template(f"{__package__}:{file}", function), tuple(names), keys, (), 0, THREADS, 0, True))


class Kernels:
    """Launches of such kernels on a runtime, and runs of launches that may be any program's."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._mirror: Mirror = runtime.mirror(8)

    def launch(self, file: str, function: str, blocks: int | None = None, **numbers: int) -> LaunchOf:
        """A launch of so many blocks, as many as a grid has at most where None."""
        kernel = written(file, function, tuple(numbers))
        number = self.runtime.kernels({kernel.name: kernel.source})[kernel.name]
        args = np.array([numbers[param.name] for param in kernel.params], np.int64)
        return LaunchOf(number, blocks or self.runtime.most_blocks, THREADS, 0, args)

    def run(self, *launches: LaunchOf) -> None:
        """Start them."""
        self.runtime.recorded(self._mirror, launches)()

    def replay(self, launches: Sequence[LaunchOf]) -> Callable[[], object]:
        """What starts them, after they ran twice: code is there by then, and a graph is recorded."""
        run = self.runtime.recorded(self._mirror, launches)
        for _ in range(2):
            run()
        return run


class Noted:
    """What programs have recorded on a runtime since this was made.

    Attributes:
        launches: those of the run that was started last.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.launches: Sequence[LaunchOf] = ()
        recorded = runtime.recorded

        def note(mirror: Mirror, launches: Sequence[LaunchOf], *more: Any) -> Callable[..., Any]:
            run: Callable[..., Any] = recorded(mirror, launches, *more)

            def start() -> Any:
                self.launches = launches
                return run()

            return start

        setattr(runtime, "recorded", note)  # noqa: B010  (an instance's own, in place of its class's)
