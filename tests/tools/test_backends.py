"""What the tests need: `MSHV_IRQFD_BACKENDS` and `MSHV_IRQFD_PROGRAMS` name what is never skipped."""

from __future__ import annotations

import shutil

import backends
import needs
import pytest


def test_a_backend_asked_for_by_name_may_not_be_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "unavailable", lambda _: "no device")
    monkeypatch.delenv("MSHV_IRQFD_BACKENDS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no device"):
        needs.need("kvm")
    monkeypatch.setenv("MSHV_IRQFD_BACKENDS", "simulated, kvm")
    with pytest.raises(pytest.fail.Exception, match="MSHV_IRQFD_BACKENDS asks for kvm: no device"):
        needs.need("kvm")
    with pytest.raises(pytest.skip.Exception, match="MSHV_IRQFD_BACKENDS leaves mshv out"):
        needs.need("mshv")


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
