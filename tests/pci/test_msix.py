"""MSI-X tables: the routes that vectors take, pushes, eventfds of the caller's, faults, threads, forks and closing."""

from __future__ import annotations

import errno
import functools
import os
import random
import threading
import time
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from driver import ADDRESS, CONTROL, DATA, ENABLE, FUNCTION_MASK, UPPER_ADDRESS, Driver
from mshv_irqfd import (
    ClosedError,
    EventFd,
    GsiExhaustedError,
    GsiState,
    IrqFdError,
    MissingVpError,
    MsixTable,
    RoutingError,
)
from mshv_irqfd.testing import failing, until
from support import close_as_someone_else, collect, counting, in_child, msi, recorded, refusal, still_works

if TYPE_CHECKING:
    from collections.abc import Callable

    from backends import Guest, SimulatedGuest
    from faults import Faults
    from mshv_irqfd import MsixVector
    from mshv_irqfd.testing import SimulatedCall

    Open = Callable[..., Guest]

BAD: dict[str, tuple[int, int, int]] = {
    "nothing": (0, 0, 0),
    "outside the window": (0xFEF00000, 0, 0x41),
    "upper address": (0xFEE00000, 1, 0x41),
    "extended destination": (0xFEE00010, 0, 0x41),
    "reserved address bits": (0xFEE00001, 0, 0x41),
    "data above 16 bits": (0xFEE00000, 0, 0x10041),
    "reserved delivery mode": (0xFEE00000, 0, 0x341),
    "exception vector": (0xFEE00000, 0, 0x0F),
}


# Routes


def test_a_table_of_2048_vectors_of_which_8_are_used_takes_8_gsis(guest: Guest) -> None:
    with Driver(guest, 2048) as driver:
        assert guest.partition.routes == []
        driver.bring_up(*(msi(0x41 + number) for number in range(8)))
        assert [route.gsi for route in guest.partition.routes] == list(range(24, 32))
        assert driver.table.vectors[7].route is guest.partition.routes[7]
        assert driver.table.vectors[8].route is None
    assert guest.partition.routes == []
    assert guest.partition.gsi_state(24) is GsiState.UNALLOCATED
    still_works(guest)


def test_a_vector_keeps_its_route_and_eventfd_through_masks_and_resets(guest: Guest) -> None:
    with Driver(guest, 1) as driver:
        driver.bring_up(msi(0x41))
        route, fd = driver[0].route, driver[0].event.fileno()
        driver.retarget(0, msi(0x42))
        driver.table.reset()
        driver.bring_up(msi(0x43))
        assert driver[0].route is route
        assert driver[0].event.fileno() == fd
        os.eventfd_write(fd, 1)
        guest.receives(msi(0x43))


def test_asking_for_an_event_takes_a_masked_route(guest: Guest) -> None:
    with Driver(guest, 3) as driver:
        driver[2].signal()
        event = driver[2].event
        route = driver[2].route
        assert route is not None
        assert (route.masked, route.armed, route.msi, route.pending) == (True, False, None, True)
        assert event.fileno() == route.fileno()
        assert [driver[vector].route for vector in (0, 1)] == [None, None]
        driver.bring_up(msi(0x41), msi(0x42), msi(0x43))
        guest.receives(msi(0x43))


def test_signals_before_a_vector_is_used_take_no_gsi(guest: Guest) -> None:
    with Driver(guest, 100) as driver:
        for vector in driver.table.vectors:
            vector.signal()
        assert driver.pending_bits() == set(range(100))
        assert guest.partition.routes == []
        driver.bring_up(msi(0x41))
        guest.receives(msi(0x41))
        assert driver.pending_bits() == set(range(1, 100))


