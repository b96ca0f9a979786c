"""Long measurements in numbered pieces: a file each, over any number of processes, resumable after a kill.

    items 0..count-1  ->  pieces of `shard_size` neighbours  ->  <folder>/<label>-<key>/000000-000512.safetensors ...

A piece depends on its items alone, so neither the number of processes nor a kill changes the result. Processes on
several machines need a folder that all of them see.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import UserError
from ..pipelines.identity import key_hash, key_text
from ..run_dir import whole_file

__all__ = ["Shards", "load_checked", "save_whole"]

Work = Callable[[range], dict[str, Tensor]]
Key = Mapping[str, object]  # JSON values


@dataclass(frozen=True)
class Shards:
    """Where the pieces of measurements go.

    Attributes:
        folder: Where the pieces' folders lie.
        key: What all measurements depend on that go there, such as the model.
        accelerator: Knows the processes.
    """

    folder: Path
    key: Key
    accelerator: Accelerator

    def run(self, label: str, key: Key, count: int, shard_size: int, work: Work) -> dict[str, Tensor]:
        """Return the results of `work` on items 0..count-1, concatenated; pieces that are on disk are not done again.

        Every process must call it. All get the whole result.

        Args:
            label: A word for the folder's name and the progress bar.
            key: Everything the result depends on but count and the key of all; another key has another folder.
            count: Number of items.
            shard_size: Items of a piece; part of the key.
            work: Items of a piece -> CPU tensors, each with one row per item or any number of rows.
        """
        key, accelerator = {**self.key, **key, "shard_size": shard_size}, self.accelerator
        place = self.place(label, key)
        place.mkdir(parents=True, exist_ok=True)
        pieces = [range(start, min(start + shard_size, count)) for start in range(0, count, shard_size)]

        accelerator.wait_for_everyone()
        missing = [piece for piece in pieces if not _shard_path(place, piece).exists()]
        accelerator.wait_for_everyone()  # nobody writes before everybody has looked
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        silent = not accelerator.is_main_process or not mine
        with tqdm(total=sum(map(len, mine)), desc=label, unit="image", disable=silent) as bar:
            for piece in mine:
                save_whole(work(piece), _shard_path(place, piece), key)
                bar.update(len(piece))
        accelerator.wait_for_everyone()

        parts = [load_checked(_shard_path(place, piece), key) for piece in pieces]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def place(self, label: str, key: Key) -> Path:
        """Return the folder of one measurement by its whole key."""
        return self.folder / f"{label}-{key_hash(key)}"


def _shard_path(place: Path, piece: range) -> Path:
    """Return the file of a piece."""
    return place / f"{piece.start:06d}-{piece.stop:06d}.safetensors"


def save_whole(tensors: dict[str, Tensor], path: Path, key: Key) -> None:
    """Write a file whole or not at all, with its key inside.

    Args:
        tensors: What is written, by name.
        path: The file.
        key: What it depends on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"key": key_text(key)})


def load_checked(path: Path, key: Key) -> dict[str, Tensor]:
    """Load the tensors of a file that was made for this key.

    Raises:
        UserError: it was made for another key; names what differs.
    """
    with safe_open(path, framework="pt") as file:
        there = json.loads((file.metadata() or {}).get("key", "{}"))
    asked = json.loads(key_text(key))
    if there != asked:
        names = sorted(name for name in there.keys() | asked.keys() if there.get(name) != asked.get(name))
        changes = ", ".join(f"{name} is {there.get(name)!r}, needed {asked.get(name)!r}" for name in names)
        raise UserError(f"{path} was made for something else: {changes}. Delete it or name another file.")
    return load_file(path)
