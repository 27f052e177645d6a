"""A partition: opening, closing, attributes, and refused arguments."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from backends import Backend, Guest, SimulatedGuest
from mshv_irqfd import (
    ClosedError,
    HypervisorUnavailableError,
    KvmPartition,
    MshvPartition,
    Partition,
    SimulatedPartition,
    open_partition,
)
from support import NOTHING, in_child, msi, open_files, run_python, still_works

Open = Callable[..., Guest]
CLASSES = {"simulated": SimulatedPartition, "kvm": KvmPartition, "mshv": MshvPartition}


def test_a_partition_has_the_class_and_quiescing_of_its_backend(backend: Backend, guest: Guest) -> None:
    partition = guest.partition
    assert type(partition) is CLASSES[backend.name]
    assert isinstance(partition, Partition)
    assert (partition.backend, partition.closed, partition.routes) == (backend.name, False, [])
    assert partition.quiesce is backend.quiesces


def test_a_partition_shows_its_backend_descriptor_gsis_and_quiescing(backend: Backend, guest: Guest) -> None:
    fd = "" if backend.name == "simulated" else f" fd={guest.partition.fileno()}"
    name, quiesced = CLASSES[backend.name].__name__, " quiesced" if backend.quiesces else ""
    assert repr(guest.partition) == f"<{name} backend={backend.name}{fd} gsis=24-2071{quiesced}>"
    guest.close()
    assert repr(guest.partition) == f"<{name} backend={backend.name} closed gsis=24-2071{quiesced}>"


def test_closing_a_partition_closes_its_routes(guest: Guest) -> None:
    routes = [guest.partition.new_irqfd_route() for _ in range(3)]
    routes[0].set_msi(msi(0x41))
    guest.partition.close()
    assert guest.partition.closed
    assert all(route.closed for route in routes)


def test_closing_a_partition_twice_is_fine(guest: Guest) -> None:
    guest.partition.close()
    guest.partition.close()
    with guest.partition:
        pass


def test_with_closes_a_partition_and_lets_the_exception_through(backend: Backend) -> None:
    with pytest.raises(KeyError, match="ours"), backend.open() as partition:
        route = partition.new_irqfd_route()
        raise KeyError("ours")
    assert partition.closed
    assert route.closed


def test_a_closed_partition_leaves_no_descriptor_open(backend: Backend) -> None:
    before = open_files()
    with backend.open() as partition:
        routes = [partition.new_irqfd_route() for _ in range(16)]
        for route in routes:
            route.set_msi(msi(0x41))
    assert open_files() == before


USES: dict[str, Callable[[Partition], object]] = {
    "new_irqfd_route": lambda partition: partition.new_irqfd_route(),
    "create_vp": lambda partition: partition.create_vp(5),
    "batch": lambda partition: partition.batch(),
    "gsi_state": lambda partition: partition.gsi_state(24),
    "routing_table": lambda partition: partition.routing_table(),
    "routes": lambda partition: partition.routes,
    "vps": lambda partition: partition.vps,
    "fileno": lambda partition: partition.fileno(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_closed_partition_raises_closed_error(guest: Guest, use: Callable[[Partition], object]) -> None:
    guest.partition.close()
    with pytest.raises(ClosedError, match="partition"):
        use(guest.partition)


def test_a_closed_simulated_partition_refuses_interrupts_and_faults(simulated: SimulatedGuest) -> None:
    partition = simulated.partition
    partition.close()
    for use in (partition.take_interrupts, partition.settle, lambda: partition.fail("assign_irqfd", 5)):
        with pytest.raises(ClosedError):
            use()


def test_the_counts_of_a_closed_partition_can_be_read(guest: Guest) -> None:
    route = guest.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    guest.partition.close()
    stats = guest.partition.stats()
    assert (stats.pushes, stats.arms, stats.disarms, stats.failures) == (1, 1, 1, 0)


def test_the_counts_begin_at_zero(guest: Guest) -> None:
    assert guest.partition.stats() == NOTHING


def test_partitions_are_independent(open_guest: Open) -> None:
    first, second = open_guest(), open_guest()
    one, other = first.partition.new_irqfd_route(), second.partition.new_irqfd_route()
    assert one.gsi == other.gsi
    one.set_msi(msi(0x41))
    other.set_msi(msi(0x42))
    one.signal()
    first.receives(msi(0x41))
    second.receives_nothing()
    first.partition.close()
    other.signal()
    second.receives(msi(0x42))
    other.close()


@pytest.mark.parametrize("device", [None, "missing"])
def test_auto_is_mshv_or_kvm_and_never_simulated(tmp_path: Path, device: str | None) -> None:
    path = None if device is None else tmp_path / device
    there = [name for name in ("mshv", "kvm") if path is None and os.access(f"/dev/{name}", os.R_OK | os.W_OK)]
    if there:
        with open_partition(device=path) as partition:
            assert partition.backend == there[0]
    else:
        with pytest.raises(HypervisorUnavailableError, match=r"mshv.*kvm") as failed:
            open_partition(device=path)
        assert failed.value.hint is not None
        assert "simulated" in failed.value.hint


@pytest.mark.parametrize("name", ["mshv", "kvm"])
def test_a_missing_device_is_unavailable_with_a_hint(simulated: SimulatedGuest, tmp_path: Path, name: str) -> None:
    node = tmp_path / "absent"
    with pytest.raises(HypervisorUnavailableError, match=f"{node}.*no such device") as failed:
        open_partition(name, device=node)
    assert (failed.value.errno, failed.value.ioctl) == (2, "open")
    assert failed.value.hint is not None
    assert '"simulated"' in failed.value.hint
    with pytest.raises(HypervisorUnavailableError, match="no such device"):
        open_partition(name, device=str(node))
    still_works(simulated)


def test_mshv_is_unavailable_where_its_device_is_missing() -> None:
    if Path("/dev/mshv").exists():
        pytest.skip("needs a machine without /dev/mshv")
    with pytest.raises(HypervisorUnavailableError, match=r"/dev/mshv.*no such device.*root partition"):
        open_partition("mshv")


@pytest.mark.parametrize("name", ["mshv", "kvm"])
@pytest.mark.parametrize("kind", ["null", "file", "directory", "socket", "eventfd"])
def test_a_node_of_another_kind_is_unavailable_with_a_hint(
    simulated: SimulatedGuest, tmp_path: Path, name: str, kind: str
) -> None:
    import socket  # noqa: PLC0415 - one test alone needs it

    node, event, listener = tmp_path / "node", os.eventfd(0), socket.socket(socket.AF_UNIX)
    match kind:
        case "null":
            node = Path("/dev/null")
        case "file":
            node.write_bytes(b"not a device")
        case "directory":
            node.mkdir()
        case "socket":
            listener.bind(str(node))
        case "eventfd":
            node = Path(f"/proc/self/fd/{event}")
    before = open_files()
    with pytest.raises(HypervisorUnavailableError, match=f"{node}: ") as failed:
        open_partition(name, device=node)
    assert open_files() == before
    assert failed.value.hint is not None
    if kind in {"null", "file"}:
        assert "not a device of" in failed.value.hint
    os.close(event)
    listener.close()
    still_works(simulated)


@pytest.mark.parametrize("name", ["mshv", "kvm"])
def test_a_device_without_permission_is_unavailable_and_the_error_says_so(
    simulated: SimulatedGuest, tmp_path: Path, name: str
) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root, to drop it in a child: run as root")
    node = tmp_path / "node"
    node.touch(mode=0)

    def attempt() -> tuple[int | None, str]:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            open_partition(name, device=node).close()
        except HypervisorUnavailableError as error:
            return error.errno, str(error)
        return None, "it opened"

    number, words = in_child(attempt)
    assert number == 13
    assert "no permission" in words
    assert str(node) in words
    still_works(simulated)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        pytest.param({"backend": "xen"}, ValueError, '"xen".*"mshv", "kvm" or "simulated"', id="unknown"),
        pytest.param({"backend": 5}, TypeError, ".", id="backend-int"),
        pytest.param({"backend": "simulated", "device": "/dev/kvm"}, ValueError, "no device node", id="device"),
        pytest.param({"backend": "kvm", "device": 5}, TypeError, ".", id="device-int"),
        pytest.param({"backend": "simulated", "quiesce": "yes"}, TypeError, ".", id="quiesce-str"),
        pytest.param({"backend": "simulated", "allow_missing_vp": 2}, TypeError, ".", id="allow-int"),
        pytest.param({"backend": "simulated", "preload": "yes"}, TypeError, ".", id="preload-str"),
        pytest.param({"backend": "simulated", "colour": 1}, TypeError, "colour", id="keyword"),
    ],
)
def test_an_invalid_argument_is_refused(
    simulated: SimulatedGuest, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        open_partition(**arguments)
    still_works(simulated)


def test_all_options_but_the_backend_are_keyword_only() -> None:
    wrong: Any = open_partition
    with pytest.raises(TypeError):
        wrong("simulated", None)


def test_a_refused_opening_leaves_no_descriptor_open(backend: Backend) -> None:
    before = open_files()
    for wrong in ({"gsis": range(0)}, {"vps": [255]}, {"gsis": range(24, 5000)}):
        with pytest.raises(ValueError):
            backend.open(**wrong)
    assert open_files() == before


@pytest.mark.parametrize(
    ("timeout", "error"),
    [(-1, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), ("1", TypeError), (None, TypeError)],
)
def test_an_invalid_timeout_is_refused(simulated: SimulatedGuest, timeout: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        simulated.partition.take_interrupts(timeout)
    still_works(simulated)


def test_taking_interrupts_takes_them_once(simulated: SimulatedGuest) -> None:
    partition = simulated.partition
    with partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        route.signal()
        assert len(partition.take_interrupts(60)) == 1
        assert partition.take_interrupts() == []


def test_taking_interrupts_keeps_their_order(simulated: SimulatedGuest) -> None:
    with simulated.partition.new_irqfd_route() as route:
        vectors = [0x41, 0x43, 0x42, 0x41]
        for vector in vectors:
            route.set_msi(msi(vector))
            route.signal()
            simulated.partition.settle()
        assert [interrupt.vector for interrupt in simulated.partition.take_interrupts()] == vectors


def test_taking_interrupts_returns_after_the_timeout(backend: Backend, guest: Guest) -> None:
    partition = guest.partition
    if not isinstance(partition, SimulatedPartition | KvmPartition):
        pytest.skip(f"{backend.name} does not report interrupts")
    guest.stop()
    assert partition.take_interrupts(timeout=0.01) == []


LIMITED = """
import errno, os, resource, sys
from mshv_irqfd import GsiState, IrqFdError, MsiRoute, open_partition
count = lambda: len(os.listdir("/proc/self/fd"))
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
with open_partition({name!r}) as partition:
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    before, routes = count(), []
    try:
        for _ in range(2048):
            routes.append(partition.new_irqfd_route())
    except IrqFdError as error:
        assert error.errno == errno.EMFILE, error
        assert "RLIMIT_NOFILE" in str(error) and "ulimit -n" in error.hint, error
    else:
        sys.exit("no error")
    made = len(routes)
    assert 900 < made < 1024, made
    assert partition.gsi_state(24 + made) is GsiState.UNALLOCATED
    fd = routes[0].fileno()
    try:
        partition.new_irqfd_route(event=fd)
    except (IrqFdError, ValueError):
        pass
    # The existing routes work: arming, closing, and a new route in place of a closed one.
    routes[0].set_msi(MsiRoute.fixed(0x41, 0))
    routes.pop().close()
    routes.append(partition.new_irqfd_route())
    assert routes[-1].gsi == 24 + made - 1
    # The remedy works.
    resource.setrlimit(resource.RLIMIT_NOFILE, (2200, hard))
    assert count() == before + made, (count(), before, made)
    while len(routes) < 2048:
        routes.append(partition.new_irqfd_route())
    for route in routes:
        route.close()
    assert count() == before, (count(), before)
