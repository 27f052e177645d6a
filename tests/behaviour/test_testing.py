"""`mshv_irqfd.testing`: it says what arrived, misses no interrupt on its way, and lets no fault go unmet."""

from __future__ import annotations

import doctest
import errno
import os
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from mshv_irqfd import Interrupt, IoEventFdError, IrqFdError, KvmPartition, RoutingError, SimulatedPartition, testing
from mshv_irqfd.testing import expect, expect_nothing, failing
from support import PATIENCE, counting, msi, run_python, unique

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from backends import Backend, Guest, SimulatedGuest, Telling
    from faults import Call, Faults
    from mshv_irqfd import IrqFdRoute, Partition


@contextmanager
def armed(partition: Partition, *vectors: int) -> Iterator[list[IrqFdRoute]]:
    """Routes that are armed with these vectors."""
    with ExitStack() as stack:
        routes = [stack.enter_context(partition.new_irqfd_route()) for _ in vectors]
        for route, vector in zip(routes, vectors, strict=True):
            route.set_msi(msi(vector))
        yield routes


def text(partition: Telling, message: str) -> str:
    """A message as a partition that counts says it, or as KVM does."""
    return (
        message if isinstance(partition, SimulatedPartition) else message.replace("1 x ", "").replace(" to APIC 0", "")
    )


def test_a_real_kernel_does_not_fail_on_request(kvm_partition: KvmPartition) -> None:
    wrong: Any = kvm_partition
    with (
        pytest.raises(TypeError, match="only a simulated kernel fails on request; <KvmPartition"),
        failing(wrong, "assign_irqfd", errno.EIO),
    ):
        pass


def test_what_is_expected_is_returned_and_nothing_is_left(partition: Telling) -> None:
    with armed(partition, 0x41, 0x42, 0x43) as routes:
        for route in routes:
            route.signal()
        assert [one.vector for one in expect(partition, [0x42, msi(0x43), Interrupt(0x41)])] == [0x41, 0x42, 0x43]
        expect_nothing(partition)


def test_signals_that_come_later_are_waited_for(partition: Telling) -> None:
    with armed(partition, 0x41) as [route]:
        thread = threading.Timer(0.002, route.signal)
        thread.start()
        expect(partition, 0x41, timeout=PATIENCE)
        thread.join()


def test_a_signal_from_before_the_deadline_counts(partition: Telling) -> None:
    with armed(partition, 0x41) as [route]:
        # The simulated kernel's thread, and KVM after an arming, are late now and then.
        for _ in range(300):
            route.signal()
            expect(partition, 0x41, timeout=0)
            route.mask()
            route.signal()
            route.unmask()
            expect(partition, 0x41, timeout=0)


def test_one_that_is_missing_is_told_beside_what_arrived(partition: Telling) -> None:
    with armed(partition, 0x41, 0x42) as routes:
        routes[1].signal()
        with pytest.raises(AssertionError) as failed:
            expect(partition, 0x41, timeout=0.001)
        assert str(failed.value) == text(
            partition,
            "missing after 0.001 s: 1 x vector 0x41; expected 1 x vector 0x41; arrived: 1 x vector 0x42 to APIC 0",
        )
        expect(partition, 0x42)


def test_one_that_is_not_expected_is_told(partition: Telling) -> None:
    with armed(partition, 0x41, 0x42) as routes:
        for route in routes:
            route.signal()
        with pytest.raises(AssertionError) as failed:
            expect(partition, 0x41)
        assert str(failed.value) == text(
            partition, "not expected: 1 x vector 0x42 to APIC 0; expected 1 x vector 0x41, which arrived"
        )
        expect_nothing(partition)


def test_where_nothing_is_expected_what_arrived_is_told(partition: Telling) -> None:
    expect_nothing(partition)
    with armed(partition, 0x41) as [route]:
        route.signal()
        with pytest.raises(AssertionError) as failed:
            expect_nothing(partition)
        assert str(failed.value) == text(partition, "expected no interrupt; arrived: 1 x vector 0x41 to APIC 0")
        expect_nothing(partition)


def test_an_interrupt_on_its_way_is_not_missed(partition: Telling) -> None:
    with armed(partition, 0x41) as [route]:
        for _ in range(300):
            # KVM delivers what waited for the arming a little later.
            route.mask()
            os.eventfd_write(route.fileno(), 1)
            route.unmask()
            with pytest.raises(AssertionError, match="expected no interrupt"):
                expect_nothing(partition)


def test_counts_are_exact(simulated: SimulatedGuest) -> None:
    partition = simulated.partition
    for _ in range(3):
        partition.signal_msi(msi(0x41))
    with pytest.raises(AssertionError, match="not expected: 1 x vector 0x41 to APIC 0; expected 2 x vector 0x41"):
        expect(partition, 0x41, count=2)
    for _ in range(3):
        partition.signal_msi(msi(0x41))
    with pytest.raises(AssertionError, match="missing after 0 s: 1 x vector 0x41; expected 4 x vector 0x41"):
        expect(partition, 0x41, count=4, timeout=0)
    assert len(expect(partition, {0x41: 3})) == 3


