"""Conformance: any op on any backend compared with its reference, from the op's declaration alone.

`check` draws cases of an op, runs them on a backend and says whether it agrees; `criterion` states what agreeing means.
Drawing takes the package hypothesis, which the extra `test` installs; nothing else here does.
"""

from __future__ import annotations

from tensorgraph.tools.conformance.check import Failure, Report, check, check_case
from tensorgraph.tools.conformance.coverage import Support, Tested, coverage, tested

__all__ = ["Failure", "Report", "Support", "Tested", "check", "check_case", "coverage", "tested"]
