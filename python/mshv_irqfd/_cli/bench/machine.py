"""What a result depends on, beside the code: the machine, its kernel, the versions, the limits."""

from __future__ import annotations

import os
import platform
import resource
from importlib import metadata
from pathlib import Path

DESCRIPTORS_BESIDE = 128
"""Descriptors for everything but routes."""


class TooFewDescriptorsError(Exception):
    """RLIMIT_NOFILE leaves too few descriptors, and can't be raised."""


def describe() -> dict[str, str | float]:
    """The machine, its kernel and the versions."""
    return {
        "kernel": platform.release(),
        "cpu": _cpu(),
        "cpus": os.cpu_count() or 0,
        "load": round(os.getloadavg()[0], 2),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "mshv_irqfd": metadata.version("mshv_irqfd"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def raise_descriptor_limit(routes: int) -> None:
    """Makes room for so many eventfds: to the hard limit, and where that may be raised too, beyond it.

    Raises:
        TooFewDescriptorsError: there is not enough room; says what to do.
    """
    needed = routes + DESCRIPTORS_BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= needed:
        return
    if hard == unlimited or hard >= needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard == unlimited else hard, hard))
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, needed))
    except (OSError, ValueError) as error:
        raise TooFewDescriptorsError(
            f"{needed} file descriptors are needed, and RLIMIT_NOFILE allows {hard}: raise the hard limit "
            f"(as root: ulimit -Hn {needed}; systemd: LimitNOFILE={needed}), or give fewer --routes"
        ) from error