def test_a_table_refuses_an_entry_that_is_not_there(guest: Guest) -> None:
    with Driver(guest, 3) as driver:
        assert [vector.index for vector in driver.table.vectors] == [0, 1, 2]
        assert driver.table.vectors[-1] == driver.table.vectors[2]
        assert len({driver.table.vectors[0], driver.table.vectors[0], driver.table.vectors[1]}) == 2
        assert driver.table.vectors[0].device is driver.table
        for index in (3, -4, 2**62):
            with pytest.raises(IndexError, match="0 to 2"):
                driver.table.vectors[index]


# Pushes and other calls


@pytest.mark.parametrize("preload", [True, False])
def test_bringing_up_2048_vectors_is_one_push(open_guest: Open, preload: bool) -> None:
    guest = open_guest(preload=preload)
    with Driver(guest, 2048) as driver, counting(guest.partition) as made:
        driver.bring_up(*(msi(0x20 + number % 0xC0) for number in range(2048)))
    assert (made.stats.pushes, made.stats.arms) == (1, 2048)


@pytest.mark.parametrize("closing", [0, FUNCTION_MASK, ENABLE | FUNCTION_MASK])
def test_opening_the_function_again_is_no_push_and_with_new_messages_one(guest: Guest, closing: int) -> None:
    with Driver(guest, 40) as driver:
        driver.bring_up(*(msi(0x40 + number) for number in range(40)))
        with counting(guest.partition) as made:
            driver.control(closing)
            driver.control(ENABLE)
        assert (made.stats.pushes, made.stats.arms, made.stats.disarms) == (0, 40, 40)
        driver.control(closing)
        for number in range(40):
            driver.set_message(number, msi(0x80 + number))
        with counting(guest.partition) as made:
            driver.control(ENABLE)
        assert made.stats.pushes <= 1
        assert driver.armed() == set(range(40))
        driver[7].signal()
        guest.receives(msi(0x87))


def test_writes_to_a_masked_vector_make_no_call(guest: Guest) -> None:
    with Driver(guest, 2) as driver:
        driver.bring_up(msi(0x41))
        before = guest.partition.stats()
        for value in range(50):
            driver.set_message(1, msi(0x50 + value))
            driver.mask(1)
            driver.write(1, ADDRESS, 2**64 - value - 1, size=8)
        driver.unmask(0)
        driver.control(ENABLE)
        assert guest.partition.stats() == before
        assert driver[1].route is None


def test_a_mask_and_an_unmasking_are_one_disarm_and_one_arm(guest: Guest) -> None:
    with Driver(guest, 2) as driver:
        driver.bring_up(msi(0x41), msi(0x42))
        with counting(guest.partition) as made:
            driver.mask(0)
            driver.unmask(0)
        assert (made.stats.pushes, made.stats.arms, made.stats.disarms) == (0, 1, 1)


# The caller's eventfds


@pytest.mark.parametrize("how", ["mapping", "sequence"])
def test_a_vector_uses_the_callers_eventfd(guest: Guest, how: str) -> None:
    with EventFd() as event:
        events: Any = {2: event} if how == "mapping" else [None, None, event.fileno()]
        with Driver(guest, 3, events=events) as driver:
            assert [vector.route is None for vector in driver.table.vectors] == [True, True, False]
            event.signal()
            assert driver.pending_bits() == {2}
            driver.bring_up(msi(0x41), msi(0x42), msi(0x43))
            guest.receives(msi(0x43))
            event.signal()
            guest.receives(msi(0x43))
        event.signal()
        assert event.consume() == 1


@pytest.mark.parametrize(
    ("events", "error", "names"),
    [
        ({3: 0}, ValueError, "vector 3"),
        ({-1: 0}, ValueError, "vector -1"),
        ([None, None, None, 5], ValueError, "vector 3"),
        ({"0": 0}, TypeError, "vector"),
        ({0: "x"}, TypeError, "descriptor"),
        ([None, 1.5], TypeError, "descriptor"),
        (5, TypeError, "int"),
        ({0: 987654}, IrqFdError, "987654"),
    ],
)
def test_wrong_events_are_refused_with_their_reason(
    guest: Guest, events: Any, error: type[Exception], names: str
) -> None:
    with pytest.raises(error, match=names):
        MsixTable(guest.partition, 3, events=events)
    still_works(guest)


