"""The classes of a network: how many, their names, and the null label of class guidance; the one check of labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..diffusion.words import EXTENSION_KEY, Arguments, Config
from ..errors import UserError

__all__ = [
    "ClassLabels",
    "Classes",
    "check_labels",
    "class_options",
    "classes_of",
    "label_number",
    "number_of_classes",
]

ClassLabels = int | str | Sequence[int | str] | Tensor | None


class Classes(NamedTuple):
    """What a class-conditional network knows."""

    number: int  # C: labels are 0 .. C - 1
    null_label: int | None  # row of the embedding that stands for no class; None where training dropped none
    names: tuple[str, ...] | None  # of 0 .. C - 1


def class_options(number: int, names: Sequence[str] | None = None, *, with_null_label: bool = False) -> Arguments:
    """Return the config entries of a UNet2DModel with classes; `classes_of` reads them.

    The null label is the embedding's last row, so that stock Diffusers loads the network and 0 .. C - 1 keep their
    meaning.

    Args:
        number: C.
        names: Of the classes, in the order of their labels.
        with_null_label: Whether the network learns what to draw without a class.
    """
    ours: Arguments = {"null_label": number} if with_null_label else {}
    if names is not None:
        ours["class_names"] = list(names)
    return {"num_class_embeds": number + with_null_label, **({EXTENSION_KEY: ours} if ours else {})}


def classes_of(config: Config) -> Classes | None:
    """Return the classes of a network by its config; None where it takes no class numbers.

    Raises:
        UserError: the names are not one per class, or the null label is not the last row.
    """
    rows = config.get("num_class_embeds")
    if rows is None:
        return None
    ours = config.get(EXTENSION_KEY) or {}
    null, names = ours.get("null_label"), ours.get("class_names")
    if null is not None and null != rows - 1:
        raise UserError(f"null_label must be the last of the embedding's {rows} rows, {rows - 1}, got {null!r}.")
    number = rows - (null is not None)
    if names is not None and len(names) != number:
        raise UserError(f"class_names must name {number} classes, got {len(names)}: {names!r}.")
    return Classes(number, null, None if names is None else tuple(names))


def number_of_classes(config: Config) -> int | None:
    """Return C of a network by its config, the null label not counted; None where it takes no class numbers."""
    classes = classes_of(config)
    return None if classes is None else classes.number


def check_labels(
    class_labels: ClassLabels, count: int, config: Config, device: torch.device | None = None
) -> Tensor | None:
    """Return one label per image, int64, shape (count,); None for a network without classes.

    Args:
        class_labels: One for all images or one per image: numbers, or names that the network knows.
        count: Number of images.
        config: The network's.
        device: Where the labels are made.

    Raises:
        UserError: labels are missing, not expected, too many, or none of the network's classes.
    """
    classes = classes_of(config)
    if classes is None and config.get("class_embed_type") is None:
        if class_labels is not None:
            raise UserError("This network was not trained with class labels: leave class_labels (--class_label) out.")
        return None
    expected = f"class_labels must be {count} int{'s' * (count > 1)}" + (
        f" in 0..{classes.number - 1}" if classes else ""
    )
    if classes is not None and classes.names is not None:
        expected += f" or of the names {', '.join(classes.names)}"
    if class_labels is None:
        raise UserError(
            f"This network is class-conditional: pass class_labels (--class_label). {expected}, or one for all."
        )
    listed = class_labels if isinstance(class_labels, Sequence) and not isinstance(class_labels, str) else None
    found = class_labels if listed is None else [_number(label, classes, expected) for label in listed]
    found = _number(found, classes, expected)
    try:  # PyTorch says of most kinds that they are no numbers
        labels = torch.as_tensor(found, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{expected}, got {class_labels!r}.") from None
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    labels = labels.expand(count) if labels.shape in ((), (1,)) else labels
    if not whole or labels.shape != (count,):
        raise UserError(f"{expected}, got {class_labels!r}.")
    if classes is not None and bool(((labels < 0) | (labels >= classes.number)).any()):
        null = classes.null_label
        reason = f": {null} stands for no class" if null is not None and bool((labels == null).any()) else ""
        raise UserError(f"{expected}, got {class_labels!r}{reason}.")
    return labels.long()


def label_number(word: str, config: Config) -> int:
    """Return the number of a class given as a word of a command line: its name, or its number where no name has it.

    Args:
        word: A name or a number; with names like "10", which are numbers themselves, a name.
        config: The network's.

    Raises:
        UserError: the network has no classes, or none of this name or number.
    """
    classes = classes_of(config)
    names = classes.names if classes is not None else None
    numeric = names is not None and any(name.isdecimal() for name in names)
    by_number = word.isdecimal() and not numeric
    if names is not None and word in names:
        by_number = False
    try:
        labels = check_labels(int(word) if by_number else word, 1, config)
    except UserError as error:
        raise UserError(str(error).replace("class_labels must be 1 int", "--class_label must be a number", 1)) from None
    assert labels is not None
    return int(labels[0])


def _number(label: object, classes: Classes | None, expected: str) -> object:
    """The number of a class that may be given by its name; a truth value is none."""
    if isinstance(label, bool):
        raise UserError(f"{expected}, got {label!r}.")
    if not isinstance(label, str):
        return label
    if classes is None or classes.names is None:
        raise UserError(f"{expected}, got {label!r}: this network does not record the names of its classes.")
    if label not in classes.names:
        raise UserError(f"{expected}, got {label!r}.")
    return classes.names.index(label)
