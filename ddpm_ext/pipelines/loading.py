"""What is looked at before a model is loaded: the parts of its folder, the options of its network."""

from __future__ import annotations

import os
from pathlib import Path

from ..diffusion.words import INDEX, Arguments
from ..errors import UserError
from ..hub.download import pull_config
from ..hub.pipeline_files import check_not_pointer, component_names, read_record
from .locate import find_pipeline

__all__ = ["check_parts", "load_network_config"]


def load_network_config(source: str | os.PathLike[str], cache_dir: str | None = None) -> Arguments:
    """Load the options of a UNet2DModel, without its weights.

    Args:
        source: A JSON file, the folder of a network, a pipeline or a run, or user/model on the Hub.
        cache_dir: Where downloads are kept; None for the usual place.

    Raises:
        UserError: there is no such file, or it holds no options.
        HubError: it cannot be had from the Hub.
    """
    path = Path(source)
    places = ("unet/config.json", "pipeline/unet/config.json", "config.json")
    for file in (path, *(path / place for place in places)):
        if file.is_file():
            return read_record(file)
    if path.is_dir():
        raise UserError(f"{path} holds neither {places[0]} nor {places[2]}: it is the folder of no network.")
    return pull_config(find_pipeline(source), (places[0], places[2]), cache_dir=cache_dir)


def check_parts(folder: Path) -> None:
    """Refuse a folder without unet or scheduler, or with pointers of Git LFS in place of weights.

    Raises:
        UserError: names the first that is missing.
    """
    names = component_names(folder / INDEX)
    missing = [part for part in ("unet", "scheduler") if part not in names]
    if missing:
        raise UserError(
            f"{folder / INDEX} names {', '.join(names) or 'no parts'}: a DDPM is a unet and a scheduler, and "
            f"{' and '.join(missing)} is not among them. Give another pipeline, or save this one anew."
        )
    unet, scheduler = (folder / part if (folder / part).is_dir() else folder for part in ("unet", "scheduler"))
    for file in (unet / "config.json", scheduler / "scheduler_config.json"):
        if not file.is_file():
            raise UserError(f"{file} is missing, and {folder / INDEX} needs it: save or download the pipeline anew.")
        read_record(file)
    weights = [path for path in unet.glob("diffusion_pytorch_model*") if path.suffix in (".safetensors", ".bin")]
    if not weights:
        raise UserError(f"{unet} holds no weights (diffusion_pytorch_model.safetensors): save or download it anew.")
    if all("." in path.stem for path in weights):
        variant = weights[0].stem.split(".", 1)[1].split("-")[0]
        raise UserError(
            f"{unet} holds weights of the variant {variant} alone: load it with "
            f'from_pretrained(..., variant="{variant}") and save it without a variant.'
        )
    for path in weights:
        check_not_pointer(path)
