"""Options of a training run: one frozen dataclass in named parts, checked when it is built.

`presets.py` holds ready ones; `arguments.py` lays YAML files and flags over them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..options import option, required


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the pictures come from."""

    dataset_name: str | None = option(None, "Hub name or local folder of a data set; none: the built-in digits.")
    dataset_config_name: str | None = option(None, "Configuration of the Hub data set.")
    train_data_dir: str | None = option(None, "Folder or archive of images or arrays, or folder of parquet files.")
    train_split: str = option("train", "Split to train on.")
    cache_dir: str | None = option(None, "Where downloaded data sets and models are kept.")
    image_column: str | None = option(None, "Column that holds the pictures; none: the only one that can.")
    label_column: str | None = option(None, "Column that holds the classes; none: the only one that can.")
    resolution: str | None = option(None, "Size of the pictures: 32, or height x width as 24x32; none: the network's.")
    center_crop: bool = option(True, "Crop in the middle; off: each picture at a place of its own.")
    random_flip: bool = option(False, "Mirror each picture with probability 1/2.")
    dataloader_num_workers: int = option(0, "Threads that decode pictures; 0: the main one.")
    streaming: bool = option(False, "Read the data set shard by shard instead of loading it.")
    bits: int | None = option(
        None, "Levels 0 to 2^bits - 1 of each value, 1 to 16; none: 8, or what value_range needs."
    )
    preserve_input_precision: bool = option(False, "16 bits where no --bits are given, as Diffusers' script names it.")
    value_range: list[float] | None = option(
        None, "The stored values that become black and white, as 0 4095; none: the file's own range."
    )
    channel_axis: int | None = option(None, "Axis of the channels in .npy, .npz and columns of arrays; none: the last.")
    array_key: str | None = option(None, "Name of the array in .npz files; none: their only one.")
    max_unreadable: float = option(0.01, "Share of unreadable images above which the run stops.")
    equal_sizes: bool = option(False, "Refuse pictures of several sizes instead of scaling and cropping them.")
    strict_data: bool = option(False, "Stop at the first corrupt picture instead of skipping and counting it.")


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """What is trained."""

    model_config_name_or_path: str | None = option(None, "UNet2DModel config: a folder, a JSON file or a Hub name.")
    unet: str | None = option(None, "Network preset of ddpm_ext.unet; none: Diffusers' script's network.")
    dropout: float | None = option(None, "Dropout of the network; none: the preset's.")
    class_conditional: bool = option(False, "Give the network each picture's class.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, slower.")
    enable_xformers_memory_efficient_attention: bool = option(False, "Attention of xformers, which must be installed.")


