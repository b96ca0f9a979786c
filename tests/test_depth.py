"""Every bit, band and page of an image file is read as it is, or the file is refused with its reason."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from image_files import npy, tiff
from PIL import Image

from ddpm_ext.data import rows
from ddpm_ext.data.dataset import load_images
from ddpm_ext.data.decoding.files import Unreadable
from ddpm_ext.data.decoding.levels import ImageFormat, Seen, decode_image
from ddpm_ext.data.streaming import stream_images

RANDOM = np.random.default_rng(0)


def values_of(shape: tuple[int, ...], dtype: Any = np.uint16, top: int | None = None) -> np.ndarray:
    return RANDOM.integers(0, (top or np.iinfo(dtype).max) + 1, shape).astype(dtype)


def form(height: int, width: int, channels: int, bits: int = 16, **more: Any) -> ImageFormat:
    return ImageFormat(height, width, channels, True, bits, **more)


def png16(values: np.ndarray) -> bytes:
    return pytest.importorskip("imagecodecs").png_encode(values)


# Sixteen bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "write"), [(1, png16), (2, png16), (3, png16), (4, png16), (1, tiff), (3, tiff)])
def test_sixteen_bits_are_read_whole(channels: int, write: Any) -> None:
    values = values_of((5, 7, channels))
    options = {"photometric": "rgb"} if write is tiff and channels == 3 else {}
    stored = write(values[..., 0] if channels == 1 else values, **options)
    levels = decode_image(stored, form(5, 7, channels))
    assert levels.dtype == np.uint16
    assert np.array_equal(levels, values.transpose(2, 0, 1))


@pytest.mark.parametrize("maxval", [65535, 4095])
def test_a_ppm_of_sixteen_bits_is_read_whole(maxval: int) -> None:
    values = values_of((3, 4, 3), top=maxval)
    stored = b"P6 4 3 %d\n" % maxval + values.astype(">u2").tobytes()
    expected = np.round(values.astype(float) * 65535 / maxval).astype(np.uint16)
    assert np.array_equal(decode_image(stored, form(3, 4, 3)), expected.transpose(2, 0, 1))


@pytest.mark.parametrize("bits", [10, 12])
def test_deep_jpeg_2000_is_read_at_its_own_depth(bits: int) -> None:
    codecs = pytest.importorskip("imagecodecs")
    values = values_of((16, 16, 3), top=2**bits - 1)
    stored = codecs.jpeg2k_encode(values, bitspersample=bits, reversible=True, level=0, mct=False)
    levels = decode_image(stored, form(16, 16, 3, bits=bits))
    assert np.array_equal(levels, values.transpose(2, 0, 1))


def test_eight_bits_fill_the_range_of_sixteen() -> None:
    values = values_of((4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "png")
    assert np.array_equal(decode_image(buffer.getvalue(), form(4, 4, 3)), values.transpose(2, 0, 1) * np.uint16(257))


def test_what_is_cut_to_eight_bits_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        Image.fromarray(values_of((4, 4))).save(tmp_path / f"{i}.png")
    load_images(train_data_dir=str(tmp_path))
    assert "3 images store up to 16 bits and are read at 8: --bits 16" in capsys.readouterr().err
    deep = load_images(train_data_dir=str(tmp_path), bits=16)
    assert deep.batch([0]).pixels.dtype == torch.int32 and deep.spec.bits == 16
    assert "read at 8" not in capsys.readouterr().err


def test_colour_of_sixteen_bits_is_counted_too() -> None:
    seen = Seen()
    decode_image(png16(values_of((4, 4, 3))), form(4, 4, 3, bits=8), seen=seen)
    assert (seen.cut, seen.cut_bits) == (1, 16)


@pytest.mark.parametrize(
    ("mode", "channels", "made", "holds"),
    [
        ("RGB", 1, r"2 images are RGB and the network has 1 channel: they are read as grey \(Rec. 601\)", 3),
        ("L", 3, "2 images are grey and the network has 3 channels: grey is repeated", 1),
        ("RGBA", 3, "2 images are RGB and alpha and the network has 3 channels: alpha is laid on white", 4),
    ],
)
@pytest.mark.parametrize("bits", [8, 16])
def test_other_channels_than_the_network_s_are_told_with_the_option_also_of_a_file_written_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, channels: int, made: str, holds: int, bits: int
) -> None:
    (tmp_path / "set").mkdir()
    for i in range(2):
        Image.new(mode, (4, 4)).save(tmp_path / "set" / f"{i}.png")
    options: dict[str, Any] = {"train_data_dir": str(tmp_path / "set"), "channels": channels, "bits": bits}
    options |= {"cache_dir": str(tmp_path / "cache"), "memory_bytes": 0}
    keeps = rf"{made}\. A network of {holds} \(in_channels of --model_config_name_or_path; --init_new_head"
    for opened in (load_images, load_images, stream_images):  # decodes, finds the file, decodes some
        rows._said.clear()
        opened(**options, resolution=4)
        assert re.search(keeps, capsys.readouterr().err)
        rows._said.clear()
        opened(**{**options, "channels": holds}, resolution=4)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("bits", [None, 16])
def test_twelve_bits_in_sixteen_are_named_with_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: int | None
) -> None:
    values = values_of((6, 6), top=4095)
    values[0, 0] = 4095 - (bits or 0)  # a sentence of its own for each case: it is said once
    Image.fromarray(values).save(tmp_path / "a.png")
    load_images(train_data_dir=str(tmp_path), bits=bits)
    said = capsys.readouterr().err
    assert f"largest value of these 16-bit images is {values.max()} of 65535" in said
    assert "--value_range 0 4095" in said
    found = load_images(train_data_dir=str(tmp_path), value_range=(0, 4095))
    assert found.spec.bits == 12  # a level for each whole number
    assert np.array_equal(found.batch([0]).pixels[0, 0].numpy(), values)
    assert "largest" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "value_range"),
    [
        (np.linspace(-1, 3, 12, dtype=np.float32).reshape(3, 4), (-1, 3)),
        (np.linspace(-1000, 3000, 12).astype(np.int16).reshape(3, 4), (-1000, 3000)),
        (np.linspace(0, 1e9, 12).astype(np.int32).reshape(3, 4), (0, 1e9)),
        (np.linspace(0, 1, 12, dtype=np.float64).reshape(3, 4), (0, 1)),
        (np.linspace(-100, 100, 12).astype(np.int8).reshape(3, 4), (-100, 100)),
    ],
)
@pytest.mark.parametrize("write", [npy, tiff])
def test_floats_and_signed_integers_need_a_range_and_then_lie_in_it(
    values: np.ndarray, value_range: tuple[float, float], write: Any
) -> None:
    stored = write(values)
    stated = re.escape(f"{values.min():g} to {values.max():g}, have no stated range: give --value_range")
    with pytest.raises(Unreadable, match=stated):
        decode_image(stored, form(3, 4, 1))
    lo, hi = value_range
    expected = (values.astype(np.float64) - lo) / (hi - lo) * 65535
    levels = decode_image(stored, form(3, 4, 1, value_range=value_range))[0]
    assert np.abs(levels - expected).max() <= 0.5
    with pytest.raises(Unreadable, match="leave the range"):
        decode_image(stored, form(3, 4, 1, value_range=(lo, lo + 0.9 * (hi - lo))))


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(Unreadable, match="NaN"):
        decode_image(npy(np.array([[0.0, np.nan]])), form(1, 2, 1, value_range=(0, 1)))


# Bands, pages, arrays -------------------------------------------------------------------------------------------------


BANDS = np.broadcast_to(np.array([20, 40, 60, 80], np.uint8), (8, 8, 4))


@pytest.mark.parametrize("said", [True, False])
def test_four_bands_are_four_bands_and_for_no_other_network(said: bool) -> None:
    stored = tiff(BANDS, photometric="rgb", extrasamples=["unspecified"])
    if not said:  # a file that does not mention its extra sample at all: another tag in the place of 338
        with pytest.importorskip("tifffile").TiffFile(io.BytesIO(stored)) as file:
            place = file.pages[0].tags[338].offset
        stored = stored[:place] + (65000).to_bytes(2, "little") + stored[place + 2 :]
    assert decode_image(stored, form(8, 8, 4, bits=8))[:, 0, 0].tolist() == [20, 40, 60, 80]
    assert decode_image(stored, form(4, 4, 4, bits=8))[:, 0, 0].tolist() == [20, 40, 60, 80]  # nothing premultiplied
    for channels in (1, 2, 3, 5):
        with pytest.raises(Unreadable, match=f"4 bands .* the network has {channels} channels"):
            decode_image(stored, form(8, 8, channels, bits=8))


def test_alpha_is_alpha_where_the_file_says_so() -> None:
    stored = tiff(BANDS, photometric="rgb", extrasamples=["unassalpha"])
    white = 255 - (255 - np.array([20, 40, 60])) * 80 / 255
    assert np.abs(decode_image(stored, form(8, 8, 3, bits=8))[:, 0, 0] - white).max() <= 1
    assert decode_image(stored, form(8, 8, 4, bits=8))[:, 0, 0].tolist() == [20, 40, 60, 80]


@pytest.mark.parametrize("channels", [3, 4])
def test_deep_alpha_is_laid_on_white_or_kept(channels: int) -> None:
    values = np.zeros((1, 2, 4), np.uint16)
    values[0, 0] = (1000, 2000, 3000, 65535)
    values[0, 1] = (1000, 2000, 3000, 13107)  # a fifth
    levels = decode_image(png16(values), form(1, 2, channels))[:, 0].T
    if channels == 4:
        assert np.array_equal(levels, values[0])
    else:
        assert levels[0].tolist() == [1000, 2000, 3000]
        assert levels[1].tolist() == [52628, 52828, 53028]  # v/5 + 4/5 · 65535


def test_scaling_weighs_colour_by_real_alpha_alone() -> None:
    """A clear half must not darken the other; four bands are averaged each by itself."""
    values = np.zeros((2, 4, 4), np.uint16)
    values[:, :2] = (60000, 60000, 60000, 65535)
    of_bands = tiff(values, photometric="rgb", extrasamples=["unspecified"])
    alpha, bands = (decode_image(stored, form(1, 2, 4)) for stored in (png16(values), of_bands))
    assert (alpha[:3, 0, 0] == 60000).all()
    lone = decode_image(npy(values[..., 0]), form(1, 2, 1))[0]
    assert np.array_equal(bands[0], lone)


@pytest.mark.parametrize("bands", [2, 5, 7])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_any_number_of_bands(bands: int, planar: str) -> None:
    values = values_of((6, 5, bands))
    stored = tiff(
        values if planar == "contig" else np.moveaxis(values, -1, 0), photometric="minisblack", planarconfig=planar
    )
    assert np.array_equal(decode_image(stored, form(6, 5, bands)), np.moveaxis(values, -1, 0))


def test_pages_are_bands_or_refused() -> None:
    values = values_of((3, 6, 5))
    stored = tiff(values, photometric="minisblack")
    assert np.array_equal(decode_image(stored, form(6, 5, 3)), values)
    with pytest.raises(Unreadable, match="3 bands"):
        decode_image(stored, form(6, 5, 1))


def test_arrays_of_every_layout() -> None:
    values = values_of((4, 6, 5))
    assert np.array_equal(decode_image(npy(values), form(4, 6, 5)), np.moveaxis(values, -1, 0))
    assert np.array_equal(
        decode_image(npy(np.moveaxis(values, -1, 0)), form(4, 6, 5, channel_axis=0)), np.moveaxis(values, -1, 0)
    )
    assert np.array_equal(decode_image(npy(values[..., 0]), form(4, 6, 1))[0], values[..., 0])
    assert np.array_equal(decode_image(npy(values.astype(">u2")), form(4, 6, 5)), np.moveaxis(values, -1, 0))
    assert decode_image(npy(values[..., 0] > 30_000), form(4, 6, 1)).max() == 65535
    with pytest.raises(Unreadable, match=r"6 bands of shape .*--channel_axis"):
        decode_image(npy(np.swapaxes(values, 1, 2)), form(4, 6, 5))
    with pytest.raises(Unreadable, match=r"shape \(1, 4, 6, 5\)"):
        decode_image(npy(values[None]), form(4, 6, 5))


def test_the_arrays_of_an_npz_are_named(tmp_path: Path) -> None:
    one, two = values_of((4, 4), np.uint8), values_of((4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", one=one, two=two)
    with pytest.raises(ValueError, match=r"None of the 1 images .*\['one', 'two'\].*--array_key"):
        load_images(train_data_dir=str(tmp_path))
    found = load_images(train_data_dir=str(tmp_path), array_key="two")
    assert np.array_equal(found.batch([0]).pixels[0, 0].numpy(), two)
    assert found.spec.load().fingerprint == found.fingerprint
    np.savez(tmp_path / "b.npz", three=one)
    with pytest.raises(ValueError, match="no 'two'"):
        load_images(train_data_dir=str(tmp_path), array_key="two", strict=True, channels=1, resolution=4)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize(
    ("bands", "axis"), [(None, None), (1, None), (6, None), (6, 2), (6, 0)], ids=["NHW", "NHW1", "NHWC", "2", "NCHW"]
)
def test_one_file_of_many_arrays_is_a_set(tmp_path: Path, suffix: str, bands: int | None, axis: int | None) -> None:
    values = values_of((7, 8, 9) if bands is None else (7, 8, 9, bands))
    stored = np.moveaxis(values, -1, 1) if axis == 0 else values
    file = tmp_path / f"set.{suffix}"
    np.save(file, stored) if suffix == "npy" else np.savez(file, images=stored, labels=np.arange(7))
    options: dict[str, Any] = {"train_data_dir": str(file), "bits": 16, "channel_axis": axis}
    options["array_key"] = None if suffix == "npy" else "images"
    expected = np.moveaxis(np.atleast_3d(values) if bands else values[..., None], -1, 1)
    found = load_images(**options)
    assert np.array_equal(found.batch(range(7)).pixels.numpy(), expected)
    assert found.spec.load().fingerprint == found.fingerprint
    stream = stream_images(**options, resolution=(8, 9), channels=bands or 1)
    order = [one.numpy().tobytes() for one in stream.at(range(7), 0).pixels.to(torch.int32)]
    assert sorted(order) == sorted(one.astype(np.int32).tobytes() for one in expected)
    if suffix == "npz":
        with pytest.raises(ValueError, match=r"\['images', 'labels'\].*--array_key"):
            load_images(train_data_dir=str(file))


@pytest.mark.parametrize(
    ("shape", "axis", "sentence"),
    [
        ((9, 3, 8, 8), None, r"--channel_axis 2 or --channel_axis 0, the axis of the channels in one image"),
        ((9, 8, 8, 8), None, r"may be \(N, H, W, C\) or \(N, C, H, W\)"),
        ((9, 3, 8, 8), 1, r"counts the axes of one image, \(3, 8, 8\) here: 0 for \(N, C, H, W\)"),
        ((8, 8, 3), None, r"may be one image or 8 of 8 x 3"),
        ((3, 8, 8), None, r"may be one image or 3 of 8 x 8"),
        ((8, 8), None, r"an array of shape \(8, 8\); a set is"),
        ((9, 8, 8), 0, r"is 9 grey images of 8 x 8, which have no --channel_axis, got 0: leave it out"),
        ((9, 8, 8), 2, r"one image of three axes is put as a .npy file into a folder"),
        ((9, 2, 8, 8, 1), 0, r"an array of shape \(9, 2, 8, 8, 1\)"),
    ],
)
def test_an_array_whose_axes_may_mean_two_things_is_refused(
    tmp_path: Path, shape: tuple[int, ...], axis: int | None, sentence: str
) -> None:
    np.save(tmp_path / "set.npy", values_of(shape))
    with pytest.raises(ValueError, match=sentence):
        load_images(train_data_dir=str(tmp_path / "set.npy"), bits=16, channel_axis=axis)


def test_a_file_of_arrays_has_one_split_and_other_files_none(tmp_path: Path) -> None:
    np.save(tmp_path / "set.npy", values_of((9, 8, 8)))
    with pytest.raises(ValueError, match='all of a file of arrays is "train"'):
        load_images(train_data_dir=str(tmp_path / "set.npy"), split="test")
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(ValueError, match="it is a file: give its folder"):
        load_images(train_data_dir=str(tmp_path / "one.png"))


@pytest.mark.parametrize("suffix", ["npy", "tif"])
def test_a_folder_of_arrays_is_a_set_with_its_own_record(tmp_path: Path, suffix: str) -> None:
    values = values_of((5, 8, 8, 6))
    for i, value in enumerate(values):
        stored = npy(value) if suffix == "npy" else tiff(value, photometric="minisblack", planarconfig="contig")
        (tmp_path / f"{i}.{suffix}").write_bytes(stored)
    found = load_images(train_data_dir=str(tmp_path), bits=16)
    assert found.shape == (6, 8, 8)
    assert np.array_equal(found.batch(range(5)).pixels.numpy(), np.moveaxis(values, -1, 1))
    again = found.spec.load()
    assert again.fingerprint == found.fingerprint and again.spec == found.spec
    stream = stream_images(train_data_dir=str(tmp_path), bits=16, resolution=8, channels=6)
    assert {tuple(p.flatten().tolist()) for p in stream.at(range(5), 0).pixels} == {
        tuple(np.moveaxis(value, -1, 0).flatten().tolist()) for value in values
    }


@pytest.mark.parametrize("how", ["array3d", "lists"])
def test_columns_of_arrays(tmp_path: Path, how: str) -> None:
    values = values_of((4, 3, 2, 2), np.uint8)
    feature = datasets.Array3D((3, 2, 2), "uint8")
    if how == "lists":
        feature = datasets.List(datasets.List(datasets.List(datasets.Value("uint8"))))
    table = datasets.Dataset.from_dict({"image": values.tolist()}, features=datasets.Features({"image": feature}))
    table.to_parquet(tmp_path / "train.parquet")
    found = load_images(train_data_dir=str(tmp_path), channel_axis=0)
    assert np.array_equal(found.batch(range(4)).pixels.numpy(), values)
    stream = stream_images(train_data_dir=str(tmp_path), channel_axis=0, resolution=2, channels=3)
    assert np.array_equal(
        np.sort(stream.at(range(4), 0).pixels.flatten(1).numpy(), 0), np.sort(values.reshape(4, -1), 0)
    )


def test_a_file_keeps_sixteen_bits_in_memory_and_mapped(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    values = values_of((3, 4, 4))
    for i, value in enumerate(values):
        Image.fromarray(value).save(folder / f"{i}.png")
    options: dict[str, Any] = {"train_data_dir": str(folder), "bits": 16, "cache_dir": str(tmp_path / "cache")}
    memory, file, asked = (
        load_images(**options, **more) for more in ({}, {"memory_bytes": 0}, {"memory_bytes": 0, "mapped_bytes": 0})
    )
    for found in (memory, file, asked):
        assert np.array_equal(found.batch(range(3)).pixels[:, 0].numpy(), values)
    assert memory.fingerprint == file.fingerprint != load_images(**{**options, "bits": 8}).fingerprint


def test_a_range_that_is_none_and_bits_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="the lower first, got"):
        load_images(value_range=(5, 1))
    with pytest.raises(ValueError, match="between 1 and 16, got 17"):
        load_images(bits=17)


def test_without_the_library_its_name_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = tiff(values_of((4, 4, 3)), photometric="rgb")
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(Unreadable, match=r"tifffile, which is not installed: pip install ddpm-ext\[deep\]"):
        decode_image(stored, form(4, 4, 3))


@pytest.mark.parametrize("bands", [2, 4])
def test_a_stated_range_is_that_of_the_colours_and_not_of_alpha(tmp_path: Path, bands: int) -> None:
    options = {} if bands == 2 else {"photometric": "rgb"}
    values = values_of((4, 5, bands), top=4095)
    values[..., -1] = 65535
    stored = tiff(values, extrasamples=["unassalpha"], **({"photometric": "minisblack"} | options))
    seen, twelve = Seen(), {"bits": 12, "value_range": (0, 4095)}
    levels = decode_image(stored, form(4, 5, bands, **twelve), seen=seen)
    assert np.array_equal(levels[:-1], values[..., :-1].transpose(2, 0, 1)) and (levels[-1] == 4095).all()
    assert np.array_equal(decode_image(stored, form(4, 5, bands - 1, **twelve)), levels[:-1])  # on white, all opaque
    assert seen.largest[16] == values[..., :-1].max()  # so that 12 bits in 16 are told beside opaque alpha, too


def test_opaque_alpha_of_eight_bits_stays_opaque_in_a_stated_range() -> None:
    values = np.dstack([values_of((3, 4, 3), np.uint8), np.full((3, 4), 255, np.uint8)])
    stored = saved("png", Image.fromarray(values))
    levels = decode_image(stored, form(3, 4, 3, bits=10, value_range=(0, 1023)))
    assert np.array_equal(levels, values[..., :3].transpose(2, 0, 1))


def test_complex_numbers_are_refused_also_with_a_range() -> None:
    stored = tiff(np.full((3, 4), 0.5 + 1j, np.complex64))
    with pytest.raises(Unreadable, match="complex64 values, which are no real numbers"):
        decode_image(stored, form(3, 4, 1, value_range=(0, 1)))


def test_pages_count_as_channels_where_none_are_stated(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(values_of((3, 6, 5), np.uint8), photometric="minisblack"))
    assert load_images(train_data_dir=str(tmp_path)).shape == (3, 6, 5)


def test_an_axis_that_an_array_has_not_is_named() -> None:
    with pytest.raises(Unreadable, match="--channel_axis is 0, 1 or 2, got 5"):
        decode_image(npy(values_of((3, 4, 2))), form(3, 4, 2, channel_axis=5))


# Reasons --------------------------------------------------------------------------------------------------------------


def test_reasons_are_counted_and_the_first_three_files_have_theirs(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"float{i}.npy").write_bytes(npy(np.full((4, 4), i + 0.5, np.float32)))
    (tmp_path / "z.npy").write_bytes(npy(np.zeros((2, 2, 2, 2), np.uint8)))
    with pytest.raises(ValueError) as error:
        load_images(train_data_dir=str(tmp_path), resolution=4, channels=1)
    said = str(error.value)
    assert "4 of 5: floats without a stated range; 1 of 5: arrays of 4 axes" in said
    assert said.count(".npy") == 3 and "1.5 to 1.5" in said


ODD: dict[str, tuple[np.ndarray, str]] = {
    "no axes": (np.array(5.0), "arrays of 0 axes"),
    "complex": (np.ones((4, 4), np.complex64), "arrays of complex64"),
    "words": (np.array([["a", "b"]]), "arrays of <U1"),
    "times": (np.zeros((4, 4), "datetime64[s]"), r"arrays of datetime64\[s\]"),
    "records": (np.zeros((4, 4), [("a", "u1"), ("b", "u2")]), r"arrays of \[\('a'"),
    "objects": (np.array([[{}]], dtype=object), "arrays of Python objects.*store numbers"),
    "nothing": (np.zeros((0, 8), np.uint8), r"empty arrays.*shape \(0, 8\), which holds nothing"),
    "holes": (np.full((4, 4), np.nan), "values that are not finite"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_arrays_have_their_own_reason(kind: str, tmp_path: Path) -> None:
    values, reason = ODD[kind]
    np.save(tmp_path / "a.npy", values, allow_pickle=True)
    np.savez(tmp_path / "b.npz", values, allow_pickle=True)
    with pytest.raises(ValueError, match=f"2 of 2: {reason}"):
        load_images(train_data_dir=str(tmp_path))


def test_objects_as_a_set_and_cut_or_empty_files_are_named(tmp_path: Path) -> None:
    ragged = np.array([np.zeros((8, 8)), np.zeros((4, 4))], dtype=object)
    np.save(tmp_path / "set.npy", ragged, allow_pickle=True)
    with pytest.raises(ValueError, match="images of one size as one array"):
        load_images(train_data_dir=str(tmp_path / "set.npy"))
    (tmp_path / "cut").mkdir()
    for name, content in {"a.npy": b"\x93NUMPY\x01\0", "b.npy": b"", "c.png": b"", "d.png": b""}.items():
        (tmp_path / "cut" / name).write_bytes(content)
    with pytest.raises(ValueError, match="2 of 2: empty files"):  # arrays beside images are left out
        load_images(train_data_dir=str(tmp_path / "cut"))
    for name in ("c.png", "d.png"):
        (tmp_path / "cut" / name).unlink()
    with pytest.raises(ValueError, match=r"1 of 2: damaged arrays; 1 of 2: empty files\. The first: .*a\.npy"):
        load_images(train_data_dir=str(tmp_path / "cut"))


@pytest.mark.parametrize("name", ["bytes", "path", "pixels"])
def test_columns_of_any_name_are_asked_for_and_read(name: str, tmp_path: Path) -> None:
    values = values_of((4, 6, 5), np.uint8)
    cells: dict[str, list[Any]] = {"bytes": [], "path": [], "pixels": values.tolist()}
    (tmp_path / "files").mkdir()
    for i, value in enumerate(values):
        Image.fromarray(value).save(tmp_path / "files" / f"{i}.png")
        cells["path"].append(str(tmp_path / "files" / f"{i}.png"))
        cells["bytes"].append((tmp_path / "files" / f"{i}.png").read_bytes())
    (tmp_path / "set").mkdir()
    table = datasets.Dataset.from_dict({name: cells[name], "kind": ["a", "b"] * 2})
    table.to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(ValueError, match=rf"--image_column which of the columns \['{name}', 'kind'\]"):
        load_images(train_data_dir=str(tmp_path / "set"))
    limits: dict[str, Any] = {"value_range": (0, 255), "bits": 8} if name == "pixels" else {}
    options: dict[str, Any] = {"train_data_dir": str(tmp_path / "set"), "image_column": name, **limits}
    found = load_images(**options)
    assert np.array_equal(found.batch(range(4)).pixels[:, 0].numpy(), values)
    for opened in (found, stream_images(**options, resolution=(6, 5))):
        with pytest.raises(ValueError, match=r"name their label_column\. Its other columns are kind\."):
            opened.require_classes()


def test_a_file_written_before_keeps_the_reasons_of_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for i in range(9):
        Image.new("L", (4, 4)).save(tmp_path / "set" / f"{i}.png")
    (tmp_path / "set" / "5.png").write_bytes(b"\0" * 128 + b"DICM")
    options: dict[str, Any] = {"train_data_dir": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache")}
    options |= {"memory_bytes": 0, "resolution": 4, "channels": 1}
    assert len(load_images(**options, max_unreadable=0.2)) == 8
    for refused in ({}, {"strict": True}):
        with pytest.raises(ValueError, match=r"1 of 9.* images cannot be read.*5\.png \(row 5\): it is DICOM"):
            load_images(**options, **refused)


@pytest.mark.parametrize(("broken", "stops"), [(1, False), (2, True)])
def test_more_than_one_per_cent_unreadable_stops(tmp_path: Path, broken: int, stops: bool) -> None:
    for i in range(100):
        Image.fromarray(values_of((2, 2), np.uint8)).save(tmp_path / f"{i:03}.png")
    for i in range(broken):
        (tmp_path / f"{i:03}.png").write_bytes(b"none")
    options: dict[str, Any] = {"train_data_dir": str(tmp_path), "resolution": 2, "channels": 1}
    if stops:
        with pytest.raises(ValueError, match=r"2 of 100 images cannot be read, .*--max_unreadable.*no image format"):
            load_images(**options)
        with pytest.raises(ValueError, match="--max_unreadable"):
            asked = load_images(**options, memory_bytes=0, mapped_bytes=0)
            asked.batch(range(100))
    assert len(load_images(**options, max_unreadable=0.02)) == 100 - broken


# What is more than one image, or no depth that is read ---------------------------------------------------------------


def saved(kind: str, *frames: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    more: dict[str, Any] = {"save_all": True, "append_images": list(frames[1:])} if len(frames) > 1 else {}
    frames[0].save(buffer, format=kind, **more, **options)
    return buffer.getvalue()


def frames_of(count: int) -> list[Image.Image]:
    return [Image.fromarray(values_of((8, 8, 3), np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "MPO"])
def test_frames_are_refused_by_number_and_one_is_read(kind: str) -> None:
    with pytest.raises(Unreadable, match="it holds 3 images and one is read of a file: split it") as refused:
        decode_image(saved(kind, *frames_of(3)), form(8, 8, 3, bits=8))
    assert refused.value.kind == f"{kind} files of several images"
    assert decode_image(saved(kind, *frames_of(1)), form(8, 8, 3, bits=8)).shape == (3, 8, 8)


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "RGB"])
def test_several_images_in_one_netpbm_file_are_refused(mode: str) -> None:
    depth = b"P5\n# 12 bits\n5 4\n4095\n" + bytes(2 * 20) if mode == "I;16" else saved("PPM", Image.new(mode, (5, 4)))
    assert decode_image(depth, form(4, 5, 3 if mode == "RGB" else 1, bits=16 if mode == "I;16" else 8)).shape[1:] == (
        4,
        5,
    )
    with pytest.raises(Unreadable, match="it holds 2 images and one is read of a file: split it"):
        decode_image(depth + depth, form(4, 5, 3 if mode == "RGB" else 1, bits=16 if mode == "I;16" else 8))


def test_sizes_of_an_icon_are_refused_and_a_preview_of_a_camera_is_none() -> None:
    icon = Image.new("RGB", (64, 64), "red")
    with pytest.raises(Unreadable, match="it holds 2 images"):
        decode_image(saved("ICO", icon, sizes=[(16, 16), (32, 32)]), form(32, 32, 3, bits=8))
    assert decode_image(saved("ICO", icon, sizes=[(16, 16)]), form(16, 16, 3, bits=8)).shape == (3, 16, 16)
    photo = frames_of(1)[0]
    whole = decode_image(saved("MPO", photo, photo.resize((4, 4))), form(8, 8, 3, bits=8))
    assert np.array_equal(whole, decode_image(saved("JPEG", photo), form(8, 8, 3, bits=8)))


def test_a_folder_of_animations_counts_them(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.gif").write_bytes(saved("GIF", *frames_of(2)))
    with pytest.raises(ValueError, match=r"3 of 3: GIF files of several images\. The first: .*0\.gif"):
        load_images(train_data_dir=str(tmp_path))


def sgi(values: np.ndarray) -> bytes:
    """An uncompressed SGI, by its specification: 512 bytes of header, band by band from the lowest row up."""
    height, width, bands = values.shape
    head = struct.pack(">hBBHHHHll", 474, 0, values.itemsize, 3 if bands > 1 else 2, width, height, bands, 0, 65535)
    return head.ljust(512, b"\0") + np.moveaxis(values[::-1], -1, 0).astype(f">u{values.itemsize}").tobytes()


@pytest.mark.parametrize("bands", [1, 3, 4])
def test_a_deep_sgi_is_refused_at_16_bits_and_its_high_bytes_are_read_at_8(bands: int) -> None:
    values, seen = values_of((6, 5, bands)), Seen()
    with pytest.raises(Unreadable, match="stores 16 bits and would be read at 8"):
        decode_image(sgi(values), form(6, 5, bands))
    assert np.array_equal(
        decode_image(sgi(values), form(6, 5, bands, bits=8), seen=seen), np.moveaxis(values >> 8, -1, 0)
    )
    assert seen.cut == 1
    shallow = values_of((6, 5, bands), np.uint8)
    assert np.array_equal(decode_image(sgi(shallow), form(6, 5, bands)), np.moveaxis(shallow.astype(int) * 257, -1, 0))


def dds(masks: tuple[int, ...], payload: bytes, faces: int = 0) -> bytes:
    """A DDS of 4 x 4 without compression, by its specification."""
    head = struct.pack("<4s7I44x", b"DDS ", 124, 0x1007, 4, 4, 0, 0, 0)
    head += struct.pack("<8I", 32, 0x40, 0, 32, *masks, 0) + struct.pack("<5I", 0x1000, faces, 0, 0, 0)
    return head + payload


def test_textures_of_ten_bits_or_of_six_faces_are_refused() -> None:
    ten, eight = (1023, 1023 << 10, 1023 << 20), (255, 255 << 8, 255 << 16)
    with pytest.raises(Unreadable, match="stores 10 bits"):
        decode_image(dds(ten, bytes(64)), form(4, 4, 3))
    with pytest.raises(Unreadable, match="it holds 6 images"):
        decode_image(dds(eight, bytes(64 * 6), faces=0xFE00), form(4, 4, 3, bits=8))
    assert decode_image(dds(eight, bytes(64)), form(4, 4, 3, bits=8)).shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"#?RADIANCE\n", "Radiance HDR"),
        (b"v/1\x01", "OpenEXR"),
        (b"\0" * 128 + b"DICM", "DICOM"),
        (b"\xff\xd8\xff\xc0\x00\x0b\x0c" + bytes(20), "12-bit JPEG"),
    ],
)
def test_what_is_not_read_is_called_by_its_name(head: bytes, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        decode_image(head, form(1, 1, 1))


def test_a_cube_of_fits_is_refused(tmp_path: Path) -> None:
    cards = ["SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 3", "NAXIS1  = 4", "NAXIS2  = 4", "NAXIS3  = 2", "END"]
    head = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    with pytest.raises(Unreadable, match="further planes of FITS"):
        decode_image(head + bytes(2880), form(4, 4, 1, bits=8))


def png_of(values: np.ndarray, clear: np.ndarray) -> bytes:
    """A PNG of 16 bits with one colour that stands for clear (tRNS), by its specification."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, bands = values.shape
    head = struct.pack(">IIBBBBB", width, height, 16, 0 if bands == 1 else 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = chunk(b"tRNS", clear.astype(">u2").tobytes()) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + parts


@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_clear_colour_of_sixteen_bits_is_alpha(bands: int, bits: int) -> None:
    if bands == 3:
        pytest.importorskip("imagecodecs")
    values = values_of((4, 4, bands))
    stored = png_of(values, values[1, 2])
    alpha = np.full((4, 4), 2**bits - 1)
    alpha[1, 2] = 0
    assert np.array_equal(decode_image(stored, form(4, 4, bands + 1, bits=bits))[-1], alpha)
    assert (decode_image(stored, form(4, 4, bands, bits=bits))[:, 1, 2] == 2**bits - 1).all()  # laid on white


@pytest.mark.parametrize("kind", ["jp2", "j2k"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_four_bands_of_jpeg_2000_are_alpha_where_it_is_defined_and_signs_are_kept(kind: str, dtype: Any) -> None:
    codecs = pytest.importorskip("imagecodecs")
    values = values_of((8, 8, 4), dtype)
    stored = codecs.jpeg2k_encode(values, level=0, codecformat=kind)
    signed = np.dtype(dtype).kind == "i"
    limits = {"value_range": (-32768.0, 32767.0)} if signed else {}
    scale = 257 if dtype == np.uint8 else 1
    found = decode_image(stored, form(8, 8, 4, **limits))
    assert np.array_equal(found, np.moveaxis(values.astype(int) * scale + 32768 * signed, -1, 0))
    with pytest.raises(Unreadable, match="4 bands of shape"):
        decode_image(stored, form(8, 8, 3, **limits))
    with pytest.raises(Unreadable, match="no stated range" if signed else "4 bands of shape"):
        decode_image(stored, form(8, 8, 3))
    alpha = saved("JPEG2000", Image.fromarray(values_of((8, 8, 4), np.uint8)))
    assert decode_image(alpha, form(8, 8, 3, bits=8)).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"photometric": "palette", "colormap": np.zeros((3, 65536), np.uint16)}, "palette indices"),
        ({"photometric": "miniswhite", "dtype": np.float32}, "count from white"),
        ({"photometric": "minisblack", "pages": 3, "imagej": True, "truncate": True, "metadata": {}}, "one header"),
        ({"photometric": "minisblack", "pages": 3, "metadata": {}, "truncate": True}, "one header"),
    ],
    ids=["palette", "white", "imagej", "shaped"],
)
def test_a_tiff_whose_values_mean_something_else_or_more_is_refused(options: dict[str, Any], reason: str) -> None:
    options = dict(options)
    shape = (options.pop("pages"), 6, 5) if "pages" in options else (6, 5)
    values = values_of(shape).astype(options.pop("dtype", np.uint16))
    with pytest.raises(Unreadable, match=reason):
        decode_image(tiff(values, **options), form(6, 5, 1))


