"""The console script `mshv-irqfd`, with one module for each subcommand."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mshv_irqfd import __version__
from mshv_irqfd._cli import bench, demo, probe

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="mshv-irqfd", description="irqfd and MSI routing on the Microsoft Hypervisor, KVM and a simulated kernel."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (demo, probe, bench):
        module.add_parser(subcommands)
    options = parser.parse_args(arguments)
    result: int = options.run(options)
    return result