@dataclass(frozen=True, kw_only=True)
class DiffusionOptions:
    """The process, the prediction and the loss."""

    ddpm_num_steps: int = option(1000, "T, the number of diffusion steps.")
    ddpm_num_inference_steps: int = option(1000, "Steps used for the sample grids.")
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = option(
        "linear", "Noise schedule."
    )
    beta_start: float = option(1e-4, "First beta of the linear, scaled_linear and sigmoid schedules.")
    beta_end: float = option(0.02, "Last beta of the linear, scaled_linear and sigmoid schedules.")
    rescale_betas_zero_snr: bool = option(False, "Rescale the schedule so that the last step is pure noise.")
    prediction_type: Literal["epsilon", "sample", "v_prediction", "posterior_mean"] = option(
        "epsilon", "What the network predicts."
    )
    variance_type: Literal[
        "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"
    ] = option("fixed_large", "Reverse variance; the learned ones give the network twice the output channels.")
    loss: Literal["simple", "vlb", "hybrid"] = option("simple", "Simple squared error, the bound, or both.")
    timestep_sampler: Literal["uniform", "loss_aware"] = option(
        "uniform", "Draw t uniformly, or in proportion to its recent losses, weighed so that the mean stays the same."
    )
    snr_gamma: float | None = option(None, "Weight the simple loss by min(SNR, gamma), e.g. 5.0; none: unweighted.")


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Updates: their batch, number, learning rate and average."""

    train_batch_size: int = option(16, "Pictures of one process in one forward pass.")
    gradient_accumulation_steps: int = option(1, "Forward passes of one update.")
    global_batch_size: int | None = option(
        None, "Pictures of one update over all processes; none: train_batch_size x accumulation x processes."
    )
    max_train_steps: int | None = option(None, "Updates of the run; none: num_epochs.")
    num_epochs: int | None = option(None, "Passes over the data, when max_train_steps is none.")
    learning_rate: float = option(1e-4, "Learning rate after the warm-up.")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = option("constant", "Course of the learning rate, in updates; constant, too, warms up if told to.")
    lr_warmup_steps: int = option(0, "Updates over which the learning rate rises from 0.")
    adam_beta1: float = option(0.9, "First moment's decay of Adam.")
    adam_beta2: float = option(0.999, "Second moment's decay of Adam.")
    adam_weight_decay: float = option(0.0, "Decoupled weight decay; 0 is plain Adam.")
    adam_epsilon: float = option(1e-8, "Epsilon of Adam.")
    max_grad_norm: float | None = option(1.0, "Global norm at which gradients are clipped; none: no clipping.")
    max_bad_steps: int = option(10, "Non-finite steps in a row after which the run stops.")
    use_ema: bool = option(True, "Keep averaged weights and sample from them.")
    ema: Literal["constant", "warmup", "power_function"] = option(
        "constant", "Constant decay (first update a copy), rising decay, or EDM2's power function."
    )
    ema_max_decay: float = option(0.9999, "Decay of the constant average and upper end of the warm-up.")
    ema_inv_gamma: float = option(1.0, "Warm-up: decay after n updates is 1 - (1 + n / inv_gamma) ** -power.")
    ema_power: float = option(0.75, "Warm-up: the power in that formula.")
    ema_sigma_rel: list[float] = field(
        default_factory=lambda: [0.05, 0.10],
        metadata={"help": "Power function: relative widths; the first is sampled from."},
    )
    ema_snapshot_steps: int | None = option(None, "Power function: updates between snapshots; none: 32 over the run.")


@dataclass(frozen=True, kw_only=True)
class NumericsOptions:
    """Switches that change the speed and the last digits."""

    cpu: bool = option(False, "Use the CPU even where there is an accelerator.")
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "Autocast of the forward pass.")
    allow_tf32: bool = option(False, "TF32 matrix products on NVIDIA GPUs.")
    channels_last: bool = option(
        False, "Channels-last memory format, for GPUs; not under FSDP, which shards others only."
    )
    fused_optimizer: bool = option(True, "PyTorch's fused AdamW; off: its for-each one.")
    compile: bool = option(False, "torch.compile each block of the network.")
    double: bool = option(False, "Train in float64, to compare numbers of processes.")
    num_threads: int | None = option(None, "CPU threads of one process; none: PyTorch's choice, kept over a resume.")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Seed, files, pictures, trackers."""

    output_dir: str | None = option(None, "Run folder; none: runs/<preset>.")
    overwrite_output_dir: bool = option(False, "Delete what an earlier run left; this very run, unfinished, goes on.")
    seed: int = option(0, "Seed of everything random.")
    checkpointing_steps: int = option(500, "Updates between checkpoints.")
    checkpoints_total_limit: int | None = option(2, "Checkpoints kept; none: all.")
    resume_from_checkpoint: str | None = option("latest", "latest, a checkpoint's folder, or none to refuse to resume.")
    allow_config_change: list[str] = field(
        default_factory=list, metadata={"help": "Options that may differ from the run being resumed."}
    )
    logging_steps: int = option(50, "Updates between log lines.")
    logging_dir: str = option("logs", "Folder of the trackers' files, inside the run folder.")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = option("none", "Tracker.")
    eval_batch_size: int = option(64, "Pictures of a sample grid.")
    save_images_steps: int | None = option(None, "Updates between sample grids; none: see save_images_epochs.")
    save_images_epochs: int | None = option(None, "Epochs between sample grids; none: only at the end.")
    save_model_epochs: int | None = option(None, "Epochs between exports of pipeline/; none: only at the end.")
    push_to_hub: bool = option(False, "Upload pipeline/ at the end.")
    hub_model_id: str | None = option(None, "Repository to upload to; none: the run folder's name.")
    hub_token: str | None = option(None, "Token for the Hub; none: the stored one. Never written to a file.")
    hub_private_repo: bool = option(False, "Make the repository private.")
    hub_every: int | None = option(None, "Updates between uploads in the background; none: one at the end.")
    dry_run: bool = option(False, "One update, one checkpoint round trip, memory, speed, time and cost; then stop.")
    price_per_hour: float | None = option(None, "Price of this machine's hour, for the cost that --dry_run prints.")


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """A small evaluation of the averaged weights during the run; see watch.py."""

    eval_steps: int | None = option(None, "Updates between evaluations; none: no evaluation.")
    eval_metric: Literal["fid", "bits_per_dim"] = option("fid", "Score by which the best weights are kept in best/.")
    eval_split: str | None = option(None, "Held-out split whose bits/dim are measured; none: only fid.")
    eval_samples: int = option(256, "Generated pictures of each evaluation.")
    eval_num_inference_steps: int = option(50, "Their denoising steps.")
    eval_extractor: str = option("pixels", "Features: pixels, inception, dinov2, clip or a transformers vision model.")
    eval_max_images: int = option(5000, "Only the first so many pictures of a split are compared with.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    EvaluationOptions, RunOptions, NumericsOptions, OptimizerOptions, DiffusionOptions, NetworkOptions, DataOptions
):
    """Every option of a training run.

    Raises:
        ValueError: an option is out of range, or two contradict each other; the sentence says what to do.
    """

    def __post_init__(self) -> None:
        check_words(self)
        check_ranges(self)
        check_agreement(self)

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of `resolution`."""
        if self.resolution is None:
            return None
        sides = [int(side) for side in str(self.resolution).split("x")]
        return (sides[0], sides[-1])


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Options of scripts/reconstruct_ema.py."""

    run: str = required("Run folder trained with --ema power_function.")
    sigma_rel: float = required("Relative width that is wanted.")
    update: int | None = option(None, "Update at which the average ends; none: the last.")
    output_dir: str | None = option(None, "Pipeline to write; none: pipeline-<width> in run.")

    def __post_init__(self) -> None:
        if not 0 < self.sigma_rel < 0.28:
            raise ValueError(f"sigma_rel must lie in (0, 0.28), got {self.sigma_rel}.")
        if self.output_dir is None:
            object.__setattr__(self, "output_dir", f"{self.run.rstrip('/')}/pipeline-{self.sigma_rel:g}")


