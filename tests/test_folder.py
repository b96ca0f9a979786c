"""A folder is read for what it is: stray files change nothing, splits are no classes, archives are folders."""

from __future__ import annotations

import gc
import io
import shutil
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pytest
from image_files import npy
from PIL import Image

from ddpm_ext.data import rows
from ddpm_ext.data.dataset import load_images
from ddpm_ext.data.folder import Entry
from ddpm_ext.data.sources import _unnamed, number_labels
from ddpm_ext.data.streaming import stream_images


def image(grey: int, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), grey, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


def greys(folder: str, **options: Any) -> list[int]:
    """The grey of every image, as it is read and as it is streamed."""
    found = load_images(train_data_dir=folder, **options)
    read = found.batch(range(len(found))).pixels[:, 0, 0, 0].tolist()
    stream = stream_images(train_data_dir=folder, resolution=4, channels=3, **options)
    assert sorted(stream.at(range(len(found)), 0).pixels[:, 0, 0, 0].tolist()) == sorted(read)
    return read


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    rows._said.clear()


TABLE = io.BytesIO()
datasets.Dataset.from_dict({"a": [1, 2, 3]}).to_parquet(TABLE)
STRAY = {
    "NOTES.md": b"about these images",
    "README.md": b"---\nlicense: mit\n---\n# Images",
    "README.txt": b"train on these",
    "labels.csv": b"name,label\na,1\n",
    "metadata.csv": b"nothing,of,images\n1,2,3\n",
    "embeddings.parquet": TABLE.getvalue(),
    "annotations.json": b"{}",
    "captions.jsonl": b'{"a": 1}\n',
    ".DS_Store": b"x",
    ".hidden/a.png": image(9),
    "__MACOSX/._0.png": b"x",
    "Thumbs.db": b"x",
    "model.safetensors": b"x",
    "checksums": b"0123  a.png",
    "notes.docx": b"PK\x03\x04x",
    "array.npy": b"\x93NUMPY",
}


@pytest.mark.parametrize("stray", sorted(STRAY))
def test_one_stray_file_changes_nothing_and_is_named(
    stray: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path, {f"{i}.png": image(10 * i) for i in range(6)})
    alone = load_images(train_data_dir=folder).fingerprint
    assert capsys.readouterr().err == ""
    write(tmp_path, {stray: STRAY[stray]})
    assert greys(folder) == [0, 10, 20, 30, 40, 50]
    assert load_images(train_data_dir=folder).fingerprint == alone
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "6 images of 7 files are read; left out: 1 " in said and stray in said


@pytest.mark.parametrize("name", ["train.png", "test_1.png", "crash_test_1.png", "validation.png", "dev-1.png"])
def test_the_name_of_an_image_makes_no_split(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, {"0.png": image(0), "1.png": image(10), name: image(20), **STRAY})
    assert sorted(greys(folder)) == [0, 10, 20]


@pytest.mark.parametrize("above", ["", "data/", "set/images/"])
@pytest.mark.parametrize("names", [("train", "test"), ("Train", "Test")])
def test_split_folders_are_no_classes_wherever_they_lie(above: str, names: tuple[str, str], tmp_path: Path) -> None:
    files = {f"{above}{split}/{i}.png": image(i + 100 * k) for k, split in enumerate(names) for i in range(3)}
    folder = write(tmp_path, {**files, "README.md": b"# x", "LICENSE": b"mit"})
    train, test = (load_images(train_data_dir=folder, split=split) for split in ("train", "test"))
    assert (len(train), len(test), train.num_classes) == (3, 3, None)
    assert test.batch([0]).pixels.max() == 100
    with pytest.raises(ValueError, match="has the sub-folders"):
        load_images(train_data_dir=folder, split="validation")


def test_splits_inside_classes_are_refused(tmp_path: Path) -> None:
    files = {f"{kind}/{split}/0.png": image(0) for kind in ("cat", "dog") for split in ("train", "test")}
    with pytest.raises(ValueError, match=r"sub-folders \['test', 'train'\] of .*cat are named as splits"):
        load_images(train_data_dir=write(tmp_path, files))


def test_images_beside_class_folders_are_seen_and_make_no_classes(tmp_path: Path) -> None:
    files = {f"{kind}/{i}.png": image(i) for kind in ("cat", "dog") for i in range(2)}
    folder = write(tmp_path, files)
    assert load_images(train_data_dir=folder).num_classes == 2
    found = load_images(train_data_dir=write(tmp_path, {"cover.png": image(9)}))
    assert len(found) == 5
    with pytest.raises(ValueError, match=r"have no classes.*lie equally deep, and .*cover\.png and .*0\.png do not"):
        found.require_classes()


