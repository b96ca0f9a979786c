"""Options of an evaluation and of a calibration, every word checked before anything is computed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..diffusion.words import SPACINGS, Cdf, DecoderVariance, Trajectory, VarianceType, check_word
from ..options import option
from ..pipelines.locate import run_folder
from .words import HandOff, Metric, Sampler, Score

OF_BOUND = ("bpd", "rate_distortion")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Options of scripts/evaluate.py. Lists are written with commas: --metrics bpd,fid."""

    model: str = option("runs/digits/pipeline", "Folder or Hub name of a pipeline.")
    metrics: str = option(
        "bpd,fid", "Of bpd (bits/dim), rate_distortion, fid (Frechet), kid, cmmd, is (Inception score), prdc."
    )
    output_dir: str | None = option(None, "Folder of eval.json; none: the model's run folder, or evals/<name>.")
    dataset_name: str | None = option(None, "digits (built in), a Hub name, or a local folder.")
    dataset_config_name: str | None = option(None, "Configuration of a Hub set.")
    data_dir: str | None = option(None, "Folder of images, in place of dataset_name.")
    image_column: str | None = option(None, "Column of the images; none: the only one.")
    label_column: str | None = option(None, "Column of the classes, for a class-conditional model; none: the only one.")
    reference_split: str = option("train", "Split that generated images are compared with.")
    bpd_split: str = option("test", "Split whose bits/dim are measured.")
    max_reference_images: int | None = option(None, "Only the first so many of the reference; none: all.")
    max_bpd_images: int | None = option(None, "Only the first so many for bits/dim; none: all.")

    sampler: str = option("ddpm", "Of ddpm, ddim, dpm++, dpm++-plain, dpm++-lu, dpm++3, unipc, unipc-plain.")
    variance_type: str | None = option(None, "Reverse variances of ddpm and of bits/dim; none: the scheduler's own.")
    num_inference_steps: str = option("1000", "Denoising steps; several give a table of quality against steps.")
    timestep_spacing: str | None = option(
        None, "leading, trailing or linspace; none: the scheduler's own, or its trajectory."
    )
    num_samples: int = option(50_000, "Generated images of each score.")
    batch_size: int = option(250, "Images of one process at a time.")
    seed: int = option(0, "Image i is drawn from seed + i.")

    bpd_num_inference_steps: int | None = option(None, "Steps of the chain that bits/dim judges; none: all T.")
    num_timesteps_sampled: int | None = option(None, "Estimate bits/dim from so many steps per image; none: all.")
    decoder_variance: DecoderVariance = option("base", "Variance of L_0 in a shorter chain.")
    cdf: Cdf = option("tanh", "Normal distribution function of L_0: tanh as published, or exact.")

    extractor: str = option("inception", "inception, dinov2, clip, pixels, or a transformers vision model.")
    extractor_size: int | None = option(None, "Input side of a transformers model; none: what it says itself.")
    inception_weights: str | None = option(None, "File of Inception's weights; none: downloaded.")
    hand_off: HandOff = option("uint8", "How generated pixels reach the extractor: rounded to 8 bits, or as floats.")
    kid_subsets: int = option(100, "Subsets of KID.")
    kid_subset_size: int = option(1000, "Images of each subset.")
    reference_cache: str | None = option(None, "Folder of reference features; none: beside the cache of datasets.")

    plots: bool = option(False, "Draw rate-distortion, Figures 6 to 8 of the paper and nearest training images.")
    averaged: bool | None = option(None, "Whether the weights are averages; none: what the run's config.json says.")
    push_to_hub: bool = option(False, "Upload the run with its card when it is measured.")
    hub_model_id: str | None = option(None, "Repository to upload to; none: the run folder's name.")
    hub_token: str | None = option(None, "Token for the Hub; none: the stored one. Never written to a file.")
    hub_private_repo: bool = option(False, "Make the repository private.")
    cpu: bool = option(False, "Use the CPU even where there is an accelerator.")

    def __post_init__(self) -> None:
        hints = get_type_hints(EvalConfig)
        for name in ("decoder_variance", "cdf", "hand_off"):
            check_word(name, getattr(self, name), get_args(hints[name]))
        lists = (
            ("metrics", get_args(Metric)),
            ("sampler", get_args(Sampler)),
            ("variance_type", get_args(VarianceType)),
        )
        for name, words in lists:
            for word in words_of(getattr(self, name)):
                check_word(name, word, words)
        if self.timestep_spacing is not None:
            check_word("timestep_spacing", self.timestep_spacing, SPACINGS)
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is int and field.name != "seed" and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}.")
        if not words_of(self.metrics):
            raise ValueError(f"metrics must name at least one of {', '.join(get_args(Metric))}.")
        check_numbers(self)

    @property
    def of_bound(self) -> list[str]:
        """The metrics asked for that judge real images."""
        return [word for word in words_of(self.metrics) if word in OF_BOUND]

    @property
    def of_samples(self) -> list[str]:
        """The metrics asked for that judge generated images."""
        return [word for word in words_of(self.metrics) if word not in OF_BOUND]

    @property
    def steps(self) -> list[int]:
        """Numbers of denoising steps, as asked for."""
        return numbers_of(self.num_inference_steps)

    @property
    def variances(self) -> list[str | None]:
        """Variances asked for; [None] for the scheduler's own."""
        return list(words_of(self.variance_type)) or [None]

    @property
    def folder(self) -> Path:
        """Where eval.json goes."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        return run_folder(self.model) or Path("evals") / Path(self.model).name


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """Options of scripts/calibrate.py. Lists are written with commas: --num_inference_steps 10,50."""

    model: str = option("runs/digits/pipeline", "Folder or Hub name of a pipeline.")
    output_dir: str | None = option(None, "Folder of the result; none: calibrated/ in the run folder.")
    dataset_name: str | None = option(None, "digits (built in), a Hub name, or a local folder.")
    dataset_config_name: str | None = option(None, "Configuration of a Hub set.")
    data_dir: str | None = option(None, "Folder of images, in place of dataset_name.")
    image_column: str | None = option(None, "Column of the images; none: the only one.")
    label_column: str | None = option(None, "Column of the classes, for a class-conditional model; none: the only one.")
    split: str = option("train", "Split on which errors are measured and with which samples are compared.")
    test_split: str = option("test", "Split whose bits/dim are reported.")
    num_images: int = option(1024, "Images of the errors, every step of each.")
    num_inference_steps: str = option("10,25,50,100", "Numbers of steps whose trajectories are stored and judged.")
    trajectory: Trajectory = option("optimal", "Trajectory that the calibrated scheduler takes by default.")
    seed: int = option(0, "Image i draws from seed + i.")

    metrics: str = option("bpd,fid", "Scores before and after, of bpd (bits/dim) and fid (Frechet); none: no scores.")
    max_bpd_images: int | None = option(None, "Only the first so many test images; none: all.")
    fid_num_inference_steps: str | None = option(None, "Steps of the Frechet distances; none: num_inference_steps.")
    num_samples: int = option(10_000, "Generated images of each Frechet distance.")
    num_seeds: int = option(1, "Sets of samples of each Frechet distance; several give its spread.")
    full_chain: bool = option(False, "Also the Frechet distance of fixed_small with all T steps.")
    batch_size: int = option(250, "Generated images of one process at a time.")
    extractor: str = option("inception", "inception, dinov2, clip, pixels, or a transformers vision model.")
    extractor_size: int | None = option(None, "Input side of a transformers model; none: what it says itself.")
    inception_weights: str | None = option(None, "File of Inception's weights; none: downloaded.")
    hand_off: HandOff = option("uint8", "How generated pixels reach the extractor: rounded to 8 bits, or as floats.")
    max_reference_images: int | None = option(None, "Only the first so many of the reference; none: all.")
    reference_cache: str | None = option(None, "Folder of reference features; none: beside the cache of datasets.")
    plots: bool = option(True, "Draw quality against steps; needs matplotlib.")

    hub_model_id: str | None = option(None, "Also push the calibrated pipeline to this repository.")
    hub_private_repo: bool | None = option(None, "Make a new repository private.")
    hub_token: str | None = option(None, "Token for the Hub; none: the stored one. Never written to a file.")
    cpu: bool = option(False, "Use the CPU even where there is an accelerator.")

    def __post_init__(self) -> None:
        check_word("trajectory", self.trajectory, get_args(Trajectory))
        for word in self.scores:
            check_word("metrics", word, get_args(Score))
        if self.num_images < 2 or self.num_seeds < 1:
            raise ValueError(
                f"Standard errors need num_images of at least 2 and scores num_seeds of at least 1, got "
                f"{self.num_images} and {self.num_seeds}."
            )
        self.of_evaluation()  # checks what the two have in common

    @property
    def scores(self) -> list[str]:
        """The scores asked for."""
        return [] if self.metrics == "none" else words_of(self.metrics)

    @property
    def steps(self) -> list[int]:
        """Numbers of steps, as asked for."""
        return numbers_of(self.num_inference_steps)

    @property
    def fid_steps(self) -> list[int]:
        """Numbers of steps of the Fréchet distances."""
        return numbers_of(self.fid_num_inference_steps) if self.fid_num_inference_steps is not None else self.steps

    def of_evaluation(self) -> EvalConfig:
        """The part that is an evaluation."""
        names = EvalConfig.__dataclass_fields__.keys() & self.__dataclass_fields__.keys() - {"metrics"}
        shared: dict[str, Any] = {name: getattr(self, name) for name in names}
        splits: dict[str, Any] = {"reference_split": self.split, "bpd_split": self.test_split}
        if self.fid_num_inference_steps is not None:
            EvalConfig(**{**shared, "num_inference_steps": self.fid_num_inference_steps})
        return EvalConfig(**shared, **splits, metrics=",".join(self.scores) or "bpd")

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return Path(self.output_dir) if self.output_dir is not None else self.of_evaluation().folder / "calibrated"


def words_of(text: str | None) -> list[str]:
    """The words between commas, each once."""
    return list(dict.fromkeys(word.strip() for word in (text or "").split(",") if word.strip()))


def numbers_of(text: str | None) -> list[int]:
    """The whole numbers between commas, each once."""
    return list(dict.fromkeys(map(int, words_of(text))))


def check_numbers(config: EvalConfig) -> None:
    """Raise a ValueError for numbers that cannot give the scores asked for."""
    wrong = [word for word in words_of(config.num_inference_steps) if not word.isdecimal() or int(word) < 1]
    if wrong or not words_of(config.num_inference_steps):
        raise ValueError(
            f"num_inference_steps must be whole numbers like 10,50,1000, got {config.num_inference_steps!r}."
        )
    if config.variance_type is not None and not config.of_bound and "ddpm" not in words_of(config.sampler):
        raise ValueError(
            f'variance_type is an option of the sampler "ddpm" and of bits/dim, and neither is asked for: leave '
            f"{config.variance_type!r} out, or add the sampler ddpm."
        )
    if "rate_distortion" in config.of_bound and config.num_timesteps_sampled is not None:
        raise ValueError("rate_distortion needs every step: leave num_timesteps_sampled out.")
    needs = {"fid": 2, "kid": config.kid_subset_size, "cmmd": 2, "is": 20, "prdc": 6}
    for metric in config.of_samples:
        if config.num_samples < needs[metric]:
            raise ValueError(
                f"{metric} needs at least {needs[metric]} generated images, got num_samples = {config.num_samples}."
            )
    if "cmmd" in config.of_samples and config.extractor != "clip":
        raise ValueError(f'cmmd is defined on the embeddings of the extractor "clip", got {config.extractor!r}.')
    if "is" in config.of_samples and config.extractor in ("pixels", "dinov2", "clip"):
        raise ValueError(f'is needs a classifier as extractor, and "{config.extractor}" is none.')


def recorded(config: EvalConfig) -> dict[str, Any]:
    """Options as they are written to eval.json."""
    return {name: value for name, value in asdict(config).items() if name != "hub_token"}
