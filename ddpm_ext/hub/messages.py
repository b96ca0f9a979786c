"""Failures of the Hub as sentences: what happened, what is unchanged, which command to run next."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

from ..errors import HubError
from .failures import TRANSIENT_STATUS, causes, is_connection_error, is_offline, requested_wait, response_of, short

__all__ = ["Operation", "conflict", "hub_errors", "read_only_token", "unreachable", "write_refused"]


@dataclass(frozen=True)
class Operation:
    """What is being done, for the messages about its failure."""

    repo_id: str
    action: str  # "push" or "pull"
    command: str  # the command or call that does it again
    has_token: bool = True
    revision: str | None = None
    user: str | None = None

    @property
    def kept(self) -> str:
        """Say that local files are unchanged, where they could have changed."""
        return "The local files are as they were. " if self.action == "push" else ""

    @property
    def page(self) -> str:
        """Return the repository's page."""
        return f"{constants.ENDPOINT}/{self.repo_id}"


@contextmanager
def hub_errors(operation: Operation) -> Iterator[None]:
    """Turn every failure of the Hub inside the block into a `HubError` that says what to do."""
    try:
        yield
    except (HubError, KeyboardInterrupt):
        raise
    except Exception as error:
        message = _explain(error, operation)
        if message is None:
            raise
        raise HubError(message) from error


def unreachable(error: BaseException) -> str | None:
    """Return the message for a question of the Hub's client that got no answer, whoever asked; None for other errors.

    For calls that no `Operation` speaks for, as those that look for data sets.
    """
    if response_of(error) is not None or not is_connection_error(error):
        return None
    places = [frame.filename for cause in causes(error) for frame in traceback.extract_tb(cause.__traceback__)]
    if not any("huggingface_hub" in place for place in places):
        return None  # another connection
    return (
        f"{constants.ENDPOINT} could not be reached, or cut the connection: {short(error)}. Check the network, or set "
        "HF_HUB_OFFLINE=1 for what is cached."
    )


def _explain(error: BaseException, operation: Operation) -> str | None:
    """Return the message for a failure; None where the error is none of the Hub's and speaks for itself."""
    for cause in causes(error):
        if isinstance(cause, LocalTokenNotFoundError):
            return _no_token(operation)
        if isinstance(cause, HFValidationError):
            return _illegal_name(operation, str(cause))
    if is_offline(error):
        missing = f"{operation.repo_id} is not in the cache, and " if operation.action == "pull" else ""
        return (
            f"{missing}HF_HUB_OFFLINE forbids to ask the Hub. {operation.kept}Unset it (`unset HF_HUB_OFFLINE`) and "
            f"run again: {operation.command}"
        )
    response = response_of(error)
    if response is not None:
        return _explain_response(error, response, operation)
    if is_connection_error(error):
        return (
            f"{constants.ENDPOINT} could not be reached, or cut the connection, {operation.action}ing "
            f"{operation.repo_id}: {short(error)}. {operation.kept}Check the network, then run again: "
            f"{operation.command}"
        )
    return None


def _explain_response(error: BaseException, response: Any, operation: Operation) -> str:
    """Return the message for a response of the server: by its code where it has one, else by its status."""
    status, code, said = response.status_code, response.headers.get("X-Error-Code"), short(error)
    if code in ("GatedRepo", "RevisionNotFound", "EntryNotFound", "RepoNotFound") or status == 404:
        return _not_found(code, said, response.url, operation)
    if status == 401:
        return _rejected_token(said, operation) if operation.has_token else _no_token(operation)
    if status in (402, 413) or (status == 403 and "storage" in said.lower()):
        return (
            f"The Hub does not take this much for {operation.repo_id}: a quota or a limit on size is reached ({said}). "
            f"{operation.kept}See {constants.ENDPOINT}/settings/billing; free space, or push fewer files or to a "
            f"public repository: {operation.command}"
        )
    if status == 403:
        return write_refused(said, operation)
    if status == 400 and str(response.url).endswith("/validate-yaml"):
        errors = next((str(cause) for cause in causes(error) if isinstance(cause, ValueError)), said)
        return (
            f"The Hub does not accept the card of {operation.repo_id}: {errors.strip()} {operation.kept}Correct the "
            "front matter of README.md (https://huggingface.co/docs/hub/model-cards), then: " + operation.command
        )
    if status == 400 and str(response.url).endswith("/repos/create"):
        return _illegal_name(operation, said)
    if status in (409, 412):
        return conflict(operation, said)
    if status == 429:
        wait = requested_wait(error)
        when = f"in {wait:.0f} s" if wait else "in some minutes"
        return (
            f"The Hub limits the number of requests ({said}), also after waiting. {operation.kept}Run again {when}, "
            f"logged in for a higher limit (`hf auth login`): {operation.command}"
        )
    if status in TRANSIENT_STATUS:
        return (
            f"The Hub is in trouble: {said} for {response.url}, each time it was asked. {operation.kept}See "
            f"https://status.huggingface.co and run again later: {operation.command}"
        )
    return (
        f"The Hub refused to {operation.action} {operation.repo_id}: {said} for {response.url}. {operation.kept}"
        + operation.command
    )


