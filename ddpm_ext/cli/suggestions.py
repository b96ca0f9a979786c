"""The option that was meant by a name that does not exist: by meaning first, then by its words, then by its letters."""

from __future__ import annotations

from collections.abc import Collection

from ..errors import nearest

__all__ = ["suggestion"]

# What other codes call an option -> our names, the first that a command has.
MEANT: dict[str, tuple[str, ...]] = {
    "accumulate": ("gradient_accumulation_steps",),
    "accumulation": ("gradient_accumulation_steps",),
    "accumulation_steps": ("gradient_accumulation_steps",),
    "amp": ("mixed_precision",),
    "augment": ("random_flip",),
    "batch": ("train_batch_size", "batch_size"),
    "batch_size": ("train_batch_size",),
    "beta1": ("adam_beta1",),
    "beta2": ("adam_beta2",),
    "beta_schedule": ("ddpm_beta_schedule",),
    "bf16": ("mixed_precision", "dtype"),
    "bs": ("train_batch_size", "batch_size"),
    "checkpoint": ("model", "resume_from_checkpoint"),
    "ckpt": ("checkpoint", "model", "resume_from_checkpoint"),
    "class": ("class_label", "class_conditional"),
    "class_cond": ("class_conditional",),
    "clip_grad": ("max_grad_norm",),
    "crop": ("center_crop",),
    "data": ("train_data_dir", "data_dir", "dataset_name"),
    "data_dir": ("train_data_dir",),
    "data_path": ("train_data_dir", "data_dir"),
    "data_root": ("train_data_dir", "data_dir"),
    "dataset": ("dataset_name",),
    "dataset_path": ("train_data_dir", "data_dir"),
    "ddim": ("sampler",),
    "diffusion_steps": ("ddpm_num_steps", "num_timesteps"),
    "ema_decay": ("ema_max_decay",),
    "ema_rate": ("ema_max_decay",),
    "epoch": ("num_epochs",),
    "epochs": ("num_epochs",),
    "folder": ("output_dir",),
    "fp16": ("mixed_precision", "dtype"),
    "grad_accum": ("gradient_accumulation_steps",),
    "grad_clip": ("max_grad_norm",),
    "half": ("dtype", "mixed_precision"),
    "image_dir": ("train_data_dir", "data_dir"),
    "image_size": ("resolution",),
    "images": ("num_samples", "num_images"),
    "img_size": ("resolution",),
    "inference_steps": ("num_inference_steps", "ddpm_num_inference_steps"),
    "iterations": ("max_train_steps",),
    "iters": ("max_train_steps",),
    "load": ("model", "resume_from_checkpoint"),
    "log_dir": ("logging_dir",),
    "log_every": ("logging_steps",),
    "log_interval": ("logging_steps",),
    "logdir": ("output_dir",),
    "lr": ("learning_rate",),
    "lr_anneal_steps": ("max_train_steps",),
    "lr_warmup": ("lr_warmup_steps",),
    "max_epochs": ("num_epochs",),
    "max_steps": ("max_train_steps",),
    "max_updates": ("max_train_steps",),
    "microbatch": ("train_batch_size",),
    "model_dir": ("model",),
    "model_id": ("model", "hub_model_id"),
    "model_name": ("model", "unet"),
    "model_path": ("model", "checkpoint", "model_config_name_or_path"),
    "n": ("num_samples",),
    "n_epochs": ("num_epochs",),
    "n_images": ("num_samples", "num_images"),
    "n_samples": ("num_samples",),
    "n_steps": ("max_train_steps", "num_inference_steps"),
    "name": ("model", "output_dir"),
    "network": ("unet",),
    "noise_schedule": ("ddpm_beta_schedule",),
    "num_images": ("num_samples",),
    "num_iterations": ("max_train_steps",),
    "num_labels": ("class_conditional",),
    "num_steps": ("max_train_steps", "num_inference_steps"),
    "num_timesteps": ("ddpm_num_steps",),
    "num_train_epochs": ("num_epochs",),
    "num_train_steps": ("max_train_steps",),
    "num_train_timesteps": ("ddpm_num_steps",),
    "num_workers": ("dataloader_num_workers",),
    "out": ("output_dir",),
    "out_dir": ("output_dir",),
    "outdir": ("output_dir",),
    "output": ("output_dir",),
    "precision": ("mixed_precision", "dtype"),
    "pretrained": ("model", "init_from", "model_config_name_or_path"),
    "pretrained_model_name_or_path": ("model", "init_from", "model_config_name_or_path"),
    "random_seed": ("seed",),
    "repo_id": ("hub_model_id",),
    "resume": ("resume_from_checkpoint",),
    "resume_checkpoint": ("resume_from_checkpoint",),
    "resume_from": ("resume_from_checkpoint",),
    "run_dir": ("output_dir", "run"),
    "sampling_steps": ("num_inference_steps",),
    "save_dir": ("output_dir",),
    "save_every": ("checkpointing_steps",),
    "save_interval": ("checkpointing_steps",),
    "save_steps": ("checkpointing_steps",),
    "schedule": ("ddpm_beta_schedule", "noise_schedule"),
    "sigma_small": ("variance_type",),
    "size": ("resolution",),
    "split": ("train_split", "bpd_split"),
    "steps": ("max_train_steps", "num_inference_steps", "update"),
    "t": ("ddpm_num_steps", "num_timesteps"),
    "tensorboard": ("report_to",),
    "timestep_respacing": ("num_inference_steps",),
    "timesteps": ("ddpm_num_steps", "num_inference_steps", "num_timesteps"),
    "token": ("hub_token",),
    "total_steps": ("max_train_steps",),
    "train_dir": ("train_data_dir",),
    "train_steps": ("max_train_steps",),
    "updates": ("max_train_steps",),
    "use_fp16": ("mixed_precision", "dtype"),
    "use_wandb": ("report_to",),
    "variance": ("variance_type",),
    "wandb": ("report_to",),
    "warmup": ("lr_warmup_steps",),
    "warmup_steps": ("lr_warmup_steps",),
    "wd": ("adam_weight_decay",),
    "weight_decay": ("adam_weight_decay",),
    "width": ("resolution",),
    "workers": ("dataloader_num_workers",),
}


def suggestion(name: str, known: Collection[str]) -> str:
    """Return the sentence " Did you mean ...?" for an unknown option, or where all options are listed.

    Args:
        name: What was typed, without dashes.
        known: The options that there are.
    """
    name = name.lower()
    meant = [other for other in MEANT.get(name, ()) if other in known]
    words = set(name.split("_"))
    parts = sorted((other for other in known if words <= set(other.split("_"))), key=len)
    alike = [near] if (near := nearest(name, known)) else []
    best = [*meant, *alike[: len(name) > 3], *parts, *alike][:1]
    return f" Did you mean --{best[0]}?" if best else " --help lists all options."
