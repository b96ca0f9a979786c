"""The files that the index of a saved pipeline needs: every part with its configuration and all its weights.

    model_index.json
    unet/            config.json, diffusion_pytorch_model.safetensors, or its shards with their index; variants
    scheduler/       scheduler_config.json

In a flat pipeline, as google/ddpm-* are stored, the files of the parts lie beside the index.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from safetensors import SafetensorError, safe_open

from ..diffusion.words import INDEX
from ..errors import HubError
from ..run_dir import JsonRecord

__all__ = [
    "PICKLES",
    "Files",
    "Weights",
    "check_not_pointer",
    "check_weights",
    "component_names",
    "is_weights_name",
    "pipeline_files",
    "read_record",
    "tensor_files",
    "weights_of",
]

Files = dict[str, Path]  # name in the repository -> file on disk
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
_STEM = "diffusion_pytorch_model"
_WEIGHTS = re.compile(rf"{_STEM}(?:\.(?P<variant>[^.-]+))?(?P<shard>-\d{{5}}-of-\d{{5}})?\.safetensors")
_SHARD_INDEX = re.compile(rf"{_STEM}\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json")
_POINTER = b"version https://git-lfs.github.com/spec/"
# Names of attention weights before Diffusers 0.13 -> since; Diffusers renames them when it loads.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_SAVE_AGAIN = "Save the pipeline again, then push."


class _Part(NamedTuple):
    """A component that the index names."""

    name: str
    library: str
    class_name: str
    folder: Path  # that holds its files

    @property
    def kind(self) -> Any:
        """Return its class in Diffusers; None where it is of another library."""
        return getattr(diffusers, self.class_name, None) if self.library == "diffusers" else None


class Weights(NamedTuple):
    """The files of a network's weights in one precision, as Diffusers loads them."""

    variant: str | None  # as "fp16"; None for the full ones
    shard_index: Path | None
    files: list[Path]


# The index ------------------------------------------------------------------------------------------------------------


def component_names(index: Path) -> list[str]:
    """Return the names of the parts that a model_index.json names."""
    return [
        name
        for name, entry in read_record(index).items()
        if not name.startswith("_") and isinstance(entry, list) and entry[:1] != [None]
    ]


def _parts(pipeline: Path) -> Iterator[_Part]:
    """Yield the parts of a pipeline, each with the folder that its files are in.

    Raises:
        HubError: the index is broken or names no part, or the files of a part are missing.
    """
    index = read_record(pipeline / INDEX)
    names = component_names(pipeline / INDEX)
    if not names or "_class_name" not in index:
        raise HubError(f"{pipeline / INDEX} names no pipeline with parts such as unet, scheduler. {_SAVE_AGAIN}")
    for name in names:
        library, class_name = (str(word) for word in index[name])
        part = _Part(name, library, class_name, pipeline / name)
        if not part.folder.is_dir():
            if not _is_flat(part, pipeline):
                raise HubError(
                    f"{pipeline / INDEX} names {name!r} ({class_name}), and its files are missing: there is no folder "
                    f"{part.folder}, nor do they lie beside the index. {_SAVE_AGAIN}"
                )
            part = part._replace(folder=pipeline)
        yield part


def _config_name(part: _Part) -> str | None:
    """Return the name of the part's configuration; None where Diffusers does not know its class."""
    return getattr(part.kind, "config_name", None)


def _is_flat(part: _Part, pipeline: Path) -> bool:
    """Return whether the part's configuration lies beside the index; a scheduler's may name a related class."""
    config = pipeline / (_config_name(part) or "no name")
    if not config.is_file():
        return False
    word = read_record(config).get("_class_name")
    return word == part.class_name or (word is not None and not _is_network(part))


def _is_network(part: _Part) -> bool:
    return isinstance(part.kind, type) and issubclass(part.kind, diffusers.ModelMixin)