def test_a_table_that_can_not_be_made_leaves_nothing_behind(guest: Guest) -> None:
    with EventFd() as event:
        with pytest.raises(ValueError, match="eventfd of the route of GSI 24"):
            MsixTable(guest.partition, 3, events=[event, event])
        assert guest.partition.routes == []
        assert guest.partition.gsi_state(24) is GsiState.UNALLOCATED
        with Driver(guest, 1, events=[event]):
            pass
    still_works(guest)


@pytest.mark.parametrize("wrong", [None, "x", 1.5])
def test_arguments_of_a_wrong_type_are_told(guest: Guest, wrong: Any) -> None:
    with Driver(guest, 1) as driver:
        table = driver.table
        for call in (
            lambda: table.read_table(wrong, 4),
            lambda: table.read_table(0, wrong),
            lambda: table.read_pba(wrong, 4),
            lambda: table.write_table(wrong, bytes(4)),
            lambda: table.write_table(0, wrong),
            lambda: table.write_message_control(0, wrong),
            lambda: table.capability(table_bar=wrong, table_offset=0, pba_bar=1, pba_offset=0),
            lambda: MsixTable(guest.partition, wrong),
        ):
            with pytest.raises(TypeError):
                call()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_data_may_be_any_bytes(guest: Guest, kind: Callable[[bytes], Any]) -> None:
    with Driver(guest, 1) as driver:
        driver.table.write_table(0, kind(b"\x01\x02\x03\x04"))
        driver.table.write_message_control(2, kind(b"\x00\xc0"))
        assert (driver.read(0, ADDRESS), driver.table.message_control) == (0x04030201, 0xC000)


# Faults


@pytest.mark.parametrize(("address", "upper", "data"), BAD.values(), ids=BAD)
def test_a_bad_message_leaves_its_vector_disarmed_and_the_others_armed(
    guest: Guest, address: int, upper: int, data: int
) -> None:
    with Driver(guest, 3) as driver:
        driver.control(ENABLE | FUNCTION_MASK)
        driver.program(0, msi(0x41))
        for field, value in ((ADDRESS, address), (UPPER_ADDRESS, upper), (DATA, data), (CONTROL, 0)):
            driver.write(1, field, value)
        driver.program(2, msi(0x43))
        with counting(guest.partition) as made:
            driver.control(ENABLE)
        assert made.stats.pushes == 1
        assert driver.armed() == {0, 2}
        [(vector, error)] = driver.table.faults()
        assert vector == 1
        assert isinstance(error, ValueError)
        assert driver[1].route is None
        driver[1].signal()
        assert driver.pending_bits() == {1}
        driver.retarget(1, msi(0x42))
        assert driver.table.faults() == []
        guest.receives(msi(0x42))


def test_a_message_that_turns_bad_disarms_its_vector_until_it_is_good_again(guest: Guest) -> None:
    with Driver(guest, 1) as driver:
        driver.bring_up(msi(0x41))
        driver.mask(0)
        driver.write(0, DATA, 0)
        driver.unmask(0)
        driver[0].signal()
        guest.receives_nothing()
        assert (driver.faulty(), driver.pending_bits(), driver[0].masked) == ({0}, {0}, False)
        driver.mask(0)
        assert driver.faulty() == {0}
        driver.program(0, msi(0x42))
        assert driver.faulty() == set()
        guest.receives(msi(0x42))


