"""Another eventfd for a live route: `IrqFdRoute.set_event()`, and moves from route to route in a batch."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from modes import in_both_modes
from mshv_irqfd import ClosedError, EventFd, IrqFdError, IrqFdRoute, MsixTable
from support import close_as_someone_else, counting, in_child, msi, open_files, refusal, still_works

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from backends import Guest, KvmGuest
    from faults import Faults
    from raw_kvm import KvmVm


@contextmanager
def armed(guest: Guest, count: int = 1) -> Iterator[list[IrqFdRoute]]:
    """Routes with vectors 0x41, 0x42, ..., closed in the end."""
    with ExitStack() as stack:
        routes = [stack.enter_context(guest.partition.new_irqfd_route()) for _ in range(count)]
        for number, route in enumerate(routes):
            route.set_msi(msi(0x41 + number))
        yield routes


@in_both_modes
def test_a_new_eventfd_takes_the_place_of_the_old_one(guest: Guest, theirs: int) -> None:
    with armed(guest, 2) as [route, other]:
        old = os.dup(route.fileno())
        with counting(guest.partition) as counted:
            route.set_event(theirs)
        assert (counted.stats.pushes, counted.stats.disarms, counted.stats.arms) == (0, 1, 1)
        assert route.fileno() not in (theirs, old)
        guest.receives_nothing()
        for signal in (route.signal, route.event.signal, lambda: os.eventfd_write(theirs, 1)):
            signal()
            guest.receives(msi(0x41))
        os.eventfd_write(old, 1)
        guest.receives_nothing()
        assert os.eventfd_read(old) == 1
        os.close(old)
        other.signal()
        guest.receives(msi(0x42))


def test_an_eventfd_is_taken_away_from_its_holder(guest: Guest, theirs: int) -> None:
    with guest.partition.new_irqfd_route(event=theirs) as route:
        route.set_msi(msi(0x41))
        route.set_event(None)
        os.eventfd_write(theirs, 1)
        guest.receives_nothing()
        assert os.eventfd_read(theirs) == 1
        route.signal()
        guest.receives(msi(0x41))
        assert fcntl.fcntl(route.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK
        assert not os.get_inheritable(route.fileno())


@in_both_modes
def test_the_eventfd_that_the_route_has_already_changes_nothing(guest: Guest, theirs: int) -> None:
    with guest.partition.new_irqfd_route(event=theirs) as route:
        route.set_msi(msi(0x41))
        fd = route.fileno()
        with counting(guest.partition) as counted:
            for same in (theirs, route, route.event, fd):
                route.set_event(same)
            with guest.partition.batch() as batch:
                batch.set_event(route, theirs)
        assert (counted.stats.arms, counted.stats.disarms) == (0, 0)
        assert route.fileno() == fd
        os.eventfd_write(theirs, 1)
        guest.receives(msi(0x41))


def test_signals_that_the_old_eventfd_holds_are_carried_over(guest: Guest, theirs: int) -> None:
    with guest.partition.new_irqfd_route(event=theirs) as route:
        route.mask()
        route.set_msi(msi(0x41))
        os.eventfd_write(theirs, 3)
        route.set_event(None)
        assert route.pending
        with pytest.raises(BlockingIOError):
            os.eventfd_read(theirs)
        route.unmask()
        guest.receives(msi(0x41))
        route.mask()
        route.event.signal(4)
        route.set_event(theirs)
        assert os.eventfd_read(theirs) == 4
        assert not route.pending


def test_signals_that_the_new_eventfd_holds_become_an_interrupt(guest: Guest, theirs: int) -> None:
    with armed(guest) as [route]:
        os.eventfd_write(theirs, 3)
        route.set_event(theirs)
        guest.receives(msi(0x41))
        assert not route.pending


def test_a_view_follows_its_route_to_another_eventfd(guest: Guest, theirs: int) -> None:
    with guest.partition.new_irqfd_route() as route:
        view = route.event
        route.set_event(theirs)
        assert view.fileno() == route.fileno()
        view.signal(2)
        assert os.eventfd_read(theirs) == 2


@in_both_modes
def test_an_eventfd_moves_to_another_route_in_one_step(guest: Guest, theirs: int) -> None:
    with armed(guest, 2) as [old, new]:
        old.set_event(theirs)
        with counting(guest.partition) as counted, guest.partition.batch() as batch:
            batch.set_event(new, theirs)
            batch.set_event(old, None)
        assert (counted.stats.pushes, counted.stats.disarms, counted.stats.arms) == (0, 2, 2)
        os.eventfd_write(theirs, 1)
        guest.receives(msi(0x42))
        old.signal()
        new.signal()
        guest.receives(msi(0x41), msi(0x42))


def test_an_eventfd_moves_with_its_pending_signals(guest: Guest) -> None:
    with armed(guest, 2) as [old, new]:
        old.mask()
        old.signal()
        with guest.partition.batch() as batch:
            batch.set_event(new, old)
            batch.set_event(old, None)
        guest.receives(msi(0x42))
        old.unmask()
        guest.receives_nothing()


def test_an_eventfd_moves_to_a_masked_route_with_its_pending_signals(guest: Guest) -> None:
    with armed(guest, 2) as [old, new]:
        old.mask()
        new.mask()
        old.signal()
        with guest.partition.batch() as batch:
            batch.set_event(new, old)
            batch.set_event(old, None)
        assert (old.pending, new.pending) == (False, True)
        new.unmask()
        guest.receives(msi(0x42))
        old.unmask()
        guest.receives_nothing()


def test_an_eventfd_whose_move_is_undone_keeps_its_pending_signals(guest: Guest, faults: Faults) -> None:
    with armed(guest, 3) as [new, old, last]:
        for route in (old, last):
            route.mask()
        old.signal()
        # The new route is armed with the signal that waits, then the last one is refused.
        faults.fail(guest.partition, "assign_irqfd", errno.ENOMEM, after=1)

        def move() -> None:
            with guest.partition.batch() as batch:
                batch.set_event(new, old)
                batch.set_event(old, None)
                batch.unmask(last)

        with pytest.raises(IrqFdError):
            faults.run(move)
        assert old.pending
        guest.receives(msi(0x41))
        old.unmask()
        guest.receives(msi(0x42))


@in_both_modes
def test_an_eventfd_moves_to_a_route_that_gets_another_msi(guest: Guest, theirs: int) -> None:
    with armed(guest, 2) as [old, new]:
        old.set_event(theirs)
        with counting(guest.partition) as counted, guest.partition.batch() as batch:
            batch.set_event(old, None)
            batch.clear_msi(old)
            batch.set_event(new, theirs)
            batch.set_msi(new, msi(0x51))
        assert counted.stats.pushes <= 1
        os.eventfd_write(theirs, 1)
        guest.receives(msi(0x51))


@in_both_modes
@pytest.mark.parametrize("ring", [True, False])
def test_eventfds_are_exchanged_and_passed_on(guest: Guest, ring: bool) -> None:
    with armed(guest, 4) as routes:
        events = [os.dup(route.fileno()) for route in routes]
        with guest.partition.batch() as batch:
            for number, route in enumerate(routes):
                batch.set_event(route, events[number - 1] if number or ring else None)
        for number, event in enumerate(events):
            os.eventfd_write(event, 1)
            following = (number + 1) % 4
            guest.receives(*([msi(0x41 + following)] if following or ring else []))
        assert os.eventfd_read(events[3]) == 1 if not ring else all(not route.pending for route in routes)
        for event in events:
            os.close(event)


@pytest.mark.parametrize("batched", [False, True])
def test_the_eventfd_of_another_route_is_refused_in_every_way(
    open_guest: Callable[..., Guest], theirs: int, batched: bool
) -> None:
    guest, elsewhere = open_guest(), open_guest()
    with armed(guest, 2) as [route, other]:
        foreign = elsewhere.partition.new_irqfd_route(event=theirs)
        fd = route.fileno()
        for event, words in (
            (other, "route of GSI 25;"),
            (os.dup(other.fileno()), "route of GSI 25;"),
            (theirs, "route of GSI 24 of another partition;"),
        ):
            with counting(guest.partition) as counted, pytest.raises(ValueError, match=words):
                if batched:
                    with guest.partition.batch() as batch:
                        batch.mask(other)
                        batch.set_event(route, event)
                else:
                    route.set_event(event)
            assert (counted.stats.arms, counted.stats.disarms) == (0, 0)
            assert (route.fileno(), other.masked) == (fd, False)
            if isinstance(event, int) and event != theirs:
                os.close(event)
        route.signal()
        other.signal()
        guest.receives(msi(0x41), msi(0x42))
        foreign.close()


def test_the_eventfd_of_another_route_is_refused(guest: Guest) -> None:
    with armed(guest, 2) as [route, other]:
        with pytest.raises(ValueError, match="the eventfd of the route of GSI 25; a route needs one of its own"):
            route.set_event(other)
        route.signal()
        other.signal()
        guest.receives(msi(0x41), msi(0x42))


def test_one_eventfd_for_two_routes_is_refused(guest: Guest, theirs: int) -> None:
    with armed(guest, 2) as routes:
        with pytest.raises(ValueError, match="for the routes of GSI 24 and 25"), guest.partition.batch() as batch:
            for route in routes:
                batch.set_event(route, theirs)
        still_works(guest)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    ("event", "error", "words"),
    [
        ("3", TypeError, "descriptor"),
        (object(), TypeError, "descriptor"),
        (-1, ValueError, "negative"),
        (1 << 31, OverflowError, "descriptor"),
    ],
)
def test_an_invalid_descriptor_is_refused_at_once(
    guest: Guest, batched: bool, event: Any, error: type[Exception], words: str
) -> None:
    with armed(guest) as [route]:
        batch = guest.partition.batch()
        with pytest.raises(error, match=words):
            batch.set_event(route, event) if batched else route.set_event(event)
        batch.commit()
        route.signal()
        guest.receives(msi(0x41))


def test_a_file_that_no_irqfd_can_use_is_refused_at_once(guest: Guest) -> None:
    with armed(guest) as [route]:
        semaphore, closed = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE), os.dup(0)
        null = os.open("/dev/null", os.O_RDONLY)
        close_as_someone_else(closed)
        batch = guest.partition.batch()
        for use in (route.set_event, lambda event: batch.set_event(route, event)):
            with pytest.raises(ValueError, match="semaphore"):
                use(semaphore)
            with pytest.raises(ValueError, match="not an eventfd"):
                use(null)
            with pytest.raises(IrqFdError, match="not open") as failed:
                use(closed)
            assert failed.value.errno == errno.EBADF
        os.close(semaphore)
        os.close(null)
        route.signal()
        guest.receives(msi(0x41))


def test_a_closed_route_takes_no_eventfd(guest: Guest, theirs: int) -> None:
    with armed(guest, 2) as [closed, open_]:
        closed.close()
        with pytest.raises(ClosedError):
            closed.set_event(theirs)
        batch = guest.partition.batch()
        batch.set_event(open_, theirs)
        batch.set_event(closed, None)
        with pytest.raises(ClosedError):
            batch.commit()
        with pytest.raises(ClosedError):
            batch.set_event(open_, theirs)
        os.eventfd_write(theirs, 1)
        guest.receives_nothing()
        assert os.eventfd_read(theirs) == 1


def test_an_eventfd_armed_by_another_vm_is_refused_and_changes_nothing(kvm: KvmGuest, vm: KvmVm, theirs: int) -> None:
    vm.arm(24, theirs)
    with armed(kvm) as [route]:
        fd = route.fileno()
        try:
            with pytest.raises(IrqFdError, match="already armed on a GSI, by another partition or program") as refused:
                route.set_event(theirs)
        except pytest.fail.Exception:
            pytest.skip("needs Linux 6.17, whose KVM looks for the irqfds of other VMs")
        assert refused.value.errno == errno.EBUSY
        assert (route.fileno(), route.armed) == (fd, True)
        route.signal()
        kvm.receives(msi(0x41))


def test_an_armed_route_whose_eventfd_was_closed_by_other_code_keeps_it(guest: Guest, theirs: int) -> None:
    with armed(guest) as [route]:
        close_as_someone_else(route.fileno())
        with pytest.raises(IrqFdError, match="closed by other code") as failed:
            route.set_event(theirs)
        assert failed.value.errno == errno.EBADF
        with pytest.raises(IrqFdError):
            route.close()
    still_works(guest)


def test_a_masked_route_whose_eventfd_was_closed_by_other_code_gets_another(guest: Guest, theirs: int) -> None:
    with armed(guest) as [route]:
        route.mask()
        fd = route.fileno()
        close_as_someone_else(fd)
        route.set_event(theirs)
        reused = os.dup(theirs)
        route.unmask()
        os.eventfd_write(theirs, 1)
        guest.receives(msi(0x41))
        os.close(reused)


@contextmanager
def replaced_by_other_code(route: IrqFdRoute, new: int) -> Iterator[int]:
    """Other code closes a route's descriptor, and its number becomes the caller's descriptor of another eventfd."""
    number = route.fileno()
    os.dup2(new, number, inheritable=False)
    yield number
    # It is open still.
    os.eventfd_write(number, 1)
    os.close(number)


@pytest.mark.parametrize("own", [True, False], ids=["own", "theirs"])
@pytest.mark.parametrize("batched", [False, True])
def test_a_masked_route_whose_number_other_code_gave_to_the_new_eventfd_gets_that(
    guest: Guest, theirs: int, *, own: bool, batched: bool
) -> None:
    new = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    with guest.partition.new_irqfd_route(event=None if own else theirs) as route:
        route.set_msi(msi(0x41))
        route.mask()
        with replaced_by_other_code(route, new) as number:
            if batched:
                with guest.partition.batch() as batch:
                    batch.set_event(route, number)
            else:
                route.set_event(number)
            assert route.fileno() != number
            assert not route.pending
            os.eventfd_write(new, 1)
            assert route.pending
            route.unmask()
            guest.receives(msi(0x41))
            os.eventfd_write(theirs, 1)
            guest.receives_nothing()
            route.close()
    os.close(new)


@pytest.mark.parametrize("new", [True, False], ids=["new", "theirs"])
def test_an_armed_route_whose_number_is_another_files_by_now_keeps_its_eventfd(
    guest: Guest, theirs: int, *, new: bool
) -> None:
    """Without its descriptor it can't be disarmed. A kernel asked to disarm that number would say that it has."""
    mine, other = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2))
    route = guest.partition.new_irqfd_route(event=mine)
    route.set_msi(msi(0x41))
    with replaced_by_other_code(route, theirs) as number:
        with pytest.raises(IrqFdError, match="closed by other code") as refused:
            route.set_event(None if new else other)
        assert refused.value.errno == errno.EBADF
        assert (route.fileno(), route.armed) == (number, True)
        os.close(mine)
        close_as_someone_else(number)
        with pytest.raises(IrqFdError):
            route.close()
        os.dup2(other, number, inheritable=False)
    os.close(other)
    still_works(guest)


