"""The options of a training run, in named parts: default, meaning, range and what each needs or replaces stand here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..diffusion.words import BetaSchedule, Loss, PredictionType, TimestepSampler, TrainedVariance
from ..options import option

__all__ = [
    "DataOptions",
    "DiffusionOptions",
    "EvaluationOptions",
    "NetworkOptions",
    "NumericsOptions",
    "OptimizerOptions",
    "RunOptions",
]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the images come from."""

    dataset_name: str | None = option(
        None,
        "Hub name or local folder of a data set; none: the built-in digits.",
        replaces=("train_data_dir",),
        excludes=("train_data_dir", "name the data"),
    )
    dataset_config_name: str | None = option(None, "Configuration of the Hub data set.", needs=("dataset_name", True))
    train_data_dir: str | None = option(
        None,
        "Folder or archive of images or arrays, .npy or .npz of many images, folder of parquet files.",
        replaces=("dataset_name", "dataset_config_name"),
    )
    train_split: str = option("train", "Split to train on.")
    cache_dir: str | None = option(None, "Where downloaded data sets and models are kept.", neutral=True)
    image_column: str | None = option(None, "Column that holds the images; none: the only one that can.")
    label_column: str | None = option(None, "Column that holds the classes; none: the only one that can.")
    resolution: str | None = option(None, "Size of the images: 32, or height x width as 24x32; none: the network's.")
    center_crop: bool = option(True, "Crop in the middle; off: each image at a place of its own.")
    random_flip: bool = option(False, "Mirror each image with probability 1/2.")
    dataloader_num_workers: int = option(0, "Threads that decode images; 0: the main one.", at_least=0, neutral=True)
    streaming: bool = option(
        False,
        "Read the data set shard by shard instead of loading it.",
        replaces=("save_images_epochs", "save_model_epochs"),
    )
    bits: int | None = option(
        None, "Levels 0 to 2^bits - 1 of each value, 1 to 16; none: 8, or what value_range needs."
    )
    preserve_input_precision: bool = option(False, "16 bits where no --bits are given, as Diffusers' script names it.")
    value_range: list[float] | None = option(
        None, "The stored values that become black and white, as 0 4095; none: the file's own range."
    )
    channel_axis: int | None = option(None, "Axis of the channels in an array of one image; none: the last.")
    array_key: str | None = option(None, "Name of the array in .npz files; none: their only one.")
    max_unreadable: float = option(0.01, "Share of unreadable images above which the run stops.", neutral=True)
    equal_sizes: bool = option(
        False, "Refuse images of several sizes instead of scaling and cropping them.", neutral=True
    )
    strict_data: bool = option(
        False, "Stop at the first corrupt image instead of skipping and counting it.", neutral=True
    )


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """What is trained."""

    model_config_name_or_path: str | None = option(
        None, "UNet2DModel config: a folder, a JSON file or a Hub name.", replaces=("unet", "resolution")
    )
    unet: str | None = option(
        None,
        "Network preset, as of ddpm_ext.build_unet; none: Diffusers' script's network.",
        replaces=("model_config_name_or_path", "resolution"),
    )
    init_from: str | None = option(
        None,
        "Start from the weights, network and schedule of a pipeline (folder or Hub name), a run or a checkpoint.",
        replaces=("unet", "model_config_name_or_path", "resolution"),
    )
    init_new_head: bool = option(
        False,
        "Begin those layers of init_from anew that other channels, classes or a learned variance need.",
        needs=("init_from", True),
    )
    freeze: list[str] = option(
        [], "Weights of init_from that stay as they are, as down_blocks.*", needs=("init_from", True)
    )
    lora_rank: int | None = option(
        None,
        "Train low-rank adapters of the attention alone, merged into what is exported; needs peft.",
        at_least=1,
        needs=("init_from", True),
    )
    dropout: float | None = option(None, "Dropout of the network; none: the preset's.", at_least=0, below=1)
    class_conditional: bool = option(False, "Give the network each image's class.")
    class_dropout: float = option(
        0.0,
        "Share of images that are trained without their class, for class guidance: 0.1 is usual.",
        at_least=0,
        below=1,
        needs=("class_conditional", (True,)),
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, slower.")
    enable_xformers_memory_efficient_attention: bool = option(False, "Attention of xformers, which must be installed.")


@dataclass(frozen=True, kw_only=True)
class DiffusionOptions:
    """The process, the prediction and the loss."""

    ddpm_num_steps: int = option(
        1000, "T, the number of diffusion steps.", at_least=1, of_schedule="num_train_timesteps"
    )
    ddpm_num_inference_steps: int = option(1000, "Steps used for the sample grids.", at_least=1, neutral=True)
    ddpm_beta_schedule: BetaSchedule = option("linear", "Noise schedule.", of_schedule="beta_schedule")
    beta_start: float = option(
        1e-4,
        "First beta of the linear, scaled_linear and sigmoid schedules.",
        above=0,
        needs=("ddpm_beta_schedule", ("linear", "scaled_linear", "sigmoid")),
        of_schedule="beta_start",
    )
    beta_end: float = option(
        0.02,
        "Last beta of the linear, scaled_linear and sigmoid schedules.",
        needs=("ddpm_beta_schedule", ("linear", "scaled_linear", "sigmoid")),
        of_schedule="beta_end",
    )
    rescale_betas_zero_snr: bool = option(
        False, "Rescale the schedule so that the last step is pure noise.", of_schedule="rescale_betas_zero_snr"
    )
    prediction_type: PredictionType = option("epsilon", "What the network predicts.", of_schedule="prediction_type")
    variance_type: TrainedVariance = option(
        "fixed_large",
        "Reverse variance; the learned ones give the network twice the output channels.",
        of_schedule="variance_type",
    )
    loss: Loss = option("simple", "Simple squared error, the bound, or both.")
    timestep_sampler: TimestepSampler = option(
        "uniform", "Draw t uniformly, or in proportion to its recent losses, weighed so that the mean stays the same."
    )
    snr_gamma: float | None = option(
        None, "Weight the simple loss by min(SNR, gamma), e.g. 5.0; none: unweighted.", above=0
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Updates: their batch, number, learning rate and average."""

    train_batch_size: int = option(
        16, "Images of one process in one forward pass.", at_least=1, neutral=True, replaces=("global_batch_size",)
    )
    gradient_accumulation_steps: int = option(
        1, "Forward passes of one update.", at_least=1, neutral=True, replaces=("global_batch_size",)
    )
    global_batch_size: int | None = option(
        None,
        "Images of one update over all processes; none: train_batch_size x accumulation x processes.",
        at_least=1,
        neutral=True,
    )
    max_train_steps: int | None = option(
        None,
        "Updates of the run; none: num_epochs.",
        at_least=0,
        neutral=True,
        replaces=("num_epochs",),
        excludes=("num_epochs", "give the length of the run"),
    )
    num_epochs: int | None = option(
        None,
        "Passes over the data, when max_train_steps is none.",
        at_least=1,
        neutral=True,
        replaces=("max_train_steps",),
    )
    learning_rate: float = option(1e-4, "Learning rate after the warm-up.", above=0)
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = option("constant", "Course of the learning rate, in updates; constant, too, warms up if told to.")
    lr_warmup_steps: int = option(0, "Updates over which the learning rate rises from 0.", at_least=0)
    adam_beta1: float = option(0.9, "First moment's decay of Adam.", at_least=0, below=1)
    adam_beta2: float = option(0.999, "Second moment's decay of Adam.", at_least=0, below=1)
    adam_weight_decay: float = option(0.0, "Decoupled weight decay; 0 is plain Adam.", at_least=0)
    adam_epsilon: float = option(1e-8, "Epsilon of Adam.", above=0)
    max_grad_norm: float | None = option(1.0, "Global norm at which gradients are clipped; none: no clipping.", above=0)
    max_bad_steps: int = option(10, "Non-finite steps in a row after which the run stops.", at_least=1, neutral=True)
    use_ema: bool = option(True, "Keep averaged weights and sample from them.")
    ema: Literal["constant", "warmup", "power_function"] = option(
        "constant",
        "Constant decay (first update a copy), rising decay, or EDM2's power function.",
        needs=("use_ema", (True,)),
    )
    ema_max_decay: float = option(
        0.9999,
        "Decay of the constant average and upper end of the warm-up.",
        at_least=0,
        below=1,
        needs=("ema", ("constant", "warmup")),
    )
    ema_inv_gamma: float = option(
        1.0, "Warm-up: decay after n updates is 1 - (1 + n / inv_gamma) ** -power.", above=0, needs=("ema", ("warmup",))
    )
    ema_power: float = option(0.75, "Warm-up: the power in that formula.", above=0, needs=("ema", ("warmup",)))
    ema_sigma_rel: list[float] = option(
        [0.05, 0.10], "Power function: relative widths; the first is sampled from.", needs=("ema", ("power_function",))
    )
    ema_snapshot_steps: int | None = option(
        None,
        "Power function: updates between snapshots; none: 32 over the run.",
        at_least=1,
        needs=("ema", ("power_function",)),
    )


@dataclass(frozen=True, kw_only=True)
class NumericsOptions:
    """Switches that change the speed and the last digits."""

    cpu: bool = option(False, "Use the CPU even where there is an accelerator.", neutral=True)
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "Autocast of the forward pass.")
    allow_tf32: bool = option(False, "TF32 matrix products on NVIDIA GPUs.")
    channels_last: bool = option(
        False, "Channels-last memory format, for GPUs; not under FSDP, which shards others only."
    )
    fused_optimizer: bool = option(True, "PyTorch's fused AdamW; off: its for-each one.")
    compile: bool = option(False, "torch.compile the network; on one GPU as CUDA graphs.")
    double: bool = option(False, "Train in float64, to compare numbers of processes.")
    local_rank: int = option(-1, "As torch.distributed.launch gives it; the environment says the same.", neutral=True)
    num_threads: int | None = option(
        None,
        "CPU threads of one process; none: OMP_NUM_THREADS, that of the run resumed, or the free cores.",
        at_least=1,
        neutral=True,
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Seed, files, images, trackers."""

    output_dir: str | None = option(None, "Run folder; none: runs/<preset>.", neutral=True)
    overwrite_output_dir: bool = option(
        False, "Delete what an earlier run left; this very run, unfinished, resumes.", neutral=True
    )
    seed: int = option(0, "Seed of everything random.", below=2**62, at_least=0)
    checkpointing_steps: int = option(500, "Updates between checkpoints.", at_least=1, neutral=True)
    checkpoints_total_limit: int | None = option(2, "Checkpoints kept; none: all.", at_least=1, neutral=True)
    resume_from_checkpoint: str | None = option(
        "latest", "latest, a checkpoint's folder, or none to refuse to resume.", neutral=True
    )
    allow_config_change: list[str] = option([], "Options that may differ from the run being resumed.", neutral=True)
    logging_steps: int = option(50, "Updates between log lines.", at_least=1, neutral=True)
    logging_dir: str = option(
        "logs",
        "Folder of the trackers' files, inside the run folder.",
        neutral=True,
        needs=("report_to", ("tensorboard",)),
    )
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = option("none", "Tracker.", neutral=True)
    rgb_bands: list[int] | None = option(
        None, "Three bands, counted from 1, that grids show; none: all of up to four, else the first.", neutral=True
    )
    eval_batch_size: int = option(64, "Images of a sample grid.", at_least=1, neutral=True)
    save_images_steps: int | None = option(
        None,
        "Updates between sample grids; none: see save_images_epochs.",
        at_least=1,
        neutral=True,
        replaces=("save_images_epochs",),
        excludes=("save_images_epochs", "say when grids are drawn"),
    )
    save_images_epochs: int | None = option(
        None,
        "Epochs between sample grids; none: only at the end.",
        at_least=1,
        neutral=True,
        replaces=("save_images_steps",),
    )
    save_model_epochs: int | None = option(
        None, "Epochs between exports of pipeline/; none: only at the end.", at_least=1, neutral=True
    )
    push_to_hub: bool = option(False, "Upload pipeline/ at the end.", neutral=True)
    hub_model_id: str | None = option(
        None, "Repository to upload to; none: the run folder's name.", neutral=True, needs=("push_to_hub", (True,))
    )
    hub_token: str | None = option(
        None,
        "Token for the Hub; none: the stored one. Never written to a file.",
        neutral=True,
        needs=("push_to_hub", (True,)),
    )
    hub_private_repo: bool = option(False, "Make the repository private.", neutral=True, needs=("push_to_hub", (True,)))
    hub_every: int | None = option(
        None,
        "Updates between uploads in the background; none: one at the end.",
        at_least=1,
        neutral=True,
        needs=("push_to_hub", (True,)),
    )
    dry_run: bool = option(
        False, "One update, one checkpoint round trip, memory, speed, time and cost; then stop.", neutral=True
    )
    price_per_hour: float | None = option(
        None,
        "Price of this machine's hour, for the cost that --dry_run prints.",
        above=0,
        neutral=True,
        needs=("dry_run", (True,)),
    )
    forecast: Literal["h100", "h200", "b200", "a100", "a100-40", "l40s", "l4", "rtx4090", "rtx3090", "cpu"] | None = (
        option(
            None,
            "Say what the run takes on such an accelerator, from fake tensors, in place of trying this machine.",
            neutral=True,
            needs=("dry_run", (True,)),
        )
    )
    forecast_processes: int = option(
        1, "Accelerators of the forecast.", at_least=1, neutral=True, needs=("forecast", True)
    )
    forecast_utilisation: float = option(
        0.2,
        "Share of its peak that the forecast's accelerator reaches.",
        above=0,
        neutral=True,
        needs=("forecast", True),
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """A small evaluation of the averaged weights during the run, with --eval_steps."""

    eval_steps: int | None = option(None, "Updates between evaluations; none: no evaluation.", at_least=1, neutral=True)
    eval_metric: Literal["fid", "bits_per_dim"] = option(
        "fid", "Score by which the best weights are kept in best/.", neutral=True, needs=("eval_steps", True)
    )
    eval_split: str | None = option(
        None, "Held-out split whose bits/dim are measured; none: only fid.", neutral=True, needs=("eval_steps", True)
    )
    eval_samples: int = option(
        256,
        "Generated images of each evaluation; a Fréchet distance needs two.",
        at_least=2,
        neutral=True,
        needs=("eval_steps", True),
    )
    eval_num_inference_steps: int = option(
        50, "Their denoising steps.", at_least=1, neutral=True, needs=("eval_steps", True)
    )
    eval_extractor: str = option(
        "pixels",
        "Features: pixels, inception, dinov2, clip or a transformers vision model.",
        neutral=True,
        needs=("eval_steps", True),
    )
    eval_max_images: int = option(
        5000,
        "Only the first so many images of a split are compared with.",
        at_least=1,
        neutral=True,
        needs=("eval_steps", True),
    )
