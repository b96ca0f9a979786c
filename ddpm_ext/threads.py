"""How many CPU threads a command takes, decided before PyTorch is imported, which reads the environment once.

What the user sets wins. Else as many as there are cores to have: those the process may run on, less those that others
keep busy at the start, no more than a container's quota, shared by the processes of this machine. Idle threads stop
spinning soon: beside a neighbour that comes later they would hold the core that the last one needs.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

import psutil

__all__ = ["chosen_by_user", "default_threads", "set_thread_defaults"]

THREADS = "OMP_NUM_THREADS"
OURS = "DDPM_EXT_DEFAULT_THREADS"  # the number that this module set: not the user's
SPIN = "GOMP_SPINCOUNT"
SPINS = "10000"  # tens of microseconds; libgomp spins a tenth of a second and more, and with 1000 a tenth is lost
WATCHED = 0.2  # seconds for which the other processes are watched


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


def default_threads(processes: int = 1, root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the threads of one process, which watches the others for a fifth of a second.

    Args:
        processes: Those of this run on this machine.
        root: Where the system tells a container's quota.
    """
    loads = psutil.cpu_percent(WATCHED, percpu=True)
    if hasattr(os, "sched_getaffinity"):
        loads = [loads[core] for core in os.sched_getaffinity(0) if core < len(loads)]
    free = len(loads) - round(sum(loads) / 100)
    return max(1, int(min(free, _quota(root))) // max(1, processes))


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
