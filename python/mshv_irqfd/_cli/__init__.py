"""The console script `mshv-irqfd`, with one module for each subcommand."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from typing import TYPE_CHECKING, Final

from mshv_irqfd import MshvIrqFdError, __version__
from mshv_irqfd._cli import bench, completion, demo, doctor, probe
from mshv_irqfd._cli.progress import INTERRUPTED

if TYPE_CHECKING:
    from collections.abc import Sequence

UNREAD: Final = 128 + signal.SIGPIPE
"""The exit status if nobody reads the output any more: that of a program that SIGPIPE ends."""


def parser() -> argparse.ArgumentParser:
    """The command line: its subcommands and their options."""
    whole = argparse.ArgumentParser(
        prog="mshv-irqfd", description="irqfd and MSI routing on the Microsoft Hypervisor, KVM and a simulated kernel."
    )
    whole.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subcommands = whole.add_subparsers(metavar="COMMAND")
    for module in (doctor, demo, probe, bench, completion):
        module.add_parser(subcommands)
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns the exit status."""
    try:
        try:
            return _run(arguments)
        finally:
            if sys.stdout is not None:  # the descriptor may be closed
                sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        if isinstance(error, MshvIrqFdError) or error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # What is left in the buffer would fail again when the interpreter exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            return UNREAD
        print(f"mshv-irqfd: the output can't be written: {error.strerror}", file=sys.stderr)
        return 1


def _run(arguments: Sequence[str] | None) -> int:
    whole = parser()
    options = whole.parse_args(arguments)
    if "run" not in options:
        whole.print_help(sys.stderr)
        return 2
    result: int = options.run(options)
    return result
