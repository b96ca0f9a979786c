"""Scores of models, with their provenance."""

__all__: list[str] = []
