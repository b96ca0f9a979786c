"""The model card: what config.json and eval.json hold, all of it, and nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import UNet2DModel
from hub_server import Hub
from hub_worker import Client, fixture_client, fixture_hub  # noqa: F401
from PIL import Image

from ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from ddpm_ext.evaluation.results import Provenance, Result
from ddpm_ext.hub.files import collect
from ddpm_ext.pipelines.identity import weights_hash
from ddpm_ext.publishing.model_card import MARK, export_card, render_card, write_card
from ddpm_ext.publishing.results import command_words, provenance_lines
from ddpm_ext.publishing.training_record import training_hours, training_rows
from ddpm_ext.run_dir import environment

ROOT = Path(__file__).resolve().parent.parent
CONFIG: dict[str, Any] = {
    "config": {
        "dataset_name": "uoft-cs/cifar10",
        "unet": "cifar10",
        "ddpm_num_steps": 1000,
        "ddpm_beta_schedule": "linear",
        "prediction_type": "epsilon",
        "variance_type": "fixed_large",
        "loss": "simple",
        "learning_rate": 2e-4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_weight_decay": 0.0,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 5000,
        "max_grad_norm": 1.0,
        "use_ema": True,
        "ema": "constant",
        "ema_max_decay": 0.9999,
        "dropout": 0.1,
        "random_flip": True,
        "mixed_precision": "no",
    },
    "seed": 7,
    "updates": 800_000,
    "global_batch": 128,
    "images": 50_000,
    "data_fingerprint": "cafe",
    "parameters": 35_746_307,
    "starts": [{"processes": 2, "commit": "abc123", "versions": {"torch": "2.13.0"}, "hardware": {"gpu": "H200"}}],
}
DATA = {"name": "uoft-cs/cifar10", "split": "test", "num_images": 10_000, "fingerprint": "beef"}


def figure(weights: str, metric: str, value: float, **more: Any) -> dict[str, Any]:
    return {
        "metric": metric,
        "model": "runs/a/pipeline",
        "weights": weights,
        "averaged": True,
        "value": value,
        "variance_type": "fixed_large",
        "num_inference_steps": 1000,
        "seed": 0,
        **more,
        "certificate": {**environment(), "date": "2026-01-02T03:04:05Z", "wall_time_s": 1.0},
    }


def figures(weights: str) -> list[dict[str, Any]]:
    parts = {"prior": 0.00001, "rate": 1.78, "decoder": 1.97, "standard_error_over_images": 0.01}
    samples = {
        "sampler": "ddpm",
        "num_samples": 50_000,
        "timestep_spacing": "leading",
        "extractor": {"name": "inception", "size": 299},
        "hand_off": "uint8",
        "reference": {**DATA, "split": "train"},
    }
    quality = {"precision": 0.6, "recall": 0.5, "density": 0.9, "coverage": 0.8}
    return [
        figure(weights, "bpd", 3.7512345678, parts=parts, dataset=DATA, decoder_variance="base", cdf="tanh"),
        figure(weights, "fid", 3.17, **samples),
        figure(weights, "prdc", 0.6, parts=quality, **samples),
    ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder of a CIFAR-10 training, with a tiny network."""
    run = tmp_path / "ddpm-cifar10"
    unet = UNet2DModel(
        sample_size=32, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    DDPMExtPipeline(unet, DDPMExtScheduler()).save_pretrained(run / "pipeline")
    (run / "config.json").write_text(json.dumps(CONFIG))
    (run / "eval.json").write_text(json.dumps({"format": 1, "figures": figures(weights_hash(unet))}))
    log = [{"update": 400_000, "images_per_second": 2000.0}, {"update": 800_000, "images_per_second": 4000.0}]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    for name in ("samples/step-00400000.png", "samples/step-00800000.png", "training.png", "plots/nearest.png"):
        (run / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(run / name)
    return run


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_front_matter_says_all_that_the_hub_asks(run: Path) -> None:
    data = front_matter(str(render_card(run, "alice/ddpm-cifar10", "apache-2.0")))
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert {"ddpm", "unconditional-image-generation", "pytorch"} <= set(data["tags"])
    assert data["datasets"] == ["uoft-cs/cifar10"]
    assert [entry["output"]["url"] for entry in data["widget"]] == ["samples/step-00800000.png", "training.png"]


def test_the_model_index_holds_every_metric_and_how_it_was_measured(run: Path) -> None:
    (index,) = front_matter(str(render_card(run, "alice/ddpm-cifar10")))["model-index"]
    assert index["name"] == "ddpm-cifar10"
    metrics = {m["type"]: (m, r["dataset"]) for r in index["results"] for m in r["metrics"]}
    values = {kind: metric["value"] for kind, (metric, _) in metrics.items()}
    assert values == {
        "bits_per_dim": 3.751235, "fid": 3.17, "precision": 0.6, "recall": 0.5, "density": 0.9, "coverage": 0.8
    }  # fmt: skip
    fid, dataset = metrics["fid"]
    assert (dataset["type"], dataset["split"]) == ("uoft-cs/cifar10", "train")
    assert "50,000 samples of ddpm, fixed_large in 1000 steps" in fid["name"]
    assert fid["args"]["extractor"] == {"name": "inception", "size": 299}
    assert fid["args"]["reference"]["fingerprint"] == "beef"
    assert {"commit", "hardware", "date", "seed", "weights", "hand_off"} <= fid["args"].keys()


def test_only_inceptions_features_make_an_fid(run: Path) -> None:
    record = json.loads((run / "eval.json").read_text())
    record["figures"][1]["extractor"]["name"] = "pixels"
    (run / "eval.json").write_text(json.dumps(record))
    text = str(render_card(run))
    assert "type: frechet_distance" in text and "type: fid" not in text


def test_the_text_has_usage_training_limits_cost_and_citation(run: Path) -> None:
    text = str(render_card(run, "alice/ddpm-cifar10"))
    assert "<Gallery />" in text
    assert 'DDPMPipeline.from_pretrained("alice/ddpm-cifar10")' in text
    assert 'DDPMExtPipeline.from_pretrained("alice/ddpm-cifar10")' in text
    assert "| Updates × batch | 800,000 × 128 |" in text
    assert "| Averaged weights | constant, decay 0.9999 |" in text
    assert "| Commit of ddpm_ext | abc123 |" in text
    assert "![Samples above their nearest training images](plots/nearest.png)" in text
    assert "Hardware: 2 × H200. Training time by the log: 11 hours." in text  # (400,000 · 128)(1/2000 + 1/4000) s
    assert "@inproceedings{ho2020denoising" in text
    assert "| 3.7512 |" in text and "seed 0" in text
    for name in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (run / name).is_file()
    body = text.split("# ddpm-cifar10")[1]
    assert "None" not in body and "{" not in body.split("## Training")[1].split("## Results")[0]


def test_a_card_without_a_hub_id_names_none(run: Path) -> None:
    for name in (None, "digits"):
        text = str(render_card(run, name))
        assert 'from_pretrained("<folder of the run>/pipeline")' in text and "This model is not on the Hub" in text
        assert 'from_pretrained("digits")' not in text and 'revision="<commit>"' not in text
    text = str(render_card(run, "alice/digits"))
    assert "is not on the Hub" not in text and text.count('from_pretrained("alice/digits")') == 2
    for shown in (text, str(render_card(run))):  # where the package is to be had
        assert "pip install ddpm-ext" in shown and "https://github.com/" in shown


@pytest.mark.parametrize("versions", [None, {}, {"torch": "2.13.0"}, {"ddpm-ext": "0.1.0"}])
@pytest.mark.parametrize("commit", [None, "abc123"])
def test_a_card_renders_from_a_checkout_or_an_installation(run: Path, versions: Any, commit: Any) -> None:
    record = json.loads((run / "eval.json").read_text())
    for one in record["figures"]:
        made = one["certificate"]
        one["certificate"] = {"command": made["command"], "versions": versions, "commit": commit, "date": None}
    (run / "eval.json").write_text(json.dumps(record))
    text = str(render_card(run, "alice/a"))
    line = next(line for line in text.splitlines() if line.startswith("- `"))
    version = (versions or {}).get("ddpm-ext")
    assert ("ddpm_ext 0.1.0" in line) == (version is not None) and ("at commit abc123" in line) == (commit is not None)
    assert ("ddpm_ext" in line.split("`")[2]) == (version is not None or commit is not None) and "None" not in line


@pytest.mark.parametrize(
    ("start", "options", "base", "words"),
    [
        ("google/ddpm-cifar10-32", {}, "google/ddpm-cifar10-32", "all weights were trained further"),
        (
            "google/ddpm-cifar10-32",
            {"freeze": ["down_blocks.*"]},
            "google/ddpm-cifar10-32",
            "its weights but for down_blocks.*",
        ),
        ("/home/me/runs/cats", {"lora_rank": 4}, None, "cifar10 and merged; begun anew: conv_out.weight"),
    ],
)
def test_a_fine_tuned_model_names_what_it_started_from(
    run: Path, start: str, options: dict[str, Any], base: str | None, words: str
) -> None:
    began = {"source": start, "base_model": base, "checkpoint": None, "new": ["conv_out.weight"], "loaded": 9}
    config = {**CONFIG["config"], **options}
    (run / "config.json").write_text(json.dumps({**CONFIG, "config": config, "init_from": began}))
    text = str(render_card(run, "alice/a", "mit"))
    assert front_matter(text).get("base_model") == base and front_matter(text)["license"] == "mit"
    assert words in text and "/home/me" not in text
    assert ("[google/ddpm-cifar10-32](https://huggingface.co/google" in text) == (base is not None)
    assert f"fine-tuned from {base or 'cats'} on uoft-cs/cifar10" in text


def test_what_is_not_known_is_left_out(run: Path, tmp_path: Path) -> None:
    full = str(render_card(run))
    bare = tmp_path / "bare"
    (run / "pipeline").rename(bare)
    text = str(render_card(bare, "alice/bare"))
    data = front_matter(text)
    assert not {"license", "datasets", "model-index", "widget"} & data.keys()
    for heading in ("## Training", "## Results", "## Environmental cost", "<Gallery />"):
        assert heading in full and heading not in text
    assert "has not been examined" in text and "## Fewer steps" not in text
    assert not re.findall(r"\d+\.\d+", text.split("# bare")[1].split("## Citation")[0])


def test_every_number_comes_from_the_two_files(run: Path) -> None:
    """The scores and the table change with the files, and with nothing else."""
    record = json.loads((run / "eval.json").read_text())
    record["figures"][1]["value"] = 4.25
    (run / "eval.json").write_text(json.dumps(record))
    (run / "config.json").write_text(json.dumps({"config": {"ddpm_num_steps": 500}}))
    text = str(render_card(run))
    assert "4.25" in text and "3.17" not in text
    assert "num_inference_steps=500" in text
    assert "| Diffusion steps T | 500 |" in text and "Optimiser" not in text and "Network |" not in text


def test_a_calibration_has_its_table_plot_and_certificate(run: Path, tmp_path: Path) -> None:
    weights = json.loads((run / "eval.json").read_text())["figures"][0]["weights"]
    rows = [
        figure(weights, "bpd", value, sampler=sampler, num_inference_steps=steps, dataset=DATA)
        for sampler, steps, value in (("fixed_small, even", 50, 24.07319), ("analytic, optimal", 50, 4.56462))
    ]
    other = figure("0123456789abcdef", "bpd", 1.2345, sampler="analytic, even", num_inference_steps=50, dataset=DATA)
    (run / "calibrated" / "plots").mkdir(parents=True)
    (run / "calibrated" / "calibration.json").write_text(json.dumps({"format": 1, "figures": [*rows, other]}))
    assert "bpd_against_steps" not in str(render_card(run))
    for name in ("bpd_against_steps", "fid_2000_pixels_against_steps"):
        Image.new("RGB", (8, 8)).save(run / "calibrated" / "plots" / f"{name}.png")
    _, section = str(render_card(run)).split("## Intended use")[0].split("## Fewer steps")  # once
    assert "bits/dim of 10,000 images of uoft-cs/cifar10 test" in section
    assert "| fixed_small, even | 24.0732 |" in section and "| analytic, optimal | **4.5646** |" in section
    assert "1.2345" not in section  # measured on other weights
    assert section.count("seed 0") == 1 and "(calibrated/plots/bpd_against_steps.png)" in section
    fid = "calibrated/plots/fid_2000_pixels_against_steps.png"
    assert f"![Fréchet distance against the number of network calls]({fid})" in section
    write_card(run)
    assert "calibrated/plots/bpd_against_steps.png" in collect(run, tmp_path / "staging")
    assert fid in collect(run, tmp_path / "staging")
    assert not any("calibration" in name for name in collect(run, tmp_path / "staging"))


def test_scores_of_other_weights_are_left_out(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = json.loads((run / "eval.json").read_text())
    record["figures"][1]["weights"] = "0123456789abcdef"
    (run / "eval.json").write_text(json.dumps(record))
    text = str(render_card(run))
    assert "3.17" not in text and "3.7512" in text
    assert "1 of 3 results" in caplog.text


@pytest.mark.parametrize(
    ("key", "word"), [("variance_type", "learned"), ("prediction_type", "posterior_mean"), ("num_class_embeds", 10)]
)
def test_stock_usage_is_shown_only_where_stock_can_sample(run: Path, key: str, word: Any) -> None:
    if key == "num_class_embeds":
        path = run / "pipeline" / "unet" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: word}))
        (run / "eval.json").unlink()
    else:
        (run / "config.json").write_text(json.dumps({**CONFIG, "config": {**CONFIG["config"], key: word}}))
    text = str(render_card(run))
    assert "from diffusers import DDPMPipeline" not in text
    assert "Diffusers alone cannot sample this model: " in text
    assert ("class_labels=0" in text) == (key == "num_class_embeds")


