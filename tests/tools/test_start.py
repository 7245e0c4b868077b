"""What the start of `tensorgraph run` does without: modules that take long to import, and that nothing in it needs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tensorgraph.tools.cli import COMMANDS, application

SLOW = {"pydantic", "networkx", "rich", "importlib.metadata", "email", "numpy.random", "asyncio", "multiprocessing"}
SLOW |= {"statistics", "safetensors", "tensorgraph.models.deepseek_v2", "tensorgraph.models.all_files"}
RUN = """
import json, sys
sys.argv[1:] = ["run", "smollm2", "--chat", "-p", "Hello", "-n", "2"]
import gc
from tensorgraph.tools.start import main
searches = []
gc.callbacks.append(lambda phase, info: searches.append(phase))
try:
    main()
finally:
    print(json.dumps([sorted(sys.modules), len(searches)]), file=sys.stderr)
"""


def test_nothing_slow_is_imported_and_no_cycles_are_searched_for() -> None:
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True)
    names, searches = json.loads(done.stderr.splitlines()[-1])
    modules = set(names)
    assert done.stdout.strip() and {"numpy", "llvmlite", "tokenizers", "jinja2", "tensorgraph.models.llama"} <= modules
    assert modules & SLOW == set() and searches == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_alone_is_the_one_among_all(command: str) -> None:
    """The console script makes only the command that is asked for."""
    alone, among = (CliRunner().invoke(app, [command, "--help"]) for app in (application([command]), application()))
    assert alone.exit_code == 0 and alone.output == among.output and f"tensorgraph {command} " in alone.output
