"""The compiler that runs kernels on the processor; tests that need it are skipped, with a reason, where it is not there."""

from __future__ import annotations

import pytest

from tensorgraph.backends.cuda.host_compiler import HostCompiler
from tensorgraph.errors import UnsupportedError


@pytest.fixture(scope="session")
def compiler() -> HostCompiler:
    try:
        return HostCompiler()
    except UnsupportedError as error:
        pytest.skip(str(error))
