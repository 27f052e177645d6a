"""`mshv-irqfd probe`: what the kernel at hand really does with routing tables and irqfds, by bare ioctls.

Each row is done on a partition of its own and compared with what this package expects of the kernel. Exit status 0: all
rows are as expected; 1: some differ (the package's rules may not hold on this kernel); 2: nothing could be tried.
On the root scheduler of the Microsoft Hypervisor interrupts go another way, which the probe does not see.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import platform
import struct
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mshv_irqfd import HypervisorUnavailableError
from mshv_irqfd._core import RawPartition

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace, _SubParsersAction
    from collections.abc import Callable, Iterator

GSI: Final = 24
ADDRESS: Final = 0xFEE00000
VECTOR: Final = 0x41
MSI: Final = (GSI, ADDRESS, VECTOR)
DEVICES: Final = {"mshv": "/dev/mshv", "kvm": "/dev/kvm"}
PATIENCE: Final = 10.0
"""Seconds after which an interrupt that is expected, and that KVM may still be working on, is taken for lost."""
RACES: Final = 300

RECORD: Final = struct.Struct("=QQQII")
"""What the lab's /dev/hvstub tells of an interrupt: partition, APIC id, control, vector, status."""

UNSEEN: Final = "cannot be seen here"
ACCEPTED: Final = "accepted"


def add_parser(subcommands: _SubParsersAction[ArgumentParser]) -> None:
    """Adds the subcommand and its options."""
    parser = subcommands.add_parser(
        "probe",
        help="find out what this machine's kernel does with routing tables and irqfds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", choices=list(DEVICES), required=True, help="the kernel interface to probe")
    parser.add_argument("--device", help="another device node than /dev/mshv or /dev/kvm")
    parser.add_argument(
        "--interrupts",
        metavar="DEVICE",
        help="a device that tells which interrupts mshv asserted: /dev/hvstub of the lab kernel (a real host has none)",
    )
    parser.add_argument(
        "--torn-pushes",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="also signal while pushing, for this long without and as long with quiescing, and count torn signals",
    )
    parser.add_argument(
        "--may-crash-the-host",
        action="store_true",
        help="also take the step that ends a host on the root scheduler (an MSI for an APIC id without a VP)",
    )
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="run only the rows that have TEXT in their first line"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(options: Namespace) -> int:
    """Runs the probe and prints what it found."""
    device = options.device or DEVICES[options.backend]
    try:
        with closing(RawPartition(options.backend, device)):
            pass
    except (HypervisorUnavailableError, OSError) as error:
        sys.stderr.write(f"no partition of {options.backend}: {device}: {error}\n")
        return 2
    chosen = [row for row in ROWS if options.only in row.done]
    if not chosen:
        sys.stderr.write(f"no row has {options.only!r} in its first line\n")
        return 2
    rows = [_measure(row, options, device) for row in chosen]
    rows += _torn_pushes(options, device)
    if options.json:
        found = {"backend": options.backend, "kernel": platform.release(), "rows": [asdict(row) for row in rows]}
        print(json.dumps(found, indent=2))
    else:
        _print_table(rows, options.backend)
    return int(any(row.differs for row in rows))


@dataclass(frozen=True)
class Finding:
    """A row: what was done, what this package expects to happen, and what happened."""

    done: str
    expected: str
    found: str
    differs: bool


def _print_table(rows: list[Finding], backend: str) -> None:
    print(f"{backend} on Linux {platform.release()}\n")
    for row in rows:
        print(f"{'DIFFERS ' if row.differs else '        '}{row.done}\n            {row.found}")
        if row.differs:
            print(f"            expected: {row.expected}")
    differing = sum(row.differs for row in rows)
    unseen = sum(row.found == UNSEEN for row in rows)
    print(f"\n{len(rows)} rows, {differing} differ from what this package expects, {unseen} could not be seen")


