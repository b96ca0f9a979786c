"""Streams: every picture once per epoch on any number of processes, exact and elastic resume.

The set has 2,000 pictures in 7 shards of several sizes, each picture holding its own number in its first two pixels.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_ext.data.dataset import load_images
from ddpm_ext.data.order import Batch
from ddpm_ext.data.streaming import ImageStream, file_mark, stream_images

SHARDS = (300, 290, 280, 310, 270, 260, 290)
NUM_IMAGES, BATCH, BLOCK = sum(SHARDS), 48, 128  # 2,000 is a multiple of neither
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcde"))})


def numbered(number: int) -> Image.Image:
    pixels = np.zeros((4, 4), np.uint8)
    pixels[0, :2] = divmod(number, 256)
    return Image.fromarray(pixels)


def numbers_of(batch: Batch) -> list[int]:
    return (batch.pixels[:, 0, 0, 0].long() * 256 + batch.pixels[:, 0, 0, 1]).tolist()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, start = tmp_path_factory.mktemp("shards"), 0
    for index, rows in enumerate(SHARDS):
        numbers = range(start, start + rows)
        columns = {"image": [numbered(number) for number in numbers], "label": [number % 5 for number in numbers]}
        datasets.Dataset.from_dict(columns, features=FEATURES).to_parquet(
            folder / f"train-{index:05d}-of-{len(SHARDS):05d}.parquet"
        )
        start += rows
    return str(folder)


def open_stream(folder: str, **options: object) -> ImageStream:
    return stream_images(
        train_data_dir=folder, resolution=4, channels=1, block_rows=BLOCK, **{"max_unreadable": 1, **options}
    )  # pyright: ignore


def positions_of(update: int, rank: int, world: int) -> range:
    share = BATCH // world
    start = update * BATCH + rank * share
    return range(start, start + share)


def train(streams: list[ImageStream], updates: range, seed: int = 3) -> list[list[int]]:
    """The global batch of each update, as the processes read it together."""
    world = len(streams)
    return [
        [number for rank in range(world) for number in numbers_of(streams[rank].at(positions_of(u, rank, world), seed))]
        for u in updates
    ]


@pytest.fixture(scope="module")
def whole_run(shards: str) -> list[list[int]]:
    """Two epochs and a bit on one process: 85 updates, 4,080 positions."""
    return train([open_stream(shards)], range(85))


def test_every_picture_once_per_epoch_and_batches_run_on(whole_run: list[list[int]]) -> None:
    read = [number for batch in whole_run for number in batch]
    first, second, rest = read[:NUM_IMAGES], read[NUM_IMAGES : 2 * NUM_IMAGES], read[2 * NUM_IMAGES :]
    assert sorted(first) == sorted(second) == list(range(NUM_IMAGES))
    assert len(rest) == 80
    assert len(set(rest)) == 80
    assert all(len(batch) == BATCH for batch in whole_run)


def test_the_order_is_shuffled_by_shard_and_in_blocks(whole_run: list[list[int]]) -> None:
    read = np.asarray([number for batch in whole_run for number in batch])
    ends = np.cumsum(SHARDS)
    shards_visited = np.searchsorted(ends, read[:NUM_IMAGES], side="right")
    order = list(dict.fromkeys(shards_visited.tolist()))
    assert order != sorted(order)
    assert (np.diff(read[:BLOCK]) != 1).mean() > 0.9  # inside a block, neighbours of the file are apart
    assert (read[:NUM_IMAGES] != read[NUM_IMAGES : 2 * NUM_IMAGES]).mean() > 0.9
    orders = [np.argsort(read[start : start + BLOCK]).tolist() for start in (0, BLOCK, NUM_IMAGES)]
    assert orders[0] != orders[1]  # each block has a permutation of its own, in each epoch another
    assert orders[0] != orders[2]


def test_another_seed_is_another_order(shards: str, whole_run: list[list[int]]) -> None:
    assert train([open_stream(shards)], range(2), seed=4) != whole_run[:2]


@pytest.mark.parametrize("world", [2, 4])
def test_the_global_order_does_not_depend_on_the_number_of_processes(
    shards: str, whole_run: list[list[int]], world: int
) -> None:
    assert train([open_stream(shards) for _ in range(world)], range(85)) == whole_run


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1), (4, 2), (2, 4)])
@pytest.mark.parametrize("killed_at", [7, 41, 42, 60])  # update 41 crosses the end of the epoch
def test_a_killed_run_goes_on_exactly_also_with_other_processes(
    shards: str, whole_run: list[list[int]], before: int, after: int, killed_at: int
) -> None:
    first = [open_stream(shards) for _ in range(before)]
    read = train(first, range(killed_at))
    states = [json.loads(json.dumps(stream.state_dict(killed_at * BATCH))) for stream in first]
    # A process may not have reached the block of the next position: its state lies one block earlier and is as good.
    assert all(0 <= killed_at * BATCH - state["position"] <= BLOCK + BATCH for state in states)
    second = [open_stream(shards) for _ in range(after)]
    for rank, stream in enumerate(second):
        stream.load_state_dict(states[-1 - rank % before])
    assert read + train(second, range(killed_at, 85)) == whole_run


def test_a_state_behind_what_was_read_ahead(shards: str, whole_run: list[list[int]]) -> None:
    ahead = open_stream(shards)
    train([ahead], range(20))  # a reader that runs ahead of training
    state = ahead.state_dict(10 * BATCH)
    assert state["position"] <= 10 * BATCH < state["position"] + BLOCK
    stream = open_stream(shards)
    stream.load_state_dict(state)
    assert train([stream], range(10, 12)) == whole_run[10:12]


def test_a_state_before_anything_was_read_is_the_beginning(shards: str, whole_run: list[list[int]]) -> None:
    state = json.loads(json.dumps(open_stream(shards).state_dict(0)))
    for before in (0, 3):  # in a stream of which nothing, or something, was read
        stream = open_stream(shards)
        train([stream], range(before))
        stream.load_state_dict(state)
        assert train([stream], range(2)) == whole_run[:2]


def test_a_state_further_behind_than_is_remembered_is_refused(shards: str, whole_run: list[list[int]]) -> None:
    stream = open_stream(shards)
    stream.at([5 * NUM_IMAGES], 3)  # 80 blocks on
    with pytest.raises(ValueError, match="before what is remembered"):
        stream.state_dict(0)
    assert train([stream], range(1)) == whole_run[:1]  # but going back there is only slow


def test_going_back_reads_again(shards: str, whole_run: list[list[int]]) -> None:
    stream = open_stream(shards)
    train([stream], range(50))
    assert train([stream], range(3, 5)) == whole_run[3:5]
    assert train([stream], range(49, 51)) == whole_run[49:51]


def test_positions_come_back_in_the_order_they_were_asked_for(shards: str, whole_run: list[list[int]]) -> None:
    batch = open_stream(shards).at(torch.tensor([130, 3, 127, 3]), 3)
    flat = [number for one in whole_run for number in one]
    assert numbers_of(batch) == [flat[130], flat[3], flat[127], flat[3]]
    assert batch.labels is not None
    assert batch.labels.tolist() == [flat[p] % 5 for p in (130, 3, 127, 3)]


def test_where_classes_are_required_each_picture_comes_with_its_own(shards: str) -> None:
    stream = open_stream(shards)
    stream.require_classes()
    batch = stream.at(range(40), 3)
    assert batch.labels is not None and set(batch.labels.tolist()) == {0, 1, 2, 3, 4}
    assert batch.labels.tolist() == [number % 5 for number in numbers_of(batch)]


def test_a_stream_and_a_set_have_the_same_face(shards: str) -> None:
    stream, images = open_stream(shards), load_images(train_data_dir=shards, channels=1)
    assert stream.shape == images.shape == (1, 4, 4)
    assert stream.num_classes == images.num_classes == 5
    assert stream.num_images is None
    assert images.num_images == NUM_IMAGES
    assert images.state_dict(7) == {}
    assert len(stream.fingerprint) == len(images.fingerprint) == 32
    assert stream.fingerprint == open_stream(shards).fingerprint
    assert stream.fingerprint != stream_images(train_data_dir=shards, resolution=4, channels=3).fingerprint


def test_the_built_in_digits_can_be_streamed() -> None:
    streamed = stream_images(resolution=8).at(range(1500), 0).pixels.flatten(1)
    images = load_images(resolution=8)
    assert len(images) == 1500
    expected = images.batch(range(1500)).pixels.flatten(1)
    assert sorted(map(tuple, streamed.tolist())) == sorted(map(tuple, expected.tolist()))  # each once, in some order


def test_a_corrupt_picture_is_replaced_counted_and_named_or_fatal(tmp_path: Path) -> None:
    cells = [{"bytes": b"no picture", "path": "broken.png"}, *({"image": numbered(n)}["image"] for n in (1, 2, 3))]
    table = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))
    table.to_parquet(tmp_path / "train.parquet")
    stream = open_stream(str(tmp_path))
    assert set(numbers_of(stream.at(range(4), 0))) == {1, 2, 3}
    assert len(stream.skipped) == 1
    assert "broken.png" in stream.skipped[0]
    with pytest.raises(ValueError, match=r"broken\.png .* cannot be read"):
        open_stream(str(tmp_path), strict=True).at(range(4), 0)


def broken_shards(folder: Path) -> str:
    """Twelve pictures numbered 0 to 11 in three shards, their labels their numbers; 3 and 7 cannot be read."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=12)})
    for shard in range(3):
        numbers = range(4 * shard, 4 * shard + 4)
        cells = [{"bytes": b"no picture", "path": None} if n in (3, 7) else numbered(n) for n in numbers]
        table = datasets.Dataset.from_dict({"image": cells, "label": list(numbers)}, features=features)
        table.to_parquet(folder / f"train-{shard:05d}-of-00003.parquet")
    return str(folder)


