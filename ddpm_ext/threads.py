"""How many CPU threads a command takes, decided before PyTorch is imported, which reads the environment once.

What the user sets wins. Else as many as there are cores to have: those the process may run on, no more than a
container's quota, less those that others keep busy at the start, shared by the processes of this machine. Idle threads
stop spinning soon: beside a busy neighbour they would hold the core that the last one needs.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

__all__ = ["chosen_by_user", "default_threads", "fitting_threads", "set_thread_defaults"]

THREADS = "OMP_NUM_THREADS"
OURS = "DDPM_EXT_DEFAULT_THREADS"  # the number that this module set: not the user's
SPIN = "GOMP_SPINCOUNT"
SPINS = "1000"  # some microseconds, in place of the tenth of a second and more that libgomp spins
SMALL = 4096  # values of a layer and image below which the threads' meetings cost more than they share


def set_thread_defaults(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set threads and their waiting in the environment where the user did not; too late once PyTorch is imported."""
    if "torch" in sys.modules and environ is os.environ:
        return
    if THREADS not in environ:
        environ[THREADS] = environ[OURS] = str(default_threads(int(environ.get("LOCAL_WORLD_SIZE", "1"))))
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault(SPIN, SPINS)


def chosen_by_user(environ: MutableMapping[str, str] = os.environ) -> int | None:
    """Return the number that the user, or the launcher, set in the environment; None where it is ours or none."""
    text = environ.get(THREADS, "").split(",")[0]
    return int(text) if text.isdigit() and int(text) > 0 and environ.get(OURS) != environ[THREADS] else None


def default_threads(processes: int = 1, root: Path = Path("/sys/fs/cgroup"), load: float | None = None) -> int:
    """Return the threads of one process.

    Args:
        processes: Those of this run on this machine.
        root: Where the system tells a container's quota.
        load: Processes that want a core; None asks the system for the last minute's.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, int(min(cores, _quota(root))))
    busy = round(os.getloadavg()[0] if load is None and hasattr(os, "getloadavg") else load or 0.0)
    return max(1, (cores - min(busy, cores - 1)) // max(1, processes))


def fitting_threads(channels: int, height: int, width: int) -> int | None:
    """Return 1 for a network too small to share the work of its layers, else None.

    Args:
        channels: Of the finest level.
        height: Of the images.
        width: Of the images.
    """
    return 1 if channels * height * width < SMALL else None


def _quota(root: Path) -> float:
    """Return the cores that a container may use: cgroup v2's cpu.max, or v1's two files; infinite without."""
    try:
        if (root / "cpu.max").exists():
            quota, period = (root / "cpu.max").read_text().split()
            return math.inf if quota == "max" else max(1.0, int(quota) / int(period))
        quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.inf if int(quota) <= 0 else max(1.0, int(quota) / int(period))
    except (OSError, ValueError):
        return math.inf
