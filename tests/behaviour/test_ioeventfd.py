"""Doorbells: the guest's writes to an address signal an eventfd. On KVM guest code makes the writes."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import select
import struct
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from backends import Backend, Guest, KvmGuest, SimulatedGuest
from faults import KVM_IOEVENTFD, Faults
from mshv_irqfd import ClosedError, EventFd, ForkedError, IoEventFd, IoEventFdError, IrqFdError, Partition
from support import close_as_someone_else, collect, in_child, msi, open_files, recorded, refusal, still_works

if TYPE_CHECKING:
    from raw_kvm import KvmVm

Open = Callable[..., Guest]

ADDRESS = 0xD0000000
SIZES = (1, 2, 4, 8)


def value(number: int, size: int = 4) -> bytes:
    return number.to_bytes(size, "little")


def rings(guest: Guest, doorbell: IoEventFd, data: bytes, address: int = ADDRESS) -> bool:
    """Whether a guest's write rings a doorbell: once, and unseen by the VMM."""
    taken, count = guest.writes(address, data), doorbell.consume()
    assert (taken, count) in ((True, 1), (False, 0))
    return taken


def assert_works(guest: Guest) -> None:
    """Asserts that the address of these tests is free, and that routes work."""
    assert not guest.writes(ADDRESS, value(1))
    with guest.partition.ioeventfd(ADDRESS, 4) as doorbell:
        assert rings(guest, doorbell, value(1))
    still_works(guest)


@pytest.mark.parametrize("length", SIZES)
def test_a_write_of_its_length_at_its_address_rings(guest: Guest, length: int) -> None:
    with guest.partition.ioeventfd(ADDRESS, length) as doorbell:
        assert [size for size in SIZES if rings(guest, doorbell, value(5, size))] == [length]
        assert not rings(guest, doorbell, value(5, length), ADDRESS + length)
        assert not rings(guest, doorbell, value(5, length), ADDRESS - length)


def test_length_0_rings_at_every_size(guest: Guest) -> None:
    with guest.partition.ioeventfd(ADDRESS, 0) as doorbell:
        assert all(rings(guest, doorbell, value(5, size)) for size in SIZES)
        assert not rings(guest, doorbell, value(5), ADDRESS + 4)


@pytest.mark.parametrize("length", SIZES)
def test_with_a_datamatch_only_that_value_rings(guest: Guest, length: int) -> None:
    highest = 2 ** (8 * length) - 1
    with guest.partition.ioeventfd(ADDRESS, length, datamatch=highest) as doorbell:
        assert rings(guest, doorbell, value(highest, length))
        assert not rings(guest, doorbell, value(highest - 1, length))
    with guest.partition.ioeventfd(ADDRESS, length, datamatch=0) as doorbell:
        assert rings(guest, doorbell, value(0, length))
        assert not rings(guest, doorbell, value(1, length))


def test_rings_are_counted_until_they_are_consumed(guest: Guest) -> None:
    with guest.partition.ioeventfd(ADDRESS, 4) as doorbell:
        assert select.select([doorbell], [], [], 0)[0] == []
        for number in range(3):
            assert guest.writes(ADDRESS, value(number))
        doorbell.signal()
        assert select.select([doorbell], [], [], 0)[0] == [doorbell]
        assert doorbell.consume() == 4
        assert doorbell.consume() == 0


def test_a_doorbell_tells_what_rings_it(guest: Guest) -> None:
    with guest.partition.ioeventfd(ADDRESS, 2, datamatch=7) as doorbell:
        assert (doorbell.address, doorbell.length, doorbell.datamatch, doorbell.port) == (ADDRESS, 2, 7, False)
        assert doorbell.partition is guest.partition
        assert not doorbell.closed
        assert not os.get_inheritable(doorbell.fileno())
        assert fcntl.fcntl(doorbell, fcntl.F_GETFL) & os.O_NONBLOCK
        assert repr(doorbell) == "<IoEventFd MMIO 0xd0000000, 2 bytes, value 0x7>"
    assert repr(doorbell) == "<IoEventFd MMIO 0xd0000000, 2 bytes, value 0x7 closed>"


