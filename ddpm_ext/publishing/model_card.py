"""config.json + eval.json of a run, and calibration.json where it was calibrated -> its model card.

Every number comes from those files; what they do not hold is left out of the card, never guessed. Scores of other
weights than those in pipeline/ are left out, too.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.report import NAMES, data_words, markdown, sampler_words
from ..evaluation.results import Result, read_results
from ..hub.files import RENDERED, find_pipeline, shown_images
from ..pipelines.identity import weights_hash
from ..run_dir import RunDir, read_json, write_atomically

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("template.md")
TASK = "unconditional-image-generation"
MARK = f"{RENDERED}config.json and eval.json; without this line the card is yours and is kept. -->"
SINGLE = {"bpd": "bits_per_dim", "rate_distortion": "distortion_rmse", "is": "inception_score"}
CAPTIONS = {
    "training.png": "Loss and learning rate over the training",
    "plots/progressive.png": "Progressive generation: the predicted x_0 as the chain runs",
}
CALIBRATION = "calibrated/calibration.json"
BITS_PLOT = "calibrated/plots/bpd_against_steps.png"
SHOWN = ("log.jsonl", *CAPTIONS, "plots/nearest.png", CALIBRATION, BITS_PLOT)  # what a card reads or shows, too
STOCK_CANNOT = {"learned": "its variance is learned as a logarithm", "posterior_mean": "it predicts the posterior mean"}


def write_card(run: str | Path, repo_id: str | None = None, license: str | None = None) -> Path | None:
    """Write README.md into a run folder; None where the one there was written by hand, which is kept.

    Args:
        run: A run folder.
        repo_id: Its repository on the Hub, for the usage lines; None takes the run's name.
        license: Licence of the weights, by the Hub's name such as "apache-2.0"; None takes that of the card there, or
            leaves it out.
    """
    path = Path(run) / "README.md"
    if path.exists():
        if MARK not in path.read_text(encoding="utf-8"):
            return None
        license = license or ModelCard.load(path, ignore_metadata_errors=True).data.get("license")
    write_atomically(path, str(render_card(run, repo_id, license)))
    return path


def export_card(run: str | Path, folder: str | Path, repo_id: str | None = None, license: str | None = None) -> Path:
    """Write the card, its pictures and the files that its numbers come from into a folder of their own."""
    run, folder = Path(run), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    card = folder / "README.md"
    write_atomically(card, str(render_card(run, repo_id, license)))
    shown = set(re.findall(r"\]\(([\w./-]+\.png)\)", card.read_text(encoding="utf-8")))
    for name in shown | {name for name in ("config.json", "eval.json", CALIBRATION) if (run / name).is_file()}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / name, folder / name)
    return card


def render_card(run: str | Path, repo_id: str | None = None, license: str | None = None) -> ModelCard:
    """The card of a run folder; arguments as in `write_card`."""
    run = Path(run)
    record = read_json(run / "config.json") if (run / "config.json").is_file() else {}
    results, calibrated = own_results(run, "eval.json"), own_results(run, CALIBRATION)
    repo_id = str(repo_id or record.get("config", {}).get("hub_model_id") or run.resolve().name)
    network = network_config(run)
    shown = gallery(run)
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["ddpm", TASK, "pytorch", "ddpm_ext"],
        datasets=hub_datasets(record),
        model_name=repo_id.split("/")[-1],
        eval_results=[entry for result in results for entry in eval_results(result)] or None,
        widget=[{"text": p["caption"], "output": {"url": p["path"]}} for p in shown] or None,
        ignore_metadata_errors=False,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        summary=summary(record, network),
        pictures=shown,
        training=training_rows(record),
        results=markdown(results).strip(),
        provenance=provenance_lines(results),
        few_steps=markdown(calibrated).strip(),
        few_steps_provenance=provenance_lines(calibrated),
        few_steps_plot=BITS_PLOT if calibrated and (run / BITS_PLOT).is_file() else None,
        data=data_of(record),
        size=size_words(network),
        T=record.get("config", {}).get("ddpm_num_steps"),
        classes=network.get("num_class_embeds"),
        nearest="plots/nearest.png" if (run / "plots" / "nearest.png").is_file() else None,
        cost=cost(run, record),
        mark=MARK,
        **stock(record, network),
    )


# What the files hold --------------------------------------------------------------------------------------------------


def own_results(run: Path, name: str) -> list[Result]:
    """Return the results of a file of the run that were measured on the weights in pipeline/."""
    results = read_results(run / name)
    if not results:
        return []
    unet = UNet2DModel.from_pretrained(str(pipeline_of(run) / "unet"), low_cpu_mem_usage=False)  # it may be a thread
    weights = weights_hash(unet)  # pyright: ignore[reportArgumentType]
    own = [result for result in results if result.weights == weights]
    if len(own) < len(results):
        logger.warning(
            "%d of %d results in %s are of other weights than pipeline/ and are left out of the card: measure again.",
            len(results) - len(own),
            len(results),
            run / name,
        )
    return own


def pipeline_of(run: Path) -> Path:
    """The folder of the pipeline: the run's, or the folder itself where it is one."""
    return find_pipeline(run) or run / "pipeline"


