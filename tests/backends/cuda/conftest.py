"""What runs kernels: a compiler for the processor, without which tests that need it are skipped, with a reason; or a GPU."""

from __future__ import annotations

import pytest

from tensorgraph.backends.cuda.host_compiler import HostCompiler
from tensorgraph.errors import UnsupportedError
from tests.backends.cuda import where


@pytest.fixture(scope="session")
def compiler() -> HostCompiler:
    try:
        return HostCompiler()
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> None:
    """That which `where` names; a GPU that is asked for and not there is a failure."""
    if where.ON_HOST:
        request.getfixturevalue("compiler")
    else:
        where.device().runtime.describe()
