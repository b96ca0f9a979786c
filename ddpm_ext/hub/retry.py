"""Calls to the Hub that are retried.

The client retries some of its requests and not others: creating a repository, checking a card, the commit, a
repository's information and the download of a file all fail after one 503. Push and pull are idempotent, so both are
retried as a whole.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from ..errors import UserError

__all__ = [
    "TRANSIENT_STATUS",
    "HubError",
    "RetryPolicy",
    "causes",
    "is_connection_error",
    "is_offline",
    "is_transient",
    "requested_wait",
    "response_of",
    "retried",
    "short",
]
logger = logging.getLogger(__name__)
Result = TypeVar("Result")

TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_HTTP_CLIENTS = frozenset({"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"})


class HubError(UserError, OSError):
    """A push or a pull failed; the message is shown without a traceback."""


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


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and what caused it: Diffusers hides the Hub's responses behind an OSError of its own."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def response_of(error: BaseException) -> Any:
    """Return the server's response that made the error, None where there was none."""
    responses = (getattr(cause, "response", None) for cause in causes(error))
    return next((found for found in responses if hasattr(found, "status_code")), None)


def is_offline(error: BaseException) -> bool:
    """Return whether the client was forbidden to ask the Hub."""
    return any(isinstance(cause, OfflineModeIsEnabled) for cause in causes(error))


def is_connection_error(error: BaseException) -> bool:
    """Return whether no answer came: no connection, a cut one, a timeout, a file shorter than announced."""
    return any(
        isinstance(cause, ConnectionError | TimeoutError)
        or type(cause).__module__.split(".")[0] in _HTTP_CLIENTS
        or "Consistency check failed" in str(cause)
        for cause in causes(error)
    )


def is_transient(error: BaseException) -> bool:
    """Return whether the same call may succeed later."""
    if any(isinstance(cause, HubError | LocalTokenNotFoundError) for cause in causes(error)) or is_offline(error):
        return False
    found = response_of(error)
    return found.status_code in TRANSIENT_STATUS if found is not None else is_connection_error(error)


def requested_wait(error: BaseException) -> float | None:
    """Return the seconds that the server asks to wait: `Retry-After` as a number or a date, or its rate limit's `t`."""
    found = response_of(error)
    if found is None:
        return None
    limit = re.search(r"\br=0;\s*t=(\d+)", found.headers.get("ratelimit") or "")  # none remain, for t seconds
    if found.status_code == 429 and limit is not None:
        return float(limit[1])
    value = (found.headers.get("Retry-After") or "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(timezone.utc)).total_seconds())
    except (TypeError, ValueError):
        return None


def short(error: BaseException) -> str:
    """Return an error in one line: the server's own words, or the kind of failure and its first line."""
    found = response_of(error)
    if found is not None:
        said = found.headers.get("X-Error-Message") or ""
        return f"the Hub answered {found.status_code}" + (f' "{said}"' if said else "")
    last = list(causes(error))[-1]
    return f"{type(last).__name__} ({(str(last).splitlines() or [''])[0]})"
