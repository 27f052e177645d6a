"""The rows of the probe: the steps of each, and the result that this package expects of each kernel."""

from __future__ import annotations

import os
import threading
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mshv_irqfd._cli.probe.finding import UNSEEN, Finding
from mshv_irqfd._cli.probe.scene import ACCEPTED, ADDRESS, GSI, MSI, OTHER, PATIENCE, VECTOR, Scene, tried

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Iterator

RACES: Final = 300
ONE_ON_MSHV: Final = f"{VECTOR:#04x} to APIC 0; counter 0"
ONE_ON_KVM: Final = f"{VECTOR:#04x}; counter 0"
OTHER_ON_MSHV: Final = f"{OTHER[2]:#04x} to APIC 0; counter 0"
OTHER_ON_KVM: Final = f"{OTHER[2]:#04x}; counter 0"
NOTHING: Final = "nothing; counter 0"
BOGUS: Final = "0x00 to APIC 0; counter 0"


@dataclass(frozen=True)
class Row:
    """The steps, which return None if they did not run; and the expected results, None for a kernel without the row."""

    done: str
    act: Callable[[Scene], str | None]
    mshv: str | None
    kvm: str | None


ROWS: list[Row] = []


def row(done: str, *, mshv: str | None, kvm: str | None) -> Callable[[Callable[[Scene], str | None]], None]:
    """Adds a function to the rows."""

    def add(act: Callable[[Scene], str | None]) -> None:
        ROWS.append(Row(done, act, mshv, kvm))

    return add


def measure(row: Row, options: Namespace, device: str) -> Finding:
    """Runs a row on a new partition, and compares the result with the expected one."""
    expected = row.mshv if options.backend == "mshv" else row.kvm
    if expected is None:
        return Finding(row.done, "", "not applicable to this kernel", differs=False)
    with closing(Scene(options, device)) as scene:
        found = row.act(scene)
    if found is None:
        return Finding(row.done, expected, "not run", differs=False)
    return Finding(row.done, expected, found, differs=found not in (expected, UNSEEN))


@row("armed and routed, signal", mshv=ONE_ON_MSHV, kvm=ONE_ON_KVM)
def _(scene: Scene) -> str:
    return scene.signalled(scene.armed())


@row("armed, route removed from the table, no higher GSI routed, signal", mshv=NOTHING, kvm=NOTHING)
def _(scene: Scene) -> str:
    event = scene.armed()
    scene.partition.set_routing([])
    return scene.signalled(event)


@row("armed, route removed from the table, a higher GSI routed, signal", mshv=BOGUS, kvm=NOTHING)
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
    # KVM raises the interrupt shortly after the ioctl returns.
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


@row("an address with its upper half set", mshv="EINVAL", kvm=ACCEPTED)
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


@row("GSI 4095 armed and routed, signal", mshv=ONE_ON_MSHV, kvm=ONE_ON_KVM)
def _(scene: Scene) -> str:
    return scene.signalled(scene.armed(4095, [(4095, ADDRESS, VECTOR)]))


@row("4096 MSI entries, GSI 0 to 4095", mshv=ACCEPTED, kvm=None)
def _(scene: Scene) -> str:
    return tried(lambda: scene.partition.set_routing([(gsi, ADDRESS, VECTOR) for gsi in range(4096)]))


@row("an MSI on the GSI of an IOAPIC pin", mshv=None, kvm="EINVAL")
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
    return _both(scene.signalled(first), scene.signalled(second))


def _both(first: str, second: str) -> str:
    """Joins two results."""
    if UNSEEN in (first, second):
        return UNSEEN
    return f"{first} twice" if first == second else f"{first}, then {second}"


@row(
    "two eventfds on one GSI, the first one disarmed, both signalled",
    mshv=f"nothing; counter 1, then {ONE_ON_MSHV}",
    kvm=f"nothing; counter 1, then {ONE_ON_KVM}",
)
def _(scene: Scene) -> str:
    first, second = scene.armed(), scene.armed(table=[])
    scene.partition.irqfd(first, GSI, deassign=True)
    return _both(scene.signalled(first), scene.signalled(second))


@row("armed at an entry that 50 pushes left alone, signal", mshv=OTHER_ON_MSHV, kvm=OTHER_ON_KVM)
def _(scene: Scene) -> str:
    scene.armed(table=[MSI, OTHER])
    for change in range(50):
        scene.partition.set_routing([MSI, OTHER, *((GSI + 2 + n, ADDRESS, VECTOR + change) for n in range(change))])
    return scene.signalled(scene.armed(OTHER[0], table=[]))


@row(
    "one GSI armed, the entry of another replaced, signal; then the other armed, signal",
    mshv=f"{ONE_ON_MSHV}, then {OTHER_ON_MSHV}",
    kvm=f"{ONE_ON_KVM}, then {OTHER_ON_KVM}",
)
def _(scene: Scene) -> str:
    event = scene.armed(table=[MSI, (OTHER[0], ADDRESS, 0x77)])
    scene.partition.set_routing([MSI, OTHER])
    return _both(scene.signalled(event), scene.signalled(scene.armed(OTHER[0], table=[])))


@row(
    "disarmed, a signal, armed at another GSI",
    mshv=f"{OTHER[2]:#04x} to APIC 0; counter 1",
    kvm=f"{OTHER[2]:#04x}; counter 1",
)
def _(scene: Scene) -> str:
    event = scene.armed(table=[MSI, OTHER])
    scene.arrived()
    scene.partition.irqfd(event, GSI, deassign=True)
    os.eventfd_write(event, 1)
    scene.partition.irqfd(event, OTHER[0])
    return scene.after(event, patient=True)


