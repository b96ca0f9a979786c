"""config.json + eval.json of a run, and calibration.json where it was calibrated -> its model card.

Every number comes from those files; what they do not hold is left out of the card, never guessed. Scores of other
weights than those in pipeline/ are left out, too.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from ..diffusion.words import INDEX
from ..evaluation.report import markdown
from ..hub.files import RENDERED, shown_images
from ..models.classes import number_of_classes
from ..models.values import image_size
from ..run_dir import JsonRecord, read_json, write_atomically
from .licenses import License, as_license, license_of
from .results import TASK, model_index, provenance_lines, results_of
from .training_record import Record, base_model, compute_cost, hub_datasets, summary, training_data, training_rows

__all__ = ["MARK", "SHOWN", "STOCK_CANNOT", "export_card", "render_card", "write_card"]

MARK = f"{RENDERED}config.json and eval.json; without this line the card is yours and is kept. -->"
_TEMPLATE = Path(__file__).with_name("template.md")
_CAPTIONS = {
    "training.png": "Loss and learning rate over the training",
    "plots/progressive.png": "Progressive generation: the predicted x_0 as the chain runs",
}
_CALIBRATION = "calibrated/calibration.json"
_PLOTS = {  # patterns of files below a run -> what they show, one curve per sampler
    "calibrated/plots/bpd_against_steps.png": "Bits/dim against the number of steps",
    "calibrated/plots/fid_*_against_steps.png": "Fréchet distance against the number of network calls",
}
_NEAREST = "plots/nearest.png"
SHOWN = ("log.jsonl", *_CAPTIONS, _NEAREST, _CALIBRATION, *_PLOTS)  # what a card reads or shows, too
STOCK_CANNOT = {
    "learned": "its variance is learned as a logarithm",
    "posterior_mean": "it predicts the posterior mean",
}


def write_card(run: str | Path, repo_id: str | None = None, license: str | License | None = None) -> Path | None:
    """Write README.md into a run folder; None where the one there was written by hand, which is kept.

    Args:
        run: A run folder.
        repo_id: Its repository on the Hub, "user/model", for the usage lines; None where there is none.
        license: Licence of the weights, by the Hub's name such as "apache-2.0"; None takes that of the card there, or
            of the model that the training started from, or leaves it out.
    """
    path = Path(run) / "README.md"
    if path.exists() and MARK not in path.read_text(encoding="utf-8"):
        return None
    write_atomically(path, str(render_card(run, repo_id, license or license_of(run))))
    return path


def export_card(
    run: str | Path, folder: str | Path, repo_id: str | None = None, license: str | License | None = None
) -> Path:
    """Write the card, its images and the files that its numbers come from into a folder of their own.

    Args:
        run: A run folder.
        folder: Where to; made if missing.
        repo_id: As in `write_card`.
        license: As there.
    """
    run, folder = Path(run), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    card = folder / "README.md"
    write_atomically(card, str(render_card(run, repo_id, license or license_of(run))))
    shown = set(re.findall(r"\]\(([\w./-]+\.png)\)", card.read_text(encoding="utf-8")))
    for name in shown | {name for name in ("config.json", "eval.json", _CALIBRATION) if (run / name).is_file()}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run / name, folder / name)
    return card


def render_card(run: str | Path, repo_id: str | None = None, license: str | License | None = None) -> ModelCard:
    """Return the card of a run folder.

    Args:
        run: A run folder, or the folder of a pipeline alone.
        repo_id: As in `write_card`; a name without an owner is a title only.
        license: As there.
    """
    run = Path(run)
    record = read_json(run / "config.json") if (run / "config.json").is_file() else {}
    pipeline = run if (run / INDEX).is_file() else run / "pipeline"
    results, few_steps = (results_of(run / name, pipeline / "unet") for name in ("eval.json", _CALIBRATION))
    repo_id = str(repo_id or (record.get("config") or {}).get("hub_model_id") or run.resolve().name)
    is_on_hub = "/" in repo_id
    network = _network_config(pipeline)
    size, base, images = _size_words(network), base_model(record), _gallery(run)
    named = as_license(license)
    of_license: JsonRecord = {} if named is None else named.entries()
    data = ModelCardData(
        **of_license,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["ddpm", TASK, "pytorch", "ddpm_ext"],
        datasets=hub_datasets(record),
        base_model=base.on_hub if base else None,
        base_model_relation="finetune" if base and base.on_hub else None,
        model_name=repo_id.split("/")[-1],
        eval_results=model_index(results),
        widget=[{"text": image["caption"], "output": {"url": image["path"]}} for image in images] or None,
        ignore_metadata_errors=False,
    )
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=repo_id.split("/")[-1],
        place=repo_id if is_on_hub else "<folder of the run>/pipeline" if pipeline != run else "<this folder>",
        is_on_hub=is_on_hub,
        summary=summary(record, size),
        images=images,
        base=base,
        training=training_rows(record),
        results=markdown(results).strip(),
        provenance=provenance_lines(results),
        few_steps=markdown(few_steps).strip(),
        few_steps_provenance=provenance_lines(few_steps),
        few_steps_plots=_plots(run) if few_steps else [],
        data=training_data(record),
        size=size,
        T=(record.get("config") or {}).get("ddpm_num_steps"),
        classes=number_of_classes(network),
        nearest=_NEAREST if (run / _NEAREST).is_file() else None,
        cost=compute_cost(run, record),
        mark=MARK,
        why_not_stock=" and ".join(_reasons_against_stock(record, network)),
    )


def _network_config(pipeline: Path) -> Record:
    """Return the configuration of the run's network; empty where there is none."""
    paths = (pipeline / "unet" / "config.json", pipeline / "config.json")  # the second of a flat pipeline
    return next((read_json(path) for path in paths if path.is_file()), {})


def _size_words(network: Record) -> str | None:
    """Return size and channels of the images in words; None where the network does not say."""
    if network.get("sample_size") is None:
        return None
    height, width = image_size(network)
    return f"{height}×{width}, {network['in_channels']} channel{'s' * (network['in_channels'] > 1)}"


def _reasons_against_stock(record: Record, network: Record) -> Iterable[str]:
    """Yield why Diffusers by itself cannot sample the model."""
    config = record.get("config") or {}
    for name in ("variance_type", "prediction_type"):
        if (word := config.get(name)) in STOCK_CANNOT:
            yield STOCK_CANNOT[word]
    if network.get("num_class_embeds") is not None:
        yield "its pipeline takes no class labels"


def _plots(run: Path) -> list[dict[str, str]]:
    """Return path and caption of the plots of a calibration."""
    found = ((path, caption) for pattern, caption in _PLOTS.items() for path in sorted(run.glob(pattern)))
    return [{"path": path.relative_to(run).as_posix(), "caption": caption} for path, caption in found]


def _gallery(run: Path) -> list[JsonRecord]:
    """Return path and caption of the gallery's images: the newest samples first."""
    newest = [name for name in shown_images(run) if name.startswith("samples/")][-1:]
    found = [{"path": name, "caption": _sample_caption(run / name)} for name in newest]
    return found + [{"path": name, "caption": text} for name, text in _CAPTIONS.items() if (run / name).is_file()]


def _sample_caption(grid: Path) -> str:
    """Return what a grid of samples is called: by the update in its name, and by what it says of depth and bands."""
    update = re.search(r"step-0*(\d+)", grid.name)
    name = f"Samples after update {int(update[1]):,}" if update else "Samples"
    words = None
    with suppress(OSError), Image.open(grid) as image:
        words = image.info.get("Description")
    return f"{name} ({words})" if words else name
