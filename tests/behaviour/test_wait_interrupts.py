"""Waiting for interrupts, on partitions that can tell what arrives: by vector and count, with a deadline that tells."""

from __future__ import annotations

import itertools
import pickle
import threading
from typing import TYPE_CHECKING, Any

import pytest
from mshv_irqfd import (
    ClosedError,
    DeliveryMode,
    Interrupt,
    KvmPartition,
    MissingInterruptError,
    MshvIrqFdError,
    MshvPartition,
    MsiRoute,
    Partition,
    SimulatedPartition,
)
from mshv_irqfd.testing import patience
from support import in_child, msi, refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from backends import Telling


telling = pytest.mark.irqfd_backends("simulated", "kvm")
"""Of the partitions these tell what arrives."""


def raised(partition: Partition, *vectors: int) -> None:
    for vector in vectors:
        assert partition.signal_msi(msi(vector))


def vectors(interrupts: list[Interrupt]) -> list[int]:
    return [interrupt.vector for interrupt in interrupts]


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        (0x41, [0x41]),
        (msi(0x41), [0x41]),
        (Interrupt(0x41), [0x41]),
        ([0x41, 0x43], [0x41, 0x43]),
        ({0x41: 1, 0x43: 1}, [0x41, 0x43]),
        ((msi(0x43), 0x41), [0x41, 0x43]),
        ({Interrupt(0x42, 0): 1}, [0x42]),
    ],
    ids=str,
)
@telling
def test_what_is_expected_is_taken_and_everything_else_stays(
    irqfd_partition: Telling, expected: Any, found: list[int]
) -> None:
    raised(irqfd_partition, 0x41, 0x42, 0x43)
    assert vectors(irqfd_partition.wait_interrupts(expected, timeout=patience())) == found
    assert vectors(irqfd_partition.take_interrupts()) == [
        vector for vector in (0x41, 0x42, 0x43) if vector not in found
    ]


@pytest.mark.parametrize("destinations", list(itertools.permutations(range(3))), ids=str)
def test_interrupts_are_matched_so_that_every_expected_one_is_found(
    simulated_partition: SimulatedPartition, destinations: tuple[int, ...]
) -> None:
    partition = simulated_partition
    for index in (1, 2):
        partition.create_vp(index)
    # The first takes what the others could not do without, unless it is given another one.
    patterns = [Interrupt(0x41, logical=False), Interrupt(0x41, 0), Interrupt(0x41, delivery_mode=DeliveryMode.FIXED)]
    for expected in itertools.permutations(patterns):
        for destination in destinations:
            partition.signal_msi(msi(0x41, destination))
        partition.signal_msi(msi(0x41, 1))
        found = partition.wait_interrupts(expected, timeout=patience())
        # Those that came first.
        assert [interrupt.destination for interrupt in found] == list(destinations)
        assert vectors(partition.take_interrupts()) == [0x41]


@telling
def test_what_stays_is_there_for_the_next_wait(irqfd_partition: Telling) -> None:
    raised(irqfd_partition, 0x41, 0x42, 0x43)
    for vector in (0x43, 0x41, 0x42):
        assert vectors(irqfd_partition.wait_interrupts(vector, timeout=patience())) == [vector]
    raised(irqfd_partition, 0x42)
    assert vectors(irqfd_partition.take_interrupts()) == [0x42]


@telling
def test_it_waits_for_signals_of_another_thread(irqfd_partition: Telling) -> None:
    route = irqfd_partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    # It arrives, whether or not the other thread is late.
    late = threading.Timer(0.005, route.signal)
    late.start()
    assert vectors(irqfd_partition.wait_interrupts(0x41, timeout=patience())) == [0x41]
    late.join()
    route.close()


@telling
def test_threads_that_wait_for_different_interrupts_get_their_own(irqfd_partition: Telling) -> None:
    found = dict[int, list[int]]()

    def wait(vector: int) -> None:
        found[vector] = vectors(irqfd_partition.wait_interrupts(vector, timeout=patience()))

    threads = [threading.Thread(target=wait, args=(vector,)) for vector in range(0x41, 0x45)]
    raised(irqfd_partition, *range(0x41, 0x45))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {vector: [vector] for vector in range(0x41, 0x45)}


@telling
def test_after_the_deadline_it_says_what_is_missing_and_what_arrived_and_takes_nothing(
    irqfd_partition: Telling,
) -> None:
    raised(irqfd_partition, 0x41, 0x50)
    with pytest.raises(MissingInterruptError) as late:
        irqfd_partition.wait_interrupts([0x41, 0x42], timeout=0.001)
    assert isinstance(late.value, MshvIrqFdError)
    assert isinstance(late.value, TimeoutError)
    assert late.value.missing == {Interrupt(0x42): 1}
    assert vectors(late.value.arrived) == [0x41, 0x50]
    one, to = ("1 x ", " to APIC 0") if isinstance(irqfd_partition, SimulatedPartition) else ("", "")
    assert str(late.value) == (
        f"missing after 0.001 s: {one}vector 0x42; expected {one}vector 0x41; {one}vector 0x42; "
        f"arrived: {one}vector 0x41{to}; {one}vector 0x50{to}"
    )
    again = pickle.loads(pickle.dumps(late.value))
    assert (str(again), again.missing, again.arrived) == (str(late.value), late.value.missing, late.value.arrived)
    assert vectors(irqfd_partition.take_interrupts()) == [0x41, 0x50]


