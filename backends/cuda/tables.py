"""The tables by which kernels find the rows of streams, on the device."""

from __future__ import annotations

import numpy as np

from tensorgraph.backends.cuda.runtime import Memory, Runtime
from tensorgraph.state import StreamClass
from tensorgraph.state_pages import ClassStep


class DeviceTable:
    """The table of one class, as `backends.cpu.streams.FIELDS` has it, with the page numbers of its sequences.

    Page numbers are written only when they have changed: once in 16 tokens.
    """

    def __init__(self, stream_class: StreamClass, runtime: Runtime) -> None:
        self.stream_class, self.runtime = stream_class, runtime
        self._pages: Memory = runtime.take(8 * 256)
        self._seen: list[np.ndarray] = []

    def numbers(self, step: ClassStep) -> list[int]:
        """What the table holds in a step."""
        runtime, pages = self.runtime, [table.pages for table in step.tables]
        if len(pages) != len(self._seen) or any(a is not b for a, b in zip(pages, self._seen, strict=True)):
            listed = np.concatenate([np.empty(0, np.int64), *pages])
            if listed.nbytes > self._pages.size_bytes:
                self._pages = runtime.take(2 * listed.nbytes)
            if listed.size:
                runtime.write(self._pages.address, listed)
            self._seen = pages
        numbers = [len(step.tables), 0, 0, 0, 0, 0, 0, 0]
        seen_at = new_at = 0
        at = self._pages.address
        for i, table in enumerate(step.tables):
            a, b, c, d = step.seen.start[i], step.seen.stop[i], step.new.start[i], step.new.stop[i]
            numbers += (at, table.first, a, b, c, d, seen_at, new_at)
            seen_at, new_at, at = seen_at + b - a, new_at + d - c, at + 8 * len(table.pages)
        return numbers
