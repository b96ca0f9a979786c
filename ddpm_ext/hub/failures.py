"""What a failed call to the Hub was: the server's answer, no connection, offline mode."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from huggingface_hub.errors import OfflineModeIsEnabled

__all__ = ["TRANSIENT_STATUS", "causes", "is_connection_error", "is_offline", "requested_wait", "response_of", "short"]

TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_HTTP_CLIENTS = frozenset({"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"})


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
