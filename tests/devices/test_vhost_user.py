"""A device that QEMU's people wrote, in a process of its own, raises our routes: qemu-storage-daemon over vhost-user.

The guest's write to a doorbell kicks it, and it signals the route's eventfd: nothing of ours is between. The driver
looks at the queue only when it is interrupted, so a lost interrupt stops it.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
from contextlib import contextmanager, suppress
from itertools import cycle
from typing import TYPE_CHECKING

import pytest
from disk_driver import DOORBELL, SECTORS, DiskDriver
from mshv_irqfd import EventFd, MsixTable
from mshv_irqfd.testing import until
from needs import need_program
from support import msi, unique
from vhost_user_blk.daemon import PROGRAM, StorageDaemon
from vhost_user_blk.disk import SECTOR, Kind
from vhost_user_blk.front_end import BackEndError, FrontEnd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from backends import Guest
    from mshv_irqfd import IoEventFd, IrqFdRoute, MsiRoute

    Open = Callable[..., Guest]

FIRST = msi(0x41)


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[StorageDaemon]:
    """A daemon that is not started yet, with an empty disk."""
    need_program(PROGRAM)
    image = tmp_path / "image"
    image.write_bytes(bytes(SECTORS * SECTOR))
    with StorageDaemon(image, tmp_path / "socket") as daemon:
        yield daemon


class Machine:
    """A guest with two VPs, a route, a doorbell, and a disk that interrupts by the route."""

    def __init__(self, guest: Guest, doorbell: IoEventFd, route: IrqFdRoute, storage: StorageDaemon) -> None:
        self.guest, self.doorbell, self.route, self.storage = guest, doorbell, route, storage
        self.driver = DiskDriver(guest, doorbell, storage.path, route)

    def quiet(self) -> None:
        """Takes the interrupt that the daemon sends when it is told which eventfd to signal."""
        self.guest.gets(self.route.msi or FIRST, once=False)
        self.guest.receives_nothing()

    def submit_read(self) -> None:
        self.driver.submit(Kind.READ, 0, count=1)

    def done_without_interrupt(self, number: int) -> None:
        """Waits until a number of requests is done, by looking at the queue."""
        taken = 0

        def all_of_them() -> bool:
            nonlocal taken
            taken += len(self.driver.take_done())
            return taken == number

        until(all_of_them, f"{number} requests are done")

    def check(self, *messages: MsiRoute) -> None:
        """Asserts that each request was done once and well, and that no interrupt came but with these messages."""
        self.driver.finish()
        # The daemon may be about to signal a request that the driver has already taken.
        self.storage.kill()
        self.driver.interrupts.update(self.guest.arrived())
        self.driver.check(self.storage.image)
        vectors = {interrupt.vector for interrupt in self.driver.interrupts}
        assert vectors <= {message.vector for message in messages or [FIRST]}
        # An arming may double an interrupt.
        arms = self.guest.partition.stats().arms
        assert self.driver.interrupts.total() <= self.driver.signals + arms


@pytest.fixture
def machine(open_guest: Open, storage: StorageDaemon) -> Iterator[Machine]:
    storage.start()
    guest = open_guest(vps=2)
    with guest.partition.new_irqfd_route() as route, guest.partition.ioeventfd(DOORBELL, 4) as doorbell:
        route.set_msi(FIRST)
        machine = Machine(guest, doorbell, route, storage)
        with machine.driver.disk:
            yield machine


@contextmanager
def meanwhile(act: Callable[[], object]) -> Iterator[None]:
    """Does something over and over in another thread."""
    stop, errors = threading.Event(), list[BaseException]()

    def work() -> None:
        try:
            while not stop.is_set():
                act()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert errors == []


def test_each_request_raises_one_interrupt_and_every_byte_checks_out(machine: Machine) -> None:
    machine.quiet()
    chance = random.Random(1)
    for _ in range(200):
        machine.driver.submit_any(chance)
        machine.guest.gets(FIRST)
        assert len(machine.driver.take_done()) == 1
    machine.check()


def test_under_load_no_interrupt_is_lost(machine: Machine) -> None:
    machine.driver.load(500, random.Random(2))
    machine.check()


def test_while_masked_its_signals_wait_and_become_one_interrupt(machine: Machine) -> None:
    machine.quiet()
    machine.route.mask()
    for _ in range(5):
        machine.submit_read()
    machine.done_without_interrupt(5)
    assert machine.route.pending
    machine.guest.receives_nothing()
    machine.route.unmask()
    machine.guest.receives(FIRST)
    assert not machine.route.pending
    machine.submit_read()
    machine.guest.gets(FIRST)
    machine.driver.take_done()
    machine.check()


MESSAGES = [msi(vector, apic_id) for vector in range(0x41, 0x49) for apic_id in (0, 1)]


def change_of(machine: Machine, name: str, other: IrqFdRoute) -> Callable[[], object]:
    """Something that another thread does all the time."""
    route, messages, numbers = machine.route, cycle(MESSAGES), cycle(range(256))

    def retarget() -> None:
        route.set_msi(next(messages))

    def mask() -> None:
        route.mask()
        route.unmask()

    def push() -> None:
        # No push loads an NMI in advance, so each new one is a push.
        other.set_msi(unique(next(numbers)))

    return {"retargets": retarget, "masks": mask, "pushes": push}[name]


@pytest.mark.parametrize("change", ["retargets", "masks", "pushes"])
def test_no_interrupt_is_lost_while_routes_change(machine: Machine, change: str) -> None:
    with machine.guest.partition.new_irqfd_route() as other:
        with meanwhile(change_of(machine, change, other)):
            machine.driver.load(300, random.Random(3))
            machine.driver.finish()
        machine.check(*MESSAGES if change == "retargets" else [FIRST])


def test_a_running_queue_moves_to_another_route(machine: Machine) -> None:
    machine.quiet()
    with machine.guest.partition.new_irqfd_route() as other:
        other.set_msi(msi(0x61, 1))
        machine.driver.set_call(other)
        machine.guest.gets(msi(0x61, 1), once=False)  # the daemon's own, at the new eventfd
        machine.submit_read()
        machine.guest.gets(msi(0x61, 1))
        machine.driver.take_done()
        machine.driver.set_call(machine.route)
        machine.quiet()
        machine.submit_read()
        machine.guest.gets(FIRST)
        machine.driver.take_done()
    machine.check()


def test_a_masked_msix_vector_shows_its_signals_in_the_pending_bits(machine: Machine) -> None:
    machine.quiet()
    with MsixTable(machine.guest.partition, 4) as table:
        vector = table.vectors[2]
        table.write_table(16 * 2, FIRST.address.to_bytes(8, "little"))
        table.write_table(16 * 2 + 8, (0x71).to_bytes(4, "little"))
        table.write_message_control(2, (0x8000).to_bytes(2, "little"))
        machine.driver.set_call(vector.event)
        machine.submit_read()
        machine.done_without_interrupt(1)
        until(lambda: table.read_pba(0, 8) == 1 << 2, "the pending bit of the vector is set")
        machine.guest.receives_nothing()
        table.write_table(16 * 2 + 12, bytes(4))
        machine.guest.receives(msi(0x71))
        assert table.read_pba(0, 8) == 0
        machine.submit_read()
        machine.guest.gets(msi(0x71))
        machine.driver.take_done()
        machine.driver.set_call(machine.route)
    machine.quiet()
    machine.check()


def test_requests_in_flight_when_the_daemon_is_killed_are_submitted_again(machine: Machine) -> None:
    machine.storage.kill()
    # The disk is so slow that it is done with a few requests at most.
    machine.storage.start(requests_per_second=1)
    machine.driver.connect(machine.route)
    chance = random.Random(4)
    while not machine.driver.disk.full:
        machine.driver.submit_any(chance)
    machine.driver.interrupted()
    in_flight = len(machine.driver.disk.in_flight)
    assert in_flight >= 3
    machine.storage.kill()
    machine.driver.take_done()
    assert machine.driver.disk.in_flight
    machine.storage.start()
    machine.driver.connect(machine.route)
    machine.check()


@pytest.mark.parametrize("change", ["retargets", "masks"])
def test_daemons_killed_under_load_lose_no_request_and_no_interrupt(machine: Machine, change: str) -> None:
    driver, route, chance = machine.driver, machine.route, random.Random(5)
    with meanwhile(change_of(machine, change, route)):
        for _ in range(6):
            driver.load(chance.randrange(1, 100), chance)
            machine.storage.kill()
            # The guest goes on meanwhile: its requests and rings wait.
            while not driver.disk.full:
                driver.submit_any(chance)
            machine.storage.start()
            driver.connect(route)
        driver.finish()
    machine.check(*MESSAGES)


def test_what_a_killed_daemon_signalled_while_masked_still_waits(machine: Machine) -> None:
    machine.quiet()
    machine.route.mask()
    machine.submit_read()
    until(lambda: machine.route.pending, "the request is done")
    machine.storage.kill()
    assert machine.route.pending
    machine.route.unmask()
    machine.guest.receives(FIRST)
    assert len(machine.driver.take_done()) == 1
    machine.storage.start()
    machine.driver.connect(machine.route)
    machine.quiet()
    machine.check()


def test_a_daemon_that_is_connected_to_again_goes_on(machine: Machine) -> None:
    chance = random.Random(6)
    for _ in range(6):
        machine.driver.load(chance.randrange(1, 60), chance)
        # QEMU 7.2's daemon aborts (`!server->wait_idle`) if its client leaves while it is at work.
        machine.driver.finish()
        machine.driver.disk.disconnect()
        machine.driver.submit_any(chance)
        machine.driver.connect(machine.route)
    machine.check()


def test_on_a_reconnect_the_route_takes_another_eventfd_and_what_waits_comes_along(machine: Machine) -> None:
    machine.quiet()
    machine.route.mask()
    machine.submit_read()
    until(lambda: machine.route.pending, "the request is done")
    # The old daemon may live on, with its copy of the eventfd: the connection may have broken for another reason.
    with EventFd.from_fd(machine.route) as its_copy:
        machine.driver.disk.disconnect()
        machine.route.set_event(None)
        assert machine.route.pending
        its_copy.signal()
        machine.guest.receives_nothing()
        machine.route.unmask()
        machine.guest.receives(FIRST)
        assert len(machine.driver.take_done()) == 1
        its_copy.signal()
        machine.guest.receives_nothing()
    machine.storage.kill()
    machine.storage.start()
    machine.driver.connect(machine.route)
    machine.quiet()
    machine.submit_read()
    machine.guest.gets(FIRST)
    machine.driver.take_done()
    machine.check()


def test_the_eventfd_of_a_running_queue_changes_under_load(machine: Machine) -> None:
    chance = random.Random(7)
    for _ in range(20):
        machine.driver.load(20, chance)
        with EventFd() as event:
            # The device first: what it signals meanwhile waits in the new eventfd.
            machine.driver.set_call(event)
            machine.route.set_event(event)
    machine.check()


def test_daemons_killed_under_load_are_replaced_with_another_eventfd(machine: Machine) -> None:
    chance = random.Random(8)
    for _ in range(6):
        machine.driver.load(chance.randrange(1, 60), chance)
        machine.storage.kill()
        machine.route.set_event(None)
        machine.storage.start()
        machine.driver.connect(machine.route)
    machine.check()


@pytest.mark.parametrize("depth", [3, 16384])
def test_a_depth_that_no_ring_has_is_refused(machine: Machine, depth: int) -> None:
    with pytest.raises(ValueError, match=f"a ring of {4 * depth} descriptors"):
        DiskDriver(machine.guest, machine.doorbell, machine.storage.path, machine.route, depth=depth)
    machine.check()


def test_requests_that_do_not_fit_are_refused(machine: Machine) -> None:
    disk = machine.driver.disk
    for data, told in ((b"1", "1 bytes"), (bytes(SECTOR * 33), "16896 bytes")):
        with pytest.raises(ValueError, match=told):
            disk.submit(Kind.WRITE, 0, data)
    machine.storage.kill()
    while not disk.full:
        machine.submit_read()
    with pytest.raises(ValueError, match="8 requests are in flight"):
        disk.submit(Kind.FLUSH)
    with pytest.raises(BrokenPipeError):
        disk.set_call(machine.route)
    disk.disconnect()
    with pytest.raises(BackEndError, match="connect first"):
        disk.set_call(machine.route)
    machine.storage.start()
    machine.driver.connect(machine.route)
    machine.check()


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([], "went away at GET_FEATURES"),
        ([struct.pack("<IIIQ", 2, 5, 8, 0)], "answered GET_FEATURES with 2"),
        ([struct.pack("<IIIQ", 1, 1, 8, 0)], "answered GET_FEATURES with 1, flags 0x1"),
        ([struct.pack("<IIIQ", 1, 5, 1 << 20, 0)], "1048576 bytes"),
        ([struct.pack("<IIIQ", 1, 5, 8, 1 << 32)], "lacks features 0x40000000"),
        (
            [struct.pack("<IIIQ", 1, 5, 8, 3 << 30 | 1 << 32), struct.pack("<IIIQ", 15, 5, 8, 8)],
            "lacks protocol .* 0x200",
        ),
    ],
)
def test_a_device_that_does_not_speak_the_protocol_is_told_apart(
    tmp_path: Path, answers: list[bytes], told: str
) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        server.listen()

        def serve() -> None:
            client, _ = server.accept()
            with client:
                for answer in answers:
                    client.recv(4096)
                    client.send(answer)
                client.shutdown(socket.SHUT_WR)
                # The front end may close before it has read everything.
                with suppress(ConnectionResetError):
                    while client.recv(4096):
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with pytest.raises(BackEndError, match=told):
                FrontEnd(tmp_path / "socket")
        finally:
            thread.join()


def test_a_socket_where_nobody_listens_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FrontEnd(tmp_path / "socket")
