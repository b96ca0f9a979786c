"""Checkpoints of other codes -> pipelines."""

__all__: list[str] = []
