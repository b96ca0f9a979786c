"""A run with its card -> the Hub: once, or now and then beside the training.

publisher = Publisher(run, "digits")      # before the training: a missing token is told here
publisher.push(update)                    # every so many updates; returns at once
publisher.finish()                        # the last push, awaited
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from ..errors import HubError
from ..hub.retry import RetryPolicy
from ..hub.upload import BackgroundPush, Push, PushOptions, full_name, open_repository, push_command, push_to_hub
from ..run_dir import read_json
from .model_card import SHOWN, license_of, write_card
from .training_record import base_model

__all__ = ["Publisher", "publish"]
logger = logging.getLogger(__name__)


def publish(
    run: str | os.PathLike[str], repo_id: str, *, license: str | None = None, token: str | None = None, **options: Any
) -> Push:
    """Write the card of a run, unless one was written by hand, and push both.

    Args:
        run: A run folder, or the folder of a saved pipeline, whose README.md is pushed as it is.
        repo_id: "user/model", or "model" for the token's owner.
        license: Licence of the weights, for a card that is rendered; None takes that of the run's last card, or of the
            model that the training started from.
        token: As in `push_to_hub`.
        **options: Further options of `push_to_hub`.

    Raises:
        HubError: the push failed, with what to do about it; or the training started from a model whose licence is not
            known, and none is given.
    """
    told = {name: options[name] for name in options.keys() & PushOptions.__annotations__.keys()}
    options.setdefault("command", push_command(run, repo_id, license=license, **told))
    card = Path(run) / "README.md"
    before = card.read_bytes() if Path(run).is_dir() and card.is_file() else None
    if (Path(run) / "config.json").is_file() and (Path(run) / "pipeline").is_dir():
        repo_id = full_name(repo_id, token, options.get("retry"))
        license = license or license_of(Path(run)) or _inherited_license(Path(run), token, options.get("retry"))
        write_card(Path(run), repo_id, license)
    try:
        return push_to_hub(run, repo_id, token=token, **options)
    except HubError:  # which says that the local files are as they were
        if before is not None:
            card.write_bytes(before)
        elif Path(run).is_dir():
            card.unlink(missing_ok=True)
        raise


def _inherited_license(run: Path, token: str | None, retry: RetryPolicy | None) -> str | None:
    """Return the licence of the model that a run started from, None where it started from none.

    Raises:
        HubError: it names none.
    """
    base = base_model(read_json(run / "config.json"))
    if base is None:
        return None
    found = license_of(base.source, token, retry) if base.is_on_hub or Path(base.source).expanduser().exists() else None
    if found is None:
        raise HubError(
            f"{run} was fine-tuned from {base.name}, whose card names no licence: look up under which one its weights "
            "are shared, and give it with --license."
        )
    return found


class Publisher:
    """The pushes of a training: now and then in the background, the last one awaited.

    Args:
        run: The run folder.
        repo_id: "user/model", or "model" for the token's owner.
        license: As in `publish`.
        token: As there.
        **options: Further options of `push_to_hub`.

    Raises:
        HubError: there is no token, or it may not write to the repository, which is made if it is missing.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        repo_id: str,
        *,
        license: str | None = None,
        token: str | None = None,
        **options: Any,
    ) -> None:
        self.run, self.license = Path(run), license
        private = options.get("private")
        self.repo_id = open_repository(repo_id, private=private, token=token, retry=options.get("retry"))
        options.setdefault("command", push_command(run, self.repo_id, private=private, license=license))
        if license is None and (self.run / "config.json").is_file():
            try:
                self.license = license_of(self.run) or _inherited_license(self.run, token, options.get("retry"))
            except (HubError, OSError) as error:  # the training goes on; its last card can still be given one
                logger.warning("The card will name no licence: %s", error)
        self._background = BackgroundPush(self.repo_id, also=SHOWN, prepare=self._card, token=token, **options)

    def push(self, update: int) -> None:
        """Upload the run as it is now, in the background; a push that fails is logged, and training goes on.

        Args:
            update: Updates done, for the commit's message.
        """
        self._background.push(self.run, commit_message=f"Update {update}")

    def finish(self) -> Push | None:
        """Upload the run as it is now and wait for it.

        Raises:
            HubError: this last push failed; the run folder is as it was.
        """
        self._card(self.run)
        self._background.push(self.run, commit_message="The finished run")
        return self._background.wait()

    def _card(self, folder: Path) -> None:
        write_card(folder, self.repo_id, self.license)
