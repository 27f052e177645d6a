"""Tests in both modes of a partition: with messages loaded into spare GSIs, and without spare GSIs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    from backends import Backend

Mode = Literal["unloaded", "loaded"]


def options(backend: Backend, mode: Mode) -> dict[str, Any]:
    """The options of a partition. On KVM pushes are quiesced to load, as they would load nothing for a few routes."""
    if mode == "unloaded":
        return {"preload": False}
    return {} if backend.loads() else {"quiesce": True}


# The name of the mode without spare GSIs is left out of a test's name.
modes = [pytest.param("unloaded", id=pytest.HIDDEN_PARAM), pytest.param("loaded", id="loaded")]

without_spare_gsis = pytest.mark.parametrize("guest", modes[:1], indirect=True)
"""Runs a test with a guest that has no spare GSIs: each new message is a push."""

in_both_modes = pytest.mark.parametrize("guest", modes, indirect=True)
"""Runs a test with a guest in each mode."""
