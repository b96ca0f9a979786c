"""Options of an evaluation and of a calibration, every word checked before anything is computed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from ..diffusion.words import SPACINGS, Cdf, DecoderVariance, ReferenceKind, Trajectory, VarianceType
from ..errors import UserError, check_word
from ..options import check_options, option
from ..pipelines.config import GuidanceConfig
from ..pipelines.locate import run_folder
from .words import Metric, Quantization, Sampler, Score

__all__ = ["CalibrateConfig", "EvalConfig", "MeasureConfig", "recorded", "split_words"]

_OF_BOUND = ("bpd", "rate_distortion")


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What an evaluation and a calibration have in common: model, images, samples, features, files."""

    model: str = option("runs/digits/pipeline", "Run folder, or folder or Hub name of a pipeline.")
    output_dir: str | None = option(None, "Folder of the results; none: in the model's run folder, or evals/<name>.")

    dataset_name: str | None = option(
        None, "digits (built in), a Hub name, or a local folder; none: what the run was trained on."
    )
    dataset_config_name: str | None = option(None, "Configuration of a Hub set.")
    data_dir: str | None = option(None, "Folder of images, in place of dataset_name.")
    image_column: str | None = option(None, "Column of the images; none: as in training, or the only one.")
    label_column: str | None = option(None, "Column of the classes; none: as in training, or the only one.")
    center_crop: bool | None = option(
        None, "Crop in the middle, or each image at a place of its own; none: as in training, or in the middle."
    )
    max_unreadable: float | None = option(
        None, "Share of unreadable images above which a split is refused; none: 0.01, or what training accepted."
    )
    max_reference_images: int | None = option(None, "Only the first so many of the reference; none: all.", at_least=1)
    max_bpd_images: int | None = option(None, "Only the first so many images for bits/dim; none: all.", at_least=1)

    seed: int = option(0, "Image i is drawn from seed + i.", below=2**62)
    batch_size: int = option(250, "Generated images of one process at a time.", at_least=1)
    extractor: str = option("inception", "inception, dinov2, clip, pixels, or a transformers vision model.")
    extractor_size: int | None = option(
        None, "Input side of a transformers model; none: what it says itself.", at_least=1
    )
    inception_weights: str | None = option(None, "File of Inception's weights; none: downloaded.")
    quantization: Quantization = option(
        "uint8", "How generated pixels reach the extractor: rounded to 8 bits as a file would, or as floats."
    )
    reference_cache: str | None = option(None, "Folder of reference features; none: beside the cache of datasets.")
    averaged: bool | None = option(None, "Whether the weights are averages; none: what the run's config.json says.")

    hub_model_id: str | None = option(None, "Repository to upload to; none: the run folder's name.")
    hub_private_repo: bool | None = option(None, "Make a new repository private.")
    hub_token: str | None = option(None, "Token for the Hub; none: the stored one. Never written to a file.")
    cpu: bool = option(False, "Use the CPU even where there is an accelerator.")

    def __post_init__(self) -> None:
        check_options(self)
        if self.dataset_name is not None and self.data_dir is not None:
            raise UserError(f"Give dataset_name or data_dir, got both: {self.dataset_name!r} and {self.data_dir!r}.")

    @property
    def run_folder(self) -> Path:
        """Where results go that no option sends elsewhere."""
        return run_folder(self.model) or Path("evals") / Path(self.model).name


