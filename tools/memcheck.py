"""Runs `tests/helpers/lives.py` under valgrind, and fails on invalid accesses and on leaks by this package.

The package is a debug build with symbols (`cargo build --features python`). For KVM's ioctls valgrind checks only the
argument, by the direction and size in the ioctl's number; it does not track writes through pointers in the argument.
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
# PyO3 creates each class once, and never frees its parts.
KEPT = "create_type_object"


def install() -> Path:
    """Assembles the package with the unstripped extension, and returns the directory to import it from."""
    shutil.rmtree(SCRATCH, ignore_errors=True)
    package = SCRATCH / "mshv_irqfd"
    shutil.copytree(ROOT / "python" / "mshv_irqfd", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "target" / "debug" / "libmshv_irqfd.so", package / EXTENSION)
    return SCRATCH


def run(path: Path, backends: list[str]) -> tuple[int, int]:
    """Runs the lives under valgrind, which writes a report for each process; returns the exit status and process id."""
    valgrind = ["valgrind", "--quiet", "--undef-value-errors=no", "--num-callers=40", "--leak-check=full"]
    valgrind += ["--show-leak-kinds=definite", "--xml=yes", f"--xml-file={path}/%p.xml"]
    environment = {**os.environ, "PYTHONMALLOC": "malloc", "PYTHONPATH": str(path)}
    command = [*valgrind, sys.executable, str(ROOT / "tests" / "helpers" / "lives.py"), *backends]
    with subprocess.Popen(command, env=environment) as lives:  # noqa: S603 -- our own command
        return lives.wait(), lives.pid


def complaints(report: Path, *, leaks: bool) -> list[str]:
    """Reads the complaints of a valgrind report, with or without leaks."""
    found = []
    for error in ET.parse(report).iterfind("error"):  # noqa: S314 -- written by valgrind
        kind = error.findtext("kind", "")
        frames = [(frame.findtext("fn", "?"), frame.findtext("obj", "")) for frame in error.iterfind("stack/frame")]
        ours = any(obj.endswith(EXTENSION) for _, obj in frames) and not any(KEPT in name for name, _ in frames)
        if kind == LEAK and not (leaks and ours):
            continue
        what = error.findtext("what") or error.findtext("xwhat/text") or ""
        found.append("\n    ".join([f"{kind}: {what}", *(name for name, _ in frames)]))
    return found


def main() -> None:
    """Runs the lives, prints the complaints, and fails if there are any."""
    backends = ["simulated"]
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        backends.append("kvm")
    status, parent = run(path := install(), backends)
    # A forked child inherits its parent's memory, and may exit without freeing it.
    reports = sorted(path.glob("*.xml"))
    found = [line for report in reports for line in complaints(report, leaks=report.stem == str(parent))]
    found.append(f"{', '.join(backends)}: {len(reports)} processes, {len(found)} complaints\n")
    sys.stdout.write("\n\n".join(found))
    if status or len(found) > 1:
        sys.exit(1)


if __name__ == "__main__":
    main()
