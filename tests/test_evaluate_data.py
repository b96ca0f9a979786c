"""What is measured is what was trained on: the run's own record decides, or the options, and nothing is guessed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from networks import tiny_scheduler, tiny_unet
from pictures import save_pictures
from PIL import Image

from ddpm_ext import DDPMExtPipeline
from ddpm_ext.data.dataset import load_images
from ddpm_ext.data.spec import DataSpec
from ddpm_ext.errors import UserError
from ddpm_ext.evaluation import evaluate as module
from ddpm_ext.evaluation.bound.bits_per_dim import bits_per_dim
from ddpm_ext.evaluation.calibrate import calibrate
from ddpm_ext.evaluation.config import CalibrateConfig, EvalConfig
from ddpm_ext.evaluation.evaluate import evaluate
from ddpm_ext.evaluation.features import samples
from ddpm_ext.evaluation.features.metrics import feature_statistics, frechet_distance, frechet_distance_per_class
from ddpm_ext.evaluation.images import class_labels
from ddpm_ext.evaluation.report import data_words, markdown
from ddpm_ext.evaluation.results import Result, read_results, write_results
from ddpm_ext.models.values import value_options
from ddpm_ext.signals import Stopped

ROOT = Path(__file__).resolve().parent.parent


def network(**changes: Any) -> UNet2DModel:
    extra = {name: changes.pop(name) for name in ("_ddpm_ext",) if name in changes}
    unet = tiny_unet(**{"block_out_channels": (8, 8), **changes})
    unet.register_to_config(**extra)
    return unet


def save_run(folder: Path, unet: UNet2DModel, spec: DataSpec | None) -> Path:
    """A run folder as training leaves it; without a spec the pipeline alone."""
    DDPMExtPipeline(unet, tiny_scheduler()).save_pretrained(str(folder / "pipeline"))
    if spec is not None:
        record = {"config": {"use_ema": True}, "network": {}, "data": spec.to_dict()}
        (folder / "config.json").write_text(json.dumps(record))
    return folder


def measure(run: Path, **options: Any) -> list[Result]:
    usual: dict[str, Any] = {
        "metrics": "fid",
        "extractor": "pixels",
        "num_samples": 6,
        "num_inference_steps": "3",
        "reference_cache": str(run / "references"),
        "cpu": True,
    }
    return evaluate(EvalConfig(model=str(run), **{**usual, **options}))


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Six wide images, whose crops differ by their place."""
    return save_pictures(tmp_path / "wide", 6, (8, 24))


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where the network is asked."""

    def forward(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(UNet2DModel, "forward", forward)


# Which images ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unasked")
def test_without_a_record_nothing_is_measured_on_data_that_nobody_named(tmp_path: Path) -> None:
    """A pipeline by itself, one copied out of its run, and one beside the config.json of something else."""
    spec = load_images("digits").spec
    save_run(tmp_path / "alone", network(), None)
    save_run(tmp_path / "run", network(), spec)
    shutil.copytree(tmp_path / "run" / "pipeline", tmp_path / "copy")
    save_run(tmp_path / "beside", network(), None)
    (tmp_path / "beside" / "config.json").write_text("{}")
    for model in ("alone", "alone/pipeline", "copy", "beside"):
        sentence = r"Nothing says on which images .*--dataset_name .*--data_dir\.$"
        for metrics in ("fid", "bpd"):
            with pytest.raises(UserError, match=sentence):
                measure(tmp_path / model, metrics=metrics, plots=True)
        config = CalibrateConfig(
            model=str(tmp_path / model), num_inference_steps="5", extractor="pixels", cpu=True, plots=False
        )
        with pytest.raises(UserError, match=sentence):
            calibrate(config)
        assert not list(tmp_path.rglob("*.safetensors.tmp")) and not list(tmp_path.rglob("eval.json"))


def test_a_run_of_the_digits_is_measured_on_them_wherever_it_lies(tmp_path: Path) -> None:
    save_run(tmp_path / "run", network(), load_images("digits").spec)
    (first,) = measure(tmp_path / "run", max_reference_images=40)
    (tmp_path / "run").rename(tmp_path / "renamed")
    (again,) = measure(tmp_path / "renamed", max_reference_images=40)
    assert first.reference is not None and first.reference.name == "digits"
    assert first.reference.departures == [] and first.averaged is True
    assert again.value == first.value
    assert len(read_results(tmp_path / "renamed" / "eval.json")) == 1  # it is the same result


def test_crops_lie_where_training_cut_them_and_another_place_must_be_asked_for(wide: Path, tmp_path: Path) -> None:
    trained = load_images(train_data_dir=str(wide), resolution=8, channels=1, center_crop=False)
    centred = load_images(train_data_dir=str(wide), resolution=8, channels=1)
    run = save_run(tmp_path / "run", network(), trained.spec)
    (found,) = measure(run)
    (departed,) = measure(run, center_crop=True)
    for result, images in ((found, trained), (departed, centred)):
        assert result.reference is not None
        assert result.reference.fingerprint == images.fingerprint
        assert result.reference.center_crop is images.spec.center_crop
    assert found.reference is not None and found.reference.departures == []
    assert departed.reference is not None and departed.reference.departures is not None
    assert departed.reference.departures[0] == "center crop is True; the run was trained with False."
    assert found.value != departed.value
    assert len(read_results(run / "eval.json")) == 2


def test_other_data_that_is_named_is_a_departure_and_keeps_size_and_channels(wide: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", network(), load_images("digits").spec)
    (found,) = measure(run, data_dir=str(wide))
    assert found.reference is not None and found.reference.departures is not None
    assert found.reference.resolution == [1, 8, 8] and found.reference.name == str(wide)
    assert any("data dir" in sentence and str(wide) in sentence for sentence in found.reference.departures)
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(wide / "new.png")
    folder = load_images(train_data_dir=str(wide), resolution=8, channels=1)
    other = save_run(tmp_path / "other", network(), folder.spec)
    (wide / "new.png").unlink()  # the folder is no longer what it was
    (changed,) = measure(other)
    assert changed.reference is not None and changed.reference.departures is not None
    assert any("num images is 6; the run was trained with 7" in sentence for sentence in changed.reference.departures)


def test_a_run_that_streamed_has_no_departure(wide: Path, tmp_path: Path) -> None:
    from ddpm_ext.data.streaming import stream_images

    stream = stream_images(train_data_dir=str(wide), resolution=8, channels=1)
    (found,) = measure(save_run(tmp_path / "run", network(), stream.spec))
    assert found.reference is not None and found.reference.departures == []


@pytest.mark.usefixtures("unasked")
def test_the_record_of_another_network_is_refused(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", network(in_channels=3, out_channels=3), load_images("digits").spec)
    with pytest.raises(UserError, match=r"is of another run: it trained on images of 1 x \(8, 8\)"):
        measure(run)


@pytest.mark.usefixtures("unasked")
def test_a_split_that_is_not_there_names_its_option(wide: Path, tmp_path: Path) -> None:
    spec = load_images(train_data_dir=str(wide), resolution=8, channels=1).spec
    run = save_run(tmp_path / "run", network(), spec)
    with pytest.raises(UserError, match=r"'test'.*--bpd_split"):
        measure(run, metrics="fid,bpd")
    with pytest.raises(UserError, match=r"'test'.*--test_split"):
        calibrate(CalibrateConfig(model=str(run), metrics="bpd", num_inference_steps="5", cpu=True, plots=False))


def test_depth_is_that_of_the_network_where_no_record_says_it(tmp_path: Path) -> None:
    """A 16-bit network by itself: the same levels as training read, and the bound of 2^16 of them."""
    (tmp_path / "deep").mkdir()
    draw = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(draw.integers(0, 65536, (8, 8), dtype=np.uint16)).save(tmp_path / "deep" / f"{i}.png")
    unet = network(_ddpm_ext=value_options(16))
    save_run(tmp_path / "alone", unet, None)
    images = load_images(train_data_dir=str(tmp_path / "deep"), resolution=8, channels=1, bits=16)
    (found,) = measure(
        tmp_path / "alone", metrics="bpd", bpd_split="train", data_dir=str(tmp_path / "deep"), max_bpd_images=2
    )
    assert found.dataset is not None and found.dataset.fingerprint == images.fingerprint
    assert found.to_json()["dataset"]["bits"] == 16
    assert data_words(found.dataset) == f"2 images of {tmp_path / 'deep'} train at 16 bits"
    scheduler = tiny_scheduler()
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    bits = bits_per_dim(unet, scheduler, images.batch(range(2)).pixels, generator=seeds, bits=16)
    assert found.value == pytest.approx(bits.total.mean().item(), rel=1e-5)


# Classes --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """train/ has cat, dog and emu; test/ has no dog."""
    for split, counts in (("train", {"cat": 4, "dog": 2, "emu": 6}), ("test", {"cat": 2, "emu": 2})):
        for i, (name, count) in enumerate(counts.items()):
            (tmp_path / "animals" / split / name).mkdir(parents=True)
            for j in range(count):
                pixels = np.full((8, 8), 60 * i + j, np.uint8)
                Image.fromarray(pixels).save(tmp_path / "animals" / split / name / f"{j}.png")
    return tmp_path / "animals"


def test_classes_are_those_of_the_training_where_a_split_lacks_one(animals: Path, tmp_path: Path) -> None:
    unet = network(num_class_embeds=3)
    spec = load_images(train_data_dir=str(animals), resolution=8, channels=1).spec
    run = save_run(tmp_path / "run", unet, spec)
    (found,) = measure(run, metrics="bpd")
    scheduler = tiny_scheduler()
    pixels = load_images(train_data_dir=str(animals), resolution=8, channels=1, split="test").batch(range(4)).pixels
    seeds = [torch.Generator().manual_seed(i) for i in range(4)]
    bits = bits_per_dim(unet, scheduler, pixels, generator=seeds, class_labels=[0, 0, 2, 2])  # emu is 2 as in training
    assert found.value == pytest.approx(bits.total.mean().item(), rel=1e-5)
    # Without the record a set of two classes cannot be numbered.
    save_run(tmp_path / "alone", unet, None)
    shutil.rmtree(animals / "train")
    (animals / "test").rename(animals / "train")
    with pytest.raises(UserError, match="The network knows 3 classes and these images have 2"):
        measure(tmp_path / "alone", metrics="bpd", bpd_split="train", data_dir=str(animals))


def test_samples_have_the_class_proportions_of_the_reference(animals: Path, tmp_path: Path) -> None:
    images = load_images(train_data_dir=str(animals), resolution=8, channels=1)
    assert class_labels(None, images, 5) is None
    labels = class_labels(3, images, 240)
    assert labels is not None and Counter(labels) == {0: 80, 1: 40, 2: 120}
    for n in range(1, 240):  # so are the first of them, whatever their number
        for c, share in enumerate((1 / 3, 1 / 6, 1 / 2)):
            assert abs(labels[:n].count(c) - share * n) < 1
    equal: Any = SimpleNamespace(spec=DataSpec(class_counts=(4, 4, 4)))
    assert class_labels(3, equal, 7) == [0, 1, 2, 0, 1, 2, 0]
    run = save_run(tmp_path / "run", network(num_class_embeds=3), images.spec)
    asked: list[int] = []
    plain = UNet2DModel.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            UNet2DModel,
            "forward",
            lambda self, *args, class_labels, **more: (
                asked.extend(class_labels.tolist()) or plain(self, *args, class_labels=class_labels, **more)
            ),
        )
        (found,) = measure(run, num_samples=12)
    assert Counter(asked) == {0: 4 * 3, 1: 2 * 3, 2: 6 * 3}  # three steps
    assert found.class_labels == "in the reference's proportions"


def test_the_frechet_distance_of_a_class_is_that_of_its_images(animals: Path, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    real, fake = torch.randn((30, 4), generator=draw), torch.randn((20, 4), generator=draw)
    found = frechet_distance_per_class(real, [i % 3 for i in range(30)], fake, [i % 2 for i in range(20)])
    for c in (0, 1):
        alone = frechet_distance(feature_statistics(real[c::3]), feature_statistics(fake[c::2]))
        assert found[c] == pytest.approx(alone, rel=1e-12)
    assert found.keys() == {0, 1}
    images = load_images(train_data_dir=str(animals), resolution=8, channels=1)
    run = save_run(tmp_path / "run", network(num_class_embeds=3), images.spec)
    (result,) = measure(run, metrics="fid_per_class", num_samples=12)
    assert result.parts is not None and result.parts.keys() == {"cat", "dog", "emu"}
    assert result.value == pytest.approx(sum(result.parts.values()) / 3)
    with pytest.raises(UserError, match="class 1 has 2 real and 1 generated"):
        measure(run, metrics="fid_per_class", num_samples=6)
    plain = save_run(tmp_path / "plain", network(), images.spec)
    with pytest.raises(UserError, match="this one has no classes: use fid"):
        measure(plain, metrics="fid_per_class")


# Refused before, kept after -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"metrics": "bpd,fid", "extractor": "three"}, "takes 3 channels, got images with 4"),
        ({"metrics": "fid", "num_inference_steps": "3,21"}, "21"),
        ({"metrics": "bpd,is", "extractor": "four", "num_samples": 20}, "gives no logits"),
        ({"metrics": "bpd", "num_timesteps_sampled": 20}, "num_timesteps_sampled must be an int from 2 to 19"),
        ({"metrics": "bpd", "bpd_num_inference_steps": 21}, "21"),
        (
            {"metrics": "bpd,kid", "extractor": "four", "kid_subset_size": 21, "num_samples": 21},
            "kid needs at least 21",
        ),
        ({"metrics": "bpd,fid", "extractor": "no/such-model"}, "neither"),
    ],
)
def test_what_will_be_refused_is_refused_before_anything_is_computed(
    options: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images"
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(np.full((8, 8, 4), 9 * i, np.uint8), mode="RGBA").save(folder / split / f"{i}.png")
    spec = load_images(train_data_dir=str(folder), resolution=8, channels=4).spec
    run = save_run(tmp_path / "run", network(in_channels=4, out_channels=4), spec)
    plain = samples.SampleFeatures.extractor.func  # type: ignore[attr-defined]

    def stand_in(self: Any) -> Any:
        from ddpm_ext.evaluation.features.extractors import Extractor, Features, with_channels

        channels = {"three": 3, "four": 4}.get(self.config.extractor)
        if channels is None:
            return plain(self)
        description = {"name": self.config.extractor, "weights": None, "input": ""}
        network = lambda x: Features(with_channels(x, channels).flatten(1), None)  # noqa: E731
        return Extractor(description, network, torch.device("cpu"))

    monkeypatch.setattr(samples.SampleFeatures, "extractor", property(stand_in))
    with pytest.raises(ValueError, match=sentence):
        measure(run, **options)
    assert not (run / "eval.json").exists() and not (run / "eval_pieces").exists()


def test_what_was_measured_is_kept_when_a_later_metric_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path / "run", network(), load_images("digits").spec)

    def fails(*_: Any) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(module, "precision_recall", fails)
    with pytest.raises(RuntimeError, match="the disk is full"):
        measure(run, metrics="bpd,fid,prdc", max_bpd_images=2, max_reference_images=40)
    assert [result.metric for result in read_results(run / "eval.json")] == ["bpd", "fid"]
    assert "Fréchet distance" in (run / "eval.md").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_measurement_with_a_line_and_keeps_its_pieces(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plain, calls = save_run(tmp_path / "run", network(), load_images("digits").spec), UNet2DModel.forward, []

    def forward(self: Any, *args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 17:  # in the second set of samples
            os.kill(os.getpid(), number)
        return plain(self, *args, **more)

    monkeypatch.setattr(UNet2DModel, "forward", forward)
    former = signal.getsignal(number)
    with pytest.raises(Stopped, match=r"What is measured is kept in .*run; the same command continues"):
        measure(run, num_inference_steps="15,16", max_reference_images=40, few_steps=False)
    assert signal.getsignal(number) is former
    assert [result.num_inference_steps for result in read_results(run / "eval.json")] == [15]
    calls.clear()
    monkeypatch.setattr(
        UNet2DModel, "forward", lambda self, *args, **more: calls.append(1) or plain(self, *args, **more)
    )
    measure(run, num_inference_steps="15,16", max_reference_images=40, few_steps=False)
    assert len(calls) == 16  # the first set is taken from its pieces


# Files ----------------------------------------------------------------------------------------------------------------


def test_an_eval_json_of_the_former_version_loads_and_keeps_its_keys(tmp_path: Path) -> None:
    """The digits' card holds what commit c2a1574 and those before it wrote."""
    for name in ("eval.json", "calibrated/calibration.json"):
        former = json.loads((ROOT / "model_cards" / "digits" / name).read_text())["figures"]
        results = read_results(ROOT / "model_cards" / "digits" / name)
        assert len(former) > 1
        for entry, result in zip(former, results, strict=True):
            written = json.loads(json.dumps(result.to_json()))
            assert {key: written[key] for key in entry} == entry
        assert "| --- |" in markdown(results)
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({"format": 1, "figures": [{**former[0], "of a later version": 1}]}))
    assert len(write_results(path, results[1:2])) == 2
    assert json.loads(path.read_text())["figures"][0]["of a later version"] == 1  # kept as it was


def test_an_entry_leaves_out_what_does_not_apply_and_says_null_of_what_is_not_known() -> None:
    """Format 1: whether weights are averages, and all of a sampler's chain, stand there even without a value."""
    chain = {"variance_type": None, "timestep_spacing": None, "trajectory": None, "eta": None}
    entry = {"metric": "fid", "value": 1.5, "model": "", "averaged": None, "num_inference_steps": 4, "sampler": "ddpm"}
    assert Result(metric="fid", value=1.5, sampler="ddpm", num_inference_steps=4).to_json() == entry | chain
    bits = {"metric": "bpd", "value": 2.0, "model": "", "averaged": None, "num_inference_steps": 0, "cdf": "tanh"}
    assert Result(metric="bpd", value=2.0, cdf="tanh", std=float("nan")).to_json() == bits | {
        "num_timesteps_sampled": None
    }
