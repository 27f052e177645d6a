"""Waiting in asyncio, on the standard loop and on uvloop: nothing is lost, and no task waits for ever."""

from __future__ import annotations

import asyncio
import errno
import gc
import resource
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import uvloop
from mshv_irqfd import ClosedError, EventFd, IoEventFd, IoEventFdError, IrqFdError, MsixTable
from mshv_irqfd.testing import patience, until
from support import in_child, msi, open_files, refusal, run_python

if TYPE_CHECKING:
    from collections.abc import Iterator

    from backends import Guest
    from faults import Faults

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, Any]], Any]
NewLoop = Callable[[], asyncio.AbstractEventLoop]
ADDRESS = 0xD0000000

LOOPS: dict[str, NewLoop] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}
# libuv keeps a pipe from the first loop on.
uvloop.new_event_loop().close()

SOURCES = ["event", "view of a route", "doorbell", "view of a doorbell"]


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine on a new loop of each kind, within the patience of the tests."""

    def run_one(main: Coroutine[Any, Any, T]) -> T:
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            return runner.run(asyncio.wait_for(main, patience()))

    return run_one


@pytest.fixture(params=LOOPS)
def new_loop(request: pytest.FixtureRequest) -> NewLoop:
    """Makes loops of each kind."""
    return LOOPS[request.param]


@pytest.fixture(params=SOURCES)
def kind(request: pytest.FixtureRequest) -> str:
    """Everything whose signals can be waited for and counted; see `a_source`."""
    return str(request.param)


@contextmanager
def a_source(guest: Guest, kind: str) -> Iterator[EventFd | IoEventFd]:
    """Makes an object of this kind."""
    with EventFd() as event, guest.partition.new_irqfd_route() as route, guest.partition.ioeventfd(ADDRESS, 4) as bell:
        made: list[EventFd | IoEventFd] = [event, route.event, bell, bell.event]
        yield made[SOURCES.index(kind)]


async def waiting(*coroutines: Coroutine[Any, Any, T]) -> list[asyncio.Task[T]]:
    """Starts tasks, and returns once they wait."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    for _ in range(5):
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    return tasks


async def closed(*tasks: asyncio.Task[Any]) -> None:
    """Asserts that each task ends with a ClosedError."""
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, ClosedError)


def test_signals_from_before_the_wait_are_taken_at_once(guest: Guest, kind: str, run: Run) -> None:
    with a_source(guest, kind) as source:
        for _ in range(3):
            source.signal()
        assert run(source.wait()) == 3
        assert source.consume() == 0


def test_a_signal_of_another_thread_resumes_the_task(guest: Guest, kind: str, run: Run) -> None:
    with a_source(guest, kind) as source:

        async def main() -> int:
            (task,) = await waiting(source.wait())
            thread = threading.Thread(target=source.signal)
            thread.start()
            try:
                return await task
            finally:
                thread.join()

        assert run(main()) == 1


def test_a_guests_write_resumes_the_task(guest: Guest, run: Run) -> None:
    with guest.partition.ioeventfd(ADDRESS, 4) as doorbell:

        async def main() -> list[int]:
            (task,) = await waiting(doorbell.wait())
            assert guest.writes(ADDRESS, bytes(4))
            first = await task
            for _ in range(2):
                assert guest.writes(ADDRESS, bytes(4))
            return [first, await doorbell.wait()]

        assert run(main()) == [1, 2]


def test_an_async_for_yields_counts_until_the_close(guest: Guest, kind: str, run: Run) -> None:
    with a_source(guest, kind) as source:

        async def main() -> list[int]:
            counts = []
            source.signal()
            async for count in source:
                counts.append(count)
                for _ in counts:
                    source.signal()
                if len(counts) == 4:
                    source.consume()
                    asyncio.get_running_loop().call_later(0.001, source.close)
            return counts

        assert run(main()) == [1, 1, 2, 3]


def test_each_signal_goes_to_one_of_several_tasks(guest: Guest, kind: str, run: Run) -> None:
    with a_source(guest, kind) as source:

        async def main() -> None:
            left = set(await waiting(*(source.wait() for _ in range(5))))
            while left:
                source.signal()
                done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                assert [task.result() for task in done] == [1]

        run(main())


def test_a_signal_at_the_time_of_a_cancel_is_taken_or_left(guest: Guest, kind: str, run: Run) -> None:
    with a_source(guest, kind) as source:

        async def signalled_and_cancelled(lead: int, lag: int) -> bool:
            task = asyncio.ensure_future(source.wait())
            for _ in range(lead):
                await asyncio.sleep(0)
            source.signal()
            for _ in range(lag):
                await asyncio.sleep(0)
            task.cancel()
            try:
                assert await task == 1
            except asyncio.CancelledError:
                assert await source.wait() == 1
                return False
            assert source.consume() == 0
            return True

        async def main() -> None:
            taken = [await signalled_and_cancelled(lead, lag) for lead in range(5) for lag in range(5)]
            assert set(taken) == {True, False}

        run(main())


