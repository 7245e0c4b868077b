"""The Dims and inputs of a model's step: what a batch of new tokens gives every graph that reads state."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tensorgraph.dims import Dim
from tensorgraph.state import StreamClass
from tensorgraph.state_store import Step


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


def step_inputs(step: Step, tokens: np.ndarray, out_ids: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """A step's inputs by the names that graphs declare them under, and its extents.

    Inputs: `tokens`, `positions`, `seqs` [T]; `out_ids` [O]; and for each stream class c `rows.c.pos`, `rows.c.seq` [S],
    `rows.c.new` (row), `rows.c.new_first` (position of the row's first token), `rows.c.new_seq` [N], all i32.
    """
    inputs = {"tokens": tokens.astype(np.int32), "positions": step.positions, "seqs": step.seqs}
    inputs["out_ids"] = out_ids.astype(np.int32)
    dims = {"T": len(tokens), "O": len(out_ids)}
    for stream, rows in step.classes.items():
        name = stream.name
        inputs |= {
            f"rows.{name}.pos": rows.seen.rows,
            f"rows.{name}.seq": rows.seen.seqs,
            f"rows.{name}.new": rows.new.rows,
            f"rows.{name}.new_first": rows.new.rows * stream.every,
            f"rows.{name}.new_seq": rows.new.seqs,
        }
        dims["S" if name == "1" else f"S{name}"] = len(rows.seen)
        if stream.every > 1:
            dims[f"N{stream.every}"] = len(rows.new)
    return inputs, dims
