"""Assembles the counting guest: `python/mshv_irqfd/_guest/code.s` becomes `code.bin` beside it.

usage: python tools/assemble_guest.py [--check]    (needs as and ld, from binutils)
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "python" / "mshv_irqfd" / "_guest" / "code.s"
BINARY = SOURCE.with_suffix(".bin")
ADDRESS = 0x1000
"""The guest-physical address of the code."""


def assembled() -> bytes:
    """Assembles and links the source."""
    with tempfile.TemporaryDirectory() as directory:
        code, binary = Path(directory) / "code.o", Path(directory) / "code.bin"
        for command in (
            ["as", "--32", "-o", code, SOURCE],
            ["ld", "-m", "elf_i386", "-Ttext", hex(ADDRESS), "--oformat", "binary", "-o", binary, code],
        ):
            subprocess.run(command, check=True)  # noqa: S603 -- our own commands
        return binary.read_bytes()


def main() -> int:
    """Writes the binary, or with --check fails if that would change it."""
    code = assembled()
    if "--check" not in sys.argv:
        BINARY.write_bytes(code)
    elif BINARY.read_bytes() != code:
        sys.stderr.write(f"{BINARY} is not what {SOURCE.name} assembles to; run: make guest\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