def test_no_signal_is_lost_while_waits_are_cancelled(guest: Guest, kind: str, run: Run) -> None:
    with a_source(guest, kind) as source:
        total = 500

        def signal() -> None:
            for _ in range(total):
                source.signal()

        async def main() -> int:
            thread = threading.Thread(target=signal)
            thread.start()
            taken = turn = 0
            while taken < total:
                task = asyncio.ensure_future(source.wait())
                turn += 1
                for _ in range(turn % 6):
                    await asyncio.sleep(0)
                task.cancel()
                with suppress(asyncio.CancelledError):
                    taken += await task
            thread.join()
            return taken

        assert run(main()) == total
        assert source.consume() == 0


def test_a_timeout_takes_nothing(guest: Guest, kind: str, run: Run) -> None:
    with a_source(guest, kind) as source:

        async def main() -> int:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await source.wait()
            source.signal()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await source.wait()
            return await source.wait()

        assert run(main()) == 1


def test_signals_without_pause_do_not_starve_other_tasks(guest: Guest, kind: str, run: Run) -> None:
    with a_source(guest, kind) as source:

        async def main() -> None:
            source.signal()
            ended = asyncio.Event()
            asyncio.get_running_loop().call_soon(ended.set)
            async for _ in source:
                source.signal()
                if ended.is_set():
                    break

        run(main())


def test_closing_ends_every_wait(guest: Guest, kind: str, run: Run) -> None:
    with a_source(guest, kind) as source:

        async def main() -> None:
            tasks = await waiting(source.wait(), source.wait())
            thread = threading.Thread(target=source.close)
            thread.start()
            await closed(*tasks)
            thread.join()

        run(main())
        with pytest.raises(ClosedError):
            run(source.wait())
        with pytest.raises(ClosedError):
            aiter(source)


def test_closing_a_view_ends_the_waits_on_it_alone(guest: Guest, run: Run) -> None:
    with guest.partition.ioeventfd(ADDRESS, 4) as doorbell:

        async def main() -> int:
            view = doorbell.event
            (mine,) = await waiting(doorbell.wait())
            (its,) = await waiting(view.wait())
            view.close()
            await closed(its)
            doorbell.signal()
            return await mine

        assert run(main()) == 1


@pytest.mark.parametrize("how", ["close", "with", "partition"])
def test_closing_a_route_a_doorbell_or_their_partition_ends_the_waits(guest: Guest, run: Run, how: str) -> None:
    route, doorbell = guest.partition.new_irqfd_route(), guest.partition.ioeventfd(ADDRESS, 4)

    async def main() -> None:
        tasks = await waiting(
            *(doorbell.wait(), doorbell.event.wait(), route.event.wait()),
            *(route.wait_pending(), route.wait_pending()),
        )
        if how == "partition":
            guest.partition.close()
        elif how == "close":
            route.close()
            doorbell.close()
        else:
            with route, doorbell:
                pass
        await closed(*tasks)
        for one in (doorbell.wait(), route.wait_pending()):
            with pytest.raises(ClosedError):
                await one

    run(main())


# EBADF may also mean that the partition's descriptor is closed.
@pytest.mark.parametrize("number", [errno.EIO, errno.EBADF])
def test_a_close_that_the_kernel_refuses_ends_the_waits_too(
    guest: Guest, faults: Faults, run: Run, number: int
) -> None:
    route, doorbell = guest.partition.new_irqfd_route(), guest.partition.ioeventfd(ADDRESS, 4)
    faults.run(lambda: route.set_msi(msi(0x41)))

    async def main() -> None:
        tasks = await waiting(doorbell.wait(), route.wait_pending())
        faults.fail(guest.partition, "deassign_irqfd", number)
        faults.fail(guest.partition, "deassign_ioeventfd", number)
        with pytest.raises(IrqFdError):
            faults.run(route.close)
        with pytest.raises(IoEventFdError):
            faults.run(doorbell.close)
        await closed(*tasks)

    run(main())


def test_closing_a_device_ends_the_waits_on_its_vectors(guest: Guest, run: Run) -> None:
    table = MsixTable(guest.partition, 2)

    async def main() -> None:
        tasks = await waiting(*(vector.wait_pending() for vector in table.vectors))
        table.close()
        await closed(*tasks)
        with pytest.raises(ClosedError):
            await table.vectors[0].wait_pending()

    run(main())


def test_a_pending_signal_is_told_to_every_task_and_stays_pending(guest: Guest, run: Run) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.mask()
        route.set_msi(msi(0x41))

        async def main() -> None:
            tasks = await waiting(*(route.wait_pending() for _ in range(3)))
            route.signal()
            await asyncio.gather(*tasks)
            await route.wait_pending()

        run(main())
        assert route.pending
        route.unmask()
        guest.receives(msi(0x41))