def test_a_card_of_ones_own_is_kept(run: Path) -> None:
    path = write_card(run, "alice/a")
    assert path is not None and MARK in path.read_text()
    assert write_card(run, "alice/b") == path and "alice/b" in path.read_text()
    path.write_text(path.read_text().replace(MARK, ""))
    mine = path.read_text()
    assert write_card(run, "alice/c") is None and path.read_text() == mine


def test_every_picture_of_the_card_is_pushed_and_exported_with_it(run: Path, tmp_path: Path) -> None:
    write_card(run, "alice/ddpm-cifar10", "mit")
    shown = {"samples/step-00800000.png", "training.png", "plots/nearest.png"}
    assert {name for name in collect(run, tmp_path / "staging") if name.endswith(".png")} == shown
    export_card(run, tmp_path / "card")
    assert front_matter((tmp_path / "card" / "README.md").read_text())["license"] == "mit"  # of the run's card
    assert {p.relative_to(tmp_path / "card").as_posix() for p in (tmp_path / "card").rglob("*.png")} == shown


def test_a_command_is_shown_without_the_folders_of_its_machine() -> None:
    words = [
        "evaluate.py",
        "--model",
        "runs/a/pipeline",
        "--cache",
        "/home/me/cache",
        "--out=/home/me/out",
        "--x",
        "1/2",
    ]
    assert command_words(words) == "evaluate.py --model runs/a/pipeline --cache cache --out=out --x 1/2"


