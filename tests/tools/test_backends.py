"""The tests' own choice of backends: `MSHV_IRQFD_BACKENDS` selects them, and a selected one is never skipped."""

from __future__ import annotations

import backends
import pytest


def test_a_backend_asked_for_by_name_may_not_be_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.SELECTION, "simulated, kvm")
    assert backends.selected() == ("simulated", "kvm")
    assert backends.required("kvm")
    assert not backends.required("mshv")
    monkeypatch.delenv(backends.SELECTION)
    assert backends.selected() == backends.NAMES
    assert not backends.required("kvm")
    monkeypatch.setenv(backends.SELECTION, "xen")
    with pytest.raises(ValueError, match="xen"):
        backends.selected()
