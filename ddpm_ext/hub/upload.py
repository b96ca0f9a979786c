"""Upload to the Hub: one commit, made on top of the state that it was compared with.

Afterwards every file is checked against the Hub's checksums. Downloads stand in download.py.
"""

from __future__ import annotations

import logging
import os
import shlex
import tempfile
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants, get_token
from huggingface_hub.utils import validate_repo_id

from .. import __version__
from ..errors import HubError
from .client import Client, State
from .files import RENDERED, check_no_token, collect, is_rendered, minimal_card, stage, stale
from .messages import Operation, conflict, hub_errors, write_refused
from .pipeline_files import Files
from .retry import RetryPolicy

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "PUSH_OPTIONS",
    "BackgroundPush",
    "Push",
    "PushOptions",
    "full_name",
    "open_repository",
    "push_command",
    "push_space",
    "push_to_hub",
]
logger = logging.getLogger(__name__)
# Options of a push -> of `ddpm-ext push`, where the two differ.
_FLAGS = {"private": "hub_private_repo"}


class Push(NamedTuple):
    """Where a push went."""

    repo_id: str
    commit: str  # the commit that holds the files
    url: str
    changed: bool  # False where the repository already held every file
    pull_request: str | None  # its URL, with create_pr


class PushOptions(TypedDict, total=False):
    """What is pushed, and where to.

    private: Whether a new repository is private; None leaves it to the account's default. True refuses one that is
        public.
    revision: Branch to commit to, made if missing; None for main.
    create_pr: Open a pull request in place of committing to main.
    commit_message: First line of the commit.
    tags: Tags to put on the commit, "v1.0" for a release.
    variant: "fp16" or "bf16": upload weights of that precision, too.
    parent_commit: The commit that the branch must be at; None takes where it is when the push begins. If someone else
        pushes in between, nothing is overwritten.
    """

    private: bool | None
    revision: str | None
    create_pr: bool
    commit_message: str | None
    tags: Sequence[str]
    variant: str | None
    parent_commit: str | None


# Options of push_to_hub that DiffusionPipeline.save_pretrained passes on to it; it has a `variant` of its own.
PUSH_OPTIONS = frozenset(PushOptions.__annotations__) - {"variant"} | {"token", "retry"}


def push_to_hub(
    folder_or_pipeline: object,
    repo_id: str,
    *,
    token: str | None = None,
    retry: RetryPolicy | None = None,
    command: str | None = None,
    **options: Unpack[PushOptions],
) -> Push:
    """Upload a run or a pipeline in one commit; `ddpm_ext.hub.files` says which files.

    Files of an earlier push in the pipeline's folders that this one does not have are deleted in the same commit, so
    that no old weights stay beside new ones; all else in the repository stays, `.gitattributes` with it, and a card
    that was written by hand there is not replaced by a rendered one. Pushing unchanged files makes no commit; pushing
    again after an interruption sends what is missing.

    Args:
        folder_or_pipeline: A run folder, the folder of a saved pipeline, or a pipeline. Nothing in it is changed.
        repo_id: "user/model", or "model" for the token's owner. Made if missing.
        token: Token with write right; None takes HF_TOKEN or the one of `hf auth login`.
        retry: How often and how long failing calls are retried.
        command: The command that a failure's message advises; None makes it of these options, without the token.
        **options: Those of `PushOptions`.

    Raises:
        HubError: the push failed, with what to do about it.
    """
    if unknown := options.keys() - PushOptions.__annotations__.keys():
        raise TypeError(f"push_to_hub has no option {', '.join(sorted(unknown))}; see PushOptions.")
    command = command or push_command(folder_or_pipeline, repo_id, **options)
    token, revision = token or get_token(), options.get("revision")
    operation = Operation(repo_id, "push", command, has_token=token is not None, revision=revision)
    if options.get("create_pr") and revision not in (None, constants.DEFAULT_REVISION):
        raise HubError(f"A pull request is opened against main, got revision={revision!r}: leave one of them out.")
    with tempfile.TemporaryDirectory(prefix="ddpm_ext_push_") as staging, hub_errors(operation):
        validate_repo_id(repo_id)
        files = _files(folder_or_pipeline, Path(staging), options.get("variant"))
        check_no_token(files, token)
        client = Client(token, retry)
        client.check_card(files)
        operation = client.open(operation, options.get("private"))
        with hub_errors(operation):
            push = _Commit(client, operation, options).make(files, Path(staging))
            for tag in options.get("tags") or ():
                client.tag(operation.repo_id, tag, push.commit)
    return push


