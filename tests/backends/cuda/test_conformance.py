"""Every op on a GPU, where the tests are for one; on the host `tests/ops/test_conformance.py` does that, and this does two."""

from __future__ import annotations

import pytest

import tensorgraph.ops  # noqa: F401  (importing registers)
from tensorgraph import registry
from tensorgraph.tools.conformance import check
from tests.backends.cuda import where

EXAMPLES = 3 if where.ON_HOST else 12


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("op", ["rms_norm", "top_k"] if where.ON_HOST else list(registry.ops))
def test_op(op: str) -> None:
    report = check(op, where.device(), examples=EXAMPLES)
    assert report.ok and report.cases, str(report)
