"""Which images, and how they are read; the record that training leaves of them, for whatever measures the result.

run/config.json   {"config": {...}, "data": {"dataset_name": ..., "resolution": [32, 32], "class_names": [...], ...}}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from ..errors import UserError, did_you_mean
from ..models.values import image_size
from ..run_dir import JsonRecord

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .dataset import ImageSet

__all__ = ["DIGITS", "DataSpec", "ImageOptions", "Reading", "make_spec", "spec_and_reading"]

DIGITS = "digits"  # the name of the built-in set

# What follows from the files themselves: it can be compared only where both specs name the same split of the same set.
_CONTENT = ("class_counts", "num_images", "fingerprint")
_PLACE = ("dataset_name", "dataset_config_name", "data_dir", "split")


class Reading(NamedTuple):
    """How a set is read; nothing of it changes what the set is.

    Attributes:
        strict: An image that cannot be read is an error; otherwise it is skipped, counted and named.
        max_unreadable: Share of unreadable images above which the set is refused.
        cache_dir: Home of downloads and of decoded images; None takes that of `datasets`.
        max_images: Only the first so many rows.
        num_workers: Threads that decode; 0 decodes in the calling one.
        memory_bytes: Decoded sets up to this size are held in memory ...
        mapped_bytes: ... and up to this size in a memory-mapped file; larger ones are decoded when asked for.
    """

    strict: bool = False
    max_unreadable: float = 0.01
    cache_dir: str | None = None
    max_images: int | None = None
    num_workers: int = 0
    memory_bytes: int = 1 << 28
    mapped_bytes: int = 1 << 34


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Everything that says which images a run was trained on and what was done to them.

    The contract:

    - Training writes `to_dict()` into config.json under "data"; every image set has its own as `images.spec`.
    - `DataSpec.from_run(folder)` takes a run folder or the pipeline folder inside one. It returns None where there is
      no record: then the caller refuses and names the option that says what the data is, and guesses nothing.
      A config.json without "data", as commit c2a1574 wrote it, is read from its options and its network.
    - `load(split)` gives the images as training read them: size, channels, crop, value range and class numbers are
      those of the record, and a class that training did not know is refused by name.
    - `differences(other)` names in sentences what another spec has otherwise; a measurement writes them down.
    - How a set is read (streaming, threads, caches) is no part of what it is.

    Attributes:
        dataset_name: "digits", a Hub name or a local folder; None where data_dir is given.
        dataset_config_name: Configuration of a Hub set.
        data_dir: Folder of images or of parquet files.
        split: The split trained on.
        image_column: Column of the images, None for the only one that can be meant.
        label_column: Column of the classes, likewise.
        resolution: (height, width) of every image.
        channels: C, the network's in_channels.
        center_crop: Whether crops lie in the middle; otherwise each image has a place of its own.
        random_flip: Whether training mirrored images at random. Loading never does.
        equal_sizes: Whether images of several sizes were refused.
        bits: Values are levels 0 … 2^bits - 1 and x_0 = 2 · level / (2^bits - 1) - 1.
        value_range: (lo, hi) of the stored values that became the lowest and the highest level; None: the file's own.
        channel_axis: Which axis of arrays (.npy, .npz, columns of arrays) holds the channels.
        array_key: Name of the array in .npz files, None for their only one.
        class_names: Name of each class number, None where the set has none or states no names.
        class_counts: Images of each class, None where unknown.
        num_images: Images of one epoch, None for a stream.
        fingerprint: Digest of the images and labels, None where unknown.
    """

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    data_dir: str | None = None
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    resolution: tuple[int, int] | None = None
    channels: int | None = None
    center_crop: bool = True
    random_flip: bool = False
    equal_sizes: bool = False
    bits: int = 8
    value_range: tuple[float, float] | None = None
    channel_axis: int = -1
    array_key: str | None = None
    class_names: tuple[str, ...] | None = None
    class_counts: tuple[int, ...] | None = None
    num_images: int | None = None
    fingerprint: str | None = None

    @property
    def name(self) -> str:
        """How the set is called: its Hub name or folder, "digits" for the built-in one."""
        return self.dataset_name or self.data_dir or DIGITS

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None where the set has none or it is not known."""
        known = self.class_names if self.class_names is not None else self.class_counts
        return None if known is None else len(known)

    # -- to and from files --------------------------------------------------------------------------------------------

    def to_dict(self) -> JsonRecord:
        """Return the record as plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, record: JsonRecord) -> DataSpec:
        """Build a spec from what `to_dict` returned.

        Raises:
            UserError: the record holds a word that this version does not know: to ignore it would change the images.
        """
        unknown = sorted(record.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise UserError(
                f"The record of the data has {', '.join(unknown)}, which this version of ddpm_ext does not know. "
                "Read it with the version that wrote it, or a later one."
            )
        values: JsonRecord = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
        return cls(**values)

    @classmethod
    def from_run(cls, folder: str | Path) -> DataSpec | None:
        """Read the record that training left in a run folder, or beside a pipeline folder; None where there is none.

        Raises:
            UserError: a record is there and cannot be read.
        """
        here = Path(folder).absolute()
        inside = (
            here.parents[:2] if (here / "model_index.json").is_file() else ()
        )  # run/pipeline, run/calibrated/pipeline
        for path in (place / "config.json" for place in (here, *inside)):
            if not path.is_file():
                continue
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(f"{path}, the record of the run, cannot be read: {error}") from error
            if (
                isinstance(record, dict) and {"config", "network"} <= record.keys()
            ):  # a network's config.json has neither
                return cls.from_dict(record["data"]) if "data" in record else cls._from_options(record)
        return None

    @classmethod
    def _from_options(cls, record: JsonRecord) -> DataSpec:
        """A spec from the options of a run and its network: all that config.json held before it had "data"."""
        options, network = record["config"], record["network"]
        name = options["dataset_name"] or (None if options["train_data_dir"] else DIGITS)
        return cls(
            dataset_name=name,
            dataset_config_name=options["dataset_config_name"],
            data_dir=options["train_data_dir"],
            split=options["train_split"],
            image_column=options["image_column"],
            label_column=options["label_column"],
            resolution=image_size(network),
            channels=network["in_channels"],
            center_crop=options["center_crop"],
            random_flip=options["random_flip"],
            equal_sizes=options["equal_sizes"],
            num_images=record.get("images"),
            fingerprint=record.get("data_fingerprint"),
        )

    # -- use ----------------------------------------------------------------------------------------------------------

    def load(self, split: str | None = None, **reading: Any) -> ImageSet:
        """Load a split as training read its own; see `load_images`.

        Args:
            split: None for the split trained on.
            **reading: How to read, as the fields of `Reading`: strict, max_unreadable, cache_dir, max_images …

        Raises:
            UserError: the set cannot be opened, or holds classes that training did not know.
        """
        from .dataset import class_names_of, open_images

        spec = replace(self, split=split or self.split)
        if spec.split == self.split and self.fingerprint is not None:
            reading.setdefault("max_unreadable", 1.0)  # what training accepted
        if self.class_names is None and spec.split != self.split:
            spec = replace(spec, class_names=class_names_of(self, reading.get("cache_dir")))
        images = open_images(spec, Reading(**reading))
        known, found = self.num_classes, images.num_classes
        if known is not None and found is not None and found > known:
            raise UserError(
                f"The classes {known} to {found - 1} of split {spec.split!r} of {self.name} are none of the "
                f"training's, which are 0 to {known - 1}."
            )
        return images

    def differences(self, other: DataSpec) -> list[str]:
        """Name what `other` has otherwise than this spec, one sentence each; none where it is the same.

        What follows from the files (counts, fingerprint) is compared only for the same split of the same set.
        """
        same_place = all(getattr(self, name) == getattr(other, name) for name in _PLACE)
        found = []
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine == theirs or (field.name in _CONTENT and (not same_place or mine is None or theirs is None)):
                continue
            found.append(
                f"{field.name.replace('_', ' ')} is {_shown(theirs)}; the run was trained with {_shown(mine)}."
            )
        return found


def _shown(value: object) -> str:
    """A value in a sentence."""
    if isinstance(value, tuple):
        return " x ".join(map(str, value)) if len(value) == 2 else ", ".join(map(str, value))
    return "none" if value is None else f'"{value}"' if isinstance(value, str) else str(value)


class SpecOptions(TypedDict, total=False):
    """What names images and says how they are cut; the meaning of each stands at `load_images`."""

    dataset_config_name: str | None
    train_data_dir: str | None
    split: str
    image_column: str | None
    label_column: str | None
    resolution: int | Sequence[int] | None
    channels: int | None
    center_crop: bool
    bits: int | None
    value_range: Sequence[float] | None
    channel_axis: int | None
    array_key: str | None
    class_names: Sequence[str] | None


def make_spec(dataset_name: str | None = None, **options: Unpack[SpecOptions]) -> DataSpec:
    """Name the images to open.

    Args:
        dataset_name: As in `load_images`.
        **options: As there; None takes the default.

    Raises:
        UserError: bits outside 1 to 16, or a range that is none.
        TypeError: an option that there is not.
    """
    for name in options.keys() - SpecOptions.__annotations__.keys():
        raise TypeError(f"There is no option {name} of images.{did_you_mean(name, SpecOptions.__annotations__)}")
    given: JsonRecord = {name: value for name, value in options.items() if value is not None}
    folder, size, value_range = (given.pop(name, None) for name in ("train_data_dir", "resolution", "value_range"))
    if value_range is not None:
        if len(value_range) != 2 or not value_range[0] < value_range[1]:
            raise UserError(f"value_range must be two numbers, the lower first, got {list(value_range)}.")
        given["value_range"] = (float(value_range[0]), float(value_range[1]))
        given.setdefault("bits", _bits_of_range(*value_range))
    if not 1 <= given.get("bits", DataSpec.bits) <= 16:
        raise UserError(f"bits must lie between 1 and 16, got {given['bits']}.")
    if size is not None:
        given["resolution"] = (size, size) if isinstance(size, int) else tuple(size)
    if "class_names" in given:
        given["class_names"] = tuple(given["class_names"])
    return DataSpec(dataset_name=dataset_name or (None if folder else DIGITS), data_dir=folder, **given)


class ImageOptions(SpecOptions, total=False):
    """What names images, how they are cut, and how they are read: the options of `load_images`."""

    strict: bool
    max_unreadable: float
    cache_dir: str | None
    max_images: int | None
    num_workers: int
    memory_bytes: int
    mapped_bytes: int


def spec_and_reading(dataset_name: str | None, **options: Unpack[ImageOptions]) -> tuple[DataSpec, Reading]:
    """Return the two records that options make: which images, and how they are read."""
    given: JsonRecord = dict(options)
    reading = Reading(**{name: given.pop(name) for name in Reading._fields if name in given})
    return make_spec(dataset_name, **given), reading


def _bits_of_range(lo: float, hi: float) -> int:
    """12 for 0 to 4095, 16 for 0 to 65535: a level for each whole number of a range of 2^bits; otherwise 16."""
    levels = hi - lo + 1
    return next((bits for bits in range(9, 16) if levels == 2**bits), 16)