def test_while_a_route_is_armed_its_signals_are_the_guests(guest: Guest, run: Run) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))

        async def main() -> None:
            tasks: list[asyncio.Task[Any]] = [
                *(await waiting(route.wait_pending())),
                *(await waiting(route.event.wait())),
            ]
            route.signal()
            guest.receives(msi(0x41))
            for _ in range(5):
                await asyncio.sleep(0)
            assert not any(task.done() for task in tasks)
            route.mask()
            route.signal()
            await tasks[1]
            route.signal()
            await tasks[0]

        run(main())
        assert route.consume_pending()


def test_a_wait_goes_on_with_another_eventfd_of_the_route(guest: Guest, run: Run) -> None:
    with guest.partition.new_irqfd_route() as route, EventFd() as new:

        async def main() -> None:
            (pending,) = await waiting(route.wait_pending())
            (counted,) = await waiting(route.event.wait())
            route.set_event(new)
            for _ in range(5):
                await asyncio.sleep(0)
            assert not pending.done()
            assert not counted.done()
            new.signal()
            await asyncio.wait((pending, counted), return_when=asyncio.FIRST_COMPLETED)
            new.signal()
            await asyncio.gather(pending, counted)

        run(main())


def test_a_wait_follows_its_route_when_the_eventfd_moves_to_another(guest: Guest, run: Run) -> None:
    first, second = guest.partition.new_irqfd_route(), guest.partition.new_irqfd_route()
    with first, second:

        async def main() -> None:
            tasks = await waiting(first.wait_pending(), second.wait_pending())
            with EventFd.from_fd(first) as moved:
                with guest.partition.batch() as batch:
                    batch.set_event(first, None)
                    batch.set_event(second, moved)
                moved.signal()
            await tasks[1]
            assert not tasks[0].done()
            first.signal()
            await tasks[0]

        run(main())


def test_a_vectors_pending_bit_can_be_waited_for(guest: Guest, run: Run) -> None:
    with MsixTable(guest.partition, 4) as table:

        async def main() -> None:
            latched, other = table.vectors[0], table.vectors[2]
            latched.signal()
            await latched.wait_pending()
            assert latched.route is None
            (task,) = await waiting(other.wait_pending())
            assert other.route is not None
            other.event.signal()
            await task
            assert table.read_pba(0, 8) == 0b101

        run(main())


def loops_descriptors() -> list[str]:
    """The descriptors that every event loop of this process has registered, as the kernel lists them."""
    epolls = [file.split(":")[0] for file in open_files() if file.endswith("anon_inode:[eventpoll]")]
    lines = [line for fd in epolls for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()]
    return sorted(line for line in lines if line.startswith("tfd:"))


def test_a_wait_leaves_no_descriptor_behind_in_the_loop(guest: Guest, kind: str, run: Run) -> None:
    with a_source(guest, kind) as source:

        async def main() -> None:
            # uvloop registers its own descriptors when it first waits.
            await asyncio.sleep(0.001)
            before, files = loops_descriptors(), open_files()
            (cancelled,) = await waiting(source.wait())
            assert loops_descriptors() != before
            cancelled.cancel()
            with suppress(asyncio.CancelledError):
                await cancelled
            (task,) = await waiting(source.wait())
            source.signal()
            await task
            # uvloop applies changes when it next waits.
            await asyncio.sleep(0.001)
            assert loops_descriptors() == before
            assert open_files() == files
            (ended,) = await waiting(source.wait())
            source.close()
            await closed(ended)
            await asyncio.sleep(0.001)
            assert len(loops_descriptors()) == len(before)

        run(main())


def test_a_callers_own_reader_stays(guest: Guest, run: Run) -> None:
    with guest.partition.ioeventfd(ADDRESS, 4) as doorbell:

        async def main() -> None:
            loop, seen = asyncio.get_running_loop(), asyncio.Event()
            loop.add_reader(doorbell, seen.set)
            (task,) = await waiting(doorbell.wait())
            doorbell.signal()
            await task
            seen.clear()
            doorbell.signal()
            await seen.wait()
            loop.remove_reader(doorbell)

        run(main())


