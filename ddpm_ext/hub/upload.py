"""Upload to the Hub: one commit, made on top of the state that it was compared with.

Afterwards every file is checked against the Hub's checksums. Downloads stand in pull.py.
"""

from __future__ import annotations

import logging
import os
import shlex
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants, get_token
from huggingface_hub.utils import validate_repo_id

from .. import __version__
from .client import Client, State
from .files import RENDERED, Files, check_no_token, collect, minimal_card, stage, stale
from .retry import Errand, HubError, Patience, conflict, explain_403, in_sentences, patiently

logger = logging.getLogger(__name__)
# Options of a push -> of scripts/push_to_hub.py, where the two differ.
FLAGS = {"private": "hub_private_repo"}


class Push(NamedTuple):
    """Where a push went."""

    repo_id: str
    commit: str  # the commit that holds the files
    url: str
    changed: bool  # False where the repository already held every file
    pull_request: str | None  # its URL, with create_pr


# Options of push_to_hub that DiffusionPipeline.save_pretrained passes on to it.
PUSH_OPTIONS = frozenset(
    ("private", "revision", "create_pr", "token", "commit_message", "tags", "parent_commit", "patience")
)


def push_to_hub(
    folder_or_pipeline: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    tags: Sequence[str] = (),
    variant: str | None = None,
    parent_commit: str | None = None,
    patience: Patience | None = None,
    again: str | None = None,
) -> Push:
    """Upload a run or a pipeline in one commit; `repository.collect` says which files.

    Files of an earlier push in the pipeline's folders that this one does not have are deleted in the same commit, so
    that no old weights stay beside new ones; all else in the repository stays, `.gitattributes` with it, and a card
    that was written by hand there is not replaced by a rendered one. Pushing unchanged files makes no commit; pushing
    again after an interruption sends what is missing.

    Args:
        folder_or_pipeline: A run folder, the folder of a saved pipeline, or a pipeline. Nothing in it is changed.
        repo_id: "user/model", or "model" for the token's owner. Made if missing.
        private: Whether a new repository is private; None leaves it to the account's default. True refuses one that
            is public.
        revision: Branch to commit to, made if missing; None for main.
        create_pr: Open a pull request in place of committing to main.
        token: Token with write right; None takes HF_TOKEN or the one of `hf auth login`.
        commit_message: First line of the commit.
        tags: Tags to put on the commit, "v1.0" for a release.
        variant: "fp16" or "bf16": upload weights of that precision, too.
        parent_commit: The commit that the branch must be at; None takes where it is when the push begins. If someone
            else pushes in between, nothing is overwritten.
        patience: How long failing calls are tried again.
        again: The command that a failure's sentence advises; None makes it of these options, without the token.

    Raises:
        HubError: the push failed, with what to do about it.
    """
    again = again or push_command(
        folder_or_pipeline,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        tags=tags,
        variant=variant,
        parent_commit=parent_commit,
    )
    token = token or get_token()
    errand = Errand(repo_id, "push", again, has_token=token is not None, revision=revision)
    if create_pr and revision not in (None, constants.DEFAULT_REVISION):
        raise HubError(f"A pull request is opened against main, got revision={revision!r}: leave one of them out.")
    with tempfile.TemporaryDirectory(prefix="ddpm_ext_push_") as staging, in_sentences(errand):
        validate_repo_id(repo_id)
        files = _files(folder_or_pipeline, Path(staging), variant)
        check_no_token(files, token)
        client = Client(token, patience)
        repo_id, user = client.open(repo_id, private, errand)
        errand = Errand(repo_id, "push", again, has_token=True, revision=revision, user=user)
        with in_sentences(errand):
            push = _commit(client, errand, files, Path(staging), create_pr, commit_message, parent_commit)
            for tag in tags:
                client.tag(repo_id, tag, push.commit)
    return push