def test_the_table_of_the_training_says_depth_and_classes() -> None:
    data: dict[str, Any] = {"bits": 16, "value_range": None, "class_names": ["ant", "bee"], "class_counts": [1200, 3]}
    rows = dict(training_rows({"data": data}))
    assert rows["Depth"] == "16 bits" and rows["Classes"] == "ant: 1,200, bee: 3"
    rows = dict(training_rows({"data": {**data, "bits": 12, "value_range": [0.0, 4095.0], "class_names": None}}))
    assert rows["Depth"] == "12 bits, stored values 0 to 4095" and rows["Classes"] == "0: 1,200, 1: 3"
    rows = dict(training_rows({"data": {"bits": 8, "class_counts": [5] * 12}}))
    assert "Depth" not in rows and rows["Classes"].endswith("9: 5, … (12 classes)")
    assert not {"Depth", "Classes"} & dict(training_rows({"data": {"bits": 8}})).keys()


def test_hours_by_hand() -> None:
    log = [{"update": 10, "images_per_second": 1.0}, {"update": 20}, {"update": 30, "images_per_second": 2.0}]
    assert training_hours(log, 360) == pytest.approx((10 * 360 / 1 + 20 * 360 / 2) / 3600)
    assert training_hours([], 360) is None and training_hours(log, None) is None


