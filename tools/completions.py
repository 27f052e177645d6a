"""Writes the completion scripts that `mshv-irqfd completion` prints, or with --check fails if that would change one.

The scripts are made by shtab from the command line's options, and ship with the package: completing needs no import.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import shtab
from mshv_irqfd import _cli
from mshv_irqfd._cli.completion import SHELLS

SCRIPTS = Path(__file__).resolve().parent.parent / "python" / "mshv_irqfd" / "_cli" / "completions"


def complete_files(parser: argparse.ArgumentParser) -> None:
    """Lets the arguments that are files be completed as such."""
    for action in parser._actions:  # noqa: SLF001 -- argparse has no other way to list them, and shtab does the same
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 -- as above
            for subparser in action.choices.values():
                complete_files(subparser)
        elif action.metavar in ("FILE", "DEVICE", "A.json", "B.json", "RUN.json") or action.dest == "device":
            action.complete = shtab.FILE  # type: ignore[attr-defined]


def main() -> int:
    """Writes or checks every script."""
    parser = _cli.parser()
    complete_files(parser)
    stale = []
    SCRIPTS.mkdir(exist_ok=True)
    for shell in SHELLS:
        script = shtab.complete(parser, shell).rstrip() + "\n"
        file = SCRIPTS / f"{shell}.txt"
        if "--check" not in sys.argv:
            file.write_text(script)
        elif not file.exists() or file.read_text() != script:
            stale.append(file.name)
    if stale:
        sys.stderr.write(f"{', '.join(stale)} of {SCRIPTS} do not match the options; run: make completions\n")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
