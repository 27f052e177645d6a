"""Small tools that several tests need: forked children, other interpreters, counts of what a process holds."""

from __future__ import annotations

import gc
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mshv_irqfd import MsiRoute, PartitionStats, RoutingEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from backends import Backend, Guest
    from mshv_irqfd import IrqFdRoute, Partition

T = TypeVar("T")

PATIENCE = float(os.environ.get("MSHV_IRQFD_PATIENCE", "60"))
"""Seconds after which something that must happen is taken not to happen: far beyond what a loaded machine needs. Less
where it is known not to happen (tools/break_rules.py)."""


def msi(vector: int, apic_id: int = 0) -> MsiRoute:
    return MsiRoute.fixed(vector, apic_id)


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits until a condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"it did not come about that {what}"
        time.sleep(0.0005)


def open_files() -> list[str]:
    """What this process has open, by descriptor."""
    found = []
    for fd in sorted(Path("/proc/self/fd").iterdir(), key=lambda path: int(path.name)):
        try:
            found.append(f"{fd.name}: {fd.readlink()}")
        except FileNotFoundError:
            continue  # the listing's own
    return found


def close_behind_its_back(fd: int) -> None:
    """Closes a descriptor whose number somebody still has; whoever makes the next one gets it."""
    os.close(fd)


def native_threads() -> int:
    """How many threads the kernel knows in this process."""
    return len(list(Path("/proc/self/task").iterdir()))


def still_works(guest: Guest) -> None:
    """Shows that a route can be made, armed, moved, masked and closed, and that its interrupts arrive."""
    guest.receives_nothing()
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0xE1))
        route.signal()
        guest.receives(msi(0xE1))
        route.set_msi(msi(0xE2))
        route.mask()
        route.signal()
        guest.receives_nothing()
        route.unmask()
        guest.receives(msi(0xE2))


@contextmanager
def pushing(partition: Partition, routes: list[IrqFdRoute]) -> Iterator[None]:
    """Two threads of which one is in a push at nearly any time."""
    stop, errors = threading.Event(), list[BaseException]()

    def push() -> None:
        turn = 0
        try:
            while not stop.is_set():
                turn += 1
                with partition.batch() as batch:
                    for route in routes:
                        batch.set_msi(route, msi(0x42 + turn % 2))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=push) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []


def fork() -> int:
    """Forks although threads run: what becomes of the child then is what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def in_child(function: Callable[[], T]) -> T:
    """What a function returns in a forked child. A child that hangs is a failure, and so is one that is killed."""
    read, write = os.pipe()
    child = fork()
    if child == 0:
        status = 1
        try:
            os.close(read)
            try:
                answer = pickle.dumps((True, function()))
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            with os.fdopen(write, "wb") as pipe:
                pipe.write(answer)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb", buffering=0) as pipe:
        if not select.select([pipe], [], [], PATIENCE)[0]:
            os.kill(child, signal.SIGKILL)
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the child hung or was killed"
    fine, result = pickle.loads(answer)
    assert fine, f"in the child:\n{result}"
    outcome: T = result
    return outcome


def refusal(function: Callable[[], object]) -> str:
    """The name of the exception that a function raises; "none" if it raises none. Can leave a child."""
    try:
        function()
    except Exception as error:
        return type(error).__name__
    return "none"


@contextmanager
def recorded() -> Iterator[list[tuple[type[Warning], str]]]:
    """The warnings given, without the objects that they are about: a recorded ResourceWarning would revive its own."""
    told: list[tuple[type[Warning], str]] = []

    def show(message: Warning | str, category: type[Warning], *_: object) -> None:
        told.append((category, str(message)))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # type: ignore[assignment]
        yield told


def run_python(code: str, *options: str, under: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs code in an interpreter of its own, started by another program if one is named."""
    return subprocess.run(
        [*under, sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False
    )


@contextmanager
def an_owner(backend: Backend, *words: object, fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """A process that owns a partition; `owner.py` says what it does."""
    command = [sys.executable, "-X", "dev", str(Path(__file__).with_name("owner.py")), backend.name, *map(str, words)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, pass_fds=fds) as owner:
        try:
            yield owner
        finally:
            owner.kill()


def collect() -> None:
    """Finalizes what nobody refers to."""
    gc.collect()


def table_entry(gsi: int, route: MsiRoute) -> RoutingEntry:
    return RoutingEntry(gsi, route.address, route.data)


class Delta:
    """What a block added to the counts of a partition."""

    stats: PartitionStats


@contextmanager
def counting(partition: Partition) -> Iterator[Delta]:
    before, delta = partition.stats(), Delta()
    yield delta
    delta.stats = PartitionStats(*(new - old for new, old in zip(partition.stats(), before, strict=True)))