def push_command(folder_or_pipeline: object, repo_id: str, **options: Any) -> str:
    """Return the command, or for a pipeline in memory the call, that pushes with these options, where they are given.

    Args:
        folder_or_pipeline: As in `push_to_hub`.
        repo_id: As there.
        **options: Those of `push_to_hub`, and `license` of the script; never the token.
    """
    given = {name: value for name, value in options.items() if value is not None and value not in (False, (), [])}
    if options.get("private") is False:
        given["private"] = False
    if not isinstance(folder_or_pipeline, str | os.PathLike):
        more = "".join(f", {name}={value!r}" for name, value in given.items())
        return f'pipeline.push_to_hub("{repo_id}"{more})'
    words = ["--model", str(folder_or_pipeline), "--hub_model_id", repo_id]
    for name, value in given.items():
        values = [] if value is True else value if isinstance(value, list | tuple) else [value]
        words += [
            f"--{_FLAGS.get(name, name)}",
            *(str(word).lower() if word is False else str(word) for word in values),
        ]
    return f"ddpm-ext push {shlex.join(words)}"


def push_space(
    files: Files,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    retry: RetryPolicy | None = None,
) -> Push:
    """Upload the files of a Gradio page as a Space, in one commit and checked as in `push_to_hub`.

    Args:
        files: Name in the Space -> file on disk; with app.py, requirements.txt and README.md.
        repo_id: "user/space". Made if missing.
        private: As in `PushOptions`.
        token: As in `push_to_hub`.
        retry: As there.

    Raises:
        HubError: the push failed, with what to do about it.
    """
    command, token = f"ddpm-ext demo --model <model> --push_to_space {repo_id}", token or get_token()
    operation = Operation(repo_id, "push", command, has_token=token is not None)
    with tempfile.TemporaryDirectory(prefix="ddpm_ext_push_") as staging, hub_errors(operation):
        validate_repo_id(repo_id)
        check_no_token(files, token)
        client = Client(token, retry, "space")
        operation = client.open(operation, private)
        with hub_errors(operation):
            push = _Commit(client, operation, {}).make(files, Path(staging))
    return push._replace(url=f"{constants.ENDPOINT}/spaces/{push.repo_id}")


def open_repository(
    repo_id: str, *, private: bool | None = None, token: str | None = None, retry: RetryPolicy | None = None
) -> str:
    """Make a repository if it is missing and check that it may be written to: better before a training than after it.

    Args:
        repo_id: As in `push_to_hub`.
        private: As in `PushOptions`.
        token: As in `push_to_hub`.
        retry: As there.

    Returns:
        Its full name, "user/model".

    Raises:
        HubError: there is no token, or it may not write there.
    """
    token = token or get_token()
    operation = Operation(repo_id, "push", "the same command", has_token=token is not None)
    with hub_errors(operation):
        validate_repo_id(repo_id)
        client = Client(token, retry)
        opened = client.open(operation, private)
        if opened.repo_id.split("/")[0] not in client.owners:  # a repository that exists is opened whoever owns it
            raise HubError(write_refused("it belongs to someone else", replace(operation, user=opened.user)))
    return opened.repo_id


