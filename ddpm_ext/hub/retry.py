"""Calls to the Hub that are tried again, and failures told as sentences.

The client retries some of its requests and not others: creating a repository, checking a card, the commit, a
repository's information and the download of a file all die of one 503. Push and pull are idempotent, so both are tried
again as a whole.
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

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from ..errors import UserError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
TRANSPORTS = frozenset({"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"})  # of the client's versions


class HubError(UserError, OSError):
    """A push or a pull failed, and the message is the whole story: scripts print it without a traceback."""


@dataclass(frozen=True)
class Patience:
    """How long a call is tried again.

    Waits are first_wait, 2 first_wait, 4 first_wait, … but at most longest_wait, or what the server asks for where that
    is more. All of them end after `tries` calls, and no wait begins that would end after `total`. A call fails when the
    server is silent for `silence`: by itself the client would wait for its answer without end.
    """

    tries: int = 6
    first_wait: float = 1.0  # seconds, and so are the others
    longest_wait: float = 30.0
    total: float = 300.0
    silence: float = 120.0


PATIENCE = Patience()


def bounds(patience: Patience | None) -> Patience:
    """The bounds that were given, or the usual ones."""
    return patience or PATIENCE


@contextmanager
def impatient_client(patience: Patience | None) -> Iterator[None]:
    """Let every request of the Hub's client end after `patience.silence`; those with a bound of their own keep it."""
    session: Any = get_session()
    former, session.timeout = getattr(session, "timeout", None), bounds(patience).silence
    try:
        yield
    finally:
        session.timeout = former


def patiently(call: Callable[[], Result], patience: Patience | None = None) -> Result:
    """What the call returns, tried again after failures that pass by themselves.

    Args:
        call: Something that may be done twice.
        patience: Bounds; None takes `PATIENCE`.

    Raises:
        Exception: the last failure; the first one where trying again would not help.
    """
    patience, start = bounds(patience), time.monotonic()
    for attempt in range(patience.tries):
        try:
            with impatient_client(patience):
                return call()
        except Exception as error:
            backoff = min(patience.first_wait * 2**attempt, patience.longest_wait)
            wait = max(backoff, asked_wait(error) or 0.0)
            over = time.monotonic() - start + wait > patience.total
            if not is_transient(error) or attempt == patience.tries - 1 or over:
                raise
            logger.warning("%s: again in %.3g s (%d of %d).", brief(error), wait, attempt + 2, patience.tries)
            time.sleep(wait)
    raise ValueError(f"patience.tries must be at least 1, got {patience.tries}.")


# What a failure is ----------------------------------------------------------------------------------------------------


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what lies behind it: Diffusers hides the Hub's answers behind an OSError of its own."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def answer(error: BaseException) -> Any:
    """The server's answer that made the error, None where there was none."""
    answers = (getattr(cause, "response", None) for cause in causes(error))
    return next((found for found in answers if hasattr(found, "status_code")), None)


def is_offline(error: BaseException) -> bool:
    """Whether the client was forbidden to ask the Hub."""
    return any(isinstance(cause, OfflineModeIsEnabled) for cause in causes(error))


def is_transport(error: BaseException) -> bool:
    """Whether no answer came: no connection, a cut one, a timeout, a file shorter than announced."""
    return any(
        isinstance(cause, ConnectionError | TimeoutError)
        or type(cause).__module__.split(".")[0] in TRANSPORTS
        or "Consistency check failed" in str(cause)
        for cause in causes(error)
    )


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    if any(isinstance(cause, HubError | LocalTokenNotFoundError) for cause in causes(error)) or is_offline(error):
        return False
    found = answer(error)
    return found.status_code in TRANSIENT_STATUS if found is not None else is_transport(error)


def asked_wait(error: BaseException) -> float | None:
    """Seconds that the server asks to wait: `Retry-After` as a number or a date, or its rate limit's `t`."""
    found = answer(error)
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


