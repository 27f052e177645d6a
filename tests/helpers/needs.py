"""Skips a test where its backend or program is missing, and fails it where that was asked for by name."""

from __future__ import annotations

import os
import shutil

import backends
import faults as faults_
import pytest
from mshv_irqfd import testing

PROGRAMS = {"qemu-storage-daemon": "qemu-system-common", "qemu-system-x86_64": "qemu-system-x86", "ld": "binutils"}
"""The programs that tests run, those at the other end of an eventfd among them, and Debian's packages of them."""

SELECTION = "MSHV_IRQFD_PROGRAMS"
"""The environment variable that lists programs, with commas between. A test of a listed one is never skipped."""


def need(name: str) -> None:
    """Skips the test if a backend is missing; fails it if the backend was asked for by name."""
    if (required := testing.required_backends()) and name not in required:
        pytest.skip(f"MSHV_IRQFD_BACKENDS leaves {name} out")
    skip_or_fail(name, backends.unavailable(name))


def need_faults(name: str) -> None:
    """The same, if the calls of a backend can't be made to fail."""
    need(name)
    skip_or_fail(name, None if name == "simulated" else faults_.unavailable())


def required_programs() -> set[str]:
    """The programs asked for by name."""
    names = {name.strip() for name in os.environ.get(SELECTION, "").split(",") if name.strip()}
    if unknown := names - set(PROGRAMS):
        raise ValueError(f"{SELECTION} names {', '.join(sorted(unknown))}; there are {', '.join(PROGRAMS)}")
    return names


def lacks_program(name: str) -> str | None:
    """The reason why a program is missing here, with the remedy; None if it is there. Raises if it was asked for."""
    if shutil.which(name) is not None:
        return None
    reason = f"needs {name}: run `make programs` (Debian: apt install {PROGRAMS[name]})"
    assert name not in required_programs(), f"asked for by {SELECTION}: {reason}"
    return reason


def need_program(name: str) -> str:
    """The path of a program. Skips the test if it is missing; fails it if the program was asked for by name."""
    if reason := lacks_program(name):
        pytest.skip(reason)
    path = shutil.which(name)
    assert path is not None
    return path


def skip_or_fail(name: str, reason: str | None) -> None:
    if reason is not None and name in testing.required_backends():
        pytest.fail(f"MSHV_IRQFD_BACKENDS asks for {name}: {reason}")
    if reason is not None:
        pytest.skip(reason)
