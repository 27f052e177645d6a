"""Writes the probe's rows into docs/kernel-facts.md.

usage: python tools/kernel_facts.py [--check]

The probe is the only source of what the package expects of each kernel.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mshv_irqfd._cli.probe.rows import ROWS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernel-facts.md"
BEGIN, END = "<!-- rows: written by tools/kernel_facts.py -->\n", "<!-- end of rows -->"


def cell(text: str | None) -> str:
    """A cell of the table."""
    return "-" if text is None else text.replace("|", "\\|")


def table() -> str:
    """The rows, for both kernels."""
    lines = ["| what is done | mshv driver | KVM |", "|---|---|---|"]
    for row in ROWS:
        alike = row.mshv == row.kvm
        lines.append(f"| {cell(row.done)} | {cell(row.mshv)} | {'the same' if alike else cell(row.kvm)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Rewrites the table, or with --check fails if that would change it."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    after = f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"
    if "--check" in sys.argv:
        if text != after:
            sys.stderr.write(f"{PAGE} does not match the probe's rows; run: python tools/kernel_facts.py\n")
        return int(text != after)
    PAGE.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
