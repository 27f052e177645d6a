"""What the tests need: `MSHV_IRQFD_BACKENDS` and `MSHV_IRQFD_PROGRAMS` name what is never skipped."""

from __future__ import annotations

import shutil

import backends
import needs
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


def test_a_program_asked_for_by_name_may_not_be_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.delenv(needs.SELECTION, raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"make programs.* qemu-system-common"):
        needs.need_program("qemu-storage-daemon")
    monkeypatch.setenv(needs.SELECTION, "qemu-storage-daemon, qemu-system-x86_64")
    with pytest.raises(AssertionError, match="asked for by MSHV_IRQFD_PROGRAMS: needs qemu-storage-daemon"):
        needs.need_program("qemu-storage-daemon")
    monkeypatch.setenv(needs.SELECTION, "virtiofsd")
    with pytest.raises(ValueError, match="virtiofsd"):
        needs.need_program("qemu-storage-daemon")
