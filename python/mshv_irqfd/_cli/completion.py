"""`mshv-irqfd completion`: a shell's completion script, for its start-up file or its folder of completions.

bash    mshv-irqfd completion bash >~/.local/share/bash-completion/completions/mshv-irqfd
zsh     mshv-irqfd completion zsh >"${fpath[1]}/_mshv-irqfd"
fish    mshv-irqfd completion fish >~/.config/fish/completions/mshv-irqfd.fish
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace, _SubParsersAction

SHELLS: Final = ("bash", "zsh", "fish")


def add_parser(subcommands: _SubParsersAction[ArgumentParser]) -> None:
    """Adds the subcommand and its options."""
    parser = subcommands.add_parser(
        "completion",
        help="print a completion script for bash, zsh or fish",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that is to complete")
    parser.set_defaults(run=run)


def run(options: Namespace) -> int:
    """Prints the script, which `make completions` has made from the command line's options."""
    print((files("mshv_irqfd._cli") / "completions" / f"{options.shell}.txt").read_text(encoding="utf-8"), end="")
    return 0