def network_config(run: Path) -> dict[str, Any]:
    """The configuration of the run's network; empty where there is none."""
    path = pipeline_of(run) / "unet" / "config.json"
    return read_json(path) if path.is_file() else {}


def hub_datasets(record: Mapping[str, Any]) -> list[str] | None:
    """The data set, where it is one of the Hub: a name with one slash that is no folder."""
    name = record.get("config", {}).get("dataset_name")
    return [name] if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None


def data_of(record: Mapping[str, Any]) -> str | None:
    """The training data in words."""
    config = record.get("config")
    if config is None:
        return None
    if config.get("train_data_dir"):
        return f"the folder {Path(config['train_data_dir']).name}"
    if config.get("dataset_name") in (None, "digits"):
        return "handwritten digits (UCI Optical Recognition of Handwritten Digits, CC BY 4.0)"
    name = str(config["dataset_name"])
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else f"the folder {Path(name).name}"


def size_words(network: Mapping[str, Any]) -> str | None:
    """Size and channels of the pictures in words; None where the network does not say."""
    size = network.get("sample_size")
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return f"{height}×{width}, {network['in_channels']} channel{'s' * (network['in_channels'] > 1)}"


def summary(record: Mapping[str, Any], network: Mapping[str, Any]) -> str:
    """One sentence: what the model is."""
    parts = ["A denoising diffusion probabilistic model (DDPM)"]
    if size := size_words(network):
        parts.append(f"for pictures of {size}")
    if data := data_of(record):
        parts.append(f"trained on {data}")
    return ", ".join([" ".join(parts[:2]), *parts[2:]]) + "."


def stock(record: Mapping[str, Any], network: Mapping[str, Any]) -> dict[str, Any]:
    """Whether Diffusers by itself can sample the model, and why not."""
    config = record.get("config", {})
    reasons = [
        STOCK_CANNOT[word] for key in ("variance_type", "prediction_type") if (word := config.get(key)) in STOCK_CANNOT
    ]
    if network.get("num_class_embeds") is not None:
        reasons.append("its pipeline takes no class labels")
    return {"stock_can_sample": not reasons, "why_not_stock": " and ".join(reasons)}


def gallery(run: Path) -> list[dict[str, str]]:
    """Pictures of the gallery: the newest samples first."""
    newest = [name for name in shown_images(run) if name.startswith("samples/")][-1:]
    found = [{"path": name, "caption": sample_caption(name)} for name in newest]
    return found + [{"path": name, "caption": text} for name, text in CAPTIONS.items() if (run / name).is_file()]


def sample_caption(name: str) -> str:
    """What a grid of samples is called, by the update in its name."""
    update = re.search(r"step-0*(\d+)", name)
    return f"Samples after update {int(update[1]):,}" if update else "Samples"


