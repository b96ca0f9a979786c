"""Denoising diffusion probabilistic models (Ho et al. 2020) for Diffusers, complete and exact.

The names below are what users need; each is loaded when it is first used.
"""

import sys
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .conversion.convert import convert
    from .data.dataset import load_images
    from .diffusion.textbook import DenoiseDiffusion
    from .errors import UserError
    from .evaluation.bound.bits_per_dim import BitsPerDim, RateDistortion, bits_per_dim, rate_distortion
    from .evaluation.calibrate import calibrate
    from .evaluation.config import CalibrateConfig, EvalConfig
    from .evaluation.evaluate import evaluate
    from .hub.upload import push_to_hub
    from .models.unet import build_unet
    from .pipelines.ddpm import DDPMExtPipeline
    from .pipelines.locate import DIGITS
    from .schedulers.ddpm import DDPMExtScheduler
    from .schedulers.solver import DDPMExtSolverScheduler
    from .training.config import TrainConfig
    from .training.presets import PRESETS
    from .training.run import train

__all__ = [
    "DIGITS",
    "PRESETS",
    "BitsPerDim",
    "CalibrateConfig",
    "DDPMExtPipeline",
    "DDPMExtScheduler",
    "DDPMExtSolverScheduler",
    "DenoiseDiffusion",
    "EvalConfig",
    "RateDistortion",
    "TrainConfig",
    "UserError",
    "__version__",
    "bits_per_dim",
    "build_unet",
    "calibrate",
    "convert",
    "evaluate",
    "load_images",
    "push_to_hub",
    "rate_distortion",
    "train",
]

_HOMES = {
    "conversion.convert": "convert",
    "data.dataset": "load_images",
    "diffusion.textbook": "DenoiseDiffusion",
    "errors": "UserError",
    "evaluation.bound.bits_per_dim": "BitsPerDim RateDistortion bits_per_dim rate_distortion",
    "evaluation.calibrate": "calibrate",
    "evaluation.config": "CalibrateConfig EvalConfig",
    "evaluation.evaluate": "evaluate",
    "hub.upload": "push_to_hub",
    "models.unet": "build_unet",
    "pipelines.ddpm": "DDPMExtPipeline",
    "pipelines.locate": "DIGITS",
    "schedulers.ddpm": "DDPMExtScheduler",
    "schedulers.solver": "DDPMExtSolverScheduler",
    "training.config": "TrainConfig",
    "training.presets": "PRESETS",
    "training.run": "train",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """Load a name from its module when it is first used (PEP 562), so that importing the package costs nothing."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    """Return the names that there are, loaded or not."""
    return sorted({*globals(), *_HOME_OF})


def _refuse_modules_as_commands() -> None:
    """`python -m ddpm_ext.train` would do nothing and exit 0, or say that there is no such module."""
    module = next((after for word, after in pairwise(sys.orig_argv) if word == "-m"), "")
    if sys.argv[:1] == ["-m"] and module.startswith("ddpm_ext.") and module != "ddpm_ext.__main__":
        name = module.rsplit(".", 1)[1]
        sys.exit(f"error: {module} is no command. The commands are `python -m ddpm_ext {name} …` and so on: --help.")


_refuse_modules_as_commands()