def test_a_destination_without_a_vp_is_a_fault_until_the_vp_is_there(guest: Guest) -> None:
    with Driver(guest, 2) as driver:
        driver.bring_up(msi(0x41, 3), msi(0x42))
        [(vector, error)] = driver.table.faults()
        assert (vector, type(error)) == (0, MissingVpError)
        assert driver.armed() == {1}
        guest.partition.create_vp(3)
        driver[0].signal()
        driver.retarget(0, msi(0x41, 3))
        assert driver.table.faults() == []
        guest.receives(msi(0x41, 3))


def test_a_retry_arms_a_vector_once_its_cause_is_gone(guest: Guest) -> None:
    with Driver(guest, 3) as driver:
        driver.bring_up(msi(0x41, 3), msi(0x42), msi(0x43, 3))
        driver[0].signal()
        before = guest.partition.stats()
        assert [vector for vector, _ in driver.table.retry_faults()] == [0, 2]
        assert guest.partition.stats() == before
        guest.partition.create_vp(3)
        # Not complete: the guest has not unmasked it with this.
        driver.write(0, DATA, 0x55)
        with counting(guest.partition) as made:
            assert driver.table.retry_faults() == []
        assert made.stats.pushes <= 1
        assert (driver.armed(), driver.faulty()) == ({0, 1, 2}, set())
        guest.receives(msi(0x41, 3))
        driver[2].signal()
        guest.receives(msi(0x43, 3))
        with counting(guest.partition) as made:
            assert driver.table.retry_faults() == []
        assert (made.stats.pushes, made.stats.arms, made.stats.disarms) == (0, 0, 0)


def test_a_retry_leaves_a_vector_with_an_invalid_message_to_the_guest(guest: Guest) -> None:
    with Driver(guest, 2) as driver:
        driver.bring_up(msi(0x41))
        driver.mask(0)
        driver.write(0, DATA, 0)
        driver.unmask(0)
        driver.write(0, DATA, 0x41)
        [(vector, error)] = driver.table.retry_faults()
        assert (vector, type(error)) == (0, ValueError)
        assert driver.armed() == set()
        driver.mask(0)
        assert driver.faulty() == {0}
        assert driver.table.retry_faults() == []


def test_vectors_beyond_the_last_gsi_are_faults_and_the_others_work(open_guest: Open) -> None:
    guest = open_guest(gsis=range(24, 27))
    with Driver(guest, 5) as driver:
        driver.bring_up(*(msi(0x41 + number) for number in range(5)))
        assert [(vector, type(error)) for vector, error in driver.table.faults()] == [
            (3, GsiExhaustedError),
            (4, GsiExhaustedError),
        ]
        assert driver.armed() == {0, 1, 2}
        driver[4].signal()
        assert driver.pending_bits() == {4}
        with pytest.raises(GsiExhaustedError):
            _ = driver[4].event
        driver.table.reset()
        assert driver.faulty() == set()


def test_an_eventfd_that_other_code_closes_is_its_vectors_fault_alone(guest: Guest) -> None:
    with Driver(guest, 4) as driver:
        # No new descriptor takes the number then.
        events = [vector.event for vector in driver.table.vectors]
        close_as_someone_else(events[2].fileno())
        with counting(guest.partition) as made:
            driver.bring_up(*(msi(0x41 + number) for number in range(4)))
        assert made.stats.pushes == 1
        [(vector, error)] = driver.table.faults()
        assert vector == 2
        assert isinstance(error, IrqFdError)
        assert error.errno == errno.EBADF
        assert driver.armed() == {0, 1, 3}
        assert driver.pending_bits() == set()


def bring_up(driver: Driver) -> None:
    driver.enable()


def move_all(driver: Driver) -> None:
    driver.control(ENABLE | FUNCTION_MASK)
    for number in range(6):
        driver.set_message(number, msi(0x81 + number))
    driver.enable()


def move_one(driver: Driver) -> None:
    driver.retarget(3, msi(0x84))


def mask_all(driver: Driver) -> None:
    driver.control(0)


def mask_one(driver: Driver) -> None:
    driver.mask(3)


def reset(driver: Driver) -> None:
    driver.table.reset()


