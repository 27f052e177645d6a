"""Fixtures: guests of each hypervisor, and a check that each test closes its descriptors and ends its threads.

Under `--parallel-threads` (`make parallel`) every test runs in several threads at once. Fixtures are made once for a
test, so `for_each_thread` makes the things that threads must not share: each thread gets its own in the argument.
"""

from __future__ import annotations

import functools
import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import backends
import faults as faults_
import modes
import pytest
from backends import Backend, Guest, KvmGuest, SimulatedGuest
from faults import Faults
from mshv_irqfd import KvmPartition, SimulatedPartition, open_partition
from mshv_irqfd.testing import until
from needs import need, need_faults
from raw_kvm import KvmVm
from support import collect, native_threads, open_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


T = TypeVar("T")

# Far more than a loaded machine needs. tools/break_rules.py sets less, because there it does not happen.
os.environ.setdefault("MSHV_IRQFD_PATIENCE", "60")

# Test runs within tests, for the plugin.
pytest_plugins = ["pytester"]

# Its failed assertions show values, as those of the tests do.
pytest.register_assert_rewrite("machine")


class Shares:
    """One value for each call of a test."""

    def __init__(self, things: list[Any]) -> None:
        self.take = things.pop


def handing_out(test: Any) -> Any:
    """Wraps a test function so that each call takes its own values from the shared arguments."""
    shares = Shares

    def call(**arguments: Any) -> None:
        test(**{name: it.take() if isinstance(it, shares) else it for name, it in arguments.items()})

    # pytest-run-parallel finds thread-unsafe calls through the globals of the function: these must be the test's.
    seen = FunctionType(call.__code__, test.__globals__, closure=call.__closure__)
    return functools.update_wrapper(seen, test)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--messages", metavar="FILE", help="add the messages of the errors that tests catch to FILE")


def pytest_configure(config: pytest.Config) -> None:
    """Tells child processes and `need()` of the chosen backends, and tools/error_messages.py of each message caught."""
    if chosen := config.getoption("irqfd_backend"):
        os.environ["MSHV_IRQFD_BACKENDS"] = ",".join(chosen)
    if name := config.getoption("--messages"):
        leave, caught = pytest.RaisesExc.__exit__, set[str]()

        def noted(self: Any, kind: Any, error: BaseException | None, trace: Any) -> bool:
            caught.add(str(error))
            return leave(self, kind, error, trace)

        def write() -> None:
            with Path(name).open("a", encoding="utf-8") as file:
                file.writelines(f"{text}\n" for text in sorted(caught))

        pytest.RaisesExc.__exit__ = noted  # type: ignore[method-assign]
        config.add_cleanup(write)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if str(config.getoption("parallel_threads")) != "1":
        for item in items:
            if isinstance(item, pytest.Function):
                item.obj = handing_out(item.obj)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Checks that each test leaves the same descriptors and threads as before."""
    files, threads = open_files(), native_threads()

    def left() -> list[str]:
        # The lab's stand-in hypervisor has one reader, which stays open.
        return [file for file in open_files() if file not in files and not file.endswith("/dev/hvstub")]

    yield
    if left() or native_threads() > threads:
        collect()
    # The kernel lists a joined thread for a moment longer.
    until(lambda: native_threads() <= threads, "the threads of this test have ended")
    assert left() == []


@pytest.fixture
def for_each_thread(
    num_parallel_threads: int, num_iterations: int, _nothing_left_behind: None
) -> Iterator[Callable[..., Any]]:
    """Makes one value for each thread that runs the test, and closes them after it."""
    with ExitStack() as stack:

        def make(one: Callable[[], T], close: Callable[[T], object] | None = None) -> T:
            things = []
            for _ in range(num_parallel_threads * num_iterations):
                things.append(one())
                if close:
                    stack.callback(close, things[-1])
            return things[0] if len(things) == 1 else cast("T", Shares(things))

        yield make


@pytest.fixture
def backend(irqfd_backend: str, _nothing_left_behind: None) -> Backend:
    """Each hypervisor in turn."""
    need(irqfd_backend)
    return Backend(irqfd_backend)


@pytest.fixture
def faults(backend: Backend) -> Iterator[Faults]:
    """Fault injection for the calls of the backend."""
    need_faults(backend.name)
    with faults_.of(backend.name) as faults:
        yield faults


@pytest.fixture
def open_guest(backend: Backend) -> Iterator[Callable[..., Guest]]:
    """Opens partitions with options, and closes them after the test."""
    guests: list[Guest] = []

    def open_one(**options: Any) -> Guest:
        guests.append(backend.guest(backend.open(**options)))
        return guests[-1]

    yield open_one
    backends.close_all(guests)


@pytest.fixture
def guest(
    request: pytest.FixtureRequest,
    backend: Backend,
    open_guest: Callable[..., Guest],
    for_each_thread: Callable[..., Guest],
) -> Guest:
    """A partition with the default options, or in a mode that the test names."""
    mode = getattr(request, "param", None)
    return for_each_thread(partial(open_guest, **modes.options(backend, mode) if mode else {}))


@pytest.fixture
def unloaded(backend: Backend, open_guest: Callable[..., Guest], for_each_thread: Callable[..., Guest]) -> Guest:
    """A partition without spare GSIs: every new message is a push."""
    return for_each_thread(partial(open_guest, **modes.options(backend, "unloaded")))


@pytest.fixture
def loaded(backend: Backend, open_guest: Callable[..., Guest], for_each_thread: Callable[..., Guest]) -> Guest:
    """A partition whose pushes load messages into spare GSIs."""
    return for_each_thread(partial(open_guest, **modes.options(backend, "loaded")))


@pytest.fixture
def open_simulated(_nothing_left_behind: None) -> Iterator[Callable[..., SimulatedGuest]]:
    """Opens simulated partitions, and closes them after the test."""
    guests: list[SimulatedGuest] = []

    def open_one(**options: Any) -> SimulatedGuest:
        partition = open_partition("simulated", **options)
        assert isinstance(partition, SimulatedPartition)
        guests.append(SimulatedGuest(partition))
        return guests[-1]

    yield open_one
    backends.close_all(guests)


@pytest.fixture
def simulated(
    open_simulated: Callable[..., SimulatedGuest], for_each_thread: Callable[..., SimulatedGuest]
) -> SimulatedGuest:
    return for_each_thread(open_simulated)


@pytest.fixture
def kvm(for_each_thread: Callable[..., KvmGuest]) -> KvmGuest:
    """A VM of KVM, for the tests of KVM alone."""
    need("kvm")

    def open_one() -> KvmGuest:
        partition = open_partition("kvm")
        assert isinstance(partition, KvmPartition)
        return KvmGuest(partition)

    return for_each_thread(open_one, KvmGuest.close)


@pytest.fixture
def vm(for_each_thread: Callable[..., KvmVm]) -> KvmVm:
    """A VM of KVM to adopt."""
    need("kvm")
    return for_each_thread(KvmVm, KvmVm.close)


@pytest.fixture
def theirs(for_each_thread: Callable[..., int]) -> int:
    """A caller's eventfd."""
    return for_each_thread(lambda: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), os.close)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the number of failures that the tests injected."""
    for (name, kind), number in sorted(faults_.tried.items()):
        terminalreporter.write_line(f"{name}: {kind}: {number} times")