def brief(error: BaseException) -> str:
    """An error in one line: the server's own words, or the kind of failure and its first line."""
    found = answer(error)
    if found is not None:
        said = found.headers.get("X-Error-Message") or ""
        return f"the Hub answered {found.status_code}" + (f' "{said}"' if said else "")
    last = list(causes(error))[-1]
    return f"{type(last).__name__} ({(str(last).splitlines() or [''])[0]})"


# Sentences ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Errand:
    """What was being done, for the sentences about its failure."""

    repo_id: str
    purpose: str  # "push" or "pull"
    again: str  # the command or call that does it again
    has_token: bool = True
    revision: str | None = None
    user: str | None = None


@contextmanager
def in_sentences(errand: Errand) -> Iterator[None]:
    """Turn every failure of the Hub inside the block into a `HubError` that says what to do."""
    try:
        yield
    except (HubError, KeyboardInterrupt):
        raise
    except Exception as error:
        sentence = explain(error, errand)
        if sentence is None:
            raise
        raise HubError(sentence) from error


def explain(error: BaseException, errand: Errand) -> str | None:
    """The sentence for a failure; None where the error is none of the Hub's and speaks for itself."""
    if any(isinstance(cause, LocalTokenNotFoundError) for cause in causes(error)):
        return no_token(errand)
    if any(isinstance(cause, HFValidationError) for cause in causes(error)):
        return illegal_name(errand, next(str(c) for c in causes(error) if isinstance(c, HFValidationError)))
    if is_offline(error):
        missing = f"{errand.repo_id} is not in the cache, and " if errand.purpose == "pull" else ""
        return (
            f"{missing}HF_HUB_OFFLINE forbids to ask the Hub. {kept(errand)}Unset it (`unset HF_HUB_OFFLINE`) and run "
            f"again: {errand.again}"
        )
    found = answer(error)
    if found is not None:
        return explain_status(error, found, errand)
    if is_transport(error):
        return (
            f"{constants.ENDPOINT} could not be reached, or cut the connection, {errand.purpose}ing {errand.repo_id}: "
            f"{brief(error)}. {kept(errand)}Check the network, then run again: {errand.again}"
        )
    return None


def explain_status(error: BaseException, found: Any, errand: Errand) -> str:
    """The sentence for an answer of the server."""
    status, code, said = found.status_code, found.headers.get("X-Error-Code"), brief(error)
    if status == 401 and code not in ("RepoNotFound", "GatedRepo"):
        if not errand.has_token:
            return no_token(errand)
        return (
            f"The Hub does not accept this token: it is mistyped, expired or revoked ({said}). {kept(errand)}Make one "
            f"at {constants.ENDPOINT}/settings/tokens, run `hf auth login`, then again: {errand.again}"
        )
    if code == "GatedRepo":
        return (
            f"{errand.repo_id} is gated ({said}). Ask for access at {constants.ENDPOINT}/{errand.repo_id}, run "
            f"`hf auth login` with the account that got it, then: {errand.again}"
        )
    if code == "RevisionNotFound":
        return (
            f"{errand.repo_id} has no branch, tag or commit {errand.revision!r} ({said}). Its revisions are listed at "
            f"{constants.ENDPOINT}/{errand.repo_id}/commits/main; leave `revision` out for the newest."
        )
    if code == "EntryNotFound":
        return (
            f"{errand.repo_id} lacks a file that it must have ({said}): {found.url}. It may hold no pipeline; look at "
            f"{constants.ENDPOINT}/{errand.repo_id}/tree/{errand.revision or 'main'}."
        )
    if code == "RepoNotFound" or status == 404:
        token = "your token may not see it" if errand.has_token else "it is private and no token was given"
        return (
            f"{errand.repo_id} does not exist, or {token} ({said}). {kept(errand)}Check the name at "
            f"{constants.ENDPOINT}/{errand.repo_id}; for a private one run `hf auth login`, then: {errand.again}"
        )
    if status in (402, 413) or (status == 403 and "storage" in said.lower()):
        return (
            f"The Hub does not take this much for {errand.repo_id}: a quota or a limit on size is reached ({said}). "
            f"{kept(errand)}See {constants.ENDPOINT}/settings/billing; free space, or push fewer files or to a public "
            f"repository: {errand.again}"
        )
    if status == 403:
        return explain_403(said, errand)
    if status == 400 and str(found.url).endswith("/validate-yaml"):
        return explain_card(error, said, errand)
    if status == 400 and str(found.url).endswith("/repos/create"):
        return illegal_name(errand, said)
    if status in (409, 412):
        return conflict(errand, said)
    if status == 429:
        wait = asked_wait(error)
        when = f"in {wait:.0f} s" if wait else "in some minutes"
        return (
            f"The Hub limits the number of requests ({said}), also after waiting. {kept(errand)}Run again {when}, "
            f"logged in for a higher limit (`hf auth login`): {errand.again}"
        )
    if status in TRANSIENT_STATUS:
        return (
            f"The Hub is in trouble: {said} for {found.url}, each time it was asked. {kept(errand)}See "
            f"https://status.huggingface.co and run again later: {errand.again}"
        )
    return f"The Hub refused to {errand.purpose} {errand.repo_id}: {said} for {found.url}. {kept(errand)}{errand.again}"


