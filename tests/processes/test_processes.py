"""Processes: children that end in every way, programs started by the owner, and owners that are killed."""

from __future__ import annotations

import multiprocessing
import os
import re
import select
import signal
import subprocess
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from backends import Backend, Guest, MshvGuest
from mshv_irqfd import EventFd, ForkedError, IrqFdRoute, Partition
from mshv_irqfd.testing import patience, until
from support import an_owner, collect, fork, msi, open_files, recorded, refusal, still_works

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection
    from pathlib import Path

pytestmark = pytest.mark.thread_unsafe(reason="a child has one thread, and the half-done work of the others")


def told(backend: Backend, *words: object) -> tuple[list[str], list[str]]:
    """Runs an owner. Returns the lines that it prints, and its errors and warnings."""
    with an_owner(backend, *words) as owner:
        out, complaints = owner.communicate(timeout=2 * patience())
    assert owner.returncode == 0, complaints
    harmful = re.compile(r"^(\S*Error\b|.*(panicked|unclosed|Exception ignored|Fatal|abort|Warning))")
    return out.splitlines(), [line.partition(":")[0] for line in complaints.splitlines() if harmful.match(line)]


FORKED = "mshv_irqfd.errors.ForkedError"
AT_EXIT, LATE = "atexit ForkedError", "late ForkedError"


@pytest.mark.parametrize(
    ("end", "statuses", "shut_down", "complaints"),
    [
        # A batch whose body ends without an error is committed, which a child may not do.
        ("end", (0, 0, 0, 1), True, [FORKED]),
        ("sys.exit", (3, 3, 3, 3), True, []),
        ("exception", (1, 1, 1, 1), True, ["KeyError"] * 4),
        ("os._exit", (4, 4, 4, 4), False, []),
        ("SIGTERM", (-signal.SIGTERM,) * 4, False, []),
        ("SIGKILL", (-signal.SIGKILL,) * 4, False, []),
    ],
)
def test_a_child_ends_in_any_way_and_its_parents_interrupts_still_arrive(
    backend: Backend, end: str, statuses: tuple[int, ...], *, shut_down: bool, complaints: list[str]
) -> None:
    expected = []
    for place, status in zip(("globals", "cycle", "with", "batch"), statuses, strict=True):
        expected += [AT_EXIT] * shut_down + [LATE] * (shut_down and place == "globals") + [f"{place} {status}"]
    assert told(backend, "children", end) == (expected, complaints)


@pytest.mark.parametrize(
    ("what", "end", "status"),
    [
        ("pushing", "end", 0),
        ("pushing", "exception", 1),
        ("pushing", "os._exit", 4),
        ("pushing", "SIGKILL", -9),
        ("moving", "end", 0),
        ("moving", "SIGKILL", -9),
    ],
)
def test_a_child_forked_during_a_change_ends_in_any_way_and_its_parents_interrupts_still_arrive(
    backend: Backend, what: str, end: str, status: int
) -> None:
    shut_down = [AT_EXIT, LATE] if end in {"end", "exception"} else []
    complaints = ["KeyError"] if end == "exception" else []
    assert told(backend, what, end) == ([*shut_down, f"{what} {status}"], complaints)


# The objects that children of multiprocessing inherit. DROPPED holds the only references to its own.
HELD: list[tuple[Partition, IrqFdRoute]] = []
DROPPED: list[Any] = []
FORK = multiprocessing.get_context("fork")


def use_close_and_collect(answer: Connection) -> None:
    partition, route = HELD[0]
    uses: tuple[Callable[[], object], ...] = (route.mask, route.close, partition.close, partition.batch)
    seen = [refusal(use) for use in uses]
    with recorded() as warned:
        files = len(open_files())
        DROPPED.clear()
        collect()
    answer.send((seen, warned, files - len(open_files())))


def use_in_a_pool(_: int) -> list[str]:
    partition, route = HELD[0]
    return [refusal(partition.routing_table), refusal(route.unmask)]


