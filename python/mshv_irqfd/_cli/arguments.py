"""Types of arguments that several subcommands have."""

from __future__ import annotations

import argparse


def seconds(text: str) -> float:
    """A number of seconds, up to a day."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 86400:  # noqa: PLR2004 -- a day
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 86400")
    return number