def explain_card(error: BaseException, said: str, errand: Errand) -> str:
    """The sentence for a card whose front matter the Hub does not take."""
    errors = next((str(cause) for cause in causes(error) if isinstance(cause, ValueError)), said)
    return (
        f"The Hub does not accept the card of {errand.repo_id}: {errors.strip()} {kept(errand)}Mend the front matter "
        f"of README.md (https://huggingface.co/docs/hub/model-cards), then: {errand.again}"
    )


def explain_403(said: str, errand: Errand) -> str:
    """The sentence for a token that may not do this."""
    whose = f"The token of {errand.user}" if errand.user else "This token"
    if errand.purpose == "pull":
        return (
            f"{whose} may not read {errand.repo_id} ({said}). Make one that may at "
            f"{constants.ENDPOINT}/settings/tokens, run `hf auth login`, then: {errand.again}"
        )
    own = f"{errand.user}/{errand.repo_id.split('/')[-1]}" if errand.user else "<your name>/<model>"
    return (
        f"{whose} may not write to {errand.repo_id}: the repository or its namespace is not yours, or the token has "
        f"no write right ({said}). {kept(errand)}Make one that has it at {constants.ENDPOINT}/settings/tokens and "
        f"run `hf auth login`, or push to a repository of your own, {own}, or open a pull request with --create_pr. "
        f"Then: {errand.again}"
    )


def no_token(errand: Errand) -> str:
    """The sentence for a missing token."""
    return (
        f"To {errand.purpose} {errand.repo_id} needs a token, and there is none. {kept(errand)}Make one with write "
        f"right at {constants.ENDPOINT}/settings/tokens and run `hf auth login`, or set HF_TOKEN, then: {errand.again}"
    )


def illegal_name(errand: Errand, said: str) -> str:
    """The sentence for a name that the Hub does not take."""
    return (
        f"The Hub does not take {errand.repo_id!r} as it is: {said}. {kept(errand)}A repository is named "
        "<user>/<model>, at most 96 letters, digits, '-', '_' and '.', without '--' or '..', and with neither '-' nor "
        f"'.' at an end: {errand.again}"
    )


def conflict(errand: Errand, said: str) -> str:
    """The sentence for a repository that someone else changed meanwhile."""
    return (
        f"{errand.repo_id} was changed by someone else during this push ({said}); nothing of theirs was overwritten. "
        f"{kept(errand)}Look at {constants.ENDPOINT}/{errand.repo_id}/commits/{errand.revision or 'main'}, then push "
        f"over it: {errand.again}"
    )


def kept(errand: Errand) -> str:
    """That nothing local is lost, where something local could be."""
    return "The local files are as they were. " if errand.purpose == "push" else ""
