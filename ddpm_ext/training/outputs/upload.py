"""Uploads of a run with --push_to_hub."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ...errors import HubError
from ...publishing.publisher import Publisher
from ...publishing.training_record import base_model
from ...run_dir import RunDir, RunError
from ..config import TrainConfig, recorded

if TYPE_CHECKING:
    from ..fine_tune import Origin

__all__ = ["finish_upload", "make_publisher"]


def make_publisher(config: TrainConfig, run: RunDir, origin: Origin | None) -> Publisher | None:
    """Return the uploads that --push_to_hub asks for, or None. A missing token is told here, before the training.

    Args:
        config: The options.
        run: The run folder.
        origin: What the run started from with --init_from, whose licence the uploads have.
    """
    if not config.push_to_hub:
        return None
    name = config.hub_model_id or run.path.name
    try:
        base = base_model({"config": recorded(config), "init_from": origin})
        return Publisher(run.path, name, token=config.hub_token, base=base, private=config.hub_private_repo or None)
    except HubError as error:
        raise RunError(str(error)) from error


def finish_upload(publisher: Publisher) -> int:
    """Make the last upload and wait for it.

    A run whose upload fails is finished all the same: the same command uploads it again.

    Returns:
        Exit code: 0, or 1 where it failed.
    """
    try:
        publisher.finish()
    except HubError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