AT_LEAST_ONE = (
    "hub_every",
    "ddpm_num_steps",
    "ddpm_num_inference_steps",
    "train_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
    "max_train_steps",
    "num_epochs",
    "max_bad_steps",
    "ema_snapshot_steps",
    "num_threads",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "logging_steps",
    "eval_batch_size",
    "save_images_steps",
    "save_images_epochs",
    "save_model_epochs",
    "eval_steps",
    "eval_num_inference_steps",
    "eval_max_images",
)
POSITIVE = (
    "learning_rate",
    "adam_epsilon",
    "max_grad_norm",
    "snr_gamma",
    "beta_start",
    "ema_inv_gamma",
    "ema_power",
    "price_per_hour",
)
NOT_NEGATIVE = (
    "lr_warmup_steps",
    "adam_weight_decay",
    "dataloader_num_workers",
    "seed",
)
BELOW_ONE = (
    "adam_beta1",
    "adam_beta2",
    "dropout",
    "ema_max_decay",
)


def check_words(config: TrainConfig) -> None:
    """Words come from their lists, also when a config is built in code and not by the parser."""
    for name, hint in get_type_hints(TrainConfig).items():
        value = getattr(config, name, None)
        if get_origin(hint) is Literal and value not in get_args(hint):
            words = ", ".join(f'"{word}"' for word in get_args(hint))
            raise ValueError(f"{name} must be one of {words}, got {value!r}.")


def check_ranges(config: TrainConfig) -> None:
    """Numbers lie where they have a meaning; none passes where it stands for off."""
    rules = (
        (AT_LEAST_ONE, "at least 1", lambda v: v >= 1),
        (POSITIVE, "above 0", lambda v: v > 0),
        (NOT_NEGATIVE, "at least 0", lambda v: v >= 0),
        (BELOW_ONE, "in [0, 1)", lambda v: 0 <= v < 1),
    )
    for names, words, holds in rules:
        for name in names:
            value = getattr(config, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name} must be {words}, got {value}.")
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}.")
    if config.resolution is not None and not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", str(config.resolution)):
        raise ValueError(f"resolution must be like 32 or 24x32 (height x width), got {config.resolution!r}.")
    if any(not 0 < width < 0.28 for width in config.ema_sigma_rel):
        raise ValueError(f"ema_sigma_rel must lie in (0, 0.28), got {config.ema_sigma_rel}.")