def test_folders_and_archives_that_are_no_classes_say_why(tmp_path: Path) -> None:
    kinds = ("cat", "dog")
    folder = write(tmp_path / "inner", {f"{kind}/images/{i}.png": image(i) for kind in kinds for i in range(2)})
    with pytest.raises(ValueError, match="Each lies in a folder called 'images'"):
        load_images(train_data_dir=folder).require_classes()
    (tmp_path / "packed").mkdir()
    for kind in kinds:
        with zipfile.ZipFile(tmp_path / "packed" / f"{kind}.zip", "w") as archive:
            archive.writestr("0.png", image(1))
    with pytest.raises(ValueError, match="They lie in 2 archives, which are no classes"):
        load_images(train_data_dir=str(tmp_path / "packed")).require_classes()


@pytest.mark.parametrize("files", [{}, {"a.txt": b"x"}, {".DS_Store": b"x"}, {"a/b/README.md": b"x"}, {"a.zip": b"x"}])
def test_a_folder_without_images_holds_no_images(files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for opening in (load_images, stream_images):
        with pytest.raises(ValueError, match="holds no images"):
            opening(train_data_dir=write(tmp_path, files), resolution=4, channels=3)


def test_everything_that_pillow_opens_is_taken_also_without_a_suffix_and_through_links(tmp_path: Path) -> None:
    kinds = ["png", "jpeg", "webp", "avif", "gif", "bmp", "tiff", "ppm", "tga", "jpeg2000", "qoi", "dds", "ico"]
    suffix = {"jpeg2000": "jp2", "jpeg": "JPG"}
    files = {f"{n:02}.{suffix.get(kind, kind)}": image(16 * n, kind) for n, kind in enumerate(kinds)}
    folder = write(
        tmp_path / "set", {**files, "20": image(220), "21.PNG": image(230), "22.jpg_large": image(240, "jpeg")}
    )
    write(tmp_path / "elsewhere", {"a.png": image(250), "inside/b.png": image(251)})
    (tmp_path / "set" / "23.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "set" / "24").symlink_to(tmp_path / "elsewhere" / "inside")
    (tmp_path / "set" / "25").symlink_to(tmp_path / "set")  # a circle
    expected = [16 * n for n in range(len(kinds))] + [220, 230, 240, 250, 251]
    found = greys(folder)
    assert len(found) == len(expected)
    assert np.abs(np.array(found) - expected).max() <= 6  # what is lossy
    (tmp_path / "set" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert "gone.png" in load_images(train_data_dir=folder, max_unreadable=0.1).skipped[0]


# Archives -------------------------------------------------------------------------------------------------------------


def archive(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, content in files.items():
                file.writestr(name, content)
        return
    packed = next((kind for kind in ("gz", "bz2", "xz") if path.name.endswith(kind)), "")
    with tarfile.open(path, f"w:{packed}") as file:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tgz", "tbz2", "txz"])
def test_an_archive_is_read_as_if_unpacked(kind: str, tmp_path: Path) -> None:
    files = {f"{name}/{i}.png": image(i + 10 * k) for k, name in enumerate(("cat", "dog")) for i in range(3)}
    write(tmp_path / "plain", files)
    archive(tmp_path / "packed" / f"images.{kind}", {**files, "README.txt": b"x", "__MACOSX/cat/._0.png": b"x"})
    plain, packed = (load_images(train_data_dir=str(tmp_path / name)) for name in ("plain", "packed"))
    assert packed.fingerprint == plain.fingerprint and packed.spec.class_names == ("cat", "dog")
    itself = load_images(train_data_dir=str(tmp_path / "packed" / f"images.{kind}"))
    assert itself.fingerprint == plain.fingerprint
    assert len(greys(str(tmp_path / "packed"), num_workers=3)) == 6


def test_archives_of_splits_are_splits(tmp_path: Path) -> None:
    archive(tmp_path / "train.zip", {f"{i}.png": image(i) for i in range(3)})
    archive(tmp_path / "test.zip", {f"test/{i}.png": image(100 + i) for i in range(2)})
    assert greys(str(tmp_path)) == [0, 1, 2]
    assert greys(str(tmp_path), split="test") == [100, 101]


def test_archives_in_archives_and_broken_ones_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inner = tmp_path / "inner.zip"
    archive(inner, {"a.png": image(1)})
    archive(tmp_path / "set" / "outer.zip", {"b.png": image(2), "inner.zip": inner.read_bytes()})
    write(tmp_path / "set", {"cut.zip": inner.read_bytes()[:30], "none.tar.xz": b"none", "none.tbz2": b"none"})
    assert greys(str(tmp_path / "set")) == [2]
    said = capsys.readouterr().err
    assert "archive in an archive: unpack the outer one (inner.zip)" in said and "broken archive" in said


# Tables beside images -------------------------------------------------------------------------------------------------


def images_table(path: Path, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": image(100 + i), "path": None} for i in range(count)]
    datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()})).to_parquet(
        path
    )


@pytest.mark.parametrize("stray", ["preview.png", "README.md", "notes.txt", "stats.csv", "test.json", ".DS_Store"])
def test_a_stray_file_beside_parquet_changes_nothing(stray: str, tmp_path: Path) -> None:
    images_table(tmp_path / "data" / "train-00000-of-00001.parquet", 4)
    images_table(tmp_path / "data" / "test-00000-of-00001.parquet", 2)
    write(tmp_path, {stray: image(1)})
    assert greys(str(tmp_path)) == [100, 101, 102, 103]
    assert greys(str(tmp_path), split="test") == [100, 101]


def test_as_many_images_in_files_as_in_parquet_are_a_question(tmp_path: Path) -> None:
    images_table(tmp_path / "a.parquet", 2)
    with pytest.raises(ValueError, match="holds 2 images as files and as many in parquet files"):
        load_images(train_data_dir=write(tmp_path, {"a.png": image(1), "b.png": image(2)}))


def test_a_card_that_names_files_is_obeyed(tmp_path: Path) -> None:
    images_table(tmp_path / "one.parquet", 3)
    images_table(tmp_path / "two.parquet", 2)
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: two.parquet\n---\n"
    assert len(load_images(train_data_dir=write(tmp_path, {"README.md": card.encode()}))) == 2


@pytest.mark.filterwarnings("ignore")  # `datasets` leaves the table open
def test_a_table_of_images_gives_their_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"{i}.png": image(10 * i) for i in range(3)}
    folder = write(tmp_path, {**files, "metadata.csv": b"file_name,kind\n2.png,dog\n0.png,cat\n"})
    found = load_images(train_data_dir=folder, label_column="kind")
    gc.collect()  # here, and not in the test that comes next
    labels = found.batch(range(2)).labels
    assert labels is not None
    assert dict(zip(found.batch(range(2)).pixels[:, 0, 0, 0].tolist(), labels.tolist(), strict=True)) == {0: 0, 20: 1}
    assert "2 of 3 images are read" in capsys.readouterr().err


@pytest.mark.parametrize(("named", "count"), [(1, 2), (3, 4)])
def test_a_table_that_names_an_array_counts_it(named: int, count: int) -> None:
    entries = [Entry(name, name) for name in ("a.tif", "b.npy", "c.npy", "d.tif", "metadata.csv")]
    said = _unnamed(datasets.Dataset.from_dict({"image": [None] * named}), Path("here"), entries)
    assert said == f"here: {named} of {count} images are read, those that the table of images names."


def test_an_image_beside_an_array_of_its_name_is_a_preview_among_samples_alone(tmp_path: Path) -> None:
    files = {"a.png": image(1), "a.npy": npy(np.full((4, 4, 3), 7, np.uint8))}
    assert greys(write(tmp_path / "drawn", {**files, "samples.json": b"{}"})) == [7]
    with pytest.raises(ValueError, match=r"a\.png and a\.npy are two images of one name"):
        load_images(train_data_dir=write(tmp_path / "asked", files))


def test_words_that_a_stream_meets_among_its_labels_are_not_asked_for() -> None:
    with pytest.raises(ValueError, match=r"upwards \(words are numbered when all are read: .*streaming out\), got 'z'"):
        number_labels([1, "z"], None, "kind")


# Classes --------------------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_test_split_are_those_of_training(tmp_path: Path) -> None:
    names = {"train": ("1", "10", "2"), "test": ("10", "2"), "validation": ("2",)}  # one class is a class too
    files = {f"{s}/{c}/{i}.png": image(int(c)) for s, cs in names.items() for c in cs for i in range(2)}
    folder = write(tmp_path, files)
    for split in names:
        found = load_images(train_data_dir=folder, split=split)
        batch = found.batch(range(len(found)))
        assert found.spec.class_names == ("1", "10", "2") and batch.labels is not None
        assert [("1", "10", "2")[n] for n in batch.labels.tolist()] == [
            str(g) for g in batch.pixels[:, 0, 0, 0].tolist()
        ]
    with pytest.raises(ValueError, match=r"the classes \['7'\] of test/ are none of train/"):
        load_images(train_data_dir=write(tmp_path, {"test/7/0.png": image(7)}), split="test")


@pytest.mark.parametrize(
    "values", [[0, 1, -1, 0], [0, None, 1, 1], [0.0, float("nan"), 1.0, 0.0], ["a", None, "b", "a"]]
)
def test_missing_labels_matter_where_classes_are_asked_for(values: list[Any], tmp_path: Path) -> None:
    cells = [{"bytes": image(i), "path": None} for i in range(4)]
    table = datasets.Dataset.from_dict({"image": cells, "label": values}).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "train.parquet")
    assert len(load_images(train_data_dir=str(tmp_path))) == 4
    with pytest.raises(ValueError, match="1 of 4 have none"):
        load_images(train_data_dir=str(tmp_path), label_column="label")


