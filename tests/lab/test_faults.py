"""Each kernel allocation and each hypercall fails in turn, under every operation of the package.

Only in the lab: the kernel's own fault injection fails the allocations, and the stand-in fails the hypercalls.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from backends import Backend, MshvGuest
from hvstub import ANY, HvStub, Hypercall, Outcome, Status, kernel_allocation_fails
from mshv_irqfd import (
    HypervisorUnavailableError,
    IrqFdError,
    IrqFdRoute,
    MshvIrqFdError,
    Partition,
    RoutingError,
    VpError,
    open_partition,
)
from needs import need
from support import msi, places, rare, still_works

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT = 500
"""More allocations or hypercalls than any operation makes."""


@pytest.fixture
def stub() -> Iterator[HvStub]:
    need("mshv")
    with open_partition("mshv") as partition:
        yield MshvGuest(partition).stub


@dataclass
class Scene:
    """Routes in four states: two armed, one masked on a stale entry, one without an MSI."""

    guest: MshvGuest
    routes: list[IrqFdRoute]
    event: int

    @property
    def partition(self) -> Partition:
        return self.guest.partition

    def seen(self) -> list[Any]:
        """The whole state that callers can see."""
        partition = self.partition
        routes = [
            (route.gsi, route.state, route.armed_gsi, route.masked, route.msi, route.pending)
            for route in partition.routes
        ]
        return [
            routes,
            places(partition, partition.routes),
            [partition.gsi_state(gsi) for gsi in range(24, 32)],
            partition.vps,
        ]


@pytest.fixture
def make_scene(stub: HvStub) -> Iterator[Callable[..., Scene]]:
    made: list[Scene] = []
    assert stub.fileno() >= 0

    def make(**options: Any) -> Scene:
        partition = Backend("mshv").open(gsis=range(24, 32), **options)
        routes = [partition.new_irqfd_route() for _ in range(4)]
        for number, route in enumerate(routes[:3]):
            route.set_msi(msi(0x40 + number))
        routes[2].mask()
        routes[2].set_msi(msi(0x50))
        scene = Scene(MshvGuest(partition), routes, os.eventfd(0, os.EFD_NONBLOCK))
        made.append(scene)
        return scene

    yield make
    for scene in made:
        os.close(scene.event)
        scene.guest.close()


def batch(scene: Scene) -> None:
    with scene.partition.batch() as changes:
        changes.set_msi(scene.routes[0], msi(0x60))
        changes.mask(scene.routes[1])
        changes.unmask(scene.routes[2])
        changes.set_msi(scene.routes[3], msi(0x61))


OPERATIONS: dict[str, Callable[[Scene], object]] = {
    "new route": lambda scene: scene.partition.new_irqfd_route(),
    "new route on a caller's eventfd": lambda scene: scene.partition.new_irqfd_route(event=scene.event),
    "enable": lambda scene: scene.routes[3].set_msi(msi(0x70)),
    "retarget": lambda scene: scene.routes[0].set_msi(msi(0x71)),
    "retarget to a message that is not loaded": lambda scene: scene.routes[0].set_msi(rare(0x71)),
    "unmask": lambda scene: scene.routes[2].unmask(),
    "mask": lambda scene: scene.routes[0].mask(),
    "clear": lambda scene: scene.routes[0].clear_msi(),
    "batch": batch,
    "create a VP": lambda scene: scene.partition.create_vp(1),
    "close a route": lambda scene: scene.routes[0].close(),
}


ERRNOS = {
    # If a file of /proc gets no inode, opening it gives ENOENT (fs/proc/fd.c); if it gets no file structure, ENFILE.
    "new route on a caller's eventfd": (errno.ENOMEM, errno.ENOENT, errno.ENFILE),
    "new route": (errno.ENOMEM, errno.ENFILE),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("quiesce", "preload"), [(True, False), (False, False), (True, True)], ids=["quiesced", "unquiesced", "loaded"]
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_kernel_allocation_that_fails_changes_nothing(
    make_scene: Callable[..., Scene], operation: str, quiesce: bool, preload: bool
) -> None:
    failed = 0
    for number in range(1, LIMIT):
        scene = make_scene(quiesce=quiesce, preload=preload)
        before = scene.seen()
        error: OSError | None = None
        with kernel_allocation_fails(number) as outcome:
            try:
                result = OPERATIONS[operation](scene)
            except OSError as raised:
                error = raised
        if error is not None:
            assert outcome.injected, error
            assert isinstance(error, (RoutingError, IrqFdError, VpError)), error
            assert error.errno in ERRNOS.get(operation, (errno.ENOMEM,)), error
            assert isinstance(error, MshvIrqFdError)
            assert scene.seen() == before
            scene.guest.receives_nothing()
            failed += 1
            # A second try succeeds.
            result = OPERATIONS[operation](scene)
        scene.guest.receives_nothing()
        if isinstance(result, IrqFdRoute):
            result.close()
        scene.partition.routes[-1].close()
        still_works(scene.guest)
        scene.partition.close()
        if not outcome.injected:
            break
    else:
        pytest.fail(f"{operation} makes more than {LIMIT} allocations")
    if operation in (
        "enable",
        "retarget",
        "retarget to a message that is not loaded",
        "unmask",
        "batch",
        "create a VP",
        "new route",
    ):
        assert failed > 0, "nothing failed: the test proves nothing"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", ["allocations", "hypercalls"])
def test_opening_a_partition_fails_cleanly_wherever_it_fails(stub: HvStub, what: str) -> None:
    before = stub.counters()
    failed = 0
    for number in range(1, LIMIT):
        error: OSError | None = None
        with kernel_allocation_fails(number) if what == "allocations" else stub.failing(ANY, nth=number) as outcome:
            try:
                partition = open_partition("mshv", vps=2)
            except (HypervisorUnavailableError, VpError) as raised:
                error = raised
        if error is not None:
            assert outcome.injected, error
            assert error.errno in ((errno.ENOMEM,) if what == "allocations" else (errno.EIO, errno.EINVAL)), error
            failed += 1
        else:
            still_works(MshvGuest(partition))
            partition.close()
        after = stub.counters()
        assert (after.partitions, after.vps) == (before.partitions, before.vps), f"{what} {number}: {error}"
        if not outcome.injected:
            break
    else:
        pytest.fail(f"opening makes more than {LIMIT} {what}")
    assert failed > 3


@pytest.mark.parametrize("code", [Hypercall.CREATE_VP, Hypercall.MAP_VP_STATE_PAGE, Hypercall.MAP_STATS_PAGE])
def test_a_vp_that_the_hypervisor_refuses_leaves_the_partition_as_it_was(
    make_scene: Callable[..., Scene], stub: HvStub, code: Hypercall
) -> None:
    scene = make_scene()
    before = scene.seen()
    struck = 0
    for number in range(1, LIMIT):
        outcome: Outcome
        with stub.failing(code, Status.OPERATION_FAILED, number) as outcome:
            try:
                scene.partition.create_vp(1)
            except VpError as error:
                refusal = error.errno
            else:
                refusal = None
        if not outcome.injected:
            break
        if refusal is not None:
            assert refusal == errno.EIO
            assert scene.seen() == before
            struck += 1
    assert struck > 0
    assert scene.partition.vps == (0, 1)
    still_works(scene.guest)


def test_an_interrupt_that_the_hypervisor_refuses_is_lost_without_an_error(
    make_scene: Callable[..., Scene], stub: HvStub
) -> None:
    scene = make_scene()
    if scene.guest.root:
        pytest.skip("the fast path of the root scheduler makes no hypercall")
    with stub.failing(Hypercall.ASSERT_VIRTUAL_INTERRUPT, Status.OPERATION_FAILED) as outcome:
        scene.routes[0].signal()
    assert outcome.injected
    assert [asserted.status for asserted in stub.take()] == [Status.OPERATION_FAILED]
    assert not scene.routes[0].pending
    still_works(scene.guest)


@pytest.mark.timeout(600)
def test_closed_partitions_with_routes_leave_nothing_behind(stub: HvStub) -> None:
    before = stub.counters().held
    for _ in range(100):
        with open_partition("mshv", vps=2) as partition:
            route = partition.new_irqfd_route()
            route.set_msi(msi(0x41))
    assert stub.counters().held == before