def test_its_event_is_a_view(guest: Guest) -> None:
    with guest.partition.ioeventfd(ADDRESS, 4) as doorbell:
        view = doorbell.event
        assert view.fileno() == doorbell.fileno()
        assert repr(view) == f"<EventFd fd={doorbell.fileno()} of the doorbell (MMIO 0xd0000000, 4 bytes)>"
        assert guest.writes(ADDRESS, value(1))
        view.signal(2)
        assert view.consume() == 3
        view.close()
        assert rings(guest, doorbell, value(1))
        view = doorbell.event
    assert repr(view) == "<EventFd of a closed doorbell>"
    for use in (view.fileno, view.signal, view.consume):
        with pytest.raises(ClosedError):
            use()


def test_a_callers_eventfd_is_duplicated_and_rung(guest: Guest, theirs: int) -> None:
    with guest.partition.ioeventfd(ADDRESS, 4, event=theirs) as doorbell:
        assert doorbell.fileno() != theirs
        assert guest.writes(ADDRESS, value(1))
        assert os.eventfd_read(theirs) == 1
    assert not guest.writes(ADDRESS, value(1))
    os.eventfd_write(theirs, 2)
    assert os.eventfd_read(theirs) == 2


def test_doorbells_may_share_an_eventfd(guest: Guest) -> None:
    with (
        EventFd() as event,
        guest.partition.ioeventfd(ADDRESS, 4, event=event),
        guest.partition.ioeventfd(ADDRESS, 2, event=event),
    ):
        assert guest.writes(ADDRESS, value(1, 4))
        assert guest.writes(ADDRESS, value(1, 2))
        assert event.consume() == 2


@pytest.mark.parametrize("order", ["route first", "doorbell first"])
def test_on_a_routes_eventfd_the_guests_write_raises_the_routes_msi(guest: Guest, order: str, theirs: int) -> None:
    if order == "route first":
        route = guest.partition.new_irqfd_route(event=theirs)
        doorbell = guest.partition.ioeventfd(ADDRESS, 4, event=route)
    else:
        doorbell = guest.partition.ioeventfd(ADDRESS, 4, event=theirs)
        route = guest.partition.new_irqfd_route(event=doorbell)
    with route, doorbell:
        route.set_msi(msi(0x41))
        assert guest.writes(ADDRESS, value(1))
        guest.receives(msi(0x41))
        assert doorbell.consume() == 0
        route.mask()
        assert guest.writes(ADDRESS, value(1))
        assert route.pending
        guest.receives_nothing()
        route.unmask()
        guest.receives(msi(0x41))
        doorbell.close()
        assert not guest.writes(ADDRESS, value(1))
        route.signal()
        guest.receives(msi(0x41))


def test_a_closed_doorbell_does_not_ring_and_leaves_its_address_free(guest: Guest) -> None:
    doorbell = guest.partition.ioeventfd(ADDRESS, 4)
    files = open_files()
    doorbell.close()
    doorbell.close()
    assert doorbell.closed
    assert len(open_files()) == len(files) - 1
    for use in (doorbell.fileno, doorbell.signal, doorbell.consume, lambda: doorbell.event):
        with pytest.raises(ClosedError, match="doorbell"):
            use()
    assert_works(guest)


