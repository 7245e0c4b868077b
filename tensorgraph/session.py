"""Sessions: sequences that are fed tokens, over a model's graph and a store of its state."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Concatenate, NamedTuple, ParamSpec, Self, TypeVar

import numpy as np

from tensorgraph.decoding import Decoding
from tensorgraph.dims import Dim
from tensorgraph.engine import LOGITS, Engine
from tensorgraph.errors import FormatError, InputError, StateError
from tensorgraph.extents import Extents
from tensorgraph.graph import Node
from tensorgraph.state_store import Snapshot, StateStore

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class SessionSnapshot:
    """A session at one length; `release` gives its pages back."""

    state: Snapshot
    ids: tuple[int, ...]
    engine: Engine

    def release(self) -> None:
        with self.engine.lock:
            self.state.release()


def _alone(method: Callable[Concatenate[Session, P], R]) -> Callable[Concatenate[Session, P], R]:
    """Between steps: a store may be shared with sessions that other threads step."""

    @functools.wraps(method)
    def locked(self: Session, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.engine.lock:
            return method(self, *args, **kwargs)

    return locked


class Session:
    """One sequence of tokens and its state.

    Args:
        engine: the model on its devices.
        context: most tokens of the sequence; the model's own limit where None.
        step_tokens: most tokens evaluated at once; longer inputs are fed in chunks.
        store, seq: a sequence of a store that other sessions share; a new store where None.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        context: int | None = None,
        step_tokens: int = 512,
        store: StateStore | None = None,
        seq: int | None = None,
        ids: Iterable[int] = (),
    ) -> None:
        self.engine, self.context = engine, engine.model.context if context is None else context
        self.step_tokens = step_tokens
        if self.context < 1 or step_tokens < 1:
            raise InputError(f"[session] wanted context and step_tokens >= 1; got {self.context}, {step_tokens}")
        self._extents: dict[int, Extents] = {}
        self._decoding: Decoding | None = None
        self._store = store or engine.store(self.extents())
        with engine.lock:
            self._seq: int | None = seq if seq is not None else self._store.new()
        self._ids: list[int] = list(ids)  # may run ahead of the state for a moment; `length` says how many count

    @property
    @_alone
    def length(self) -> int:
        """Tokens evaluated so far."""
        return self._store.length(self._open())

    @property
    @_alone
    def ids(self) -> list[int]:
        """The tokens evaluated so far."""
        return self._ids[: self.length]

    def eval(self, ids: Iterable[int], *, outputs: Sequence[str] | None = None, all_logits: bool = False) -> Any:
        """Append tokens and evaluate them.

        Returns the logits of the last token [V], or with `all_logits` of every new one [T, V], f32. With `outputs` (names of
        nodes, `logits` among them if wanted) a mapping of those instead: rows of all new tokens where the first axis is T or O;
        others are given whole, one after another for each step. Row numbers count the visible rows of the whole batch.

        Raises: InputError: no tokens, one outside the vocabulary, or more than the context holds; the session is unchanged.
        """
        decoding = self._decoding
        if decoding is not None and outputs is None and type(ids) is list and len(ids) == 1:
            logits = decoding.next(ids[0])
            if logits is not None:
                return logits[None] if all_logits else logits
            self._decoding = None
        return self.batch([(self, ids)], outputs=outputs, all_logits=all_logits)[0]

    @staticmethod
    def batch(
        work: Sequence[tuple[Session, Iterable[int]]], *, outputs: Sequence[str] | None = None, all_logits: bool = False
    ) -> list[Any]:
        """Evaluate several sessions of one store together, as one ragged batch a step; results as `eval` gives them."""
        checked = [(session, session._check(ids)) for session, ids in work]
        if len(checked) > 1 and len({id(session) for session, _ in checked}) != len(checked):
            raise StateError("[batch] wanted each session once; got one twice")
        if len({id(session._store) for session, _ in checked}) != 1:
            raise StateError("[batch] wanted sessions of one store (made by `fork` or `sibling`); got none, or of several")
        wanted = (LOGITS,) if outputs is None else (outputs,) if isinstance(outputs, str) else tuple(outputs)
        results = _feed(checked, wanted, all_logits)
        if outputs is not None:
            return results
        return [r[LOGITS] if all_logits else r[LOGITS][-1] for r in results]

    @_alone
    def sibling(self) -> Session:
        """An empty session of the same store, for `batch`."""
        return self._another(self._store.new(), ())

    @_alone
    def fork(self) -> Session:
        """Another session with the same tokens; pages are shared until one of the two writes to them."""
        return self._another(self._store.fork(self._open()), self.ids)

    @_alone
    def trim(self, length: int) -> None:
        """Go back to the first `length` tokens. Where the state retained does not reach, the nearest snapshot is taken and the
        tokens from there to `length` are evaluated again.

        Raises: CannotTrim: neither state nor a snapshot reaches back that far.
        """
        reached = self._store.trim(self._open(), length)
        gap = self._ids[reached:length]
        if gap:
            self.eval(gap)

    @_alone
    def snapshot(self) -> SessionSnapshot:
        """The session as it is now; cheap, pages are shared."""
        return SessionSnapshot(self._store.snapshot(self._open()), tuple(self.ids), self.engine)

    @_alone
    def restore(self, snapshot: SessionSnapshot) -> None:
        """Go to a snapshot of this session or of another one of its store."""
        self._store.restore(self._open(), snapshot.state)
        self._ids = list(snapshot.ids)

    @_alone
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokens and state to a file that `load` of the same model reads, in another process too."""
        self._store.save(self._open(), path, {"ids": json.dumps(self.ids)})

    @_alone
    def load(self, path: str | os.PathLike[str]) -> None:
        """Become what was saved.

        Raises: FormatError: the file is damaged. StateError: it is of another model or kv type. The session is unchanged.
        """
        seq, extra = self._store.load(path)
        try:
            ids = [int(i) for i in json.loads(extra["ids"])]
            if len(ids) != self._store.length(seq) or len(ids) > self.context:
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            self._store.free(seq)
            raise FormatError(f"[load] {os.fspath(path)}: the token ids do not fit the state or the context") from error
        self._store.free(self._open())
        self._seq, self._ids = seq, ids

    @_alone
    def close(self) -> None:
        """Give the sequence's pages back; the session cannot be used afterwards."""
        if self._seq is not None:
            self._store.free(self._seq)
            self._seq = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def extents(self, n_sessions: int = 1) -> Extents:
        """The largest step of a batch of so many sessions."""
        if n_sessions not in self._extents:
            self._extents[n_sessions] = Extents(self.step_tokens, self.context, 1 << (n_sessions - 1).bit_length())
        return self._extents[n_sessions]

    def _another(self, seq: int, ids: Iterable[int]) -> Self:
        return type(self)(self.engine, context=self.context, step_tokens=self.step_tokens, store=self._store, seq=seq, ids=ids)

    def _open(self) -> int:
        if self._seq is None:
            raise StateError("[session] wanted an open session; this one was closed")
        return self._seq

    def _check(self, ids: Iterable[int]) -> np.ndarray:
        if isinstance(ids, list) and len(ids) == 1 and type(ids[0]) is int and 0 <= ids[0] < self.engine.vocab_size:
            if self.length < self.context:
                return np.array(ids, np.int32)
        self._open()
        try:
            array = np.asarray(list(ids) if not isinstance(ids, np.ndarray) else ids)
        except (TypeError, ValueError) as error:
            raise InputError(f"[eval] wanted a list of token ids; got {ids!r:.60}") from error
        if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu":
            raise InputError(f"[eval] wanted at least one token id; got {array.dtype}{list(array.shape)}")
        vocab_size = self.engine.vocab_size
        if array.min() < 0 or array.max() >= vocab_size:
            bad = np.flatnonzero((array < 0) | (array >= vocab_size))
            raise InputError(f"[eval] token id {array[bad[0]]} (number {bad[0]}) is outside the vocabulary of {vocab_size}")
        if self.length + len(array) > self.context:
            have = f"{self.length} tokens are there and {len(array)} are new"
            raise InputError(f"[eval] the context holds {self.context} tokens; {have}")
        return array