def full_name(repo_id: str, token: str | None = None, retry: RetryPolicy | None = None) -> str:
    """Return the name of a repository with its owner, "user/model"; where none is given, it is the token's.

    Raises:
        HubError: there is no token, or the Hub does not take it.
    """
    token = token or get_token()
    operation = Operation(repo_id, "push", "the same command", has_token=token is not None)
    with hub_errors(operation):
        validate_repo_id(repo_id)
        client = Client(token, retry)
        name = client.call(client.api.whoami)["name"]
    return repo_id if "/" in repo_id else f"{name}/{repo_id}"


def _files(folder_or_pipeline: Any, staging: Path, variant: str | None) -> Files:
    if isinstance(folder_or_pipeline, str | os.PathLike):
        return collect(folder_or_pipeline, staging, variant)
    folder = staging / "pipeline"
    folder_or_pipeline.save_pretrained(str(folder))
    return collect(folder, staging / "variant", variant)


@dataclass
class _Commit:
    """One commit that makes the repository hold some files, or none where it does, checked afterwards."""

    client: Client
    operation: Operation
    options: PushOptions

    @property
    def repo_id(self) -> str:
        return self.operation.repo_id

    def make(self, files: Files, staging: Path) -> Push:
        """Compare, commit what differs, and check that the repository holds every file."""
        client, create_pr = self.client, bool(self.options.get("create_pr"))
        before = client.branch(self.repo_id, self.operation.revision)
        branch, parent = self.operation.revision or constants.DEFAULT_REVISION, self.options.get("parent_commit")
        if parent is not None and not before.commit.startswith(parent):
            raise HubError(conflict(self.operation, f"{branch} is at {before.commit[:10]}, not at {parent[:10]}"))
        files = self._with_card(before, files, staging)
        changed = before.differing(files)
        gone = stale(before.checksums, files, changed)
        if not changed and not gone:
            return self._push(before.commit, False)
        requests = client.pull_requests(self.repo_id) if create_pr else set()
        for ref in sorted(requests):
            if not (now := client.state(self.repo_id, ref)).differing(files):
                return self._push(now.commit, False, ref)
        adds: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, str(files[name])) for name in changed
        ]
        adds += [CommitOperationDelete(name, is_folder=False) for name in gone]
        attempts = 0

        def attempt() -> Push:
            nonlocal attempts
            attempts += 1
            if attempts > 1:  # the commit may have been made, and its answer lost
                refs = client.pull_requests(self.repo_id) - requests if create_pr else {branch}
                if (found := self._made(files, before, refs)) is not None:
                    return found
            return self._create(adds, before)

        push = client.call(attempt)
        if wrong := client.state(self.repo_id, push.commit).differing(files):
            raise HubError(
                f"After the push {self.repo_id} holds other bytes than were sent, in {', '.join(wrong)}. "
                f"{self.repo_id} at commit {push.commit[:10]} should not be used. {self.operation.kept}"
                + self.operation.command
            )
        return push

    def _create(self, operations: Collection[CommitOperationAdd | CommitOperationDelete], before: State) -> Push:
        name = self.repo_id.split("/")[-1]
        info = self.client.api.create_commit(
            self.repo_id,
            operations,
            commit_message=self.options.get("commit_message") or f"Upload {name} with ddpm_ext {__version__}",
            revision=self.operation.revision,
            create_pr=bool(self.options.get("create_pr")),
            parent_commit=before.commit,
            repo_type=self.client.repo_type,
        )
        return Push(self.repo_id, info.oid, str(info.commit_url), True, info.pr_url)

    def _made(self, files: Files, before: State, refs: set[str]) -> Push | None:
        """Return the commit with these files that one of these refs has got since; None where none has moved.

        Raises:
            HubError: one has moved, and to other files: someone else pushed.
        """
        for ref in refs:
            now = self.client.state(self.repo_id, ref)
            if now.commit == before.commit:
                continue
            if now.differing(files):
                raise HubError(conflict(self.operation, f"{ref} is at {now.commit[:10]} now"))
            return self._push(now.commit, True, ref)
        return None

    def _with_card(self, before: State, files: Files, staging: Path) -> Files:
        """Return the files with a card: a minimal one where there is none, no rendered one over one written by hand."""
        card, there = files.get("README.md"), "README.md" in before.checksums
        if card is None:
            if there or self.client.repo_type != "model":
                return files
            path = staging / "README.md"
            path.write_text(minimal_card(self.repo_id, files), encoding="utf-8")
            return {**files, "README.md": path}
        if not there or not is_rendered(card) or not before.differing({"README.md": card}):
            return files
        if RENDERED in self.client.text(self.repo_id, "README.md", before.commit):
            return files
        logger.warning("The card of %s was written by hand and is kept; the rendered one is not pushed.", self.repo_id)
        return {name: path for name, path in files.items() if name != "README.md"}

    def _push(self, commit: str, changed: bool, ref: str = "") -> Push:
        page = f"{constants.ENDPOINT}/{self.repo_id}"
        request = f"{page}/discussions/{ref.split('/')[-1]}" if ref.startswith("refs/pr/") else None
        return Push(self.repo_id, commit, f"{page}/commit/{commit}", changed, request)


