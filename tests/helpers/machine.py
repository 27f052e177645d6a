"""The steps of the model test: each changes a partition and its model alike, and then compares the two."""

from __future__ import annotations

import errno
import functools
import math
import os
import select
import threading
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, ParamSpec

import faults
import model
import pytest
from backends import Backend, KvmGuest, MshvGuest, SimulatedGuest
from faults import CALLS, KernelFaults
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from mshv_irqfd import (
    ClosedError,
    GsiExhaustedError,
    GsiState,
    Interrupt,
    IrqFdError,
    IrqFdRoute,
    KvmPartition,
    MissingVpError,
    MsiRoute,
    Partition,
    RouteBrokenError,
    RoutingEntry,
    RoutingError,
    VpError,
)
from mshv_irqfd._guest import CountingGuest
from mshv_irqfd.testing import SimulatedCall, patience
from raw_kvm import KvmVm
from support import MANY, recorded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from backends import Guest

P = ParamSpec("P")
Action = Literal["set_msi", "clear_msi", "mask", "unmask"]

FAILURE = st.tuples(st.sampled_from(CALLS), st.integers(0, 3), st.integers(1, 3))
ONE_FAILURE = st.none() | st.tuples(st.sampled_from(CALLS), st.integers(0, 3))
"""A fault at most: if a rollback fails too, an eventfd may stay armed for a route that it was to move to."""
FAILURES: st.SearchStrategy[list[tuple[SimulatedCall, int, int]]] = st.one_of(
    # Few at a time: if most steps fail, all routes are soon broken, and nothing is left to try.
    st.just([]),
    st.just([]),
    st.just([]),
    FAILURE.map(lambda one: [(*one[:2], 1)]),
    st.lists(FAILURE, min_size=2, max_size=3),
)
"""Faults: the call, the number of calls that succeed before, and the number of calls that fail."""

FIRST_GSI = 24
FEW = 6
"""The number of spare GSIs that are soon all in use."""
ADOPTED_SPARES = 300
"""The first spare GSI of an adopted VM."""
Loading = Literal["off", "few", "all", "crowded"]
"""The spare GSIs of a partition. Where a small table is pushed in place, "few" and "crowded" have many more routes."""
KEPT = {200: MsiRoute.fixed(0xC8, 0)}
FULL = 2**64 - 2


def msi_of(gsi: int, number: int) -> MsiRoute:
    """One of eight MSIs that no other GSI has: most to VP 0, two to VPs that may be created later, one logical."""
    vector = 0x20 + 8 * (gsi - FIRST_GSI) + number
    data = {3: 0x100, 4: 0xC000}.get(number, 0)  # lowest priority; level-triggered
    address = {5: 0x4 | 1 << 12, 6: 1 << 12, 7: 5 << 12}.get(number, 0)  # logical; physical
    return MsiRoute(0xFEE00000 | address, data | vector)


def gsi_of(vector: int) -> int:
    return FIRST_GSI + (vector - 0x20) // 8


class AdoptedGuest(KvmGuest):
    """An adopted VM of KVM."""

    def __init__(self, vm: KvmVm, partition: KvmPartition) -> None:
        self.vm = vm
        super().__init__(partition)

    def _run(self) -> CountingGuest:
        running = CountingGuest(self.vm, patience=patience())
        running.add(0, os.dup(self.vm.vcpu))
        return running


class Options(NamedTuple):
    """The options of a partition."""

    quiesce: bool | None = None
    size: int = 1
    any_vp: bool = False
    loading: Loading = "off"


def at_times(self: Machine) -> bool:
    """Makes a rule rare, so that most steps change and signal routes, and some routes are armed."""
    return len(self.script) % 8 == 0


def step(function: Callable[P, None]) -> Callable[P, None]:
    """Records a step as a line of a script, makes it, and compares everything."""

    @functools.wraps(function)
    def logged(*args: P.args, **kwargs: P.kwargs) -> None:
        machine = args[0]
        assert isinstance(machine, Machine)
        arguments = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
        machine.script.append(f"machine.{function.__name__}({arguments})")
        try:
            machine.faults.run(functools.partial(function, *args, **kwargs))
            machine.compare()
        except Exception as error:
            error.add_note("A script that replays this, to run in tests/helpers:\n" + "\n".join(machine.script))
            raise
        Machine.steps += 1

    return logged