def test_closing_the_partition_closes_its_doorbells(guest: Guest) -> None:
    doorbells = [guest.partition.ioeventfd(ADDRESS + 8 * number, 4) for number in range(3)]
    guest.partition.close()
    assert all(doorbell.closed for doorbell in doorbells)
    for doorbell in doorbells:
        doorbell.close()
    with pytest.raises(ClosedError):
        guest.partition.ioeventfd(ADDRESS, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "told"),
    [
        ((ADDRESS, 3), {}, ValueError, r"length 3 is not 1, 2, 4 or 8"),
        ((ADDRESS, 16), {}, ValueError, r"length 16"),
        ((ADDRESS, 2**32), {}, OverflowError, r"length 4294967296"),
        ((ADDRESS, -1), {}, OverflowError, r"length -1"),
        ((ADDRESS, "4"), {}, TypeError, r"length must be an int"),
        ((2**64, 4), {}, OverflowError, r"address 18446744073709551616.*64 bits"),
        ((-1, 4), {}, OverflowError, r"address -1"),
        ((None, 4), {}, TypeError, r"address must be an int"),
        ((2**64 - 4, 4), {}, ValueError, r"0xfffffffffffffffc, 4 bytes\) reaches beyond"),
        ((2**64 - 1, 8), {}, ValueError, r"reaches beyond"),
        ((ADDRESS, 0), {"datamatch": 7}, ValueError, r"datamatch 0x7 needs a length"),
        ((ADDRESS, 1), {"datamatch": 0x100}, ValueError, r"datamatch 0x100 is wider than .* length of 1"),
        ((ADDRESS, 4), {"datamatch": 2**32}, ValueError, r"datamatch 0x100000000 is wider"),
        ((ADDRESS, 8), {"datamatch": 2**64}, OverflowError, r"datamatch 18446744073709551616"),
        ((ADDRESS, 4), {"datamatch": -1}, OverflowError, r"datamatch -1"),
        ((ADDRESS, 4), {"datamatch": b"7"}, TypeError, r"datamatch must be an int"),
        ((ADDRESS, 4), {"event": -1}, ValueError, r"negative"),
        ((ADDRESS, 4), {"event": "3"}, TypeError, r"fileno"),
    ],
    ids=str,
)
def test_invalid_arguments_are_refused_before_any_ioctl(
    guest: Guest, arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        guest.partition.ioeventfd(*arguments, **options)
    assert guest.partition.stats().failures == 0
    assert_works(guest)


@pytest.mark.parametrize("address", [0, ADDRESS + 1, 2**64 - 5])
def test_an_address_needs_no_alignment_and_may_have_64_bits(guest: Guest, address: int) -> None:
    guest.partition.ioeventfd(address, 4).close()


def test_what_is_no_eventfd_of_its_kind_is_refused(guest: Guest) -> None:
    semaphore = os.eventfd(0, os.EFD_SEMAPHORE)
    with tempfile.TemporaryFile() as file:
        for fd, told in ((file, "not an eventfd"), (semaphore, "semaphore mode")):
            with pytest.raises(ValueError, match=told):
                guest.partition.ioeventfd(ADDRESS, 4, event=fd)
    os.close(semaphore)
    with pytest.raises(IrqFdError) as failed:
        guest.partition.ioeventfd(ADDRESS, 4, event=2**31 - 1)
    assert failed.value.errno == errno.EBADF
    assert_works(guest)


COLLISIONS: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
    ({"length": 4}, {"length": 4}, True),
    ({"length": 4}, {"length": 2}, False),
    ({"length": 0}, {"length": 4}, True),
    ({"length": 8}, {"length": 0}, True),
    ({"length": 0}, {"length": 0}, True),
    ({"length": 4, "datamatch": 1}, {"length": 4}, True),
    ({"length": 4}, {"length": 4, "datamatch": 1}, True),
    ({"length": 4, "datamatch": 1}, {"length": 4, "datamatch": 1}, True),
    ({"length": 4, "datamatch": 1}, {"length": 4, "datamatch": 2}, False),
    ({"length": 4, "datamatch": 1}, {"length": 2, "datamatch": 1}, False),
    ({"length": 4, "datamatch": 1}, {"length": 0}, True),
    ({"length": 4}, {"address": ADDRESS + 2, "length": 4}, False),
]