class BackgroundPush:
    """Pushes beside a running training: `push` returns at once, `wait` ends with the newest state on the Hub.

    One push runs at a time. Of those that come in meanwhile only the newest is kept: each holds the whole model. A push
    that fails is logged and forgotten when a later one succeeds.

    Args:
        repo_id: As in `push_to_hub`.
        also: Further files of the folder that `prepare` reads, patterns allowed; they are not pushed for that.
        prepare: Called in the background with the snapshot of the folder, before it is pushed.
        **options: Further options of `push_to_hub`.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        also: Sequence[str] = (),
        prepare: Callable[[Path], object] = lambda snapshot: None,
        **options: Any,
    ) -> None:
        self.repo_id, self.also, self.prepare, self.options = repo_id, also, prepare, options
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="push_to_hub")
        self._lock = threading.Lock()
        self._waiting: tuple[tempfile.TemporaryDirectory[str], dict[str, Any]] | None = None
        self._last: Future[Push | None] | None = None

    def push(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Upload a run folder as it is now, in the background.

        Args:
            folder: As in `push_to_hub`; links to its files are taken before this returns, so it may change afterwards.
            **options: Over those of the constructor, such as commit_message.

        Raises:
            HubError: the folder holds nothing to push.
        """
        folder = Path(folder).resolve()
        snapshot = tempfile.TemporaryDirectory(prefix=".push_", dir=folder.parent)  # links stay on one disk
        try:
            found = (path for name in self.also for path in folder.glob(name) if path.is_file())
            also = {path.relative_to(folder).as_posix(): path for path in found}
            stage(collect(folder, Path(snapshot.name)) | also, Path(snapshot.name))
        except BaseException:
            snapshot.cleanup()
            raise
        options = {**self.options, **options}
        told = {name: options[name] for name in options.keys() & PushOptions.__annotations__.keys()}
        options.setdefault("command", push_command(folder, self.repo_id, **told))
        with self._lock:
            if self._waiting is not None:
                self._waiting[0].cleanup()
            self._waiting = (snapshot, options)
        self._last = self._worker.submit(self._push_waiting)

    def _push_waiting(self) -> Push | None:
        with self._lock:
            task, self._waiting = self._waiting, None
        if task is None:  # an earlier call took the newest already
            return None
        with task[0] as folder:
            try:
                self.prepare(Path(folder))
                self._done, self._failure = push_to_hub(folder, self.repo_id, **task[1]), None
                return self._done
            except HubError as error:
                logger.warning("Pushing in the background failed, training goes on: %s", error)
                self._done, self._failure = None, error
                return None

    _done: Push | None = None
    _failure: HubError | None = None

    def wait(self) -> Push | None:
        """Wait for the last push; None where there was none.

        Raises:
            HubError: the last push failed.
        """
        if self._last is not None:
            self._last.result()
        self._worker.shutdown()
        if self._failure is not None:
            raise self._failure
        return self._done
