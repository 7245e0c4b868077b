"""Builds in a fresh folder: setuptools copies into `build/` without emptying it, so deleted modules would come back."""

import tempfile

from setuptools import setup

with tempfile.TemporaryDirectory() as folder:
    setup(options={"build": {"build_base": folder}})