@dataclass(frozen=True, kw_only=True)
class EvalConfig(GuidanceConfig, MeasureConfig):
    """Options of `ddpm-ext evaluate`. Lists are written with commas: --metrics bpd,fid."""

    metrics: str = option(
        "bpd,fid",
        "Of bpd (bits/dim), rate_distortion, fid (Frechet), fid_per_class, kid, cmmd, is (Inception score), prdc.",
    )
    reference_split: str | None = option(None, "Split that generated images are compared with; none: as in training.")
    bpd_split: str = option("test", "Split whose bits/dim are measured.")

    sampler: str = option("ddpm", f"Of {', '.join(get_args(Sampler))}.")
    variance_type: str | None = option(None, "Reverse variances of ddpm and of bits/dim; none: the scheduler's own.")
    num_inference_steps: str = option("1000", "Denoising steps; several give a table of quality against steps.")
    few_steps: bool = option(
        True, "Beside fid at several numbers of at most 20 steps, also that of stock's solvers and of a fitted one."
    )
    timestep_spacing: str | None = option(
        None, "leading, trailing or linspace; none: the scheduler's own, or its trajectory."
    )
    num_samples: int = option(50_000, "Generated images of each score.", at_least=1)

    bpd_num_inference_steps: int | None = option(
        None, "Steps of the chain that bits/dim judges; none: all T.", at_least=1
    )
    num_timesteps_sampled: int | None = option(
        None, "Estimate bits/dim from so many steps per image; none: all.", at_least=1
    )
    decoder_variance: DecoderVariance = option("base", "Variance of L_0 in a shorter chain.")
    cdf: Cdf = option("tanh", "Normal distribution function of L_0: tanh as published, or exact.")
    kid_subsets: int = option(100, "Subsets of KID.", at_least=1)
    kid_subset_size: int = option(1000, "Images of each subset.", at_least=1)

    plots: bool = option(False, "Draw rate-distortion, Figures 6 to 8 of the paper and nearest training images.")
    push_to_hub: bool = option(False, "Upload the run with its card when it is measured.")

    def __post_init__(self) -> None:
        super().__post_init__()
        lists = (("metrics", Metric), ("sampler", Sampler), ("variance_type", VarianceType))
        for name, words in lists:
            for word in split_words(getattr(self, name)):
                check_word(name, word, get_args(words))
        if self.timestep_spacing is not None:
            check_word("timestep_spacing", self.timestep_spacing, SPACINGS)
        _check_evaluation(self)

    @property
    def of_bound(self) -> list[str]:
        """The metrics asked for that judge real images."""
        return [word for word in split_words(self.metrics) if word in _OF_BOUND]

    @property
    def of_samples(self) -> list[str]:
        """The metrics asked for that judge generated images."""
        return [word for word in split_words(self.metrics) if word not in _OF_BOUND]

    @property
    def steps(self) -> list[int]:
        """Numbers of denoising steps, as asked for."""
        return _numbers("num_inference_steps", self.num_inference_steps)

    @property
    def variances(self) -> list[str | None]:
        """Variances asked for; [None] for the scheduler's own."""
        return list(split_words(self.variance_type)) or [None]

    @property
    def folder(self) -> Path:
        """Where eval.json goes."""
        return self.run_folder if self.output_dir is None else Path(self.output_dir)

    @property
    def least_images(self) -> dict[str, int]:
        """The number of images that each metric of samples needs on either side."""
        needs = {"kid": self.kid_subset_size, "is": 20, "prdc": 6}
        return {metric: needs.get(metric, 2) for metric in self.of_samples}


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(GuidanceConfig, MeasureConfig):
    """Options of `ddpm-ext calibrate`. Lists are written with commas: --num_inference_steps 10,50."""

    split: str | None = option(
        None, "Split on which errors are measured and with which samples are compared; none: as in training."
    )
    test_split: str = option("test", "Split whose bits/dim are reported.")
    num_images: int = option(1024, "Images of the errors, every step of each.", at_least=1)
    num_inference_steps: str = option(
        "10,25,50,100", "Numbers of steps whose trajectories are stored and judged; none: measure no errors."
    )
    trajectory: Trajectory = option(
        "even", "Trajectory on which the calibrated scheduler draws images; bits/dim are reported on both."
    )

    solver_steps: str | None = option(
        None, "Numbers of network calls to fit solvers to, like 3,4,5,6,8,10; needs no data. None: no solver."
    )
    solver_reference: ReferenceKind | None = option(
        None, "What solvers are fitted to: clipped, clipped_raw or unclipped; none: the best by fid, or clipped."
    )
    reference_steps: str = option(
        "20,30,50,100,200", "Network calls of the references; the best by fid is fitted to, or the longest."
    )
    solver_order: int = option(3, "Steps whose estimates one jump of a solver uses.", at_least=1)
    num_noises: int = option(256, "Noises to which solvers are fitted.", at_least=1)
    num_held_out: int = option(128, "Further noises by which their steps are chosen.", at_least=1)

    metrics: str = option("bpd,fid", "Scores before and after, of bpd (bits/dim) and fid (Frechet); none: no scores.")
    fid_num_inference_steps: str | None = option(None, "Steps of the Frechet distances; none: num_inference_steps.")
    num_samples: int = option(10_000, "Generated images of each Frechet distance.", at_least=1)
    num_seeds: int = option(1, "Sets of samples of each Frechet distance; several give its spread.", at_least=1)
    full_chain: bool = option(False, "Also the Frechet distance of fixed_small with all T steps.")
    plots: bool = option(True, "Draw quality against steps, where matplotlib is installed.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for word in self.scores:
            check_word("metrics", word, get_args(Score))
        if not self.steps and not self.solver_steps:
            raise UserError("There is nothing to calibrate: give num_inference_steps, solver_steps, or both.")
        if not self.steps and "bpd" in self.scores:
            raise UserError("bpd is of num_inference_steps, and these are none: leave it out of metrics.")
        _refuse_bound_of_guided(self, [word for word in self.scores if word in _OF_BOUND])
        for name in ("num_images", *(["num_samples"] if "fid" in self.scores else [])):
            if getattr(self, name) < 2:
                raise UserError(f"{name} must be at least 2, got {getattr(self, name)}.")
        _ = self.steps, self.fid_steps, self.fitted_steps, self.calls_of_references

    @property
    def scores(self) -> list[str]:
        """The scores asked for."""
        return [] if self.metrics == "none" else split_words(self.metrics)

    @property
    def steps(self) -> list[int]:
        """Numbers of steps, as asked for; [] where no errors are measured."""
        none = self.num_inference_steps == "none"
        return [] if none else _numbers("num_inference_steps", self.num_inference_steps)

    @property
    def fitted_steps(self) -> list[int]:
        """Numbers of calls of the solvers."""
        return [] if self.solver_steps in (None, "none") else _numbers("solver_steps", self.solver_steps)

    @property
    def calls_of_references(self) -> list[int]:
        """Network calls of the references that solvers may be fitted to."""
        return _numbers("reference_steps", self.reference_steps)

    @property
    def fid_steps(self) -> list[int]:
        """Numbers of steps of the Fréchet distances."""
        own = self.fid_num_inference_steps
        return self.steps if own is None else _numbers("fid_num_inference_steps", own)

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return self.run_folder / "calibrated" if self.output_dir is None else Path(self.output_dir)


def split_words(text: str | None) -> list[str]:
    """Return the words between commas, each once."""
    return list(dict.fromkeys(word.strip() for word in (text or "").split(",") if word.strip()))


def recorded(config: MeasureConfig) -> dict[str, object]:
    """Return the options as they are written to files: all but the token."""
    return {name: value for name, value in asdict(config).items() if name != "hub_token"}


def _numbers(name: str, text: str) -> list[int]:
    """Return the whole numbers between commas, each once."""
    words = split_words(text)
    if not words or not all(word.isdecimal() and int(word) >= 1 for word in words):
        raise UserError(f"{name} must be whole numbers like 10,50,1000, got {text!r}.")
    return list(dict.fromkeys(map(int, words)))


def _refuse_bound_of_guided(config: GuidanceConfig, words: list[str]) -> None:
    if config.guidance is not None and words:
        raise UserError(
            f"{' and '.join(words)} of a guided chain are not measured: guidance draws from no distribution whose "
            "likelihood could be bounded, since (1 + w) ε̂(x_t, class) - w ε̂(x_t) is the noise of none. Leave "
            "guidance_scale out, or measure samples alone, as --metrics fid does."
        )


def _check_evaluation(config: EvalConfig) -> None:
    """Raise a UserError for options that cannot give the scores asked for."""
    if not split_words(config.metrics):
        raise UserError(f"metrics must name at least one of {', '.join(get_args(Metric))}.")
    _ = config.steps
    if config.variance_type is not None and not config.of_bound and "ddpm" not in split_words(config.sampler):
        raise UserError(
            f'variance_type is an option of the sampler "ddpm" and of bits/dim, and neither is asked for: leave '
            f"{config.variance_type!r} out, or add the sampler ddpm."
        )
    _refuse_bound_of_guided(config, config.of_bound)
    if "rate_distortion" in config.of_bound and config.num_timesteps_sampled is not None:
        raise UserError("rate_distortion needs every step: leave num_timesteps_sampled out.")
    for metric, least in config.least_images.items():
        if config.num_samples < least:
            raise UserError(
                f"{metric} needs at least {least} generated images, got num_samples = {config.num_samples}."
            )
    if "cmmd" in config.of_samples and config.extractor != "clip":
        raise UserError(f'cmmd is defined on the embeddings of the extractor "clip", got {config.extractor!r}.')
    if "is" in config.of_samples and config.extractor in ("pixels", "dinov2", "clip"):
        raise UserError(f'is needs a classifier as extractor, and "{config.extractor}" is none.')
