"""Ready configurations, each with the numbers it is expected to reach and their source."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .config import TrainConfig

__all__ = ["PRESETS"]


@dataclass(frozen=True)
class Preset:
    """A configuration and what it is expected to reach, with the source of the numbers."""

    config: TrainConfig
    expected: str


PAPER = TrainConfig(
    unet="cifar10",
    dataset_name="uoft-cs/cifar10",
    dropout=0.1,
    random_flip=True,
    train_batch_size=128,
    global_batch_size=128,
    max_train_steps=800_000,
    learning_rate=2e-4,
    lr_warmup_steps=5000,
    checkpointing_steps=10_000,
    save_images_steps=20_000,
    logging_steps=100,
    channels_last=True,
    output_dir="runs/cifar10",
)
PAPER_256 = dataclasses.replace(
    PAPER,
    unet="lsun256",
    dropout=0.0,
    learning_rate=2e-5,
    train_batch_size=64,
    global_batch_size=64,
    variance_type="fixed_small",
)

DIGITS = TrainConfig(
    unet="digits",
    train_batch_size=128,
    global_batch_size=128,
    max_train_steps=1200,
    learning_rate=2e-3,
    lr_scheduler="cosine",
    lr_warmup_steps=100,
    ema_max_decay=0.99,
    ddpm_num_inference_steps=100,
    checkpointing_steps=200,
    logging_steps=20,
    output_dir="runs/digits",
)

PRESETS: dict[str, Preset] = {
    "digits": Preset(
        DIGITS,
        "Pixel-space Fréchet distance of 1,000 samples (100 steps, fixed_large, seed 0) to the 1,500 training images "
        "at most 0.12 (0.07 was seen); under 4 minutes on 2 cores.",
    ),
    "digits-conditional": Preset(
        dataclasses.replace(DIGITS, class_conditional=True, class_dropout=0.1, output_dir="runs/digits-conditional"),
        "The digit that was asked for, and class guidance between variety and certainty (docs/guidance.md); under 5 "
        "minutes on 2 cores.",
    ),
    "cifar10": Preset(
        PAPER,
        "FID 3.17 and IS 9.46 of the averaged weights, 50,000 samples, 1000 steps, fixed_large; at most 3.75 bits/dim "
        "(Ho et al. 2020, Table 1); re-trainings of the recipe reach FID 3.05 to 3.25.",
    ),
    "digits-learned": Preset(
        dataclasses.replace(DIGITS, variance_type="learned_range", loss="hybrid", output_dir="runs/digits-learned"),
        "Fewer bits/dim than its own network with either fixed variance, at 1000 steps and at 50 (docs/few_steps.md).",
    ),
    "iddpm-cifar10": Preset(
        dataclasses.replace(
            PAPER,
            unet="iddpm-cifar10",
            dropout=0.3,
            random_flip=False,
            ddpm_num_steps=4000,
            ddpm_beta_schedule="squaredcos_cap_v2",
            variance_type="learned_range",
            loss="hybrid",
            max_train_steps=500_000,
            learning_rate=1e-4,
            lr_warmup_steps=0,
            max_grad_norm=None,
            output_dir="runs/iddpm-cifar10",
        ),
        "3.17 bits/dim and FID 3.19 with 4000 steps (Nichol & Dhariwal 2021, cosine schedule, hybrid loss). Their code "
        "rescales t to 0..1000 before the time embedding; here the embedding sees t itself, 0..3999.",
    ),
    "cifar10-small": Preset(
        dataclasses.replace(
            PAPER,
            unet="cifar10-small",
            channels_last=False,
            train_batch_size=64,
            global_batch_size=64,
            max_train_steps=20_000,
            lr_warmup_steps=500,
            ema_max_decay=0.999,
            checkpointing_steps=500,
            save_images_steps=2000,
            output_dir="runs/cifar10-small",
        ),
        "No published number: a network small enough to watch learn on two CPU cores.",
    ),
    "cifar10-tiny": Preset(
        dataclasses.replace(
            PAPER,
            unet="cifar10-tiny",
            dropout=0.0,
            channels_last=False,
            train_batch_size=32,
            global_batch_size=32,
            max_train_steps=8000,
            learning_rate=1e-3,
            lr_scheduler="cosine",
            lr_warmup_steps=200,
            ema_max_decay=0.999,
            ddpm_num_inference_steps=100,
            checkpointing_steps=500,
            save_images_steps=None,
            output_dir="runs/cifar10-tiny",
        ),
        "No published number: about an hour of one CPU core, for measurements that need real images and no GPU.",
    ),
    "lsun256": Preset(
        dataclasses.replace(
            PAPER_256,
            dataset_name=None,
            train_data_dir="data/lsun",
            max_train_steps=2_400_000,
            output_dir="runs/lsun256",
        ),
        "FID 6.36 (Bedroom, 2.4M steps), 19.75 (Cat, 1.8M), 7.89 (Church, 1.2M) (Ho et al. 2020, Table 3). The paper "
        "does not flip Bedroom: add --no_random_flip there.",
    ),
    "celebahq256": Preset(
        dataclasses.replace(
            PAPER_256,
            dataset_name=None,
            train_data_dir="data/celebahq256",
            max_train_steps=500_000,
            output_dir="runs/celebahq256",
        ),
        "Samples as in Ho et al. 2020, Figure 3; the paper gives no FID.",
    ),
    "unconditional": Preset(
        TrainConfig(
            resolution="64",
            center_crop=False,
            train_batch_size=16,
            num_epochs=100,
            learning_rate=1e-4,
            lr_scheduler="cosine",
            lr_warmup_steps=500,
            adam_beta1=0.95,
            adam_weight_decay=1e-6,
            ema="warmup",
            eval_batch_size=16,
            save_images_epochs=10,
            save_model_epochs=10,
            output_dir="runs/unconditional",
        ),
        "The defaults of Diffusers' train_unconditional.py, taken when data is named and no preset is.",
    ),
}