def test_the_lowest_value_of_a_tiff_may_be_white() -> None:
    for dtype in (np.uint8, np.uint16):
        values = values_of((6, 5), dtype)
        stored, scale = tiff(values, photometric="miniswhite"), 257 if dtype == np.uint8 else 1
        assert np.array_equal(decode_image(stored, form(6, 5, 1))[0], 65535 - values.astype(int) * scale)
        shallow = decode_image(stored, form(6, 5, 1, bits=8))[0]
        assert np.array_equal(shallow, np.rint((65535 - values.astype(int) * scale) / 257))


@pytest.mark.parametrize(
    "options", [{"imagej": True, "metadata": {"axes": "ZYX"}}, {"ome": True, "metadata": {"axes": "CYX"}}]
)
def test_the_pages_of_hyperstacks_are_bands(options: dict[str, Any]) -> None:
    values = values_of((5, 6, 7))
    found = decode_image(tiff(values, photometric="minisblack", **options), form(6, 7, 5))
    assert np.array_equal(found, values)
    with pytest.raises(Unreadable, match="5 bands"):
        decode_image(tiff(values, photometric="minisblack", **options), form(6, 7, 4))


@pytest.mark.parametrize("extra", [0, 1, 2])
@pytest.mark.parametrize("bands", [2, 4])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_extra_samples_are_alpha_by_their_tag_alone(extra: int, bands: int, planar: str) -> None:
    values = values_of((6, 5, bands))
    if extra == 1:  # premultiplied: no colour is above its alpha
        values[..., :-1] = np.minimum(values[..., :-1], values[..., -1:])
    stored = values if planar == "contig" else np.moveaxis(values, -1, 0)
    photometric = "minisblack" if bands == 2 else "rgb"
    file = tiff(stored, photometric=photometric, planarconfig=planar, extrasamples=[extra])
    found = decode_image(file, form(6, 5, bands))
    alpha = values[..., -1:].astype(float)
    colour = values[..., :-1] * 65535.0 / np.where(alpha > 0, alpha, 1) if extra == 1 else values[..., :-1]
    assert np.array_equal(found, np.moveaxis(np.concatenate([np.rint(colour), alpha], axis=2), -1, 0))
    if extra == 0:
        with pytest.raises(Unreadable, match=f"{bands} bands"):
            decode_image(file, form(6, 5, bands - 1))
    else:
        assert decode_image(file, form(6, 5, bands - 1)).shape == (bands - 1, 6, 5)


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "packbits", "zstd"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_every_way_to_store_a_tiff_of_sixteen_bits(compression: str | None, order: str, tile: Any) -> None:
    for bands in (1, 3, 4):
        values = values_of((6, 5, bands))
        more = {} if bands == 1 else {"planarconfig": "contig"}
        stored = values[..., 0] if bands == 1 else values
        photometric = "rgb" if bands == 3 else "minisblack"
        file = tiff(stored, photometric=photometric, compression=compression, byteorder=order, tile=tile, **more)
        assert np.array_equal(decode_image(file, form(6, 5, bands)), np.moveaxis(values, -1, 0))


def test_the_window_of_a_deep_image_lies_where_asked_without_center_crop() -> None:
    wide = np.repeat(np.arange(0, 24_000, 1000, dtype=np.uint16)[None], 8, axis=0)  # 8 × 24, a ramp
    form = ImageFormat(8, 8, 1, center_crop=False, bits=16)
    left, right = (decode_image(wide, form, place)[0, 0].tolist() for place in (0.0, 1.0))
    assert left == list(range(0, 8000, 1000)) and right == list(range(16_000, 24_000, 1000))
    assert decode_image(wide, form._replace(center_crop=True), 0.0)[0, 0].tolist() == list(range(8000, 16_000, 1000))