def check_agreement(config: TrainConfig) -> None:
    """Options that would cancel or contradict each other are refused, so none is accepted and ignored."""
    refuse_unknown_names(config.allow_config_change)
    learned = config.variance_type in ("learned", "learned_range")
    clashes = (
        (
            config.dataset_name is not None and config.train_data_dir is not None,
            "dataset_name and train_data_dir both name the data; give one of them.",
        ),
        (
            config.max_train_steps is None and config.num_epochs is None,
            "the length of the run is missing; give --max_train_steps or --num_epochs.",
        ),
        (
            config.max_train_steps is not None and config.num_epochs is not None,
            "max_train_steps and num_epochs both give the length of the run; give one of them.",
        ),
        (
            config.loss in ("vlb", "hybrid") and config.snr_gamma is not None,
            f'snr_gamma weights the simple loss only, and loss is "{config.loss}"; drop one of them.',
        ),
        (
            config.loss == "simple" and learned,
            f'variance_type "{config.variance_type}" is learned by the loss "vlb" or "hybrid", got loss "simple".',
        ),
        (
            config.ema == "power_function" and not config.ema_sigma_rel,
            "the power-function average needs at least one width; give --ema_sigma_rel 0.05 0.10.",
        ),
        (
            config.double and config.mixed_precision != "no",
            f'double trains in float64, and mixed_precision is "{config.mixed_precision}"; drop one of them.',
        ),
        (
            config.lr_scheduler == "constant_with_warmup" and config.lr_warmup_steps == 0,
            "constant_with_warmup needs --lr_warmup_steps of at least 1.",
        ),
        (
            config.eval_metric == "bits_per_dim" and config.eval_split is None,
            'eval_metric "bits_per_dim" needs the held-out split that it is measured on; give --eval_split.',
        ),
        (
            config.eval_samples < 2,
            f"eval_samples must be at least 2 for a Frechet distance, got {config.eval_samples}.",
        ),
        (
            config.save_images_steps is not None and config.save_images_epochs is not None,
            "save_images_steps and save_images_epochs both say when grids are drawn; give one of them.",
        ),
        (
            config.ddpm_num_inference_steps > config.ddpm_num_steps
            and config.ddpm_num_inference_steps != TrainConfig.ddpm_num_inference_steps,
            f"ddpm_num_inference_steps must be at most ddpm_num_steps, {config.ddpm_num_steps}, "
            f"got {config.ddpm_num_inference_steps}.",
        ),
    )
    for wrong, sentence in clashes:
        if wrong:
            raise ValueError(sentence)


def refuse_unknown_names(names: list[str]) -> None:
    """Names of options that may change, "network" and "data" among them, which stand for what options lead to."""
    known = [*(field.name for field in dataclasses.fields(TrainConfig)), "network", "data"]
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(f'allow_config_change names options, and there is no "{name}". Did you mean "{nearest}"?')


# What a resumed run may change freely: names, pictures and logs, never the weights.
NEUTRAL = frozenset(
    (
        "cache_dir",
        "output_dir",
        "overwrite_output_dir",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "resume_from_checkpoint",
        "allow_config_change",
        "logging_steps",
        "logging_dir",
        "report_to",
        "eval_batch_size",
        "ddpm_num_inference_steps",
        "save_images_steps",
        "save_images_epochs",
        "save_model_epochs",
        "push_to_hub",
        "hub_model_id",
        "hub_token",
        "hub_private_repo",
        "hub_every",
        "dry_run",
        "price_per_hour",
        "eval_steps",
        "eval_metric",
        "eval_split",
        "eval_samples",
        "eval_num_inference_steps",
        "eval_extractor",
        "eval_max_images",
        "dataloader_num_workers",
        "strict_data",
        "max_unreadable",
        "equal_sizes",
        "max_bad_steps",
        "cpu",
        "num_threads",
        "train_batch_size",
        "gradient_accumulation_steps",
        "global_batch_size",
        "max_train_steps",
        "num_epochs",
    )
)


def recorded(config: TrainConfig) -> dict[str, Any]:
    """The configuration as it is written to files: all of it but the token."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name != "hub_token"}


def config_changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Options that alter the weights and differ: name -> (old, new); batch and length are compared in resume.py."""
    old = {"timestep_sampler": "uniform", "preserve_input_precision": False, **old}  # as before there was a choice
    names = sorted((old.keys() | new.keys()) - NEUTRAL)
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}
