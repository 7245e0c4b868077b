"""Tests of tensorgraph; not installed."""
