"""`python -m tensorgraph.testing FILE.npz`: as `tensorgraph check-node`."""

from __future__ import annotations

import sys

from tensorgraph.tools.cli import application

application(["check-node"])(["check-node", *sys.argv[1:]])
