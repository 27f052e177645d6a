"""Measurements beside the latency of one call: partitions, devices, threads, other routes, guests, Python, memory."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
import threading
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import fmean, median, quantiles
from time import perf_counter_ns, sleep
from typing import TYPE_CHECKING

from mshv_irqfd import MsiRoute, MsixTable, _core, open_partition
from mshv_irqfd._cli.bench import machine
from mshv_irqfd._cli.bench.measure import interval
from mshv_irqfd._cli.bench.package import bring_up_device, driver_retargets, driver_writes
from mshv_irqfd._cli.bench.plain_python import ADDRESS, KvmIoctls
from mshv_irqfd._cli.bench.workloads import FIRST_GSI, VPS, vector
from mshv_irqfd._guest import GuestOfPartition

if TYPE_CHECKING:
    from collections.abc import Callable

    from mshv_irqfd import KvmPartition
    from mshv_irqfd._cli.bench.results import Scenario

PARTITIONS = 64
ROUTES_EACH = 16
THREADS = 8
ROUNDS = 7
SHORT = 3
"""The factor by which rounds are more and shorter where the tails of latencies are compared."""
HANDLED = 20
"""The factor by which rounds are more and shorter where two latencies of some 10 us are compared."""
HANDLED_VECTOR = 0x41
RETARGETED = (2, 16, 64, 256, 1024)
"""The numbers of routes of a partition whose device is retargeted."""
SETTLED = 200
"""Retargets of a device after which a partition has settled on a way to make them: far more than it needs."""
IN_A_ROW = 8
"""Calls that follow each other, so that those of the other ways are not in the caches."""
ROUTES = 2000
MEASURED = 4
"""The number of partitions whose memory is measured."""
PR_SET_THP_DISABLE = 41
"""linux/prctl.h."""


def _open(backend: str, count: int, *, preload: bool = True) -> _core.Partition:
    gsis = range(FIRST_GSI, FIRST_GSI + max(count, 1))
    if backend == "null":
        return _core.null_partition(gsis, preload=preload)
    return open_partition(backend, gsis=gsis, vps=VPS, preload=preload)


def _bring_up(partition: _core.Partition, count: int) -> list[_core.IrqFdRoute]:
    routes = [partition.new_irqfd_route() for _ in range(count)]
    with partition.batch() as batch:
        for index, route in enumerate(routes):
            batch.set_msi(route, MsiRoute.fixed(vector(index, turn=False), 0))
    return list(routes)


def _scenario(name: str, what: str, values: list[float], unit: str) -> Scenario:
    found = interval(values)
    return {"name": name, "what": what, "value": found.value, "low": found.low, "high": found.high, "unit": unit}


def partitions(backend: str, seconds: float) -> list[Scenario]:
    """The time to set up a partition, alone and among many."""
    del seconds
    alone: list[float] = []
    together: list[float] = []
    for _ in range(3):
        for _ in range(3):
            begun = perf_counter_ns()
            with _open(backend, ROUTES_EACH) as partition:
                kept = _bring_up(partition, ROUTES_EACH)
                alone.append((perf_counter_ns() - begun) / 1e6)
            del kept
        with ExitStack() as stack:
            begun = perf_counter_ns()
            kept = []
            for _ in range(PARTITIONS):
                kept += _bring_up(stack.enter_context(_open(backend, ROUTES_EACH)), ROUTES_EACH)
            together.append((perf_counter_ns() - begun) / 1e6 / PARTITIONS)
    what = f"opening one and bringing up {ROUTES_EACH} routes"
    return [
        _scenario("partitions", f"{what}, alone", alone, "ms"),
        _scenario("partitions", f"{what}, each of {PARTITIONS} at once", together, "ms"),
    ]


def _retargets(routes: list[_core.IrqFdRoute], seconds: float) -> list[float]:
    """Retargets per second of each thread; every route has a thread of its own."""
    counts = [0] * len(routes)
    stop = threading.Event()
    ready = threading.Barrier(len(routes) + 1)

    def work(number: int) -> None:
        route, count = routes[number], 0
        msis = [MsiRoute.fixed(vector(number, turn=turn), 0) for turn in (False, True)]
        ready.wait()
        # Once at least, however short the time is: the counts are divided by one another.
        while not count or not stop.is_set():
            count += 1
            route.set_msi(msis[count % 2])
        counts[number] = count

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(routes))]
    for thread in threads:
        thread.start()
    ready.wait()
    begun = perf_counter_ns()
    sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    took = (perf_counter_ns() - begun) / 1e9
    return [count / took for count in counts]


def threads(backend: str, seconds: float) -> list[Scenario]:
    """The rate of retargets on one partition, from one thread and from many."""
    sums: list[float] = []
    slowest: list[float] = []
    with _open(backend, ROUTES) as partition:
        routes = _bring_up(partition, ROUTES)
        for _ in range(ROUNDS):
            (one,) = _retargets(routes[:1], seconds)
            many = _retargets(routes[:THREADS], seconds)
            sums.append(sum(many) / one)
            slowest.append(min(many) / (sum(many) / THREADS))
    what = f"retargets at {ROUTES} routes, {THREADS} threads"
    return [
        _scenario("threads", f"{what}: their sum divided by one thread's rate", sums, ""),
        _scenario("threads", f"{what}: the slowest divided by the mean", slowest, ""),
    ]


def _turns(seconds: float) -> float:
    """Iterations per second of a small loop in this thread."""
    count, begun = 0, perf_counter_ns()
    end = begun + int(seconds * 1e9)
    while not count or perf_counter_ns() < end:
        count += 1
    return count / ((perf_counter_ns() - begun) / 1e9)


def responsiveness(backend: str, seconds: float) -> list[Scenario]:
    """The speed of a Python thread while another's retargets are in the kernel."""
    shares: list[float] = []
    with _open(backend, ROUTES) as partition:
        routes = _bring_up(partition, ROUTES)
        route = routes[ROUTES // 2]
        msis = [MsiRoute.fixed(vector(ROUTES // 2, turn=turn), 0) for turn in (False, True)]

        def retarget(stop: threading.Event) -> None:
            while not stop.is_set():
                for msi in msis:
                    route.set_msi(msi)

        for _ in range(ROUNDS):
            alone = _turns(seconds)
            stop = threading.Event()
            thread = threading.Thread(target=retarget, args=(stop,))
            thread.start()
            shares.append(_turns(seconds) / alone)
            stop.set()
            thread.join()
    what = f"a thread's speed in Python while another retargets at {ROUTES} routes"
    return [_scenario("responsiveness", what, shares, "of its speed alone")]


def masked_retargets(backend: str, seconds: float) -> list[Scenario]:
    """A vector that the guest masks, retargets and unmasks, compared with a plain route and with a bare disarm and arm.

    All routes of a partition but one are the vectors of a device, and `set_msi()` of that one is called as often. First
    the vector alone is retargeted, often enough for the partition to load its table.
    """
    found: list[Scenario] = []
    for count in RETARGETED:
        machine.raise_descriptor_limit(4 * count)
        with ExitStack() as stack:
            partition = stack.enter_context(_open(backend, count))
            table = stack.enter_context(MsixTable(partition, count - 1))
            route = stack.enter_context(partition.new_irqfd_route())
            floor = _core.Baseline("floor-move", backend, count)
            stack.callback(floor.close)
            found += _masked_retargets(table, route, floor, count, seconds)
    return found


def _masked_retargets(
    table: MsixTable, route: _core.IrqFdRoute, floor: _core.Baseline, count: int, seconds: float
) -> list[Scenario]:
    msis = [[MsiRoute.fixed(vector(index, turn=turn), 0) for index in range(count)] for turn in (False, True)]
    bring_up_device(table, driver_writes(msis[False][1:]))
    plain = cycle([msis[turn][0] for turn in (False, True)])
    middle = (count - 1) // 2
    of_driver = driver_retargets(table, middle, [msis[turn][1 + middle] for turn in (True, False)])

    def timed(call: Callable[[], object]) -> int:
        call()
        begun = perf_counter_ns()
        for _ in range(IN_A_ROW):
            call()
        return perf_counter_ns() - begun

    def bare() -> int:
        floor.run("mask-unmask", 1)
        return floor.run("mask-unmask", IN_A_ROW)

    for _ in range(SETTLED):
        of_driver()
    ways = [lambda: timed(of_driver), lambda: timed(lambda: route.set_msi(next(plain))), bare]
    rounds: list[list[int]] = []
    end = perf_counter_ns() + int(seconds * 1e9)
    while len(rounds) < ROUNDS or perf_counter_ns() < end:
        rounds.append([way() for way in ways])
    what = f"a masked retarget by a guest at {count} routes"
    return [
        _scenario("masked-retargets", f"{what}, to {against}", [times[0] / times[way] for times in rounds], "")
        for way, against in enumerate(("set_msi() of a route beside", "a bare disarm and arm"), 1)
    ]


def others(backend: str, seconds: float) -> list[Scenario]:
    """The latency of signals on routes that nobody touches while one route moves without pause in another thread.

    It is compared with the latency while no thread moves a route, and while the thread moves one of another partition,
    which occupies a CPU in the same way.
    """
    if backend == "null":
        # Nothing is delivered.
        return []
    machine.raise_descriptor_limit(4 * ROUTES)
    found: list[Scenario] = []
    for name, preload in (("package", True), ("no preload", False)):
        with _open(backend, ROUTES, preload=preload) as partition, _open(backend, ROUTES, preload=preload) as another:
            here, elsewhere = _bring_up(partition, ROUTES), _bring_up(another, ROUTES)
            found += _others(name, here, elsewhere[ROUTES // 2], seconds)
    return found


def _others(design: str, routes: list[_core.IrqFdRoute], elsewhere: _core.IrqFdRoute, seconds: float) -> list[Scenario]:
    moves = {"nobody": None, "elsewhere": elsewhere, "here": routes[ROUTES // 2]}
    signalled = [route for route in routes if route is not moves["here"]]
    msis = [MsiRoute.fixed(vector(ROUTES // 2, turn=turn), 0) for turn in (True, False)]
    statistics: dict[str, Callable[[list[int]], float]] = {"median": median, "p99": _percentile_99, "mean": fmean}
    found: dict[str, dict[str, list[float]]] = {statistic: {name: [] for name in moves} for statistic in statistics}
    late_of: list[float] = []
    rates: list[float] = []
    for turn in range(SHORT * ROUNDS):
        names = list(moves)
        for name in names[turn % 3 :] + names[: turn % 3]:
            times, late, moved = _core.signal_latencies(signalled, moves[name], msis, seconds / SHORT)
            for statistic, of in statistics.items():
                found[statistic][name].append(of(times) / 1e3)
            if name == "here":
                late_of.append(100 * late / len(times))
                rates.append(moved / seconds * SHORT)
    what = f"{design}: signals on the others of {ROUTES} routes"
    rows = [
        _scenario("others", f"{what}, nobody moves: {statistic} latency", found[statistic]["nobody"], "us")
        for statistic in ("median", "p99")
    ]
    for statistic, by in found.items():
        for name, against in (("nobody", "nobody moves"), ("elsewhere", "one moves in another partition")):
            ratios = [here / there for here, there in zip(by["here"], by[name], strict=True)]
            rows.append(
                _scenario("others", f"{what}, one moves: {statistic} latency, to that while {against}", ratios, "")
            )
    return [
        *rows,
        _scenario("others", f"{what}, one moves: share of late ones, whose route was disarmed", late_of, "%"),
        _scenario("others", f"{what}, one moves: its moves", rates, "/s"),
    ]


def _percentile_99(values: list[int]) -> float:
    return quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]


def handler(backend: str, seconds: float) -> list[Scenario]:
    """The time from a signal in Python to the handler in a guest of KVM, compared with bare ioctls from Python.

    Both partitions run the same guest, which counts; the signal ends when its count changes. Rounds alternate.
    """
    if backend != "kvm":
        # No guest can run.
        return []
    times: dict[str, list[float]] = {"package": [], "bare": []}
    with ExitStack() as stack:
        waits: dict[str, Callable[[], int]] = {}
        for name, bring_up in (("package", _by_package), ("bare", _by_ioctls)):
            partition = stack.enter_context(open_partition("kvm"))
            waits[name] = _to_handler(stack.enter_context(GuestOfPartition(partition)), bring_up(partition, stack))
        for turn in range(HANDLED * ROUNDS):
            for name in sorted(waits, reverse=turn % 2 == 1):
                wait, end = waits[name], perf_counter_ns() + int(1e9 * seconds / HANDLED)
                wait()
                found = [wait()]
                while perf_counter_ns() < end:
                    found.append(wait())
                times[name].append(median(found) / 1e3)
    what = "a signal from Python to the guest's handler"
    ratios = [ours / bare for ours, bare in zip(times["package"], times["bare"], strict=True)]
    return [
        _scenario("handler", f"{what}: median latency", times["package"], "us"),
        _scenario("handler", f"{what}, bare ioctls: median latency", times["bare"], "us"),
        _scenario("handler", f"{what}: median latency, to that with bare ioctls", ratios, ""),
    ]


def _by_package(partition: KvmPartition, stack: ExitStack) -> Callable[[], object]:
    route = stack.enter_context(partition.new_irqfd_route())
    route.set_msi(MsiRoute.fixed(HANDLED_VECTOR, 0))
    return route.signal


def _by_ioctls(partition: KvmPartition, stack: ExitStack) -> Callable[[], object]:
    # Only the descriptor of the partition is used.
    kernel, event = KvmIoctls(partition.fileno()), os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    stack.callback(os.close, event)
    entry = kernel.pack_entry(FIRST_GSI, (ADDRESS, HANDLED_VECTOR))
    kernel.push(struct.pack("<II", kernel.fixed_count + 1, 0) + kernel.fixed + entry)
    kernel.irqfd(event, FIRST_GSI, deassign=False)
    return partial(os.eventfd_write, event, 1)


def _to_handler(guest: GuestOfPartition, signal: Callable[[], object]) -> Callable[[], int]:
    """A function that signals, and returns the nanoseconds until the guest has counted the interrupt."""

    def wait() -> int:
        before = guest.count(0, HANDLED_VECTOR)
        begun = perf_counter_ns()
        signal()
        while guest.count(0, HANDLED_VECTOR) == before:
            pass
        return perf_counter_ns() - begun

    return wait


def memory(backend: str, seconds: float) -> list[Scenario]:
    """The anonymous memory of partitions with routes, in a new process, whose heap has little free space to reuse."""
    del seconds
    sizes = [_measured_memory(backend) for _ in range(3)]
    return [_scenario("memory", f"a partition with {ROUTES} routes, including Python objects", sizes, "KiB")]


def _measured_memory(backend: str) -> float:
    command = [sys.executable, "-m", "mshv_irqfd._cli.bench.scenarios", backend]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603 -- this module


def _print_memory(backend: str) -> None:
    """Prints the memory of a partition and its routes, in KiB: the mean of several, after a first one."""
    # A huge page counts as a whole, even if little of it is used.
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    machine.raise_descriptor_limit((1 + MEASURED) * ROUTES)

    def anonymous() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

    with ExitStack() as stack:
        kept = []
        sizes = []
        for _ in range(1 + MEASURED):
            kept += _bring_up(stack.enter_context(_open(backend, ROUTES)), ROUTES)
            sizes.append(anonymous())
        print((sizes[-1] - sizes[0]) / MEASURED)


ALL: dict[str, Callable[[str, float], list[Scenario]]] = {
    "partitions": partitions,
    "masked-retargets": masked_retargets,
    "threads": threads,
    "others": others,
    "handler": handler,
    "responsiveness": responsiveness,
    "memory": memory,
}
"""By name; called with the backend and the seconds to measure a rate for."""

if __name__ == "__main__":
    _print_memory(sys.argv[1])
