"""Devices that QEMU emulates interrupt the mshv driver through VFIO: from its handler of the hard interrupt."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import vfio_passthrough
from backends import MshvGuest
from driver import ENABLE, FUNCTION_MASK, Driver
from mshv_irqfd import open_partition
from mshv_irqfd.testing import patience, until
from needs import need, skip_or_fail
from nvme import READ, WRITE, Nvme
from support import msi, rare
from vfio_passthrough import EDU, VFIO_PCI, Edu, VfioDevice, find

if TYPE_CHECKING:
    from collections.abc import Iterator

NVME = ("0x1b36", "0x0010")


@pytest.fixture
def guest() -> Iterator[MshvGuest]:
    need("mshv")
    guest = MshvGuest(open_partition("mshv"))
    yield guest
    guest.close()


def passed_through(ids: tuple[str, str]) -> VfioDevice:
    need("mshv")
    address = find(ids)
    if address is None:
        skip_or_fail("mshv", f"no PCI device {ids[0]}:{ids[1]}: run `make lab`, which boots with one")
    assert address is not None
    return VfioDevice(address)


@pytest.fixture
def edu(guest: MshvGuest) -> Iterator[VfioDevice]:
    """A device with MSI. It is closed before the guest."""
    del guest
    with passed_through(EDU) as device:
        yield device


@pytest.fixture
def nvme(guest: MshvGuest) -> Iterator[VfioDevice]:
    """A device with MSI-X."""
    del guest
    with passed_through(NVME) as device:
        yield device


def connect(device: VfioDevice, *events: Any) -> None:
    device.connect(VfioDevice.MSI, [event.fileno() for event in events])


def raise_and_acknowledge(device: VfioDevice) -> None:
    device.write(0x60, 1)
    device.write(0x64, 1)


def test_each_interrupt_of_a_device_with_msi_becomes_one_of_the_guest(guest: MshvGuest, edu: VfioDevice) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        connect(edu, route)
        for _ in range(200):
            raise_and_acknowledge(edu)
            guest.gets(msi(0x41))
        connect(edu)


def test_what_a_device_computes_ends_in_one_interrupt(guest: MshvGuest, edu: VfioDevice) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x42))
        connect(edu, route)
        assert Edu(edu).factorial(10) == 3628800
        guest.gets(msi(0x42))
        connect(edu)


def test_interrupts_while_masked_are_pending_and_become_one(guest: MshvGuest, edu: VfioDevice) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        connect(edu, route)
        for _ in range(20):
            route.mask()
            for _ in range(5):
                raise_and_acknowledge(edu)
            until(lambda: route.pending, "the device's interrupt is pending")
            # VFIO turns the interrupt off when it returns, so no handler is under way any more.
            connect(edu)
            guest.receives_nothing()
            route.unmask()
            guest.receives(msi(0x41))
            connect(edu, route)
        connect(edu)


def test_no_interrupt_is_lost_or_misled_while_its_route_moves(guest: MshvGuest, edu: VfioDevice) -> None:
    rounds = moves = 200
    messages = [msi(0x41), msi(0x42), rare(0x43), rare(0x44)]
    allowed = {message.vector for message in messages}
    raised, seen, errors = 0, Counter[int](), list[BaseException]()
    turn, done = 0, threading.Event()

    with guest.partition.new_irqfd_route() as route:
        route.set_msi(messages[0])
        connect(edu, route)

        def interrupt() -> None:
            nonlocal raised
            try:
                while raised < rounds or turn < moves:
                    raise_and_acknowledge(edu)
                    raised += 1
                    arrived = until(guest.take_interrupts, f"interrupt {raised} arrived")
                    seen.update(interrupt.vector for interrupt in arrived)
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        thread = threading.Thread(target=interrupt)
        thread.start()
        while not done.is_set():
            turn += 1
            route.set_msi(messages[turn % len(messages)])
        thread.join()
        assert errors == []
        connect(edu)
        seen.update(interrupt.vector for interrupt in guest.arrived())
    # A signal that overlaps an arming may come twice.
    assert set(seen) <= allowed
    assert raised <= sum(seen.values()) <= raised + turn


def test_a_device_that_is_unbound_while_armed_leaves_the_route_as_it_is(guest: MshvGuest, edu: VfioDevice) -> None:
    request = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        connect(edu, route)
        edu.connect(VfioDevice.REQUEST, [request])
        raise_and_acknowledge(edu)
        guest.gets(msi(0x41))
        unbind = threading.Thread(target=(VFIO_PCI / "unbind").write_text, args=[edu.address])
        unbind.start()
        # VFIO asks for the device, and waits until it gets it.
        until(lambda: _consumed(request), "VFIO asks for the device")
        assert unbind.is_alive()
        edu.close()
        unbind.join(patience())
        assert not unbind.is_alive()
        assert not (vfio_passthrough.DEVICES / edu.address / "driver").exists()
        assert route.armed
        route.signal()
        guest.receives(msi(0x41))
        route.set_msi(msi(0x51))
        with VfioDevice(edu.address) as again:
            connect(again, route)
            raise_and_acknowledge(again)
            guest.gets(msi(0x51))
    os.close(request)


def _consumed(event: int) -> bool:
    try:
        return os.eventfd_read(event) > 0
    except BlockingIOError:
        return False


def test_a_device_may_interrupt_after_its_route_is_closed(guest: MshvGuest, edu: VfioDevice, theirs: int) -> None:
    route = guest.partition.new_irqfd_route(event=theirs)
    route.set_msi(msi(0x41))
    edu.connect(VfioDevice.MSI, [theirs])
    raise_and_acknowledge(edu)
    guest.gets(msi(0x41))
    route.close()
    for _ in range(3):
        raise_and_acknowledge(edu)
    until(lambda: select.select([theirs], [], [], 0)[0] != [], "the device's interrupt is in the eventfd")
    edu.connect(VfioDevice.MSI, [])
    guest.receives_nothing()
    with guest.partition.new_irqfd_route(event=theirs) as after:
        after.set_msi(msi(0x42))
        guest.receives(msi(0x42))


def test_each_queue_of_a_device_with_msix_interrupts_on_its_own_vector(guest: MshvGuest, nvme: VfioDevice) -> None:
    queues = 4
    with Driver(guest, queues + 1) as driver:
        for number in range(queues + 1):
            driver.program(number, msi(0x40 + number))
            driver.unmask(number)
        driver.control(ENABLE)
        nvme.connect(VfioDevice.MSIX, [vector.event.fileno() for vector in driver.table.vectors])
        controller = Nvme(nvme, queues, interrupted=lambda: guest.gets(msi(0x40)))
        for turn in range(50):
            queue = 1 + turn % queues
            data = os.urandom(512)
            assert controller.transfer(queue, WRITE, turn, data) == data
            guest.gets(msi(0x40 + queue))
            assert controller.transfer(queue, READ, turn) == data
            guest.gets(msi(0x40 + queue))
        nvme.connect(VfioDevice.MSIX, [])


def test_masked_vectors_of_a_device_with_msix_are_pending(guest: MshvGuest, nvme: VfioDevice) -> None:
    with Driver(guest, 3) as driver:
        for number in (1, 2):
            driver.program(number, msi(0x40 + number))
            driver.unmask(number)
        driver.control(ENABLE)
        nvme.connect(VfioDevice.MSIX, [vector.event.fileno() for vector in driver.table.vectors])
        controller = Nvme(nvme, 2)
        until(lambda: driver.table.read_pba(0, 8) == 1, "the admin queue's vector, still masked, is pending")
        for _ in range(20):
            driver.control(ENABLE | FUNCTION_MASK)
            for queue in (1, 2):
                controller.interrupt(queue)
            until(lambda: driver.table.read_pba(0, 8) == 0b111, "both vectors are pending")
            driver.mask(2)
            guest.receives_nothing()
            driver.control(ENABLE)
            guest.gets(msi(0x41))
            assert driver.table.read_pba(0, 8) == 0b101
            driver.set_message(2, msi(0x52))
            driver.unmask(2)
            guest.gets(msi(0x52))
            driver.retarget(2, msi(0x42))
        nvme.connect(VfioDevice.MSIX, [])


def test_the_example_runs() -> None:
    need("mshv")
    passed_through(EDU).close()
    example = subprocess.run(
        [sys.executable, vfio_passthrough.__file__, "mshv"],
        capture_output=True,
        text=True,
        timeout=patience(),
        check=False,
    )
    assert (example.returncode, example.stderr) == (0, "")
    lines = example.stdout.splitlines()
    assert "ENABLED" in lines[0]
    assert lines[1:6] == ["1! is 1", "2! is 2", "3! is 6", "4! is 24", "5! is 120"]
    assert lines[6] == "pending: False"
    assert lines[-2:] == ["masked, pending: True", "unmasked, pending: False"]
