"""Saved pipeline -> N images, each from its own seed: any batch size, any number of processes, resumable."""

from __future__ import annotations

import importlib
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..diffusion.words import Config
from ..distributed import check_world
from ..errors import UserError
from ..models.classes import label_number
from ..models.values import check_bands, values_of
from ..run_dir import read_json, whole_file, write_json
from ..signals import die_with_launcher, exit_process, interruptible
from .config import SampleConfig
from .ddpm import load_pipeline
from .identity import identity
from .inputs import check_scheduler
from .seeds import sample_images

__all__ = [
    "SampleConfig",
    "make_grid",
    "sample_to_folder",
    "save_png",
    "save_tiff",
    "shown_bands",
    "shown_grid",
    "shown_words",
]

# Options that change no image, or stand in the record as they come out.
_FREE = ("model", "output_dir", "num_samples", "batch_size", "cpu", "bits", "rgb_bands", "file_format")
_IN_GRID = 64


def make_grid(images: np.ndarray, min_side: int = 48) -> np.ndarray:
    """Put images in rows, as near to a square as can be, a grey line around each; small ones enlarged by whole pixels.

    Args:
        images: uint8, shape (N, H, W, C).
        min_side: Shortest side of one image in the grid.

    Returns:
        uint8, shape (rows · H', columns · W', C); places without an image are grey.
    """
    number, height, width, channels = images.shape
    columns = int(np.ceil(np.sqrt(number)))
    rows = -(-number // columns)
    times = -(-min_side // min(height, width))
    border = times // 2 + 1
    tall, wide = height * times + 2 * border, width * times + 2 * border
    cells = np.full((rows * columns, tall, wide, channels), 128, dtype=np.uint8)
    cells[:number, border:-border, border:-border] = images.repeat(times, axis=1).repeat(times, axis=2)
    return cells.reshape(rows, columns, tall, wide, channels).swapaxes(1, 2).reshape(rows * tall, columns * wide, -1)


def shown_bands(image: np.ndarray, rgb_bands: Sequence[int] | None = None) -> np.ndarray:
    """Return the channels of an image that are shown: all of up to four, of more the first, or three named ones.

    Args:
        image: Shape (..., C).
        rgb_bands: Bands of the image, counted from 1.
    """
    if rgb_bands is not None:
        return image[..., [band - 1 for band in rgb_bands]]
    return image if image.shape[-1] <= 4 else image[..., :1]


def shown_words(config: Config, rgb_bands: Sequence[int] | None = None) -> str:
    """Say depth and bands of what is shown of a network's images: "16 bits; bands 3, 2, 1 of 5 as red, green, blue".

    Args:
        config: Of the network.
        rgb_bands: As for `shown_bands`.
    """
    depth, channels = values_of(config), config["in_channels"]
    if rgb_bands is None and channels in (1, 3):
        return str(depth)
    bands = rgb_bands or (range(1, channels + 1) if channels <= 4 else (1,))
    colours = {1: "grey", 2: "grey, alpha", 3: "red, green, blue", 4: "red, green, blue, alpha"}[len(bands)]
    named = f"band{'s' * (len(bands) > 1)} {', '.join(map(str, bands))} of {channels}"
    return f"{depth}; {named} as {colours}"


def shown_grid(images: np.ndarray, config: Config, rgb_bands: Sequence[int] | None = None) -> tuple[np.ndarray, str]:
    """Return the grid of some images of a network, drawn at 8 bits, and the words that say what it shows.

    Args:
        images: uint8, shape (N, H, W, C).
        config: Of the network.
        rgb_bands: As for `shown_bands`.
    """
    drawn = ", drawn at 8 bits" if values_of(config).bits > 8 else ""
    return make_grid(shown_bands(images, rgb_bands)), f"{shown_words(config, rgb_bands)}{drawn}"


def save_png(image: np.ndarray, path: Path, description: str = "") -> None:
    """Write one image whole or not at all: L, LA, RGB, RGBA; of more channels the first.

    Args:
        image: uint8 or uint16, shape (H, W, C).
        path: The file; its folder is made if missing.
        description: What the file says of itself, in a text chunk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    image = shown_bands(image)
    with whole_file(path) as temporary:
        if image.dtype == np.uint16:
            temporary.write_bytes(_png_of_16_bits(image, description))
        else:
            text = PngInfo()
            if description:
                text.add_text("Description", description)
            shown = Image.fromarray(image if image.shape[-1] > 1 else image[..., 0])
            shown.save(temporary, format="png", pnginfo=text)


def _png_of_16_bits(image: np.ndarray, description: str) -> bytes:
    """A PNG of uint16 values (H, W, C), C 1 to 4, which Pillow writes in grey alone (PNG specification, section 11)."""
    height, width, channels = image.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = np.ascontiguousarray(image.astype(">u2")).view(np.uint8).reshape(height, -1)
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)  # filter 0 of every row

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    text = [(b"tEXt", b"Description\0" + description.encode("latin-1"))] if description else []
    parts = ((b"IHDR", header), *text, (b"IDAT", zlib.compress(filtered.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def save_tiff(image: np.ndarray, path: Path, description: str = "") -> None:
    """Write one image of any number of channels whole or not at all: grey or RGB with or without alpha, else bands.

    Args:
        image: uint8 or uint16, shape (H, W, C).
        path: The file; its folder is made if missing.
        description: What the file says of itself.
    """
    tifffile, channels = _tifffile(), image.shape[-1]
    options: dict[str, object] = {"photometric": "rgb" if channels in (3, 4) else "minisblack", "metadata": None}
    options |= {"extrasamples": ["unassalpha"]} if channels in (2, 4) else {}
    options |= {"planarconfig": "contig"} if channels > 1 else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        tifffile.imwrite(temporary, image if channels > 1 else image[..., 0], description=description, **options)


def _tifffile() -> ModuleType:
    try:
        return importlib.import_module("tifffile")
    except ImportError as error:
        raise UserError("--file_format tiff needs tifffile: pip install ddpm-ext[deep].") from error


def sample_to_folder(config: SampleConfig) -> int:
    """Write `num_samples` images and their grid; images that are there already are kept.

    Images of more than four channels, which no PNG holds, are 000000.npy beside a PNG of their first channel.

    Args:
        config: The options.

    Returns:
        Exit code 0.

    Raises:
        Stopped: a signal came; the same command continues.
        UserError: the folder holds images of other weights, another scheduler or other options.
    """
    die_with_launcher()
    with interruptible(f"The images in {config.output_dir} are kept"):
        accelerator = Accelerator(cpu=config.cpu or not torch.accelerator.is_available())
        check_world(accelerator)
        folder = _Folder(config, accelerator)
        missing = [i for i in range(config.num_samples) if not folder.has(i)]
        accelerator.wait_for_everyone()  # all have looked before the first writes
        with accelerator.split_between_processes(missing) as share:
            folder.fill(cast(list[int], share))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            folder.draw_grid()
        accelerator.wait_for_everyone()
        accelerator.end_training()
    return exit_process(0, accelerator.num_processes)


class _Folder:
    """The folder of one model's images: samples.json says what they are made of."""

    def __init__(self, config: SampleConfig, accelerator: Accelerator) -> None:
        self.pipeline = load_pipeline(config.model).to(accelerator.device)
        check_scheduler(self.pipeline.scheduler)
        if config.num_inference_steps is None:
            config = replace(config, num_inference_steps=self.pipeline.scheduler.config["num_train_timesteps"])
        self.config, self.path = config, Path(config.output_dir)
        network = self.pipeline.unet.config
        self.label = None if config.class_label is None else label_number(str(config.class_label), network)
        self.bits = config.bits or (8 if values_of(network).bits <= 8 else 16)
        options = {name: value for name, value in asdict(config).items() if name not in _FREE}
        options = {name: value for name, value in options.items() if not name.startswith("guidance_")}
        options |= {"class_label": self.label, "bits": self.bits}
        self.record = {"model": config.model, **options, "guidance": config.guidance, **identity(self.pipeline)}
        self.meaning = _meaning(values_of(network).value_range, self.bits)
        if self.meaning:
            self.record |= {"value_range": values_of(network).value_range, "values": self.meaning}
        if config.dtype != "float32":
            self.pipeline.to(getattr(torch, config.dtype))
        self.pipeline.set_progress_bar_config(disable=not accelerator.is_main_process)
        is_png = config.file_format == "png"
        self.suffix = ".png" if is_png and network["in_channels"] <= 4 else ".npy" if is_png else ".tif"
        if not is_png:
            _tifffile()  # refused before anything is drawn
        check_bands(config.rgb_bands, network["in_channels"])
        self.check()

    def image(self, i: int) -> Path:
        """Return the file of image i."""
        return self.path / f"{i:06d}{self.suffix}"

    def has(self, i: int) -> bool:
        """Return whether image i is there."""
        return self.image(i).exists()

    def check(self) -> None:
        """Compare the record of the images that are there with that of the images to be drawn.

        Raises:
            UserError: they are made of something else.
        """
        path = self.path / "samples.json"
        if not path.exists():
            return
        there = {"bits": 8, **read_json(path)}  # as before there was a choice
        if self.meaning:  # of the weights, which are compared
            there |= {name: self.record[name] for name in ("value_range", "values")}
        asked = {name: value for name, value in self.record.items() if name != "model"}
        if "weights" not in there:  # a record of version 0.1.0 before it named them: an image tells
            first = next((i for i in range(self.config.num_samples) if self.has(i)), None)
            if first is None or self.is_same(first):
                there = {**asked, **there}
        changed = [_change(name, there.get(name), new) for name, new in asked.items() if there.get(name) != new]
        if changed:
            raise UserError(
                f"{self.path} holds images of other settings ({', '.join(changed)}); give another --output_dir."
            )

    def is_same(self, i: int) -> bool:
        """Draw image i again and return whether it is the one that is there, to a grey level of rounding."""
        (drawn,) = self.draw([i])
        return bool(np.abs(drawn[0].astype(int) - self.read(i).astype(int)).max() <= 1)

    def draw(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """Draw the images of these numbers in batches, uint8, shape (b, H, W, C)."""
        config = self.config
        assert config.num_inference_steps is not None
        return sample_images(
            self.pipeline,
            [config.seed + i for i in numbers],
            batch_size=config.batch_size,
            num_inference_steps=config.num_inference_steps,
            class_labels=None if self.label is None else [self.label] * len(numbers),
            bits=self.bits,
            guidance=config.guidance,
        )

    def fill(self, numbers: Sequence[int]) -> None:
        """Write the images of these numbers when their batch is done, and before the first what they are made of."""
        done = iter(numbers)
        for batch in self.draw(numbers):
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "samples.json", self.record)
            for image in batch:
                self.write(image, self.image(next(done)))

    def write(self, image: np.ndarray, path: Path) -> None:
        """Write one image; of an array the preview first, since the array says that both are there."""
        bands = self.config.rgb_bands
        words = shown_words(self.pipeline.unet.config, bands)
        if self.suffix == ".tif":
            save_tiff(image, path, str(values_of(self.pipeline.unet.config)))
        elif self.suffix == ".png":
            save_png(image, path)
        else:
            save_png(shown_bands(image, bands), path.with_suffix(".png"), words)
            with whole_file(path) as temporary, temporary.open("wb") as file:
                np.save(file, image)

    def read(self, i: int) -> np.ndarray:
        """Return image i as it is shown, uint8, shape (H, W, C)."""
        if self.suffix == ".npy":
            return _eight_bits(np.load(self.image(i)))
        if self.suffix == ".tif":
            return _eight_bits(np.atleast_3d(_tifffile().imread(self.image(i))))
        with Image.open(self.image(i)) as image:  # of 16 bits in colour Pillow gives the high byte
            pixels = np.asarray(image)
        if self.pipeline.unet.config["in_channels"] == 2:  # and RGBA of grey and alpha
            pixels = pixels[..., [0, -1]]
        return _eight_bits(pixels[..., None] if pixels.ndim == 2 else pixels)

    def draw_grid(self) -> None:
        """Write grid.png of the first images, and say what is there."""
        number = self.config.num_samples
        shown = np.stack([self.read(i) for i in range(min(number, _IN_GRID))])
        grid, words = shown_grid(shown, self.pipeline.unet.config, self.config.rgb_bands)
        save_png(grid, self.path / "grid.png", words)
        if self.bits > 8 >= values_of(self.pipeline.unet.config).bits:  # deeper files than the network's images
            words = f"drawn at {words}"
        images = "1 image" if number == 1 else f"{number:,} images"
        print(f"{images} in {self.path}, the first of them in {self.path / 'grid.png'} ({words})")
        if self.meaning:
            print(f"The files hold levels: {self.meaning}.")


def _meaning(value_range: tuple[float, float] | None, bits: int) -> str | None:
    """Return how the values of a network's range follow from the levels in the files; None without a range."""
    if value_range is None:
        return None
    lo, hi = value_range
    return f"value = {lo:g} + level * {hi - lo:g} / {2**bits - 1}"


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Values of 8 or 16 bits as they are shown."""
    return values if values.dtype == np.uint8 else ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _change(name: str, former: object, new: object) -> str:
    """Return what differs in words: the scheduler by its options that do."""
    if not (isinstance(former, dict) and isinstance(new, dict)):
        return f"{name} {former!r} -> {new!r}"
    names = [key for key in sorted(former.keys() | new.keys()) if former.get(key) != new.get(key)]
    return ", ".join(f"{name}'s {key} {former.get(key)} -> {new.get(key)}" for key in names)