class Machine(RuleBasedStateMachine):
    """A partition, its model, and the steps that change both."""

    runs = steps = failed = races = pushes = hits = 0

    def __init__(self, name: str) -> None:
        super().__init__()
        Machine.runs += 1
        self.name = name
        self.script = ["from machine import Machine", f"machine = Machine({name!r})"]
        self.options = Options()
        self.faults = faults.of(name)
        self.handles: list[tuple[IrqFdRoute, model.Route]] = []
        self.closed: list[IrqFdRoute] = []
        self.events: dict[int, model.Event] = {}
        """The caller's eventfds, which outlive their routes."""
        self.owed = 0
        """The number of faults that have not struck yet."""
        self.epoll: tuple[int, set[int]] | None = None
        self.open_partition()

    # Opening and closing

    def open_partition(self) -> None:
        quiesce, size, any_vp, loading = self.options
        self.faults.clear()
        mine = range(FIRST_GSI, FIRST_GSI + size)
        in_place = self.name in ("kvm", "adopted") and not quiesce
        crowd = MANY if in_place and loading in ("few", "crowded") else 0
        gsis = range(FIRST_GSI, FIRST_GSI + size + crowd)
        files = _epolls()
        self.guest: Guest
        if self.name == "adopted":
            self.vm = KvmVm()
            keep = [RoutingEntry(gsi, msi.address, msi.data) for gsi, msi in KEPT.items()]
            end = {"off": ADOPTED_SPARES, "few": ADOPTED_SPARES + FEW}.get(loading, 4000)
            spare = range(ADOPTED_SPARES, end)
            partition = Partition.from_fd(
                self.vm, "kvm", gsis=gsis, keep=keep, spare=spare, vps=None if any_vp else 1, quiesce=quiesce
            )
            assert isinstance(partition, KvmPartition)
            self.guest = AdoptedGuest(self.vm, partition)
        else:
            if loading == "few":
                gsis = range(FIRST_GSI, FIRST_GSI + 4096 - (40 if self.name == "kvm" else FIRST_GSI) - FEW)
            spare = range(gsis.stop if loading != "off" else 4096, 4096)
            backend = Backend(self.name)
            partition = backend.open(gsis=gsis, quiesce=quiesce, allow_missing_vp=any_vp, preload=loading != "off")
            self.guest = backend.guest(partition)
        self.partition = partition
        self.may_exhaust = len(gsis) == size + crowd
        self.crowd = [partition.new_irqfd_route() for _ in range(size + crowd)] if crowd else []
        for route in self.crowd[:size]:
            route.close()
        spares = model.Spares(
            spare,
            in_place,
            brings_home=partition.quiesce and loading == "few",
            # Few routes of KVM have a loaded table after as many masked retargets, each of which was a push.
            loads_after=math.inf if loading == "off" else len(spare) // 64 - 1 if in_place and not crowd else 0,
            fit=loading != "few",
        )
        self.model = model.Partition(mine, {0}, KEPT if self.name == "adopted" else {}, spares, any_vp=any_vp)
        self.counts = partition.stats()
        self.owed = self.failures = 0
        if isinstance(self.guest, SimulatedGuest):
            (fd,) = _epolls() - files
            self.epoll = fd, _watched(fd)

    @initialize(
        quiesce=st.sampled_from([None, True, False]),
        size=st.sampled_from([1, 3, 4, 5]),
        any_vp=st.booleans(),
        loading=st.sampled_from(["few", "off", "all", "crowded"]),
        routes=st.sampled_from([0, 2, 3, 4, 5]),
    )
    @step
    def begin(self, quiesce: bool | None, size: int, any_vp: bool, loading: Loading, routes: int) -> None:
        """Opens a partition with these options and some routes in place of the first one."""
        if isinstance(self.guest, MshvGuest):
            # Without quiescing a push tears signals that overlap it. A missing VP crashes the root scheduler's host.
            quiesce, any_vp = None, any_vp and not self.guest.root
        self.options = Options(quiesce, size, any_vp, loading)
        self.end_partition()
        self.open_partition()
        for _ in range(routes):
            self.make_route(None, model.Event())

    def end_partition(self) -> None:
        routes = [route for _, route in self.handles]
        before = self.failures
        try:
            self.partition.close()
        except IrqFdError:
            assert self.struck(before) > 0
        else:
            assert self.struck(before) == 0
        for handle, _ in self.handles:
            assert handle.closed
            with pytest.raises(ClosedError):
                handle.mask()
        with pytest.raises(ClosedError):
            self.partition.new_irqfd_route()
        for route in (*routes, *self.model.stuck):
            if route.broken:
                route.event.pending = None
        self.handles.clear()
        self.closed.clear()
        self.guest.stop()
        if self.name == "adopted":
            self.vm.close()

    def teardown(self) -> None:
        with suppress(IrqFdError):
            self.partition.close()
        self.guest.stop()
        if self.name == "adopted":
            with suppress(OSError):
                self.vm.close()
        self.faults.close()
        for fd in self.events:
            os.close(fd)

    # The steps

    @precondition(lambda self: at_times(self) or not self.handles)
    @rule()
    @step
    def start_anew(self) -> None:
        """Closing a partition closes its routes; the caller's eventfds stay open."""
        self.end_partition()
        self.compare_events()
        self.open_partition()

    @precondition(lambda self: self.model.free or at_times(self))
    @rule()
    @step
    def new_route(self) -> None:
        self.make_route(None, model.Event())

    @precondition(lambda self: self.model.free or at_times(self))
    @rule(blocking=st.booleans(), pending=st.booleans())
    @step
    def new_route_on_an_eventfd(self, blocking: bool, pending: bool) -> None:
        fd = os.eventfd(int(pending), os.EFD_CLOEXEC | (0 if blocking else os.EFD_NONBLOCK))
        self.events[fd] = model.Event(pending=pending)
        self.make_route(fd, self.events[fd])

    @precondition(lambda self: self.events and (self.model.free or at_times(self)))
    @rule(number=st.integers(0, 3))
    @step
    def new_route_on_an_eventfd_used_before(self, number: int) -> None:
        fd = sorted(self.events)[number % len(self.events)]
        self.make_route(fd, self.events[fd])

    @precondition(at_times)
    @rule()
    @step
    def new_route_on_a_wrong_file(self) -> None:
        semaphore = os.eventfd(1, os.EFD_SEMAPHORE)
        read, write = os.pipe()
        for fd in (semaphore, read, write):
            with pytest.raises(ValueError, match=str(fd)):
                self.partition.new_irqfd_route(event=fd)
            os.close(fd)

    def make_route(self, fd: int | None, event: model.Event) -> None:
        if any(route.event is event for route in (*self.model.routes.values(), *self.model.stuck)):
            with pytest.raises(ValueError, match="is the eventfd of the route of GSI"):
                self.partition.new_irqfd_route(event=fd)
        elif not self.model.free:
            if self.may_exhaust:
                with pytest.raises(GsiExhaustedError):
                    self.partition.new_irqfd_route(event=fd)
        else:
            self.handles.append((self.partition.new_irqfd_route(event=fd), self.model.open_route(event)))

    @precondition(at_times)
    @rule(index=st.sampled_from([1, 5]), failing=st.none() | st.integers(0, 2))
    @step
    def create_vp(self, index: int, failing: int | None) -> None:
        """Creates a VP. If one of its ioctls fails, a later step can try again."""
        if self.name == "adopted" or index in self.model.vps:
            with pytest.raises(ValueError, match="VP"):
                self.partition.create_vp(index)
            return
        before = self.failures
        if failing is not None and isinstance(self.faults, KernelFaults):
            self.faults.fail(self.partition, "create_vp", errno.ENOMEM, after=failing)
            self.owed += 1
        try:
            self.partition.create_vp(index)
        except VpError:
            assert self.struck(before) == 1
        else:
            assert self.struck(before) == 0
            self.model.vps.add(index)

    def let_fail(self, failures: list[tuple[SimulatedCall, int, int]]) -> None:
        """Injects faults, which strike in this step or, if it makes too few calls, in a later one."""
        for call, after, times in failures:
            self.faults.fail(self.partition, call, errno.ENOMEM, after=after, times=times)
            self.owed += times

    @precondition(lambda self: self.handles)
    @rule(
        number=st.integers(0, 4),
        action=st.sampled_from(["set_msi", "set_msi", "clear_msi", "mask", "unmask"]),
        msi=st.integers(0, 7),
        racing=st.booleans(),
        failures=FAILURES,
    )
    @step
    def change(
        self, number: int, action: Action, msi: int, racing: bool, failures: list[tuple[SimulatedCall, int, int]]
    ) -> None:
        """Changes one route, with or without a thread that signals it."""
        self.let_fail(failures)
        handle, route = self.pick(number)
        target = msi_of(route.gsi, msi)
        self.try_changes(
            [_changed(model.Change(route, route.masked, route.msi), action, target)],
            lambda: _do(handle, handle, action, target),
            handle if racing else None,
        )

    @precondition(lambda self: self.handles)
    @rule(
        edits=st.lists(
            st.tuples(
                st.integers(0, 4), st.sampled_from(["set_msi", "clear_msi", "mask", "unmask"]), st.integers(0, 7)
            ),
            max_size=7,
        ),
        racing=st.booleans(),
        failures=FAILURES,
    )
    @step
    def commit(
        self, edits: list[tuple[int, Action, int]], racing: bool, failures: list[tuple[SimulatedCall, int, int]]
    ) -> None:
        """Changes some routes in a batch, with or without a thread that signals one of them."""
        self.try_batch(edits, failures, racing=racing)

    @precondition(lambda self: len(self.handles) > 1)
    @rule(
        action=st.sampled_from(["set_msi", "clear_msi", "mask", "unmask"]),
        msi=st.integers(0, 5),
        racing=st.booleans(),
        failures=FAILURES,
    )
    @step
    def commit_to_all(
        self, action: Action, msi: int, racing: bool, failures: list[tuple[SimulatedCall, int, int]]
    ) -> None:
        """Makes the same change to all routes, so that a failure has earlier changes to roll back."""
        self.try_batch([(number, action, msi) for number in range(len(self.handles))], failures, racing=racing)

    @precondition(lambda self: self.handles)
    @rule(moves=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7)), min_size=2, max_size=8))
    def move_about(self, moves: list[tuple[int, int]]) -> None:
        """Arms routes and moves them about, one at a time, as a guest does."""
        for number, msi in moves:
            self.move(number=number, msi=msi)

    @step
    def move(self, number: int, msi: int) -> None:
        self.try_batch([(number, "unmask", 0), (number, "set_msi", msi)], [], racing=False)

    @precondition(lambda self: self.handles and not self.owed)
    @rule(number=st.integers(0, 4), given=st.none() | st.integers(0, 3), failing=ONE_FAILURE)
    @step
    def set_event(self, number: int, given: int | None, failing: tuple[SimulatedCall, int] | None) -> None:
        """Gives a route a new eventfd, or one of the caller's."""
        handle, route = self.pick(number)
        fd = sorted(self.events)[given % len(self.events)] if given is not None and self.events else None
        event = model.Event() if fd is None else self.events[fd]
        others = (*self.model.routes.values(), *self.model.stuck)
        if not route.broken and any(other.event is event for other in others if other is not route):
            with pytest.raises(ValueError, match="is the eventfd of the route of GSI"):
                handle.set_event(fd)
            return
        self.let_fail([] if failing is None else [(*failing, 1)])
        self.try_changes(
            [model.Change(route, route.masked, route.msi, event)], functools.partial(handle.set_event, fd), None
        )

    @precondition(lambda self: self.handles and not self.owed)
    @rule(
        numbers=st.lists(st.integers(0, 4), min_size=1, max_size=4),
        ring=st.booleans(),
        edits=st.lists(
            st.tuples(st.integers(0, 4), st.sampled_from(["set_msi", "mask", "unmask"]), st.integers(0, 7)), max_size=3
        ),
        failing=ONE_FAILURE,
    )
    @step
    def pass_on(
        self,
        numbers: list[int],
        ring: bool,
        edits: list[tuple[int, Action, int]],
        failing: tuple[SimulatedCall, int] | None,
    ) -> None:
        """Gives routes the eventfds of one another in a batch, and the first a new one or the last's."""
        chain = [self.handles[at] for at in dict.fromkeys(number % len(self.handles) for number in numbers)]
        batch, changes = self.partition.batch(), dict[model.Route, model.Change]()
        for at, (handle, route) in enumerate(chain):
            giver, given = chain[at - 1]
            fresh = at == 0 and not ring
            batch.set_event(handle, None if fresh else giver)
            event = model.Event() if fresh else given.event
            changes[route] = model.Change(route, route.masked, route.msi, event)
        for number, action, msi in edits:
            handle, route = self.pick(number)
            target = msi_of(route.gsi, msi)
            _do(batch, handle, action, target)
            before = changes.get(route, model.Change(route, route.masked, route.msi))
            changes[route] = _changed(before, action, target)
        self.let_fail([] if failing is None else [(*failing, 1)])
        self.try_changes(list(changes.values()), batch.commit, None)

    def try_batch(
        self, edits: list[tuple[int, Action, int]], failures: list[tuple[SimulatedCall, int, int]], *, racing: bool
    ) -> None:
        self.let_fail(failures)
        batch, changes = self.partition.batch(), dict[model.Route, model.Change]()
        for number, action, msi in edits:
            handle, route = self.pick(number)
            target = msi_of(route.gsi, msi)
            _do(batch, handle, action, target)
            before = changes.get(route, model.Change(route, route.masked, route.msi))
            changes[route] = _changed(before, action, target)
        self.try_changes(list(changes.values()), batch.commit, self.pick(edits[0][0])[0] if racing and edits else None)
        with pytest.raises(ClosedError):
            batch.commit()

    def try_changes(self, changes: list[model.Change], change: Callable[[], None], racing: IrqFdRoute | None) -> None:
        """Makes changes to the partition, and to the model by their outcome."""
        before = {route: route.msi for _, route in self.handles}
        struck_before, signaller = self.failures, None
        if racing is not None:
            Machine.races += 1
            signaller = _signaller(racing)
        self.counts = self.partition.stats()
        # Not the error itself, whose traceback would hold the handles.
        failed: type[Exception] | None = None
        if any(change.route.broken for change in changes):
            with pytest.raises(RouteBrokenError):
                change()
        elif self.model.lacks_vp(changes):
            with pytest.raises(MissingVpError):
                change()
        else:
            try:
                change()
            except (RoutingError, IrqFdError) as error:
                failed = type(error)
            struck = self.struck(struck_before)
            for one in changes:
                if one.msi is not None:
                    one.route.asked.add(one.msi)
                    self.model.asked.add(one.msi)
            if failed:
                assert struck > 0, "an error was raised, but no call failed"
                self.model.fail(changes)
                self.take_over_refusal(push=failed is RoutingError)
                if self.partition.stats().pushes > self.model.pushes:
                    self.model.bring_home({one.route for one in changes if one.needed}, self.shown())
                self.take_over_failure(changes, before, struck)
            else:
                others = [*self.model.broken, *(route for _, route in self.handles if route.waits_to_be_rearmed)]
                assert struck == 0 or others, "a call failed, but no error was raised"
                waiting = [route for _, route in self.handles if route.waits_to_be_rearmed]
                self.model.succeed(changes, struck, self.shown())
                self.take_over_rearmed(waiting)
        if signaller is not None:
            signaller.join()
            route = next(route for handle, route in self.handles if handle is racing)
            asked = {one.route: one.msi for one in changes}
            self.model.overlap(route, before[route], asked.get(route))

    def shown(self) -> model.Shown:
        """The outcome of a call, as far as the model lists several."""
        before, after = self.counts, self.partition.stats()
        pushes, hits = after.pushes - before.pushes, after.hits - before.hits
        Machine.pushes += pushes
        Machine.hits += hits
        return model.Shown(
            pushes,
            self.table(),
            {route: handle.armed_gsi for handle, route in self.handles},
            hits,
            after.misses - before.misses,
            after.entries_loaded - before.entries_loaded,
        )

    def take_over_refusal(self, *, push: bool) -> None:
        """After a push that the kernel refused, the next one loads nothing. A failed call counts no hits and misses."""
        before, after = self.counts, self.partition.stats()
        assert (after.hits, after.misses, after.entries_loaded) == (before.hits, before.misses, before.entries_loaded)
        if push:
            self.model.refused = True
        elif after.pushes > before.pushes:
            self.model.refused = False

    def take_over_failure(
        self, changes: list[model.Change], before: dict[model.Route, MsiRoute | None], struck: int
    ) -> None:
        """One failure changes nothing. If the rollback fails too, routes are broken or waiting to be re-armed."""
        changed = [change.route for change in changes]
        for handle, route in self.handles:
            assert (handle.msi, handle.masked) == (before[route], route.masked)
            if handle.state is GsiState.BROKEN and not route.broken:
                assert struck > 1, "a route is broken, but the rollback did not fail"
                assert route in changed, "a route outside the change is broken"
                self.model.give_up(route)
                route.event.pending = None
            elif route.armed and not handle.armed:
                assert struck > 1, "a route is not armed again, but the rollback did not fail"
                route.waits_to_be_rearmed = True
            elif route.waits_to_be_rearmed and handle.armed:
                # It was waiting to be re-armed, and this call armed it before the rollback.
                assert route in changed
                route.waits_to_be_rearmed = False
                route.event.drained()
        # An inert entry may stay, and an older inert entry may be gone.
        seen = self.table()
        self.model.check_spare_entries({gsi: msi for gsi, msi in seen.items() if gsi in self.model.spares.gsis})
        for gsi, msi in seen.items():
            if gsi in self.model.spares.gsis:
                continue
            asked = {change.wanted for change in changes if change.route.gsi == gsi}
            known = {self.model.table.get(gsi), self.model.entries.get(gsi)} | asked
            assert gsi in self.model.broken or msi in known, f"bogus entry {msi} of GSI {gsi}"
        for route in self.model.routes.values():
            assert not route.armed or seen.get(route.place) == route.msi, f"{route} is armed and not routed"
        self.model.table = seen
        self.model.pushes = self.partition.stats().pushes

    def take_over_rearmed(self, waiting: list[model.Route]) -> None:
        """The next push arms a route that is waiting to be re-armed, if it can."""
        for handle, route in self.handles:
            if route in waiting and route.waits_to_be_rearmed and handle.armed:
                route.waits_to_be_rearmed = False
                route.event.drained()

    @precondition(lambda self: self.handles)
    @rule(
        number=st.integers(0, 4),
        how=st.sampled_from(["signal", "view", "fill", "write", "original", "thread"]),
    )
    @step
    def signal(self, number: int, how: str) -> None:
        """Signals a route while nothing else happens."""
        handle, route = self.pick(number)
        fds = [fd for fd, event in self.events.items() if event is route.event]
        if how == "view":
            handle.event.signal(3)
        elif how == "fill" and not route.broken:
            handle.event.signal(FULL)
            route.event.full = not route.armed
        elif how == "write" and not route.event.full:
            os.eventfd_write(handle.fileno(), 1)
        elif how == "original" and fds and not route.event.full:
            os.eventfd_write(fds[0], 1)
        elif how == "thread":
            signaller = _signaller(handle)
            signaller.join()
        else:
            handle.signal()
        self.model.signal(route.event)

    @precondition(lambda self: any(not event.full for event in self.events.values()))
    @rule(number=st.integers(0, 3))
    @step
    def write_to_a_callers_eventfd(self, number: int) -> None:
        """Writes to a caller's eventfd, whether or not a route has it."""
        fds = sorted(fd for fd, event in self.events.items() if not event.full)
        fd = fds[number % len(fds)]
        os.eventfd_write(fd, 1)
        self.model.signal(self.events[fd])

    @precondition(lambda self: self.handles)
    @rule(number=st.integers(0, 4), view=st.booleans())
    @step
    def consume(self, number: int, view: bool) -> None:
        """Takes pending signals, so that they are never delivered."""
        handle, route = self.pick(number)
        taken = handle.event.consume() > 0 if view else handle.consume_pending()
        expected = False if route.armed else route.event.pending
        assert expected in (taken, None)
        if not route.armed:
            route.event.drained()

    @precondition(lambda self: self.events and at_times(self))
    @rule(number=st.integers(0, 3))
    @step
    def close_a_callers_eventfd(self, number: int) -> None:
        """Closes a caller's eventfd. Its route has a duplicate and works on."""
        fd = sorted(self.events)[number % len(self.events)]
        os.close(fd)
        del self.events[fd]

    @precondition(lambda self: self.handles and len(self.script) % 4 == 0)
    @rule(number=st.integers(0, 4), failures=FAILURES)
    @step
    def close(self, number: int, failures: list[tuple[SimulatedCall, int, int]]) -> None:
        self.let_fail(failures)
        handle, route = self.pick(number)
        before = self.failures
        self.handles.remove((handle, route))
        try:
            handle.close()
        except IrqFdError:
            assert self.struck(before) == 1
            self.model.close(route, failed=True)
        else:
            assert self.struck(before) == 0
            self.model.close(route, failed=False)
        handle.close()
        self.closed.append(handle)

    @precondition(lambda self: self.handles and not self.owed and at_times(self))
    @rule(number=st.integers(0, 4))
    @step
    def drop(self, number: int) -> None:
        """Drops the last reference to a route: it is closed with a warning."""
        handle, route = self.pick(number)
        self.handles.remove((handle, route))
        with recorded() as warnings:
            del handle
        assert [category for category, _ in warnings] == [ResourceWarning]
        self.model.close(route, failed=False)

    @precondition(lambda self: self.closed and at_times(self))
    @rule(number=st.integers(0, 3))
    @step
    def use_what_is_closed(self, number: int) -> None:
        """A closed route raises, alone and in a batch, and the batch changes nothing."""
        handle = self.closed[number % len(self.closed)]
        batch = self.partition.batch()
        for other, route in self.handles:
            batch.set_msi(other, msi_of(route.gsi, 2))
        batch.unmask(handle)
        uses: list[Callable[[], object]] = [
            handle.mask,
            handle.unmask,
            handle.clear_msi,
            handle.signal,
            handle.consume_pending,
            lambda: handle.set_msi(msi_of(handle.gsi, 0)),
            lambda: (handle.state, handle.pending),
        ]
        for use in uses:
            with pytest.raises(ClosedError):
                use()
        if any(route.broken for _, route in self.handles):
            with pytest.raises((ClosedError, RouteBrokenError)):
                batch.commit()
        else:
            with pytest.raises(ClosedError):
                batch.commit()

    # The comparison

    def pick(self, number: int) -> tuple[IrqFdRoute, model.Route]:
        return self.handles[number % len(self.handles)]

    def struck(self, before: int) -> int:
        """The number of calls that have failed since `before`: at most the injected ones."""
        self.failures = self.partition.stats().failures
        struck = self.failures - before
        self.owed -= struck
        Machine.failed += struck
        assert self.owed >= 0, "a call failed without an injected fault"
        return struck

    def table(self) -> dict[int, MsiRoute]:
        return {
            entry.gsi: MsiRoute(entry.address, entry.data)
            for entry in self.partition.routing_table()
            if entry.gsi not in self.model.keep
        }

    def compare(self) -> None:
        assert self.partition.stats().failures == self.failures, "a call failed without an injected fault"
        self.compare_counters()
        self.compare_interrupts()
        self.compare_routes()
        self.compare_partition()
        self.compare_events()

    def compare_counters(self) -> None:
        """The counters of armed routes are empty: arming drains them at once."""
        if isinstance(self.guest, SimulatedGuest):
            self.guest.partition.settle()
        poll = select.poll()
        gsis = {handle.fileno(): handle.gsi for handle, _ in self.handles if handle.armed}
        for fd in gsis:
            poll.register(fd, select.POLLIN)
        left = [gsis[fd] for fd, _ in poll.poll(0)]
        assert left == [], "an armed route has a counter that is not empty"

    def compare_interrupts(self) -> None:
        arrived = defaultdict[int, list[Interrupt]](list)
        for interrupt in self.guest.arrived():
            arrived[gsi_of(interrupt.vector)].append(interrupt)
        pending = {route.gsi: handle.pending for handle, route in self.handles}
        for gsi in arrived.keys() | self.model.due.keys():
            due, came = self.model.due[gsi], arrived[gsi]
            expected = f"GSI {gsi} is due {due}, and {came} came"
            seen = set(filter(self.guest.reaches, due.msis))
            least = due.least if seen == due.msis else 0
            if isinstance(self.guest, KvmGuest) and gsi in self.model.broken:
                # KVM injects pending signals from a work item, and a broken irqfd can't be disarmed to flush it.
                assert set(came) <= self.shown_of(self.model.broken[gsi]), expected
                continue
            if self.guest.counted:
                assert set(came) <= self.shown_of(seen), expected
            else:
                assert {one.vector for one in came} <= {msi.vector for msi in seen}, expected
            exact = self.guest.counted and not self.guest.merges
            assert (least if exact else least > 0) <= len(came) <= due.most, expected
            if due.or_pending and gsi in pending and seen == due.msis:
                assert came or pending[gsi], f"the signal of GSI {gsi} was lost"
        self.model.due.clear()

    def shown_of(self, msis: Iterable[MsiRoute]) -> set[Interrupt]:
        return {interrupt for msi in msis for interrupt in self.guest.seen(msi)}

    def compare_routes(self) -> None:
        for handle, route in self.handles:
            told = (handle.gsi, handle.masked, handle.msi, handle.armed, handle.state, handle.closed)
            assert told == (route.gsi, route.masked, route.msi, route.armed, _state(route), False)
            if route.armed:
                assert handle.armed_gsi == route.place
                assert self.model.table[route.place] == route.msi, f"{route} is armed and not routed"
            if route.event.pending is None:
                route.event.pending = handle.pending if not route.broken else None
                route.event.full = route.event.full and handle.pending
            else:
                assert handle.pending == route.event.pending, f"of {route}"

    def compare_partition(self) -> None:
        partition, expected = self.partition, self.model
        told_nothing = self.name == "adopted" and expected.any_vp
        assert partition.vps == (None if told_nothing else tuple(sorted(expected.vps)))
        mine = partition.gsis[: self.options.size]
        assert [route.gsi for route in partition.routes if route.gsi in mine] == sorted(expected.routes)
        for gsi in mine:
            state = GsiState.UNALLOCATED
            if gsi in expected.broken:
                state = GsiState.BROKEN
            elif gsi in expected.routes:
                state = _state(expected.routes[gsi])
            assert partition.gsi_state(gsi) is state, f"of GSI {gsi}"
        stats = partition.stats()
        assert stats.pushes == expected.pushes
        kept = [RoutingEntry(gsi, msi.address, msi.data) for gsi, msi in expected.keep.items() if stats.pushes]
        assert kept == [entry for entry in partition.routing_table() if entry.gsi in expected.keep]
        seen = self.table()
        certain = (seen.keys() | expected.table.keys()) - expected.broken.keys()
        assert {gsi: seen.get(gsi) for gsi in certain} == {gsi: expected.table.get(gsi) for gsi in certain}
        self.compare_armed(stats.arms - stats.disarms)

    def compare_armed(self, registered: int) -> None:
        """Compares the armed irqfds with the statistics and with the epoll set of the simulated kernel."""
        armed = {handle.fileno() for handle, route in self.handles if route.armed}
        # A broken irqfd may or may not be registered.
        unsure = {handle.fileno() for handle, route in self.handles if route.broken}
        assert len(armed) <= registered <= len(armed) + len(unsure) + len(self.model.stuck)
        if self.epoll is not None and isinstance(self.guest, SimulatedGuest):
            fd, always = self.epoll
            watched = _watched(fd) - always
            assert armed <= watched
            if not self.model.stuck:
                assert watched <= armed | unsure

    def compare_events(self) -> None:
        """The caller's eventfds are readable exactly while the model has a pending signal."""
        poll = select.poll()
        for fd in self.events:
            poll.register(fd, select.POLLIN)
        readable = {fd for fd, _ in poll.poll(0)}
        for fd, event in self.events.items():
            if event.pending is None:
                if any(route.event is event and route.broken for route in self.model.routes.values()):
                    continue
                if any(route.event is event for route in self.model.stuck):
                    continue
                event.pending = fd in readable
            assert event.pending == (fd in readable), f"eventfd {fd}"


