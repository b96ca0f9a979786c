"""Data: every source, every kind of picture, the order of training, and what is refused."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ddpm_ext.data import dataset, rows
from ddpm_ext.data.dataset import ImageSet, load_images
from ddpm_ext.data.decoding.levels import ImageFormat, decode_image
from ddpm_ext.data.order import Batch, epoch_order, positions_to_indices, prefetch, random_flip


def random_picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(height * 31 + width).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(-1) if channels == 1 else values, mode if channels in (2, 4) else None)


def encode(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def save_folder(folder: Path, pictures: dict[str, Image.Image]) -> str:
    for name, picture in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name)
    return str(folder)


def fit(height: int, width: int, channels: int, center_crop: bool = True) -> ImageFormat:
    return ImageFormat(height, width, channels, center_crop)


# One picture ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("LA", 2), ("RGBA", 4)])
def test_a_picture_of_the_right_size_keeps_every_pixel(mode: str, channels: int) -> None:
    picture = random_picture(6, 9, mode)
    pixels = decode_image(encode(picture), fit(6, 9, channels))
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    expected = np.asarray(picture).reshape(6, 9, channels)
    assert np.array_equal(pixels, expected.transpose(2, 0, 1))


def test_grey_is_repeated_for_a_network_of_colour() -> None:
    picture = random_picture(4, 4, "L")
    pixels = decode_image(encode(picture), fit(4, 4, 3))
    assert pixels.shape == (3, 4, 4)
    assert all(np.array_equal(channel, np.asarray(picture)) for channel in pixels)


def test_colour_becomes_grey_by_the_luma_of_rec_601() -> None:
    picture = random_picture(4, 4)
    luma = np.asarray(picture).astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs(decode_image(encode(picture), fit(4, 4, 1))[0] - luma).max() <= 0.51  # rounded once


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 4), ("L", 4), ("RGB", 2), ("L", 2), ("RGB", 5), ("L", 5)])
def test_neither_alpha_nor_bands_are_made_up(mode: str, channels: int) -> None:
    with pytest.raises(ValueError, match=f"the network has {channels} channels"):
        decode_image(encode(random_picture(4, 4, mode)), fit(4, 4, channels))


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_clear_is_white_whatever_colour_hides_there(channels: int) -> None:
    hidden = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    hidden.putpixel((1, 0), (40, 40, 40, 255))
    assert decode_image(encode(hidden), fit(1, 2, channels)).tolist() == [[[255, 40]]] * channels
    grey = Image.merge("LA", (Image.new("L", (2, 1), 40), Image.fromarray(np.array([[0, 255]], np.uint8))))
    assert decode_image(encode(grey), fit(1, 2, channels)).tolist() == [[[255, 40]]] * channels


def test_half_clear_is_mixed_with_white() -> None:
    picture = Image.new("RGBA", (1, 1), (0, 100, 200, 51))  # alpha 1/5
    assert decode_image(encode(picture), fit(1, 1, 3)).ravel().tolist() == [204, 224, 244]


def test_palettes_are_resolved() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([1, 2, 3, 200, 100, 50])
    picture.putpixel((1, 0), 1)
    assert decode_image(encode(picture), fit(1, 2, 3)).reshape(3, 2).T.tolist() == [[1, 2, 3], [200, 100, 50]]
    clear = decode_image(encode(picture, transparency=0), fit(1, 2, 3)).reshape(3, 2).T.tolist()
    assert clear == [[255, 255, 255], [200, 100, 50]]


def test_sixteen_bits_are_rounded_to_eight() -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    pixels = decode_image(encode(Image.fromarray(values)), fit(1, 6, 1))
    assert pixels[0].tolist() == [np.round(values[0] / 257).astype(int).tolist()]
    assert decode_image(encode(Image.fromarray(values)), fit(1, 6, 3)).shape == (3, 1, 6)


def test_one_bit_and_cmyk() -> None:
    assert decode_image(encode(Image.new("1", (1, 1), 1)), fit(1, 1, 1)).item() == 255
    assert decode_image(encode(Image.new("CMYK", (8, 8)), "jpeg"), fit(8, 8, 3)).min() == 255


def test_floats_are_refused() -> None:
    with pytest.raises(ValueError, match="no stated range"):
        decode_image(encode(Image.new("F", (1, 1)), "tiff"), fit(1, 1, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(orientation: int) -> None:
    picture = random_picture(4, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = decode_image(encode(picture, exif=exif), fit(*((6, 4) if orientation > 4 else (4, 6)), 3))
    # The EXIF standard: where row 0 and column 0 of the stored picture lie in the upright one.
    stored = np.asarray(picture)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).transpose(1, 0, 2),
        8: np.rot90(stored),
    }[orientation]
    assert np.array_equal(turned.transpose(1, 2, 0), upright)


@pytest.mark.parametrize("size", [(5, 7), (8, 8), (20, 6)])
def test_other_sizes_are_scaled_and_cropped_in_the_middle(size: tuple[int, int]) -> None:
    picture = random_picture(12, 18)
    expected = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.LANCZOS)
    pixels = decode_image(encode(picture), fit(*size, 3))
    assert np.array_equal(pixels.transpose(1, 2, 0), np.asarray(expected))


def test_the_window_lies_where_asked_without_center_crop() -> None:
    wide = Image.fromarray(np.repeat(np.arange(0, 240, 10, dtype=np.uint8)[None], 8, axis=0))  # 8 × 24, a ramp
    left, right = (decode_image(encode(wide), fit(8, 8, 1, center_crop=False), place) for place in (0.0, 1.0))
    assert left[0, 0].tolist() == list(range(0, 80, 10))
    assert right[0, 0].tolist() == list(range(160, 240, 10))
    assert decode_image(encode(wide), fit(8, 8, 1), 0.0)[0, 0].tolist() == list(range(80, 160, 10))


# Order ----------------------------------------------------------------------------------------------------------------


def test_an_epoch_holds_every_picture_once() -> None:
    order = epoch_order(1000, seed=3, epoch=2)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(1000))
    assert not np.array_equal(order, epoch_order(1000, 3, 1))
    assert not np.array_equal(order, epoch_order(1000, 4, 2))
    assert not np.array_equal(order, np.arange(1000))


def test_positions_cross_epochs_without_losing_or_doubling_a_picture() -> None:
    n, batch = 23, 5
    batches = [positions_to_indices(range(u * batch, (u + 1) * batch), n, seed=1) for u in range(2 * n)]
    read = torch.cat(batches).tolist()  # 230 positions: ten epochs
    for epoch in range(10):
        assert read[epoch * n : (epoch + 1) * n] == epoch_order(n, 1, epoch).tolist()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_processes_together_read_the_global_batch(world: int) -> None:
    images, share = load_images(), 64 // world
    whole = images.at(range(1472, 1536), seed=5)  # crosses the end of the epoch at 1,500
    parts = [images.at(range(1472 + r * share, 1472 + (r + 1) * share), seed=5) for r in range(world)]
    assert torch.equal(torch.cat([part.pixels for part in parts]), whole.pixels)


def test_negative_seeds_and_bad_positions() -> None:
    assert sorted(epoch_order(5, -1, 0).tolist()) == list(range(5))
    with pytest.raises(ValueError, match="count from 0"):
        positions_to_indices([-1], 5, 0)
    with pytest.raises(ValueError, match="num_images >= 1"):
        epoch_order(0, 0, 0)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1500\)"):
        load_images().batch([1500])


def test_flips_mirror_the_marked_pictures_alone() -> None:
    pixels = torch.randint(0, 256, (3, 2, 4, 5), dtype=torch.uint8)
    flipped = random_flip(pixels, torch.tensor([True, False, True]))
    assert flipped.dtype == torch.uint8
    for image, mirrored, marked in zip(pixels, flipped, (True, False, True), strict=True):
        expected = np.asarray(image)[:, :, ::-1] if marked else np.asarray(image)
        assert np.array_equal(mirrored, expected)
    with pytest.raises(ValueError, match=r"bool of shape \(3,\)"):
        random_flip(pixels, torch.tensor([1, 0, 1]))


def test_prefetch_gives_every_batch_in_order_and_reads_ahead() -> None:
    asked: list[int] = []
    reached = threading.Event()

    def ask(number: int) -> Batch:
        asked.append(number)
        if number == 2:
            reached.set()
        return Batch(torch.tensor([number]), None)

    batches = prefetch(ask, iter(range(7)), ahead=2)
    assert next(batches).pixels.item() == 0
    assert reached.wait(5)  # 1 and 2 are read while 0 is used
    assert [batch.pixels.item() for batch in batches] == [1, 2, 3, 4, 5, 6]
    assert asked == list(range(7))


def test_an_error_while_prefetching_reaches_the_caller() -> None:
    def ask(number: int) -> Batch:
        raise ValueError("unreadable")

    with pytest.raises(ValueError, match="unreadable"):
        next(prefetch(ask, iter([1, 2, 3])))


# Sources --------------------------------------------------------------------------------------------------------------


def test_the_built_in_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    train, test = load_images(), load_images("digits", split="test")
    assert (len(train), len(test)) == (1500, 297)
    assert train.shape == (1, 8, 8)
    assert train.num_classes == 10
    source = load_digits()
    expected = {
        (np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(source["images"], source["target"], strict=True)
    }
    found = set()
    for images in (train, test):
        batch = images.batch(range(len(images)))
        assert batch.labels is not None
        found |= {(p.numpy().tobytes(), int(label)) for p, label in zip(batch.pixels, batch.labels, strict=True)}
    assert len(expected) == 1797
    assert found == expected


def test_the_digits_name_their_source_and_licence() -> None:
    text = (Path(dataset.__file__).parent / "digits" / "SOURCE.md").read_text(encoding="utf-8")
    assert "Alpaydin" in text
    assert "CC BY 4.0" in text


def test_a_folder_of_pictures_with_class_folders(tmp_path: Path) -> None:
    pictures = {f"{kind}/{n}.png": random_picture(8, 8 + 8 * n) for kind in ("cat", "dog") for n in range(2)}
    images = load_images(train_data_dir=save_folder(tmp_path, pictures), resolution=(4, 6), channels=3)
    assert images.shape == (3, 4, 6)
    assert images.num_classes == 2
    batch = images.batch(range(4))
    assert batch.labels is not None
    assert sorted(batch.labels.tolist()) == [0, 0, 1, 1]
    expected = sorted(
        np.asarray(ImageOps.fit(picture, (6, 4), Image.Resampling.LANCZOS)).tobytes() for picture in pictures.values()
    )
    assert sorted(image.permute(1, 2, 0).numpy().tobytes() for image in batch.pixels) == expected


def test_a_flat_folder_is_the_training_split_whatever_its_names(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, {name: random_picture(4, 4) for name in ("test_1.png", "val.png", "a.png")})
    images = load_images(train_data_dir=folder)
    assert len(images) == 3
    assert images.num_classes is None
    assert images.batch([0]).labels is None
    assert len(load_images(folder)) == 3  # a local folder may be given as the name too
    for split in ("test", "validation", "banana", ""):
        with pytest.raises(ValueError, match=rf"Cannot open split '{split}' .* all of it is \"train\""):
            load_images(train_data_dir=folder, split=split)


def test_split_folders_are_splits(tmp_path: Path) -> None:
    names = {"train/a.png": 4, "train/b.png": 4, "test/c.png": 4}
    folder = save_folder(tmp_path, {name: random_picture(size, size) for name, size in names.items()})
    assert len(load_images(train_data_dir=folder)) == 2
    assert len(load_images(train_data_dir=folder, split="test")) == 1
    for split in ("validation", "banana"):
        with pytest.raises(ValueError, match=r"has the sub-folders \['train', 'test'\]"):
            load_images(train_data_dir=folder, split=split)


@pytest.mark.parametrize("there", ["train", "validation"])
def test_one_split_folder_is_that_split_alone(tmp_path: Path, there: str) -> None:
    """Training pictures must not be taken for test pictures, nor the other way round."""
    folder = save_folder(tmp_path, {f"{there}/{kind}/a.png": random_picture(4, 4) for kind in ("cat", "dog")})
    assert load_images(train_data_dir=folder, split=there).num_classes == 2
    for split in {"train", "test", "banana"} - {there}:
        with pytest.raises(ValueError, match=rf"Cannot open split '{split}' .* has the sub-folders \['{there}'\]"):
            load_images(train_data_dir=folder, split=split)


@pytest.mark.parametrize("own", [None, "train", "test", "test[:2]"])
def test_a_saved_set_is_its_own_split_alone(tmp_path: Path, own: str | None) -> None:
    table = datasets.Dataset.from_dict({"image": [random_picture(4, 4)] * 2}, split=own)
    table.cast_column("image", datasets.Image()).save_to_disk(tmp_path)
    asked = "test" if own and own.startswith("test") else "train"
    assert len(load_images(str(tmp_path), split=asked)) == 2
    with pytest.raises(ValueError, match=rf"holds the split '{re.escape(own or 'train')}' alone"):
        load_images(str(tmp_path), split="validation")


def picture_table(pictures: list[Any], **columns: list[Any]) -> datasets.Dataset:
    table = datasets.Dataset.from_dict({"image": pictures, **columns})
    return table.cast_column("image", datasets.Image())


@pytest.mark.parametrize("kind", ["parquet", "saved", "saved_splits"])
def test_parquet_folders_and_saved_sets(tmp_path: Path, kind: str) -> None:
    pictures = [random_picture(4, 4 + 0 * n) for n in range(3)] + [random_picture(4, 4, "L")]
    table = picture_table(pictures, label=[3, 0, 1, 2])
    if kind == "parquet":
        table.select(range(2)).to_parquet(tmp_path / "train-00000-of-00002.parquet")
        table.select(range(2, 4)).to_parquet(tmp_path / "train-00001-of-00002.parquet")
    else:
        (datasets.DatasetDict({"train": table}) if kind == "saved_splits" else table).save_to_disk(str(tmp_path))
    images = load_images(train_data_dir=str(tmp_path), label_column="label")
    batch = images.batch([3, 0])
    assert images.shape == (3, 4, 4)
    assert images.num_classes == 4
    assert batch.labels is not None
    assert batch.labels.tolist() == [2, 3]
    assert torch.equal(batch.pixels[0, 0], torch.from_numpy(np.asarray(pictures[3]).copy()))
    assert torch.equal(batch.pixels[1], torch.from_numpy(np.asarray(pictures[0]).transpose(2, 0, 1).copy()))


def test_any_column_may_hold_the_pictures_and_words_may_be_labels(tmp_path: Path) -> None:
    table = picture_table([random_picture(4, 4)] * 3, kind=["dog", "cat", "dog"]).rename_column("image", "photo")
    table.to_parquet(tmp_path / "train.parquet")
    folder = str(tmp_path)
    assert load_images(folder).num_classes is None
    images = load_images(folder, image_column="photo", label_column="kind")
    labels = images.batch(range(3)).labels
    assert labels is not None
    assert labels.tolist() == [1, 0, 1]
    assert images.num_classes == 2


def test_max_images_takes_the_first_rows() -> None:
    assert torch.equal(load_images(max_images=7).batch(range(7)).pixels, load_images().batch(range(7)).pixels)
    assert len(load_images(max_images=10_000)) == 1500


# Keeping --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path: Path) -> str:
    folder = tmp_path / "set"
    folder.mkdir()
    pictures = [{"bytes": encode(random_picture(6 + n % 3, 8)), "path": f"{n}.png"} for n in range(20)]
    pictures[5] = {"bytes": b"no picture", "path": "broken.png"}
    pictures[11] = {"bytes": encode(random_picture(8, 8))[:-60], "path": "cut.png"}
    picture_table(pictures, label=list(range(20))).to_parquet(folder / "train.parquet")
    return str(folder)


def open_kept(folder: str, how: str, cache: Path, **options: Any) -> ImageSet:
    limits = {"memory": {}, "file": {"memory_bytes": 0}, "asked": {"memory_bytes": 0, "mapped_bytes": 0}}[how]
    options = {"max_unreadable": 0.2, "cache_dir": str(cache), **limits, **options}
    return load_images(folder, resolution=8, channels=3, label_column="label", **options)


def test_memory_and_file_hold_the_same(parquet: str, tmp_path: Path) -> None:
    memory, file = (open_kept(parquet, how, tmp_path / "cache", num_workers=2) for how in ("memory", "file"))
    assert len(memory) == len(file) == 18
    assert memory.fingerprint == file.fingerprint
    assert memory.skipped == file.skipped
    assert [name.split()[0] for name in memory.skipped] == ["broken.png", "cut.png"]
    one, other = memory.batch(range(18)), file.batch(range(18))
    assert torch.equal(one.pixels, other.pixels)
    assert one.labels is not None
    assert other.labels is not None
    assert one.labels.tolist() == other.labels.tolist() == [n for n in range(20) if n not in (5, 11)]


def test_decoded_when_asked_for(parquet: str, tmp_path: Path) -> None:
    memory, asked = open_kept(parquet, "memory", tmp_path), open_kept(parquet, "asked", tmp_path, num_workers=2)
    assert len(asked) == 20
    assert asked.skipped == []
    readable = [n for n in range(20) if n not in (5, 11)]
    assert torch.equal(asked.batch(readable).pixels, memory.batch(range(18)).pixels)
    stands_in = asked.batch([5, 11, 5])  # the next readable picture
    assert torch.equal(stands_in.pixels, asked.batch([6, 12, 6]).pixels)
    assert len(asked.skipped) == 2


def test_the_picture_that_stands_in_brings_its_own_label(parquet: str, tmp_path: Path) -> None:
    asked = open_kept(parquet, "asked", tmp_path)
    labels = asked.batch([5, 11, 4]).labels
    assert labels is not None
    assert labels.tolist() == [6, 12, 4]


def test_a_damaged_tiff_at_which_pillow_raises_a_type_error_is_a_corrupt_picture(tmp_path: Path) -> None:
    damaged = bytearray(encode(Image.new("RGB", (8, 8)), "tiff"))
    damaged[72] = 12  # the type of a tag's number becomes float64
    with pytest.raises(TypeError):
        decode_image(bytes(damaged), fit(8, 8, 3))
    cells = [{"bytes": bytes(damaged), "path": "damaged.tiff"}, {"bytes": encode(random_picture(8, 8)), "path": "b"}]
    picture_table(cells).to_parquet(tmp_path / "train.parquet")
    images = load_images(str(tmp_path), resolution=8, channels=3, max_unreadable=0.5)
    assert len(images) == 1 and "damaged.tiff" in images.skipped[0]


@pytest.mark.parametrize("how", ["memory", "file", "asked"])
def test_strict_stops_at_the_first_corrupt_picture(parquet: str, tmp_path: Path, how: str) -> None:
    with pytest.raises(ValueError, match=r"The image broken\.png .* cannot be read"):
        open_kept(parquet, how, tmp_path, strict=True).batch([5])


def test_a_file_that_was_written_without_strict_is_still_refused_with_it(parquet: str, tmp_path: Path) -> None:
    open_kept(parquet, "file", tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        open_kept(parquet, "file", tmp_path, strict=True)


def test_the_file_is_written_once_and_read_by_the_others(
    parquet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_kept(parquet, "file", tmp_path)
    monkeypatch.setattr(rows, "decode_image", None)  # nobody decodes again
    second = open_kept(parquet, "file", tmp_path)
    assert second.fingerprint == first.fingerprint
    assert torch.equal(second.batch([1, 2]).pixels, first.batch([1, 2]).pixels)


def test_an_interrupted_write_leaves_nothing_that_counts(
    parquet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rows.np, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            open_kept(parquet, "file", tmp_path)
    assert len(open_kept(parquet, "file", tmp_path)) == 18


def test_a_full_disk_is_said_before_anything_is_written(
    parquet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows.shutil, "disk_usage", lambda _: _Usage)
    with pytest.raises(ValueError, match=r"needs 3,840 bytes .* and has 100: set cache_dir"):
        open_kept(parquet, "file", tmp_path)


class _Usage:
    free = 100


def test_several_who_start_at_once_write_one_file(
    parquet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = rows.decode_image, []

    def counted(*arguments: Any) -> np.ndarray:
        calls.append(1)
        return decode(*arguments)

    monkeypatch.setattr(rows, "decode_image", counted)
    load_images(parquet, resolution=8, channels=3, max_unreadable=1)  # datasets' own cache is made
    calls.clear()
    with ThreadPoolExecutor(4) as pool:
        sets = list(pool.map(lambda _: open_kept(parquet, "file", tmp_path), range(4)))
    assert len(calls) == 20
    assert len({images.fingerprint for images in sets}) == 1


def test_a_cache_beside_the_folder_does_not_grow_into_it(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    picture_table([random_picture(4, 4)] * 3).to_parquet(folder / "train.parquet")
    assert [len(load_images(str(folder), cache_dir=str(tmp_path))) for _ in range(3)] == [3, 3, 3]
    assert [path.name for path in folder.iterdir()] == ["train.parquet"]


@pytest.mark.slow
def test_several_processes_may_start_at_once(parquet: str, tmp_path: Path) -> None:
    code = (
        "import sys; from ddpm_ext.data.dataset import load_images\n"
        "o = {'cache_dir': sys.argv[2], 'memory_bytes': 0, 'max_unreadable': 1}\n"
        "s = load_images(sys.argv[1], resolution=8, channels=3, **o)\n"
        "print(s.fingerprint, s.batch(range(len(s))).pixels.long().sum().item())"
    )
    command = [sys.executable, "-c", code, parquet, str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert printed[0] == printed[1]


def test_fingerprints_tell_contents_labels_and_sizes_apart(tmp_path: Path) -> None:
    def mark(pictures: list[Image.Image], labels: list[int], **options: Any) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        picture_table(pictures, label=labels).to_parquet(folder / "train.parquet")
        return load_images(str(folder), label_column="label", channels=3, **options).fingerprint

    one, other = random_picture(4, 4), random_picture(4, 4)
    other.putpixel((0, 0), (0, 0, 0))
    assert mark([one, other], [0, 1]) == mark([one, other], [0, 1])
    marks = [
        mark([one, other], [0, 1]),
        mark([other, one], [0, 1]),
        mark([one, one], [0, 1]),
        mark([one, other], [1, 1]),
        mark([one, other], [0, 1], resolution=2),
        mark([one, other], [0, 1], mapped_bytes=0),
        mark([other, one], [0, 1], mapped_bytes=0),
    ]
    assert len(set(marks)) == len(marks)


# Refused before the first step ----------------------------------------------------------------------------------------


def refused(tmp_path: Path) -> dict[str, tuple[Callable[[], object], str]]:
    mixed = save_folder(tmp_path / "mixed", {"a.png": random_picture(4, 4), "b.png": random_picture(4, 6)})
    (tmp_path / "words").mkdir()
    datasets.Dataset.from_dict({"text": ["a"], "n": [1]}).to_parquet(tmp_path / "words" / "train.parquet")
    (tmp_path / "none").mkdir()
    picture_table([random_picture(4, 4)]).select([]).to_parquet(tmp_path / "none" / "train.parquet")
    (tmp_path / "bad").mkdir()
    picture_table([{"bytes": b"x", "path": "x.png"}, None]).to_parquet(tmp_path / "bad" / "train.parquet")
    (tmp_path / "two").mkdir()
    two = picture_table([random_picture(4, 4)], other=[random_picture(4, 4)], label=[-1])
    two.cast_column("other", datasets.Image()).to_parquet(tmp_path / "two" / "train.parquet")
    (tmp_path / "empty").mkdir()
    words, none, bad, two_, empty = (str(tmp_path / name) for name in ("words", "none", "bad", "two", "empty"))
    return {
        "mixed sizes": (lambda: load_images(mixed), r"several sizes .*a\.png.*\(4, 4\).*b\.png.*\(4, 6\).*resolution"),
        "no picture column": (lambda: load_images(words), r"columns \['text', 'n'\]"),
        "two picture columns": (lambda: load_images(two_), r"\['image', 'other'\] may"),
        "missing column": (
            lambda: load_images("digits", image_column="img"),
            r"columns \['image', 'label'\], got 'img'",
        ),
        "missing labels": (lambda: load_images(label_column="y"), r"columns \['image', 'label'\], got 'y'"),
        "no pictures": (lambda: load_images(words, image_column="n"), "does not hold images"),
        "no readable text": (lambda: load_images(words, image_column="text", resolution=4), "None of the 1 images"),
        "negative labels": (
            lambda: load_images(two_, image_column="image", label_column="label"),
            "classes from 0 upwards",
        ),
        "no rows": (lambda: load_images(none), "no data"),
        "max_images 0": (lambda: load_images(max_images=0), "is empty"),
        "empty folder": (
            lambda: load_images(train_data_dir=empty),
            "Cannot open split 'train' .*holds no images: it is empty",
        ),
        "no folder": (lambda: load_images(train_data_dir=empty + "x"), "no such folder"),
        "no split": (lambda: load_images("digits", split="dev"), '"train" and "test", got \'dev\''),
        "unknown name": (lambda: load_images("nobody/nothing"), "Cannot open split 'train' of 'nobody/nothing'"),
        "both": (lambda: load_images("digits", train_data_dir=mixed), "got both"),
        "none readable": (lambda: load_images(bad), "None of the 2 images can be read"),
        "none readable at a size": (lambda: load_images(bad, resolution=4, channels=3), "None of the 2 images"),
        "resolution": (lambda: load_images(resolution=0), "resolution must be"),
        "channels": (lambda: load_images(channels=0), "channels must be"),
    }


@pytest.mark.parametrize("case", range(19))
def test_what_cannot_be_trained_on_is_refused(tmp_path: Path, case: int) -> None:
    call, message = list(refused(tmp_path).values())[case]
    with pytest.raises(ValueError, match=message):
        call()
