"""Where a user's line is: the nearest caller that is neither the core nor an op."""

from __future__ import annotations

import os
import sys
from types import FrameType

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_hidden = [_PACKAGE + os.sep, os.path.join(os.path.dirname(_PACKAGE), "ops") + os.sep]
_is_internal: dict[str, bool] = {}


def hide_source(file: str) -> None:
    """Leave a file of shared building blocks out when a node's source line is looked for."""
    _hidden.append(os.path.abspath(file))


def source_line() -> str:
    """`file.py:31` of the nearest caller that is neither the core nor an op: the model's own line."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file not in _is_internal:
            _is_internal[file] = os.path.abspath(file).startswith(tuple(_hidden)) or file.startswith("<")
        if not _is_internal[file]:
            return f"{os.path.basename(file)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