def test_loops_of_several_threads_share_the_signals(guest: Guest, kind: str, run: Run) -> None:
    with a_source(guest, kind) as source:
        taken: Counter[int] = Counter()
        begun = threading.Barrier(3)

        async def main() -> None:
            signals = aiter(source)
            begun.wait(patience())
            async for count in signals:
                taken[threading.get_ident()] += count

        threads = [threading.Thread(target=run, args=(main(),)) for _ in range(2)]
        for thread in threads:
            thread.start()
        begun.wait(patience())
        for number in range(1, 201):
            source.signal()
            if number % 50 == 0:
                until(lambda number=number: taken.total() == number, "the signals so far are taken")  # type: ignore[misc]
        source.close()
        for thread in threads:
            thread.join()
        assert taken.total() == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_loop_that_is_closed_during_a_wait_takes_nothing(
    guest: Guest, kind: str, new_loop: NewLoop, run: Run
) -> None:
    with a_source(guest, kind) as source:
        loop = new_loop()
        # It logs each pending task that is destroyed.
        loop.set_exception_handler(lambda _loop, _context: None)
        task = loop.create_task(source.wait())
        loop.run_until_complete(asyncio.sleep(0.001))
        assert not task.done()
        loop.close()
        source.signal()
        assert run(source.wait()) == 1
        del task, loop
        gc.collect()
        source.signal()
        assert source.consume() == 1


def test_a_forked_child_waits_on_the_same_counter_and_disturbs_no_wait_of_its_parent(
    guest: Guest, new_loop: NewLoop
) -> None:
    with EventFd() as event, guest.partition.ioeventfd(ADDRESS, 4) as doorbell:
        loop = new_loop()
        tasks = [loop.create_task(event.wait()), loop.create_task(doorbell.wait())]
        loop.run_until_complete(asyncio.sleep(0.001))

        async def child() -> tuple[int, str]:
            event.signal(2)
            taken = await event.wait()
            (task,) = await waiting(event.wait())
            event.close()
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            with doorbell:  # closes the child's descriptor
                pass
            return taken, type(outcome).__name__

        def fork() -> tuple[int, str]:
            with asyncio.Runner(loop_factory=new_loop) as runner:
                return runner.run(child())

        assert in_child(fork) == (2, "ClosedError")
        loop.run_until_complete(asyncio.sleep(0.001))
        assert not any(task.done() for task in tasks)
        event.signal()
        doorbell.signal()
        assert loop.run_until_complete(asyncio.gather(*tasks)) == [1, 1]
        loop.close()


@pytest.mark.parametrize("how", ["closed", "collected"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_forked_child_that_drops_its_copies_of_waiting_tasks_ends_no_wait_of_its_parent(
    guest: Guest, new_loop: NewLoop, how: str
) -> None:
    """A forked child's copy of a loop has the epoll set of its parent's loop."""
    route = guest.partition.new_irqfd_route()
    with EventFd() as event, guest.partition.ioeventfd(ADDRESS, 4) as doorbell, route:
        loop = new_loop()
        # It logs each pending task that is destroyed.
        loop.set_exception_handler(lambda _loop, _context: None)
        waits: list[Any] = [event.wait(), doorbell.wait(), route.wait_pending()]
        held: list[Any] = [*map(loop.create_task, waits), loop]
        loop.run_until_complete(asyncio.sleep(0.001))
        before = loops_descriptors()
        del loop

        def child() -> None:
            if how == "closed":
                for wait in waits:
                    wait.close()
            waits.clear()
            held.clear()
            gc.collect()

        in_child(child)
        *tasks, loop = held
        # When it collects the loop, asyncio itself takes out the descriptor that wakes the loop from other threads.
        own = int(how == "collected" and isinstance(loop, asyncio.SelectorEventLoop))
        assert len(loops_descriptors()) >= len(before) - own
        for source in (event, doorbell, route):
            source.signal()
        ended = loop.run_until_complete(asyncio.wait(tasks, timeout=patience()))
        assert [len(some) for some in ended] == [3, 0]
        loop.close()


def test_in_a_forked_child_a_route_cannot_be_waited_for(guest: Guest, run: Run) -> None:
    with guest.partition.new_irqfd_route() as route:
        assert in_child(lambda: refusal(lambda: run(route.wait_pending()))) == "ForkedError"


def test_a_wait_without_descriptors_says_so_and_takes_nothing(guest: Guest, kind: str, run: Run) -> None:
    with a_source(guest, kind) as source:

        async def main() -> None:
            highest = int(open_files()[-1].split(":")[0])
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            spare = [EventFd() for _ in range(highest + 1 - len(open_files()))]
            # No more descriptors, or one more: a watch has two.
            for more in (0, 1):
                resource.setrlimit(resource.RLIMIT_NOFILE, (len(open_files()) + more, hard))
                try:
                    with pytest.raises(IrqFdError) as failed:
                        await source.wait()
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                assert failed.value.errno == errno.EMFILE
            for event in spare:
                event.close()
            source.signal()
            assert await source.wait() == 1

        run(main())


def test_the_package_imports_asyncio_at_the_first_wait() -> None:
    code = "import sys, mshv_irqfd; sys.exit('asyncio' in sys.modules)"
    assert run_python(code).returncode == 0
