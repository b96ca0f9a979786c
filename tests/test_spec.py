"""The record of a run's images: what training writes is what a measurement reads."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_ext.data.dataset import load_images
from ddpm_ext.data.spec import DataSpec
from ddpm_ext.data.streaming import stream_images
from ddpm_ext.errors import UserError

GREYS = {"cat": 10, "dog": 100, "emu": 200}
# What config.json of commit c2a1574 holds of the data of a run.
OLD_RECORD: dict[str, Any] = {
    "config": {
        "dataset_name": None,
        "dataset_config_name": None,
        "train_data_dir": "animals",
        "train_split": "train",
        "image_column": None,
        "label_column": None,
        "resolution": "8",
        "center_crop": False,
        "random_flip": True,
        "streaming": False,
        "equal_sizes": False,
    },
    "seed": 0,
    "images": 6,
    "data_fingerprint": "ab559d1b72e82e88669405e4de882a85",
    "network": {"sample_size": [8, 6], "in_channels": 3, "num_class_embeds": 3},
}


def animals(folder: Path) -> Path:
    """train/ with cat, dog and emu; test/ without dog."""
    for split, names in (("train", ("cat", "dog", "emu")), ("test", ("cat", "emu"))):
        for name in names:
            (folder / split / name).mkdir(parents=True)
            for i in range(2):
                Image.fromarray(np.full((8, 8, 3), GREYS[name], np.uint8)).save(folder / split / name / f"{i}.png")
    return folder


def write_run(folder: Path, record: dict[str, Any]) -> Path:
    (folder / "pipeline").mkdir(parents=True)
    (folder / "pipeline" / "model_index.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def test_the_record_comes_back_from_json() -> None:
    spec = DataSpec(dataset_name="a/b", resolution=(8, 6), class_names=("x", "y"), class_counts=(1, 2), bits=16)
    assert DataSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with pytest.raises(UserError, match="colour_space, which this version"):
        DataSpec.from_dict({"dataset_name": "a/b", "colour_space": "lab"})


@pytest.mark.parametrize("place", [".", "pipeline", "calibrated/pipeline"])
def test_a_run_is_found_from_its_folder_and_its_pipelines(tmp_path: Path, place: str) -> None:
    run, spec = tmp_path / "run", DataSpec(dataset_name="digits", num_images=7)
    write_run(run, {**OLD_RECORD, "data": spec.to_dict()})
    (run / place).mkdir(parents=True, exist_ok=True)
    (run / place / "model_index.json").write_text("{}")
    assert DataSpec.from_run(run / place) == spec


def test_a_run_of_an_earlier_version_says_as_much_as_its_options_and_network(tmp_path: Path) -> None:
    assert DataSpec.from_run(write_run(tmp_path / "run", OLD_RECORD)) == DataSpec(
        data_dir="animals",
        resolution=(8, 6),
        channels=3,
        center_crop=False,
        random_flip=True,
        num_images=6,
        fingerprint="ab559d1b72e82e88669405e4de882a85",
    )
    digits = {**OLD_RECORD, "config": {**OLD_RECORD["config"], "train_data_dir": None}}
    found = DataSpec.from_run(write_run(tmp_path / "digits", digits))
    assert found is not None and found.dataset_name == "digits"


def test_where_there_is_no_record_nothing_is_guessed(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"sample_size": 8}')
    for folder in (tmp_path, tmp_path / "unet", tmp_path / "nothing"):
        assert DataSpec.from_run(folder) is None
    (tmp_path / "config.json").write_text('{"config": ')
    with pytest.raises(UserError, match=r"config\.json, the record of the run, cannot be read"):
        DataSpec.from_run(tmp_path)


def test_a_set_loads_itself_again_and_its_test_split_with_the_training_s_class_numbers(tmp_path: Path) -> None:
    folder = str(animals(tmp_path))
    images = load_images(train_data_dir=folder, resolution=(4, 6), channels=3, center_crop=False)
    spec = DataSpec.from_dict(json.loads(json.dumps(images.spec.to_dict())))
    assert (spec.resolution, spec.channels, spec.center_crop) == ((4, 6), 3, False)
    assert (spec.class_names, spec.class_counts, spec.num_images) == (("cat", "dog", "emu"), (2, 2, 2), 6)
    again = spec.load()
    assert again.fingerprint == images.fingerprint
    assert again.spec == images.spec
    test = spec.load("test")
    labels, pixels = test.batch(range(4)).labels, test.batch(range(4)).pixels
    assert labels is not None
    assert dict(zip(pixels[:, 0, 0, 0].tolist(), labels.tolist(), strict=True)) == {10: 0, 200: 2}
    assert test.num_classes == 3 and test.spec.class_counts == (2, 0, 2)
    with pytest.raises(ValueError, match=r"classes \['dog'\] are none of the training's"):
        replace(spec, class_names=("cat", "emu")).load()


def test_a_stream_has_the_same_spec_but_for_what_it_cannot_know(tmp_path: Path) -> None:
    animals(tmp_path)
    options: dict[str, Any] = {"train_data_dir": str(tmp_path), "resolution": 8, "channels": 3}
    stream, images = stream_images(**options), load_images(**options)
    unknown: dict[str, Any] = {"num_images": None, "class_counts": None, "fingerprint": stream.fingerprint}
    assert stream.spec == replace(images.spec, **unknown)


def test_every_departure_is_a_sentence() -> None:
    spec = DataSpec(dataset_name="a/b", resolution=(8, 8), channels=3, class_names=("x",), num_images=5)
    assert spec.differences(spec) == []
    changes: dict[str, Any] = {"center_crop": False, "channels": 1, "resolution": (16, 16), "num_images": 4, "bits": 16}
    found = spec.differences(replace(spec, **changes))
    assert len(found) == len(changes)
    assert "resolution is 16 x 16; the run was trained with 8 x 8." in found
    assert spec.differences(replace(spec, split="test", num_images=4)) == [
        'split is "test"; the run was trained with "train".'
    ]
    other: dict[str, Any] = {field.name: "other" for field in fields(DataSpec)}
    assert len(spec.differences(replace(spec, **other))) == len(other) - 3  # counts of another set say nothing


def test_the_digits_are_recorded_by_name() -> None:
    images = load_images(split="test")
    assert images.spec.name == "digits"
    assert torch.equal(images.spec.load().batch([3]).pixels, images.batch([3]).pixels)


def test_what_training_accepted_is_loaded_again_and_no_other_split_by_that(tmp_path: Path) -> None:
    animals(tmp_path)
    for split in ("train", "test"):
        (tmp_path / split / "cat" / "0.png").write_bytes(b"none")
    options: dict[str, Any] = {"train_data_dir": str(tmp_path), "resolution": 8, "channels": 3}
    spec = load_images(**options, max_unreadable=0.5).spec
    assert len(spec.load()) == 5
    with pytest.raises(ValueError, match="--max_unreadable"):
        spec.load("test")
    with pytest.raises(ValueError, match="--max_unreadable"):
        replace(spec, fingerprint=None, num_images=None).load()  # of other images nothing was accepted
    assert len(spec.load("test", max_unreadable=0.5)) == 3


def test_an_option_that_there_is_not_is_refused() -> None:
    """What a record holds beside the options, as a count of images, is nothing to be asked for."""
    for name, meant in (("resolutoin", r"Did you mean resolution\?"), ("fingerprint", "no option fingerprint")):
        with pytest.raises(TypeError, match=meant):
            load_images(**{name: 8})  # pyright: ignore[reportArgumentType]