def test_the_label_is_that_of_the_picture_that_stands_in(tmp_path: Path) -> None:
    batch = open_stream(broken_shards(tmp_path)).at(range(24), 0)
    assert batch.labels is not None
    assert batch.labels.tolist() == numbers_of(batch)
    assert not {3, 7} & set(numbers_of(batch))


BROKEN = {"row 3 of train-00000-of-00003.parquet", "row 3 of train-00001-of-00003.parquet"}


def test_a_corrupt_picture_is_named_by_shard_and_row_and_counted_once_over_epochs_and_resumes(tmp_path: Path) -> None:
    folder = broken_shards(tmp_path)
    stream = stream_images(train_data_dir=folder, resolution=4, channels=1, block_rows=3, max_unreadable=1)
    for start in range(0, 48, 6):
        stream.at(range(start, start + 6), 0)
    assert len(stream.skipped) == 2 and set(stream.skipped) == BROKEN
    found = set()
    for position in range(12):  # from every place of a shard
        resumed = stream_images(train_data_dir=folder, resolution=4, channels=1, block_rows=3, max_unreadable=1)
        resumed.load_state_dict(json.loads(json.dumps(stream_state(folder, position))))
        resumed.at(range(position, position + 12), 0)
        assert set(resumed.skipped) <= BROKEN
        found |= set(resumed.skipped)
    assert found == BROKEN