def test_counts_are_exact_and_surplus_ones_stay(simulated_partition: SimulatedPartition) -> None:
    raised(simulated_partition, 0x41, 0x42, 0x41, 0x41)
    assert vectors(simulated_partition.wait_interrupts(0x41, count=2)) == [0x41, 0x41]
    with pytest.raises(MissingInterruptError, match="missing after 0 s: 2 x vector 0x41; expected 3 x vector 0x41;"):
        simulated_partition.wait_interrupts({0x41: 3}, timeout=0)
    assert vectors(simulated_partition.wait_interrupts([0x41, 0x42])) == [0x42, 0x41]
    with pytest.raises(MissingInterruptError, match="arrived: none"):
        simulated_partition.wait_interrupts([0x41, 0x41], timeout=0)


def test_each_field_that_is_known_is_compared(simulated_partition: SimulatedPartition) -> None:
    simulated_partition.create_vp(1)
    for message in (MsiRoute(0xFEE00000, 0x441), msi(0x41, 1), msi(0x41), msi(0x41)):
        assert simulated_partition.signal_msi(message)
    for expected, what in (
        (msi(0x41, 2), "vector 0x41 to APIC 2"),
        (MsiRoute(0xFEE01004, 0x41), "vector 0x41 to logical destination 1"),
        (MsiRoute(0xFEE00000, 0x8041), "vector 0x41 to APIC 0, level-triggered"),
    ):
        with pytest.raises(MissingInterruptError, match=f"missing after 0 s: 1 x {what};.*2 x vector 0x41 to APIC 0"):
            simulated_partition.wait_interrupts(expected, timeout=0)
    with pytest.raises(
        MissingInterruptError, match="arrived: 1 x vector 0x41 to APIC 0, NMI; 1 x vector 0x41 to APIC 1"
    ):
        simulated_partition.wait_interrupts(0x42, timeout=0)
    # The vector alone does not take what only the exact ones could have.
    exact = {Interrupt(0x41): 1, Interrupt(0x41, delivery_mode=DeliveryMode.NMI): 1, Interrupt(0x41, 1): 1}
    assert len(simulated_partition.wait_interrupts(exact, timeout=0)) == 3
    assert simulated_partition.take_interrupts() == [Interrupt(0x41, 0, DeliveryMode.FIXED, logical=False, level=False)]


@pytest.mark.irqfd_backends("kvm")
def test_kvm_has_no_counts(irqfd_partition: KvmPartition) -> None:
    for expected, count in (({0x41: 2}, None), (0x41, 2), ([0x41, 0x41], None)):
        with pytest.raises(
            ValueError, match="count 2 of vector 0x41: KVM reports that a vector was raised, not how often"
        ):
            irqfd_partition.wait_interrupts(expected, count=count)
    raised(irqfd_partition, 0x41, 0x41)
    irqfd_partition.wait_interrupts(0x41, count=1)
    assert irqfd_partition.take_interrupts() == []


@pytest.mark.irqfd_backends("kvm")
def test_on_kvm_each_vcpu_has_its_own(irqfd_partition: KvmPartition) -> None:
    irqfd_partition.create_vp(1)
    for apic_id in (0, 1):
        assert irqfd_partition.signal_msi(msi(0x41, apic_id))
    for _ in range(2):
        assert irqfd_partition.wait_interrupts(0x41, timeout=0) == [Interrupt(0x41)]
    with pytest.raises(MissingInterruptError, match="expected vector 0x41; arrived: none"):
        irqfd_partition.wait_interrupts(0x41, timeout=0)


@pytest.mark.parametrize(
    ("expected", "options", "error", "message"),
    [
        (256, {}, ValueError, "vector 0x100 is out of range; vectors are 0 to 0xff"),
        (-1, {}, ValueError, "vector -0x1 is out of range"),
        (Interrupt(None), {}, TypeError, "a vector is an int, not None"),  # type: ignore[arg-type]
        ("A", {}, TypeError, "an expected interrupt is a vector .an int., an MsiRoute or an Interrupt; not 'A'"),
        (None, {}, TypeError, "not None"),
        (1.5, {}, TypeError, "not 1.5"),
        ([0x41, "A"], {}, TypeError, "not 'A'"),
        ([], {}, ValueError, "no interrupt is expected; give one or more"),
        ({}, {}, ValueError, "no interrupt is expected"),
        ({0x41: 0}, {}, ValueError, "count 0 is out of range; give 1 or more"),
        ({0x41: "1"}, {}, TypeError, "a count is an int, not '1'"),
        (0x41, {"count": -1}, ValueError, "count -1 is out of range"),
        (0x41, {"count": True}, TypeError, "a count is an int, not True"),
        ([0x41], {"count": 1}, TypeError, "count 1 goes with a single interrupt; give several as a mapping"),
        (0x41, {"timeout": -1}, ValueError, "timeout -1 is not a valid number of seconds"),
        (0x41, {"timeout": float("nan")}, ValueError, "timeout nan is not"),
        (0x41, {"timeout": float("inf")}, ValueError, "timeout inf is not"),
    ],
    ids=str,
)
@telling
def test_invalid_arguments_are_refused_and_take_nothing(
    irqfd_partition: Telling,
    expected: Any,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    raised(irqfd_partition, 0x41)
    with pytest.raises(error, match=message):
        irqfd_partition.wait_interrupts(expected, **options)
    assert vectors(irqfd_partition.take_interrupts()) == [0x41]


@telling
def test_a_closed_partition_is_not_waited_for(irqfd_partition: Telling) -> None:
    irqfd_partition.close()
    with pytest.raises(ClosedError):
        irqfd_partition.wait_interrupts(0x41)


@telling
def test_a_forked_child_can_not_wait_for_interrupts(irqfd_partition: Telling) -> None:
    assert in_child(lambda: refusal(lambda: irqfd_partition.wait_interrupts(0x41, timeout=0))) == "ForkedError"


def test_mshv_has_no_such_wait() -> None:
    use: Callable[..., object] | None = getattr(MshvPartition, "wait_interrupts", None)
    assert use is None
