"""`mshv_irqfd.testing`: it says what arrived, misses no interrupt on its way, and lets no fault go unmet."""

from __future__ import annotations

import doctest
import errno
import os
import re
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, get_args

import pytest
from mshv_irqfd import Interrupt, IoEventFdError, IrqFdError, KvmPartition, RoutingError, SimulatedPartition, testing
from mshv_irqfd.testing import (
    InterruptSource,
    SimulatedCall,
    expect,
    expect_nothing,
    failing,
    patience,
    required_backends,
    until,
)
from support import counting, msi, run_python, unique

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from backends import Backend, Guest, SimulatedGuest, Telling
    from faults import Faults
    from mshv_irqfd import IrqFdRoute, Partition


telling = pytest.mark.irqfd_backends("simulated", "kvm")
"""Of the partitions these tell what arrives."""


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


@pytest.mark.irqfd_backends("kvm")
def test_a_real_kernel_does_not_fail_on_request(irqfd_partition: KvmPartition) -> None:
    wrong: Any = irqfd_partition
    with (
        pytest.raises(TypeError, match="only a simulated kernel fails on request; <KvmPartition"),
        failing(wrong, "assign_irqfd", errno.EIO),
    ):
        pass


@telling
def test_what_is_expected_is_returned_and_nothing_is_left(irqfd_partition: Telling) -> None:
    with armed(irqfd_partition, 0x41, 0x42, 0x43) as routes:
        for route in routes:
            route.signal()
        assert [one.vector for one in expect(irqfd_partition, [0x42, msi(0x43), Interrupt(0x41)])] == [0x41, 0x42, 0x43]
        expect_nothing(irqfd_partition)


@telling
def test_signals_that_come_later_are_waited_for(irqfd_partition: Telling) -> None:
    with armed(irqfd_partition, 0x41) as [route]:
        thread = threading.Timer(0.002, route.signal)
        thread.start()
        expect(irqfd_partition, 0x41, timeout=patience())
        thread.join()


@telling
def test_a_signal_from_before_the_deadline_counts(irqfd_partition: Telling) -> None:
    with armed(irqfd_partition, 0x41) as [route]:
        # The simulated kernel's thread, and KVM after an arming, are late now and then.
        for _ in range(300):
            route.signal()
            expect(irqfd_partition, 0x41, timeout=0)
            route.mask()
            route.signal()
            route.unmask()
            expect(irqfd_partition, 0x41, timeout=0)


@telling
def test_one_that_is_missing_is_told_beside_what_arrived(irqfd_partition: Telling) -> None:
    with armed(irqfd_partition, 0x41, 0x42) as routes:
        routes[1].signal()
        with pytest.raises(AssertionError) as failed:
            expect(irqfd_partition, 0x41, timeout=0.001)
        assert str(failed.value) == text(
            irqfd_partition,
            "missing after 0.001 s: 1 x vector 0x41; expected 1 x vector 0x41; arrived: 1 x vector 0x42 to APIC 0",
        )
        expect(irqfd_partition, 0x42)


@telling
def test_one_that_is_not_expected_is_told(irqfd_partition: Telling) -> None:
    with armed(irqfd_partition, 0x41, 0x42) as routes:
        for route in routes:
            route.signal()
        with pytest.raises(AssertionError) as failed:
            expect(irqfd_partition, 0x41)
        assert str(failed.value) == text(
            irqfd_partition, "not expected: 1 x vector 0x42 to APIC 0; expected 1 x vector 0x41, which arrived"
        )
        expect_nothing(irqfd_partition)


@telling
def test_where_nothing_is_expected_what_arrived_is_told(irqfd_partition: Telling) -> None:
    expect_nothing(irqfd_partition)
    with armed(irqfd_partition, 0x41) as [route]:
        route.signal()
        with pytest.raises(AssertionError) as failed:
            expect_nothing(irqfd_partition)
        assert str(failed.value) == text(irqfd_partition, "expected no interrupt; arrived: 1 x vector 0x41 to APIC 0")
        expect_nothing(irqfd_partition)