class Scene:
    """A partition with VP 0, and what can be done to it and seen of it."""

    def __init__(self, options: Namespace, device: str) -> None:
        self.mshv = options.backend == "mshv"
        self.partition = RawPartition(options.backend, device)
        self.events: list[int] = []
        self.observer: int | None = None
        if options.interrupts and self.mshv:
            self.observer = os.open(options.interrupts, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            self.arrived()

    def close(self) -> None:
        """Gives everything up."""
        self.partition.close()
        for event in self.events:
            with suppress(OSError):
                os.close(event)
        if self.observer is not None:
            os.close(self.observer)

    def event(self) -> int:
        """A new eventfd."""
        event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.events.append(event)
        return event

    def armed(self, gsi: int = GSI, table: list[tuple[int, int, int]] | None = None) -> int:
        """A new eventfd, armed on a GSI after a push of a table (by default, of one entry for GSI 24)."""
        if table is None:
            table = [MSI]
        if table:
            self.partition.set_routing(table)
        event = self.event()
        self.partition.irqfd(event, gsi)
        return event

    def arrived(self) -> list[str] | None:
        """The interrupts since the last call, as "vector to APIC id" ("vector" on KVM); None if they can't be seen."""
        if not self.mshv:
            return [f"{vector:#04x}" for vector in self.partition.take_vectors() or []]
        if self.observer is None:
            return None
        found: list[str] = []
        while True:
            try:
                data = os.read(self.observer, RECORD.size * 1024)
            except BlockingIOError:
                return found
            for _, destination, _, vector, _ in RECORD.iter_unpack(data):
                found.append(f"{vector:#04x} to APIC {destination}")

    def left(self, event: int) -> int:
        """What is in a counter, which is emptied."""
        try:
            return os.eventfd_read(event)
        except BlockingIOError:
            return 0

    def after(self, event: int, *, patient: bool = False) -> str:
        """What arrived since the last look, and what the eventfd's counter holds. If patient, waits for something."""
        arrived = self.arrived()
        end = time.monotonic() + PATIENCE
        while patient and arrived == [] and time.monotonic() < end:
            arrived = self.arrived()
        if arrived is None:
            return UNSEEN
        return f"{', '.join(arrived) or 'nothing'}; counter {self.left(event)}"

    def signalled(self, event: int) -> str:
        """What becomes of a signal."""
        self.arrived()
        os.eventfd_write(event, 1)
        return self.after(event)


def tried(action: Callable[[], object]) -> str:
    """The name of the error that an ioctl gives, or that it was accepted."""
    try:
        action()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    return ACCEPTED


@dataclass(frozen=True)
class Row:
    """What to do, and what it gives; `None` for a kernel on which it can't be done."""

    done: str
    act: Callable[[Scene, Namespace], str | None]
    mshv: str | None
    kvm: str | None


ROWS: list[Row] = []


def row(done: str, *, mshv: str | None, kvm: str | None) -> Callable[[Callable[[Scene], str]], None]:
    """Adds a row."""

    def add(act: Callable[[Scene], str]) -> None:
        ROWS.append(Row(done, lambda scene, _: act(scene), mshv, kvm))

    return add


def _measure(row: Row, options: Namespace, device: str) -> Finding:
    expected = row.mshv if options.backend == "mshv" else row.kvm
    if expected is None:
        return Finding(row.done, "", "not on this kernel", differs=False)
    with closing(Scene(options, device)) as scene:
        found = row.act(scene, options)
    if found is None:
        return Finding(row.done, expected, "not tried", differs=False)
    return Finding(row.done, expected, found, differs=found not in (expected, UNSEEN))


ONE_ON_MSHV: Final = f"{VECTOR:#04x} to APIC 0; counter 0"
ONE_ON_KVM: Final = f"{VECTOR:#04x}; counter 0"
NOTHING: Final = "nothing; counter 0"
BOGUS: Final = "0x00 to APIC 0; counter 0"


@row("armed and routed, signal", mshv=ONE_ON_MSHV, kvm=ONE_ON_KVM)
def _(scene: Scene) -> str:
    return scene.signalled(scene.armed())


@row("armed, route taken out of the table, no higher GSI routed, signal", mshv=NOTHING, kvm=NOTHING)
def _(scene: Scene) -> str:
    event = scene.armed()
    scene.partition.set_routing([])
    return scene.signalled(event)


@row("armed, route taken out of the table, a higher GSI routed, signal", mshv=BOGUS, kvm=NOTHING)
def _(scene: Scene) -> str:
    event = scene.armed()
    scene.partition.set_routing([(GSI + 6, ADDRESS, 0x55)])
    return scene.signalled(event)


@row("GSI 0 armed and never routed, signal", mshv=BOGUS, kvm=NOTHING)
def _(scene: Scene) -> str:
    event = scene.event()
    scene.partition.irqfd(event, 0)
    return scene.signalled(event)


def _armed_with_three_pending(scene: Scene) -> int:
    scene.partition.set_routing([MSI])
    event = scene.event()
    os.eventfd_write(event, 3)
    scene.arrived()
    scene.partition.irqfd(event, GSI)
    return event


@row("disarmed, three signals, armed", mshv=f"{VECTOR:#04x} to APIC 0; counter 3", kvm=f"{VECTOR:#04x}; counter 3")
def _(scene: Scene) -> str:
    # KVM raises it a moment after the ioctl.
    return scene.after(_armed_with_three_pending(scene), patient=True)


@row("armed with three pending, then disarmed: the counter", mshv="0", kvm="0")
def _(scene: Scene) -> str:
    event = _armed_with_three_pending(scene)
    scene.partition.irqfd(event, GSI, deassign=True)
    return str(scene.left(event))


@row("armed with three pending, then a signal", mshv=ONE_ON_MSHV, kvm=ONE_ON_KVM)
def _(scene: Scene) -> str:
    event = _armed_with_three_pending(scene)
    scene.after(scene.event(), patient=True)
    return scene.signalled(event)


@row("the upper half of an address is not 0", mshv="EINVAL", kvm=ACCEPTED)
def _(scene: Scene) -> str:
    return tried(lambda: scene.partition.set_routing([(GSI, 1 << 32 | ADDRESS, VECTOR)]))


@row("after a table with the upper half of an address set: the old table", mshv=ONE_ON_MSHV, kvm=None)
def _(scene: Scene) -> str:
    event = scene.armed()
    tried(lambda: scene.partition.set_routing([(GSI, 1 << 32 | ADDRESS, 0x77)]))
    return scene.signalled(event)


@row("the same GSI twice in a table", mshv="EINVAL", kvm="EINVAL")
def _(scene: Scene) -> str:
    return tried(lambda: scene.partition.set_routing([MSI, MSI]))


@row("after a table with the same GSI twice: the old table", mshv=ONE_ON_MSHV, kvm=ONE_ON_KVM)
def _(scene: Scene) -> str:
    event = scene.armed()
    tried(lambda: scene.partition.set_routing([(GSI, ADDRESS, 0x77), (GSI, ADDRESS, 0x78)]))
    return scene.signalled(event)


@row("GSI 4096 in a table", mshv="EINVAL", kvm="EINVAL")
def _(scene: Scene) -> str:
    return tried(lambda: scene.partition.set_routing([(4096, ADDRESS, VECTOR)]))


@row("GSI 4095 in a table", mshv=ACCEPTED, kvm=ACCEPTED)
def _(scene: Scene) -> str:
    return tried(lambda: scene.partition.set_routing([(4095, ADDRESS, VECTOR)]))


@row("an MSI on a GSI that an IOAPIC pin has", mshv=None, kvm="EINVAL")
def _(scene: Scene) -> str:
    return tried(lambda: scene.partition.set_routing([(3, ADDRESS, VECTOR)]))


@row("4056 MSI entries beside the 40 pins", mshv=None, kvm=ACCEPTED)
def _(scene: Scene) -> str:
    return tried(lambda: scene.partition.set_routing([(GSI + n, ADDRESS, VECTOR) for n in range(4056)]))


@row("4057 MSI entries beside the 40 pins", mshv=None, kvm="EINVAL")
def _(scene: Scene) -> str:
    return tried(lambda: scene.partition.set_routing([(GSI + n, ADDRESS, VECTOR) for n in range(4057)]))


@row("an irqfd on GSI 9999", mshv=ACCEPTED, kvm=ACCEPTED)
def _(scene: Scene) -> str:
    return tried(lambda: scene.partition.irqfd(scene.event(), 9999))


@row("one eventfd on two GSIs", mshv="EBUSY", kvm="EBUSY")
def _(scene: Scene) -> str:
    event = scene.armed()
    return tried(lambda: scene.partition.irqfd(event, GSI + 1))


@row("two eventfds on one GSI, both signalled", mshv=f"{ONE_ON_MSHV} twice", kvm=f"{ONE_ON_KVM} twice")
def _(scene: Scene) -> str:
    first, second = scene.armed(), scene.armed()
    outcomes = [scene.signalled(first), scene.signalled(second)]
    if UNSEEN in outcomes:
        return UNSEEN
    return f"{outcomes[0]} twice" if outcomes[0] == outcomes[1] else " and ".join(outcomes)


@row("an irqfd on a closed descriptor", mshv="EBADF", kvm="EBADF")
def _(scene: Scene) -> str:
    event = scene.event()
    os.close(event)
    return tried(lambda: scene.partition.irqfd(event, GSI))


@row("an irqfd on a file that is no eventfd", mshv="EINVAL", kvm="EINVAL")
def _(scene: Scene) -> str:
    with Path(os.devnull).open("rb") as file:
        return tried(lambda: scene.partition.irqfd(file.fileno(), GSI))


@row("disarming a pair that was never armed", mshv=ACCEPTED, kvm=ACCEPTED)
def _(scene: Scene) -> str:
    return tried(lambda: scene.partition.irqfd(scene.event(), GSI, deassign=True))


@row("five signals, one by one", mshv="5 interrupts", kvm="1 interrupts")
def _(scene: Scene) -> str:
    event = scene.armed()
    scene.arrived()
    for _signal in range(5):
        os.eventfd_write(event, 1)
    arrived = scene.arrived()
    return UNSEEN if arrived is None else f"{len(arrived)} interrupts"


@row("arming with a signal pending: the interrupt, before the ioctl returns", mshv=f"all of {RACES}", kvm=None)
def _(scene: Scene) -> str:
    scene.partition.set_routing([MSI])
    event = scene.event()
    there = 0
    scene.arrived()
    for _time in range(RACES):
        os.eventfd_write(event, 1)
        scene.partition.irqfd(event, GSI)
        arrived = scene.arrived()
        if arrived is None:
            return UNSEEN
        there += len(arrived)
        scene.partition.irqfd(event, GSI, deassign=True)
    return f"all of {RACES}" if there == RACES else f"{there} of {RACES}"


@row("one signal racing the arming of its route", mshv="never 0 times", kvm="never 0 times")
def _(scene: Scene) -> str:
    scene.partition.set_routing([MSI])
    event = scene.event()
    go, gone = threading.Semaphore(0), threading.Semaphore(0)

    def signaller() -> None:
        for _time in range(RACES):
            go.acquire()
            os.eventfd_write(event, 1)
            gone.release()

    thread = threading.Thread(target=signaller)
    thread.start()
    lost, seen = 0, True
    for _time in range(RACES):
        scene.arrived()
        go.release()
        scene.partition.irqfd(event, GSI)
        gone.acquire()
        end = time.monotonic() + PATIENCE
        arrived = scene.arrived()
        while arrived == [] and time.monotonic() < end:
            arrived = scene.arrived()
        seen = seen and arrived is not None
        lost += arrived == []
        scene.partition.irqfd(event, GSI, deassign=True)
    thread.join()
    if not seen:
        return UNSEEN
    return f"lost {lost} times" if lost else "never 0 times"


@row("a resample irqfd on an edge-triggered route", mshv="EINVAL", kvm=ACCEPTED)
def _(scene: Scene) -> str:
    scene.partition.set_routing([MSI])
    return tried(lambda: scene.partition.irqfd(scene.event(), GSI, resample=scene.event()))


@row("a resample irqfd on a level-triggered route", mshv=ACCEPTED, kvm=ACCEPTED)
def _(scene: Scene) -> str:
    scene.partition.set_routing([(GSI, ADDRESS, 1 << 15 | VECTOR)])
    return tried(lambda: scene.partition.irqfd(scene.event(), GSI, resample=scene.event()))


def _in_child(action: Callable[[], str]) -> str:
    """What an action gives in a forked child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            os.write(writer, action().encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@row("a forked child pushes an empty table", mshv=ACCEPTED, kvm="EIO")
def _(scene: Scene) -> str:
    return _in_child(lambda: tried(lambda: scene.partition.set_routing([])))


@row("a forked child disarms, then the parent signals: the counter", mshv="1", kvm="0")
def _(scene: Scene) -> str:
    event = scene.armed()
    _in_child(lambda: tried(lambda: scene.partition.irqfd(event, GSI, deassign=True)))
    os.eventfd_write(event, 1)
    return str(scene.left(event))


@row("partition's descriptor closed while armed, signal", mshv="nothing; counter 1", kvm="counter 1")
def _(scene: Scene) -> str:
    event = scene.armed()
    scene.partition.close()
    os.eventfd_write(event, 1)
    return scene.after(event) if scene.mshv else f"counter {scene.left(event)}"


@row("last descriptor of an armed eventfd closed: its GSI with another one, signal", mshv=ONE_ON_MSHV, kvm=ONE_ON_KVM)
def _(scene: Scene) -> str:
    os.close(scene.armed())
    return scene.signalled(scene.armed())


@contextmanager
def _failing_allocation(number: int) -> Iterator[bool]:
    """Makes the n-th kernel allocation of this thread fail; gives whether the kernel can do that."""
    switch = Path("/proc/thread-self/fail-nth")
    slab = Path("/sys/kernel/debug/failslab/ignore-gfp-wait")
    try:
        slab.write_text("N")
        switch.write_text(str(number))
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        switch.write_text("0")


@row(
    "a kernel allocation fails during a push; then the old table",
    mshv=f"ENOMEM; {ONE_ON_MSHV}",
    kvm=f"ENOMEM; {ONE_ON_KVM}",
)
def _(scene: Scene) -> str:
    event = scene.armed()
    with _failing_allocation(1) as able:
        result = tried(lambda: scene.partition.set_routing([(GSI, ADDRESS, 0x77)]))
    if not able:
        return UNSEEN
    outcome = scene.signalled(event)
    return UNSEEN if outcome == UNSEEN else f"{result}; {outcome}"


def _missing_vp(scene: Scene, options: Namespace) -> str | None:
    # Which scheduler the hypervisor has can't be told; on the root scheduler this ends the host.
    if scene.mshv and not options.may_crash_the_host:
        return None
    return scene.signalled(scene.armed(table=[(GSI, ADDRESS | 5 << 12, VECTOR)]))


ROWS.append(
    Row(
        "physical destination that no VP has, signal (mshv: ends the host on the root scheduler)",
        _missing_vp,
        mshv=f"{VECTOR:#04x} to APIC 5; counter 0",
        kvm=NOTHING,
    )
)


class Torn(threading.Thread):
    """Counts interrupts that are not the one that was routed, as fast as they come."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self.count = 0
        self.overflowed = False
        self._scene = scene
        self._stop_asked = threading.Event()

    def run(self) -> None:
        """Counts until asked to stop."""
        while not self._stop_asked.is_set():
            self._look()

    def stop(self) -> int:
        """Ends the thread and returns the count, what is still unread included."""
        self._stop_asked.set()
        self.join()
        self._look()
        return self.count

    def _look(self) -> None:
        if self._scene.observer is None:
            arrived = self._scene.arrived() or []
            self.count += sum(not interrupt.startswith(f"{VECTOR:#04x}") for interrupt in arrived)
            return
        while True:
            try:
                data = os.read(self._scene.observer, RECORD.size * 1024)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.EOVERFLOW:
                    raise
                self.overflowed = True
                continue
            # Nearly always all records are the same, which is seen without taking them apart.
            if RECORD.unpack_from(data)[3] == VECTOR and data == data[: RECORD.size] * (len(data) // RECORD.size):
                continue
            self.count += sum(vector != VECTOR for _, _, _, vector, _ in RECORD.iter_unpack(data))


def _torn_pushes(options: Namespace, device: str) -> list[Finding]:
    """Signals while pushing, without quiescing and with: how many become another interrupt."""
    if not options.torn_pushes:
        return []
    findings = []
    for quiesce in (False, True):
        with closing(Scene(options, device)) as scene:
            torn = Torn(scene)
            event = scene.armed()
            torn.start()
            pushes, signals = scene.partition.push_while_signalling([MSI], event, GSI, quiesce, options.torn_pushes)
            count = torn.stop()
            seen = not scene.mshv or scene.observer is not None
        done = f"signals while another thread pushes an unchanged table{', quiesced' if quiesce else ''}"
        found = f"{count} torn in {pushes} pushes and {signals} signals" if seen else UNSEEN
        if torn.overflowed:
            found += ", of which some were missed"
        # Without quiescing the number is chance; it is reported, and shows why quiescing is the default on mshv.
        expected = "none torn" if quiesce or not scene.mshv else "some torn"
        findings.append(Finding(done, expected, found, differs=expected == "none torn" and seen and count > 0))
    return findings
