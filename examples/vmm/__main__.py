"""The command line of the VMM; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path

from . import snapshot
from .machine import Machine

# No ACPI: the MP table describes the machine. A reboot or a panic ends in a triple fault, which ends the VMM.
COMMAND_LINE = "console=ttyS0 acpi=off reboot=t panic=-1"


def main() -> None:
    """Runs a guest until it reboots."""
    parser = argparse.ArgumentParser(prog="python -m examples.vmm", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernel", type=Path, help="a bzImage")
    parser.add_argument("--initrd", type=Path, help="an initramfs")
    parser.add_argument(
        "--disk", type=Path, action="append", default=[], help="a file or block device; may be repeated"
    )
    parser.add_argument(
        "--vectors", type=int, action="append", default=[], metavar="N",
        help="MSI-X vectors of the disk; in the order of the disks (default: one a CPU and one more)",
    )  # fmt: skip
    parser.add_argument("--cpus", type=int, default=2, help="at most 8 (default: 2)")
    parser.add_argument("--memory", type=int, default=256, metavar="MB", help="default: 256")
    parser.add_argument("--append", default="", metavar="WORDS", help="more words for the kernel's command line")
    parser.add_argument("--save", type=Path, metavar="DIR", help="on SIGUSR2, save the machine here and end")
    parser.add_argument("--restore", type=Path, metavar="DIR", help="go on with a saved machine; no kernel is needed")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write counts here at the end, as JSON")
    args = parser.parse_args()
    if (args.kernel is None) == (args.restore is None):
        parser.error("either --kernel or --restore is needed")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    def show(data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    with ExitStack() as stack:
        machine = stack.enter_context(Machine(memory=args.memory << 20, cpus=args.cpus, output=show))
        for path, vectors in zip_longest(args.disk, args.vectors[: len(args.disk)]):
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, file)
            machine.add_disk(file, vectors=vectors or args.cpus + 1)
        if sys.stdin.isatty():
            machine.type_from(sys.stdin.fileno())
        if args.restore:
            snapshot.restore(machine, args.restore)
        else:
            initrd = args.initrd.read_bytes() if args.initrd else b""
            machine.boot(args.kernel.read_bytes(), initrd, f"{COMMAND_LINE} {args.append}")
        if args.save:
            signal.signal(signal.SIGUSR2, lambda *_: machine.stop())
        try:
            if not machine.run() and args.save:
                snapshot.save(machine, args.save)
        finally:
            if args.report:
                args.report.write_text(json.dumps(report(machine), indent=1))


def report(machine: Machine) -> dict[str, object]:
    """What the machine has done, counted."""
    return {
        "stats": machine.partition.stats()._asdict(),
        "pushes": machine.ledger.pushes,
        "disks": [
            {
                "requests": disk.requests,
                "signals": disk.signals,
                "faults": [str(fault) for fault in disk.msix.faults()],
            }
            for disk in machine.disks
        ],
    }


if __name__ == "__main__":
    main()