@telling
def test_an_interrupt_on_its_way_is_not_missed(irqfd_partition: Telling) -> None:
    with armed(irqfd_partition, 0x41) as [route]:
        for _ in range(300):
            # KVM delivers what waited for the arming a little later.
            route.mask()
            os.eventfd_write(route.fileno(), 1)
            route.unmask()
            with pytest.raises(AssertionError, match="expected no interrupt"):
                expect_nothing(irqfd_partition)


def test_counts_are_exact(simulated_partition: SimulatedPartition) -> None:
    for _ in range(3):
        simulated_partition.signal_msi(msi(0x41))
    with pytest.raises(AssertionError, match="not expected: 1 x vector 0x41 to APIC 0; expected 2 x vector 0x41"):
        expect(simulated_partition, 0x41, count=2)
    for _ in range(3):
        simulated_partition.signal_msi(msi(0x41))
    with pytest.raises(AssertionError, match="missing after 0 s: 1 x vector 0x41; expected 4 x vector 0x41"):
        expect(simulated_partition, 0x41, count=4, timeout=0)
    assert len(expect(simulated_partition, {0x41: 3})) == 3


@pytest.mark.irqfd_backends("kvm")
def test_on_kvm_a_count_is_a_presence(irqfd_partition: KvmPartition) -> None:
    irqfd_partition.signal_msi(msi(0x41))
    assert expect(irqfd_partition, {0x41: 3}) == [Interrupt(0x41)]


@telling
def test_each_vp_has_its_own_and_equal_ones_are_expected_by_their_number(irqfd_partition: Telling) -> None:
    irqfd_partition.create_vp(1)
    for apic_id in (0, 1):
        irqfd_partition.signal_msi(msi(0x41, apic_id))
    assert len(expect(irqfd_partition, {0x41: 2})) == 2


@telling
def test_where_signals_wait_the_message_says_why(irqfd_partition: Telling) -> None:
    with armed(irqfd_partition, 0x41, 0x42) as [route, armed_one], irqfd_partition.new_irqfd_route() as unrouted:
        route.mask()
        for one in (route, armed_one, unrouted):
            one.signal()
        with pytest.raises(AssertionError) as failed:
            expect(irqfd_partition, 0x41, timeout=0)
        assert str(failed.value).endswith("; signals wait on GSI 24 (masked), GSI 26 (it has no MSI)")


class Recorded:
    """A guest of one's own, whose record `settle` may complete."""

    def __init__(self, *arrived: Interrupt, late: Sequence[Interrupt] = ()) -> None:
        self.arrived, self.late, self.settled = list(arrived), list(late), 0

    def settle(self) -> None:
        self.settled += 1
        self.arrived += self.late
        self.late = []

    def take_interrupts(self) -> list[Interrupt]:
        taken, self.arrived = self.arrived, []
        return taken


def test_a_guest_of_ones_own_tells_what_arrives() -> None:
    one, other = Interrupt(0x41, 0), Interrupt(0x42, 1)
    assert isinstance(Recorded(), InterruptSource)
    assert expect(Recorded(one, other), [msi(0x42, 1), 0x41]) == [one, other]
    # At the deadline it settles, and what comes by that counts.
    assert expect(Recorded(one, late=[other]), [0x41, 0x42], timeout=0) == [one, other]
    with pytest.raises(AssertionError, match="not expected: 1 x vector 0x42 to APIC 1; expected 1 x vector 0x41, "):
        expect(Recorded(one, late=[other]), 0x41)
    with pytest.raises(AssertionError) as failed:
        expect(Recorded(one), [0x41, 0x42], timeout=0)
    assert str(failed.value) == (
        "missing after 0 s: 1 x vector 0x42; expected 1 x vector 0x41; 1 x vector 0x42; "
        "arrived: 1 x vector 0x41 to APIC 0"
    )
    expect_nothing(Recorded())
    with pytest.raises(AssertionError, match="expected no interrupt; arrived: 1 x vector 0x42 to APIC 1"):
        expect_nothing(Recorded(late=[other]))