def test_labels_of_minus_one_are_kept_from_the_classes_alone(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    cells = [{"bytes": image(i), "path": None} for i in range(3)]
    table = datasets.Dataset.from_dict({"image": cells, "label": [1, -1, 0]}, features=features)
    table.to_parquet(tmp_path / "train.parquet")
    found = load_images(train_data_dir=str(tmp_path))
    assert found.spec.class_counts == (1, 1)
    with pytest.raises(ValueError, match=r"1 of the 3 images .* have no class"):
        found.require_classes()
    stream = stream_images(train_data_dir=str(tmp_path), resolution=4, channels=3)
    stream.at(range(3), 0)
    stream.require_classes()
    with pytest.raises(ValueError, match=r"The image row 1 of train.parquet .* has no class"):
        stream.at(range(3), 0)


def test_numbers_without_names_are_not_taken_for_named_classes(tmp_path: Path) -> None:
    features = {"a": datasets.ClassLabel(names=["cat", "dog"]), "b": datasets.Value("int64")}
    for name, feature in features.items():
        cells = [{"bytes": image(i), "path": None} for i in range(2)]
        kinds = datasets.Features({"image": datasets.Image(), "label": feature})
        (tmp_path / name).mkdir()
        table = datasets.Dataset.from_dict({"image": cells, "label": [0, 1]}, features=kinds)
        table.to_parquet(tmp_path / name / "train.parquet")
    known = load_images(train_data_dir=str(tmp_path / "a")).spec.class_names
    assert known == ("cat", "dog")
    with pytest.raises(ValueError, match="holds numbers without names"):
        load_images(train_data_dir=str(tmp_path / "b"), label_column="label", class_names=known)


# EXIF -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "exif", [b"Exif\x00\x00no tiff header", b"", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"\xff" * 40]
)
@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
@pytest.mark.filterwarnings("ignore")  # Pillow's own about the same
def test_a_broken_exif_costs_the_orientation_alone(exif: bytes, kind: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(buffer, kind, exif=exif)
    folder = write(tmp_path, {f"a.{kind}": buffer.getvalue()})
    for options in ({"resolution": 8}, {}):
        found = load_images(train_data_dir=folder, **options)
        assert len(found) == 1 and not found.skipped


@pytest.mark.parametrize("orientation", ["nine", "-1", "99", "6"])
def test_a_broken_xmp_costs_the_orientation_alone(orientation: str, tmp_path: Path) -> None:
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", f'<x tiff:Orientation="{orientation}"/>')
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4), (9, 9, 9)).save(buffer, "png", pnginfo=info)
    found = load_images(train_data_dir=write(tmp_path, {"a.png": buffer.getvalue()}))
    assert found.shape[1:] == ((8, 4) if orientation == "6" else (4, 8))