CALLS: tuple[SimulatedCall, ...] = ("set_msi_routing", "assign_irqfd", "deassign_irqfd")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("act", [bring_up, move_all, move_one, mask_all, mask_one, reset])
def test_whatever_call_fails_no_access_raises_and_only_faulty_vectors_are_not_as_the_guest_asked(
    open_guest: Open, faults: Faults, act: Callable[[Driver], None], call: SimulatedCall
) -> None:
    for after, times in [(0, 1), (1, 1), (2, 1), (5, 1), (0, 2), (3, 2), (0, 1000)]:
        driver = Driver(open_guest(), 6)
        partition = driver.guest.partition
        driver.control(ENABLE | FUNCTION_MASK)
        for number in range(6):
            driver.program(number, msi(0x41 + number))
        if act is not bring_up:
            driver.enable()
        failures = partition.stats().failures
        faults.fail(partition, call, errno.ENOMEM, after=after, times=times)
        faults.run(functools.partial(act, driver))
        struck, faulty = partition.stats().failures - failures, driver.faulty()
        is_open = driver.table.message_control & (ENABLE | FUNCTION_MASK) == ENABLE
        for vector in driver.table.vectors:
            armed = vector.route is not None and vector.route.armed
            assert armed == (is_open and not vector.masked) or vector.index in faulty, (vector, faulty)
        assert len(faulty) <= struck or struck > 3
        if times == 1000:
            with suppress(IrqFdError):
                driver.table.close()
            with suppress(IrqFdError):
                partition.close()
            continue
        until(functools.partial(recovered, driver, faults), "no more calls fail")
        if all(route.state is not GsiState.BROKEN for route in partition.routes):
            driver[2].signal()
            driver.guest.receives(msi(0xA3))
        driver.table.close()


def recovered(driver: Driver, faults: Faults) -> bool:
    """Has the guest set everything up again. Returns whether no call failed in that."""
    failures = driver.guest.partition.stats().failures
    faults.run(functools.partial(recover, driver))
    broken = {vector.index for vector in driver.table.vectors if vector.route and vector.route.state is GsiState.BROKEN}
    if driver.guest.partition.stats().failures > failures:
        return False
    assert driver.faulty() == broken
    assert driver.armed() >= set(range(6)) - broken
    return True


def recover(driver: Driver) -> None:
    driver.control(ENABLE | FUNCTION_MASK)
    for number in range(6):
        driver.mask(number)
        driver.program(number, msi(0xA1 + number))
    driver.enable()


def test_a_refused_push_is_told_of_every_vector_that_needed_it(guest: Guest, faults: Faults) -> None:
    with Driver(guest, 8) as driver:
        faults.fail(guest.partition, "set_msi_routing", errno.ENOMEM, times=1000)
        faults.run(lambda: driver.bring_up(*(msi(0x41 + number) for number in range(8))))
        assert [type(error) for _, error in driver.table.faults()] == [RoutingError] * 8
        assert driver.armed() == set()
        assert guest.partition.stats().failures <= 4


# Nothing is lost, nothing is mixed


def test_a_vector_that_moves_under_signals_sends_only_whole_messages_and_loses_none(open_guest: Open) -> None:
    guest = open_guest(vps=2)
    messages = [msi(0x41, 0), msi(0x52, 1)]
    with Driver(guest, 2) as driver:
        driver.bring_up(messages[0])
        stop, sent = threading.Event(), [0]

        def signal() -> None:
            vector = driver[0]
            while not stop.is_set():
                vector.signal()
                sent[0] += 1
                time.sleep(0.0001)  # the lab's stand-in hypervisor records no more at a time than it has room for

        thread = threading.Thread(target=signal)
        thread.start()
        arrived = []
        try:
            for turn in range(200):
                driver.retarget(0, messages[(turn + 1) % 2])
                arrived += guest.take_interrupts()
        finally:
            stop.set()
            thread.join()
        arrived += guest.arrived()
        assert sent[0] > 0
        vectors = {(interrupt.vector, interrupt.destination) for interrupt in arrived}
        assert vectors <= {(0x41, 0), (0x52, 1), (0x41, None), (0x52, None)}
        driver[0].signal()
        guest.receives(messages[0])