def pipeline_files(pipeline: Path) -> Files:
    """Return the files that the index of a pipeline needs, by their names in a repository.

    Each part gets a folder of its own there, in a flat pipeline too.

    Args:
        pipeline: A folder that holds model_index.json.

    Raises:
        HubError: a part, its configuration or some of its weights are missing, broken, or pickles; says which.
    """
    files = {INDEX: pipeline / INDEX}
    for part in _parts(pipeline):
        for path in _network_files(part) if _is_network(part) else _other_files(part):
            files[f"{part.name}/{path.relative_to(part.folder).as_posix()}"] = path
    custom = read_record(pipeline / INDEX)["_class_name"]
    if isinstance(custom, list):  # the pipeline's own code: [module, class]
        code = pipeline / f"{custom[0]}.py"
        if not code.is_file():
            raise HubError(f"{pipeline / INDEX} names the code {code.name}, which is missing. {_SAVE_AGAIN}")
        files[code.name] = code
    return files


def _network_files(part: _Part) -> list[Path]:
    """Return the configuration and all weights of a network of Diffusers, checked against its architecture."""
    config = part.folder / "config.json"
    if not config.is_file():
        raise HubError(f"{part.folder} lacks config.json of {part.name!r} ({part.class_name}). {_SAVE_AGAIN}")
    found = weights_of(part.folder)
    if not found:
        pickled = next((path for path in sorted(part.folder.iterdir()) if path.suffix in PICKLES), None)
        if pickled is not None:
            raise HubError(_pickled(part.folder, pickled))
        raise HubError(f"{part.folder} holds a network's config.json and no weights (*.safetensors). {_SAVE_AGAIN}")
    files = [config]
    for weights in found:
        _check_tensors(part, weights)
        files += [*([weights.shard_index] if weights.shard_index else []), *weights.files]
    return files


def _other_files(part: _Part) -> list[Path]:
    """Return the files of a part that is no network of Diffusers: a scheduler's configuration, or all that it holds."""
    if (name := _config_name(part)) is not None:
        config = part.folder / name
        if not config.is_file():
            raise HubError(f"{part.folder} lacks {name} of {part.name!r} ({part.class_name}). {_SAVE_AGAIN}")
        read_record(config)
        return [config]
    files = [
        path
        for path in sorted(part.folder.rglob("*"))
        if path.is_file() and not any(word.startswith((".", "__")) for word in path.relative_to(part.folder).parts)
    ]
    pickled = [path for path in files if path.suffix in PICKLES]
    files = [path for path in files if path.suffix not in PICKLES]
    tensors = [path for path in files if path.suffix == ".safetensors"]
    if not files or ((part.folder / "config.json").is_file() and not tensors):
        if pickled:
            raise HubError(_pickled(part.folder, pickled[0]))
        raise HubError(f"{part.folder} lacks the files of {part.name!r} ({part.class_name}). {_SAVE_AGAIN}")
    for path in files:
        if path.name.endswith(".safetensors.index.json"):
            _shards(path)
        elif path.suffix == ".json":
            _read_json(path)
        elif path.suffix == ".safetensors":
            _shapes(path)
    return files


def _pickled(folder: Path, path: Path) -> str:
    return (
        f"{folder} holds its weights as a pickle ({path.name}), which can run code where it is loaded. Convert it "
        "first: ddpm-ext convert --source diffusers --checkpoint <the pipeline's folder> --output_dir <folder>"
    )


# Weights --------------------------------------------------------------------------------------------------------------


def is_weights_name(name: str) -> bool:
    """Return whether a file of this name holds weights of a Diffusers network, or the index of their shards."""
    return any(pattern.fullmatch(name) for pattern in (_WEIGHTS, _SHARD_INDEX)) or name == f"{_STEM}.bin"


def weights_of(folder: Path) -> list[Weights]:
    """Return the safetensors of a network in each precision that its folder holds, the full ones first.

    Where there are shards with their index and a single file too, the shards: Diffusers loads them.

    Raises:
        HubError: an index names a file that is missing, or there are shards without their index.
    """
    names = sorted(path.name for path in folder.iterdir())
    matches = [found for name in names if (found := _WEIGHTS.fullmatch(name) or _SHARD_INDEX.fullmatch(name))]
    found = []
    for variant in sorted({match["variant"] for match in matches}, key=lambda word: word or ""):
        middle = f".{variant}" if variant else ""
        single, index = folder / f"{_STEM}{middle}.safetensors", folder / f"{_STEM}.safetensors.index{middle}.json"
        if index.is_file():
            found.append(Weights(variant, index, _shards(index)))
        elif single.is_file():
            found.append(Weights(variant, None, [single]))
        else:
            shard = next(match.string for match in matches if match["variant"] == variant)
            raise HubError(
                f"{folder / shard} is one of several shards, and their index {index.name} is missing. {_SAVE_AGAIN}"
            )
    return found


