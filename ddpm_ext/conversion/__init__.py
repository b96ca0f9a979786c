"""Checkpoints of other codes as pipelines."""
