"""The conditions of a run: the machine, its kernel, the versions, and the descriptor limit."""

from __future__ import annotations

import os
import platform
import resource
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from mshv_irqfd import _core

if TYPE_CHECKING:
    from collections.abc import Mapping

DESCRIPTORS_BESIDE = 128
"""Descriptors beyond those of the routes."""


class TooFewDescriptorsError(Exception):
    """RLIMIT_NOFILE allows too few descriptors, and cannot be raised."""


def describe() -> dict[str, str | float]:
    """The machine, its kernel and the versions."""
    return {
        "kernel": platform.release(),
        "cpu": _cpu(),
        "cpus": os.cpu_count() or 0,
        "load": round(os.getloadavg()[0], 2),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "mshv_irqfd": metadata.version("mshv_irqfd"),
        "build": "debug" if _core.DEBUG_BUILD else "release",
    }


def is_debug(description: Mapping[str, str | float]) -> bool:
    """Whether a result is of a debug build. Results of earlier versions do not say, and count as of a release."""
    return description.get("build") == "debug"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def raise_descriptor_limit(routes: int) -> None:
    """Raises RLIMIT_NOFILE for this many eventfds: to the hard limit, or beyond it with the privilege to do so.

    Raises:
        TooFewDescriptorsError: the limit cannot be raised. The message names a remedy.
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
            f"the bench needs {needed} file descriptors, and RLIMIT_NOFILE allows {hard}: raise the hard limit "
            f"(as root: ulimit -Hn {needed}; systemd: LimitNOFILE={needed}), or reduce --routes"
        ) from error
