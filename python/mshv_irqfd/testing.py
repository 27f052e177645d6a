"""Helpers for the tests of device models: what arrived, by deadlines instead of sleeps; faults; available backends.

They need no test framework. With pytest there are fixtures too (`irqfd_partition`, `simulated_partition` and
`irqfd_backend`): the package installs a plugin for it.

The environment tells them of a slow machine and of what it must have: see `patience()` and `required_backends()`.

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

import os
from collections import Counter
from contextlib import contextmanager
from math import inf
from time import monotonic, sleep
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

from mshv_irqfd import _interrupts
from mshv_irqfd.errors import ClosedError, HypervisorUnavailableError, MissingInterruptError
from mshv_irqfd.handles import KvmPartition, Partition, SimulatedPartition, open_partition
from mshv_irqfd.values import Interrupt, SimulatedCall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mshv_irqfd._interrupts import Expected

__all__ = [
    "BACKENDS",
    "InterruptSource",
    "SimulatedCall",
    "available_backends",
    "expect",
    "expect_nothing",
    "failing",
    "patience",
    "required_backends",
    "unavailable",
    "until",
]

BACKENDS = ("simulated", "kvm", "mshv")
"""The names of all backends."""

_T = TypeVar("_T")
_PATIENCE = "MSHV_IRQFD_PATIENCE"
_REQUIRED = "MSHV_IRQFD_BACKENDS"
_PAUSE = 0.0005
"""Seconds between two looks at something that nobody can wait for."""

# Each helper that asserts sets __tracebackhide__: pytest then shows the line of the test that failed, not the helper.


def patience() -> float:
    """How long the helpers wait for something that must happen, in seconds, unless a call says otherwise.

    10, or MSHV_IRQFD_PATIENCE of the environment. It is a deadline: a longer one costs nothing where the tests pass.

    Raises:
        ValueError: MSHV_IRQFD_PATIENCE is no number of seconds.
    """
    text = os.environ.get(_PATIENCE, "").strip()
    try:
        seconds = float(text or 10)
    except ValueError:
        seconds = inf
    if not 0 <= seconds < inf:
        raise ValueError(f"{_PATIENCE}={text} is not a valid number of seconds; give a finite number, 0 or more")
    return seconds


def until(condition: Callable[[], _T], what: str, *, timeout: float | None = None) -> _T:
    """Waits until a condition holds, and asserts that it does by the deadline.

    Args:
        condition: a function that returns something true once it holds. It is called until then.
        what: what is waited for, as a sentence for the message: "the queue is empty".
        timeout: how long to wait, in seconds. None: `patience()`.

    Returns:
        What the condition returned.

    Raises:
        AssertionError: it does not hold at the deadline.
        ValueError: the timeout is invalid.

    Example:
        >>> arrived = iter([[], [], ["a packet"]])
        >>> until(lambda: next(arrived), "a packet has arrived")
        ['a packet']
    """
    __tracebackhide__ = True
    seconds = _interrupts.checked_timeout(patience() if timeout is None else timeout)
    deadline = monotonic() + seconds
    while True:
        # The last look is after the deadline: a thread that was not run for long has not waited in vain.
        late = monotonic() >= deadline
        if outcome := condition():
            return outcome
        if late:
            raise AssertionError(f"timed out after {seconds:g} s before {what}")
        sleep(_PAUSE)


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


def required_backends() -> list[str]:
    """The backends that MSHV_IRQFD_BACKENDS of the environment names, with commas between: tests are to run on these.

    Where one is missing, a test of it must fail: it is not to be left out in silence. Empty if none is named.

    Raises:
        ValueError: no backend has a name in it.
    """
    names = [name.strip() for name in os.environ.get(_REQUIRED, "").split(",") if name.strip()]
    if unknown := [name for name in names if name not in BACKENDS]:
        raise ValueError(f"{_REQUIRED} names {', '.join(unknown)}; the backends are {', '.join(BACKENDS)}")
    return list(dict.fromkeys(names))


@runtime_checkable
class InterruptSource(Protocol):
    """Whatever tells which interrupts have arrived: a simulated partition, one of KVM, or a guest of your own.

    A guest that runs takes its interrupts itself, so the partition can't tell. Let the guest record them, and give
    `expect()` and `expect_nothing()` an object that reads the record.
    """

    def settle(self) -> None:
        """Returns once the interrupt of every signal before this call is among those to take."""

    def take_interrupts(self) -> list[Interrupt]:
        """Takes the interrupts that have arrived, in order. A field that the guest can't tell is None."""