print("fine")
"""


def test_running_out_of_descriptors_halfway_through_2048_routes_leaks_nothing_and_names_the_remedy(
    backend: Backend, guest: Guest
) -> None:
    import resource  # noqa: PLC0415 - one test alone needs it

    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2200:
        pytest.skip("needs 2200 file descriptors: raise the hard limit (ulimit -Hn)")
    ended = run_python(LIMITED.format(name=backend.name), "-W", "error")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "fine\n", "")
    still_works(guest)


def test_running_out_of_descriptors_at_opening_names_the_remedy(backend: Backend, guest: Guest) -> None:
    code = f"""
import errno, os, resource
from mshv_irqfd import HypervisorUnavailableError, open_partition
with open_partition({backend.name!r}):
    pass
before = sorted(os.listdir("/proc/self/fd"))
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
for spare in range(3):
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) - 1 + spare, hard))
    try:
        open_partition({backend.name!r}, vps=0).close()
    except OSError as error:
        print(type(error).__name__, error.errno == errno.EMFILE, "RLIMIT_NOFILE" in str(error))
    else:
        print("opened")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    assert sorted(os.listdir("/proc/self/fd")) == before
"""
    ended = run_python(code, "-W", "error")
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert lines[0] == "HypervisorUnavailableError True True"
    assert set(lines) <= {"HypervisorUnavailableError True True", "opened"}
    still_works(guest)


def test_without_proc_closing_releases_every_descriptor(backend: Backend) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to start a program without /proc: run as root")
    code = f"""
import os
from mshv_irqfd import MsiRoute, open_partition
def files():
    found = []
    for fd in range(100):
        try:
            found.append((fd, os.fstat(fd).st_ino))
        except OSError:
            pass
    return found
assert not os.path.exists("/proc/self")
for _ in range(2):
    before = files()
    with open_partition({backend.name!r}, vps=2) as partition:
        route = partition.new_irqfd_route()
        route.set_msi(MsiRoute.fixed(0x41, 1))
    assert files() == before
print("fine")
"""
    without_proc = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh")
    ended = run_python(code, "-W", "error", under=without_proc)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "fine\n", "")


def test_a_signal_that_comes_while_a_partition_is_opened_does_no_harm(backend: Backend) -> None:
    main, over = threading.main_thread().ident, threading.Event()
    assert main is not None

    def disturb() -> None:
        while not over.wait(0.0002):
            signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        for _ in range(100):
            backend.open().close()
    finally:
        over.set()
        disturber.join()
        signal.signal(signal.SIGUSR1, before)
