"""Runs `tests/helpers/lives.py` under valgrind, and fails on bad accesses anywhere and on leaks of this package's.

The package is a debug build with its symbols (`cargo build --features python`). valgrind knows no more of KVM's ioctls
than that they read and write as their numbers say; what KVM writes behind their pointers is not watched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).resolve().parents[1]
SCRATCH = ROOT / "target" / "memcheck"
EXTENSION = "_core.abi3.so"
LEAK = "Leak_DefinitelyLost"
# PyO3 makes each class once, and keeps for good what it is made of.
KEPT = "create_type_object"


def install() -> Path:
    """Puts the package together with the extension that has symbols, and returns where it can be imported from."""
    shutil.rmtree(SCRATCH, ignore_errors=True)
    package = SCRATCH / "mshv_irqfd"
    shutil.copytree(ROOT / "python" / "mshv_irqfd", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "target" / "debug" / "libmshv_irqfd.so", package / EXTENSION)
    return SCRATCH


def run(path: Path, backends: list[str]) -> tuple[int, int]:
    """Leads the lives of partitions under valgrind, which leaves a report by process: the exit status, the process."""
    valgrind = ["valgrind", "--quiet", "--undef-value-errors=no", "--num-callers=40", "--leak-check=full"]
    valgrind += ["--show-leak-kinds=definite", "--xml=yes", f"--xml-file={path}/%p.xml"]
    environment = {**os.environ, "PYTHONMALLOC": "malloc", "PYTHONPATH": str(path)}
    command = [*valgrind, sys.executable, str(ROOT / "tests" / "helpers" / "lives.py"), *backends]
    with subprocess.Popen(command, env=environment) as lives:  # noqa: S603 - our own words
        return lives.wait(), lives.pid


def complaints(report: Path, *, leaks: bool) -> list[str]:
    """What is wrong by a report of valgrind's."""
    found = []
    for error in ET.parse(report).iterfind("error"):  # noqa: S314 - valgrind's own
        kind = error.findtext("kind", "")
        frames = [(frame.findtext("fn", "?"), frame.findtext("obj", "")) for frame in error.iterfind("stack/frame")]
        ours = any(obj.endswith(EXTENSION) for _, obj in frames) and not any(KEPT in name for name, _ in frames)
        if kind == LEAK and not (leaks and ours):
            continue
        what = error.findtext("what") or error.findtext("xwhat/text") or ""
        found.append("\n    ".join([f"{kind}: {what}", *(name for name, _ in frames)]))
    return found


def main() -> None:
    """Runs, reports, and fails if anything is wrong."""
    backends = ["simulated"]
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        backends.append("kvm")
    status, parent = run(path := install(), backends)
    # A forked child has what its parent had, and may leave it to the kernel.
    reports = sorted(path.glob("*.xml"))
    found = [line for report in reports for line in complaints(report, leaks=report.stem == str(parent))]
    found.append(f"{', '.join(backends)}: {len(reports)} processes, {len(found)} complaints\n")
    sys.stdout.write("\n\n".join(found))
    if status or len(found) > 1:
        sys.exit(1)


if __name__ == "__main__":
    main()