def test_signals_that_meet_the_first_unmasking_are_not_lost(open_guest: Open) -> None:
    guest = open_guest()
    for _ in range(30):
        with Driver(guest, 1) as driver:
            thread = threading.Thread(target=driver[0].signal)
            thread.start()
            driver.bring_up(msi(0x41))
            thread.join()
            guest.gets(msi(0x41), once=False)
            assert driver.pending_bits() == set()
            guest.arrived()


# Threads


def test_many_threads_may_use_a_table(guest: Guest) -> None:
    errors: list[BaseException] = []
    with Driver(guest, 16) as driver:
        driver.enable()

        def step(chance: random.Random) -> None:
            vector = chance.randrange(16)
            steps: list[Callable[[], object]] = [
                lambda: driver.program(vector, msi(0x41 + vector)),
                lambda: driver.mask(vector),
                driver[vector].signal,
                lambda: driver.control(chance.choice((0, ENABLE, ENABLE, ENABLE | FUNCTION_MASK))),
                driver.pending_bits,
                driver.table.faults,
                lambda: driver[vector].event,
                lambda: guest.partition.routes,
            ]
            chance.choice(steps)()

        def work(seed: int) -> None:
            chance = random.Random(seed)
            try:
                for _ in range(150):
                    step(chance)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        driver.enable()
        for vector in range(16):
            driver.retarget(vector, msi(0x41 + vector))
        assert driver.faulty() == set()
        assert driver.armed() == set(range(16))
        assert driver.pending_bits() == set()
        guest.arrived()
        driver[3].signal()
        guest.receives(msi(0x44))


# Forks


def test_in_a_forked_child_only_signals_work(guest: Guest) -> None:
    with Driver(guest, 2) as driver:
        driver.bring_up(msi(0x41))
        fd = driver[0].event.fileno()

        def child() -> list[str]:
            table, vector = driver.table, driver[0]
            vector.signal()
            calls: list[Callable[[], object]] = [
                lambda: table.read_table(0, 4),
                lambda: driver.mask(0),
                lambda: table.read_pba(0, 8),
                lambda: table.message_control,
                driver.enable,
                table.reset,
                table.faults,
                table.close,
                lambda: vector.masked,
                lambda: vector.pending,
                lambda: driver[1].event,
                driver[1].signal,
                lambda: MsixTable(guest.partition, 1),
            ]
            return [refusal(call) for call in calls] + [repr(table)]

        *refusals, shown = in_child(child)
        assert set(refusals) == {"ForkedError"}
        assert "forked" in shown
        guest.receives(msi(0x41))
        assert (driver.armed(), driver[0].event.fileno()) == ({0}, fd)


def test_a_child_that_drops_or_leaves_its_copy_disturbs_nothing(guest: Guest) -> None:
    with Driver(guest, 1) as driver:
        driver.bring_up(msi(0x41))

        def child() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with driver.table:
                    pass
                del driver.table
                collect()

        in_child(child)
        driver[0].signal()
        guest.receives(msi(0x41))


# Closing


def calls(driver: Driver) -> list[Callable[[], object]]:
    table, vector = driver.table, driver[0]
    return [
        lambda: table.read_table(0, 4),
        lambda: table.write_table(0, bytes(4)),
        lambda: table.write_table(0, bytes(3)),
        lambda: table.read_pba(0, 8),
        lambda: table.message_control,
        lambda: table.write_message_control(2, bytes(2)),
        lambda: table.capability(table_bar=0, table_offset=0, pba_bar=1, pba_offset=0),
        table.reset,
        table.faults,
        vector.signal,
        driver[1].signal,
        lambda: vector.masked,
        lambda: vector.pending,
        vector.consume_pending,
        lambda: vector.event,
    ]