def test_a_guest_of_ones_own_is_waited_for() -> None:
    guest = Recorded()
    later = threading.Timer(0.002, lambda: guest.arrived.append(Interrupt(0x41)))
    later.start()
    assert expect(guest, 0x41) == [Interrupt(0x41)]
    later.join()


def test_where_interrupts_merge_there_are_one_to_as_many_as_expected() -> None:
    one = Interrupt(0x41, 0)
    for number in (1, 2, 3):
        assert expect(Recorded(*[one] * number), 0x41, count=3, timeout=0, merged=True) == [one] * number
    with pytest.raises(AssertionError, match="not expected: 1 x vector 0x41 to APIC 0; expected 3 x vector 0x41"):
        expect(Recorded(*[one] * 4), 0x41, count=3, merged=True)
    with pytest.raises(AssertionError, match="missing after 0 s: 1 x vector 0x42"):
        expect(Recorded(one), {0x41: 3, 0x42: 2}, timeout=0, merged=True)
    with pytest.raises(AssertionError, match="missing after 0 s: 1 x vector 0x41"):
        expect(Recorded(one), 0x41, count=2, timeout=0, merged=False)


def test_a_thing_that_tells_nothing_is_named(simulated_partition: SimulatedPartition) -> None:
    with simulated_partition.new_irqfd_route() as route:
        wrong: Any = route
        for use in (lambda: expect(wrong, 0x41), lambda: expect_nothing(wrong)):
            with pytest.raises(
                TypeError, match=r"<IrqFdRoute gsi=24 .*> does not report which interrupts arrive; give a"
            ):
                use()


def test_until_returns_what_its_condition_returns() -> None:
    answers: Iterator[object] = iter([0, None, [], "yes", "no"])
    assert until(lambda: next(answers), "the answer is yes") == "yes"
    assert next(answers) == "no"


def test_until_asserts_that_its_condition_holds_by_the_deadline() -> None:
    looks: list[int] = []
    with pytest.raises(AssertionError, match=r"^timed out after 0 s before the queue is empty$"):
        until(lambda: looks.append(1), "the queue is empty", timeout=0)
    assert looks == [1]
    with pytest.raises(AssertionError, match=r"^timed out after 0\.001 s before the queue is empty$"):
        until(lambda: looks.append(1), "the queue is empty", timeout=0.001)
    with pytest.raises(ValueError, match="timeout -1 is not a valid number of seconds"):
        until(lambda: True, "it is so", timeout=-1)


def test_the_environment_says_how_long_to_wait(
    monkeypatch: pytest.MonkeyPatch, simulated_partition: SimulatedPartition
) -> None:
    monkeypatch.delenv("MSHV_IRQFD_PATIENCE")
    assert patience() == 10.0
    monkeypatch.setenv("MSHV_IRQFD_PATIENCE", "0.25")
    assert patience() == 0.25
    monkeypatch.setenv("MSHV_IRQFD_PATIENCE", "0")
    with pytest.raises(AssertionError, match="missing after 0 s"):
        expect(simulated_partition, 0x41)
    with pytest.raises(AssertionError, match="timed out after 0 s"):
        until(lambda: False, "it is so")
    for wrong in ("long", "-1", "nan", "inf"):
        monkeypatch.setenv("MSHV_IRQFD_PATIENCE", wrong)
        with pytest.raises(ValueError, match=f"MSHV_IRQFD_PATIENCE={wrong} is not a valid number of seconds"):
            patience()


def test_the_environment_names_the_backends_that_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MSHV_IRQFD_BACKENDS", raising=False)
    assert required_backends() == []
    monkeypatch.setenv("MSHV_IRQFD_BACKENDS", " kvm, simulated,,kvm")
    assert required_backends() == ["kvm", "simulated"]
    monkeypatch.setenv("MSHV_IRQFD_BACKENDS", "kvm,xen")
    with pytest.raises(ValueError, match="MSHV_IRQFD_BACKENDS names xen; the backends are simulated, kvm, mshv"):
        required_backends()


