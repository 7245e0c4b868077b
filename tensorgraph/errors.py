"""Every error that a user can cause. Each says what was wanted, what was given, and where."""

from __future__ import annotations


class TensorGraphError(Exception):
    """Base of all errors that a user of tensorgraph can cause."""


class ShapeError(TensorGraphError, ValueError):
    """Shapes of an operation's inputs do not fit together."""


class DTypeError(TensorGraphError, TypeError):
    """An operation was given an element type that it does not take."""


class AttributeValueError(TensorGraphError, ValueError):
    """An operation's attribute is missing, unknown or out of its range."""


class GraphError(TensorGraphError, ValueError):
    """A graph is not well formed, or is used in a way that it does not allow."""


class UnknownNameError(TensorGraphError, KeyError):
    """An op, backend, architecture, node, weight or sequence of that name does not exist; the message lists what does."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class UnsupportedError(TensorGraphError):
    """No device can do what a graph asks for."""


class KernelError(TensorGraphError):
    """A kernel's code cannot be generated or loaded for its target."""


class FormatError(TensorGraphError, ValueError):
    """A file is damaged or hostile; the message gives the file and the offset in bytes."""


class InputError(TensorGraphError, ValueError):
    """Values given to a run do not fit: a token outside the vocabulary, a prompt longer than the context."""


class StateError(TensorGraphError):
    """A sequence's state cannot do what was asked."""


class CannotTrim(StateError):
    """Rows needed to go on from the wanted length are gone; `earliest` is the smallest length that can still be trimmed to."""

    def __init__(self, wanted: int, earliest: int) -> None:
        super().__init__(f"[trim] wanted a length of {wanted} tokens; the earliest still retained is {earliest}")
        self.wanted, self.earliest = wanted, earliest
