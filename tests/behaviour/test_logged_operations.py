"""Every operation logs its calls into the kernel before it returns, not with the next operation."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from driver import Driver
from mshv_irqfd import IoEventFdError, IrqFdError, MshvIrqFdError, MsiCapability, MsixTable, Partition
from support import collect, counting, msi, rare

if TYPE_CHECKING:
    from backends import Guest
    from faults import Faults
    from mshv_irqfd import IoEventFd, IrqFdRoute
    from mshv_irqfd.testing import SimulatedCall

NAME = "mshv_irqfd"
ADDRESS = 0xD0000000

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.thread_unsafe(reason="a test has one device, which it makes"),
]


class Scene:
    """A partition, and what operations need: things of each kind, made when they are asked for."""

    def __init__(self, guest: Guest, stack: ExitStack) -> None:
        self.guest, self.stack, self.partition = guest, stack, guest.partition

    def route(self, *, armed: bool = True) -> IrqFdRoute:
        route = self.stack.enter_context(self.partition.new_irqfd_route())
        if armed:
            route.set_msi(msi(0x41))
        return route

    def doorbell(self) -> IoEventFd:
        return self.stack.enter_context(self.partition.ioeventfd(ADDRESS, 4))

    def table(self) -> Driver:
        """A table with an armed vector."""
        driver = Driver(self.guest, 4)
        self.stack.enter_context(driver.table)
        driver.bring_up(msi(0x41))
        return driver

    def capability(self, *, enabled: bool = True) -> MsiCapability:
        """A capability with an armed vector."""
        capability = self.stack.enter_context(MsiCapability(self.partition, 2))
        capability.write_config(4, msi(0x41).address.to_bytes(4, "little"))
        capability.write_config(12, (0x41).to_bytes(2, "little"))
        if enabled:
            enable(capability)
        return capability

    def eventfd(self) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.stack.callback(os.close, fd)
        return fd

    def kept(self, thing: Any) -> None:
        """Closes things at the end of the test."""
        for one in thing.values() if isinstance(thing, dict) else [thing]:
            self.stack.enter_context(one)


def enable(capability: MsiCapability) -> None:
    capability.write_config(2, (1).to_bytes(2, "little"))


Act = Callable[[], Any]


def beside(_thing: object, act: Act) -> Act:
    """The operation, once a thing has been made."""
    return act


def committed(scene: Scene) -> Act:
    batch, route = scene.partition.batch(), scene.route()
    batch.set_msi(route, rare(0x51))
    return batch.commit


def committed_at_the_end(scene: Scene) -> Act:
    route = scene.route()

    def act() -> None:
        with scene.partition.batch() as batch:
            batch.mask(route)

    return act


def at_the_end(thing: Any) -> Act:
    def act() -> None:
        with thing:
            pass

    return act


def collected(scene: Scene, make: Callable[[], Any]) -> Act:
    """Drops the last reference to a thing."""
    things = [make()]
    # The scene refers to it, to close it after a failure.
    scene.stack.pop_all()

    def act() -> None:
        things.clear()
        collect()

    return act


def routes_restored(scene: Scene, **options: Any) -> Act:
    route = scene.route()
    state = scene.partition.save()
    route.close()
    return lambda: scene.kept(scene.partition.restore(state, **options))


def device_restored(scene: Scene, device: MsixTable | MsiCapability) -> Act:
    state = device.save()
    device.close()
    return lambda: scene.kept(type(device).restore(scene.partition, state))


def retried(scene: Scene) -> Act:
    """A vector that could not be armed, and now can: its VP has been made."""
    driver = scene.table()
    driver.set_message(1, msi(0x42, 1))
    driver.unmask(1)
    scene.partition.create_vp(1)
    return driver.table.retry_faults


OPERATIONS: dict[str, Callable[[Scene], Act]] = {
    "a new route": lambda scene: scene.route(armed=False).close,
    "a new route on an eventfd": lambda scene: (
        lambda: scene.kept(scene.partition.new_irqfd_route(event=scene.eventfd()))
    ),
    "set_msi": lambda scene: partial(scene.route().set_msi, rare(0x51)),
    "clear_msi": lambda scene: scene.route().clear_msi,
    "mask": lambda scene: scene.route().mask,
    "set_event": lambda scene: partial(scene.route().set_event, scene.eventfd()),
    "consume_pending": lambda scene: scene.route().consume_pending,
    "the close of a route": lambda scene: scene.route().close,
    "the end of a route's block": lambda scene: at_the_end(scene.route()),
    "the finalizer of a route": lambda scene: collected(scene, scene.route),
    "a batch": committed,
    "the end of a batch's block": committed_at_the_end,
    "Partition.save": lambda scene: beside(scene.route(), scene.partition.save),
    "Partition.restore": routes_restored,
    "Partition.restore with doorbells": lambda scene: beside(
        scene.doorbell(), routes_restored(scene, ring_doorbells=True)
    ),
    "create_vp": lambda scene: partial(scene.partition.create_vp, 1),
    "signal_msi": lambda scene: partial(scene.partition.signal_msi, msi(0x41)),
    "settle": lambda scene: beside(scene.route(), scene.partition._settle),
    "the close of a partition": lambda scene: beside(scene.route(), scene.partition.close),
    "the end of a partition's block": lambda scene: beside(scene.route(), at_the_end(scene.partition)),
    "the finalizer of a partition": lambda scene: beside(scene.route(), partial(finalize, scene.partition)),
    "a doorbell": lambda scene: scene.doorbell,
    "the close of a doorbell": lambda scene: scene.doorbell().close,
    "MsixTable": lambda scene: lambda: scene.kept(MsixTable(scene.partition, 4, events={1: scene.eventfd()})),
    "write_message_control": lambda scene: partial(scene.table().control, 0),
    "write_table": lambda scene: partial(scene.table().mask, 0),
    "vectors[i].event": lambda scene: partial(getattr, scene.table()[3], "event"),
    "the reset of a table": lambda scene: scene.table().table.reset,
    "retry_faults": retried,
    "MsixTable.save": lambda scene: scene.table().table.save,
    "MsixTable.restore": lambda scene: device_restored(scene, scene.table().table),
    "the close of a table": lambda scene: scene.table().table.close,
    "the end of a table's block": lambda scene: at_the_end(scene.table().table),
    "the finalizer of a table": lambda scene: collected(scene, scene.table),
    "write_config": lambda scene: partial(enable, scene.capability(enabled=False)),
    "MsiCapability.save": lambda scene: scene.capability().save,
    "MsiCapability.restore": lambda scene: device_restored(scene, scene.capability()),
}
"""What prepares each operation. It returns the operation."""

SILENT = {
    "a new route",
    "a new route on an eventfd",
    "consume_pending",
    "create_vp",
    "signal_msi",
    "a doorbell",
    "the close of a doorbell",
    "MsixTable",
    "vectors[i].event",
}
"""Those that push, arm and disarm nothing."""


def finalize(partition: Partition) -> None:
    """What collecting the partition does."""
    partition.__del__()


def logged(caplog: pytest.LogCaptureFixture) -> Counter[str]:
    """The records so far, by their first word. Forgets them."""
    words = Counter(record.getMessage().split(": ", 1)[1].split()[0].strip(":") for record in caplog.records)
    caplog.clear()
    return words


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_logs_its_calls_before_it_returns(
    guest: Guest, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, NAME), ExitStack() as stack:
        guest.partition.log_calls = True
        act = OPERATIONS[name](Scene(guest, stack))
        # A commit of nothing logs what an operation before it has left.
        guest.partition.batch().commit()
        caplog.clear()
        with counting(guest.partition) as made:
            act()
        told = logged(caplog)
        stats = made.stats
        assert told == +Counter(armed=stats.arms, disarmed=stats.disarms, pushed=stats.pushes)
        # On KVM alone settling takes calls.
        quiet = name in SILENT or (name == "settle" and guest.partition.backend != "kvm")
        assert bool(told) != quiet
        if not guest.partition.closed:
            guest.partition.batch().commit()
            assert logged(caplog) == {}
            guest.arrived()
    guest.partition.log_calls = False


REFUSED: dict[str, tuple[Callable[[Scene], Act], SimulatedCall]] = {
    "set_msi": (lambda scene: partial(scene.route(armed=False).set_msi, msi(0x41)), "assign_irqfd"),
    "the close of a route": (lambda scene: scene.route().close, "deassign_irqfd"),
    "the finalizer of a route": (lambda scene: collected(scene, scene.route), "deassign_irqfd"),
    "signal_msi": (lambda scene: partial(scene.partition.signal_msi, msi(0x41)), "signal_msi"),
    "a doorbell": (lambda scene: scene.doorbell, "assign_ioeventfd"),
    "the end of a doorbell's block": (lambda scene: at_the_end(scene.doorbell()), "deassign_ioeventfd"),
    "the finalizer of a doorbell": (lambda scene: collected(scene, scene.doorbell), "deassign_ioeventfd"),
    "Partition.restore": (routes_restored, "assign_irqfd"),
    "MsixTable.restore": (lambda scene: device_restored(scene, scene.table().table), "assign_irqfd"),
    "MsiCapability.restore": (lambda scene: device_restored(scene, scene.capability()), "assign_irqfd"),
    "the finalizer of a table": (lambda scene: collected(scene, scene.table), "deassign_irqfd"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_operation_logs_what_the_kernel_refused_before_it_returns(
    guest: Guest, faults: Faults, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Finalizers report there.
    reported = list[type[BaseException]]()
    monkeypatch.setattr(sys, "unraisablehook", lambda hooked: reported.append(hooked.exc_type))
    with ExitStack() as stack:
        prepare, call = REFUSED[name]
        act = prepare(Scene(guest, stack))
        caplog.clear()
        faults.fail(guest.partition, call, errno.EIO)
        with counting(guest.partition) as made:
            try:
                faults.run(act)
            except MshvIrqFdError as error:
                reported.append(type(error))
        assert made.stats.failures == 1
        assert logged(caplog) == {"refused": 1}
        assert len(reported) == 1
    with suppress(IrqFdError, IoEventFdError):
        guest.partition.close()