@row("an irqfd on a closed descriptor", mshv="EBADF", kvm="EBADF")
def _(scene: Scene) -> str:
    event = scene.event()
    os.close(event)
    return tried(lambda: scene.partition.irqfd(event, GSI))


@row("an irqfd on a file that is not an eventfd", mshv="EINVAL", kvm="EINVAL")
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
    for _ in range(5):
        os.eventfd_write(event, 1)
    arrived = scene.arrived()
    return UNSEEN if arrived is None else f"{len(arrived)} interrupts"


@row("armed with a signal pending: the interrupt arrives before the ioctl returns", mshv=f"all of {RACES}", kvm=None)
def _(scene: Scene) -> str:
    scene.partition.set_routing([MSI])
    event = scene.event()
    in_time = 0
    scene.arrived()
    for _ in range(RACES):
        os.eventfd_write(event, 1)
        scene.partition.irqfd(event, GSI)
        arrived = scene.arrived()
        if arrived is None:
            return UNSEEN
        in_time += len(arrived)
        scene.partition.irqfd(event, GSI, deassign=True)
    return f"all of {RACES}" if in_time == RACES else f"{in_time} of {RACES}"


def _race(scene: Scene, event: int, act: Callable[[], object], after: Callable[[], object]) -> str:
    """Acts while another thread signals once, many times over, and counts the signals that raise no interrupt."""
    go, gone, over = threading.Semaphore(0), threading.Semaphore(0), threading.Event()

    def signaller() -> None:
        while go.acquire() and not over.is_set():
            os.eventfd_write(event, 1)
            gone.release()

    thread = threading.Thread(target=signaller)
    lost, seen = 0, True
    try:
        thread.start()
        for _ in range(RACES):
            scene.arrived()
            go.release()
            act()
            gone.acquire()
            end = time.monotonic() + PATIENCE
            arrived = scene.arrived()
            while arrived == [] and time.monotonic() < end:
                arrived = scene.arrived()
            seen = seen and arrived is not None
            lost += arrived == []
            after()
    finally:
        # Also after an error or Ctrl-C: a thread that waits would keep the program from ending.
        over.set()
        go.release()
        thread.join()
    if not seen:
        return UNSEEN
    return f"lost {lost} times" if lost else "never lost"


@row("one signal concurrent with the arming of its route", mshv="never lost", kvm="never lost")
def _(scene: Scene) -> str:
    scene.partition.set_routing([MSI])
    event = scene.event()
    return _race(
        scene,
        event,
        lambda: scene.partition.irqfd(event, GSI),
        lambda: scene.partition.irqfd(event, GSI, deassign=True),
    )


@row("one signal concurrent with a move to another GSI (disarmed, armed there)", mshv="never lost", kvm="never lost")
def _(scene: Scene) -> str:
    event = scene.armed(table=[MSI, OTHER])
    gsis = [GSI, OTHER[0]]

    def move() -> None:
        scene.partition.irqfd(event, gsis[0], deassign=True)
        scene.partition.irqfd(event, gsis[1])
        gsis.reverse()

    # KVM may still be delivering the signal once more. The second move waits for that.
    return _race(scene, event, move, move)


@row("a resample irqfd on an edge-triggered route", mshv="EINVAL", kvm=ACCEPTED)
def _(scene: Scene) -> str:
    scene.partition.set_routing([MSI])
    return tried(lambda: scene.partition.irqfd(scene.event(), GSI, resample=scene.event()))


@row("a resample irqfd on a level-triggered route", mshv=ACCEPTED, kvm=ACCEPTED)
def _(scene: Scene) -> str:
    scene.partition.set_routing([(GSI, ADDRESS, 1 << 15 | VECTOR)])
    return tried(lambda: scene.partition.irqfd(scene.event(), GSI, resample=scene.event()))


def _in_child(action: Callable[[], str]) -> str:
    """Runs an action in a forked child and returns its result."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            os.write(writer, action().encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        result = pipe.read()
    os.waitpid(child, 0)
    return result


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


@row("last descriptor of an armed eventfd closed, another armed on its GSI, signal", mshv=ONE_ON_MSHV, kvm=ONE_ON_KVM)
def _(scene: Scene) -> str:
    os.close(scene.armed())
    return scene.signalled(scene.armed())


@contextmanager
def _failing_allocation(number: int) -> Iterator[bool]:
    """Makes the n-th kernel allocation of this thread fail; yields whether the kernel supports that."""
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
    with _failing_allocation(1) as supported:
        result = tried(lambda: scene.partition.set_routing([(GSI, ADDRESS, 0x77)]))
    if not supported:
        return UNSEEN
    outcome = scene.signalled(event)
    return UNSEEN if outcome == UNSEEN else f"{result}; {outcome}"


@row(
    "physical destination that no VP has, signal (mshv: crashes a host on the root scheduler)",
    mshv=f"{VECTOR:#04x} to APIC 5; counter 0",
    kvm=NOTHING,
)
def _(scene: Scene) -> str | None:
    # User space cannot tell which scheduler the hypervisor uses.
    if scene.mshv and not scene.may_crash_the_host:
        return None
    return scene.signalled(scene.armed(table=[(GSI, ADDRESS | 5 << 12, VECTOR)]))
