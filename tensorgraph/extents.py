"""The Dims and inputs of a model's step: what a batch of new tokens gives every graph that reads state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from tensorgraph.dims import Dim
from tensorgraph.state import StreamClass
from tensorgraph.state_pages import ClassStep
from tensorgraph.state_step import Step


@dataclass(frozen=True)
class Extents:
    """The largest step that a plan is made for."""

    tokens: int = 512  # new tokens in one step, all sequences together
    context: int = 4096  # tokens of one sequence
    sequences: int = 1  # sequences in one step

    @property
    def new_tokens(self) -> Dim:
        """T: the new tokens of all sequences, one after another."""
        return Dim("T", self.tokens)

    @property
    def out_tokens(self) -> Dim:
        """O: those whose logits are asked for."""
        return Dim("O", self.tokens)

    def new_rows(self, stream: StreamClass) -> Dim:
        """The rows of a class that are completed in the step; T itself for one row a token."""
        if stream.every == 1:
            return self.new_tokens
        return Dim(f"N{stream.every}", self.tokens // stream.every + self.sequences)

    def seen_rows(self, stream: StreamClass) -> Dim:
        """The rows of a class that are visible to any token of the step."""
        all_rows = self.sequences * (self.context // stream.every)
        if stream.keep is None:
            return Dim("S" if stream.every == 1 else f"S{stream.name}", all_rows)
        window = self.sequences * stream.keep + self.tokens // stream.every + self.sequences
        return Dim(f"S{stream.name}", min(all_rows, window))


class StepInputs:
    """Makes a step's inputs, those of the wanted names, as graphs declare them, and its extents.

    Inputs: `tokens`, `positions`, `seqs` [T]; `out_ids` [O]; and for each stream class c `rows.c.pos`, `rows.c.seq` [S],
    `rows.c.new` (row), `rows.c.new_first` (position of the row's first token), `rows.c.new_seq` [N], all i32.
    """

    def __init__(self, wanted: Iterable[str]) -> None:
        names = tuple(wanted)
        self._of_step = tuple(name for name in names if name in ("positions", "seqs"))
        self._given = {name: name in names for name in ("tokens", "out_ids")}
        self._of_rows = tuple((name, *name.split(".")[1:]) for name in names if name.startswith("rows."))

    def __call__(self, step: Step, tokens: np.ndarray, out_ids: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        dims = {"T": len(tokens), "O": len(out_ids)}
        inputs = {name: getattr(step, name) for name in self._of_step}
        if self._given["tokens"]:
            inputs["tokens"] = tokens
        if self._given["out_ids"]:
            inputs["out_ids"] = out_ids
        rows = {}
        for stream, found in step.classes.items():
            name = stream.name
            rows[name] = stream, found
            dims["S" if name == "1" else f"S{name}"] = len(found.seen)
            if stream.every > 1:
                dims[f"N{stream.every}"] = len(found.new)
        for name, stream_name, what in self._of_rows:
            inputs[name] = _OF_ROWS[what](*rows[stream_name])
        return inputs, dims


_OF_ROWS: dict[str, Callable[[StreamClass, ClassStep], np.ndarray]] = {
    "pos": lambda stream, rows: rows.seen.rows,
    "seq": lambda stream, rows: rows.seen.seqs,
    "new": lambda stream, rows: rows.new.rows,
    "new_first": lambda stream, rows: rows.new.rows * stream.every,
    "new_seq": lambda stream, rows: rows.new.seqs,
}
