"""A finding of the probe, and the table of findings."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Final

UNSEEN: Final = "not observable here"


@dataclass(frozen=True)
class Finding:
    """One row: the steps, the result that this package expects, and the actual result."""

    done: str
    expected: str
    found: str
    differs: bool


def show(findings: list[Finding], backend: str) -> None:
    """Prints the findings as a table."""
    print(f"{backend} on Linux {platform.release()}\n")
    for finding in findings:
        print(f"{'DIFFERS ' if finding.differs else '        '}{finding.done}\n            {finding.found}")
        if finding.differs:
            print(f"            expected: {finding.expected}")
    differing = sum(finding.differs for finding in findings)
    unseen = sum(finding.found == UNSEEN for finding in findings)
    print(f"\n{len(findings)} rows, {differing} differ from this package's expectations, {unseen} not observable")
