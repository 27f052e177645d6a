"""Rule 6: calls wait for locks and ioctls detached from the interpreter, and Ctrl-C ends blocking waits."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from driver import DATA, ENTRY, Driver
from modes import in_both_modes
from mshv_irqfd import ClosedError, Interrupt, IrqFdRoute, KvmPartition, Partition, SimulatedPartition
from mshv_irqfd.testing import patience
from support import msi, refusal, still_works

if TYPE_CHECKING:
    from collections.abc import Iterator

    from backends import Backend, Guest
    from mshv_irqfd import MsixTable


@pytest.fixture
def unforced() -> Iterator[None]:
    """Threads keep the interpreter until they release it themselves."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    yield
    sys.setswitchinterval(before)


def runs_meanwhile(operation: Callable[[int], object]) -> bool:
    """Whether another thread runs Python during an operation, in one of many tries."""
    inside, seen, over = threading.Event(), threading.Event(), threading.Event()

    def watch() -> None:
        while not (seen.is_set() or over.is_set()):
            if inside.is_set():
                seen.set()
            time.sleep(0)  # releases the interpreter

    watcher = threading.Thread(target=watch)
    watcher.start()
    deadline, turn = time.monotonic() + patience() / 2, 0
    while not seen.is_set() and time.monotonic() < deadline:
        inside.set()
        operation(turn)
        inside.clear()
        turn += 1
        time.sleep(0)
    over.set()
    watcher.join()
    return seen.is_set()


LONG: dict[str, Callable[[Partition, list[IrqFdRoute], int], object]] = {
    "set_msi": lambda _, routes, turn: routes[0].set_msi(msi(0x51 + turn % 2)),
    "mask": lambda _, routes, turn: routes[0].mask() if turn % 2 else routes[0].unmask(),
    "clear_msi": lambda _, routes, turn: routes[0].clear_msi() if turn % 2 else routes[0].set_msi(msi(0x51)),
    "consume_pending": lambda _, routes, __: routes[0].consume_pending(),
    "new_irqfd_route": lambda partition, _, __: partition.new_irqfd_route().close(),
    "routing_table": lambda partition, _, __: partition.routing_table(),
    "gsi_state": lambda partition, _, __: partition.gsi_state(24),
    "vps": lambda partition, _, __: partition.vps,
    "stats": lambda partition, _, __: partition.stats(),
    "ioeventfd": lambda partition, _, __: partition.ioeventfd(0xD0000000, 4).close(),
    # Refused for its destination, under the lock.
    "signal_msi": lambda partition, _, __: refusal(lambda: partition.signal_msi(msi(0x41, 9))),
}


@pytest.mark.parametrize("operation", LONG.values(), ids=LONG)
@in_both_modes
@pytest.mark.usefixtures("unforced")
def test_the_interpreter_runs_on_while_a_call_waits_for_the_kernel_or_a_lock(
    guest: Guest, operation: Callable[[Partition, list[IrqFdRoute], int], object]
) -> None:
    routes = [guest.partition.new_irqfd_route() for _ in range(64)]
    stop = threading.Event()

    def push() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            with guest.partition.batch() as batch:
                for route in routes[1:]:
                    batch.set_msi(route, msi(0x41 + turn % 2))
            time.sleep(0)

    pusher = threading.Thread(target=push)
    pusher.start()
    try:
        assert runs_meanwhile(lambda turn: operation(guest.partition, routes, turn))
    finally:
        stop.set()
        pusher.join()
    for route in routes:
        route.close()


LONG_OF_A_TABLE: dict[str, Callable[[MsixTable, int], object]] = {
    "read_table": lambda table, _: table.read_table(0, 4),
    "write_table": lambda table, turn: table.write_table(ENTRY + DATA, bytes([turn % 2, 0, 0, 0])),
    "message_control": lambda table, _: table.message_control,
    "write_message_control": lambda table, _: table.write_message_control(0, b"\0"),
    "capability": lambda table, _: table.capability(table_bar=0, table_offset=0, pba_bar=1, pba_offset=0),
    "faults": lambda table, _: table.faults(),
    "retry_faults": lambda table, _: table.retry_faults(),
    "masked": lambda table, _: table.vectors[0].masked,
    "event": lambda table, _: table.vectors[1].event,
    "reset": lambda table, _: table.reset(),
}


