"""Assembles the counting guest: `code.s` becomes `code.bin` beside it.

usage: python tools/assemble_guest.py [--check] [DIRECTORY]    (needs as and ld, from binutils)

DIRECTORY is python/mshv_irqfd/_guest, unless the package is installed elsewhere.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

DIRECTORY = Path(__file__).resolve().parent.parent / "python" / "mshv_irqfd" / "_guest"
ADDRESS = 0x1000
"""The guest-physical address of the code."""


def assembled(source: Path) -> bytes:
    """Assembles and links the source."""
    with tempfile.TemporaryDirectory() as directory:
        code, binary = Path(directory) / "code.o", Path(directory) / "code.bin"
        for command in (
            ["as", "--32", "-o", code, source],
            ["ld", "-m", "elf_i386", "-Ttext", hex(ADDRESS), "--oformat", "binary", "-o", binary, code],
        ):
            subprocess.run(command, check=True)  # noqa: S603 -- our own commands
        return binary.read_bytes()


def main() -> int:
    """Writes the binary, or with --check fails if that would change it."""
    arguments = argparse.ArgumentParser(description="Assembles the counting guest.")
    arguments.add_argument("directory", nargs="?", type=Path, default=DIRECTORY)
    arguments.add_argument("--check", action="store_true", help="compare, and write nothing")
    options = arguments.parse_args()
    source, binary = options.directory / "code.s", options.directory / "code.bin"
    code = assembled(source)
    if not options.check:
        binary.write_bytes(code)
    elif binary.read_bytes() != code:
        sys.stderr.write(f"{binary} is not what {source} assembles to; run: make guest\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
