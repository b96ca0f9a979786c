"""The base classes of expected errors."""

__all__ = ["UsageError", "UserError"]


class UserError(ValueError):
    """An expected error: what a user can get wrong, shown as one sentence without a traceback.

    The message says what was expected, what came and what to do. Commands end with exit code 1 after it.
    """


class UsageError(UserError):
    """A command line that cannot be understood or contradicts itself. Commands end with exit code 2 after it."""