def eventfd_id(fd: int) -> str:
    """The kernel's number of an eventfd."""
    (line,) = [
        line for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines() if line.startswith("eventfd-id")
    ]
    return line


def test_a_route_whose_eventfd_is_gone_takes_one_that_the_kernel_gave_the_same_id(guest: Guest) -> None:
    route = guest.partition.new_irqfd_route()
    fd = route.fileno()
    gone = eventfd_id(fd)
    with Path(os.devnull).open() as null:
        os.dup2(null.fileno(), fd, inheritable=False)
    with ExitStack() as stack:
        for _ in range(100):
            new = stack.enter_context(EventFd())
            if eventfd_id(new.fileno()) == gone:
                break
        else:
            pytest.skip("another process took the id just then")
        route.set_event(new)
        new.signal()
        assert route.pending
        route.close()
    os.close(fd)


def test_a_vector_of_a_device_gets_another_eventfd(guest: Guest, theirs: int) -> None:
    with MsixTable(guest.partition, 2) as table:
        vector = table.vectors[1]
        view = vector.event
        vector.signal()
        assert vector.route is not None
        vector.route.set_event(theirs)
        assert (view.fileno(), table.read_pba(0, 8)) == (vector.route.fileno(), 0b10)
        assert os.eventfd_read(theirs) == 1
        assert table.read_pba(0, 8) == 0
        os.eventfd_write(theirs, 1)
        table.write_table(16, (0xFEE00000).to_bytes(8, "little"))
        table.write_table(24, (0x41).to_bytes(8, "little"))
        table.write_message_control(2, (0x8000).to_bytes(2, "little"))
        guest.receives(msi(0x41))
        vector.signal()
        guest.receives(msi(0x41))