def _feed(work: Sequence[tuple[Session, np.ndarray]], outputs: tuple[str, ...], all_logits: bool) -> list[dict[str, Any]]:
    """Feed sessions, in steps of at most `step_tokens` new tokens; the results of each, joined over its steps."""
    room = work[0][0].step_tokens
    if sum(len(ids) for _, ids in work) <= room:
        return _step([_Chunk(session, ids, len(ids) if all_logits else 1) for session, ids in work], outputs)
    parts: list[dict[str, list[np.ndarray]]] = [{name: [] for name in outputs} for _ in work]
    left = [ids for _, ids in work]
    while any(map(len, left)):
        room, chunks, owners = work[0][0].step_tokens, [], []
        for i, (session, _) in enumerate(work):
            n = min(room, len(left[i]))
            if n:
                chunks.append(_Chunk(session, left[i][:n], n if all_logits else int(n == len(left[i]))))
                owners.append(i)
                left[i], room = left[i][n:], room - n
        for i, values in zip(owners, _step(chunks, outputs), strict=True):
            for name, value in values.items():
                parts[i][name].append(value)
    return [{name: _join(name, values) for name, values in part.items()} for part in parts]


def _join(name: str, values: Sequence[np.ndarray]) -> np.ndarray:
    if len({value.shape[1:] for value in values}) > 1:
        raise InputError(f"[eval] {name} has another shape in each step; evaluate its tokens in one (step_tokens)")
    return np.concatenate(values)


