"""Fitted solvers of a few steps, and what they are compared with."""

__all__: list[str] = []
