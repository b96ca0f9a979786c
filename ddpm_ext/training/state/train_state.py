"""What a run is at one update: weights, averages, moments, counters; to a checkpoint's files and back.

Nothing random is stored: draws, order and dropout seeds are functions of (seed, step).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from ...distributed import copy_into, full_tensor
from ...run_dir import JsonRecord, RunError
from .checkpoint import flatten, read_tensors, unflatten
from .ema import ForeachEMA
from .meter import Meter, Unreadable
from .timestep_samplers import STEM, Timesteps

__all__ = ["TrainState"]


@dataclass
class TrainState:
    """Everything that an update changes, and therefore everything that a checkpoint holds.

    `step` numbers the global batches, `update` the optimiser's updates; they differ by the skipped non-finite steps.

    Attributes:
        parameters: Name -> weight of the bare network, whatever the launcher wraps around it; may be sharded.
        averages: Averaged weights, in the order of `parameters`; the first is sampled from and exported.
        optimizer: AdamW with its moments.
        timesteps: The choice of t, with the recent losses where it depends on them.
        meter: Losses since the last line of the log.
        unreadable: Images that could not be read.
        update: Optimiser updates done.
        step: Global batches seen.
        skipped: Steps without an update, since their loss or gradient was not finite.
        bad_in_a_row: Those of them since the last update.
    """

    parameters: dict[str, nn.Parameter]
    averages: list[ForeachEMA]
    optimizer: AcceleratedOptimizer
    timesteps: Timesteps
    meter: Meter
    unreadable: Unreadable = field(default_factory=Unreadable)
    update: int = 0
    step: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all tensors in full, by the stem of their file and their name. Every process must call this."""
        found = {"model": {name: full_tensor(weight) for name, weight in self.parameters.items()}}
        for i, average in enumerate(self.averages):
            named = zip(self.parameters, average.shadow_params, strict=True)
            found[_stem(i)] = {name: full_tensor(tensor) for name, tensor in named}
        moments = self.optimizer.optimizer.state
        of_weights = {name: moments[weight] for name, weight in self.parameters.items() if weight in moments}
        found["optimizer"] = {key: full_tensor(tensor) for key, tensor in flatten(of_weights)}
        return {**found, **self.timesteps.state()}

    def averaged(self, which: int = 0) -> dict[str, Tensor]:
        """Return one average, or the network's own weights without any, in full. Every process must call this."""
        source = self.averages[which].shadow_params if self.averages else self.parameters.values()
        return {
            name: full_tensor(tensor).cpu().contiguous() for name, tensor in zip(self.parameters, source, strict=True)
        }

    def counters(self, accelerator: Accelerator) -> JsonRecord:
        """Return the rest as plain JSON. Every process must call this."""
        return {
            "update": self.update,
            "step": self.step,
            "skipped": self.skipped,
            "bad_in_a_row": self.bad_in_a_row,
            "unreadable": list(self.unreadable.names),
            "meter": self.meter.total(accelerator).tolist(),
            "averages": [average.optimization_step for average in self.averages],
            "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
        }

    def restore(self, folder: Path, record: JsonRecord, global_batch: int, accelerator: Accelerator) -> None:
        """Become what a checkpoint holds, on any number of processes.

        Args:
            folder: The checkpoint.
            record: Its state.json.
            global_batch: Images of one step from now on; the position in the data stays.
            accelerator: Holds the scaler of fp16, and knows the main process, which alone takes over the meter.

        Raises:
            RunError: the checkpoint is of another network.
        """
        _copy_named(self.parameters, read_tensors(folder, "model"))
        for i, (average, updates) in enumerate(zip(self.averages, record["averages"], strict=False)):
            _copy_named(dict(zip(self.parameters, average.shadow_params, strict=True)), read_tensors(folder, _stem(i)))
            average.optimization_step = updates
        self._restore_moments(unflatten(read_tensors(folder, "optimizer")))
        if accelerator.scaler is not None and record["scaler"]:
            accelerator.scaler.load_state_dict(record["scaler"])
        if accelerator.is_main_process:
            self.meter.sums.copy_(torch.tensor(record["meter"], dtype=self.meter.sums.dtype))
        if self.timesteps.history is not None and record["config"].get("timestep_sampler") == "loss_aware":
            self.timesteps.restore(read_tensors(folder, STEM))
        self.unreadable.names = dict.fromkeys(record.get("unreadable", []))
        self.update, self.step = record["update"], record["global_position"] // global_batch
        self.skipped, self.bad_in_a_row = record["skipped"], record["bad_in_a_row"]

    def _restore_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put Adam's moments back, sharded as the weights are."""
        inner = self.optimizer.optimizer
        state: dict[int, dict[str, Tensor]] = {}
        trained = [(name, weight) for name, weight in self.parameters.items() if weight.requires_grad]
        for i, (name, weight) in enumerate(trained):
            for moment, tensor in moments.get(name, {}).items():
                placed = tensor
                if tensor.shape == weight.shape and tensor.ndim:
                    placed = torch.empty_like(weight)
                    copy_into(placed, tensor)
                state.setdefault(i, {})[moment] = placed
        inner.load_state_dict({"state": state, "param_groups": inner.state_dict()["param_groups"]})


def _stem(which: int) -> str:
    """Return the stem of an average's file."""
    return "ema" if which == 0 else f"ema-{which}"


def _copy_named(targets: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's weights by name.

    Raises:
        RunError: the names are not the same.
    """
    saved = {name.removeprefix("_orig_mod."): tensor for name, tensor in saved.items()}  # of a compiled network
    if targets.keys() != saved.keys():
        names = sorted(targets.keys() ^ saved.keys())
        raise RunError(f"The checkpoint is of another network: {len(names)} weights differ by name, as {names[0]}.")
    for name, target in targets.items():
        copy_into(target, saved[name])