@pytest.mark.parametrize(("first", "second", "collides"), COLLISIONS, ids=str)
def test_doorbells_that_one_write_would_ring_collide(
    guest: Guest, first: dict[str, Any], second: dict[str, Any], *, collides: bool
) -> None:
    with guest.partition.ioeventfd(**{"address": ADDRESS, **first}) as doorbell:
        if collides:
            with pytest.raises(ValueError, match=r"doorbell \(MMIO 0xd0000000, .*\) collides .* \(MMIO 0xd0000000, "):
                guest.partition.ioeventfd(**{"address": ADDRESS, **second})
        else:
            with guest.partition.ioeventfd(**{"address": ADDRESS, **second}) as other:
                data = value(second.get("datamatch", 5), second["length"])
                assert rings(guest, other, data, other.address)
                assert doorbell.consume() == 0
        assert guest.partition.stats().failures == 0
        data = value(first.get("datamatch", 5), first["length"] or 4)
        assert rings(guest, doorbell, data)


def test_doorbells_of_two_partitions_do_not_collide(open_guest: Open) -> None:
    one, other = open_guest(), open_guest()
    with one.partition.ioeventfd(ADDRESS, 4) as here, other.partition.ioeventfd(ADDRESS, 4) as there:
        assert one.writes(ADDRESS, value(1))
        assert (here.consume(), there.consume()) == (1, 0)


def test_a_port_is_refused_where_no_kernel_takes_it(guest: Guest) -> None:
    if guest.partition.backend == "kvm":
        pytest.skip("KVM has doorbells on ports")
    with pytest.raises(io.UnsupportedOperation, match=r"port 0x510: .* MMIO addresses only"):
        guest.partition.ioeventfd(0x510, 2, port=True)
    assert guest.partition.stats().failures == 0
    assert_works(guest)


@pytest.mark.parametrize("length", [0, 1, 2, 4])
def test_on_kvm_writes_to_a_port_ring(kvm: KvmGuest, length: int) -> None:
    with kvm.partition.ioeventfd(0x510, length, port=True) as doorbell:
        assert repr(doorbell).startswith("<IoEventFd port 0x510, ")
        assert doorbell.port
        for size in (1, 2, 4):
            taken = kvm.running().write(0x510, value(5, size), port=True)
            assert (taken, doorbell.consume()) == ((True, 1) if length in (0, size) else (False, 0))
        assert not kvm.running().write(0x514, value(5), port=True)
        # The same number as a memory address is another address.
        with kvm.partition.ioeventfd(0x510, length) as other:
            assert kvm.running().write(0x510, value(5, length or 2), port=True)
            assert (doorbell.consume(), other.consume()) == (1, 0)
    assert not kvm.running().write(0x510, value(5, length or 2), port=True)


def test_on_kvm_a_port_rings_at_its_value(kvm: KvmGuest) -> None:
    with kvm.partition.ioeventfd(0x510, 2, datamatch=0x1234, port=True) as doorbell:
        assert kvm.running().write(0x510, value(0x1234, 2), port=True)
        assert not kvm.running().write(0x510, value(0x1235, 2), port=True)
        assert doorbell.consume() == 1


