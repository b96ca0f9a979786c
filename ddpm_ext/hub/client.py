"""The Hub's calls that push and pull are made of, each of them retried, and a repository's state as checksums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from huggingface_hub import HfApi, ModelCard, constants

from .. import __version__
from ..errors import HubError
from .checksums import checksums, has_checksum
from .failures import response_of, short
from .messages import Operation, hub_errors, read_only_token
from .pipeline_files import Files
from .retry import RetryPolicy, retried

__all__ = ["Client", "State"]
Result = TypeVar("Result")


class State(NamedTuple):
    """A revision of a repository."""

    commit: str
    checksums: dict[str, str]  # name -> SHA-256 of a large file, git SHA-1 of any other

    def differing(self, files: Files) -> list[str]:
        """Return the names of the files that the revision does not hold with this content."""
        known = self.checksums
        return [name for name, path in files.items() if name not in known or not has_checksum(path, known[name])]


class Client:
    """The calls of a push or pull, each of them retried."""

    def __init__(self, token: str | bool | None, policy: RetryPolicy | None, repo_type: str = "model") -> None:
        self.api = HfApi(token=token, library_name="ddpm_ext", library_version=__version__)
        self.policy, self.repo_type = policy, repo_type
        self.owners: set[str] = set()  # the token's user and organisations, once `open` has asked

    def call(self, function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """Return what one call of the Hub returns, retried."""
        return retried(partial(function, *arguments, **options), self.policy)

    def open(self, operation: Operation, private: bool | None) -> Operation:
        """Make the repository if it is missing; return the operation with its full name and the token's user."""
        me = self.call(self.api.whoami)
        name, access = str(me["name"]), (me.get("auth") or {}).get("accessToken") or {}
        self.owners = {name, *(str(org["name"]) for org in me.get("orgs") or ())}
        repo_id = operation.repo_id if "/" in operation.repo_id else f"{name}/{operation.repo_id}"
        operation = replace(operation, repo_id=repo_id, has_token=True, user=name)
        if access.get("role") == "read":
            raise HubError(read_only_token(operation))
        with hub_errors(operation):
            sdk = {"space_sdk": "gradio"} if self.repo_type == "space" else {}
            kind: Any = self.repo_type
            self.call(self.api.create_repo, repo_id, private=private, exist_ok=True, repo_type=kind, **sdk)
            if private and self._info(repo_id).private is False:
                raise HubError(
                    f"{repo_id} exists and is public, and a private one was asked for. {operation.kept}Make it private "
                    f"at {operation.page}/settings, or leave the option out, then: {operation.command}"
                )
        return operation

    def check_card(self, files: Files) -> None:
        """Ask the Hub whether it takes the front matter of a card, a licence among it: before anything is made there.

        Raises:
            ValueError: it does not.
        """
        if (card := files.get("README.md")) is not None and self.repo_type == "model":
            self.call(ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).validate)

    def text(self, repo_id: str, name: str, revision: str) -> str:
        """Return a small file of a repository."""
        kind = self.repo_type
        path = self.call(self.api.hf_hub_download, repo_id, name, revision=revision, repo_type=kind)
        return Path(path).read_text(encoding="utf-8")

    def state(self, repo_id: str, revision: str | None) -> State:
        """Return the state of a revision."""
        info = self._info(repo_id, revision=revision, files_metadata=True)
        return State(str(info.sha), checksums(info.siblings))

    def branch(self, repo_id: str, revision: str | None) -> State:
        """Return the state of a branch, which is made from main if it is missing."""
        try:
            return self.state(repo_id, revision or constants.DEFAULT_REVISION)
        except Exception as error:
            response = response_of(error)
            code = response.headers.get("X-Error-Code") if response is not None else None
            if revision is None or code != "RevisionNotFound":
                raise
        self.call(self.api.create_branch, repo_id, branch=revision, exist_ok=True, repo_type=self.repo_type)
        return self.state(repo_id, revision)

    def pull_requests(self, repo_id: str) -> set[str]:
        """Return the refs of a repository's pull requests."""
        refs = self.call(self.api.list_repo_refs, repo_id, include_pull_requests=True, repo_type=self.repo_type)
        return {ref.ref for ref in refs.pull_requests or ()}

    def tag(self, repo_id: str, tag: str, commit: str) -> None:
        """Put a tag on a commit.

        Raises:
            HubError: the Hub does not take it, or it stands on another commit.
        """
        refs = self.call(self.api.list_repo_refs, repo_id)
        placed = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
        if placed is None:
            try:
                self.call(self.api.create_tag, repo_id, tag=tag, revision=commit, exist_ok=True)
            except Exception as error:
                raise HubError(
                    f"The files are at {repo_id}, commit {commit[:10]}, but the Hub did not take the tag {tag!r} "
                    f"({short(error)}). Put it there with: hf repo tag create {repo_id} {tag} --revision {commit}"
                ) from error
        elif placed != commit:
            raise HubError(
                f"The files are at {repo_id}, commit {commit[:10]}, but the tag {tag!r} already stands on commit "
                f"{placed[:10]} and is not moved. Take another name for it."
            )

    def _info(self, repo_id: str, **options: Any) -> Any:
        return self.call(self.api.repo_info, repo_id, repo_type=self.repo_type, timeout=60, **options)
