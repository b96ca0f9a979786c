"""A pipeline of the Hub -> the local cache, its content checked against the Hub's checksums.

The client by itself compares sizes alone: a flipped bit in a file of the right size is cached and loads without a word.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_token
from huggingface_hub.utils import validate_repo_id

from .client import Client, State
from .files import INDEX, has_checksum
from .retry import (
    Errand,
    HubError,
    Patience,
    answer,
    bounds,
    brief,
    in_sentences,
    is_transient,
    is_transport,
    patiently,
)

logger = logging.getLogger(__name__)


def pull(
    download: Callable[..., Any],
    repo_id: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool | None = None,
    force_download: bool = False,
    patience: Patience | None = None,
    **options: Any,
) -> Path:
    """A pipeline of the Hub in the local cache, its content checked against the Hub's checksums.

    Args:
        download: Diffusers' `DiffusionPipeline.download`, which knows the files that a pipeline needs.
        repo_id: "user/model".
        revision: Branch, tag or commit; None for main.
        variant: "fp16": weights of that name.
        token: None takes HF_TOKEN or the one of `hf auth login`, False none.
        cache_dir: None takes HF_HUB_CACHE.
        local_files_only: Ask the cache alone.
        force_download: Download what is cached, too.
        patience: How long failing calls are tried again.
        **options: Further options of `download`.

    Returns:
        The folder in the cache. Where the Hub cannot be reached, it is the one of an earlier pull, checked likewise.

    Raises:
        HubError: the pull failed, with the cause and what to do about it.
    """
    has_token = token is not False and bool(token if isinstance(token, str) else get_token())
    call = f'DDPMExtPipeline.from_pretrained("{repo_id}"' + (f', revision="{revision}"' if revision else "") + ")"
    errand = Errand(repo_id, "pull", call, has_token=has_token, revision=revision)
    with in_sentences(errand):
        validate_repo_id(repo_id)
        state: State | None = None
        if not (local_files_only or constants.is_offline_mode()):
            state = _state_or_cache(repo_id, revision, token, cache_dir, patience)
            local_files_only = state is None
            if state is not None:
                _check_pipeline(repo_id, state.checksums, variant)

        def fetch(force: bool) -> Path:
            return Path(
                download(
                    repo_id,
                    revision=revision,
                    variant=variant,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    force_download=force,
                    **options,
                )
            )

        try:
            folder = patiently(lambda: fetch(force_download), patience)
        except (OSError, ValueError) as error:  # ValueError: a variant that is not there
            if state is None and answer(error) is None and not is_transport(error):
                raise HubError(_not_cached(repo_id, revision, variant, call)) from error
            raise
        for again in (True, False):
            if state is not None and folder.name != state.commit:  # pushed to since it was asked
                state = Client(token, patience).state(repo_id, folder.name)
            known = state.checksums if state is not None else None
            if not (wrong := corrupted(folder, known)):
                return folder
            if not again or known is None:
                raise HubError(
                    f"{repo_id} is corrupt in {', '.join(wrong)}: its content is not the one of the Hub's checksum"
                    + (", also after a second download. A proxy or a disk may be at fault. " if known else ". ")
                    + f"Delete {folder.parent.parent}, then: {call}"
                )
            logger.warning("%s came corrupt (%s): downloading it again.", repo_id, ", ".join(wrong))
            for name in wrong:
                _forget(folder / name)
            folder = patiently(lambda: fetch(False), patience)
    raise AssertionError("unreachable")


def _state_or_cache(
    repo_id: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    patience: Patience | None,
) -> State | None:
    """The repository's state; None where the Hub is down or out of reach and an earlier pull is in the cache."""
    cached = Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}" / "snapshots"
    if cached.is_dir():  # then a Hub that is down is no reason to wait
        patience = Patience(tries=2, first_wait=bounds(patience).first_wait)
    try:
        return Client(token, patience).state(repo_id, revision)
    except Exception as error:
        if not cached.is_dir() or not is_transient(error):
            raise
        logger.warning(
            "%s cannot be asked (%s): %s is taken from the cache.", constants.ENDPOINT, brief(error), repo_id
        )
        return None


def _check_pipeline(repo_id: str, known: dict[str, str], variant: str | None) -> None:
    """Raise HubError where a repository lacks what was asked for, in place of what Diffusers would say."""
    if INDEX not in known:
        raise HubError(
            f"{repo_id} holds no {INDEX}: it is no Diffusers pipeline. A network alone loads with "
            f'UNet2DModel.from_pretrained("{repo_id}"); checkpoints of other codes need scripts/convert.py.'
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


def _not_cached(repo_id: str, revision: str | None, variant: str | None, call: str) -> str:
    what = (f" at {revision}" if revision else "") + (f" with the variant {variant!r}" if variant else "")
    return (
        f"{repo_id}{what} is not in the cache in full, and the Hub was not asked "
        f"(local_files_only, HF_HUB_OFFLINE, or it cannot be reached). Once with the network: {call}"
    )


def corrupted(folder: Path, known: dict[str, str] | None) -> list[str]:
    """Files of a cached snapshot whose content is not that of their checksum.

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