def test_a_tiff_that_lies_on_its_side_has_one_size(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(buffer, "tiff", exif=exif)
    assert load_images(train_data_dir=write(tmp_path, {"a.tif": buffer.getvalue()})).shape == (3, 8, 4)


def test_a_file_that_goes_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", {f"{i}.png": image(i) for i in range(3)})
    asked = load_images(train_data_dir=folder, memory_bytes=0, mapped_bytes=0, max_unreadable=1)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"None of the 3 images can be read: 3 of 3: the file is not there"):
        asked.batch([0])


def test_previews_and_the_grid_of_samples_are_no_images(tmp_path: Path) -> None:
    array = io.BytesIO()
    np.save(array, np.zeros((4, 4, 5), np.uint8))
    files = {
        f"{i}.{kind}": image(i) if kind == "png" else array.getvalue() for i in range(2) for kind in ("png", "npy")
    }
    found = load_images(train_data_dir=write(tmp_path / "a", {**files, "grid.png": image(9), "samples.json": b"{}"}))
    assert (len(found), found.shape) == (2, (5, 4, 4))
    assert len(load_images(train_data_dir=write(tmp_path / "b", {"0.png": image(0), "grid.png": image(9)}))) == 2


def test_classes_in_file_names_are_recognised_and_answered(tmp_path: Path) -> None:
    files = {f"{kind}_{i}.png": image(i) for kind in ("cat", "dog") for i in range(3)}
    found = load_images(train_data_dir=write(tmp_path, files))
    stream = stream_images(train_data_dir=str(tmp_path), resolution=4)
    with pytest.raises(ValueError, match=r"no classes.* begin with cat, dog: .*metadata\.csv"):
        stream.require_classes()
    with pytest.raises(ValueError, match=r"no classes.* begin with cat, dog: .*metadata\.csv"):
        found.require_classes()
    write(tmp_path / "numbered", {f"img{i}.png": image(i) for i in range(6)})
    with pytest.raises(ValueError, match=r"label_column\.$"):
        load_images(train_data_dir=str(tmp_path / "numbered")).require_classes()


