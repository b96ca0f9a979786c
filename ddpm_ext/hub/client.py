"""The Hub's calls that push and pull are made of, each of them tried again, and a repository's state as checksums."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, constants

from .. import __version__
from .files import Files, checksums, has_checksum
from .retry import Errand, HubError, Patience, answer, brief, in_sentences, patiently


class State(NamedTuple):
    """A revision of a repository."""

    commit: str
    checksums: dict[str, str]  # name -> SHA-256 of a large file, git SHA-1 of any other

    def lacks(self, files: Files) -> list[str]:
        """Names of the files that it does not hold with this content."""
        known = self.checksums
        return [name for name, path in files.items() if name not in known or not has_checksum(path, known[name])]


class Client:
    """The calls of a push, each of them tried again."""

    def __init__(self, token: str | bool | None, patience: Patience | None, repo_type: str = "model") -> None:
        self.api = HfApi(token=token, library_name="ddpm_ext", library_version=__version__)
        self.patience, self.repo_type = patience, repo_type
        self.owners: set[str] = set()  # the token's user and organisations, once `open` has asked

    def open(self, repo_id: str, private: bool | None, errand: Errand) -> tuple[str, str]:
        """Make the repository if it is missing; its full name, and whose token this is."""
        me = patiently(self.api.whoami, self.patience)
        name, access = str(me["name"]), (me.get("auth") or {}).get("accessToken") or {}
        self.owners = {name, *(str(org["name"]) for org in me.get("orgs") or ())}
        full = repo_id if "/" in repo_id else f"{name}/{repo_id}"
        if access.get("role") == "read":
            raise HubError(
                f"The token of {name} may read only, and {full} would be written. The local files are as they were. "
                f"Make one with write right at {constants.ENDPOINT}/settings/tokens, run `hf auth login`, then: "
                f"{errand.again}"
            )
        with in_sentences(Errand(full, "push", errand.again, user=name)):
            sdk = {"space_sdk": "gradio"} if self.repo_type == "space" else {}
            create = partial(
                self.api.create_repo, full, private=private, exist_ok=True, repo_type=self.repo_type, **sdk
            )
            patiently(create, self.patience)
            if private:
                self.check_private(full, errand)
        return full, name

    def check_private(self, repo_id: str, errand: Errand) -> None:
        """Raise HubError where a repository that should be private is there already and public."""
        info: Any = patiently(partial(self.api.repo_info, repo_id, repo_type=self.repo_type, timeout=60), self.patience)
        if info.private is False:
            raise HubError(
                f"{repo_id} exists and is public, and a private one was asked for. The local files are as they were. "
                f"Make it private at {constants.ENDPOINT}/{repo_id}/settings, or leave the option out, then: "
                f"{errand.again}"
            )

    def text(self, repo_id: str, name: str, revision: str) -> str:
        """A small file of a repository."""
        fetch = partial(self.api.hf_hub_download, repo_id, name, revision=revision, repo_type=self.repo_type)
        return Path(patiently(fetch, self.patience)).read_text(encoding="utf-8")

    def state(self, repo_id: str, revision: str | None) -> State:
        ask = partial(self.api.repo_info, repo_id, repo_type=self.repo_type, files_metadata=True, timeout=60)
        info: Any = patiently(partial(ask, revision=revision), self.patience)
        return State(str(info.sha), checksums(info.siblings))

    def branch(self, repo_id: str, revision: str | None) -> State:
        """The state of a branch, which is made from main if it is missing."""
        try:
            return self.state(repo_id, revision or constants.DEFAULT_REVISION)
        except Exception as error:
            if revision is None or error_code(error) != "RevisionNotFound":
                raise
        patiently(
            partial(self.api.create_branch, repo_id, branch=revision, exist_ok=True, repo_type=self.repo_type),
            self.patience,
        )
        return self.state(repo_id, revision)

    def pull_requests(self, repo_id: str) -> set[str]:
        refs = patiently(
            partial(self.api.list_repo_refs, repo_id, include_pull_requests=True, repo_type=self.repo_type),
            self.patience,
        )
        return {ref.ref for ref in refs.pull_requests or ()}

    def tag(self, repo_id: str, tag: str, commit: str) -> None:
        refs = patiently(partial(self.api.list_repo_refs, repo_id), self.patience)
        placed = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
        if placed is None:
            make = partial(self.api.create_tag, repo_id, tag=tag, revision=commit, exist_ok=True)
            try:
                patiently(make, self.patience)
            except Exception as error:
                raise HubError(
                    f"The files are at {repo_id}, commit {commit[:10]}, but the Hub did not take the tag {tag!r} "
                    f"({brief(error)}). Put it there with: hf repo tag create {repo_id} {tag} --revision {commit}"
                ) from error
        elif placed != commit:
            raise HubError(
                f"The files are at {repo_id}, commit {commit[:10]}, but the tag {tag!r} already stands on commit "
                f"{placed[:10]} and is not moved. Take another name for it."
            )


def error_code(error: BaseException) -> str | None:
    """The word by which the Hub names a failure, as RevisionNotFound; None without one."""
    found = answer(error)
    return found.headers.get("X-Error-Code") if found is not None else None