@pytest.mark.parametrize(
    ("address", "length", "told"),
    [(0x10000, 1, "beyond port"), (0xFFFE, 4, "beyond port"), (0x10000, 0, "beyond port"), (0x510, 8, "1, 2 or 4")],
)
def test_what_is_no_port_is_refused(kvm: KvmGuest, address: int, length: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        kvm.partition.ioeventfd(address, length, port=True)
    kvm.partition.ioeventfd(0xFFFC, 4, port=True).close()
    kvm.partition.ioeventfd(0xFFFF, 0, port=True).close()


def test_what_the_kernel_refuses_is_rolled_back(guest: Guest, faults: Faults, theirs: int) -> None:
    files = open_files()
    for event in (None, theirs):
        faults.fail(guest.partition, "assign_ioeventfd", errno.ENOMEM)
        with pytest.raises(IoEventFdError, match=r"doorbell \(MMIO 0xd0000000, 4 bytes\)") as failed:
            faults.run(partial(guest.partition.ioeventfd, ADDRESS, 4, event=event))
        assert failed.value.errno == errno.ENOMEM
        assert failed.value.hint == "the kernel is out of memory"
        assert failed.value.gsi is None
    assert guest.partition.stats().failures == 2
    assert open_files() == files
    assert_works(guest)


def test_a_doorbell_that_can_not_be_taken_away_is_closed_and_the_partition_tries_again(
    guest: Guest, faults: Faults, theirs: int
) -> None:
    doorbell = guest.partition.ioeventfd(ADDRESS, 4, event=theirs)
    faults.fail(guest.partition, "deassign_ioeventfd", errno.EIO)
    with pytest.raises(IoEventFdError, match="deassign") as failed:
        faults.run(doorbell.close)
    assert failed.value.errno == errno.EIO
    assert doorbell.closed
    doorbell.close()
    # The kernel still has it, and its address with it.
    assert guest.writes(ADDRESS, value(1))
    assert os.eventfd_read(theirs) == 1
    with pytest.raises(ValueError, match="refused to take away"):
        guest.partition.ioeventfd(ADDRESS, 4)
    still_works(guest)
    guest.partition.close()


def test_closing_the_partition_goes_on_past_a_doorbell_that_can_not_be_taken_away(
    open_guest: Open, faults: Faults
) -> None:
    guest, files = open_guest(), open_files()
    doorbells = [guest.partition.ioeventfd(ADDRESS + 8 * number, 4) for number in range(3)]
    route = guest.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    faults.fail(guest.partition, "deassign_ioeventfd", errno.EIO, after=1)
    with pytest.raises(IoEventFdError) as failed:
        faults.run(guest.partition.close)
    assert failed.value.errno == errno.EIO
    assert guest.partition.closed
    assert route.closed
    assert all(doorbell.closed for doorbell in doorbells)
    assert len(open_files()) < len(files)


def test_a_descriptor_closed_by_someone_else_gives_ebadf_and_is_not_closed_again(guest: Guest) -> None:
    doorbell, other = guest.partition.ioeventfd(ADDRESS, 4), guest.partition.ioeventfd(ADDRESS + 8, 4)
    close_as_someone_else(doorbell.fileno())
    for use in (doorbell.signal, doorbell.consume):
        with pytest.raises(IrqFdError) as failed:
            use()
        assert failed.value.errno == errno.EBADF
    with pytest.raises(IoEventFdError, match="closed by other code") as refused:
        doorbell.close()
    assert refused.value.errno == errno.EBADF
    assert doorbell.closed
    with EventFd() as event:
        guest.partition.close()
        event.signal()
        assert event.consume() == 1
    assert other.closed


def test_a_doorbell_of_another_program_is_told_apart(vm: KvmVm, theirs: int) -> None:
    fcntl.ioctl(vm.fd, KVM_IOEVENTFD, struct.pack("<QQIiI36x", 0, ADDRESS, 4, theirs, 0))
    with Partition.from_fd(vm, "kvm") as partition:
        with pytest.raises(IoEventFdError, match="another program") as failed:
            partition.ioeventfd(ADDRESS, 4)
        assert failed.value.errno == errno.EEXIST
        partition.ioeventfd(ADDRESS, 2).close()


def test_a_doorbell_left_open_is_taken_away_with_a_warning(guest: Guest, theirs: int) -> None:
    with recorded() as told:
        guest.partition.ioeventfd(ADDRESS, 4, event=theirs)
        collect()
    assert told == [(ResourceWarning, "unclosed <IoEventFd MMIO 0xd0000000, 4 bytes>")]
    assert_works(guest)


def test_a_doorbell_keeps_its_partition_open(backend: Backend) -> None:
    doorbell = backend.open().ioeventfd(ADDRESS, 4)
    collect()
    assert not doorbell.closed
    assert not doorbell.partition.closed
    doorbell.partition.close()


def test_a_body_left_by_an_exception_takes_the_doorbell_away(guest: Guest) -> None:
    def body(doorbell: IoEventFd) -> None:
        with doorbell:
            raise KeyError

    assert refusal(lambda: body(guest.partition.ioeventfd(ADDRESS, 4))) == "KeyError"
    assert_works(guest)


def test_a_forked_child_can_ring_and_take_rings_and_nothing_else(guest: Guest) -> None:
    with guest.partition.ioeventfd(ADDRESS, 4) as doorbell:
        assert in_child(lambda: refusal(doorbell.close)) == ForkedError.__name__
        assert in_child(lambda: refusal(doorbell.signal)) == "none"
        assert doorbell.consume() == 1
        assert guest.writes(ADDRESS, value(1))
        assert in_child(doorbell.consume) == 1
        assert doorbell.consume() == 0
        assert rings(guest, doorbell, value(1))
    assert_works(guest)


def test_a_childs_finalizers_close_its_descriptors_and_leave_the_parents_doorbell(guest: Guest) -> None:
    held = [guest.partition.ioeventfd(ADDRESS, 4)]

    def drop() -> tuple[int, list[object]]:
        before = len(open_files())
        with recorded() as told:
            held.clear()
            collect()
        return before - len(open_files()), list(told)

    def leave() -> tuple[bool, str]:
        with held[0] as doorbell:
            pass
        return doorbell.closed, refusal(doorbell.signal)

    assert in_child(drop) == (1, [])
    assert in_child(leave) == (True, ClosedError.__name__)
    assert rings(guest, held[0], value(1))
    held[0].close()
    assert_works(guest)


def test_a_child_can_not_write_as_the_guest(simulated: SimulatedGuest) -> None:
    with simulated.partition.ioeventfd(ADDRESS, 4):
        write = partial(simulated.partition.write_mmio, ADDRESS, value(1))
        assert in_child(lambda: refusal(write)) == ForkedError.__name__


@pytest.mark.parametrize(
    ("address", "data", "error"),
    [
        (ADDRESS, b"", ValueError),
        (ADDRESS, b"123", ValueError),
        (ADDRESS, bytes(16), ValueError),
        (ADDRESS, "1", TypeError),
        (ADDRESS, 1, TypeError),
        (2**64, b"1", OverflowError),
        ("1", b"1", TypeError),
    ],
)
def test_what_is_no_write_is_refused(
    simulated: SimulatedGuest, address: Any, data: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        simulated.partition.write_mmio(address, data)


def test_the_simulated_guest_writes_at_addresses_of_64_bits(simulated: SimulatedGuest) -> None:
    with simulated.partition.ioeventfd(2**64 - 5, 4) as doorbell:
        assert simulated.partition.write_mmio(2**64 - 5, value(1))
        assert doorbell.consume() == 1
    simulated.partition.close()
    with pytest.raises(ClosedError):
        simulated.partition.write_mmio(ADDRESS, value(1))


def test_threads_make_ring_and_close_doorbells_of_one_partition(guest: Guest) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(25):
                with guest.partition.ioeventfd(ADDRESS + 8 * number, 4) as doorbell:
                    doorbell.signal()
                    assert doorbell.consume() == 1
                    # Another thread's may collide.
                    with suppress(ValueError), guest.partition.ioeventfd(ADDRESS + 800, turn % 2 * 4) as shared:
                        assert shared.consume() == 0
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert_works(guest)


def test_doorbells_closed_while_their_partition_closes_are_taken_away_once(backend: Backend) -> None:
    for _ in range(20):
        partition = backend.open()
        doorbells = [partition.ioeventfd(ADDRESS + 8 * number, 4) for number in range(8)]
        errors: list[BaseException] = []

        def close(doorbells: list[IoEventFd], errors: list[BaseException]) -> None:
            try:
                for doorbell in doorbells:
                    doorbell.close()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=close, args=(doorbells, errors))
        thread.start()
        partition.close()
        thread.join()
        assert errors == []
        assert partition.stats().failures == 0