# On the Hub -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_a_set_of_image_files_on_the_hub_is_read_as_a_folder(
    streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("cat/z.png", image(50))
    splits = {"train": ("cat", "dog"), "test": ("dog",)}
    files = {f"data/{s}/{c}/{i}.png": image(i + 10 * (c == "dog")) for s in splits for c in splits[s] for i in range(2)}
    sets = {"alice/split": {**files, "README.md": b"# x", "notes.csv": b"a,b\n1,2\n"}}
    sets["alice/zip"] = {"images.zip": packed.getvalue(), "train.png": image(60), "README.md": STRAY["README.md"]}
    for name, content in sets.items():
        write(tmp_path / name, content)

    class Api:
        def dataset_info(self, name: str) -> Any:
            siblings = [type("File", (), {"rfilename": file}) for file in sets[name]]
            return type("Info", (), {"sha": "main", "siblings": siblings})

    from ddpm_ext.data import sources
    from ddpm_ext.data.decoding import files as reading

    monkeypatch.setattr(sources, "HfApi", Api)
    monkeypatch.setattr(sources, "hf_hub_download", lambda name, file, **_: str(tmp_path / name / file))
    monkeypatch.setattr(sources, "snapshot_download", lambda name, **_: str(tmp_path / name))

    def local(path: str) -> str:
        return path.replace("hf://datasets/alice/", f"{tmp_path}/alice/").replace("@main", "")

    disk = fsspec.filesystem("file")
    monkeypatch.setattr(reading.fsspec, "url_to_fs", lambda path: (disk, local(path)))
    opened = lambda kind, archive, _: (fsspec.filesystem(kind, fo=local(archive)), threading.Lock())  # noqa: E731
    monkeypatch.setattr(reading, "_archive_of", opened)

    def read(name: str, count: int, **options: Any) -> list[tuple[int, int]]:
        opened: Any = (stream_images if streaming else load_images)(name, resolution=4, channels=3, **options)
        batch = opened.at(range(count), 0)
        labels = [-1] * count if batch.labels is None else batch.labels.tolist()
        return sorted(zip(batch.pixels[:, 0, 0, 0].tolist(), labels, strict=True))

    assert read("alice/split", 4) == [(0, 0), (1, 0), (10, 1), (11, 1)]
    assert read("alice/split", 2, split="test") == [(10, 1), (11, 1)]
    assert read("alice/zip", 2) == [(50, -1), (60, -1)]


def test_words_of_a_test_split_have_the_numbers_of_training(tmp_path: Path) -> None:
    for split, words in (("train", ["emu", "cat", "dog"]), ("test", ["emu", "dog"])):
        cells = [{"bytes": image(i), "path": None} for i in range(len(words))]
        table = datasets.Dataset.from_dict({"image": cells, "kind": words}).cast_column("image", datasets.Image())
        table.to_parquet(tmp_path / f"{split}.parquet")
    found = {s: load_images(train_data_dir=str(tmp_path), split=s, label_column="kind") for s in ("train", "test")}
    assert {s: f.batch(range(len(f))).labels.tolist() for s, f in found.items()} == {"train": [2, 0, 1], "test": [2, 1]}  # pyright: ignore
