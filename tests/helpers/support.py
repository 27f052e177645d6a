"""Small tools for several tests: forked children, other interpreters, open descriptors, counts of a partition."""

from __future__ import annotations

import gc
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mshv_irqfd import MsiRoute, PartitionStats, RoutingEntry
from mshv_irqfd.testing import patience

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from backends import Backend, Guest
    from mshv_irqfd import IrqFdRoute, Partition

T = TypeVar("T")

NOTHING = PartitionStats(*[0] * len(PartitionStats._fields))
"""The counts of a partition that has done nothing."""

MANY = 65
"""More routes than a partition of KVM may have for a push to be cheaper than a move."""


def msi(vector: int, apic_id: int = 0) -> MsiRoute:
    return MsiRoute.fixed(vector, apic_id)


def rare(vector: int) -> MsiRoute:
    """A message with the redirection hint: pushes for the messages of `msi` load none like it."""
    return MsiRoute(0xFEE00008, vector)


def unique(number: int) -> MsiRoute:
    """An NMI. It has no vector to vary, so pushes for others load none, and one for it loads none."""
    return MsiRoute(0xFEE00000, 0x400 | number)


def open_files() -> list[str]:
    """The open files of this process, by descriptor."""
    found = []
    for fd in sorted(Path("/proc/self/fd").iterdir(), key=lambda path: int(path.name)):
        try:
            found.append(f"{fd.name}: {fd.readlink()}")
        except FileNotFoundError:
            continue  # the listing's own
    return found


def close_as_someone_else(fd: int) -> None:
    """Closes a descriptor that the package still has. The next new descriptor gets its number."""
    os.close(fd)


def native_threads() -> int:
    """The number of threads of this process, as the kernel counts them."""
    return len(list(Path("/proc/self/task").iterdir()))


def still_works(guest: Guest) -> None:
    """Asserts that a new route can be armed, retargeted, masked and closed, and that its interrupts arrive."""
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
def changing(partition: Partition, routes: list[IrqFdRoute]) -> Iterator[None]:
    """Runs two threads that change routes all the time: each change is a push, or moves them if messages are loaded."""
    stop, errors = threading.Event(), list[BaseException]()

    def change() -> None:
        turn = 0
        try:
            while not stop.is_set():
                turn += 1
                with partition.batch() as batch:
                    for route in routes:
                        batch.set_msi(route, msi(0x42 + turn % 2))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=change) for _ in range(2)]
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
    """Forks, even while other threads run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def in_child(function: Callable[[], T]) -> T:
    """Runs a function in a forked child and returns its result. Fails if the child hangs or is killed."""
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
        if not select.select([pipe], [], [], patience())[0]:
            os.kill(child, signal.SIGKILL)
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the child hung or was killed"
    fine, result = pickle.loads(answer)
    assert fine, f"in the child:\n{result}"
    outcome: T = result
    return outcome


def refusal(function: Callable[[], object]) -> str:
    """The name of the exception that a function raises, or "none". A string, so that a child can send it."""
    try:
        function()
    except Exception as error:
        return type(error).__name__
    return "none"


@contextmanager
def recorded() -> Iterator[list[tuple[type[Warning], str]]]:
    """Records warnings without their objects: a recorded ResourceWarning would revive its own."""
    told: list[tuple[type[Warning], str]] = []

    def show(message: Warning | str, category: type[Warning], *_: object) -> None:
        told.append((category, str(message)))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # type: ignore[assignment]
        yield told


def run_python(code: str, *options: str, under: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs code in an interpreter of its own, which the program `under` starts if one is named."""
    return subprocess.run(
        [*under, sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=patience(), check=False
    )


@contextmanager
def an_owner(backend: Backend, *words: object, fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """Starts a process that owns a partition; `owner.py` lists the things that it can do."""
    command = [sys.executable, "-X", "dev", str(Path(__file__).with_name("owner.py")), backend.name, *map(str, words)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, pass_fds=fds) as owner:
        try:
            yield owner
        finally:
            owner.kill()


def collect() -> None:
    """Finalizes all unreachable objects."""
    gc.collect()


def places(partition: Partition, routes: list[IrqFdRoute]) -> dict[int, MsiRoute | None]:
    """The message that the kernel's table has where each armed route is armed, by the route's own GSI."""
    table = {entry.gsi: entry for entry in partition.routing_table()}
    at = {route.gsi: table.get(route.armed_gsi or 0) for route in routes if route.armed}
    return {gsi: MsiRoute(entry.address, entry.data) if entry else None for gsi, entry in at.items()}


def messages(partition: Partition) -> dict[int, MsiRoute]:
    """The kernel's table, by GSI."""
    return {entry.gsi: MsiRoute(entry.address, entry.data) for entry in partition.routing_table()}


def spare_entries(partition: Partition) -> dict[int, MsiRoute]:
    """The entries of the kernel's table at GSIs that are never handed out."""
    return {gsi: message for gsi, message in messages(partition).items() if gsi not in partition.gsis}


def table_entry(gsi: int, route: MsiRoute) -> RoutingEntry:
    return RoutingEntry(gsi, route.address, route.data)


class Delta:
    """The change of a partition's statistics over a block."""

    stats: PartitionStats


@contextmanager
def counting(partition: Partition) -> Iterator[Delta]:
    before, delta = partition.stats(), Delta()
    yield delta
    delta.stats = PartitionStats(*(new - old for new, old in zip(partition.stats(), before, strict=True)))