def raise_in_with() -> None:
    partition, route = HELD[0]
    with partition, route:
        raise KeyError("ours")


@pytest.fixture
def route(guest: Guest) -> Iterator[IrqFdRoute]:
    """An armed route that children of multiprocessing inherit."""
    with guest.partition.new_irqfd_route() as route, warnings.catch_warnings():
        # Python warns of a fork beside threads, which this test makes on purpose.
        warnings.simplefilter("ignore", DeprecationWarning)
        route.set_msi(msi(0x41))
        HELD.append((guest.partition, route))
        yield route
        HELD.clear()
        assert route.armed


def cycle(backend: Backend) -> list[Any]:
    partition = backend.open()
    ring: list[object] = [partition, partition.new_irqfd_route()]
    ring.append(ring)
    return ring


def interrupts_flow(guest: Guest, route: IrqFdRoute, going: Callable[[], bool] = lambda: False) -> None:
    """Checks that each signal arrives for as long as `going` returns True, and three times more."""
    more = 3
    while going() or (more := more - 1) >= 0:
        route.signal()
        guest.gets(msi(0x41))


def test_a_multiprocessing_child_uses_closes_and_collects_inherited_objects(
    backend: Backend, guest: Guest, route: IrqFdRoute
) -> None:
    DROPPED[:] = cycle(backend)
    DROPPED[1].set_msi(msi(0x42))
    answer, there = FORK.Pipe(duplex=False)
    process = FORK.Process(target=use_close_and_collect, args=(there,))
    process.start()
    interrupts_flow(guest, route, process.is_alive)
    process.join()
    seen, warned, closed = answer.recv()
    assert (process.exitcode, seen, warned) == (0, [ForkedError.__name__] * 4, [])
    assert closed > 0
    other = backend.guest(DROPPED[0])
    DROPPED[1].signal()
    other.receives(msi(0x42))
    other.close()
    DROPPED.clear()
    answer.close()
    there.close()


def test_a_multiprocessing_child_raises_inside_with(
    guest: Guest, route: IrqFdRoute, capfd: pytest.CaptureFixture[str]
) -> None:
    process = FORK.Process(target=raise_in_with)
    process.start()
    interrupts_flow(guest, route, process.is_alive)
    process.join()
    assert process.exitcode == 1
    assert re.findall(r"^\S*Error\b.*|panicked", capfd.readouterr().err, re.MULTILINE) == ["KeyError: 'ours'"]


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_a_multiprocessing_child_is_ended_by_its_parent(guest: Guest, route: IrqFdRoute, how: str) -> None:
    process = FORK.Process(target=signal.pause)
    process.start()
    interrupts_flow(guest, route)
    getattr(process, how)()
    interrupts_flow(guest, route, process.is_alive)
    process.join()
    assert process.exitcode == -(signal.SIGTERM if how == "terminate" else signal.SIGKILL)


@pytest.mark.parametrize("how", ["close", "terminate"])
def test_the_workers_of_a_pool_come_and_go(guest: Guest, route: IrqFdRoute, how: str) -> None:
    with FORK.Pool(2, maxtasksperchild=1) as pool:
        answers = pool.map_async(use_in_a_pool, range(6), chunksize=1)
        interrupts_flow(guest, route, lambda: not answers.ready())
        assert answers.get() == [[ForkedError.__name__] * 2] * 6
        getattr(pool, how)()
        pool.join()
    interrupts_flow(guest, route)


LIST = ["/bin/ls", "-l", "/proc/self/fd"]


def by_subprocess(out: int) -> None:
    subprocess.run(LIST, stdout=out, close_fds=False, check=True)


def by_posix_spawn(out: int) -> None:
    pid = os.posix_spawn(LIST[0], LIST, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, out, 1)])
    assert os.waitpid(pid, 0) == (pid, 0)