def _state(route: model.Route) -> GsiState:
    if route.broken:
        return GsiState.BROKEN
    return GsiState.ENABLED if route.armed else GsiState.DISABLED


def _changed(change: model.Change, action: Action, msi: MsiRoute) -> model.Change:
    match action:
        case "set_msi":
            return change._replace(msi=msi)
        case "clear_msi":
            return change._replace(msi=None)
        case "mask":
            return change._replace(masked=True)
        case "unmask":
            return change._replace(masked=False)


def _do(target: Any, handle: IrqFdRoute, action: Action, msi: MsiRoute) -> None:
    """Makes a change to a route, directly or in a batch."""
    arguments: list[Any] = [] if target is handle else [handle]
    getattr(target, action)(*arguments, *([msi] if action == "set_msi" else []))


def _signaller(handle: IrqFdRoute) -> threading.Thread:
    """Starts a thread that signals once."""
    began = threading.Event()

    def signal() -> None:
        began.set()
        handle.signal()

    thread = threading.Thread(target=signal)
    thread.start()
    began.wait()
    return thread


def _epolls() -> set[int]:
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            if str(fd.readlink()) == "anon_inode:[eventpoll]":
                found.add(int(fd.name))
    return found


def _watched(epoll: int) -> set[int]:
    """The descriptors in an epoll set, from /proc."""
    lines = Path(f"/proc/self/fdinfo/{epoll}").read_text().splitlines()
    return {int(line.split()[1]) for line in lines if line.startswith("tfd:")}
