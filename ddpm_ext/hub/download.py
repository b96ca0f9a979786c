"""A pipeline of the Hub -> the local cache, its content checked against the Hub's checksums.

The client by itself compares sizes alone: a flipped bit in a file of the right size is cached and loads without a word.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_token, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id

from ..diffusion.words import INDEX
from ..errors import HubError
from ..run_dir import JsonRecord
from .checksums import has_checksum
from .client import Client, State
from .failures import is_connection_error, response_of, short
from .messages import Operation, hub_errors
from .pipeline_files import read_record
from .retry import RetryPolicy, is_transient, retried

__all__ = ["pull", "pull_config"]
logger = logging.getLogger(__name__)


def _is_offline() -> bool:
    """Return whether the Hub is not to be asked; huggingface_hub 0.x knows it as a constant only."""
    ask = getattr(constants, "is_offline_mode", None)
    return bool(constants.HF_HUB_OFFLINE if ask is None else ask())


def pull(
    download: Callable[..., Any],
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    retry: RetryPolicy | None = None,
    **options: Any,
) -> Path:
    """Return the folder in the local cache of a pipeline of the Hub, its content checked against the Hub's checksums.

    Args:
        download: Diffusers' `DiffusionPipeline.download`, which knows the files that a pipeline needs.
        repo_id: "user/model".
        revision: Branch, tag or commit; None for main.
        token: None takes HF_TOKEN or the one of `hf auth login`, False none.
        cache_dir: None takes HF_HUB_CACHE.
        retry: How often and how long failing calls are retried.
        **options: Further options of `download`, as variant, local_files_only, force_download.

    Returns:
        The folder in the cache. Where the Hub cannot be reached, it is the one of an earlier pull, checked likewise.

    Raises:
        HubError: the pull failed, with the cause and what to do about it.
    """
    options |= {"revision": revision, "token": token, "cache_dir": cache_dir}
    return _Pull(download, repo_id, options, retry).run()


def pull_config(
    repo_id: str,
    names: Sequence[str],
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    retry: RetryPolicy | None = None,
) -> JsonRecord:
    """Return the object in the first of these JSON files that a repository of the Hub holds.

    Args:
        repo_id: "user/model".
        names: Names of the files.
        token: None takes HF_TOKEN or the one of `hf auth login`, False none.
        cache_dir: None takes HF_HUB_CACHE.
        retry: How often and how long failing calls are retried.

    Raises:
        HubError: it holds none of them, or cannot be asked; says what to do about it.
    """
    has_token = token is not False and bool(token if isinstance(token, str) else get_token())
    with hub_errors(Operation(repo_id, "pull", "the same command", has_token=has_token)):
        validate_repo_id(repo_id)
        for name in names:
            cached = try_to_load_from_cache(repo_id, name, cache_dir=cache_dir)
            if isinstance(cached, str):
                return read_record(Path(cached))
        known = Client(token, retry).state(repo_id, None).checksums
        name = next((name for name in names if name in known), None)
        if name is None:
            raise HubError(f"{repo_id} holds neither {' nor '.join(names)}: it is no network of Diffusers.")
        path = retried(lambda: hf_hub_download(repo_id, name, token=token, cache_dir=cache_dir), retry)
        return read_record(Path(path))


class _Pull:
    """One pull: ask for the repository's state, download, compare with the checksums, once more where they differ."""

    def __init__(
        self, download: Callable[..., Any], repo_id: str, options: JsonRecord, retry: RetryPolicy | None
    ) -> None:
        self.download, self.repo_id, self.options, self.retry = download, repo_id, options, retry
        self.revision, self.variant, self.token = options["revision"], options.get("variant"), options["token"]
        self.command = (
            f'DDPMExtPipeline.from_pretrained("{repo_id}"'
            + (f', revision="{self.revision}"' if self.revision else "")
            + ")"
        )

    def run(self) -> Path:
        has_token = self.token is not False and bool(self.token if isinstance(self.token, str) else get_token())
        operation = Operation(self.repo_id, "pull", self.command, has_token=has_token, revision=self.revision)
        with hub_errors(operation):
            validate_repo_id(self.repo_id)
            state: State | None = None
            if not (self.options.get("local_files_only") or _is_offline()):
                state = self._state_or_cache()
                self.options["local_files_only"] = state is None
                if state is not None:
                    _check_pipeline(self.repo_id, state.checksums, self.variant)
            return self._checked(self._first(state), state)

    def _first(self, state: State | None) -> Path:
        try:
            return self._fetch()
        except (OSError, ValueError) as error:  # ValueError: a variant that is not there
            if state is None and response_of(error) is None and not is_connection_error(error):
                raise HubError(self._not_cached()) from error
            raise

    def _fetch(self) -> Path:
        return Path(retried(lambda: self.download(self.repo_id, **self.options), self.retry))

    def _checked(self, folder: Path, state: State | None) -> Path:
        """Return the folder once its content is right; a corrupt file of the Hub is downloaded a second time."""
        for is_last in (False, True):
            if state is not None and folder.name != state.commit:  # pushed to since it was asked
                state = Client(self.token, self.retry).state(self.repo_id, folder.name)
            known = state.checksums if state is not None else None
            wrong = _corrupted(folder, known)
            if wrong and (is_last or known is None):
                raise HubError(
                    f"{self.repo_id} is corrupt in {', '.join(wrong)}: its content is not the one of the Hub's checksum"
                    + (", also after a second download. A proxy or a disk may be at fault. " if known else ". ")
                    + f"Delete {folder.parent.parent}, then: {self.command}"
                )
            if not wrong:
                break
            logger.warning("%s came corrupt (%s): downloading it again.", self.repo_id, ", ".join(wrong))
            for name in wrong:
                _forget(folder / name)
            self.options["force_download"] = False
            folder = self._fetch()
        return folder

    def _state_or_cache(self) -> State | None:
        """Return the repository's state; None where the Hub is down or out of reach and an earlier pull is cached."""
        folder = f"models--{self.repo_id.replace('/', '--')}"
        cached = Path(self.options["cache_dir"] or constants.HF_HUB_CACHE) / folder / "snapshots"
        retry = self.retry or RetryPolicy()
        if cached.is_dir():  # then a Hub that is down is no reason to wait
            retry = RetryPolicy(tries=2, first_wait=retry.first_wait)
        try:
            return Client(self.token, retry).state(self.repo_id, self.revision)
        except Exception as error:
            if not cached.is_dir() or not is_transient(error):
                raise
            logger.warning(
                "%s cannot be asked (%s): %s is taken from the cache.", constants.ENDPOINT, short(error), self.repo_id
            )
            return None

    def _not_cached(self) -> str:
        at = f" at {self.revision}" if self.revision else ""
        at += f" with the variant {self.variant!r}" if self.variant else ""
        return (
            f"{self.repo_id}{at} is not in the cache in full, and the Hub was not asked "
            f"(local_files_only, HF_HUB_OFFLINE, or it cannot be reached). Once with the network: {self.command}"
        )


