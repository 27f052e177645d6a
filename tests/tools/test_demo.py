"""`mshv-irqfd demo`: what it shows on each backend, and what it says where no guest can run."""

from __future__ import annotations

import errno
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from mshv_irqfd import KvmPartition, _cli, _guest
from mshv_irqfd._cli import demo
from mshv_irqfd._cli.progress import INTERRUPTED
from needs import need

if TYPE_CHECKING:
    from collections.abc import Callable

    from backends import Backend

FINE = "Every expected interrupt arrived, and no other."


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit status and the output."""
    status = _cli.main(["demo", *arguments])
    return status, capsys.readouterr().out


def test_every_step_is_as_expected(backend: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    status, output = shown(capsys, "--backend", backend.name)
    assert status == 0
    assert output.endswith(f"{FINE}\n")
    assert "DIFFERENT" not in output


def test_on_kvm_it_shows_what_a_guest_took(capsys: pytest.CaptureFixture[str]) -> None:
    need("kvm")
    status, output = shown(capsys, "--backend", "kvm")
    assert status == 0
    assert "a guest of some 200 bytes runs on VP 0" in output
    assert "the guest took: 0x40, 0x41, 0x42; expected: 0x40, 0x41, 0x42 ok" in output


def no_start(*_: int) -> None:
    """Leaves the vCPU at the reset vector, where it has no memory."""


def refused(*_: int) -> None:
    raise OSError(errno.EINVAL, "KVM_SET_SREGS")


@pytest.mark.parametrize(("set_up", "why"), [(no_start, "KVM's exit reason"), (refused, "KVM_SET_SREGS")])
def test_where_no_guest_runs_it_says_so_and_reads_the_local_apic(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, set_up: Callable[..., None], why: str
) -> None:
    need("kvm")
    monkeypatch.setattr(_guest, "_set_up", set_up)
    status, output = shown(capsys, "--backend", "kvm")
    assert status == 0
    assert "no guest runs here (" in output
    assert why in output
    assert "read from the local APIC instead" in output
    assert "  arrived: 0x40, 0x41, 0x42; expected: 0x40, 0x41, 0x42 ok" in output


def test_an_interrupt_that_came_twice_is_shown_as_different(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    need("kvm")

    class Twice(demo.Demonstration):
        def _taken(self, guest: _guest.GuestOfPartition, expected: list[int]) -> list[int]:
            assert isinstance(self.partition, KvmPartition)
            for vector in expected:
                guest.fence()
                self.partition.signal_msi(0xFEE00000, vector)
            return super()._taken(guest, expected)

    monkeypatch.setattr(demo, "Demonstration", Twice)
    status, output = shown(capsys, "--backend", "kvm")
    assert status == 1
    assert "the guest took: 0x40, 0x40, 0x41, 0x41, 0x42, 0x42; expected: 0x40, 0x41, 0x42 DIFFERENT" in output


def test_a_guest_that_goes_wrong_ends_the_demonstration(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    need("kvm")

    class Crashing(demo.Demonstration):
        def run(self) -> None:
            # INIT: the VP begins anew where it has no memory.
            self.partition.signal_msi(0xFEE00000, 0x500)
            super().run()

    monkeypatch.setattr(demo, "Demonstration", Crashing)
    status, output = shown(capsys, "--backend", "kvm")
    assert status == 1
    assert "\nthe guest went wrong: " in output
    assert FINE not in output


def test_ctrl_c_ends_it(backend: Backend) -> None:
    code = (
        "import os, signal, sys\n"
        "from mshv_irqfd import _cli\n"
        "from mshv_irqfd._cli import demo\n"
        "step = demo.Demonstration._step\n"
        "def pressed(*arguments):\n"
        "    step(*arguments)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "demo.Demonstration._step = pressed\n"
        f"sys.exit(_cli.main(['demo', '--backend', {backend.name!r}]))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    # Nothing is left open, and there is no traceback.
    assert (ended.returncode, ended.stderr) == (INTERRUPTED, "")
