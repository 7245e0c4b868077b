"""Whole-graph checks: one graph on two backends, or with and without a pass, and the first node that differs."""

from tensorgraph.tools.testing.compare import Terms, compare, compare_model, rerun
from tensorgraph.tools.testing.difference import Difference, Limits, Statistics
from tensorgraph.tools.testing.report import Fault, Report
from tensorgraph.tools.testing.reproduction import Reproduction, load_reproduction

__all__ = [
    "Difference",
    "Fault",
    "Limits",
    "Report",
    "Reproduction",
    "Statistics",
    "Terms",
    "compare",
    "compare_model",
    "load_reproduction",
    "rerun",
]