def training_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The table of the training: label and value, without what is not known."""
    config, start = record.get("config", {}), (record.get("starts") or [{}])[-1]
    versions = start.get("versions", {})
    known = {
        **config,
        **{k: record.get(k) for k in ("images", "parameters", "updates", "global_batch", "data_fingerprint")},
    }
    rows = (
        ("Data", f"{data_of(record)}, {{images:,}} pictures, fingerprint {{data_fingerprint}}"),
        ("Network", "UNet2DModel, preset {unet}"),
        ("Parameters", "{parameters:,}"),
        ("Diffusion steps T", "{ddpm_num_steps}"),
        ("Noise schedule", "{ddpm_beta_schedule}"),
        ("Prediction, variance, loss", "{prediction_type}, {variance_type}, {loss}"),
        ("Updates × batch", "{updates:,} × {global_batch}"),
        (
            "Optimiser",
            "Adam, learning rate {learning_rate:g}, β {adam_beta1}, {adam_beta2}, weight decay {adam_weight_decay:g}",
        ),
        ("Learning rate", "{lr_scheduler}, {lr_warmup_steps} updates of warm-up"),
        ("Gradient clipping", "global norm {max_grad_norm:g}"),
        (
            "Averaged weights",
            "{ema}, decay {ema_max_decay:g}" if config.get("use_ema") else "none" if config else "",
        ),
        ("Dropout", "{dropout}"),
        ("Mirrored pictures", ("yes" if config["random_flip"] else "no") if "random_flip" in config else ""),
        ("Precision", "float32" if config.get("mixed_precision") == "no" else "{mixed_precision}"),
        ("Seed", "{seed}"),
        ("Commit of ddpm_ext", str(start["commit"]) if start.get("commit") else ""),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    )
    filled = [(label, fill(text, known)) for label, text in rows]
    return [(label, value) for label, value in filled if value]


def fill(text: str, known: Mapping[str, Any]) -> str:
    """The text with its fields filled in; nothing where one of them is not known."""
    fields = re.findall(r"\{(\w+)", text)
    return (
        "" if any(known.get(name) is None for name in fields) else text.format(**{name: known[name] for name in fields})
    )


def cost(run: Path, record: Mapping[str, Any]) -> str | None:
    """Hardware and hours of the training; None where neither is known."""
    devices = [device for start in record.get("starts") or [] if (device := device_words(start))]
    parts = [f"Hardware: {', then '.join(dict.fromkeys(devices))}."] if devices else []
    if hours := training_hours(RunDir(run).read_log(), record.get("global_batch")):
        parts.append(f"Training time by the log: {hours:.2g} hours.")
    return " ".join(parts) or None


def device_words(start: Mapping[str, Any]) -> str | None:
    """What one start of a training ran on; None where it is not known."""
    hardware = start.get("hardware") or {}
    if hardware.get("gpu"):
        return f"{start.get('processes', 1)} × {hardware['gpu']}"
    return f"{hardware['processor']}, {hardware.get('cores')} cores" if hardware.get("processor") else None


def training_hours(log: Sequence[Mapping[str, Any]], global_batch: int | None) -> float | None:
    """Hours spent in updates: the pictures of each log interval over its speed."""
    seconds, before = 0.0, 0
    for line in log:
        if global_batch and line.get("images_per_second"):
            seconds += (line["update"] - before) * global_batch / line["images_per_second"]
            before = line["update"]
    return seconds / 3600 or None


# Scores ---------------------------------------------------------------------------------------------------------------


def eval_results(result: Result) -> list[EvalResult]:
    """Return entries of the model-index: one per number, with how it was measured in its name and arguments."""
    dataset = result.dataset or result.reference
    assert dataset is not None
    left_out = ("value", "parts", "rows", "certificate", "metric", "model")
    arguments = {name: value for name, value in result.to_json().items() if name not in left_out}
    if result.provenance is not None:
        made = result.provenance
        arguments |= {"commit": made.commit, "hardware": made.hardware or None, "date": made.date or None}
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset.name,
            dataset_name=dataset.name,
            dataset_split=dataset.split,
            metric_type=kind,
            metric_value=float(f"{value:.7g}"),
            metric_name=name,
            metric_args={name: value for name, value in arguments.items() if value is not None},
        )
        for kind, name, value in numbers(result)
        if math.isfinite(value)
    ]


def numbers(result: Result) -> list[tuple[str, str, float]]:
    """Return (type, name with conditions, value) of each number of a result."""
    metric, how = result.metric, conditions(result)
    if metric == "prdc":
        return [(name, f"{name} ({how})", value) for name, value in (result.parts or {}).items()]
    name = NAMES.get(metric, metric.replace("_", " "))
    kind = SINGLE.get(metric, metric)
    if metric == "fid" and (result.extractor or {}).get("name") != "inception":
        kind = "frechet_distance"  # FID is of Inception's features alone
    return [(kind, f"{name} ({how})", result.value)]


def conditions(result: Result) -> str:
    """Return how a result was measured, in words."""
    if result.dataset is not None:
        return f"{result.variance_type}, {result.num_inference_steps} steps, {data_words(result.dataset)}"
    assert result.extractor is not None and result.reference is not None
    return (
        f"{result.extractor['name']}, {result.num_samples:,} samples of {sampler_words(result)} in "
        f"{result.num_inference_steps} steps, to {data_words(result.reference)}"
    )


def command_words(words: Sequence[str]) -> str:
    """A command line without the folders of the machine that it ran on."""
    return " ".join(re.sub(r"(^|(?<==))/\S*/(?=\S)", "", word) for word in words)


def provenance_lines(results: Sequence[Result]) -> list[str]:
    """Return one line per evaluation command."""
    lines = []
    for result in results:
        made = result.provenance
        if made is None:
            continue
        hardware = made.hardware["gpu"] or f"{made.hardware['processor']}, {made.hardware['cores']} cores"
        words = [made.versions.get("ddpm-ext"), f"at commit {made.commit}" if made.commit else None]
        version = " ".join(word for word in words if word)  # a checkout knows the commit alone
        parts = [
            f"`{command_words(made.command)}`",
            {True: "averaged weights", False: "weights as trained"}.get(bool(result.averaged))
            if result.averaged is not None
            else None,
            f"seed {result.seed}",
            f"weights {result.weights}",
            f"ddpm_ext {version}" if version else None,
            hardware,
            made.date[:10],
        ]
        lines.append(", ".join(part for part in parts if part))
    return list(dict.fromkeys(lines))
