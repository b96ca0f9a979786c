"""A simulated accelerator, the device "sim": CUDA's rules without a GPU, and a report of every wait of the host.

    from accelerator import install, watch
    install()                                   # builds simulated.cpp once (g++, ninja; under a minute), then cached
    x = torch.randn(4, 3, 8, 8).to("sim")
    with watch() as seen:
        scheduler.step(eps, t, x)
    assert not seen.blocking                    # nothing made the host wait

Its memory is the host's, its kernels are the CPU's; what is CUDA's are the rules: a CPU tensor beside a device tensor
is an error, there are two devices, a generator lives on one, and what is new holds garbage. Not covered: CUDA's
numerics, streams and their races, autocast (without effect), NCCL, torch.compile.
"""

from __future__ import annotations

import fcntl
import traceback
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["Event", "Events", "device_at_hand", "install", "is_installed", "never_waits", "watch"]

NAME = "sim"
OURS = ("ddpm_ext", "diffusers", "accelerate")  # whose line is named, the innermost
HARMLESS = "asynchronous copy"


class Event(NamedTuple):
    """Something that the host did with the device."""

    kind: str  # "wait", "copy to host", "copy to device" (these make it wait) or "asynchronous copy"
    what: str
    where: str  # file:line function, the innermost line of ddpm_ext, Diffusers or Accelerate


class Events(Counter[Event]):
    """How often each event happened."""

    @property
    def blocking(self) -> dict[Event, int]:
        """Those that made the host wait."""
        return {event: number for event, number in self.items() if event.kind != HARMLESS}


@lru_cache(maxsize=1)
def _extension() -> Any:
    from torch.utils.cpp_extension import _get_build_directory, load

    name, source = "ddpm_ext_simulated_accelerator", Path(__file__).with_name("simulated.cpp")
    folder = Path(_get_build_directory(name, False))
    with (folder / "build.flock").open(
        "w"
    ) as held:  # freed when a process dies; PyTorch's own lock is a file that stays
        fcntl.flock(held, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        return load(name, [str(source)], extra_cflags=["-O1", "-w"], build_directory=str(folder))


def is_installed() -> bool:
    """Whether this process has the device."""
    return hasattr(torch, NAME)


def install(default: bool = True) -> None:
    """Give this process the device.

    Args:
        default: Make it Accelerate's device, and so that of every training, sampling and evaluation.
    """
    if not is_installed():
        _register()
    if default:
        from accelerate.state import PartialState

        PartialState.default_device = property(lambda _: torch.device(NAME, 0))  # type: ignore[assignment,method-assign]


def _register() -> None:
    extension = _extension()
    torch.utils.rename_privateuse1_backend(NAME)
    module: Any = types.ModuleType(f"torch.{NAME}")
    module._is_in_bad_fork = lambda: False
    module.is_available = module.is_initialized = module.is_bf16_supported = lambda: True
    module.device_count, module.current_device = extension.device_count, extension.current_device
    module.set_device = lambda device: extension.set_device(
        device if isinstance(device, int) else torch.device(device).index or 0
    )
    generators = [extension.default_generator(i) for i in range(extension.device_count())]
    module.manual_seed = generators[0].manual_seed
    module.manual_seed_all = lambda seed: [generator.manual_seed(seed) for generator in generators]
    module.get_rng_state = lambda device=0: generators[0].get_state()
    module.set_rng_state = lambda state, device=0: generators[0].set_state(state)
    module.synchronize = module.empty_cache = lambda *_: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()


@contextmanager
def watch() -> Iterator[Events]:
    """Count what makes the host wait, and every copy between host and device, until the block ends."""
    seen, extension = Events(), _extension()
    extension.listen(lambda kind, what: seen.update([Event(kind, what, _line())]))
    try:
        yield seen
    finally:
        extension.listen(None)


def device_at_hand() -> str:
    """The device of the tests marked gpu: the simulated one where it is installed, else CUDA's."""
    return NAME if is_installed() else "cuda"


@contextmanager
def never_waits() -> Iterator[None]:
    """Fail when something inside makes the host wait for the device at hand."""
    if is_installed():
        with watch() as seen:
            yield
        assert not seen.blocking, seen.blocking
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _line() -> str:
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if any(name in path.parts for name in OURS):
            return f"{path.parent.name}/{path.name}:{frame.lineno} {frame.name}"
    return "elsewhere"
