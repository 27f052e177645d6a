"""The guest that counts: its CPUs take interrupts, end them, and access memory and ports when told."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mshv_irqfd import MsiRoute, Partition, _guest, open_partition
from mshv_irqfd._guest import FENCE, Access, CountingGuest, GuestError, GuestOfPartition
from mshv_irqfd.testing import until
from needs import need, need_program
from raw_kvm import KvmVm
from support import in_child, msi, open_files, run_python, still_works

if TYPE_CHECKING:
    from backends import KvmGuest

ASSEMBLE = Path(__file__).parents[2] / "tools" / "assemble_guest.py"


def running(vm: KvmVm) -> CountingGuest:
    """The guest of a VM that bare ioctls made."""
    guest = CountingGuest(vm)
    guest.add(0, os.dup(vm.vcpu))
    return guest


@pytest.mark.parametrize("changed", [False, True])
def test_its_bytes_are_what_its_source_assembles_to(tmp_path: Path, changed: bool) -> None:
    need_program("ld")  # and as, which comes with it
    for name in ("code.s", "code.bin"):
        (tmp_path / name).write_bytes(resources.files(_guest).joinpath(name).read_bytes())
    if changed:
        (tmp_path / "code.s").write_text((tmp_path / "code.s").read_text().replace("0x404", "0x408"))
    check = subprocess.run([sys.executable, ASSEMBLE, "--check", tmp_path], capture_output=True, text=True, check=False)
    assert check.returncode == int(changed), check.stderr


def test_every_vector_is_taken_counted_and_ended(kvm: KvmGuest) -> None:
    guest = kvm.running()
    vectors = [vector for vector in range(16, 256) if vector != FENCE]
    # An interrupt that is not ended would keep back the lower ones of the second round.
    for _ in range(2):
        for vector in reversed(vectors):
            assert kvm.partition.signal_msi(msi(vector))
        guest.fence()
        assert guest.take() == {(vector, 0): 1 for vector in vectors}
    assert [guest.count(0, vector) for vector in vectors] == [2] * len(vectors)


def test_each_vp_counts_what_it_takes() -> None:
    need("kvm")
    with open_partition("kvm", vps=[0, 3, 200]) as partition, GuestOfPartition(partition) as guest:
        assert guest.vps == (0, 3, 200)
        for number, vp in enumerate(guest.vps):
            for _ in range(number):
                partition.signal_msi(msi(0x41, vp))
                guest.fence()
        partition.signal_msi(msi(0x42, 0xFF))
        partition.create_vp(7)
        guest.add_new_vps()
        partition.signal_msi(msi(0x41, 7))
        guest.fence()
        assert guest.take() == {(0x41, 3): 1, (0x41, 200): 2, (0x41, 7): 1, **{(0x42, vp): 1 for vp in (0, 3, 200)}}


def test_an_nmi_is_counted_as_vector_2(kvm: KvmGuest) -> None:
    guest = kvm.running()
    for _ in range(3):
        kvm.partition.signal_msi(MsiRoute(0xFEE00000, 0x400))
        guest.fence()
    assert guest.take() == {(2, 0): 3}


def test_interrupts_that_are_taken_in_between_do_not_merge(kvm: KvmGuest) -> None:
    guest = kvm.running()
    for _ in range(500):
        kvm.partition.signal_msi(msi(0x41))
        guest.fence()
    assert guest.take() == {(0x41, 0): 500}
    assert guest.take() == {}


def test_what_waited_before_it_ran_is_taken(kvm: KvmGuest) -> None:
    kvm.stop()
    for _ in range(3):
        kvm.partition.signal_msi(msi(0x41))
    guest = kvm.running()
    guest.fence()
    # The local APIC kept one bit.
    assert guest.take() == {(0x41, 0): 1}


def test_it_runs_in_a_vm_that_others_made(vm: KvmVm) -> None:
    with running(vm) as guest, Partition.from_fd(vm, "kvm", vps=1) as partition:
        route = partition.new_irqfd_route()
        route.set_msi(msi(0x41))
        route.signal()
        guest.fence()
        assert guest.take() == {(0x41, 0): 1}
        route.close()


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_an_access_that_no_device_of_the_kernel_takes_goes_to_the_vmm(kvm: KvmGuest, size: int) -> None:
    guest = kvm.running()
    seen: list[Access] = []

    def vmm(access: Access) -> bytes:
        seen.append(access)
        return bytes(range(0xA0, 0xB0))

    guest.vmm = vmm
    data = bytes(range(1, 1 + size))
    assert not guest.write(0xD0000000, data)
    assert guest.read(0xD0000100, size) == bytes(range(0xA0, 0xA0 + size))
    assert seen == [Access(0xD0000000, size, data, port=False), Access(0xD0000100, size, None, port=False)]
    if size < 8:
        assert not guest.write(0x510, data, port=True)
        assert seen[2:] == [Access(0x510, size, data, port=True)]
    else:
        with pytest.raises(ValueError, match="1, 2, 4 bytes, not 8"):
            guest.write(0x510, data, port=True)


def test_a_read_that_the_vmm_leaves_unanswered_gives_zeros(kvm: KvmGuest) -> None:
    guest = kvm.running()
    assert guest.read(0xD0000000, 8) == bytes(8)
    guest.vmm = lambda _: b"\1"
    assert guest.read(0xD0000000, 4) == b"\1\0\0\0"


def test_an_access_of_no_size_that_a_cpu_has_is_refused(kvm: KvmGuest) -> None:
    guest = kvm.running()
    with pytest.raises(ValueError, match="1, 2, 4, 8 bytes, not 3"):
        guest.write(0xD0000000, b"abc")
    with pytest.raises(ValueError, match="not 0"):
        guest.read(0xD0000000, 0)
    guest.fence()


def test_interrupts_arrive_during_accesses(kvm: KvmGuest) -> None:
    guest = kvm.running()
    with kvm.partition.new_irqfd_route() as route, kvm.partition.ioeventfd(0xD0000000, 4, event=route) as doorbell:
        route.set_msi(msi(0x41))
        # The guest's own write raises the interrupt that interrupts it.
        for _ in range(200):
            assert guest.write(0xD0000000, bytes(4))
            guest.fence()
        assert guest.take() == {(0x41, 0): 200}
        assert doorbell.consume() == 0


def test_an_error_of_the_vmm_reaches_whoever_waits_for_the_guest() -> None:
    need("kvm")

    def vmm(_: Access) -> None:
        raise KeyError("ours")

    with open_partition("kvm") as partition, GuestOfPartition(partition, vmm=vmm) as guest:
        with pytest.raises(GuestError, match="VP 0 failed") as failed:
            guest.write(0xD0000000, b"\1")
        assert isinstance(failed.value.__cause__, KeyError)
        for use in (guest.take, guest.fence):
            with pytest.raises(GuestError, match="VP 0 failed"):
                use()


def test_a_guest_that_crashes_is_an_error_that_names_kvms_reason() -> None:
    need("kvm")
    with open_partition("kvm") as partition, GuestOfPartition(partition) as guest:
        failures: list[GuestError] = []

        def fails() -> bool:
            try:
                guest.take()
            except GuestError as error:
                failures.append(error)
            return failures != []

        # INIT: the VP begins anew at the reset vector, where it has no memory.
        partition.signal_msi(MsiRoute(0xFEE00000, 0x500))
        until(fails, "the guest has crashed")
        assert "VP 0 stopped with KVM's exit reason" in str(failures[0].__cause__)


def test_a_guest_that_does_not_take_its_interrupts_is_an_error() -> None:
    need("kvm")
    entered, leave = threading.Event(), threading.Event()

    def vmm(_: Access) -> None:
        entered.set()
        leave.wait()

    with open_partition("kvm", vps=2) as partition, GuestOfPartition(partition, vmm=vmm, patience=0.1) as slow:
        with pytest.raises(GuestError, match=r"0.1 s passed before VP 1 makes Access\(address=3489660928"):
            slow.write(0xD0000000, b"\1", vp=1)
        assert entered.is_set()
        with pytest.raises(GuestError, match=r"0.1 s passed before VP 1 takes what waits"):
            slow.fence()
        partition.signal_msi(msi(0x41, 0))
        until(lambda: slow.count(0, 0x41) == 1, "the other VP takes its interrupt")
        leave.set()


def test_take_interrupts_is_refused_while_it_runs_and_works_afterwards(kvm: KvmGuest) -> None:
    with pytest.raises(io.UnsupportedOperation, match="a guest runs on the vCPUs"):
        kvm.partition.take_interrupts()
    kvm.stop()
    assert kvm.partition.take_interrupts() == []
    kvm.partition.signal_msi(msi(0x41))
    assert [interrupt.vector for interrupt in kvm.partition.take_interrupts()] == [0x41]


def test_closing_it_again_leaves_the_next_guest_its_vps(kvm: KvmGuest) -> None:
    kvm.stop()
    first = GuestOfPartition(kvm.partition)
    first.close()
    with GuestOfPartition(kvm.partition):
        first.close()
        with pytest.raises(io.UnsupportedOperation, match="a guest runs on the vCPUs"):
            kvm.partition.take_interrupts()


def test_a_vp_can_be_stopped_as_soon_as_it_is_started() -> None:
    need("kvm")
    # The threads take turns all the time, so the kick often comes before the VP's thread has done anything.
    code = """
