"""MSI by the book: PCI Local Bus 3.0 section 6.8.1 for the registers, 6.8.3 for their operation.

A test's name starts with the section of its rule. PCI Express has the same text: 5.0 sections 7.7.1 and 6.1.4.
"""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING, Any, Self

import pytest
from mshv_irqfd import ClosedError, MissingVpError, MsiCapability, MsiRoute, MsiVector
from support import counting, in_child, msi, refusal, still_works

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from backends import Guest

CONTROL, ADDRESS, UPPER_ADDRESS, DATA, MASK, PENDING = 2, 4, 8, 12, 16, 20
ENABLE, GRANTED_SHIFT, CAPABLE_SHIFT = 1, 4, 1
READ_ONLY = 0x180
"""Message control: 64-bit addresses and per-vector masking."""


class Driver:
    """A guest's driver of a device with MSI."""

    def __init__(self, guest: Guest, vectors: int, **options: Any) -> None:
        self.device = MsiCapability(guest.partition, vectors, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.device.close()

    def __getitem__(self, vector: int) -> MsiVector:
        return self.device.vectors[vector]

    def write(self, register: int, value: int, size: int = 4) -> None:
        self.device.write_config(register, value.to_bytes(size, "little"))

    def read(self, register: int, size: int = 4) -> int:
        return self.device.read_config(register, size)

    def set_message(self, message: MsiRoute) -> None:
        self.write(ADDRESS, message.address)
        self.write(UPPER_ADDRESS, 0)
        self.write(DATA, message.data, size=2)

    def enable(self, granted: int = 1) -> None:
        self.write(CONTROL, ENABLE | granted.bit_length() - 1 << GRANTED_SHIFT, size=2)

    def disable(self) -> None:
        self.write(CONTROL, 0, size=2)

    def bring_up(self, message: MsiRoute, granted: int = 1) -> None:
        self.set_message(message)
        self.enable(granted)

    def faulty(self) -> set[int]:
        return {vector for vector, _ in self.device.faults()}

    def armed(self) -> set[int]:
        return {vector.index for vector in self.device.vectors if vector.route is not None and vector.route.armed}


# 6.8.1: the registers


@pytest.mark.parametrize(("vectors", "capable"), [(1, 0), (2, 1), (4, 2), (8, 3), (16, 4), (32, 5)])
def test_6_8_1_the_capability_after_reset(guest: Guest, vectors: int, capable: int) -> None:
    control = READ_ONLY | capable << CAPABLE_SHIFT
    reset = bytes([0x05, 0]) + control.to_bytes(2, "little") + bytes(20)
    with Driver(guest, vectors) as driver:
        assert driver.device.capability() == reset
        driver.bring_up(msi(0x40), vectors)
        driver.write(MASK, 1)
        assert driver.device.capability() != reset
        driver.device.reset()
        assert driver.device.capability() == reset
        assert driver.armed() == set()


@pytest.mark.parametrize("vectors", [0, 3, 5, 31, 33, 64, -1, 2**80])
def test_6_8_1_3_numbers_of_vectors_are_powers_of_two_up_to_32(guest: Guest, vectors: int) -> None:
    with pytest.raises(ValueError, match=rf"vectors {vectors} .*1, 2, 4, 8, 16 or 32"):
        MsiCapability(guest.partition, vectors)


def test_6_8_1_only_the_writable_bits_change(guest: Guest) -> None:
    writable = {0: 0x0071_0000, 4: 0xFFFFFFFC, 8: 0xFFFFFFFF, 12: 0xFFFF, 16: 0xF, 20: 0}
    with Driver(guest, 4) as driver:
        before = {at: driver.read(at) for at in writable}
        for at, bits in writable.items():
            driver.write(at, 0xFFFFFFFF)
            assert driver.read(at) == before[at] | bits, hex(at)
            driver.write(at, 0)
            assert driver.read(at) == before[at] & ~bits, hex(at)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_6_8_1_registers_can_be_read_and_written_in_parts(guest: Guest, size: int) -> None:
    with Driver(guest, 1) as driver:
        written = bytes(range(0x10, 0x18))
        for at in range(0, 8, size):
            driver.device.write_config(ADDRESS + at, written[at : at + size])
        assert driver.device.capability()[4:12] == written
        capability = driver.device.capability()
        for at in range(0, 24, size):
            assert driver.read(at, size) == int.from_bytes(capability[at : at + size], "little")


@pytest.mark.parametrize(
    ("offset", "size"),
    [(1, 2), (3, 2), (1, 4), (2, 4), (0, 0), (0, 3), (0, 8), (24, 1), (24, 4), (2**80, 4), (-4, 4)],
)
def test_6_8_1_other_accesses_read_as_all_ones_and_write_nothing(guest: Guest, offset: int, size: int) -> None:
    with Driver(guest, 2) as driver:
        before = driver.device.capability()
        driver.device.write_config(offset, b"\xff" * size)
        assert driver.device.capability() == before
        assert driver.device.read_config(offset, size) == 2 ** (8 * size) - 1


# 6.8.1.3, 6.8.1.6: which vectors send what


def test_6_8_1_3_nothing_is_sent_before_msi_is_enabled(guest: Guest) -> None:
    with Driver(guest, 1) as driver:
        driver.set_message(msi(0x41))
        driver[0].signal()
        guest.receives_nothing()
        assert driver.armed() == set()
        driver.enable()
        guest.receives(msi(0x41))
        driver.disable()
        driver[0].signal()
        guest.receives_nothing()
        assert driver[0].consume_pending()


@pytest.mark.parametrize("granted", [1, 2, 4, 8])
def test_6_8_1_6_the_lowest_bits_of_the_data_are_the_vectors_number(guest: Guest, granted: int) -> None:
    with Driver(guest, 8) as driver:
        with counting(guest.partition) as made:
            driver.bring_up(msi(0x47), granted)
        assert made.stats.pushes == 1
        assert driver.armed() == set(range(granted))
        for vector in range(granted):
            driver[vector].signal()
            guest.receives(msi((0x47 & -granted) + vector))


def test_6_8_1_3_vectors_beyond_the_granted_ones_send_nothing_and_stay_pending(guest: Guest) -> None:
    with Driver(guest, 4) as driver:
        driver.bring_up(msi(0x40), 2)
        driver[3].signal()
        guest.receives_nothing()
        assert driver.read(PENDING) == 0b1000
        driver.disable()
        driver.enable(4)
        guest.receives(msi(0x43))
        assert driver.read(PENDING) == 0


@pytest.mark.parametrize("code", [3, 5, 6, 7])
def test_6_8_1_3_a_guest_that_grants_more_than_the_device_can_use_grants_all(guest: Guest, code: int) -> None:
    with Driver(guest, 4) as driver:
        driver.set_message(msi(0x40))
        driver.write(CONTROL, ENABLE | code << GRANTED_SHIFT, size=2)
        assert driver.armed() == {0, 1, 2, 3}
        assert driver.read(CONTROL, 2) == READ_ONLY | 2 << CAPABLE_SHIFT | code << GRANTED_SHIFT | ENABLE
        driver[3].signal()
        guest.receives(msi(0x43))


# 6.8.1.7, 6.8.1.8, 6.8.3.5: mask and pending bits


def test_6_8_3_5_a_masked_vector_is_pending_and_sends_its_message_once_when_it_is_unmasked(guest: Guest) -> None:
    with Driver(guest, 4) as driver:
        driver.bring_up(msi(0x40), 4)
        driver.write(MASK, 0b0101)
        assert [vector.masked for vector in driver.device.vectors] == [True, False, True, False]
        for vector in driver.device.vectors:
            vector.signal()
            os.eventfd_write(vector.event.fileno(), 1)
        assert driver.read(PENDING) == 0b0101
        arrived = {interrupt.vector for interrupt in guest.arrived()}
        assert arrived == {0x41, 0x43}
        with counting(guest.partition) as made:
            driver.write(MASK, 0b0100)
        assert made.stats.pushes == 0
        guest.receives(msi(0x40))
        assert driver.read(PENDING) == 0b0100
        assert driver[2].consume_pending()
        driver.write(MASK, 0)
        guest.receives_nothing()


def test_6_8_1_8_pending_bits_see_signals_of_other_processes(guest: Guest) -> None:
    with Driver(guest, 2) as driver:
        fd = driver[1].event.fileno()
        in_child(lambda: os.eventfd_write(fd, 1))
        assert driver.read(PENDING) == 0b10
        driver.bring_up(msi(0x40), 2)
        guest.receives(msi(0x41))


# New messages


def test_a_new_message_is_sent_once_the_data_is_written(guest: Guest) -> None:
    with Driver(guest, 2) as driver:
        driver.bring_up(msi(0x40), 2)
        driver.write(ADDRESS, 0xFEE05000)
        driver[1].signal()
        guest.receives(msi(0x41))
        driver.write(ADDRESS, 0xFEE00000)
        driver.write(DATA, 0x50, size=2)
        driver[1].signal()
        guest.receives(msi(0x51))
        assert driver.faulty() == set()


def test_a_new_message_is_sent_once_its_vector_is_unmasked(guest: Guest) -> None:
    with Driver(guest, 1) as driver:
        driver.bring_up(msi(0x40))
        driver.write(MASK, 1)
        driver.set_message(msi(0x50))
        driver[0].signal()
        driver.write(MASK, 0)
        guest.receives(msi(0x50))


def test_writes_that_change_no_message_and_no_mask_make_no_call(guest: Guest) -> None:
    with Driver(guest, 2) as driver:
        driver.bring_up(msi(0x40), 2)
        driver.write(MASK, 0b10)
        before = guest.partition.stats()
        driver.write(MASK, 0b10)
        driver.write(ADDRESS, 0xFEE01000)
        driver.write(UPPER_ADDRESS, 7)
        driver.write(PENDING, 0xFFFFFFFF)
        driver.write(0, 0x0011_FFFF)
        assert guest.partition.stats() == before


# Faults, events, closing


def test_a_bad_message_is_a_fault_of_each_vector_and_a_good_one_ends_it(guest: Guest) -> None:
    with Driver(guest, 2) as driver:
        driver.bring_up(msi(0x40, 9), 2)
        assert [type(error) for _, error in driver.device.faults()] == [MissingVpError] * 2
        driver.write(ADDRESS, 0)
        driver.write(DATA, 0x40, size=2)
        assert [type(error) for _, error in driver.device.faults()] == [ValueError] * 2
        driver[0].signal()
        guest.receives_nothing()
        driver.set_message(msi(0x40))
        assert driver.faulty() == set()
        guest.receives(msi(0x40))


def test_a_live_vector_whose_new_message_is_bad_is_disarmed(guest: Guest) -> None:
    with Driver(guest, 1) as driver:
        driver.bring_up(msi(0x40))
        driver.write(ADDRESS, 0)
        driver.write(DATA, 0x40, size=2)
        driver[0].signal()
        guest.receives_nothing()
        assert (driver.armed(), driver.faulty()) == (set(), {0})
        driver.set_message(msi(0x42))
        guest.receives(msi(0x42))
        assert driver.faulty() == set()


def test_a_vector_uses_the_callers_eventfd(guest: Guest, theirs: int) -> None:
    with Driver(guest, 2, events={1: theirs}) as driver:
        driver.bring_up(msi(0x40), 2)
        os.eventfd_write(theirs, 1)
        guest.receives(msi(0x41))
        assert isinstance(driver[1], MsiVector)
        assert driver[1].device is driver.device


def test_a_closed_capability_raises_closed_error_and_a_forked_one_forked_error(guest: Guest) -> None:
    driver = Driver(guest, 2)
    driver.bring_up(msi(0x40), 2)
    vector = driver[0]
    calls: list[Callable[[], object]] = [
        lambda: driver.read(0),
        lambda: driver.device.read_config(0, 3),
        lambda: driver.write(0, 0),
        driver.device.capability,
        driver.device.reset,
        driver.device.faults,
        lambda: vector.masked,
        lambda: vector.pending,
        lambda: vector.event,
    ]
    assert set(in_child(lambda: [refusal(call) for call in calls])) == {"ForkedError"}
    driver.device.close()
    assert {refusal(call) for call in calls} == {"ClosedError"}
    with pytest.raises(ClosedError):
        vector.signal()
    assert repr(driver.device) == "<MsiCapability of 2 vectors, 2 with a route, closed>"
    still_works(guest)


# Any accesses


def registers(random_: random.Random) -> Iterator[tuple[int, bytes]]:
    """Accesses of which most make sense."""
    sensible = [
        (ADDRESS, [0xFEE00000, 0xFEE01000, 0xFEE00000, 0xFEE00000, 0x1000], 4),
        (UPPER_ADDRESS, [0, 0, 0, 1], 4),
        (DATA, [0x40, 0x41, 0x50, 0x5F, 0x0F, 0x340], 2),
        (CONTROL, [0, 1, 1, 0x21, 0x31, 0x71, 0xFFFF], 2),
        (MASK, [0, 0, 1, 0b110, 0xFFFFFFFF], 4),
    ]
    while True:
        if random_.random() < 0.8:
            at, values, size = random_.choice(sensible)
            yield at, random_.choice(values).to_bytes(size, "little")
        else:
            yield random_.randrange(-2, 30), random_.randbytes(random_.randrange(6))


@pytest.mark.parametrize("seed", range(4))
def test_after_any_accesses_the_armed_vectors_are_those_that_the_registers_name(guest: Guest, seed: int) -> None:
    random_ = random.Random(seed)
    signalled = random_.choices(range(8), k=4000)
    with Driver(guest, 8) as driver:
        pending = 0
        for (offset, data), vector in zip(registers(random_), signalled[:400], strict=False):
            driver.device.write_config(offset, data)
            control, mask = driver.read(CONTROL, 2), driver.read(MASK)
            granted = min(control >> GRANTED_SHIFT & 7, 3)
            live = {at for at in range(8) if control & ENABLE and at < 1 << granted and not mask >> at & 1}
            armed = driver.armed()
            assert armed | driver.faulty() >= live >= armed
            before = {interrupt.vector for interrupt in guest.arrived()}
            driver[vector].signal()
            pending = driver.read(PENDING)
            assert bool(pending >> vector & 1) == (vector not in armed)
            assert pending & sum(1 << at for at in armed) == 0
            after = {interrupt.vector for interrupt in guest.arrived()}
            assert len(after) == (vector in armed and reachable(guest, driver, vector))
            assert all(0x10 <= each <= 0xFF for each in before | after)


def reachable(guest: Guest, driver: Driver, vector: int) -> bool:
    """Whether the guest shows the message of an armed vector."""
    route = driver[vector].route
    return route is not None and route.msi is not None and guest.reaches(route.msi)