def test_on_kvm_a_count_is_a_presence(kvm_partition: KvmPartition) -> None:
    kvm_partition.signal_msi(msi(0x41))
    assert expect(kvm_partition, {0x41: 3}) == [Interrupt(0x41)]


def test_mshv_can_not_be_asked(backend: Backend, guest: Guest) -> None:
    if backend.name != "mshv":
        pytest.skip(f"{backend.name} can")
    for use in (lambda: expect(guest.partition, 0x41), lambda: expect_nothing(guest.partition)):
        with pytest.raises(TypeError, match="does not tell which interrupts arrive"):
            use()


def test_settling_leaves_every_route_as_it_was(partition: Telling) -> None:
    with armed(partition, 0x41, 0x42, 0x43) as routes:
        routes[0].mask()
        routes[0].signal()
        with counting(partition) as delta:
            partition.settle()
        calls = 0 if isinstance(partition, SimulatedPartition) else 2
        assert (delta.stats.pushes, delta.stats.arms, delta.stats.disarms) == (0, calls, calls)
        assert [route.armed for route in routes] == [False, True, True]
        expect_nothing(partition)
        routes[0].unmask()
        expect(partition, 0x41)


@pytest.mark.parametrize("call", ["assign_irqfd", "deassign_irqfd"])
@pytest.mark.parametrize("after", range(3))
def test_if_settling_fails_every_route_is_as_before(
    backend: Backend, partition: Telling, faults: Faults, call: Call, after: int
) -> None:
    if backend.name != "kvm":
        pytest.skip(f"{backend.name} makes no call to settle")

    def main() -> None:
        with armed(partition, 0x41, 0x42, 0x43) as routes:
            faults.fail(partition, call, errno.EIO, after=after)
            with pytest.raises(IrqFdError):
                partition.settle()
            assert [route.armed for route in routes] == [True] * 3
            for route in routes:
                route.signal()
            expect(partition, [0x41, 0x42, 0x43])
            routes[0].mask()
            routes[0].signal()
            expect_nothing(partition)

    faults.run(main)


def test_a_call_fails_within_the_block_and_not_after_it(simulated: SimulatedGuest) -> None:
    with armed(simulated.partition, 0x41) as [route]:
        with failing(simulated.partition, "deassign_irqfd", errno.EIO, times=2):
            for _ in range(2):
                with pytest.raises(IrqFdError):
                    route.mask()
        route.mask()
        with pytest.raises(ZeroDivisionError), failing(simulated.partition, "assign_irqfd", errno.EIO):
            _ = 1 / 0
        route.unmask()


def test_a_fault_that_no_call_meets_fails_the_test(simulated: SimulatedGuest) -> None:
    with armed(simulated.partition, 0x41) as [route]:
        with (
            pytest.raises(
                AssertionError, match="1 of 2 faults of deassign_irqfd met no call: the block made too few of them"
            ),
            failing(simulated.partition, "deassign_irqfd", errno.EIO, after=1, times=2),
        ):
            route.mask()
            route.unmask()
            with pytest.raises(IrqFdError):
                route.mask()
        route.mask()


def test_faults_of_other_calls_stay(simulated: SimulatedGuest) -> None:
    with armed(simulated.partition, 0x41) as [route], failing(simulated.partition, "set_msi_routing", errno.ENOMEM):
        with failing(simulated.partition, "deassign_irqfd", errno.EIO), pytest.raises(IrqFdError):
            route.mask()
        with pytest.raises(RoutingError):
            route.set_msi(unique(1))


def test_the_block_may_close_the_partition(open_simulated: Callable[..., SimulatedGuest]) -> None:
    partition = open_simulated().partition
    doorbell = partition.ioeventfd(0xD0000000, 4)
    with failing(partition, "deassign_ioeventfd", errno.EIO, times=2):
        for close in (doorbell.close, partition.close):
            with pytest.raises(IoEventFdError):
                close()
    partition = open_simulated().partition
    with (
        pytest.raises(AssertionError, match="1 of 1 faults of signal_msi met no call"),
        failing(partition, "signal_msi", errno.EIO),
    ):
        partition.close()


def test_the_backends_of_this_machine_can_be_opened(backend: Backend) -> None:
    assert testing.unavailable(backend.name) is None
    assert backend.name in testing.available_backends()
    assert testing.available_backends()[0] == "simulated"


def test_a_missing_backend_has_a_reason() -> None:
    for name in testing.BACKENDS:
        if name not in testing.available_backends():
            assert f"/dev/{name}" in str(testing.unavailable(name))
    with pytest.raises(ValueError, match="backend"):
        testing.unavailable("xen")


def test_the_example_of_the_module_prints_what_it_shows() -> None:
    (test,) = doctest.DocTestFinder(recurse=False).find(testing, "testing", globs=vars(testing).copy())
    result = doctest.DocTestRunner().run(test)
    assert result.attempted > 0
    assert result.failed == 0


def test_it_needs_no_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; from mshv_irqfd import testing; testing.available_backends()"
    assert run_python(code).returncode == 0
