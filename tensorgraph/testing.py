"""Whole-graph checks, offered here for tests of users: see `tensorgraph.tools.testing`."""

from tensorgraph.tools.testing import *  # noqa: F403
from tensorgraph.tools.testing import __all__ as __all__