def test_the_cards_of_the_repository_show_the_numbers_of_the_files_beside_them() -> None:
    cards = sorted((ROOT / "model_cards").glob("*/README.md"))
    assert ROOT / "model_cards" / "digits" / "README.md" in cards
    for card in cards:
        text = card.read_text()
        for name in re.findall(r"\]\(([\w./-]+\.png)\)", text):
            assert (card.parent / name).is_file(), name
        figures = json.loads((card.parent / "eval.json").read_text())["figures"]
        figures += json.loads((card.parent / "calibrated" / "calibration.json").read_text())["figures"]
        assert len(figures) > 20
        for one in figures:
            assert re.search(rf"[| *]({one['value']:.4f}|{one['value']:.4g})[ *|]", text), one["value"]
            assert one["certificate"]["commit"] in text and not one["certificate"]["commit"].endswith("dirty")
            assert one["weights"] in text


def validate(folder: str) -> None:
    from huggingface_hub import ModelCard

    ModelCard.load(f"{folder}/README.md").validate()


def test_the_hub_accepts_it(hub: Hub, client: Client, run: Path) -> None:
    write_card(run, "alice/ddpm-cifar10", "apache-2.0")
    client(validate, str(run))
    assert hub.requests("POST", "/api/validate-yaml") == [200]
    write_card(run, "alice/ddpm-cifar10", "no such licence")
    with pytest.raises(ValueError, match=r"must be one of .'apache-2.0'"):
        client(validate, str(run))


def test_a_line_of_provenance_says_command_weights_code_machine_and_day() -> None:
    command = ["ddpm-ext", "evaluate", "--model=/home/me/runs/digits"]
    made = Provenance(command=command, versions={"ddpm-ext": "0.1.0"}, commit="abc", date="2026-01-02T03:04:05Z")
    on_gpu, on_cpu = {"gpu": "H200", "processor": "EPYC", "cores": 8}, {"processor": "EPYC", "cores": 8}
    results = [
        Result(metric=metric, value=1.0, averaged=averaged, seed=3, weights="w", provenance=replace(made, hardware=on))
        for metric, averaged, on in (("fid", True, on_gpu), ("kid", True, on_gpu), ("fid", False, on_cpu))
    ]
    code = "ddpm_ext 0.1.0 at commit abc"
    assert provenance_lines(results) == [
        f"`ddpm-ext evaluate --model=digits`, {weights}, seed 3, weights w, {code}, {on}, 2026-01-02"
        for weights, on in (("averaged weights", "H200"), ("weights as trained", "EPYC, 8 cores"))
    ]
    assert provenance_lines([Result(metric="fid", value=1.0, provenance=Provenance(command=["x"]))]) == ["`x`"]
