"""`mshv-irqfd doctor`: what works on this machine, and the command that fixes what does not.

Looks at the device nodes and their permissions, the kernel's version and configuration, and the limits; then makes a
partition of each kind, and delivers an interrupt where the kernel reports them. Changes nothing.

Exit status 0: interrupts can be delivered (by the backend that --backend names, or by mshv or kvm); 1: they can't.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from mshv_irqfd import __version__
from mshv_irqfd._cli.doctor import checks
from mshv_irqfd._cli.doctor.machine import look

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace, _SubParsersAction

FORMAT: Final = 1
"""Of the JSON. Later versions may add keys; another number says that one has gone or means something else."""
MARKS: Final = {"ok": "ok     ", "warning": "WARNING", "missing": "missing"}


def add_parser(subcommands: _SubParsersAction[ArgumentParser]) -> None:
    """Adds the subcommand and its options."""
    parser = subcommands.add_parser(
        "doctor",
        help="tell what works on this machine, and the command that fixes what does not",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--backend",
        choices=["any", *checks.BACKENDS],
        default="any",
        help="the backend that must work for exit status 0 (default: mshv or kvm)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)


def run(options: Namespace) -> int:
    """Prints what it found."""
    machine = look()
    found = checks.all_of(machine)
    works = {check.subject: check.status == "ok" for check in found if check.subject in checks.BACKENDS}
    needed = ("mshv", "kvm") if options.backend == "any" else (options.backend,)
    fine = any(works[name] for name in needed)
    if options.json:
        report = {
            "format": FORMAT,
            "mshv_irqfd": __version__,
            "machine": asdict(machine),
            "works": works,
            "checks": [asdict(check) for check in found],
        }
        print(json.dumps(report, indent=2))
    else:
        print(f"mshv_irqfd {__version__}, Python {machine.python}, Linux {machine.kernel}\n")
        for check in found:
            print(f"{MARKS[check.status]} {check.subject}: {check.found}")
            if check.remedy:
                print(f"        {check.remedy}")
        print(f"\n{_verdict(works, needed, fine=fine)}")
    return 0 if fine else 1


def _verdict(works: dict[str, bool], needed: tuple[str, ...], *, fine: bool) -> str:
    names = ", ".join(f'"{name}"' for name, does in works.items() if does)
    if fine:
        return f"Works here: {names}."
    return f"Does not work here: {' and '.join(needed)}. Works: {names or 'nothing'}."