def stream_state(folder: str, position: int) -> dict[str, object]:
    stream = stream_images(train_data_dir=folder, resolution=4, channels=1, block_rows=3, max_unreadable=1)
    stream.at(range(position + 1), 0)
    return stream.state_dict(position)


def test_the_fingerprint_knows_every_shard_and_not_where_they_lie(shards: str, tmp_path: Path) -> None:
    mark = open_stream(shards).fingerprint
    moved = Path(shutil.copytree(shards, tmp_path / "moved"))
    assert open_stream(str(moved)).fingerprint == mark
    last = moved / f"train-{len(SHARDS) - 1:05d}-of-{len(SHARDS):05d}.parquet"
    marks = {mark}
    for rows, fill in ((290, 9), (289, 0)):  # other pictures of as many rows; a row less
        cells = [numbered(2000 + fill * n) for n in range(rows)]
        table = datasets.Dataset.from_dict({"image": cells, "label": [0] * rows}, features=FEATURES)
        table.to_parquet(last)
        marks.add(open_stream(str(moved)).fingerprint)
    last.rename(moved / "train-another.parquet")
    marks.add(open_stream(str(moved)).fingerprint)
    assert len(marks) == 4


def test_a_file_elsewhere_has_a_name_alone_and_a_local_one_bytes_and_rows(shards: str, tmp_path: Path) -> None:
    local = Path(shards) / "train-00003-of-00007.parquet"
    assert file_mark(str(local)) == (local.name, len(local.read_bytes()), SHARDS[3])
    assert file_mark("hf://datasets/user/set@main/data/train-0.parquet") == ("train-0.parquet", None, None)
    (tmp_path / "cut.parquet").write_bytes(local.read_bytes()[:-9])
    assert file_mark(str(tmp_path / "cut.parquet")) == ("cut.parquet", local.stat().st_size - 9, None)


def test_a_folder_of_pictures_is_known_by_its_files(tmp_path: Path) -> None:
    def mark(names: str) -> str:
        folder = tmp_path / names
        folder.mkdir()
        for number, name in enumerate(names):
            numbered(min(number, 17)).save(folder / f"{name}.png")  # alike beyond those that are read for the mark
        return open_stream(str(folder)).fingerprint

    assert mark("abcdefghijklmnopqrstu") != mark("abcdefghijklmnopqrstv")


def test_what_cannot_be_streamed_is_refused(shards: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a --resolution"):
        stream_images(train_data_dir=shards)
    with pytest.raises(ValueError, match=r"image_column must be one of the columns \['image', 'label'\]"):
        open_stream(shards, image_column="picture")
    with pytest.raises(ValueError, match="block_rows"):
        stream_images(train_data_dir=shards, resolution=4, block_rows=0)
    stream = open_stream(shards)
    stream.at([0], 1)
    with pytest.raises(ValueError, match="order of seed 1, got seed 2"):
        stream.at([1], 2)
    with pytest.raises(ValueError, match="blocks of 128 rows"):
        stream_images(train_data_dir=shards, resolution=4).load_state_dict(stream.state_dict(0))
    with pytest.raises(ValueError, match="count from 0"):
        stream.at([-1], 1)
    empty = datasets.Dataset.from_dict({"image": []}, features=datasets.Features({"image": datasets.Image()}))
    empty.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="empty"):
        open_stream(str(tmp_path))
