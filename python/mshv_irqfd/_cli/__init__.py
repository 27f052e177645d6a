"""The console script `mshv-irqfd`, with one module for each subcommand."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mshv_irqfd import __version__
from mshv_irqfd._cli import bench, completion, demo, doctor, probe

if TYPE_CHECKING:
    from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    """The command line: its subcommands and their options."""
    whole = argparse.ArgumentParser(
        prog="mshv-irqfd", description="irqfd and MSI routing on the Microsoft Hypervisor, KVM and a simulated kernel."
    )
    whole.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subcommands = whole.add_subparsers(required=True, metavar="COMMAND")
    for module in (doctor, demo, probe, bench, completion):
        module.add_parser(subcommands)
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns the exit status."""
    options = parser().parse_args(arguments)
    result: int = options.run(options)
    return result