def expect(
    source: Partition | InterruptSource,
    expected: Expected,
    *,
    count: int | None = None,
    timeout: float | None = None,
    merged: bool | None = None,
) -> list[Interrupt]:
    """Asserts that these interrupts arrive, and no others until the last of them and every earlier signal has arrived.

    Takes all interrupts that have arrived. Signals from before the deadline count. A partition whose interrupts are
    missing keeps what did arrive.

    A local APIC has one bit for each vector, so signals that arrive faster than the guest takes their interrupts raise
    one for all. So KVM has no exact counts: n expected ones are then 1 to n.

    Args:
        source: a simulated partition, one of KVM, or a guest that reports them.
        expected: a vector, an `MsiRoute` or an `Interrupt`, whose fields may be None to match anything; a mapping of
            such to counts; or several of them, each once.
        count: how many of a single one are expected. None: one.
        timeout: how long to wait for them, in seconds. None: `patience()`.
        merged: whether equal interrupts may have become one. None: on a partition of KVM they may, elsewhere not.

    Returns:
        The interrupts in the order of their arrival.

    Raises:
        AssertionError: some are missing, or others arrived. The message says which, what did arrive, and which routes
            of a partition have signals that wait.
        TypeError: the partition does not report what arrives (mshv); or an argument is invalid.
        ValueError: an argument is invalid.
    """
    __tracebackhide__ = True
    telling, counted = _telling(source), not isinstance(source, KvmPartition)
    wanted = _interrupts.expected_interrupts(expected, count)
    least = Counter(dict.fromkeys(wanted, 1)) if merged or (merged is None and not counted) else wanted
    seconds = _interrupts.checked_timeout(patience() if timeout is None else timeout)
    arrived = list[Interrupt]()
    try:
        if isinstance(telling, SimulatedPartition | KvmPartition):
            arrived = _interrupts.wait(telling, least, seconds, counted=counted, settle=telling.settle)
        else:
            arrived = _recorded(telling, least, seconds)
    except MissingInterruptError as missing:
        raise AssertionError(str(missing) + _waiting(source)) from None
    telling.settle()
    arrived += telling.take_interrupts()
    found = dict.fromkeys(_interrupts.matched(wanted, arrived)[0])
    if surplus := [one for index, one in enumerate(arrived) if index not in found]:
        raise AssertionError(
            f"not expected: {_interrupts.listed(Counter(surplus), counted=counted)}; expected "
            f"{_interrupts.listed(wanted, counted=counted)}, which arrived"
        )
    return [arrived[index] for index in found]


def expect_nothing(source: Partition | InterruptSource) -> None:
    """Asserts that no interrupt waits to be taken, and that none is on its way.

    Signals before this call are waited for, so there is no need to sleep first. Takes what has arrived.

    Args:
        source: a simulated partition, one of KVM, or a guest that reports them.

    Raises:
        AssertionError: interrupts have arrived. The message says which.
        TypeError: the partition does not report what arrives (mshv).
    """
    __tracebackhide__ = True
    telling = _telling(source)
    telling.settle()
    if arrived := telling.take_interrupts():
        counted = not isinstance(telling, KvmPartition)
        raise AssertionError(f"expected no interrupt; arrived: {_interrupts.listed(Counter(arrived), counted=counted)}")


@contextmanager
def failing(
    partition: SimulatedPartition,
    call: SimulatedCall,
    errno: int,
    *,
    after: int = 0,
    times: int = 1,
) -> Iterator[None]:
    """Makes calls into a simulated kernel fail within a `with` block, and asserts that they were made.

    A fault that no call meets tests nothing. It does not outlive the block.

    Args:
        partition: the simulated partition.
        call: the call to fail, as in `SimulatedPartition.fail()`.
        errno: the error number, from the `errno` module.
        after: how many calls succeed first.
        times: how many calls fail then.

    Raises:
        AssertionError: the block made fewer such calls.
        ValueError, OverflowError, TypeError: an argument is invalid.
    """
    __tracebackhide__ = True
    if not isinstance(partition, SimulatedPartition):
        raise TypeError(
            f'only a simulated kernel fails on request; {partition!r} is none: use open_partition("simulated"), or the '
            "fixture simulated_partition"
        )
    before = partition.stats().failures
    partition.fail(call, errno, after=after, times=times)
    try:
        yield
    finally:
        # A closed one has forgotten its faults, but not how many calls failed.
        made = partition.stats().failures - before
        left = max(0, times - made) if partition.closed else partition._clear_faults(call)  # noqa: SLF001
    if left:
        rare = "; a push is made only for a message that the kernel's table lacks" if call == "set_msi_routing" else ""
        raise AssertionError(f"{left} of {times} faults of {call} met no call: the block made too few of them{rare}")


def _telling(source: Partition | InterruptSource) -> InterruptSource:
    __tracebackhide__ = True
    if not isinstance(source, InterruptSource):
        raise TypeError(
            f"{source!r} does not report which interrupts arrive; give a simulated partition, one of KVM, or a "
            "guest that does"
        )
    return source


def _recorded(source: InterruptSource, least: Counter[Interrupt], seconds: float) -> list[Interrupt]:
    """Takes the interrupts of a guest until the least are among them."""
    arrived, deadline, settled = source.take_interrupts(), monotonic() + seconds, False
    while missing := _interrupts.matched(least, arrived)[1]:
        if settled:
            _interrupts.raise_missing(seconds, missing, least, arrived)
        if monotonic() < deadline:
            sleep(_PAUSE)
        else:
            source.settle()
            settled = True
        arrived += source.take_interrupts()
    return arrived


def _waiting(source: Partition | InterruptSource) -> str:
    """The routes of a partition whose signals wait, with the reason, for the end of a message."""
    waiting = []
    for route in source.routes if isinstance(source, Partition) else ():
        try:
            if route.pending:
                reason = "masked" if route.masked else "it has no MSI" if route.msi is None else route.state.name
                waiting.append(f"GSI {route.gsi} ({reason})")
        except ClosedError:
            continue  # another thread closed it
    return f"; signals wait on {', '.join(waiting)}" if waiting else ""
