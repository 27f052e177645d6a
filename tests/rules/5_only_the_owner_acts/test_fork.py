"""Rule 5: only the owner acts; a forked child can signal, and little else."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest
from backends import Backend, Guest, KvmGuest, SimulatedGuest
from mshv_irqfd import Batch, EventFd, ForkedError, IrqFdRoute, Partition
from mshv_irqfd.testing import until
from support import changing, collect, in_child, msi, open_files, recorded, refusal, still_works

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def at_work(guest: Guest) -> Iterator[IrqFdRoute]:
    """An armed route, which is checked to work before and after."""
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        route.signal()
        guest.receives(msi(0x41))
        yield route
        assert route.armed
        route.signal()
        guest.receives(msi(0x41))


OF_PARTITIONS: dict[str, Callable[[Partition], object]] = {
    "new_irqfd_route": lambda partition: partition.new_irqfd_route(),
    "create_vp": lambda partition: partition.create_vp(1),
    "signal_msi": lambda partition: partition.signal_msi(msi(0x42)),
    "ioeventfd": lambda partition: partition.ioeventfd(0xD0000000, 4),
    "batch": lambda partition: partition.batch(),
    "gsi_state": lambda partition: partition.gsi_state(24),
    "routing_table": lambda partition: partition.routing_table(),
    "routes": lambda partition: partition.routes,
    "vps": lambda partition: partition.vps,
    "stats": lambda partition: partition.stats(),
    "close": lambda partition: partition.close(),
}
OF_ROUTES: dict[str, Callable[[IrqFdRoute], object]] = {
    "set_msi": lambda route: route.set_msi(msi(0x42)),
    "set_msi-again": lambda route: route.set_msi(msi(0x41)),
    "clear_msi": lambda route: route.clear_msi(),
    "mask": lambda route: route.mask(),
    "unmask": lambda route: route.unmask(),
    "pending": lambda route: route.pending,
    "consume_pending": lambda route: route.consume_pending(),
    "consume-the-view": lambda route: route.event.consume(),
    "set_event": lambda route: route.set_event(None),
    "close": lambda route: route.close(),
}


@pytest.mark.parametrize("use", OF_PARTITIONS.values(), ids=OF_PARTITIONS)
def test_a_child_can_not_use_its_parents_partition(guest: Guest, use: Callable[[Partition], object]) -> None:
    with at_work(guest):
        assert in_child(lambda: refusal(lambda: use(guest.partition))) == ForkedError.__name__


@pytest.mark.parametrize("use", OF_ROUTES.values(), ids=OF_ROUTES)
def test_a_child_can_not_use_its_parents_routes(guest: Guest, use: Callable[[IrqFdRoute], object]) -> None:
    with at_work(guest) as route:
        assert in_child(lambda: refusal(lambda: use(route))) == ForkedError.__name__


@pytest.mark.parametrize("name", ["masked", "armed", "msi", "state"])
def test_a_child_can_not_read_state_that_may_be_out_of_date(guest: Guest, name: str) -> None:
    # As the docstring of IrqFdRoute says, only `signal()` and `fileno()` work in a forked child.
    with at_work(guest) as route:
        assert in_child(lambda: refusal(lambda: getattr(route, name))) == ForkedError.__name__


def test_a_child_can_not_commit_its_parents_batch(guest: Guest) -> None:
    with at_work(guest) as route:
        batch = guest.partition.batch()
        batch.mask(route)
        assert in_child(lambda: refusal(batch.commit)) == ForkedError.__name__

        def unwinding() -> str:
            def body(batch: Batch) -> None:
                with batch:
                    raise KeyError

            return refusal(lambda: body(batch))

        assert in_child(unwinding) == "KeyError"


def test_a_child_can_not_take_interrupts_or_inject_faults(simulated: SimulatedGuest) -> None:
    partition = simulated.partition
    uses = (partition.take_interrupts, partition.settle, partial(partition.fail, "assign_irqfd", 5))
    with at_work(simulated):
        for use in uses:
            assert in_child(partial(refusal, use)) == ForkedError.__name__


def test_a_child_can_not_take_interrupts_of_a_vm(kvm: KvmGuest) -> None:
    with at_work(kvm):
        assert in_child(lambda: refusal(kvm.partition.take_interrupts)) == ForkedError.__name__


def test_a_signal_from_a_child_raises_the_interrupt(guest: Guest) -> None:
    with at_work(guest) as route:
        assert in_child(lambda: refusal(route.signal)) == "none"
        guest.receives(msi(0x41))
        assert in_child(lambda: refusal(route.event.signal)) == "none"
        guest.receives(msi(0x41))
        assert in_child(lambda: os.eventfd_write(route.fileno(), 1)) is None
        guest.receives(msi(0x41))


def test_a_signal_from_a_child_is_pending_while_the_route_is_masked(guest: Guest) -> None:
    with at_work(guest) as route:
        route.mask()
        in_child(route.signal)
        assert route.pending
        route.unmask()
        guest.receives(msi(0x41))


def test_a_child_can_read_attributes_that_never_change(guest: Guest) -> None:
    with at_work(guest) as route:
        partition = guest.partition

        def look() -> tuple[object, ...]:
            return partition.backend, partition.gsis, partition.closed, route.gsi, route.closed, bool(repr(partition))

        assert in_child(look) == (partition.backend, range(24, 2072), False, 24, False, True)
        assert "24" in in_child(lambda: repr(route))


def test_with_unwinds_in_a_child_without_an_error(guest: Guest) -> None:
    with at_work(guest) as route:

        def leave() -> str:
            def body() -> None:
                with guest.partition, route:
                    pass

            return refusal(body)

        def unwind() -> str:
            def body() -> None:
                with guest.partition, route, route.event:
                    raise KeyError

            return refusal(body)

        assert in_child(leave) == "none"
        assert in_child(unwind) == "KeyError"


def test_leaving_with_in_a_child_closes_the_descriptor_only(guest: Guest) -> None:
    with at_work(guest) as route:

        def leave() -> tuple[int, str]:
            before = len(open_files())
            with route:
                pass
            return before - len(open_files()), refusal(route.signal)

        assert in_child(leave) == (1, "ClosedError")


@pytest.mark.parametrize("order", ["partition-first", "routes-first"])
def test_finalizers_in_a_child_close_descriptors_and_do_nothing_else(backend: Backend, order: str) -> None:
    before = open_files()
    held: list[object] = [backend.open()]
    partition = held[0]
    assert isinstance(partition, Partition)
    routes = [partition.new_irqfd_route() for _ in range(3)]
    for number, route in enumerate(routes[:2]):
        route.set_msi(msi(0x41 + number))
    if order == "routes-first":
        held[:0] = routes
    else:
        held += routes
    guest = backend.guest(partition)
    guest.stop()
    box: dict[str, object] = {"guest": guest}
    del partition, routes, route, guest

    def drop() -> tuple[list[str], list[str]]:
        with recorded() as told:
            box.clear()
            while held:
                held.pop(0)
            collect()
        return [message for _, message in told], [file for file in open_files() if file not in before]

    warned, left = in_child(drop)
    assert warned == []
    # The pipe for this answer is the child's own.
    assert [file for file in left if "pipe:" not in file and "hvstub" not in file] == []

    owner = box["guest"]
    assert isinstance(owner, Guest)
    first, second, third = owner.partition.routes
    assert (first.armed, second.armed, third.armed) == (True, True, False)
    first.signal()
    second.signal()
    owner.receives(msi(0x41), msi(0x42))
    owner.close()


def test_an_eventfd_works_in_a_child_on_the_same_counter() -> None:
    with EventFd() as event:
        in_child(lambda: event.signal(3))
        assert event.consume() == 3


def test_an_eventfd_left_open_in_a_child_is_closed_without_a_warning() -> None:
    held = [EventFd()]

    def drop() -> list[str]:
        with recorded() as told:
            held.clear()
            collect()
        return [message for _, message in told]

    warned = in_child(drop)
    held.pop().close()
    assert warned == []


def test_a_child_can_open_its_own_partition(backend: Backend, guest: Guest) -> None:
    with at_work(guest):

        def own() -> str:
            with backend.open() as partition, partition.new_irqfd_route() as route:
                route.set_msi(msi(0x41))
                route.signal()
                inner = in_child(lambda: refusal(route.mask))
                return f"{route.armed} {inner} {refusal(partition.new_irqfd_route().close)}"

        assert in_child(own) == "True ForkedError none"
    still_works(guest)


def test_a_child_can_use_its_parents_eventfd_in_its_own_partition(guest: Guest, backend: Backend) -> None:
    if backend.name != "simulated":
        pytest.skip("a real kernel refuses an eventfd that is armed already; a simulated one is the child's own")
    with at_work(guest) as route:

        def bring() -> str:
            with backend.open() as partition:
                return refusal(lambda: partition.new_irqfd_route(event=route.fileno()).close())

        assert in_child(bring) == "none"


@pytest.mark.parametrize("preload", [False, True], ids=["pushes", "moves"])
def test_forking_while_another_thread_changes_routes_hangs_neither_child_nor_parent(
    open_guest: Callable[..., Guest], preload: bool
) -> None:
    guest = open_guest(preload=preload)
    partition = guest.partition
    routes = [partition.new_irqfd_route() for _ in range(200)]

    def use() -> list[str]:
        uses: list[Callable[[], object]] = [
            lambda: routes[0].set_msi(msi(0x50)),
            partition.routing_table,
            lambda: partition.routes,
            partition.close,
            routes[1].close,
            routes[0].signal,
        ]
        seen = [refusal(each) for each in uses]
        with partition, routes[2]:
            pass
        return seen

    with changing(partition, routes):
        until(lambda: (partition.stats().hits if preload else partition.stats().pushes) > 0, "the first change is made")
        for _ in range(15):
            assert in_child(use) == ["ForkedError"] * 5 + ["none"]
    assert all(route.armed for route in routes)
    # The children's signals on the first route have arrived, each with either vector.
    assert {interrupt.vector for interrupt in guest.arrived()} <= {0x42, 0x43}
    for route in routes:
        route.close()
    still_works(guest)
