"""Helpers for the tests of device models: what arrived, by deadlines instead of sleeps; faults; available backends.

They need no test framework. With pytest there are fixtures too (`irqfd_partition`, `simulated_partition` and
`irqfd_backend`): the package installs a plugin for it.

Example:
    >>> import errno
    >>> from mshv_irqfd import IrqFdError, open_partition
    >>> def test_a_masked_route_keeps_its_signal():
    ...     with open_partition("simulated") as partition, partition.new_irqfd_route() as route:
    ...         route.set_msi(0xFEE00000, 0x41)
    ...         route.signal()
    ...         expect(partition, 0x41)
    ...         route.mask()
    ...         route.signal()
    ...         expect_nothing(partition)
    ...         try:
    ...             with failing(partition, "assign_irqfd", errno.ENOMEM):
    ...                 route.unmask()
    ...         except IrqFdError:
    ...             assert route.masked
    ...         route.unmask()
    ...         expect(partition, 0x41)
    >>> test_a_masked_route_keeps_its_signal()
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mshv_irqfd import _interrupts
from mshv_irqfd.errors import HypervisorUnavailableError, MissingInterruptError
from mshv_irqfd.handles import KvmPartition, Partition, SimulatedPartition, open_partition

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Literal

    from mshv_irqfd._interrupts import Expected
    from mshv_irqfd.values import Interrupt

__all__ = ["BACKENDS", "available_backends", "expect", "expect_nothing", "failing", "unavailable"]

BACKENDS = ("simulated", "kvm", "mshv")
"""The names of all backends."""


_reasons: dict[str, str | None] = {}


def unavailable(backend: str) -> str | None:
    """The reason why this machine can't open partitions of a backend, and a remedy; None if it can.

    Opens a partition and closes it, once in a process.

    Raises:
        ValueError: no backend has this name.
    """
    if backend not in _reasons:
        try:
            open_partition(backend).close()
        except HypervisorUnavailableError as error:
            _reasons[backend] = str(error)
        else:
            _reasons[backend] = None
    return _reasons[backend]


def available_backends() -> list[str]:
    """The backends that this machine has, "simulated" first."""
    return [backend for backend in BACKENDS if unavailable(backend) is None]


def expect(
    partition: Partition, expected: Expected, *, count: int | None = None, timeout: float = 10.0
) -> list[Interrupt]:
    """Asserts that these interrupts arrive, and no others until the last of them and every earlier signal has arrived.

    Takes all interrupts that have arrived. Signals from before the deadline count. KVM has no counts: there, each
    vector has arrived at least once.

    Args:
        partition: a simulated partition, or one of KVM.
        expected: a vector, an `MsiRoute` or an `Interrupt`, whose fields may be None to match anything; a mapping of
            such to counts; or several of them, each once.
        count: how many of a single one are expected. None: one.
        timeout: how long to wait for them, in seconds.

    Returns:
        The interrupts in the order of their arrival.

    Raises:
        AssertionError: some are missing, or others arrived. The message says which, and what did arrive.
        TypeError: the partition does not report what arrives (mshv); or an argument is invalid.
        ValueError: an argument is invalid.
    """
    __tracebackhide__ = True  # pytest then shows the line of the test that failed, not this function
    telling = _telling(partition)
    counted = not isinstance(telling, KvmPartition)
    wanted = _interrupts.expected_interrupts(expected, count)
    if not counted:
        wanted = Counter(dict.fromkeys(wanted, 1))
    try:
        found = _interrupts.wait(telling, wanted, timeout, counted=counted, settle=telling.settle)
    except MissingInterruptError as missing:
        raise AssertionError(str(missing)) from None
    telling.settle()
    if surplus := telling.take_interrupts():
        raise AssertionError(
            f"not expected: {_interrupts.listed(Counter(surplus), counted=counted)}; expected "
            f"{_interrupts.listed(wanted, counted=counted)}, which arrived"
        )
    return found


def expect_nothing(partition: Partition) -> None:
    """Asserts that no interrupt waits to be taken, and that none is on its way.

    Signals before this call are waited for, so there is no need to sleep first. Takes what has arrived.

    Args:
        partition: a simulated partition, or one of KVM.

    Raises:
        AssertionError: interrupts have arrived. The message says which.
        TypeError: the partition does not report what arrives (mshv).
    """
    __tracebackhide__ = True
    telling = _telling(partition)
    telling.settle()
    if arrived := telling.take_interrupts():
        counted = not isinstance(telling, KvmPartition)
        raise AssertionError(f"expected no interrupt; arrived: {_interrupts.listed(Counter(arrived), counted=counted)}")


@contextmanager
def failing(
    partition: SimulatedPartition,
    call: Literal[
        "set_msi_routing",
        "assign_irqfd",
        "deassign_irqfd",
        "assign_ioeventfd",
        "deassign_ioeventfd",
        "signal_msi",
    ],
    errno: int,
    *,
    after: int = 0,
    times: int = 1,
) -> Iterator[None]:
    """Makes calls into a simulated kernel fail within a `with` block, and asserts that they were made.

    A fault that no call meets tests nothing. It does not outlive the block.

    Args:
        partition: the simulated partition.
        call: the call to fail; see `SimulatedPartition.fail()`.
        errno: the error number, from the `errno` module.
        after: how many calls succeed first.
        times: how many calls fail then.

    Raises:
        AssertionError: the block made fewer such calls.
        ValueError, OverflowError, TypeError: an argument is invalid.
    """
    if not isinstance(partition, SimulatedPartition):
        raise TypeError(f"only a simulated kernel fails on request; {partition!r} is none: use simulated_partition")
    before = partition.stats().failures
    partition.fail(call, errno, after=after, times=times)
    try:
        yield
    finally:
        # A closed one has forgotten its faults, but not how many calls failed.
        made = partition.stats().failures - before
        left = max(0, times - made) if partition.closed else partition._clear_faults(call)  # noqa: SLF001
    if left:
        raise AssertionError(f"{left} of {times} faults of {call} met no call: the block made too few of them")


def _telling(partition: Partition) -> SimulatedPartition | KvmPartition:
    if not isinstance(partition, SimulatedPartition | KvmPartition):
        raise TypeError(
            f"{partition!r} does not tell which interrupts arrive; give a simulated partition or one of KVM"
        )
    return partition
