"""Signals, launchers and the ways a process ends: asked to stop, orphaned, or done."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeAlias

__all__ = [
    "INTERRUPTED",
    "PREEMPTED",
    "StopRequest",
    "Stopped",
    "die_with_launcher",
    "exit_process",
    "interruptible",
    "is_rank_0",
    "launched",
    "let_go",
    "report_error",
    "terminable",
]

Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None  # of a signal, as Python hands it out

PREEMPTED = 75  # EX_TEMPFAIL: run the same command again
INTERRUPTED = 130  # as shells say it: 128 + SIGINT

_STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_LAUNCHER_REPEATS = 2.0  # seconds within which torchrun sends its ranks the SIGINT that the terminal sent them too
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Remember that SIGTERM, SIGUSR1 or Ctrl-C came; a loop looks at it between its steps.

    Before `begin` Ctrl-C interrupts as ever: there is nothing to save yet. After it the first Ctrl-C asks to stop and
    the second ends the process at once. Other repeated signals change nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._promise: str | None = None
        self._at_once: Callable[[], None] = _nothing
        self._asked = math.inf  # when Ctrl-C came first
        self._former: dict[signal.Signals, Handler] = {}
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            self._former = {number: signal.signal(number, self._receive) for number in _STOPPING}

    def begin(self, promise: str, at_once: Callable[[], None] | None = None) -> None:
        """From now on a Ctrl-C asks to stop.

        Args:
            promise: What is said at the first one, such as "a checkpoint is written after this update".
            at_once: Called at the second one, before the process ends.
        """
        self._promise, self._at_once = promise, at_once or _nothing

    def release(self) -> None:
        """Hand the signals back to whoever had them."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._promise is None:
                signal.default_int_handler(number, frame)
            self._count_interrupts()
        self.signal = signal.Signals(number)

    def _count_interrupts(self) -> None:
        """Say what happens after the first Ctrl-C, end the process at the second."""
        now = time.monotonic()
        if self._asked == math.inf:
            self._asked = now
            if is_rank_0():  # not print: it may be what was interrupted
                os.write(2, f"\nStopping: {self._promise}. Ctrl-C again ends at once.\n".encode())
        elif not launched() or now > self._asked + _LAUNCHER_REPEATS:
            self._at_once()
            os._exit(INTERRUPTED)

    def __bool__(self) -> bool:
        return self.signal is not None


def _nothing() -> None:
    """Do nothing."""


class Stopped(KeyboardInterrupt):
    """A stop was asked for, and its message says what is kept: commands print it and exit with code 75."""


@contextmanager
def interruptible(kept: str) -> Iterator[None]:
    """Raise Stopped at the first of Ctrl-C, SIGTERM or SIGUSR1, in work whose files are all written whole.

    Outside the main thread, which alone hears signals, nothing is changed.

    Args:
        kept: What is kept, a clause that the message begins with.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for other in _STOPPING:  # launchers repeat them while the first one unwinds
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(f"{kept}; the same command continues.")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, stop) for number in _STOPPING}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM interrupt as Ctrl-C does, so that what is half done is cleaned away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def let_go(interruption: KeyboardInterrupt) -> None:
    """Free what the interrupted functions held; objects that were half built may fail at that, which is no news."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        traceback.clear_frames(interruption.__traceback__)
    finally:
        sys.unraisablehook = hook


def is_rank_0() -> bool:
    """Whether this is the first of several processes, or the only one; known before an Accelerator is made."""
    return os.environ.get("RANK", "0") == "0"


def launched() -> bool:
    """Return whether a launcher (torchrun or accelerate launch) started this process, and not a shell."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def die_with_launcher() -> None:
    """Ask Linux to send SIGTERM when the launcher ends, however it ends; elsewhere nothing is done.

    A killed launcher cannot forward anything, and its ranks would go on and write beside those of the next launch.
    """
    if not (launched() and sys.platform.startswith("linux")):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
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
