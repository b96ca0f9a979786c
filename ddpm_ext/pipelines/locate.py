"""What a user calls a model -> the folder or the Hub name of its pipeline. Imports nothing heavy, asks no network."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..diffusion.words import INDEX
from ..errors import UserError

__all__ = ["DIGITS", "find_pipeline", "is_hub_name", "local_pipeline", "run_folder"]

DIGITS = str(Path(__file__).parent.parent / "models" / "digits")  # a calibrated pipeline that draws digits in few calls


def find_pipeline(model: str | os.PathLike[str]) -> str:
    """Return the folder of a pipeline, or its name on the Hub.

    Args:
        model: A run folder, the folder of a pipeline, or user/model. What looks like a path is never asked of the Hub.

    Raises:
        UserError: there is no such folder, or it holds no pipeline.
    """
    name = os.fspath(model)
    folder = local_pipeline(name)
    if folder is not None:
        return str(folder)
    if is_hub_name(name) and not _looks_local(name):
        return name
    raise UserError(
        f"There is no folder {name}, and a model of the Hub is named user/model. Give a run folder, the folder of a "
        "pipeline, or such a name."
    )


def local_pipeline(model: str | os.PathLike[str]) -> Path | None:
    """Return the folder of a pipeline that is on this machine: the one named, or pipeline/ in it; None if none is.

    Raises:
        UserError: something else than a pipeline is there.
    """
    path = Path(model).expanduser()
    for folder in (path, path / "pipeline"):
        if (folder / INDEX).is_file():
            return folder
    if not path.exists():
        return None
    if path.is_file():
        raise UserError(f"A pipeline is a folder with {INDEX}, and {path} is a file.{_nearby(path)}")
    if (path / "status.json").is_file() or (path / "checkpoints").is_dir():
        raise UserError(
            f"{path} is a run without a pipeline: {path / 'pipeline'} is written when the training ends. Train it to "
            "its end (the same command continues), or with --save_model_epochs."
        )
    raise UserError(f"A pipeline is a folder with {INDEX}, and {path} holds none.{_nearby(path)}")


def run_folder(model: str | os.PathLike[str]) -> Path | None:
    """Return the folder beside whose pipeline/ a run keeps its record; None for a pipeline by itself or of the Hub.

    Raises:
        UserError: something else than a pipeline is there.
    """
    folder = local_pipeline(model)
    return folder.parent if folder is not None and folder.absolute().name == "pipeline" else None


def is_hub_name(name: str) -> bool:
    """Whether a model of the Hub may be called so: one slash between two names, neither of them "." or ".."."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def _looks_local(name: str) -> bool:
    """Whether a name that the Hub might have, too, is meant as a path: in runs/, or in a folder that is there."""
    first = name.split("/")[0]
    return first == "runs" or Path(first).is_dir()


def _nearby(path: Path) -> str:
    """The pipeline that a path inside of one is part of, as a hint."""
    holder = next((parent for parent in list(path.parents)[:2] if (parent / INDEX).is_file()), None)
    return f" Give {holder}." if holder else " Give the folder that holds it, or a Hub name such as user/model."
