"""Samples of a real process, read back by a reader that is not ours, and taken as data again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluations import small
from networks import TINY_UNET, tiny_scheduler, tiny_unet
from training import ROOT, run_here

from ddpm_ext.evaluation.evaluate import evaluate
from ddpm_ext.models.values import value_options
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline

COUNT = 4


def read_back(path: Path) -> np.ndarray:
    """Values (H, W, C) of an output, by imagecodecs, tifffile or numpy."""
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".tif":
        return np.atleast_3d(pytest.importorskip("tifffile").imread(path))
    return np.atleast_3d(pytest.importorskip("imagecodecs").png_decode(path.read_bytes()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "bits", "file_format"),
    [(1, 16, "png"), (1, 16, "tiff"), (2, 8, "png"), (3, 16, "png"), (3, 16, "tiff"), (5, 8, "png"), (5, 16, "tiff")],
)
def test_outputs_hold_what_the_pipeline_drew_and_are_data_again(
    channels: int, bits: int, file_format: str, tmp_path: Path
) -> None:
    pytest.importorskip("tifffile")
    unet = tiny_unet(in_channels=channels, out_channels=channels)
    if ours := value_options(bits):
        unet.register_to_config(_ddpm_ext=ours)
    pipeline = DDPMExtPipeline(unet, tiny_scheduler())
    pipeline.save_pretrained(str(tmp_path / "model"))
    words = f"sample --model {tmp_path / 'model'} --output_dir {tmp_path / 'drawn'} --num_samples {COUNT} --cpu"
    words += f" --num_inference_steps 3 --seed 5 --file_format {file_format}"
    if channels == 5:
        words += " --rgb_bands 5 1 2"
    subprocess.run([sys.executable, "-m", "ddpm_ext", *words.split()], cwd=ROOT, check=True, capture_output=True)
    suffix = ".tif" if file_format == "tiff" else ".npy" if channels > 4 else ".png"
    for i in range(COUNT):
        generator = [torch.Generator().manual_seed(5 + i)]
        x_0: Any = pipeline(1, generator, 3, output_type="latent").images
        levels = np.rint((x_0[0].clamp(-1, 1).double().numpy() + 1) / 2 * (2**bits - 1))
        values = read_back(tmp_path / "drawn" / f"{i:06}{suffix}")
        assert values.dtype == (np.uint8 if bits == 8 else np.uint16)
        assert np.abs(values.astype(int) - np.moveaxis(levels, 0, -1)).max() <= (bits == 16)  # float32 in batches of 4
    if suffix == ".npy":
        shown = read_back(tmp_path / "drawn" / "000000.png")
        assert np.array_equal(shown, np.load(tmp_path / "drawn" / "000000.npy")[..., [4, 0, 1]])

    (tmp_path / "net.json").write_text(json.dumps({**TINY_UNET, "in_channels": channels, "out_channels": channels}))
    data: dict[str, Any] = {"train_data_dir": tmp_path / "drawn", "bits": bits, "max_train_steps": 2}
    data |= {"train_batch_size": 2, "eval_batch_size": 2, "model_config_name_or_path": tmp_path / "net.json"}
    assert run_here(tmp_path / "run", **data) == 0
    record = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    read = {name: record[name] for name in ("num_images", "channels", "bits", "resolution")}
    assert read == {"num_images": COUNT, "channels": channels, "bits": bits, "resolution": [8, 8]}
    measured: dict[str, Any] = {"metrics": "bpd,fid", "bpd_split": "train", "reference_split": "train"}
    measured |= {"num_samples": 4, "num_inference_steps": "3", "dataset_name": None, "num_timesteps_sampled": 4}
    found = evaluate(small(tmp_path / "run", tmp_path, **measured))
    assert [result.metric for result in found] == ["bpd", "fid"] and np.isfinite([r.value for r in found]).all()


def test_tiff_without_tifffile_is_refused_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddpm_ext.pipelines.sampling import SampleConfig, sample_to_folder

    DDPMExtPipeline(tiny_unet(), tiny_scheduler()).save_pretrained(str(tmp_path / "model"))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match=r"--file_format tiff needs tifffile: pip install ddpm-ext\[deep\]"):
        sample_to_folder(
            SampleConfig(model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), file_format="tiff")
        )
