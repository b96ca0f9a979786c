"""A pipeline on disk and on the Hub: saved for stock Diffusers, loaded with every weight checked."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines import pipeline_utils

from ..diffusion.words import INDEX
from ..errors import UserError
from ..hub import download, upload
from ..hub.pipeline_files import check_weights
from .locate import find_pipeline
from .saving import replacing

__all__ = ["PortablePipeline", "check_loaded"]

_KNOWS_DTYPE = hasattr(pipeline_utils, "_resolve_dtype")  # older Diffusers knows the word torch_dtype only
HALF_VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}


class PortablePipeline(DiffusionPipeline):
    """What `DDPMExtPipeline` is as files, in a folder and in a repository."""

    unet: Any

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *args: Any,
        variant: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save in the layout that stock Diffusers loads; see `diffusers.DiffusionPipeline.save_pretrained`.

        Args:
            save_directory: The folder; made if missing.
            *args: Stock's further arguments.
            variant: "fp16" and "bf16" write weights that really are of that precision; any other word only names
                the files, as in stock.
            push_to_hub: Upload the folder, and nothing else that it holds, with `ddpm_ext.push_to_hub`.
            **kwargs: Stock's further options, and those of `ddpm_ext.push_to_hub`; `repo_id` is the folder's name.
        """
        if push_to_hub:
            names = upload.PUSH_OPTIONS & kwargs.keys()
            push = {name: kwargs.pop(name) for name in names}
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
            self.save_pretrained(save_directory, *args, variant=variant, **kwargs)
            upload.push_to_hub(save_directory, repo_id, variant=variant, **push)
            return
        unet = self.unet
        try:
            if variant in HALF_VARIANTS:
                self.unet = copy.deepcopy(unet)
                torch.nn.Module.to(self.unet, dtype=HALF_VARIANTS[variant])
            with replacing(Path(save_directory)) as folder:
                super().save_pretrained(str(folder), *args, variant=variant, **kwargs)
        finally:
            self.unet = unet

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any) -> Any:
        """Load a pipeline of a folder, a run or the Hub, every weight checked; see `diffusers.DiffusionPipeline`.

        Raises:
            UserError: there is no such folder, and the name is none of the Hub, which is not asked then.
            UserError: a weight that the network has is missing from its file, or has another shape; names it.
        """
        name = find_pipeline(pretrained_model_name_or_path or "")
        if os.path.isfile(os.path.join(name, INDEX)):
            check_weights(Path(name), kwargs.get("variant"), passed=kwargs.keys())
        if "dtype" in kwargs and not _KNOWS_DTYPE:  # it would be ignored, and float32 loaded
            kwargs["torch_dtype"] = kwargs.pop("dtype")
        pipeline: Any = super().from_pretrained(name, **kwargs)
        check_loaded(pipeline, name)
        return pipeline

    def push_to_hub(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, repo_id: str, commit_message: str | None = None, *, safe_serialization: bool = True, **options: Any
    ) -> upload.Push:
        """Upload in the portable layout; see `ddpm_ext.push_to_hub`, which takes the same options."""
        if not safe_serialization:
            raise UserError("Weights are pushed as safetensors only: leave safe_serialization=False out.")
        return upload.push_to_hub(self, repo_id, commit_message=commit_message, **options)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Return the cached folder of a Hub repository, its content checked; `from_pretrained` calls this."""
        if kwargs.pop("trust_remote_code", False):
            raise UserError("trust_remote_code runs code of the repository; no DDPM needs it, leave it out.")
        folder = download.pull(super().download, pretrained_model_name, **kwargs)
        if (folder / INDEX).is_file():
            check_weights(folder, kwargs.get("variant"), passed=kwargs.keys())
        return str(folder)


def check_loaded(pipeline: DiffusionPipeline, name: str) -> None:
    """Raise a UserError when a tensor of a loaded network was in none of its files."""
    for part, network in pipeline.components.items():
        if isinstance(network, torch.nn.Module):
            missing = [tensor for tensor, value in network.state_dict().items() if value.device.type == "meta"]
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise UserError(f"The weights of {part} in {name} lack the tensor {missing[0]!r}{more}.")