def by_fork_and_exec(out: int) -> None:
    pid = fork()
    if pid == 0:
        os.dup2(out, 1)
        os.execv(LIST[0], LIST)
    assert os.waitpid(pid, 0) == (pid, 0)


STARTS = {"subprocess": by_subprocess, "posix_spawn": by_posix_spawn, "exec": by_fork_and_exec}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_a_program_that_is_started_inherits_no_descriptor(
    guest: Guest, start: Callable[[int], None], tmp_path: Path
) -> None:
    listing = tmp_path / "listing"
    theirs = os.eventfd(0)
    os.set_inheritable(theirs, True)
    with (
        EventFd.from_fd(theirs),
        EventFd(),
        guest.partition.new_irqfd_route(event=theirs) as route,
        listing.open("w") as out,
    ):
        route.set_msi(msi(0x41))
        guest.partition.new_irqfd_route().close()
        start(out.fileno())
        inherited = re.findall(r"-> (.*(?:event|kvm|mshv).*)", listing.read_text())
        # Only the caller's own, which it made inheritable.
        assert inherited == ["anon_inode:[eventfd]"]
        interrupts_flow(guest, route)
    os.close(theirs)


@pytest.fixture
def event() -> Iterator[int]:
    """An eventfd of a device model, which outlives the owners whose interrupts it raises."""
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def is_taken(event: int) -> bool:
    """Waits until a kernel takes a signal, as it soon does if an irqfd is armed."""
    os.eventfd_write(event, 1)
    until(lambda: not select.select([event], [], [], 0)[0], "a kernel takes the signal")
    return True


def stays(event: int) -> bool:
    """Whether signals stay in the counter, because no irqfd is armed on it."""
    os.eventfd_write(event, 1)
    os.eventfd_write(event, 1)
    return os.eventfd_read(event) >= 2


def held_by_the_hypervisor(guest: Guest) -> tuple[int, ...]:
    """The counters of the lab's stand-in hypervisor; empty elsewhere."""
    return guest.stub.counters().held if isinstance(guest, MshvGuest) else ()


def starts_clean(backend: Backend, event: int) -> None:
    """Asserts that a new partition can use the eventfd, and gets its interrupts and no others."""
    guest = backend.guest(backend.open())
    still_works(guest)
    with guest.partition.new_irqfd_route(event=event) as route:
        route.set_msi(msi(0x51))
        guest.receives_nothing()
        os.eventfd_write(event, 1)
        guest.receives(msi(0x51))
    guest.close()


def test_a_killed_owner_leaves_nothing_and_a_new_owner_starts_clean(backend: Backend, guest: Guest, event: int) -> None:
    held = held_by_the_hypervisor(guest)
    with an_owner(backend, "killed", event, fds=(event,)) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == f"{owner.pid}\n"
        assert is_taken(event)
        assert held_by_the_hypervisor(guest) != held or not held
        owner.kill()
        assert owner.wait() == -signal.SIGKILL
    assert stays(event)
    until(lambda: held_by_the_hypervisor(guest) == held, "the hypervisor frees the partition")
    starts_clean(backend, event)


def test_a_killed_owners_partition_lives_until_the_last_child_that_holds_it_ends(
    backend: Backend, guest: Guest, event: int
) -> None:
    held = held_by_the_hypervisor(guest)
    with an_owner(backend, "outlived", event, fds=(event,)) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        child = os.pidfd_open(int(owner.stdout.readline()))
        assert is_taken(event)
        owner.kill()
        assert owner.wait() == -signal.SIGKILL
        if backend.name == "simulated":
            # The thread of the simulated kernel died with the owner.
            assert stays(event)
        else:
            assert is_taken(event)
        assert held_by_the_hypervisor(guest) != held or not held
        owner.stdin.close()
        assert select.select([child], [], [], patience())[0], "the child did not end"
        os.close(child)
    assert stays(event)
    until(lambda: held_by_the_hypervisor(guest) == held, "the hypervisor frees the partition")
    starts_clean(backend, event)
