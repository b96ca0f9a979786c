"""What is read of a file equals what was written into it by another, or it is refused by the name of the reason."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import netpbm, npy, pam, png, psd, tiff
from PIL import Image

from ddpm_ext.data import rows
from ddpm_ext.data.dataset import load_images
from ddpm_ext.data.decoding.files import Unreadable
from ddpm_ext.data.decoding.levels import ImageFormat, decode_image, probe

RANDOM = np.random.default_rng(0)
BANDS = RANDOM.integers(0, 65536, (6, 5, 5)).astype(np.uint16)
RGB = BANDS[..., :3].copy()


def cut(values: np.ndarray, bits: int) -> np.ndarray:
    """The high bits of 16-bit values, in the least type that holds them."""
    return (values >> (16 - bits)).astype(np.uint8 if bits <= 8 else np.uint16)


def read(
    stored: bytes, shape: tuple[int, ...], bits: int, value_range: tuple[float, float] | None = None
) -> np.ndarray:
    """Levels, shape (H, W, C), of an image of this shape."""
    form = ImageFormat(*shape, center_crop=True, bits=bits, value_range=value_range)  # pyright: ignore
    return np.moveaxis(decode_image(stored, form), 0, -1)


# Netpbm ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [2, 5, 3, 6])
@pytest.mark.parametrize("top", [1, 15, 100, 255, 256, 1023, 4095, 65535])
def test_netpbm_of_every_largest_value(kind: int, top: int) -> None:
    values = RANDOM.integers(0, top + 1, (6, 5, 3 if kind in (3, 6) else 1))
    stored = netpbm(values, kind, top)
    whole = top.bit_length()
    if top == 2**whole - 1:  # every stored value is a level
        assert np.array_equal(read(stored, values.shape, whole, (0, top)), values)
        assert np.array_equal(read(stored, values.shape, whole), values)
    for bits in (8, 16):
        exact = values * (2**bits - 1) / top
        assert np.abs(read(stored, values.shape, bits) - exact).max() <= 0.5 + (bits == 8) * 0.01  # Pillow rounds twice
        stated = read(stored, values.shape, bits, (0, 2 * top))
        assert np.abs(stated - exact / 2).max() <= 0.5


@pytest.mark.parametrize("kind", ["GRAYSCALE", "GRAYSCALE_ALPHA", "RGB", "RGB_ALPHA", "bands"])
@pytest.mark.parametrize("bits", [4, 8, 10, 16])
def test_pam_of_every_depth(kind: str, bits: int) -> None:
    count = {"GRAYSCALE": 1, "GRAYSCALE_ALPHA": 2, "RGB": 3, "RGB_ALPHA": 4, "bands": 5}[kind]
    values = cut(BANDS[..., :count], bits)
    stored = pam(values, 2**bits - 1, kind)
    assert np.array_equal(read(stored, values.shape, bits), values)
    assert np.array_equal(read(stored, values.shape, bits, (0, 2**bits - 1)), values)
    assert probe(stored) == (6, 5, count)
    if count == 5:
        with pytest.raises(Unreadable, match="5 bands"):
            read(stored, (6, 5, 4), bits)


@pytest.mark.parametrize("scale", ["-1.0", "1.0", "-3.5"])
@pytest.mark.parametrize("bands", [1, 3])
def test_pfm_of_both_orders_of_bytes(scale: str, bands: int) -> None:
    values = RGB[..., :bands].astype(np.float32)
    rows = values[::-1].astype("<f4" if scale.startswith("-") else ">f4").tobytes()  # from the lowest up
    stored = f"P{'F' if bands == 3 else 'f'}\n5 6\n{scale}\n".encode() + rows
    assert np.array_equal(read(stored, values.shape, 16, (0, 65535)), values)
    with pytest.raises(Unreadable, match=r"float32 values, .* have no stated range: give --value_range"):
        read(stored, values.shape, 8)


@pytest.mark.parametrize("kind", [1, 4])
def test_bitmaps_store_black_as_one(kind: int) -> None:
    black = RGB[..., 0] > 30_000
    content = "".join(str(int(one)) for one in black.ravel()).encode() if kind == 1 else np.packbits(black, 1).tobytes()
    stored = b"P%d\n5 6\n" % kind + content
    assert np.array_equal(read(stored, (6, 5, 1), 8)[..., 0], np.where(black, 0, 255))
    assert np.array_equal(read(stored, (6, 5, 1), 1, (0, 1))[..., 0], ~black)


# PNG and TIFF of few bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("kind", ["png", "tiff", "white"])
def test_few_bits_are_read_as_they_are_stored(kind: str, bits: int) -> None:
    values, top = cut(RGB[..., :1], bits), 2**bits - 1
    stored = png(values[..., 0], bits)
    if kind != "png":
        data = values[..., 0].astype(bool) if bits == 1 else values[..., 0]
        stored = tiff(data, bitspersample=bits, photometric="miniswhite" if kind == "white" else "minisblack")
    values = top - values if kind == "white" else values
    assert np.array_equal(read(stored, (6, 5, 1), bits, (0, top)), values)
    for depth in (bits, 8, 16):
        assert np.array_equal(read(stored, (6, 5, 1), depth), values.astype(int) * ((2**depth - 1) // top))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_clear_value_of_few_bits_is_alpha(bits: int) -> None:
    values, top = cut(RGB[..., :1], bits), 2**bits - 1
    clear = int(values[2, 2, 0])
    for depth in (bits, 8, 16):
        levels = np.concatenate([values.astype(int), (values != clear) * top], axis=2) * ((2**depth - 1) // top)
        assert np.array_equal(read(png(values[..., 0], bits, clear), (6, 5, 2), depth), levels)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_with_a_clear_value_is_grey_and_alpha(bits: int) -> None:
    stored = png(cut(RGB[..., 0], bits), bits, 1)
    assert probe(stored) == (6, 5, 1)
    with pytest.raises(Unreadable, match="it holds grey and alpha, and the network has 5 channels"):
        read(stored, (6, 5, 5), 8)


# TIFF -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("compression", "predictor"), [(None, False), *((name, on) for name in ("zlib", "lzw") for on in (False, True))]
)
@pytest.mark.parametrize("bands", [1, 3])
def test_tiff_of_every_type_order_and_compression(
    dtype: str, order: str, predictor: bool, compression: str | None, bands: int
) -> None:
    values = cut(BANDS[..., :bands], 7).astype(f"{order}{dtype}")
    more: dict[str, Any] = {"predictor": 3 if dtype[0] == "f" else 2} if predictor else {}
    data = values[..., 0] if bands == 1 else values
    stored = tiff(
        data,
        photometric="minisblack" if bands == 1 else "rgb",
        byteorder=order,
        compression=compression,
        bigtiff=bands == 1,
        **more,
    )
    assert np.array_equal(read(stored, values.shape, 8, (0, 255)), values)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("bands", [3, 4])
@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_tiff_of_separate_planes_and_tiles(bits: int, bands: int, tile: Any) -> None:
    values = cut(BANDS[..., :bands], bits)
    options = {"extrasamples": ["unassalpha"]} if bands == 4 else {}
    stored = tiff(np.moveaxis(values, -1, 0), photometric="rgb", planarconfig="separate", tile=tile, **options)
    assert np.array_equal(read(stored, values.shape, bits), values)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["tiff", "tiff 16", "jpeg", "png"])
def test_the_orientation_tag_is_applied(kind: str, orientation: int) -> None:
    """Where row 0 and column 0 of the stored image lie in the upright one (TIFF 6.0, page 36)."""
    values = np.kron(cut(RGB, 8), np.ones((8, 8, 1), np.uint8))
    upright = {1: "", 2: "x", 3: "xy", 4: "y", 5: "t", 6: "tx", 7: "txy", 8: "ty"}[orientation]
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    if kind == "tiff 16":
        values = values * np.uint16(257)
    if kind.startswith("tiff"):
        stored = tiff(values, photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    else:
        Image.fromarray(values).save(
            buffer, kind, exif=exif, **({"quality": 100, "subsampling": 0} if kind == "jpeg" else {})
        )
        stored = buffer.getvalue()
        values = np.asarray(Image.open(buffer))
    values = values.transpose(1, 0, 2) if "t" in upright else values
    values = values[:, ::-1] if "x" in upright else values
    values = values[::-1] if "y" in upright else values
    assert np.array_equal(read(stored, values.shape, 16 if kind == "tiff 16" else 8), values)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("photometric", "bands", "reason"),
    [
        ("separated", 4, r"CMYK \(separated\)"),
        ("cielab", 3, "CIELab"),
        ("icclab", 3, "ICCLab"),
        ("ycbcr", 3, "YCbCr"),
        ("logl", 1, "LogL"),
        ("logluv", 3, "LogLuv"),
        ("cfa", 1, "colour filter array"),
        ("linear_raw", 3, "linear raw"),
        ("depth_map", 1, "depth map"),
        ("mask", 1, "transparency mask"),
    ],
)
def test_tiff_of_other_colours_is_refused_at_every_depth(photometric: str, bands: int, reason: str, bits: int) -> None:
    values = cut(BANDS[..., :bands], bits)
    data = values[..., 0] > 99 if photometric == "mask" else values[..., 0] if bands == 1 else values
    stored = tiff(data, photometric=photometric, **({"planarconfig": "contig"} if bands > 1 else {}))
    for channels in (1, 3, 4):
        with pytest.raises(Unreadable, match=f"it stores .*{reason}.*: convert it to grey, RGB or bands"):
            read(stored, (6, 5, channels), bits)


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000", "webp", "png", "zstd", "packbits", "deflate", "lzma"])
@pytest.mark.parametrize("bands", [1, 3])
def test_codecs_inside_tiff_give_what_tifffile_gives(compression: str, bands: int) -> None:
    values = np.kron(cut(RGB, 8), np.ones((8, 8, 1), np.uint8))
    data = values if bands == 3 else values[..., 0].copy()
    try:
        stored = tiff(data, photometric="rgb" if bands == 3 else "minisblack", compression=compression)
    except ValueError:
        pytest.skip(f"no {compression} of {bands} bands")
    whole = pytest.importorskip("tifffile").imread(io.BytesIO(stored))
    assert np.array_equal(read(stored, (*values.shape[:2], bands), 8), np.atleast_3d(whole))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("bands", [1, 3])
def test_pixels_without_data_are_refused(bits: int, bands: int) -> None:
    values = cut(RGB[..., :bands], bits) | 1
    holes = values.copy()
    holes[1, 2] = holes[3, 4] = 0
    shown, tags = ("rgb" if bands == 3 else "minisblack"), [(42113, 2, 0, "0", True)]  # GDAL_NODATA
    whole, broken = (tiff(np.squeeze(one), photometric=shown, extratags=tags) for one in (values, holes))
    assert np.array_equal(read(whole, values.shape, bits), values)
    with pytest.raises(Unreadable, match="2 of its pixels hold 0 in a band, its value for no data"):
        read(broken, values.shape, bits)
    floats = tiff(np.where(holes[..., 0] > 0, holes[..., 0], -9999.0), extratags=[(42113, 2, 0, "-9999", True)])
    with pytest.raises(Unreadable, match="2 of its pixels hold -9999"):
        read(floats, (6, 5, 1), 16, (-10_000, 70_000))


GREY = cut(RGB[..., 0], 8)


@pytest.mark.parametrize(
    ("name", "first", "second", "options"),
    [
        ("PhotometricInterpretation", GREY, GREY, {"photometric": "miniswhite"}),
        ("PhotometricInterpretation", cut(RGB, 8), GREY, {}),
        ("BitsPerSample", RGB[..., 0], GREY, {}),
        ("BitsPerSample", GREY, RGB[..., 0], {}),
        ("SampleFormat", GREY.astype(np.float32), GREY.astype(np.int32), {}),
        ("Orientation", GREY, GREY, {"extratags": [(274, 3, 1, 3, True)]}),
        ("GDAL_NODATA", GREY, GREY, {"extratags": [(42113, 2, 0, "0", True)]}),
    ],
)
def test_pages_whose_tags_differ_are_refused(name: str, first: Any, second: Any, options: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    with pytest.importorskip("tifffile").TiffWriter(buffer) as file:
        for page in (first, first):
            file.write(page, metadata=None, photometric="rgb" if page.ndim == 3 else "minisblack")
        file.write(second, metadata=None, **{"photometric": "minisblack", **options})
    with pytest.raises(Unreadable, match=rf"{name} is .* in page 1 and .* in page 3: write all pages alike, or split"):
        read(buffer.getvalue(), (6, 5, 3), 8, (0, 255))


def test_pages_with_the_same_tags_keep_their_meaning() -> None:
    pages, turned = np.moveaxis(cut(RGB, 8), 2, 0), cut(RGB, 8)[::-1, ::-1]
    buffer = io.BytesIO()
    with pytest.importorskip("tifffile").TiffWriter(buffer) as file:
        file.write(pages[0, :3, :2], metadata=None, subfiletype=1, photometric="minisblack")  # a preview
        for page in pages:
            file.write(page, metadata=None, photometric="miniswhite", extratags=[(274, 3, 1, 3, True)])
    assert np.array_equal(read(buffer.getvalue(), (6, 5, 3), 8), 255 - turned)


@pytest.mark.parametrize(
    ("no_data", "kind", "reason"),
    [
        ("7", "u1", "hold 7 in a band"),
        ("7,0", "u2", "hold 7,0 in a band"),
        ("-9999", "f4", "hold -9999 in a band"),
        ("-3.40282e+38", "f4", r"hold -3.40282e\+38 in a band"),
        ("none at all", "u1", "'none at all', no number"),
    ],
)
@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_a_band_without_data_is_refused(no_data: str, kind: str, reason: str, planes: str) -> None:
    values = (BANDS[..., :2] % 100 + 10).astype(kind)
    values[2, 3, 1] = {"7,0": 7, "-3.40282e+38": np.finfo(np.float32).min}.get(no_data, 7 if kind == "u1" else -9999)
    stored = tiff(
        values if planes == "contig" else np.moveaxis(values, 2, 0),
        photometric="minisblack",
        planarconfig=planes,
        extratags=[(42113, 2, 0, no_data, True)],
    )
    with pytest.raises(Unreadable, match=reason):
        read(stored, (6, 5, 2), 16, (-3.5e38, 300))


@pytest.mark.parametrize("bits", [8, 16])
def test_values_that_count_from_white_are_refused_as_such(bits: int) -> None:
    values = cut(RGB[..., 0], bits)
    stored = tiff(values, photometric="miniswhite")
    counted = f"{2**bits - 1 - values.max()} to {2**bits - 1 - values.min()}"
    with pytest.raises(Unreadable, match=rf"its values, {counted} \(counted from black; 0 is white\), leave"):
        read(stored, (6, 5, 1), 8, (0, 99))


# A stated range -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "npy"])
@pytest.mark.parametrize(("top", "said"), [(65535, True), (4095, True), (255 * 16, False), (255, False)])
def test_values_that_fill_little_of_a_stated_range_are_said(
    kind: str, top: int, said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = RANDOM.permutation(np.arange(256)).astype(np.uint8).reshape(16, 16)
    (tmp_path / f"a.{kind}").write_bytes(png(values, 8) if kind == "png" else npy(values))
    rows._said.clear()
    load_images(train_data_dir=str(tmp_path), value_range=(0, top))
    sentence = f"The stored values, 0 to 255, fill less than 1/16 of --value_range 0 {top}"
    assert (sentence in capsys.readouterr().err) is said


# JPEG 2000 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jp2", "j2k"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.parametrize("bits", range(1, 17))
def test_jpeg_2000_of_every_depth(kind: str, signed: bool, bands: int, bits: int) -> None:
    lo, top = -(2 ** (bits - 1)) * signed, 2**bits - 1
    values = cut(RGB[..., :bands], bits).astype(int) + lo
    data = values.astype(f"{'i' if signed else 'u'}{1 if bits <= 8 else 2}")
    stored = pytest.importorskip("imagecodecs").jpeg2k_encode(
        data if bands == 3 else data[..., 0], level=0, reversible=True, bitspersample=bits, codecformat=kind
    )
    assert np.array_equal(read(stored, values.shape, bits, (lo, lo + top)), values - lo)
    assert np.array_equal(read(stored, values.shape, 16, (lo, lo + 2 * top)), np.rint((values - lo) / top * 32767.5))
    if signed:
        with pytest.raises(Unreadable, match="no stated range: give --value_range"):
            read(stored, values.shape, 8)
        return
    for depth in {bits, 16, 8}:
        exact = values * ((2**depth - 1) / top)
        assert np.abs(read(stored, values.shape, depth) - exact).max() <= (1.5 if (bits, depth) == (16, 8) else 0.5)


def test_jpeg_2000_behind_a_long_box_is_read_and_one_of_several_depths_is_refused() -> None:
    codecs = pytest.importorskip("imagecodecs")
    values = cut(RGB, 12)
    stored = codecs.jpeg2k_encode(values, level=0, reversible=True, bitspersample=12, codecformat="jp2")
    at = stored.index(b"jp2c") - 4
    long = stored[:at] + (80_000).to_bytes(4, "big") + b"free" + bytes(79_992) + stored[at:]
    assert np.array_equal(read(long, values.shape, 12), values)
    siz = stored.index(b"\xff\x4f\xff\x51") + 42
    mixed = stored[: siz + 3] + bytes([7]) + stored[siz + 4 :]
    with pytest.raises(Unreadable, match=r"its components store \[8, 12\] bits"):
        read(mixed, values.shape, 12)


def test_deep_grey_jpeg_2000_without_the_extra_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = pytest.importorskip("imagecodecs").jpeg2k_encode(cut(RGB[..., 0], 12), level=0, bitspersample=12)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(Unreadable, match="12-bit JPEG2000 images are read whole by imagecodecs"):
        read(stored, (6, 5, 1), 12)


# Others ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "channels", "bits", "reason"),
    [
        (1, 1, 8, None),
        (3, 3, 8, None),
        (-3, 4, 8, None),
        (3, 4, 8, "4 channels, of which not all are colour"),
        (4, 4, 8, "CMYK"),
        (9, 3, 8, "LAB"),
        (7, 3, 8, "3 channels, of which not all"),
        (3, 3, 16, "PSD of other than 8 bits"),
        (1, 1, 16, "PSD of other than 8 bits"),
    ],
)
def test_psd_is_read_where_every_channel_is_colour(mode: int, channels: int, bits: int, reason: str | None) -> None:
    values = cut(BANDS[..., :channels], bits)
    stored = psd(values, abs(mode), alpha=mode < 0)
    if reason is None:
        assert np.array_equal(read(stored, values.shape, bits), values)
        return
    with pytest.raises(Unreadable, match=reason):
        read(stored, values.shape, bits)


@pytest.mark.parametrize("kind", ["u8", "i8"])
def test_integers_that_float64_does_not_tell_apart_are_refused(kind: str) -> None:
    values = RGB[..., 0].astype(kind) + 2**53 - 70_000
    lo = 2**53 - 70_000
    assert np.array_equal(read(npy(values), (6, 5, 1), 16, (lo, lo + 65535))[..., 0], RGB[..., 0])
    values[1, 1] = 2**53 + 1
    with pytest.raises(Unreadable, match=r"integers beyond 2\^53"):
        read(npy(values), (6, 5, 1), 16, (lo, lo + 140_000))


FOREIGN = {
    "a.hdr": (b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n", "Radiance HDR"),
    "b.exr": (b"v/1\x01" + bytes(40), "OpenEXR"),
    "c.dcm": (bytes(128) + b"DICM" + bytes(40), "DICOM"),
    "d.nii": (b"\x5c\x01\0\0" + bytes(344), "NIfTI"),
    "e.nii.gz": (b"\x1f\x8b\x08" + bytes(40), "NIfTI"),
    "f.h5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5 or NetCDF"),
    "g.nc": (b"CDF\x01" + bytes(40), "NetCDF"),
    "h": (bytes(128) + b"DICM" + bytes(40), "DICOM"),
    "i.mat": (b"MATLAB 5.0 MAT-file" + bytes(200), "MATLAB"),
    "j.nrrd": (b"NRRD0004\n", "NRRD"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_formats_that_are_not_read_are_named_with_what_to_store(name: str, tmp_path: Path) -> None:
    content, what = FOREIGN[name]
    sentence = f"{what}.* not read: store PNG, TIFF or .npy, floats and signed integers with --value_range"
    with pytest.raises(Unreadable, match=sentence):
        read(content, (6, 5, 1), 8)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        load_images(train_data_dir=str(tmp_path))


def test_pam_and_pfm_lie_in_folders_as_other_images(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.pam").write_bytes(pam(RGB, 65535, "RGB"))
    found = load_images(train_data_dir=str(tmp_path), bits=16)
    assert found.shape == (3, 6, 5) and np.array_equal(found.batch([1]).pixels[0].numpy(), np.moveaxis(RGB, -1, 0))
