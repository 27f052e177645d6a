"""What Linux guests do with their MSIs, as a model; and how often a cache of messages has what they ask for.

usage: python tools/vector_trace.py [--vps N...] [--routes N...] [--minutes M] [--seeds N]
                                    [--policy NAME... | --partition BACKEND [--masked]]

Prints a table of hit rates for each policy by VPs and routes, or drives routes of a real partition (which needs the
package) and prints how many pushes a change took. `guest()` makes the events; what takes them knows nothing of it.

The guest allocates vectors as Linux does (kernel/irq/matrix.c, arch/x86/kernel/apic/vector.c): of the allowed CPUs that
are online the one with most vectors available, and there the lowest free one. A move takes effect at the interrupt
after it was asked for; the old vector is freed at the first interrupt on the new CPU, and until then the next move
waits. Managed interrupts (storage queues) reserve a vector on each CPU that they may go to, and only move when their
CPU goes offline. Messages are physical, fixed, edge: those of a guest with x2APIC or the physical flat driver.

What happens: devices come up one after the other, the driver of a network device then spreads its queues over the
CPUs; irqbalance moves interrupts from loaded CPUs to idle ones every ten seconds (its placement.c, without its
topology); someone writes affinities at random now and then; CPUs go offline and come back.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

FIRST_VECTOR, END_VECTOR = 0x21, 0xEB
"""Of those that Linux gives to devices: above the one that cleans up after moves, below those of the system."""
SYSTEM_VECTORS = frozenset({0x32, 0x80})
"""Those between that it does not give: the cascaded interrupt controller's, and system calls."""
VECTORS_PER_CPU = END_VECTOR - FIRST_VECTOR - len(SYSTEM_VECTORS)
FULL = 0.8
"""Up to which part of all vectors a guest's devices are brought up: managed interrupts reserve more than they use."""
LOWEST_VECTOR, ALL_VECTORS = 0x10, 0x100 - 0x10
SPARES = 2024
"""Spare GSIs of a partition with 2,048 for routes: 2072 to 4095."""
BOOT = 60.0
"""Seconds: what happens before is counted by itself."""
BALANCE, WRITE, HOTPLUG = 10.0, 5.0, 60.0
"""Seconds between rounds of irqbalance; on average, between affinities written at random, and CPUs taken offline."""
CACHE_DOMAIN = 4
"""CPUs that share a cache."""
PASSED, PASSED_EACH = 8, 4
"""The rank of the first free vector that a guest has passed over, and by how much the next one's is higher."""


class Msi(NamedTuple):
    """A message: a fixed, edge-triggered interrupt to one CPU."""

    address: int
    data: int


class Event(NamedTuple):
    """A route gets another message; None if its interrupt is shut down."""

    time: float
    route: int
    msi: Msi | None


def message(cpu: int, vector: int) -> Msi:
    """The message of a vector of a CPU, whose APIC id is its number."""
    return Msi(0xFEE00000 | cpu << 12, vector)


# -- the guest


@dataclass
class Cpu:
    """The vectors of a CPU."""

    online: bool = True
    allocated: set[int] = field(default_factory=set)
    managed: set[int] = field(default_factory=set)
    """Reserved for managed interrupts, whether they are here or not."""
    managed_allocated: int = 0

    @property
    def available(self) -> int:
        """How many vectors are free."""
        return VECTORS_PER_CPU - len(self.allocated | self.managed)

    def lowest(self) -> int:
        """The lowest free vector."""
        taken = self.allocated | self.managed | SYSTEM_VECTORS
        return next(vector for vector in range(FIRST_VECTOR, END_VECTOR) if vector not in taken)


@dataclass
class Irq:
    """An interrupt of a device: a route of the partition."""

    route: int
    rate: float
    """Interrupts a second."""
    managed: frozenset[int] | None = None
    """The CPUs that it is bound to, for a managed one."""
    domain: bool = False
    """Whether irqbalance gives it the CPUs that share a cache, instead of one."""
    affinity: frozenset[int] = frozenset()
    at: tuple[int, int] | None = None
    """Its CPU and vector; None while shut down."""
    previous: tuple[int, int] | None = None
    """What is freed at its next interrupt."""
    pending: frozenset[int] | None = None
    """Where it is to go at its next interrupt."""