def _shards(index: Path) -> list[Path]:
    """Return the shards that their index names."""
    try:
        names = sorted(set(read_record(index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise HubError(f"{index} is broken (no weight_map) and is not pushed. {_SAVE_AGAIN}") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        raise HubError(f"{index} names {', '.join(missing) or 'no file'}, which is missing. {_SAVE_AGAIN}")
    return [index.parent / name for name in names]


def tensor_files(weights: Weights) -> dict[str, Path]:
    """Return tensor name -> the file that holds it; of shards, as their index says."""
    held = {path: _shapes(path).keys() for path in weights.files}
    if weights.shard_index is None:
        return {name: path for path, names in held.items() for name in names}
    placed = read_record(weights.shard_index)["weight_map"]
    folder = weights.shard_index.parent
    return {name: folder / file for name, file in placed.items() if name in held[folder / file]}


def check_weights(pipeline: Path, variant: str | None = None, passed: Collection[str] = ()) -> None:
    """Check that the weights that Diffusers would load hold every tensor of each network, in its shape.

    Args:
        pipeline: A folder that holds model_index.json.
        variant: As given to `from_pretrained`; a part without it falls back to the full weights.
        passed: Names of parts that are not loaded from the folder.

    Raises:
        HubError: a tensor is missing or of another shape; names it. It is a ValueError.
    """
    for part in _parts(pipeline):
        if part.name in passed or not _is_network(part):
            continue
        known = {weights.variant: weights for weights in weights_of(part.folder)}
        weights = known.get(variant) or known.get(None)
        if weights is not None:  # else a pickle, which Diffusers reads and names itself
            _check_tensors(part, weights)


def _check_tensors(part: _Part, weights: Weights) -> None:
    config = part.folder / "config.json"
    try:
        with torch.device(
            "meta"
        ):  # of this thread alone, unlike Accelerate's init_empty_weights: pushes run beside training
            network = part.kind.from_config(read_record(config))
    except (TypeError, ValueError) as error:
        raise HubError(f"{config} is no configuration of a {part.class_name}: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    shapes = {path: _shapes(path) for path in weights.files}
    held = {name: shapes[path][name] for name, path in tensor_files(weights).items()}
    held |= {new: shape for name, shape in held.items() if (new := _renamed(name)) in expected}
    where = weights.shard_index or weights.files[0]
    missing = [name for name in expected if name not in held]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise HubError(
            f"{where} lacks the tensor {missing[0]!r}, shape {expected[missing[0]]}{more}, that the {part.class_name} "
            f"of config.json has. The file is incomplete or of another network: save the pipeline again."
        )
    for name, shape in expected.items():
        if held[name] != shape:
            raise HubError(
                f"{where} holds {name!r} with the shape {held[name]}, and the {part.class_name} of config.json has "
                f"{shape}. The weights are of another network: save the pipeline again."
            )


def _renamed(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    block, _, layer = stem.rpartition(".")
    return f"{block}.{_OLD_ATTENTION.get(layer, layer)}.{kind}"


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return tensor name -> shape of a safetensors file, from its header, which is compared with the file's size."""
    check_not_pointer(path)
    try:
        with safe_open(path, "pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise HubError(f"{path} is broken ({error}) and is not used. {_SAVE_AGAIN}") from error


# Reading --------------------------------------------------------------------------------------------------------------


def read_record(path: Path) -> JsonRecord:
    """Return the object in a JSON file.

    Raises:
        HubError: the file is broken, or holds no object.
    """
    record = _read_json(path)
    if not isinstance(record, dict):
        raise HubError(f"{path} is broken (it holds a {type(record).__name__}, no object). {_SAVE_AGAIN}")
    return record


def _read_json(path: Path) -> object:
    check_not_pointer(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HubError(f"{path} is broken ({error}) and is not used. {_SAVE_AGAIN}") from error


def check_not_pointer(path: Path) -> None:
    """Raise HubError where a file is the pointer that Git LFS leaves in the place of one."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise HubError(f"{path} is a pointer of Git LFS, not the file. Fetch it (`git lfs pull`), then run again.")
