"""Which images are measured, and the classes of those that are generated.

Which are meant stands in the record of the run (`data.spec`), or is asked for: nothing is measured on data that nobody
named.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..data.spec import DataSpec
from ..errors import UserError
from ..models.classes import classes_of, number_of_classes
from ..models.values import image_size, values_of
from ..pipelines.locate import local_pipeline
from .results import Dataset

if TYPE_CHECKING:
    from diffusers import UNet2DModel

    from ..data.dataset import ImageSet
    from .config import MeasureConfig

__all__ = ["MeasuredImages", "class_labels", "images_and_labels", "labels_of"]


class MeasuredImages:
    """The sets that one network is measured on, a split at a time.

    Args:
        config: The options that name them.
        unet: The network.

    Raises:
        UserError: on first use: no record of its images and none named, or images that do not fit the network.
    """

    def __init__(self, config: MeasureConfig, unet: UNet2DModel) -> None:
        self.config, self.unet = config, unet
        self.trained = DataSpec.from_run(local_pipeline(config.model) or config.model)
        self._sets: dict[str, ImageSet] = {}

    @cached_property
    def spec(self) -> DataSpec:
        """Which images are measured; nothing asks where none are needed."""
        return _spec_of(self.config, self.trained, self.unet)

    def load(self, split: str | None, option: str) -> ImageSet:
        """Load a split as training read its own, and check that the network can be asked about it.

        Args:
            split: None for the split trained on.
            option: The option that names the split.

        Raises:
            UserError: there is no such split, or its classes are not the network's.
        """
        spec = self.spec
        split = split or spec.split
        if split not in self._sets:
            allowed = self.config.max_unreadable
            try:
                images = spec.load(split, **({} if allowed is None else {"max_unreadable": allowed}))
            except ValueError as error:
                raise UserError(f"{error} (--{option} names the split.)") from error
            self._check_classes(images)
            images_and_labels(self.unet, images, range(1))
            self._sets[split] = images
        return self._sets[split]

    def describe(self, images: ImageSet, count: int) -> Dataset:
        """Return what a result says of the first images of a set."""
        spec = images.spec
        return Dataset(
            name=spec.name,
            split=spec.split,
            num_images=count,
            fingerprint=images.fingerprint,
            resolution=list(images.shape),
            center_crop=spec.center_crop,
            bits=None if spec.bits == 8 else spec.bits,
            value_range=None if spec.value_range is None else list(spec.value_range),
            departures=self._departures(spec),
        )

    def _departures(self, spec: DataSpec) -> list[str] | None:
        """Return what differs from the training's images, but for what a measurement never takes over from it."""
        trained = self.trained
        if trained is None:
            return None
        same = spec if spec.split == trained.split else replace(spec, fingerprint=None, num_images=None)
        same = replace(
            same,
            split=trained.split,
            class_counts=same.class_counts if spec.split == trained.split else None,
            random_flip=trained.random_flip,  # no measurement mirrors images
            equal_sizes=trained.equal_sizes,  # nor refuses sizes that the training took
            class_names=same.class_names if number_of_classes(self.unet.config) else trained.class_names,
        )
        if trained.num_images is None:  # a stream, whose fingerprint is of its files
            trained = replace(trained, fingerprint=None)
        return trained.differences(same)

    def _check_classes(self, images: ImageSet) -> None:
        """Raise a UserError where class numbers of a set cannot be the network's.

        The names of the training's classes decide (`DataSpec.load`). Where neither network nor record names them, only
        a set of as many classes can be numbered as the training's was.
        """
        classes, trained = classes_of(self.unet.config), self.trained
        known = classes is not None and (classes.names or (trained is not None and trained.class_names))
        if classes is not None and not known and images.num_classes not in (None, classes.number):
            raise UserError(
                f"The network knows {classes.number} classes and these images have {images.num_classes}, so that class "
                "numbers cannot be told: measure on images of the same classes, or beside the run's config.json, which "
                "names them."
            )


def _spec_of(config: MeasureConfig, trained: DataSpec | None, unet: UNet2DModel) -> DataSpec:
    """Return which images are measured: those of the training, but for what the options name.

    Raises:
        UserError: neither a record nor the options name any, or the record is of another network.
    """
    resolution, channels = image_size(unet.config), unet.config["in_channels"]
    named = config.dataset_name is not None or config.data_dir is not None
    if trained is None and not named:
        raise UserError(
            f"Nothing says on which images {config.model} was trained: no config.json of its run lies beside it. Name "
            "images to measure it on with --dataset_name (digits, a Hub name) or --data_dir."
        )
    if trained is not None and (trained.resolution, trained.channels) != (resolution, channels):
        raise UserError(
            f"The config.json beside {config.model} is of another run: it trained on images of {trained.channels} x "
            f"{trained.resolution} (channels, size), and this network takes {channels} x {resolution}. Move the "
            "pipeline away from it, and name the images with --dataset_name or --data_dir."
        )
    spec = trained or DataSpec(resolution=resolution, channels=channels, **values_of(unet.config)._asdict())
    classes = classes_of(unet.config)  # without classes others than the training's do not matter
    spec = replace(spec, class_names=None if classes is None else classes.names or spec.class_names)
    if named:
        spec = replace(
            spec,
            dataset_name=config.dataset_name,
            dataset_config_name=config.dataset_config_name,
            data_dir=config.data_dir,
            image_column=config.image_column,
            label_column=config.label_column,
            num_images=None,
            fingerprint=None,
            class_counts=None,
        )
    names = ("dataset_config_name", "image_column", "label_column", "center_crop")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return replace(spec, **given)


def images_and_labels(unet: UNet2DModel, images: ImageSet, numbers: range) -> tuple[Tensor, Tensor | None]:
    """Return (pixels, classes) of images by number; classes where the network asks for them, else None.

    Args:
        unet: The network.
        images: The set.
        numbers: Which images.

    Raises:
        UserError: it asks for them and the set, or an image of it, has none.
    """
    if number_of_classes(unet.config) is None:
        return images.batch(numbers).pixels, None
    images.require_classes()
    return images.batch(numbers)


def class_labels(num_classes: int | None, images: ImageSet, number: int) -> list[int] | None:
    """Return labels of generated images in the class proportions of a set; None for a network without classes.

    Image i gets the class that is furthest behind its share of i + 1 images, so that the first n images, whatever n,
    are within one of their shares; equal shares go round the classes.

    Args:
        num_classes: Of the network.
        images: The set; one without classes counts as one of equal shares.
        number: How many labels.
    """
    if num_classes is None:
        return None
    counts = np.zeros(num_classes)
    known = images.spec.class_counts or (1,) * num_classes
    counts[: len(known)] = known
    share, found = counts / counts.sum(), []
    behind = np.zeros(num_classes)  # how many images of each class are due
    for _ in range(number):
        behind += share
        found.append(int(behind.round(9).argmax()))  # rounded, so that equal shares tie and go to the first class
        behind[found[-1]] -= 1
    return found


def labels_of(images: ImageSet, count: int) -> list[int]:
    """Return the classes of the first images of a set.

    Raises:
        UserError: it has none.
    """
    images.require_classes()
    found: list[int] = []
    for start in range(0, count, 4096):
        labels = images.batch(range(start, min(start + 4096, count))).labels
        assert labels is not None  # required above
        found += labels.tolist()
    return found