def test_a_child_signals_the_eventfd_that_the_route_had_when_it_was_forked(guest: Guest, theirs: int) -> None:
    with armed(guest) as [route]:
        route.set_event(theirs)
        assert in_child(lambda: refusal(route.signal)) == "none"
        guest.receives(msi(0x41))


def test_no_descriptor_is_left_of_eventfds_that_came_and_went(guest: Guest) -> None:
    with armed(guest, 2) as routes:
        before = len(open_files())
        for number in range(50):
            routes[0].set_event(None)
            with EventFd() as event:
                routes[0].set_event(event)
            with guest.partition.batch() as batch:
                batch.set_event(routes[number % 2], routes[1 - number % 2])
                batch.set_event(routes[1 - number % 2], None)
            # A batch that is not committed, and a last word that counts.
            batch = guest.partition.batch()
            batch.set_event(routes[0], None)
            batch.set_event(routes[0], None)
            del batch
        assert len(open_files()) == before


@in_both_modes
def test_every_signal_is_followed_by_an_interrupt_while_eventfds_come_and_go(guest: Guest) -> None:
    with armed(guest, 2) as [route, other]:
        stop, errors = threading.Event(), list[BaseException]()

        def change() -> None:
            try:
                while not stop.is_set():
                    with EventFd() as event:
                        route.set_event(event)
                        with guest.partition.batch() as batch:
                            batch.set_event(other, None)
                            batch.set_event(route, None)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=change)
        thread.start()
        try:
            for _ in range(300):
                route.signal()
                guest.gets(msi(0x41), once=False)
                while guest.take_interrupts():
                    pass
        finally:
            stop.set()
            thread.join()
        assert errors == []
        route.signal()
        other.signal()
        guest.receives(msi(0x41), msi(0x42))


def test_a_pending_signal_shows_while_eventfds_come_and_go(guest: Guest) -> None:
    with armed(guest) as [route]:
        route.mask()
        route.event.signal(3)
        stop = threading.Event()

        def change() -> None:
            while not stop.is_set():
                route.set_event(None)

        thread = threading.Thread(target=change)
        thread.start()
        try:
            assert all(route.pending for _ in range(5000))
        finally:
            stop.set()
            thread.join()
        assert route.event.consume() == 3
