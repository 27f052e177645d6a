"""Skips a test where its backend is missing, and fails it where that backend was asked for by name."""

from __future__ import annotations

import backends
import faults as faults_
import pytest


def need(name: str) -> None:
    """Skips the test if a backend is missing; fails it if the backend was asked for by name."""
    if name not in backends.selected():
        pytest.skip(f"{backends.SELECTION} leaves {name} out")
    skip_or_fail(name, backends.unavailable(name))


def need_faults(name: str) -> None:
    """The same, if the calls of a backend can't be made to fail."""
    need(name)
    skip_or_fail(name, None if name == "simulated" else faults_.unavailable())


def skip_or_fail(name: str, reason: str | None) -> None:
    if reason is not None and backends.required(name):
        pytest.fail(f"{name} was asked for by {backends.SELECTION}: {reason}")
    if reason is not None:
        pytest.skip(reason)
