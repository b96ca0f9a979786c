"""The one base class of expected errors."""

__all__ = ["UserError"]


class UserError(ValueError):
    """An expected error: what a user can get wrong, shown as one sentence without a traceback.

    The message says what was expected, what came and what to do. Commands end with exit code 1 after it.
    """