def push_command(folder_or_pipeline: Any, repo_id: str, **options: Any) -> str:
    """The command, or for a pipeline in memory the call, that pushes with these options; those left out are not named.

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
        words += [f"--{FLAGS.get(name, name)}", *(str(word).lower() if word is False else str(word) for word in values)]
    return f"python scripts/push_to_hub.py {shlex.join(words)}"


def push_space(
    files: Files,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    patience: Patience | None = None,
) -> Push:
    """Upload the files of a Gradio page as a Space, in one commit and checked as in `push_to_hub`.

    Args:
        files: Name in the Space -> file on disk; with app.py, requirements.txt and README.md.
        repo_id: "user/space". Made if missing.
        private: As in `push_to_hub`, and the others.
        token: As there.
        patience: As there.

    Raises:
        HubError: the push failed, with what to do about it.
    """
    again, token = f"python scripts/demo.py --push_to_space {repo_id}", token or get_token()
    errand = Errand(repo_id, "push", again, has_token=token is not None)
    with tempfile.TemporaryDirectory(prefix="ddpm_ext_push_") as staging, in_sentences(errand):
        validate_repo_id(repo_id)
        check_no_token(files, token)
        client = Client(token, patience, "space")
        repo_id, user = client.open(repo_id, private, errand)
        errand = Errand(repo_id, "push", again, has_token=True, user=user)
        with in_sentences(errand):
            push = _commit(client, errand, files, Path(staging), False, None, None)
    return push._replace(url=f"{constants.ENDPOINT}/spaces/{repo_id}")


def open_repository(
    repo_id: str, *, private: bool | None = None, token: str | None = None, patience: Patience | None = None
) -> str:
    """Make a repository if it is missing and see that it may be written to: better before a training than after it.

    Args:
        repo_id: As in `push_to_hub`, and the others.
        private: As there.
        token: As there.
        patience: As there.

    Returns:
        Its full name, "user/model".

    Raises:
        HubError: there is no token, or it may not write there.
    """
    token = token or get_token()
    errand = Errand(repo_id, "push", "the same command", has_token=token is not None)
    with in_sentences(errand):
        validate_repo_id(repo_id)
        client = Client(token, patience)
        full, user = client.open(repo_id, private, errand)
        if full.split("/")[0] not in client.owners:  # a repository that exists is opened whoever owns it
            raise HubError(explain_403("it belongs to someone else", replace(errand, repo_id=full, user=user)))
    return full


def full_name(repo_id: str, token: str | None = None, patience: Patience | None = None) -> str:
    """Name of a repository with its owner, "user/model"; where none is given, it is the token's.

    Raises:
        HubError: there is no token, or the Hub does not take it.
    """
    token = token or get_token()
    errand = Errand(repo_id, "push", "the same command", has_token=token is not None)
    with in_sentences(errand):
        validate_repo_id(repo_id)
        name = patiently(Client(token, patience).api.whoami, patience)["name"]
    return repo_id if "/" in repo_id else f"{name}/{repo_id}"


def _files(folder_or_pipeline: Any, staging: Path, variant: str | None) -> Files:
    if isinstance(folder_or_pipeline, str | os.PathLike):
        return collect(folder_or_pipeline, staging, variant)
    folder = staging / "pipeline"
    folder_or_pipeline.save_pretrained(str(folder))
    return collect(folder, staging / "variant", variant)


def _commit(
    client: Client,
    errand: Errand,
    files: Files,
    staging: Path,
    create_pr: bool,
    message: str | None,
    parent: str | None,
) -> Push:
    """Bring the repository to hold the files, in one commit or none, and check that it does."""
    repo_id, branch = errand.repo_id, errand.revision or constants.DEFAULT_REVISION
    before = client.branch(repo_id, errand.revision)
    if parent is not None and not before.commit.startswith(parent):
        raise HubError(conflict(errand, f"{branch} is at {before.commit[:10]}, not at {parent[:10]}"))
    files = _with_card(client, repo_id, before, files, staging)
    changed = before.lacks(files)
    gone = stale(before.checksums, files, changed)
    if not changed and not gone:
        return Push(repo_id, before.commit, _url(repo_id, before.commit), False, None)
    requests = client.pull_requests(repo_id) if create_pr else set()
    for ref in sorted(requests):
        if not (now := client.state(repo_id, ref)).lacks(files):
            return Push(repo_id, now.commit, _url(repo_id, now.commit), False, _request_url(repo_id, ref))

    attempts = 0

    def attempt() -> Push:
        nonlocal attempts
        attempts += 1
        if attempts > 1:  # the commit may have been made, and its answer lost
            refs = client.pull_requests(repo_id) - requests if create_pr else {branch}
            if (found := _made(client, errand, files, before, refs)) is not None:
                return found
        info = client.api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, str(files[name])) for name in changed),
                *(CommitOperationDelete(name, is_folder=False) for name in gone),
            ],
            commit_message=message or f"Upload {repo_id.split('/')[-1]} with ddpm_ext {__version__}",
            revision=errand.revision,
            create_pr=create_pr,
            parent_commit=before.commit,
            repo_type=client.repo_type,
        )
        return Push(repo_id, info.oid, str(info.commit_url), True, info.pr_url)

    push = patiently(attempt, client.patience)
    if wrong := client.state(repo_id, push.commit).lacks(files):
        raise HubError(
            f"After the push {repo_id} holds other bytes than were sent, in {', '.join(wrong)}. {errand.repo_id} at "
            f"commit {push.commit[:10]} should not be used. The local files are as they were: {errand.again}"
        )
    return push


def _made(client: Client, errand: Errand, files: Files, before: State, refs: set[str]) -> Push | None:
    """The commit with these files that one of these refs has got since; None where none has moved.

    Raises:
        HubError: one has moved, and to other files: someone else pushed.
    """
    for ref in refs:
        now = client.state(errand.repo_id, ref)
        if now.commit == before.commit:
            continue
        if now.lacks(files):
            raise HubError(conflict(errand, f"{ref} is at {now.commit[:10]} now"))
        request = _request_url(errand.repo_id, ref) if ref.startswith("refs/pr/") else None
        return Push(errand.repo_id, now.commit, _url(errand.repo_id, now.commit), True, request)
    return None


def _with_card(client: Client, repo_id: str, before: State, files: Files, staging: Path) -> Files:
    """The files with a card: a minimal one where there is none, and not a rendered one over one written by hand."""
    card, there = files.get("README.md"), "README.md" in before.checksums
    if card is None:
        if there or client.repo_type != "model":
            return files
        path = staging / "README.md"
        path.write_text(minimal_card(repo_id, files), encoding="utf-8")
        return {**files, "README.md": path}
    if not there or RENDERED not in card.read_text(encoding="utf-8") or not before.lacks({"README.md": card}):
        return files
    if RENDERED in client.text(repo_id, "README.md", before.commit):
        return files
    logger.warning("The card of %s was written by hand and is kept; the rendered one is not pushed.", repo_id)
    return {name: path for name, path in files.items() if name != "README.md"}


def _request_url(repo_id: str, ref: str) -> str:
    return f"{constants.ENDPOINT}/{repo_id}/discussions/{ref.split('/')[-1]}"


def _url(repo_id: str, commit: str) -> str:
    return f"{constants.ENDPOINT}/{repo_id}/commit/{commit}"


class BackgroundPush:
    """Pushes beside a running training: `push` returns at once, `wait` ends with the newest state on the Hub.

    One push runs at a time. Of those that come in meanwhile only the newest is kept: each holds the whole model. A push
    that fails is logged and forgotten when a later one succeeds.

    Args:
        repo_id: As in `push_to_hub`.
        also: Further files of the folder that `prepare` reads; they are not pushed for that.
        prepare: Called in the background with the snapshot of the folder, before it is pushed.
        **options: Further options of `push_to_hub`.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        also: Sequence[str] = (),
        prepare: Callable[[Path], Any] = lambda snapshot: None,
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
            also = {name: folder / name for name in self.also if (folder / name).is_file()}
            stage(collect(folder, Path(snapshot.name)) | also, Path(snapshot.name))
        except BaseException:
            snapshot.cleanup()
            raise
        options = {**self.options, **options}
        told = {name: options[name] for name in options.keys() & PUSH_OPTIONS - {"token", "patience"}}
        options.setdefault("again", push_command(folder, self.repo_id, **told))
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