class _Chunk(NamedTuple):
    """Tokens of one session in a step, of which the last `n_out` want logits."""

    session: Session
    ids: np.ndarray
    n_out: int


def _step(chunks: Sequence[_Chunk], outputs: tuple[str, ...]) -> list[dict[str, np.ndarray]]:
    """One ragged batch: all of it becomes part of the sequences, or nothing."""
    first = chunks[0].session
    engine = first.engine
    tokens, out_ids, ends = _tokens(chunks)
    extents = first.extents(len(chunks))
    with engine.lock:
        executable, make_inputs = engine.ready(extents, outputs)
        began = time.perf_counter()
        with first._store.begin([(c.session._open(), len(c.ids)) for c in chunks]) as step:
            inputs, dims = make_inputs(step, tokens, out_ids)
            results = executable.step(inputs, dims, step)
            for chunk in chunks:
                chunk.session._ids[chunk.session.length :] = chunk.ids.tolist()
            step.commit()
        engine.stats.steps += 1
        engine.stats.tokens += ends[-1]
        engine.stats.run_s += time.perf_counter() - began
        if len(chunks) == 1 and ends == [1] and outputs == (LOGITS,) and chunks[0].n_out:
            first._decoding = Decoding.begin(first, executable, make_inputs)
    if len(chunks) == 1:  # all rows are its own
        return [{name: value if name in executable.by_token else value[None] for name, value in results.items()}]
    graph, out_at, split = executable.plan.graph, 0, []
    for chunk, end in zip(chunks, ends, strict=True):
        rows = {"T": slice(end - len(chunk.ids), end), "O": slice(out_at, out_at + chunk.n_out)}
        out_at += chunk.n_out
        split.append({name: _rows_of(graph.outputs[name], value, rows) for name, value in results.items()})
    return split


def _tokens(chunks: Sequence[_Chunk]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """The tokens of all chunks, the numbers of those whose logits are wanted, and where each chunk ends."""
    if len(chunks) == 1:
        ids, n_out = chunks[0].ids, chunks[0].n_out
        return ids.astype(np.int32, copy=False), np.arange(len(ids) - n_out, len(ids), dtype=np.int32), [len(ids)]
    ends = np.cumsum([len(c.ids) for c in chunks]).tolist()
    out_ids = [np.arange(end - c.n_out, end, dtype=np.int32) for c, end in zip(chunks, ends, strict=True)]
    return np.concatenate([c.ids for c in chunks]).astype(np.int32), np.concatenate(out_ids), ends


def _rows_of(node: Node, value: np.ndarray, rows: Mapping[str, slice]) -> np.ndarray:
    """The rows of one sequence's tokens, of an output whose first axis is T or O; others are given whole."""
    axis = node.shape[0] if node.ndim else None
    return value[rows[axis.name]] if isinstance(axis, Dim) and axis.name in rows else value[None]
