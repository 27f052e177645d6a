"""`mshv-irqfd probe`: tests how this machine's kernel treats routing tables and irqfds, by bare ioctls.

Each row runs on its own partition, and its result is compared with this package's expectation. Exit status 0: every row
is as expected; 1: some differ, so the package's guarantees may not hold on this kernel; 2: no row could run. On the
root scheduler of the Microsoft Hypervisor, interrupts take another path, which the probe does not observe. Ctrl-C ends
the probe with the rows found so far, and exit status 130.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from mshv_irqfd import HypervisorUnavailableError
from mshv_irqfd._cli import progress
from mshv_irqfd._cli.arguments import seconds
from mshv_irqfd._cli.probe import rows
from mshv_irqfd._cli.probe.finding import Finding, show
from mshv_irqfd._cli.probe.torn_pushes import count_torn
from mshv_irqfd._core import RawPartition

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace, _SubParsersAction

DEVICES: Final = {"mshv": "/dev/mshv", "kvm": "/dev/kvm"}


def add_parser(subcommands: _SubParsersAction[ArgumentParser]) -> None:
    """Adds the subcommand and its options."""
    parser = subcommands.add_parser(
        "probe",
        help="test how this machine's kernel treats routing tables and irqfds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", choices=list(DEVICES), required=True, help="the kernel interface to probe")
    parser.add_argument("--device", help="the device node to open (default: /dev/mshv or /dev/kvm)")
    parser.add_argument(
        "--interrupts",
        metavar="DEVICE",
        help="a device that reports the interrupts mshv asserts: /dev/hvstub of the lab kernel (a real host has none)",
    )
    parser.add_argument(
        "--torn-pushes",
        type=seconds,
        default=0.0,
        metavar="SECONDS",
        help="also signal during pushes and count torn signals, for this long without quiescing and as long with it",
    )
    parser.add_argument(
        "--may-crash-the-host",
        action="store_true",
        help="also run the row that crashes a host on the root scheduler (an MSI for an APIC id without a VP)",
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="run only the rows whose first line contains TEXT")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def _no_observer(options: Namespace) -> str | None:
    """Why the device that --interrupts names can't be of use; None if it can."""
    if options.interrupts is None:
        return None
    if options.backend != "mshv":
        return f"--interrupts {options.interrupts} goes with --backend mshv; KVM's local APIC tells by itself"
    if not os.access(options.interrupts, os.R_OK):
        return f"--interrupts {options.interrupts}: there is no such device, or it can't be read"
    return None


def run(options: Namespace) -> int:
    """Runs the probe and prints its findings."""
    device = options.device or DEVICES[options.backend]
    if problem := _no_observer(options):
        print(problem, file=sys.stderr)
        return 2
    try:
        with closing(RawPartition(options.backend, device)):
            pass
    except (HypervisorUnavailableError, OSError) as error:
        print(
            f"no partition of {options.backend}: {device}: {error}; `mshv-irqfd doctor` tells what to do",
            file=sys.stderr,
        )
        return 2
    chosen = [row for row in rows.ROWS if options.only in row.done]
    if not chosen:
        print(f"no row has {options.only!r} in its first line", file=sys.stderr)
        return 2
    findings: list[Finding] = []
    try:
        for number, row in enumerate(chosen, start=1):
            progress.show(f"{number} of {len(chosen)}: {row.done}")
            findings.append(rows.measure(row, options, device))
        for quiesce in (False, True) if options.torn_pushes else ():
            count_torn(options, device, findings, quiesce=quiesce)
    except KeyboardInterrupt:
        ended = progress.INTERRUPTED
    else:
        ended = int(any(finding.differs for finding in findings))
    finally:
        progress.clear()
    if options.json:
        found = {
            "complete": ended != progress.INTERRUPTED,
            "backend": options.backend,
            "kernel": platform.release(),
            "rows": [asdict(finding) for finding in findings],
        }
        print(json.dumps(found, indent=2))
    else:
        show(findings, options.backend)
    if ended == progress.INTERRUPTED:
        print(f"interrupted after {len(findings)} rows", file=sys.stderr)
    return ended
