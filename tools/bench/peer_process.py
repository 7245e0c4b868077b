"""The peer as a child process: started, asked for rounds, and ended whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tensorgraph.errors import TensorGraphError
from tensorgraph.tools.bench.cases import Kind
from tensorgraph.tools.bench.rounds import Round

SCRIPT = Path(str(files("tensorgraph.tools.bench"))) / "peer.py"
OTHERS_SETTINGS = ("OMP_", "GOMP_", "KMP_", "PYTHON")
"""Variables that speak to this interpreter and its libraries; the peer is to run as it would alone."""


class PeerError(TensorGraphError):
    """The peer cannot be started, cannot do what it was asked, or has ended."""


class Peer:
    """llama.cpp in another interpreter, with one model and number of threads; idle unless a round is asked for.

    Args:
        python: an interpreter whose environment has llama-cpp-python.
        copies: whether of what comes before rounds only the beginning is evaluated, and its state repeated.
    Raises: PeerError.
    """

    def __init__(self, python: str, model: Path, threads: int, context: int, kv_type: str, copies: bool = False) -> None:
        self._errors = tempfile.TemporaryFile()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(OTHERS_SETTINGS)}
        try:
            self._process = subprocess.Popen(
                [python, str(SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=kept,
                text=True,
                start_new_session=True,  # Ctrl-C is for us, and we end it
            )
        except OSError as error:
            self._errors.close()
            raise PeerError(f"[peer] {python} cannot be started: {error.strerror or error}") from error
        try:
            settings = {"threads": threads, "context": context, "kv_type": kv_type, "copies": copies}
            self.about = self._ask(do="load", path=str(model), **settings)
        except BaseException:
            self.close()
            raise

    def begin(self, ids: Sequence[int]) -> None:
        """Make `ids` what later rounds come after."""
        self._ask(do="begin", ids=list(ids))

    def warm_up(self, kind: Kind, ids: Sequence[int]) -> str:
        """A round that does not count; what it decided, in words."""
        return f"flash attention {self._ask(do='warm_up', kind=kind, ids=list(ids))['flash_attn']}"

    def run(self, kind: Kind, ids: Sequence[int]) -> Round:
        """One round after the prefix."""
        reply = self._ask(do="run", kind=kind, ids=list(ids))
        return Round(float(reply["seconds"]), bool(reply["quiet"]))

    def logits(self, ids: Sequence[int], start: int) -> NDArray[np.float32]:
        """Logits [T, V] of tokens that follow `start` others, with flash attention on; 0 forgets what came before."""
        with tempfile.NamedTemporaryFile() as file:
            self._ask(do="write_logits", ids=list(ids), start=start, to=file.name)
            return np.fromfile(file.name, np.float32).reshape(len(ids), self.about["vocab_size"])

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):  # one that has ended may have said something before
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise PeerError(self._ended(request["do"]))
        try:
            reply: dict[str, Any] = json.loads(line)
        except ValueError:
            raise PeerError(f"[peer] wanted a line of JSON; got {line.strip()!r:.80}") from None
        if "error" in reply:
            raise PeerError(f"[peer] {reply['error']}")
        return reply

    def _ended(self, what: str) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return f"[peer] the process ended with {how} when asked to {what.replace('_', ' ')}" + (f": {last}" if last else "")

    def close(self) -> None:
        """End the process, at once; doing so again does nothing."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            try:
                stream.close()
            except OSError:  # what was not written to a process that is gone
                pass
        self._process.wait()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