def close_the_table(driver: Driver) -> None:
    driver.table.close()


def close_the_partition(driver: Driver) -> None:
    driver.guest.partition.close()


@pytest.mark.parametrize("close", [close_the_table, close_the_partition])
def test_a_closed_table_or_partition_raises_closed_error(open_guest: Open, close: Callable[[Driver], None]) -> None:
    driver = Driver(open_guest(), 2)
    driver.bring_up(msi(0x41))
    made = calls(driver)
    close(driver)
    assert {refusal(call) for call in made} == {"ClosedError"}
    driver.table.close()
    driver.table.close()
    assert driver.table.closed
    assert "closed" in repr(driver.table)


def test_closing_disarms_frees_the_gsis_and_pushes_nothing(guest: Guest) -> None:
    driver = Driver(guest, 50)
    driver.bring_up(*(msi(0x41 + number) for number in range(50)))
    with counting(guest.partition) as made:
        driver.table.close()
    assert (made.stats.pushes, made.stats.disarms) == (0, 50)
    assert {guest.partition.gsi_state(gsi) for gsi in range(24, 74)} == {GsiState.UNALLOCATED}
    still_works(guest)


def test_a_table_that_is_left_open_warns_and_its_routes_do_not(guest: Guest) -> None:
    driver = Driver(guest, 1)
    driver.bring_up(msi(0x41))
    vector: MsixVector = driver[0]
    assert vector.route is not None
    with recorded() as told:
        driver.table = None  # type: ignore[assignment]
        collect()
        assert told == []
        vector.signal()
        guest.receives(msi(0x41))
        del vector
        collect()
    [(category, text)] = told
    assert category is ResourceWarning
    assert "unclosed <MsixTable of 1 vectors" in text
    assert guest.partition.gsi_state(24) is GsiState.UNALLOCATED


def test_a_vectors_route_that_other_code_closes_is_that_vectors_fault(guest: Guest) -> None:
    with Driver(guest, 2) as driver:
        driver.bring_up(msi(0x41), msi(0x42))
        assert driver[0].route is not None
        driver[0].route.close()
        driver.retarget(0, msi(0x43))
        driver.retarget(1, msi(0x44))
        [(vector, error)] = driver.table.faults()
        assert (vector, type(error)) == (0, ClosedError)
        with pytest.raises(ClosedError):
            driver[0].signal()
        assert driver.pending_bits() == set()
        driver[1].signal()
        guest.receives(msi(0x44))


def test_irqfds_that_can_not_be_disarmed_are_told_when_the_table_is_closed(
    simulated: SimulatedGuest,
) -> None:
    driver = Driver(simulated, 3)
    driver.bring_up(msi(0x41), msi(0x42), msi(0x43))
    with (
        failing(simulated.partition, "deassign_irqfd", errno.EIO, times=2),
        pytest.raises(IrqFdError, match=r"GSI 24.*GSI 25"),
    ):
        driver.table.close()
    assert driver.table.closed
    assert [simulated.partition.gsi_state(gsi) for gsi in (24, 25, 26)] == [
        GsiState.BROKEN,
        GsiState.BROKEN,
        GsiState.UNALLOCATED,
    ]


def test_two_tables_of_a_partition_do_not_disturb_each_other(guest: Guest) -> None:
    with Driver(guest, 2) as first, Driver(guest, 2) as second:
        first.bring_up(msi(0x41), msi(0x42))
        second.bring_up(msi(0x51), msi(0x52))
        first.control(0)
        first[0].signal()
        second[1].signal()
        guest.receives(msi(0x52))
        assert (first.pending_bits(), second.pending_bits()) == ({0}, set())
        first.enable()
        guest.receives(msi(0x41))