def _check_pipeline(repo_id: str, known: dict[str, str], variant: str | None) -> None:
    """Raise HubError where a repository lacks what was asked for, in place of what Diffusers would say."""
    if INDEX not in known:
        raise HubError(
            f"{repo_id} holds no {INDEX}: it is no Diffusers pipeline. A network alone loads with "
            f'UNet2DModel.from_pretrained("{repo_id}"); checkpoints of other codes need ddpm-ext convert.'
        )
    if variant is not None:
        weights = [name for name in known if name.endswith((".safetensors", ".bin"))]
        if not any(f".{variant}." in name or f".{variant}-" in name for name in weights):
            parts = (name.rsplit("/", 1)[-1].split("-0")[0].split(".") for name in weights)
            present = sorted({part[1] for part in parts if len(part) > 2})
            raise HubError(
                f"{repo_id} has no weights of the variant {variant!r}: "
                + (f"it has {', '.join(present)}. " if present else "it has the full ones only. ")
                + "Leave `variant` out, and give torch_dtype=torch.float16 for half precision."
            )


def _corrupted(folder: Path, known: dict[str, str] | None) -> list[str]:
    """Return the files of a cached snapshot whose content is not that of their checksum.

    Args:
        folder: The snapshot.
        known: Name -> checksum as the Hub gave them; None takes the cache's own, which names each blob by its checksum.
    """
    wrong = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        checksum = known.get(name) if known is not None else path.resolve().name
        is_checksum = checksum is not None and len(checksum) in (40, 64) and set(checksum) <= set("0123456789abcdef")
        if is_checksum and not has_checksum(path, str(checksum)):
            wrong.append(name)
    return wrong


def _forget(path: Path) -> None:
    """Remove a file of the cache and the blob that it points to, so that it is downloaded anew."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