def _not_found(code: str | None, said: str, url: object, operation: Operation) -> str:
    """Return the message for a repository, a revision or a file that is not there or not for this token."""
    repo_id, revision = operation.repo_id, operation.revision
    if code == "GatedRepo":
        return (
            f"{repo_id} is gated ({said}). Ask for access at {operation.page}, run `hf auth login` with the account "
            f"that got it, then: {operation.command}"
        )
    if code == "RevisionNotFound":
        return (
            f"{repo_id} has no branch, tag or commit {revision!r} ({said}). Its revisions are listed at "
            f"{operation.page}/commits/main; leave `revision` out for the newest."
        )
    if code == "EntryNotFound":
        return (
            f"{repo_id} lacks a file that it must have ({said}): {url}. It may hold no pipeline; look at "
            f"{operation.page}/tree/{revision or 'main'}."
        )
    token = "your token may not see it" if operation.has_token else "it is private and no token was given"
    return (
        f"{repo_id} does not exist, or {token} ({said}). {operation.kept}Check the name at {operation.page}; for a "
        f"private one run `hf auth login`, then: {operation.command}"
    )


def write_refused(said: str, operation: Operation) -> str:
    """Return the message for a token that may not do this."""
    whose = f"The token of {operation.user}" if operation.user else "This token"
    if operation.action == "pull":
        return (
            f"{whose} may not read {operation.repo_id} ({said}). Make one that may at "
            f"{constants.ENDPOINT}/settings/tokens, run `hf auth login`, then: {operation.command}"
        )
    own = f"{operation.user}/{operation.repo_id.split('/')[-1]}" if operation.user else "<your name>/<model>"
    return (
        f"{whose} may not write to {operation.repo_id}: the repository or its namespace is not yours, or the token has "
        f"no write right ({said}). {operation.kept}Make one that has it at {constants.ENDPOINT}/settings/tokens and "
        f"run `hf auth login`, or push to a repository of your own, {own}, or open a pull request with --create_pr. "
        f"Then: {operation.command}"
    )


def read_only_token(operation: Operation) -> str:
    """Return the message for a token without write right."""
    return (
        f"The token of {operation.user} may read only, and {operation.repo_id} would be written. {operation.kept}Make "
        f"one with write right at {constants.ENDPOINT}/settings/tokens, run `hf auth login`, then: {operation.command}"
    )


def _rejected_token(said: str, operation: Operation) -> str:
    """Return the message for a token that the Hub does not know."""
    return (
        f"The Hub does not accept this token: it is mistyped, expired or revoked ({said}). {operation.kept}Make one at "
        f"{constants.ENDPOINT}/settings/tokens, run `hf auth login`, then again: {operation.command}"
    )


def _no_token(operation: Operation) -> str:
    """Return the message for a missing token."""
    return (
        f"To {operation.action} {operation.repo_id} needs a token, and there is none. {operation.kept}Make one with "
        f"write right at {constants.ENDPOINT}/settings/tokens and run `hf auth login`, or set HF_TOKEN, then: "
        f"{operation.command}"
    )


def _illegal_name(operation: Operation, said: str) -> str:
    """Return the message for a name that the Hub does not take."""
    return (
        f"The Hub does not take {operation.repo_id!r} as it is: {said}. {operation.kept}A repository is named "
        "<user>/<model>, at most 96 letters, digits, '-', '_' and '.', without '--' or '..', and with neither '-' nor "
        f"'.' at an end: {operation.command}"
    )


def conflict(operation: Operation, said: str) -> str:
    """Return the message for a repository that someone else changed meanwhile."""
    return (
        f"{operation.repo_id} was changed by someone else during this push ({said}); nothing of theirs was "
        f"overwritten. {operation.kept}Look at {operation.page}/commits/{operation.revision or 'main'}, then push "
        f"over it: {operation.command}"
    )