import os
import sys
from mshv_irqfd import open_partition
from mshv_irqfd._guest import PAGES, CountingGuest, _Vp
sys.setswitchinterval(1e-6)
with open_partition("kvm") as partition, CountingGuest(partition) as guest:
    for _ in range(300):
        _Vp(guest, 0, partition._lend_vcpu(0), PAGES).stop()
"""
    ended = run_python(code)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_closing_it_ends_its_threads_and_leaves_no_descriptor(vm: KvmVm) -> None:
    files, threads = open_files(), set(threading.enumerate())
    for _ in range(20):
        guest = running(vm)
        (own,) = set(threading.enumerate()) - threads
        guest.close()
        guest.close()
        assert not own.is_alive()
        assert open_files() == files


def test_closing_it_ends_a_vp_that_never_halts(kvm: KvmGuest) -> None:
    guest = kvm.running()
    # It takes one interrupt after another.
    stop = threading.Event()

    def storm() -> None:
        while not stop.is_set():
            kvm.partition.signal_msi(msi(0x41))

    thread = threading.Thread(target=storm)
    thread.start()
    until(lambda: guest.count(0, 0x41) > 100, "the storm has begun")
    kvm.stop()
    stop.set()
    thread.join()
    # What the guest did not take waits in the local APIC.
    kvm.partition.take_interrupts()
    still_works(kvm)


def test_it_outlives_its_partition(kvm: KvmGuest) -> None:
    guest = kvm.running()
    kvm.partition.close()
    assert guest.take() == {}
    guest.close()


def test_what_is_no_vm_is_refused_and_leaves_nothing(vm: KvmVm) -> None:
    files = open_files()
    with Path("/dev/null").open("rb") as null, pytest.raises(OSError, match="ioctl"):
        CountingGuest(null)
    with running(vm) as guest, pytest.raises(OSError, match=r"."):
        guest.add(1, os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
    assert open_files() == files


def test_a_forked_child_can_close_it_and_the_parents_runs_on(kvm: KvmGuest) -> None:
    guest = kvm.running()

    def close() -> int:
        before = len(open_files())
        guest.close()
        return before - len(open_files())

    # The vCPU, and the mapping of its registers.
    assert in_child(close) == 2
    kvm.partition.signal_msi(msi(0x41))
    guest.fence()
    assert guest.take() == {(0x41, 0): 1}


def test_a_forked_child_runs_a_guest_of_its_own(kvm: KvmGuest) -> None:
    guest = kvm.running()

    def run() -> dict[tuple[int, int], int]:
        own = KvmVm()
        with CountingGuest(own) as there:
            there.add(0, own.vcpu)
            there.fence()
            return dict(there.take())

    assert in_child(run) == {}
    guest.fence()


RUNNING = """
import os, signal, sys, threading
from mshv_irqfd import MsiRoute, open_partition
from mshv_irqfd._guest import GuestOfPartition
partition = open_partition("kvm")
guest = GuestOfPartition(partition)
"""


def test_the_interpreter_ends_while_it_runs() -> None:
    need("kvm")
    ended = run_python(RUNNING + "partition.close()")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_ctrl_c_reaches_the_main_thread_while_it_runs() -> None:
    need("kvm")
    code = RUNNING + (
        "with partition, guest:\n"
        "    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    threading.Event().wait()\n"
    )
    ended = run_python(code)
    assert ended.returncode == -signal.SIGINT
    assert ended.stderr.rstrip().endswith("KeyboardInterrupt")
