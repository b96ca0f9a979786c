"""A run with its card -> the Hub: once, or now and then beside the training.

publisher = Publisher(run, "digits")      # before the training: a missing token is told here
publisher.push(update)                    # every so many updates; returns at once
publisher.finish()                        # the last push, awaited
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..hub.retry import HubError
from ..hub.upload import BackgroundPush, Push, PushOptions, full_name, open_repository, push_command, push_to_hub
from .model_card import SHOWN, write_card


def publish(
    run: str | os.PathLike[str], repo_id: str, *, license: str | None = None, token: str | None = None, **options: Any
) -> Push:
    """Write the card of a run, unless one was written by hand, and push both.

    Args:
        run: A run folder, or the folder of a saved pipeline, whose README.md is pushed as it is.
        repo_id: "user/model", or "model" for the token's owner.
        license: Licence of the weights, for a card that is rendered; None takes that of the run's last card.
        token: As in `push_to_hub`.
        **options: Further options of `push_to_hub`.

    Raises:
        HubError: the push failed, with what to do about it.
    """
    told = {name: options[name] for name in options.keys() & PushOptions.__annotations__.keys()}
    options.setdefault("command", push_command(run, repo_id, license=license, **told))
    card = Path(run) / "README.md"
    before = card.read_bytes() if card.is_file() else None
    if (Path(run) / "config.json").is_file() and (Path(run) / "pipeline").is_dir():
        repo_id = full_name(repo_id, token, options.get("retry"))
        write_card(Path(run), repo_id, license)
    try:
        return push_to_hub(run, repo_id, token=token, **options)
    except HubError:  # which says that the local files are as they were
        card.unlink(missing_ok=True) if before is None else card.write_bytes(before)
        raise


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