@pytest.mark.parametrize("operation", LONG_OF_A_TABLE.values(), ids=LONG_OF_A_TABLE)
@pytest.mark.usefixtures("unforced")
def test_the_interpreter_runs_on_while_a_call_waits_for_the_registers_of_a_table(
    guest: Guest, operation: Callable[[MsixTable, int], object]
) -> None:
    stop = threading.Event()
    with Driver(guest, 64) as driver:

        def enable() -> None:
            turn = 0
            while not stop.is_set():
                turn += 1
                driver.bring_up(*(msi(0x41 + turn % 2) for _ in range(64)))
                driver.control(0)
                time.sleep(0)

        enabler = threading.Thread(target=enable)
        enabler.start()
        try:
            assert runs_meanwhile(lambda turn: operation(driver.table, turn))
        finally:
            stop.set()
            enabler.join()


@in_both_modes
@pytest.mark.usefixtures("unforced")
def test_the_interpreter_runs_on_while_a_batch_is_committed(guest: Guest) -> None:
    routes = [guest.partition.new_irqfd_route() for _ in range(200)]

    def commit(turn: int) -> None:
        with guest.partition.batch() as batch:
            for route in routes:
                batch.set_msi(route, msi(0x41 + turn % 2))

    # Only the commit releases the interpreter: the calls of the body wait for nothing.
    assert runs_meanwhile(commit)
    for route in routes:
        route.close()


@pytest.mark.usefixtures("unforced")
def test_the_interpreter_runs_on_while_a_partition_is_opened_and_closed(backend: Backend) -> None:
    assert runs_meanwhile(lambda _: backend.open().close())


def observable(guest: Guest) -> SimulatedPartition | KvmPartition:
    """The partition of a guest that takes no interrupts itself."""
    if not isinstance(guest.partition, SimulatedPartition | KvmPartition):
        pytest.skip(f"{guest.partition.backend} does not report interrupts")
    guest.stop()
    return guest.partition


def taken(partition: SimulatedPartition | KvmPartition, timeout: float) -> list[Interrupt]:
    return partition.take_interrupts(timeout)


def expected(partition: SimulatedPartition | KvmPartition, timeout: float) -> list[Interrupt]:
    return partition.wait_interrupts(0x41, timeout=timeout)


Wait = Callable[[SimulatedPartition | KvmPartition, float], list[Interrupt]]
by_each_wait = pytest.mark.parametrize("wait", [pytest.param(taken, id=pytest.HIDDEN_PARAM), expected])
"""Runs a test with each wait for interrupts."""


@by_each_wait
@pytest.mark.usefixtures("unforced")
def test_waiting_for_interrupts_lets_other_threads_signal(guest: Guest, wait: Wait) -> None:
    partition, found = observable(guest), list[Interrupt]()
    with partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        waiter = threading.Thread(target=lambda: found.extend(wait(partition, patience())))
        waiter.start()
        route.signal()
        waiter.join()
    assert [interrupt.vector for interrupt in found] == [0x41]


@by_each_wait
def test_closing_a_partition_ends_the_wait_for_its_interrupts(guest: Guest, wait: Wait) -> None:
    partition, ended = observable(guest), list[str]()
    began = threading.Event()

    def run() -> None:
        began.set()
        try:
            wait(partition, 10 * patience())
        except ClosedError:
            ended.append("closed")

    waiter = threading.Thread(target=run)
    waiter.start()
    began.wait()
    partition.close()
    waiter.join(patience())
    assert ended == ["closed"]


def sleeps(thread: threading.Thread) -> bool:
    """Whether a thread waits in the kernel; see proc(5)."""
    stat = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
    return stat.rpartition(") ")[2].startswith("S")


@by_each_wait
def test_ctrl_c_ends_the_wait_for_interrupts(guest: Guest, wait: Wait) -> None:
    partition, main = observable(guest), threading.main_thread()
    number = main.ident
    assert number is not None
    began, over = threading.Event(), threading.Event()

    def interrupt() -> None:
        began.wait()
        # It is to find the thread in its wait, not on the way there.
        rests = 0
        while rests < 3:
            time.sleep(0.01)
            rests = rests + 1 if sleeps(main) else 0
        signal.pthread_kill(number, signal.SIGINT)
        # If Ctrl-C fails to end the wait, this does, before the timeout.
        if not over.wait(patience() / 2):
            partition.close()

    def hear(*_: object) -> None:
        # If it came too late, it would end the whole test run.
        if not partition.closed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, hear)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            began.set()
            wait(partition, patience())
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGINT, before)
    still_works(guest)
