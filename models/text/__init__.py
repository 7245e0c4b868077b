"""Weights files, tokenizers, chat templates, sampling and generation."""
