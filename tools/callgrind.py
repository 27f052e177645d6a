"""Counts the instructions of the core's operations with callgrind, and writes a table of them.

usage: python tools/callgrind.py [FILE]    (needs valgrind and cargo; writes to standard output without FILE)

Each operation runs in two processes, twice as often in the second. The difference, divided by the number of runs, is
the cost of one operation without its set-up.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMES = 1000
OPERATIONS = {
    "alloc": "take the last free GSI of 2,048 and give it back",
    "set-full-table": "move one route of a full table (2,048 armed) to another vector, by a push",
    "set-loaded": "move one route of a full table to another vector, which is loaded",
    "mask-unmask": "mask and unmask one route of a full table",
    "batch-64": "move 64 routes of a full table to other vectors in one batch",
    "msi-decode": "check and decode an MSI's address and data",
}


def built() -> str:
    """Builds the bench and returns the path of its binary."""
    command = ["cargo", "bench", "--quiet", "--no-run", "--bench", "core", "--message-format=json"]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603
    messages = map(json.loads, output.splitlines())
    names = [message["executable"] for message in messages if message.get("target", {}).get("name") == "core"]
    return str(names[-1])


def instructions(binary: str, operation: str, times: int) -> int:
    """Runs the binary and returns the number of instructions."""
    with tempfile.TemporaryDirectory() as directory:
        valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={directory}/out"]
        command = [*valgrind, binary, "--instructions", operation, str(times)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 -- our own bench
    found = re.search(r"Collected : (\d+)", done.stderr)
    if found is None:
        raise RuntimeError(done.stderr)
    return int(found[1])


def table() -> str:
    """The table, in Markdown."""
    binary = built()
    rows = []
    for operation, what in OPERATIONS.items():
        once, twice = (instructions(binary, operation, times) for times in (TIMES, 2 * TIMES))
        rows.append(f"| `{operation}` | {what} | {(twice - once) / TIMES:,.0f} |")
    lines = "\n".join(rows)
    rustc = ["rustc", "--version"]
    version = subprocess.run(rustc, check=True, capture_output=True, text=True).stdout.split()[1]  # noqa: S603
    return f"""\
# Instructions of the core's operations

User-space instructions on a kernel that does nothing, counted by callgrind: unlike times, they can be compared
between machines and runs. `python tools/callgrind.py docs/callgrind.md` (needs valgrind) updates this table, which is
for rustc {version}. `cargo bench` times the same operations (`benches/core.rs`).

| operation | description | instructions |
|---|---|---|
{lines}
"""


if __name__ == "__main__":
    text = table()
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