def test_each_call_that_can_fail_is_listed_once_for_all(simulated_partition: SimulatedPartition) -> None:
    calls = [call for some in get_args(SimulatedCall) for call in get_args(some)]
    with pytest.raises(ValueError, match=r"call .* is unknown; give ") as refused:
        simulated_partition.fail("open", errno.EIO)  # type: ignore[arg-type]
    assert re.findall(r'"(\w+)"', str(refused.value))[1:] == calls
    for call in calls:
        simulated_partition.fail(call, errno.EIO)


@pytest.mark.irqfd_backends("mshv")
def test_mshv_can_not_be_asked(guest: Guest) -> None:
    for use in (lambda: expect(guest.partition, 0x41), lambda: expect_nothing(guest.partition)):
        with pytest.raises(TypeError, match="does not report which interrupts arrive"):
            use()


@telling
def test_settling_leaves_every_route_as_it_was(irqfd_partition: Telling) -> None:
    with armed(irqfd_partition, 0x41, 0x42, 0x43) as routes:
        routes[0].mask()
        routes[0].signal()
        with counting(irqfd_partition) as delta:
            irqfd_partition.settle()
        calls = 0 if isinstance(irqfd_partition, SimulatedPartition) else 2
        assert (delta.stats.pushes, delta.stats.arms, delta.stats.disarms) == (0, calls, calls)
        assert [route.armed for route in routes] == [False, True, True]
        expect_nothing(irqfd_partition)
        routes[0].unmask()
        expect(irqfd_partition, 0x41)


@pytest.mark.parametrize("call", ["assign_irqfd", "deassign_irqfd"])
@pytest.mark.parametrize("after", range(3))
@pytest.mark.irqfd_backends("kvm")  # a simulated partition makes no call to settle
def test_if_settling_fails_every_route_is_as_before(
    irqfd_partition: KvmPartition, faults: Faults, call: SimulatedCall, after: int
) -> None:
    def main() -> None:
        with armed(irqfd_partition, 0x41, 0x42, 0x43) as routes:
            faults.fail(irqfd_partition, call, errno.EIO, after=after)
            with pytest.raises(IrqFdError):
                irqfd_partition.settle()
            assert [route.armed for route in routes] == [True] * 3
            for route in routes:
                route.signal()
            expect(irqfd_partition, [0x41, 0x42, 0x43])
            routes[0].mask()
            routes[0].signal()
            expect_nothing(irqfd_partition)

    faults.run(main)


def test_a_call_fails_within_the_block_and_not_after_it(simulated_partition: SimulatedPartition) -> None:
    with armed(simulated_partition, 0x41) as [route]:
        with failing(simulated_partition, "deassign_irqfd", errno.EIO, times=2):
            for _ in range(2):
                with pytest.raises(IrqFdError):
                    route.mask()
        route.mask()
        with pytest.raises(ZeroDivisionError), failing(simulated_partition, "assign_irqfd", errno.EIO):
            _ = 1 / 0
        route.unmask()


def test_a_fault_that_no_call_meets_fails_the_test(simulated_partition: SimulatedPartition) -> None:
    with armed(simulated_partition, 0x41) as [route]:
        with (
            pytest.raises(
                AssertionError, match="1 of 2 faults of deassign_irqfd met no call: the block made too few of them"
            ),
            failing(simulated_partition, "deassign_irqfd", errno.EIO, after=1, times=2),
        ):
            route.mask()
            route.unmask()
            with pytest.raises(IrqFdError):
                route.mask()
        route.mask()


def test_faults_of_other_calls_stay(simulated_partition: SimulatedPartition) -> None:
    with armed(simulated_partition, 0x41) as [route], failing(simulated_partition, "set_msi_routing", errno.ENOMEM):
        with failing(simulated_partition, "deassign_irqfd", errno.EIO), pytest.raises(IrqFdError):
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


def test_the_examples_of_the_module_print_what_they_show() -> None:
    tests = [test for test in doctest.DocTestFinder().find(testing, "testing") if test.examples]
    assert [test.name for test in tests] == ["testing", "testing.until"]
    for test in tests:
        assert doctest.DocTestRunner().run(test).failed == 0


def test_it_needs_no_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; from mshv_irqfd import testing; testing.available_backends()"
    assert run_python(code).returncode == 0
