"""A run with its card -> the Hub: once, or now and then beside the training.

publisher = Publisher(run, "digits")      # before the training: a missing token is told here
publisher.push(update)                    # every so many updates; returns at once
publisher.finish()                        # the last push, awaited
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..errors import HubError, UserError
from ..hub.files import is_rendered
from ..hub.retry import RetryPolicy
from ..hub.upload import BackgroundPush, Push, PushOptions, full_name, open_repository, push_command, push_to_hub
from ..run_dir import read_json, write_atomically
from .licenses import License, as_license, license_in, license_of
from .model_card import SHOWN, write_card
from .training_record import BaseModel, base_model

__all__ = ["Publisher", "publish"]


def publish(
    run: str | os.PathLike[str],
    repo_id: str,
    *,
    license: str | License | None = None,
    token: str | None = None,
    **options: Any,
) -> Push:
    """Write the card of a run, unless one was written by hand, and push both.

    Args:
        run: A run folder, or the folder of a saved pipeline.
        repo_id: "user/model", or "model" for the token's owner.
        license: Licence of the weights, for a card that is rendered; None takes that of the last card, or of the model
            that the training started from.
        token: As in `push_to_hub`.
        **options: Further options of `push_to_hub`.

    Raises:
        HubError: the push failed, with what to do about it; or the weights were trained further or converted from
            others whose licence is not known, and none is given.
        UserError: a licence is given, and the card, which was written by hand, names another or none.
    """
    told = {name: options[name] for name in options.keys() & PushOptions.__annotations__.keys()}
    license = as_license(license)
    named = license.entries() if license is not None else {}
    options.setdefault("command", push_command(run, repo_id, **named, **told))
    card = Path(run) / "README.md"
    before = card.read_bytes() if Path(run).is_dir() and card.is_file() else None
    _check_license(card, license)
    if (Path(run) / "config.json").is_file() and (Path(run) / "pipeline").is_dir():
        repo_id = full_name(repo_id, token, options.get("retry"))
        base = base_model(read_json(Path(run) / "config.json"))
        license = license or _known_license(Path(run), base, token, options.get("retry"))
        write_card(Path(run), repo_id, license)
    elif before is not None and is_rendered(card):
        _license_conversion(card, license)
    elif before is None and license is not None and Path(run).is_dir():
        write_card(Path(run), full_name(repo_id, token, options.get("retry")), license)
    try:
        return push_to_hub(run, repo_id, token=token, **options)
    except (HubError, KeyboardInterrupt):  # the first says that the local files are as they were
        if before is not None:
            card.write_bytes(before)
        elif Path(run).is_dir():
            card.unlink(missing_ok=True)
        raise


def _check_license(card: Path, license: License | None) -> None:
    """Raise UserError where a licence is given that a card written by hand does not name: it is pushed as it is."""
    if license is None or not card.is_file() or is_rendered(card):
        return
    if license_in(card.read_text(encoding="utf-8"), "") != license:
        raise UserError(
            f"{card} was written by hand and is pushed as it is: write license: {license.license} into its front "
            "matter, or leave --license out."
        )


def _license_conversion(card: Path, license: License | None) -> None:
    """Write the licence given into the card of a converted checkpoint.

    Raises:
        HubError: none is given, and the card names none.
    """
    if license is not None:
        told = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        for name in ("license", "license_name", "license_link"):
            told.data.pop(name)
        for name, value in license.entries().items():
            told.data[name] = value
        write_atomically(card, str(told))
    elif license_of(card.parent) is None:
        raise HubError(
            f"{card.parent} was converted from a checkpoint whose licence is not known: look up under which one its "
            "weights are shared, and give it with --license."
        )


def _known_license(run: Path, base: BaseModel | None, token: str | None, retry: RetryPolicy | None) -> License | None:
    """Return the licence of a run's last card, or of what it started from; None where it started from nothing.

    Raises:
        HubError: it started from a model, and no card on the way there names a licence.
    """
    found = license_of(run)
    if found is not None or base is None:
        return found
    for source, is_on_hub in base.chain:
        there = is_on_hub or Path(source).expanduser().exists()
        if there and (found := license_of(source, token, retry)) is not None:
            return found
    raise HubError(
        f"{run} was fine-tuned from {', from '.join(base.names)}, whose card names no licence: look up under which one "
        "its weights are shared, and give it with --license (of a run that pushes while it trains: leave --push_to_hub "
        "out, and push it afterwards)."
    )


class Publisher:
    """The pushes of a training: now and then in the background, the last one awaited.

    Args:
        run: The run folder.
        repo_id: "user/model", or "model" for the token's owner.
        license: As in `publish`.
        token: As there.
        base: What the training starts from; None for random weights.
        **options: Further options of `push_to_hub`.

    Raises:
        HubError: there is no token, or it may not write to the repository, which is made if it is missing; or the
            licence of what the training started from is not known.
        UserError: as in `publish`.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        repo_id: str,
        *,
        license: str | License | None = None,
        token: str | None = None,
        base: BaseModel | None = None,
        **options: Any,
    ) -> None:
        self.run, self.license = Path(run), as_license(license)
        _check_license(self.run / "README.md", self.license)
        if self.license is None:  # before anything is made on the Hub
            self.license = _known_license(self.run, base, token, options.get("retry"))
        named, private = self.license.entries() if self.license else {}, options.get("private")
        self.repo_id = open_repository(repo_id, private=private, token=token, retry=options.get("retry"))
        options.setdefault("command", push_command(run, self.repo_id, private=private, **named))
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