Action: TypeAlias = Callable[[float], None]


class Guest:
    """A guest that runs: its vectors, its interrupts, and what it does when."""

    def __init__(self, vps: int, routes: int, seed: int) -> None:
        self.random = random.Random(f"{vps} {routes} {seed}")  # noqa: S311 -- a model
        self.cpus = [Cpu() for _ in range(vps)]
        self.irqs: list[Irq] = []
        self._events: list[Event] = []
        self._agenda: list[tuple[float, int, Action]] = []
        self._count = itertools.count()
        self._boot(routes)

    def events(self, until: float) -> Iterator[Event]:
        """All that happens before a time."""
        while self._agenda and self._agenda[0][0] < until:
            now, _, action = heapq.heappop(self._agenda)
            action(now)
            yield from self._events
            self._events.clear()

    def _at(self, time: float, action: Action) -> None:
        heapq.heappush(self._agenda, (time, next(self._count), action))

    def _often(self, period: float, action: Action, start: float) -> None:
        """Does something at random times, so many seconds apart on average."""

        def again(now: float) -> None:
            action(now)
            self._at(now + self.random.expovariate(1 / period), again)

        self._at(start + self.random.expovariate(1 / period), again)

    def _online(self) -> frozenset[int]:
        return frozenset(number for number, cpu in enumerate(self.cpus) if cpu.online)

    # booting

    def _boot(self, routes: int) -> None:
        for _ in range(6):  # emulated devices', whose interrupts are no routes
            self._allocate(self._online())
        time = 1.0
        while len(self.irqs) < routes:
            device = self._device(routes - len(self.irqs))
            self.irqs += device
            time += self.random.uniform(0.02, 0.3)
            self._at(time, lambda _, device=device: self._reserve(device))  # type: ignore[misc]
            for irq in device:
                time += self.random.uniform(0.0001, 0.001)
                self._at(time, lambda now, irq=irq: self._start(irq, now))  # type: ignore[misc]
            if device[-1].managed is None and not device[-1].domain:
                for number, irq in enumerate(device):
                    target = frozenset({number % len(self.cpus)})
                    self._at(time + 0.05, lambda now, irq=irq, target=target: self._write(irq, target, now))  # type: ignore[misc]
        for tick in range(1, 1000):
            self._at(tick * BALANCE, self._balance)
        self._often(WRITE, self._write_at_random, time)
        if len(self.cpus) > 2:  # noqa: PLR2004 -- one that stays, one to go, one to go to
            self._often(HOTPLUG, self._take_offline, time)

    def _device(self, most: int) -> list[Irq]:
        """A device of some kind, with an interrupt for its configuration and one for each queue."""
        kind = self.random.choices(["network", "storage", "other"], [5, 3, 2])[0]
        queues = (
            self.random.randint(0, 3) if kind == "other" else min(len(self.cpus), self.random.choice([4, 8, 16, 32]))
        )
        count = min(queues + 1, most)
        device = []
        for number in range(count):
            irq = Irq(len(self.irqs) + number, 10 ** self.random.uniform(-1, 4), domain=kind != "network")
            irq.affinity = frozenset(range(len(self.cpus)))
            if kind == "storage" and number:
                irq.managed = frozenset(cpu for cpu in irq.affinity if cpu * queues // len(self.cpus) == number - 1)
            device.append(irq)
        return device

    # vectors

    def _reserve(self, device: list[Irq]) -> None:
        for irq in device:
            for cpu in irq.managed or ():
                self.cpus[cpu].managed.add(self.cpus[cpu].lowest())

    def _allocate(self, allowed: frozenset[int]) -> tuple[int, int] | None:
        best = max(sorted(allowed), key=lambda number: self.cpus[number].available, default=0)
        if not allowed or not self.cpus[best].available:
            return None
        vector = self.cpus[best].lowest()
        self.cpus[best].allocated.add(vector)
        return best, vector

    def _allocate_managed(self, allowed: frozenset[int]) -> tuple[int, int]:
        best = min(sorted(allowed), key=lambda number: self.cpus[number].managed_allocated)
        cpu = self.cpus[best]
        vector = min(cpu.managed - cpu.allocated)
        cpu.allocated.add(vector)
        cpu.managed_allocated += 1
        return best, vector

    def _free(self, at: tuple[int, int] | None, irq: Irq) -> None:
        if at is not None:
            self.cpus[at[0]].allocated.discard(at[1])
            self.cpus[at[0]].managed_allocated -= irq.managed is not None

    def _start(self, irq: Irq, now: float) -> None:
        """Starts an interrupt, or brings it away from a CPU that goes offline; shuts it down if it may go nowhere."""
        self._free(irq.at, irq)
        self._free(irq.previous, irq)
        irq.at = irq.previous = irq.pending = None
        online = self._online()
        if irq.managed is None:
            irq.at = self._allocate(irq.affinity & online) or self._allocate(online)
        elif irq.managed & online:
            irq.at = self._allocate_managed(irq.managed & online)
        self._tell(irq, now)

    def _tell(self, irq: Irq, now: float) -> None:
        self._events.append(Event(now, irq.route, message(*irq.at) if irq.at else None))

    # moving

    def _write(self, irq: Irq, affinity: frozenset[int], now: float) -> None:
        """Somebody writes an affinity: the interrupt moves if it is elsewhere, the next time that it is raised."""
        if irq.managed is not None or irq.at is None:
            return
        irq.affinity = affinity
        waits = irq.previous or irq.pending
        irq.pending = None if irq.at[0] in affinity else affinity
        if irq.pending and not waits:
            self._raise_next(irq, now)

    def _raise_next(self, irq: Irq, now: float) -> None:
        self._at(now + self.random.expovariate(irq.rate), lambda now: self._raised(irq, now))

    def _raised(self, irq: Irq, now: float) -> None:
        if irq.previous:
            self._free(irq.previous, irq)
            irq.previous = None
        elif irq.pending and irq.at:
            allowed = irq.pending & self._online()
            irq.pending = None
            target = None if irq.at[0] in allowed else self._allocate(allowed)
            if target:
                irq.previous, irq.at = irq.at, target
                self._tell(irq, now)
        if irq.previous or irq.pending:
            self._raise_next(irq, now)

    def _balance(self, now: float) -> None:
        """A round of irqbalance: from CPUs a standard deviation above the mean to the least loaded, if that helps."""
        for irq in self.random.sample(self.irqs, len(self.irqs) // 10):
            irq.rate = 10 ** self.random.uniform(-1, 4)
        load = dict.fromkeys(sorted(self._online()), 0.0)
        here: dict[int, list[Irq]] = {cpu: [] for cpu in load}
        for irq in self.irqs:
            if irq.at:
                load[irq.at[0]] += irq.rate
                here[irq.at[0]].append(irq)
        limit = statistics.mean(load.values()) + statistics.pstdev(load.values())
        for cpu in sorted(load, key=lambda cpu: -load[cpu]):
            if load[cpu] <= limit:
                break
            for irq in sorted(here[cpu], key=lambda irq: -irq.rate):
                target = min(load, key=lambda cpu: load[cpu])
                if irq.managed is None and load[cpu] - irq.rate > load[target] + irq.rate:
                    load[cpu] -= irq.rate
                    load[target] += irq.rate
                    first = target - target % CACHE_DOMAIN
                    self._write(
                        irq, frozenset(range(first, first + CACHE_DOMAIN)) if irq.domain else frozenset({target}), now
                    )

    def _write_at_random(self, now: float) -> None:
        irq = self.random.choice(self.irqs)
        cpus = range(len(self.cpus))
        self._write(irq, frozenset(self.random.sample(cpus, self.random.choice([1, 1, 2, len(self.cpus)]))), now)

    def _take_offline(self, now: float) -> None:
        number = self.random.randrange(1, len(self.cpus))
        here = [irq for irq in self.irqs if irq.at and irq.at[0] == number]
        if len(here) > sum(self.cpus[other].available for other in self._online() - {number}):
            return  # as Linux refuses
        if not self.cpus[number].online:
            return
        self.cpus[number].online = False
        for irq in here:
            self._start(irq, now)
        self._at(now + self.random.uniform(5, 30), lambda now: self._bring_back(number, now))

    def _bring_back(self, number: int, now: float) -> None:
        self.cpus[number].online = True
        for irq in self.irqs:
            if irq.managed and irq.at is None and number in irq.managed:
                self._start(irq, now)


def guest(vps: int, routes: int, *, until: float, seed: int = 0) -> Iterator[Event]:
    """The events of a guest with so many VPs and routes, from its boot on."""
    return Guest(vps, routes, seed).events(until)


# -- the cache


class Shape(NamedTuple):
    """What messages have in common that differ in destination and vector only."""

    address: int
    data: int

    @classmethod
    def of(cls, msi: Msi) -> Shape:
        """The shape of a message."""
        return cls(msi.address & ~0xFF000, msi.data & ~0xFF)

    def message(self, destination: int, vector: int) -> Msi:
        """A message of this shape."""
        return Msi(self.address | destination << 12, self.data | vector)


class Asked(NamedTuple):
    """What a policy is asked."""

    shape: Shape
    """Of the message that was not there."""
    vps: range
    wanted: Counter[Msi]
    """The messages of all routes, with the one that was not there."""
    room: int
    """Spare entries on which nothing is armed, and those of this shape on which something is."""
    lowest: int
    """The lowest vector seen of this shape."""
    seen: AbstractSet[Msi]
    """All messages that a route ever had."""


Policy: TypeAlias = Callable[[Asked], Iterable[Msi]]


def nothing(_: Asked) -> Iterable[Msi]:
    """Only what was asked for."""
    return ()


def same_window(asked: Asked) -> Iterable[Msi]:
    """The same vectors on every VP, from the lowest seen up."""
    count = asked.room // len(asked.vps)
    for vector in range(asked.lowest, min(asked.lowest + count, 0x100)):
        for vp in asked.vps:
            yield asked.shape.message(vp, vector)


def above_used(asked: Asked) -> Iterable[Msi]:
    """By VP, what follows the highest vector in use."""
    highest = dict.fromkeys(asked.vps, asked.lowest - 1)
    for msi in asked.wanted:
        if Shape.of(msi) == asked.shape:
            vp = msi.address >> 12 & 0xFF
            highest[vp] = max(highest[vp], msi.data & 0xFF)
    for step in range(1, 0x100):
        for vp in asked.vps:
            if highest[vp] + step < 0x100:  # noqa: PLR2004 -- vectors have eight bits
                yield asked.shape.message(vp, highest[vp] + step)


def lowest_free(asked: Asked) -> Iterable[Msi]:
    """By VP, the lowest vectors that no route has: first the lowest of each VP, then the second lowest of each."""
    vectors = [*range(asked.lowest, 0x100), *range(LOWEST_VECTOR, asked.lowest)]
    free = [
        [msi for msi in (asked.shape.message(vp, vector) for vector in vectors) if not asked.wanted[msi]]
        for vp in asked.vps
    ]
    for rank in itertools.zip_longest(*free):
        yield from (msi for msi in rank if msi is not None)


def next_free(asked: Asked) -> Iterable[Msi]:
    """The same, but later those that the guest passed over: no route ever had them, one had a higher vector.

    Such a vector is somebody else's, or reserved for a managed interrupt that is on another CPU while that is online.
    """
    ranked: list[tuple[int, int, Msi]] = []
    for vp in asked.vps:
        here = [asked.shape.message(vp, vector) for vector in range(asked.lowest, 0x100)]
        highest = max((number for number, msi in enumerate(here) if msi in asked.seen), default=-1)
        likely, passed = itertools.count(), itertools.count(PASSED, PASSED_EACH)
        for number, msi in enumerate(here):
            if not asked.wanted[msi]:
                ranked.append((next(likely if number > highest or msi in asked.seen else passed), number, msi))
    return (msi for *_, msi in sorted(ranked))


@dataclass
class Choices:
    """How a cache loads."""

    policy: Policy
    home_from: float = 1.0
    """From which part of the spares in use on what was not there goes to the route's own GSI, not a spare one."""
    keep_used: float = 0.0
    """Which part of the room stays with messages that were used, latest first, before the policy's are loaded."""


CHOICES = {
    "nothing": Choices(nothing),
    "same-window": Choices(same_window),
    "above-used": Choices(above_used),
    "above-used, used stay": Choices(above_used, keep_used=0.5),
    "lowest-free": Choices(lowest_free),
    "lowest-free, used stay": Choices(lowest_free, keep_used=0.5),
    "lowest-free, at home": Choices(lowest_free, home_from=0.0),
    "lowest-free, at home if crowded": Choices(lowest_free, home_from=0.25),
    "next-free": Choices(next_free),
    "next-free, at home if crowded": Choices(next_free, home_from=0.25),
}


class Cache:
    """The kernel's table as a cache: an entry by route, and spare ones by message."""

    def __init__(self, vps: int, choices: Choices, spares: int = SPARES) -> None:
        self.vps = range(vps)
        self.choices = choices
        self.spares = spares
        self.home: dict[int, Msi] = {}
        """What the table has at routes' own GSIs."""
        self.spare: dict[Msi, None] = {}
        """What it has at spare ones, least recently used first."""
        self.used: dict[Msi, None] = {}
        """Of those, the ones that were used since they were loaded, in the same order."""
        self.armed: Counter[Msi] = Counter()
        """How many irqfds are armed at a spare GSI."""
        self.at: dict[int, tuple[Msi, bool]] = {}
        """What each route has, and whether at a spare GSI."""
        self.wanted: Counter[Msi] = Counter()
        self.seen: set[Msi] = set()
        self.lowest: dict[Shape, int] = {}
        self.pushes = 0

    def set(self, route: int, msi: Msi | None) -> bool:
        """Gives a route another message, or none; returns whether that took no push."""
        before = self.at.pop(route, None)
        if before:
            self._let_go(self.wanted, before[0])
            if before[1]:
                self._let_go(self.armed, before[0])
        if msi is None:
            return True
        self.wanted[msi] += 1
        self.seen.add(msi)
        hit = msi in self.spare or self.home.get(route) == msi
        if not hit:
            self._push(route, msi)
        spare = msi in self.spare
        if spare:
            self.armed[msi] += 1
            for order in (self.spare, self.used):
                order.pop(msi, None)
                order[msi] = None
        self.at[route] = msi, spare
        return hit

    @staticmethod
    def _let_go(counts: Counter[Msi], msi: Msi) -> None:
        counts[msi] -= 1
        if not counts[msi]:
            del counts[msi]

    def _push(self, route: int, msi: Msi) -> None:
        self.pushes += 1
        shape = Shape.of(msi)
        self.lowest[shape] = min(self.lowest.get(shape, 0xFF), msi.data & 0xFF)
        everything = len(self.vps) * ALL_VECTORS
        others = sum(1 for armed in self.armed if Shape.of(armed) != shape)
        if everything <= self.spares - others:
            likely: Iterable[Msi] = (
                shape.message(vp, LOWEST_VECTOR + n) for n in range(ALL_VECTORS) for vp in self.vps
            )
        else:
            mine = len(self.armed) - others
            room = self.spares - others if self.choices.policy is same_window else self.spares - others - mine
            likely = self.choices.policy(Asked(shape, self.vps, self.wanted, room, self.lowest[shape], self.seen))
        keep = {armed: None for armed in self.spare if self.armed[armed]}
        if len(keep) < self.spares * self.choices.home_from:
            keep[msi] = None
        else:
            self.home[route] = msi
        room = self.spares - len(keep)
        for old in [old for old in reversed(self.used) if not self.armed[old]][: int(room * self.choices.keep_used)]:
            keep[old] = None
        for new in itertools.chain(likely, reversed(list(self.spare))):
            if len(keep) >= self.spares:
                break
            keep[new] = None
        # What stays keeps its place in the order, what is loaded comes before it: nobody has used it yet.
        self.spare = dict.fromkeys(
            [new for new in keep if new not in self.spare] + [old for old in self.spare if old in keep]
        )
        self.used = {old: None for old in self.used if old in keep}


class Rates(NamedTuple):
    """What became of the changes of a trace."""

    boot: int
    boot_hits: int
    later: int
    later_hits: int
    pushes: int

    @staticmethod
    def text(hits: int, count: int) -> str:
        """A rate in per cent, rounded down."""
        return f"{int(10000 * hits / count) / 100:.2f} %" if count else "-"


def replay(events: Iterable[Event], cache: Cache) -> Rates:
    """Gives a cache all changes."""
    counts: Counter[tuple[bool, bool]] = Counter()
    for event in events:
        hit = cache.set(event.route, event.msi)
        if event.msi is not None:
            counts[event.time < BOOT, hit] += 1
    boot, later = (counts[when, True] + counts[when, False] for when in (True, False))
    return Rates(boot, counts[True, True], later, counts[False, True], cache.pushes)


# -- the command


def sizes(vps: Iterable[int], routes: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Which guests there are: those that have vectors for so many routes."""
    for size in itertools.product(vps, routes):
        if size[1] <= FULL * size[0] * VECTORS_PER_CPU:
            yield size


def compare(arguments: argparse.Namespace) -> None:
    """Prints hit rates by policy, as a table in Markdown: of all seeds together, before and after the first minute."""
    sys.stdout.write("| VPs | routes | policy | changes | hits, first minute | hits, later | pushes a guest |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|\n")
    for vps, routes in sizes(arguments.vps, arguments.routes):
        guests = [list(guest(vps, routes, until=60 * arguments.minutes, seed=seed)) for seed in range(arguments.seeds)]
        for name in arguments.policy:
            every = [replay(events, Cache(vps, CHOICES[name])) for events in guests]
            boot, boot_hits, later, later_hits, pushes = (sum(counts) for counts in zip(*every, strict=True))
            first, then = Rates.text(boot_hits, boot), Rates.text(later_hits, later)
            mean = pushes / len(every)
            sys.stdout.write(f"| {vps} | {routes} | {name} | {boot + later} | {first} | {then} | {mean:.1f} |\n")
            sys.stdout.flush()


def drive(arguments: argparse.Namespace) -> None:
    """Sets the messages on the routes of partitions, and prints how many the kernel's table had already."""
    import mshv_irqfd  # noqa: PLC0415 -- the model alone needs nothing

    sys.stdout.write(
        "| VPs | routes | changes | hits, first minute | hits, later | pushes a guest |\n|---|---|---|---|---|---|\n"
    )
    for vps, count in sizes(arguments.vps, arguments.routes):
        counts: Counter[tuple[bool, str]] = Counter()
        for seed in range(arguments.seeds):
            with mshv_irqfd.open_partition(arguments.partition, vps=vps) as partition:
                routes = [partition.new_irqfd_route() for _ in range(count)]
                for event in guest(vps, count, until=60 * arguments.minutes, seed=seed):
                    before = partition.stats()
                    if event.msi is None:
                        routes[event.route].clear_msi()
                        continue
                    if arguments.masked:
                        routes[event.route].mask()
                    routes[event.route].set_msi(*event.msi)
                    routes[event.route].unmask()
                    after = partition.stats()
                    boot = event.time < BOOT
                    counts[boot, "hits"] += after.hits - before.hits
                    counts[boot, "all"] += after.hits - before.hits + after.misses - before.misses
                counts[False, "pushes"] += partition.stats().pushes
        first, then = (Rates.text(counts[boot, "hits"], counts[boot, "all"]) for boot in (True, False))
        changes = counts[True, "all"] + counts[False, "all"]
        pushes = counts[False, "pushes"] / arguments.seeds
        sys.stdout.write(f"| {vps} | {count} | {changes} | {first} | {then} | {pushes:.1f} |\n")
        sys.stdout.flush()


def main() -> None:
    """Reads the command line, and does what it says."""
    parser = argparse.ArgumentParser(description="How often a cache of messages has what a Linux guest asks for.")
    parser.add_argument("--vps", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--routes", type=int, nargs="+", default=[16, 64, 250, 500, 1000, 2000])
    parser.add_argument("--minutes", type=float, default=10, help="of the guest's time")
    parser.add_argument("--seeds", type=int, default=3, help="how many guests of each size")
    parser.add_argument("--policy", nargs="+", choices=CHOICES, default=["next-free, at home if crowded"])
    parser.add_argument("--partition", metavar="BACKEND", help="drive routes of a partition of this backend instead")
    parser.add_argument(
        "--masked", action="store_true", help="mask a route while its message changes, as Linux does with MSI-X"
    )
    arguments = parser.parse_args()
    (drive if arguments.partition else compare)(arguments)


if __name__ == "__main__":
    main()
