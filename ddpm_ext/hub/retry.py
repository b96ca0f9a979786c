"""Calls to the Hub that are retried.

The client retries some of its requests and not others: creating a repository, checking a card, the commit, a
repository's information and the download of a file all fail after one 503. Push and pull are idempotent, so both are
retried as a whole.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import get_session

from ..errors import HubError, UserError
from .failures import TRANSIENT_STATUS, causes, is_connection_error, is_offline, requested_wait, response_of, short

__all__ = ["RetryPolicy", "is_transient", "retried"]
logger = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long a failing call is retried.

    Waits are first_wait, 2 first_wait, 4 first_wait, ... but at most longest_wait, or what the server asks for where
    that is more. There are at most `tries` calls, and no wait begins that would end after `total`.
    """

    tries: int = 6
    first_wait: float = 1.0  # seconds, as are the others
    longest_wait: float = 30.0
    total: float = 300.0
    timeout: float = 120.0  # of one request: by itself the client would wait for an answer without end

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise UserError(f"RetryPolicy.tries must be at least 1, got {self.tries}.")


def retried(call: Callable[[], Result], policy: RetryPolicy | None = None) -> Result:
    """Return what the call returns, retried after failures that pass by themselves.

    Args:
        call: A function that may be called twice.
        policy: How often and how long; None takes the defaults.

    Raises:
        Exception: the last failure; the first one where a retry would not help.
    """
    policy, start, attempt = policy or RetryPolicy(), time.monotonic(), 1
    while True:
        try:
            with _request_timeout(policy.timeout):
                return call()
        except Exception as error:
            wait = max(min(policy.first_wait * 2 ** (attempt - 1), policy.longest_wait), requested_wait(error) or 0.0)
            too_late = time.monotonic() - start + wait > policy.total
            if not is_transient(error) or attempt == policy.tries or too_late:
                raise
            attempt += 1
            logger.warning("%s: retry in %.3g s (%d of %d).", short(error), wait, attempt, policy.tries)
            time.sleep(wait)


@contextmanager
def _request_timeout(seconds: float) -> Iterator[None]:
    """Give every request of the Hub's client this timeout; those with one of their own keep it."""
    session: Any = get_session()
    former, session.timeout = getattr(session, "timeout", None), seconds
    try:
        yield
    finally:
        session.timeout = former


# What a failure is ----------------------------------------------------------------------------------------------------


def is_transient(error: BaseException) -> bool:
    """Return whether the same call may succeed later."""
    if any(isinstance(cause, HubError | LocalTokenNotFoundError) for cause in causes(error)) or is_offline(error):
        return False
    found = response_of(error)
    return found.status_code in TRANSIENT_STATUS if found is not None else is_connection_error(error)
