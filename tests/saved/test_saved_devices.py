"""Devices, saved and restored: registers, routes, pending bits and faults, as the guest's driver sees them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import pytest
from backends import Guest
from driver import DATA, ENABLE, FUNCTION_MASK, Driver
from modes import options
from mshv_irqfd import (
    ClosedError,
    ForkedError,
    GsiState,
    MissingVpError,
    MsiCapability,
    MsixTable,
    RouteBrokenError,
)
from states import State, carried, gsis, kept
from support import counting, in_child, msi, rare, refusal

if TYPE_CHECKING:
    from backends import Backend
    from faults import Faults
    from modes import Mode
    from mshv_irqfd.testing import SimulatedCall

Open = Callable[..., Guest]

pytestmark = pytest.mark.thread_unsafe(reason="a test has one device, which its fixture makes")


def message(vector: int) -> State:
    return {"address": 0xFEE00000, "data": vector}


def moved(driver: Driver, guest: Guest, **options: object) -> Driver:
    """The device on the other side, after a migration: a driver goes on with it."""
    state = carried(driver.table.save())
    driver.table.close()
    new = Driver.of(guest, kept(guest, MsixTable.restore(guest.partition, state, **options)))  # type: ignore[arg-type]
    assert new.table.save() == state
    return new


@pytest.fixture
def driver(open_guest: Open) -> Driver:
    """A device with vectors armed, masked, pending, faulty and unused."""
    guest = open_guest()
    driver = Driver(guest, 70)
    kept(guest, driver.table)
    driver.bring_up(msi(0x41), msi(0x42))
    driver.mask(1)
    driver[1].signal()
    driver[65].signal()
    assert driver[5].event
    driver.unmask(6)
    guest.receives_nothing()
    return driver


def test_a_table_is_saved_as_its_page_says(driver: Driver) -> None:
    fault = str(driver.table.faults()[0][1])
    assert driver.table.save() == {
        "kind": "mshv_irqfd.MsixTable",
        "version": 1,
        "size": 70,
        "enabled": True,
        "function_mask": False,
        "table": [
            {"vector": 0, "address": 0xFEE00000, "data": 0x41, "masked": False},
            {"vector": 1, "address": 0xFEE00000, "data": 0x42, "masked": True},
            {"vector": 6, "address": 0, "data": 0, "masked": False},
        ],
        "vectors": [
            {"vector": 0, "gsi": 24, "msi": message(0x41), "pending": False, "fault": None},
            {"vector": 1, "gsi": 25, "msi": None, "pending": True, "fault": None},
            {"vector": 5, "gsi": 26, "msi": None, "pending": False, "fault": None},
            {"vector": 6, "gsi": None, "msi": None, "pending": False, "fault": fault},
            {"vector": 65, "gsi": None, "msi": None, "pending": True, "fault": None},
        ],
    }


def test_a_driver_finds_its_table_as_it_was(driver: Driver, open_guest: Open) -> None:
    def registers(driver: Driver) -> list[object]:
        table = driver.table
        entries = [table.read_table(at, 8) for at in range(0, 70 * 16, 8)]
        return [entries, table.message_control, driver.pending_bits(), driver.faulty(), driver.armed()]

    before, told = registers(driver), str(driver.table.faults())
    assert (driver.pending_bits(), driver.faulty(), driver.armed()) == ({1, 65}, {6}, {0})
    new = moved(driver, open_guest())
    assert registers(new) == before
    assert str(new.table.faults()) == told
    assert [vector.route.gsi if vector.route else None for vector in new.table.vectors][:7] == [
        24,
        25,
        *[None] * 3,
        26,
        None,
    ]
    new.guest.receives_nothing()
    new[0].signal()
    new.guest.receives(msi(0x41))
    new.unmask(1)
    new.guest.receives(msi(0x42))
    new.program(65, msi(0x43))
    new.guest.receives(msi(0x43))
    new.retarget(6, msi(0x44))
    new[6].signal()
    new.guest.receives(msi(0x44))
    assert new.table.faults() == []


def test_saving_takes_nothing_from_a_device(driver: Driver) -> None:
    with counting(driver.guest.partition) as made:
        assert driver.table.save() == driver.table.save()
    assert (made.stats.pushes, made.stats.arms, made.stats.disarms) == (0, 2, 2)
    driver.guest.receives_nothing()
    driver[0].signal()
    driver.unmask(1)
    driver.guest.receives(msi(0x41), msi(0x42))


@pytest.mark.parametrize("control", [0, ENABLE, FUNCTION_MASK, ENABLE | FUNCTION_MASK])
@pytest.mark.parametrize("masked", [False, True])
def test_a_signal_waits_or_is_delivered_once_as_the_registers_say(
    open_guest: Open, control: int, *, masked: bool
) -> None:
    old = Driver(open_guest(), 2)
    old.set_message(0, msi(0x41))
    if not masked:
        old.unmask(0)
    live = control == ENABLE and not masked
    if not live:
        old[0].signal()
    old.control(control)
    new = moved(old, open_guest())
    if live:
        new[0].signal()
    else:
        new.guest.receives_nothing()
        new.unmask(0)
        new.enable()
    new.guest.receives(msi(0x41))
    assert new.pending_bits() == set()


def test_a_pending_signal_of_an_armed_vector_is_delivered_exactly_once(driver: Driver, open_guest: Open) -> None:
    state = driver.table.save()
    driver.table.close()
    state["vectors"][0]["pending"] = True
    guest = open_guest()
    new = Driver.of(guest, kept(guest, MsixTable.restore(guest.partition, state)))
    assert new.pending_bits() == {1, 65}
    guest.receives(msi(0x41))


def test_a_message_that_waits_for_the_next_unmasking_still_does(driver: Driver, open_guest: Open) -> None:
    driver.write(0, DATA, 0x51)
    new = moved(driver, open_guest())
    assert new.read(0, DATA) == 0x51
    new[0].signal()
    new.guest.receives(msi(0x41))
    new.mask(0)
    new.unmask(0)
    new[0].signal()
    new.guest.receives(msi(0x51))


@pytest.mark.parametrize("preload", [False, True])
def test_restoring_many_vectors_is_one_push(open_guest: Open, *, preload: bool) -> None:
    old, guest = open_guest(), open_guest(preload=preload)
    driver = Driver(old, 96)
    driver.bring_up(*(rare(0x20 + vector) for vector in range(96)))
    state = carried(driver.table.save())
    driver.table.close()
    with counting(guest.partition) as made:
        new = Driver.of(guest, kept(guest, MsixTable.restore(guest.partition, state)))
    assert (made.stats.pushes, made.stats.arms, made.stats.disarms) == (1, 96, 0)
    assert new.armed() == set(range(96))
    new[95].signal()
    guest.receives(rare(0x20 + 95))


def test_the_callers_eventfds_come_along(driver: Driver, open_guest: Open, theirs: int) -> None:
    os.eventfd_write(theirs, 1)
    new = moved(driver, open_guest(), events={0: theirs})
    new.guest.receives(msi(0x41))
    os.eventfd_write(theirs, 1)
    new.guest.receives(msi(0x41))


def test_an_eventfd_for_a_vector_without_a_gsi_is_refused(driver: Driver, open_guest: Open, theirs: int) -> None:
    state, guest = driver.table.save(), open_guest()
    for vector in (6, 7, 70):
        with pytest.raises(ValueError, match=f"events has an eventfd for vector {vector}, which has no GSI"):
            MsixTable.restore(guest.partition, state, events={vector: theirs})
    assert gsis(guest.partition) == {}


def test_a_vector_that_waits_to_be_re_armed_is_saved_as_armed(guest: Guest, faults: Faults) -> None:
    driver = Driver(guest, 2)
    driver.bring_up(msi(0x41), msi(0x42))
    faults.fail(guest.partition, "assign_irqfd", errno.ENOMEM)
    assert refusal(partial(faults.run, driver.table.save)) == "IrqFdError"
    assert driver.faulty() == {0}
    driver[0].signal()
    state = driver.table.save()
    assert [state["vectors"][0][key] for key in ("msi", "pending", "fault")] == [message(0x41), True, None]
    driver.table.close()
    new = Driver.of(guest, kept(guest, MsixTable.restore(guest.partition, carried(state))))
    assert (new.faulty(), new.armed()) == (set(), {0, 1})
    guest.receives(msi(0x41))


def test_a_vector_whose_route_was_masked_behind_its_back_is_restored_as_faulty(
    driver: Driver, open_guest: Open
) -> None:
    route = driver[0].route
    assert route
    route.mask()
    new = moved(driver, open_guest())
    assert new.faulty() == {0, 6}
    new.mask(0)
    new.unmask(0)
    assert (new.faulty(), new.armed()) == ({6}, {0})


def test_a_vector_that_the_kernel_refused_keeps_its_fault_until_a_retry(open_guest: Open, faults: Faults) -> None:
    driver, guest = Driver(open_guest(), 2), open_guest()
    faults.fail(driver.guest.partition, "assign_irqfd", errno.ENOMEM)
    faults.run(partial(driver.bring_up, rare(0x41)))
    assert driver.faulty() == {0}
    driver.write(0, DATA, 0x51)
    driver[0].signal()
    [(_, refused)] = driver.table.faults()
    new = moved(driver, guest)
    [(vector, error)] = new.table.faults()
    assert (vector, type(error), str(error)) == (0, ValueError, str(refused).partition(": ")[2])
    assert new.pending_bits() == {0}
    with counting(guest.partition) as made:
        assert new.table.retry_faults() == []
    assert (made.stats.pushes, new.armed()) == (1, {0})
    guest.receives(rare(0x41))


def test_a_broken_vector_can_not_be_saved(guest: Guest, faults: Faults) -> None:
    driver = Driver(guest, 2)
    driver.control(ENABLE | FUNCTION_MASK)
    driver.program(0, msi(0x41))
    driver.program(1, msi(0x42))
    faults.fail(guest.partition, "assign_irqfd", errno.ENOMEM, after=1)
    faults.fail(guest.partition, "deassign_irqfd", errno.ENOMEM)
    faults.run(driver.enable)
    broken = [route for route in guest.partition.routes if route.state is GsiState.BROKEN]
    assert len(broken) == 1
    with pytest.raises(RouteBrokenError, match=str(broken[0].gsi)):
        driver.table.save()
    driver.table.close()


@pytest.mark.parametrize("call", ["set_msi_routing", "assign_irqfd", "deassign_irqfd"])
def test_if_any_call_fails_no_device_is_made_and_a_second_try_succeeds(
    open_guest: Open, faults: Faults, call: SimulatedCall
) -> None:
    old, guest = open_guest(), open_guest()
    partition = guest.partition
    with old.partition.new_irqfd_route():
        driver = Driver(old, 4)
        driver.bring_up(*(rare(0x41 + vector) for vector in range(4)))
        state = driver.table.save()
        driver.table.close()
    with partition.new_irqfd_route() as route:
        route.set_msi(msi(0xE9))
        failed = 0
        for after in range(8):
            failures = partition.stats().failures
            faults.fail(partition, call, errno.ENOMEM, after=after)
            outcome = refusal(partial(faults.run, lambda: kept(guest, MsixTable.restore(partition, state))))
            if partition.stats().failures == failures:
                assert outcome == "none"
                break
            failed += 1
            assert outcome in ("RoutingError", "IrqFdError"), outcome
            assert gsis(partition) == {route.gsi: GsiState.ENABLED}
            guest.receives_nothing()
        assert failed == {"set_msi_routing": 1, "assign_irqfd": 4, "deassign_irqfd": int(partition.quiesce)}[call]
        faults.clear()
        for number in range(8):
            for use in (partial(route.set_msi, rare(0x71 + number)), route.mask, route.unmask):
                refusal(use)
        assert len(partition.routes) == 5


def test_a_missing_vp_is_an_error_and_changes_nothing(open_guest: Open) -> None:
    old, new = open_guest(vps=2), open_guest()
    driver = Driver(old, 2)
    driver.bring_up(msi(0x41), msi(0x42, 1))
    state = driver.table.save()
    driver.table.close()
    with pytest.raises(MissingVpError, match=r"vectors\[1\].msi: GSI 25: no VP has APIC id 1"):
        MsixTable.restore(new.partition, state)
    assert gsis(new.partition) == {}


def test_a_closed_table_or_partition_neither_saves_nor_restores(driver: Driver) -> None:
    state = driver.table.save()
    driver.table.close()
    with pytest.raises(ClosedError):
        driver.table.save()
    driver.guest.partition.close()
    with pytest.raises(ClosedError):
        MsixTable.restore(driver.guest.partition, state)


def test_a_forked_child_neither_saves_nor_restores(driver: Driver) -> None:
    state, partition = driver.table.save(), driver.guest.partition
    answers = in_child(lambda: [refusal(driver.table.save), refusal(partial(MsixTable.restore, partition, state))])
    assert answers == [ForkedError.__name__] * 2


def test_a_subclass_is_restored_as_itself(guest: Guest) -> None:
    class Table(MsixTable):
        __slots__ = ()

    with Table(guest.partition, 4) as table:
        state = table.save()
    with Table.restore(guest.partition, state) as table:
        assert type(table) is Table
        assert len(table.vectors) == 4


# MSI


def configure(device: MsiCapability, *writes: tuple[int, int, int]) -> None:
    for offset, size, value in writes:
        device.write_config(offset, value.to_bytes(size, "little"))


@pytest.fixture
def capability(open_guest: Open) -> MsiCapability:
    """A capability with a vector armed and one masked and pending."""
    guest = open_guest()
    device = kept(guest, MsiCapability(guest.partition, 4))
    configure(device, (4, 4, 0xFEE00000), (12, 2, 0x40), (16, 4, 0b0010), (2, 2, 0x11))
    device.vectors[1].signal()
    device.vectors[3].signal()
    return device


def test_a_capability_is_saved_as_its_page_says(capability: MsiCapability) -> None:
    assert capability.save() == {
        "kind": "mshv_irqfd.MsiCapability",
        "version": 1,
        "size": 4,
        "enabled": True,
        "multiple_message_enable": 1,
        "address": 0xFEE00000,
        "data": 0x40,
        "mask_bits": 0b0010,
        "vectors": [
            {"vector": 0, "gsi": 24, "msi": message(0x40), "pending": False, "fault": None},
            {"vector": 1, "gsi": None, "msi": None, "pending": True, "fault": None},
            {"vector": 3, "gsi": None, "msi": None, "pending": True, "fault": None},
        ],
    }


def test_a_driver_finds_its_capability_as_it_was(capability: MsiCapability, open_guest: Open) -> None:
    state, before = carried(capability.save()), capability.capability()
    capability.close()
    guest = open_guest()
    with counting(guest.partition) as made:
        new = kept(guest, MsiCapability.restore(guest.partition, state))
    assert (made.stats.pushes, made.stats.arms) == (1, 1)
    assert (new.save(), new.capability(), new.faults()) == (state, before, [])
    new.vectors[0].signal()
    guest.receives(msi(0x40))
    configure(new, (16, 4, 0))
    guest.receives(msi(0x41))
    configure(new, (2, 2, 0x21))  # grants all four
    guest.receives(msi(0x43))


WRITTEN_BY_NO_GUEST = [
    ("size", 3, "size: 3 is not a number of vectors of MSI: expected 1, 2, 4, 8, 16 or 32"),
    ("size", 64, "size: 64 is not a number of vectors"),
    ("size", 2, "mask_bits: 0x6 has bits set that no guest can write"),
    ("multiple_message_enable", 8, "multiple_message_enable: 8 is out of range; it is 0 to 7"),
    ("address", 0xFEE00002, "address: 0xfee00002 has bits set that no guest can write"),
    ("address", 1 << 64, "address: 18446744073709551616 does not fit in 64 bits"),
    ("data", 0x10000, "data: invalid value: integer `65536`"),
    ("mask_bits", 0x10, "mask_bits: 0x10 has bits set that no guest can write"),
]


@pytest.mark.parametrize(
    ("key", "value", "words"), WRITTEN_BY_NO_GUEST, ids=[f"{key}-{value:#x}" for key, value, _ in WRITTEN_BY_NO_GUEST]
)
def test_registers_that_no_guest_can_have_written_are_refused(
    capability: MsiCapability, key: str, value: int, words: str
) -> None:
    configure(capability, (16, 4, 0b0110))
    state = capability.save() | {key: value}
    capability.close()
    partition = capability.partition
    with pytest.raises((ValueError, OverflowError), match=words):
        MsiCapability.restore(partition, state)
    assert gsis(partition) == {}


def test_msi_vectors_that_the_guest_has_masked_stay_so(capability: MsiCapability, open_guest: Open) -> None:
    configure(capability, (16, 4, 0b1111))
    state, guest = capability.save(), open_guest()
    capability.close()
    new = kept(guest, MsiCapability.restore(guest.partition, state))
    assert [vector.masked for vector in new.vectors] == [True] * 4
    assert new.vectors[0].route
    assert not new.vectors[0].route.armed
    new.vectors[0].signal()
    guest.receives_nothing()
    configure(new, (16, 4, 0b1110))
    guest.receives(msi(0x40))


@pytest.mark.parametrize(("mode", "pushes"), [("loaded", 1), ("unloaded", 4)])
def test_restoring_several_devices_is_a_push_each_or_one_in_all_if_their_messages_are_likely(
    backend: Backend, open_guest: Open, mode: Mode, pushes: int
) -> None:
    old, new = (open_guest(**options(backend, mode)) for _ in range(2))
    states = []
    for number in range(4):
        driver = Driver(old, 4)
        kept(old, driver.table)
        driver.bring_up(*(msi(0x40 + 4 * number + vector) for vector in range(4)))
        states.append(carried(driver.table.save()))
    for state in states:
        kept(new, MsixTable.restore(new.partition, state))
    stats = new.partition.stats()
    assert (stats.pushes, stats.arms - stats.disarms) == (pushes, 16)
