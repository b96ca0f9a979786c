"""A command in a terminal of its own, so that Ctrl-C reaches it as it reaches a user's."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from typing import Any

from training import ROOT


class Terminal:
    """A pseudo-terminal and the command that runs in its foreground."""

    def __init__(self, words: Sequence[str], **environment: str) -> None:
        self.own, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # lines and columns
        os.set_blocking(self.own, False)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *words], cwd=ROOT, env=env, stdin=inner, stdout=inner, stderr=inner
        )
        os.close(inner)
        self.text = ""

    def read(self) -> str:
        """Return all that was shown so far."""
        try:
            while part := os.read(self.own, 65536):
                self.text += part.decode(errors="replace")
        except (BlockingIOError, OSError):
            pass
        return self.text

    def press_ctrl_c(self) -> None:
        """Press Ctrl-C: the terminal sends SIGINT to every process in its foreground."""
        os.write(self.own, b"\x03")

    def terminate(self) -> None:
        """Send SIGTERM to the command alone, as a batch system or `kill` does."""
        self.process.terminate()  # setsid, which has become the command

    def wait_for(self, there: Callable[[], Any], seconds: float = 120) -> None:
        """Wait until something is so; the command must not have ended before."""
        end = time.monotonic() + seconds
        while not there():
            self.read()
            assert time.monotonic() < end and self.process.poll() is None, self.read()
            time.sleep(0.02)

    def finish(self, seconds: float = 120) -> tuple[int, str]:
        """Return exit code and all that was shown."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, f"did not end:\n{self.read()}"
            self.read()
            time.sleep(0.02)
        return self.process.returncode, self.read()

    def close(self) -> None:
        """Kill what still runs and close the terminal."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.own)  # hangs up whatever else runs in it
