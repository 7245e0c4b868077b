"""Plants mistakes into the project's source, in memory, and says which check of its tests notices each.

`python -m tests.models.planting GROUP` runs the mistakes of a group of `tests/models/mistakes`. What takes long to import is
imported once; each mistake, and each check without a mistake, then runs in a fork of this process that imports the project
anew, the planted file with its text changed on the way. No file is written.
"""

from __future__ import annotations

import importlib
import importlib.abc
import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, NamedTuple

from tests.layout import ROOT

LIMIT_S = 120
BROKEN = (SyntaxError, ImportError, NameError, AttributeError, TypeError)
"""What a mistake that is no program raises: it would be noticed by anything, and shows nothing about the tests."""


class Mistake(NamedTuple):
    """A change of one file, and the check that notices it.

    Attributes:
        file: relative to the root; `old` stands in it exactly once.
        check: as `find` takes it.
    """

    about: str
    file: str
    old: str
    new: str
    check: str


class PlantedLoader(SourceFileLoader):
    """Compiles a changed text in place of the file's."""

    text = ""

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.text, self.path, "exec", dont_inherit=True)


class Planter(importlib.abc.MetaPathFinder):
    """Finds every module as the others do, but the one of a mistake is loaded with its text changed."""

    def __init__(self, path: str, text: str) -> None:
        self.path, self.text = path, text

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                if spec.origin == self.path:
                    loader = PlantedLoader(fullname, self.path)
                    loader.text = self.text
                    spec.loader = loader
                return spec
        return None


def planted(mistake: Mistake) -> str:
    """The text of the mistake's file with the mistake in it.

    Raises: ValueError where `old` does not stand in the file exactly once: then the list is out of date.
    """
    text = (ROOT / mistake.file).read_text()
    if text.count(mistake.old) != 1:
        raise ValueError(f"{mistake.file} has {mistake.old!r} {text.count(mistake.old)} times; wanted once: {mistake.about}")
    return text.replace(mistake.old, mistake.new)


def find(check: str) -> Callable[[], None]:
    """A check by its name: `function`, or `module:function:argument:...` with arguments that are numbers or words."""
    module, function, *arguments = check.split(":") if ":" in check else ("tests.models.planted_checks", check)
    found: Callable[..., None] = getattr(importlib.import_module(module), function)
    backend = ("reference",) if "backend" in inspect.signature(found).parameters else ()  # mistakes are planted in definitions
    return lambda: found(*backend, *(int(a) if a.isdigit() else a for a in arguments))


def outcome(check: str, planter: Planter | None) -> dict[str, str]:
    """What the check says: "passes", "fails" or, where the mistake is no program, "broken"; and how."""
    try:
        if planter is not None:
            sys.meta_path.insert(0, planter)
        find(check)()
    except BaseException as error:  # pytest's own are no Exceptions
        broken = planter is not None and isinstance(error, BROKEN)
        return {"is": "broken" if broken else "fails", "how": "".join(traceback.format_exception(error))[-600:]}
    return {"is": "passes", "how": ""}


def in_fork(check: str, mistake: Mistake | None = None) -> dict[str, str]:
    """`outcome` in a process of its own, which is ended after `LIMIT_S`."""
    planter = None if mistake is None else Planter(str(ROOT / mistake.file), planted(mistake))
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(LIMIT_S)
            os.close(receive)
            os.write(send, json.dumps(outcome(check, planter)).encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    result: dict[str, str] = json.loads(answer) if answer else {"is": "broken", "how": f"no answer in {LIMIT_S} s"}
    return result


def preload(architectures: Sequence[str]) -> None:
    """Import what is outside the project, and unpack the reference data, once for all forks."""
    import hypothesis
    import hypothesis.extra.numpy
    import jinja2  # noqa: F401
    import ml_dtypes  # noqa: F401
    import networkx  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.numpy  # noqa: F401
    import tokenizers  # noqa: F401

    from tests.reference import reference_path

    given = {"deadline": None, "database": None, "derandomize": True, "report_multiple_bugs": False}
    hypothesis.settings.register_profile("planted", phases=[hypothesis.Phase.generate], **given)  # type: ignore[arg-type]
    hypothesis.settings.load_profile("planted")
    for name in architectures:
        reference_path(f"{name}/reference.npz")
        reference_path(f"{name}/{name}-f32.gguf")
    assert "tensorgraph" not in sys.modules, "each fork imports the project itself"


def main(group: str) -> None:
    """Print one line of JSON for each check without a mistake, then for each mistake."""
    from tests.models.mistakes import GROUPS

    mistakes = GROUPS[group]
    preload(("llama", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "deepseek_v4"))

    def say(about: str, check: str, found: dict[str, str]) -> None:
        line: dict[str, Any] = {"about": about, "check": check, **found}
        print(json.dumps(line), flush=True)

    for check in dict.fromkeys(m.check for m in mistakes):
        say("", check, in_fork(check))
    for mistake in mistakes:
        say(mistake.about, mistake.check, in_fork(mistake.check, mistake))


if __name__ == "__main__":
    main(sys.argv[1])
