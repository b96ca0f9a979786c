"""`ddpm-ext COMMAND …`, the same as `python -m ddpm_ext COMMAND …`: the one place where errors become sentences."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from .. import __version__
from ..errors import UsageError, UserError, did_you_mean
from ..signals import PREEMPTED, Stopped, exit_process, is_rank_0, let_go, report_error, terminable
from ..threads import set_thread_defaults
from .commands import COMMANDS

__all__ = ["is_expected", "main", "script"]

PACKAGE = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Its name and options; None for the process's own.

    Returns:
        Exit code: 0; 75 when it was asked to stop and the same command continues; 1 after an error that the last line
        explains; 2 after a command line that cannot be understood; 130 when it was interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not {"-h", "--help", "--version"} & set(argv):
        set_thread_defaults()
    try:
        with terminable():
            code = _command(argv)(argv[1:]) if argv else _overview()
    except SystemExit as leaving:  # argparse, after --help
        return leaving.code if isinstance(leaving.code, int) else 0
    except Stopped as stop:
        code = PREEMPTED
        let_go(stop)
        if is_rank_0():
            print(f"Stopped. {stop}")
    except KeyboardInterrupt as interruption:
        let_go(interruption)
        return report_error(UserError("interrupted."), 130)
    except Exception as error:
        if is_expected(error):
            return report_error(error, 2 if isinstance(error, UsageError) else 1)
        from ..hub.messages import unreachable  # not at the top: --help must not wait for it

        sentence = unreachable(error)
        if sentence is None:
            raise
        return report_error(UserError(sentence))
    return exit_process(code, int(os.environ.get("WORLD_SIZE", "1")))


def script(name: str) -> Callable[[], int]:
    """Return the main function of a script that is one of the commands."""
    return lambda: main([name, *sys.argv[1:]])


def is_expected(error: BaseException) -> bool:
    """Whether an error is what a user can get wrong, so that its message is the whole story.

    That is a `UserError`, a ValueError that this package itself raises, or what the system says of a file. A bug of
    ours, of Diffusers or of PyTorch keeps its traceback.
    """
    if isinstance(error, UserError):
        return True
    if isinstance(error, OSError):
        return error.errno is not None and error.filename is not None
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return type(error) is ValueError and bool(last) and PACKAGE in Path(last[0].filename).resolve().parents


def _command(argv: list[str]) -> Callable[[list[str]], int]:
    name = argv[0].replace("_", "-")
    if name in ("-h", "--help", "help"):
        return lambda _: _overview()
    if name == "--version":
        return lambda _: print(f"ddpm-ext {__version__}") or 0
    if name not in COMMANDS:
        meant = did_you_mean(name, COMMANDS) or f" There are {', '.join(COMMANDS)}."
        raise UsageError(f"There is no command {argv[0]}.{meant}")
    return COMMANDS[name]


def _overview() -> int:
    """Print the commands."""
    print("usage: ddpm-ext COMMAND [options]\n\nDenoising diffusion (DDPM) for Diffusers.\n\ncommands:")
    for name, command in COMMANDS.items():
        print(f"  {name:<16} {str(command.__doc__).splitlines()[0]}")
    print("\n`ddpm-ext COMMAND --help` lists its options. On several processes: accelerate launch -m ddpm_ext …")
    return 0
