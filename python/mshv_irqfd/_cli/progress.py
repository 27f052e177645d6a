"""What long commands share: a line on standard error that tells how far they are."""

from __future__ import annotations

import shutil
import sys
from typing import Final

CLEAR: Final = "\r\x1b[K"

INTERRUPTED: Final = 130
"""The exit status of a program that Ctrl-C ended early: 128 and the number of SIGINT."""


def show(text: str) -> None:
    """Replaces the line. Writes nothing where standard error is not a terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        sys.stderr.write(f"{CLEAR}{text[: width - 1]}")
        sys.stderr.flush()


def clear() -> None:
    """Takes the line away."""
    show("")
