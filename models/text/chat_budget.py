"""What a chat template may spend while it renders: time, length of texts, amount of work."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tensorgraph.errors import FormatError

_ITEM = 16  # an item of a list counts as this many characters
_WORK_PER_OUTPUT = 64
_BITS = 4096
_WIDE_FORMAT = re.compile(r"\d{4,}|\{[^{}]*:[^}]*\{|%[^a-zA-Z%]*\*")


@dataclass(frozen=True)
class RenderLimits:
    """Limits of one rendering.

    Attributes:
        output_chars: longest output, and longest text or largest list on the way to it (a list's item counts as 16
            characters). All texts made on the way together may have 64 times as many.
        time_s: wall-clock time, looked at before every iteration, call, filter and output.
    """

    output_chars: int = 8_000_000
    time_s: float = 5.0


class Budget:
    """What one rendering has spent so far.

    Raises: FormatError from every method, once a limit is passed.
    """

    def __init__(self, limits: RenderLimits) -> None:
        """Start the clock."""
        self._limits = limits
        self._work = 0
        self._deadline = time.monotonic() + limits.time_s

    def tick(self) -> None:
        """Look at the clock."""
        if time.monotonic() > self._deadline:
            raise FormatError(f"[chat template] wanted it rendered within {self._limits.time_s:g} s; it goes on")

    def reserve(self, n_chars: int) -> None:
        """Account for a text or list of this length that is about to be made."""
        limit = self._limits.output_chars
        self._work += n_chars
        if n_chars > limit or self._work > limit * _WORK_PER_OUTPUT:
            raise FormatError(f"[chat template] wanted texts of at most {limit} characters; it builds a longer one")
        self.tick()

    def weigh(self, value: Any) -> int:
        """Length of a text, or of all texts and items that a nested list or mapping spells out."""
        if not isinstance(value, str | list | tuple | Mapping):
            return _ITEM
        weight, pending = 0, [value]
        while pending:
            item = pending.pop()
            weight += _ITEM
            if isinstance(item, str):
                weight += len(item)
            elif isinstance(item, Mapping):
                pending.extend(item.keys())
                pending.extend(item.values())
            elif isinstance(item, list | tuple):
                pending.extend(item)
            if weight > self._limits.output_chars + _ITEM:
                break
        return weight - _ITEM

    def text(self, value: Any) -> str:
        """The text of a value."""
        self.reserve(self.weigh(value))
        return value if isinstance(value, str) else str(value)

    def binary(self, operator: str, left: Any, right: Any) -> None:
        """Account for the result of an arithmetic operator before it is computed."""
        self.tick()
        if operator == "%" and isinstance(left, str):
            self.formatted(left, right)
        elif operator == "+" and _sized(left) and _sized(right):
            self.reserve(_size(left) + _size(right))
        elif operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if _sized(sequence) and isinstance(count, int):
                    self.reserve(_size(sequence) * max(count, 0))
            self._integer(_bits(left) + _bits(right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._integer(_bits(left) * abs(right))

    def formatted(self, template: str, arguments: Any) -> None:
        """Account for `template % arguments` or `template.format(...)`."""
        if _WIDE_FORMAT.search(template.replace("%%", "")):
            raise FormatError(f"[chat template] wanted formats of at most 999 columns; got {template[:80]!r}")
        n_fields = template.count("%") + template.count("{")
        self.reserve(len(template) + n_fields * (1000 + self.weigh(arguments)))

    def replaced(self, text: str, old: str, new: str) -> None:
        """Account for `text.replace(old, new)`."""
        self.reserve(max(len(text), len(text) + text.count(old) * (len(new) - len(old))))

    def joined(self, separator: str, items: list[Any]) -> None:
        """Account for `separator.join(items)`."""
        self.reserve(len(items) * len(separator) + self.weigh(items))

    def _integer(self, n_bits: int) -> None:
        if n_bits > _BITS:
            raise FormatError(f"[chat template] wanted whole numbers of at most {_BITS} bits; got about {n_bits}")


def _sized(value: Any) -> bool:
    return isinstance(value, str | bytes | list | tuple)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes) else len(value) * _ITEM


def _bits(value: Any) -> int:
    return int(value).bit_length() if isinstance(value, int) else 0
