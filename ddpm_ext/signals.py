"""Signals, launchers and the ways a process ends: asked to stop, orphaned, or done."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import FrameType

PREEMPTED = 75  # EX_TEMPFAIL: run the same command again
PR_SET_PDEATHSIG = 1


class StopRequest:
    """Remembers that SIGTERM or SIGUSR1 came; the loop looks at it between updates. A second signal changes nothing."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.former = {number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def release(self) -> None:
        """Hand the signals back to whoever had them."""
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)

    def __bool__(self) -> bool:
        return self.signal is not None


def launched() -> bool:
    """Whether a launcher (torchrun or accelerate launch) started this process, and not a shell."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def die_with_launcher() -> None:
    """Ask Linux to send SIGTERM when the launcher ends, however it ends; elsewhere nothing is done.

    A killed launcher cannot forward anything, and its ranks would go on and write beside those of the next launch.
    """
    if not (launched() and sys.platform.startswith("linux")):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent or parent == 1:  # the launcher ended before the request
        os.kill(os.getpid(), signal.SIGTERM)


def exit_process(code: int, num_processes: int) -> int:
    """End a process of several without its destructors, whose order in gloo aborts half the runs; return code if alone.

    Call it after the last barrier, with every file complete.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if num_processes > 1:
        os._exit(code)
    return code


def report_error(error: BaseException, code: int = 1) -> int:
    """Print an error whose message is the whole story and end with a code.

    Once for all processes, or by the process that alone has met it.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"error: {error}", file=sys.stderr)
    elif getattr(error, "alone", False):
        print(f"error of process {rank}: {error}", file=sys.stderr)
    return exit_process(code, int(os.environ.get("WORLD_SIZE", "1")))
