"""Which type each matrix of a file gets: a type for all, and rules of patterns of names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tensorgraph.dtypes import DType, as_dtype
from tensorgraph.errors import DTypeError, InputError
from tensorgraph.ops.formats import FORMATS

SCALARS = ("f32", "f16", "bf16")
KEPT = ("*ffn_gate_inp*", "*hc_*_fn*", "*_ape.*", "*.bias", "position_embd.*", "token_types.*")
"""Matrices that stay as they are unless a rule names them, as converters leave them: routers, biases of experts and the like."""


@dataclass(frozen=True)
class TypeRule:
    """The first of some types whose blocks fit goes to the matrices whose names match; where there are none, they stay."""

    pattern: str
    dtypes: tuple[DType, ...]

    def fitting(self, width: int) -> DType | None:
        return next((dtype for dtype in self.dtypes if width % dtype.block_size == 0), None)


class TypeRules:
    """What `--type` was given: `TYPE` for what no rule names, and `GLOB=TYPE`, of which the last match wins.

    `TYPE/TYPE` is a type and another for rows that are no multiple of its blocks.

    Args:
        command: whose option it is, for errors.

    Raises: InputError: a type is not known.
    """

    def __init__(self, given: Sequence[str], command: str = "synth") -> None:
        self._command = command
        plain = [self._rule("*", text) for text in given if "=" not in text]
        self._named = [self._rule(*text.split("=", 1)) for text in given if "=" in text]
        stay = [TypeRule(pattern, ()) for pattern in KEPT]
        self._rules = [TypeRule("*", ()), *plain, *stay, *self._named]

    def of(self, name: str, shape: tuple[int, ...], now: DType) -> DType:
        """The type of a matrix that is of another now.

        Raises: InputError: its rows are no multiple of the type's blocks.
        """
        rule = next(rule for rule in reversed(self._rules) if fnmatchcase(name, rule.pattern))
        found = rule.fitting(shape[-1]) if rule.dtypes else now
        if found is None:
            blocks = " or ".join(f"{dtype.block_size} ({dtype})" for dtype in rule.dtypes)
            given = f"'{rule.pattern}={rule.dtypes[0]}/f16'" if rule in self._named else f"{rule.dtypes[0]}/f16"
            how = f"--type {given} makes such matrices f16"
            raise InputError(f"[{self._command}] {name} is {shape[-1]} wide; wanted a multiple of {blocks}: {how}")
        return found

    def check_used(self, names: Sequence[str]) -> None:
        """Raises: InputError: a rule names no matrix."""
        for rule in self._named:
            if not any(fnmatchcase(name, rule.pattern) for name in names):
                known = ", ".join(list(names)[:12])
                raise InputError(f"[{self._command}] no matrix is named {rule.pattern!r}; there are {known}, ...")

    def _rule(self, pattern: str, types: str) -> TypeRule:
        try:
            dtypes = tuple(as_dtype(name) for name in types.split("/"))
        except DTypeError:
            dtypes = ()
        known = (*SCALARS, *FORMATS)
        if not dtypes or not {dtype.name for dtype in dtypes} <= set(known):
            wanted = f"[{self._command}] --type wants TYPE or GLOB=TYPE, with types of {', '.join(known)}"
            raise InputError(f"{wanted}; got {types!r}")
        return TypeRule(pattern, dtypes)
