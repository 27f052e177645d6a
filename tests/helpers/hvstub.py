"""The lab's stand-in hypervisor (/dev/hvstub, lab/hvstub.c) in Python: its records, its counters, and its faults."""

from __future__ import annotations

import ctypes
import enum
import errno
import fcntl
import os
import select
import struct
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

DEVICE: Final = "/dev/hvstub"
AVAILABLE: Final = Path(DEVICE).exists()
UNAVAILABLE: Final = f"no {DEVICE}: run under lab/run, which boots a kernel that has it"

ANY: Final = 0  # a fault of hypercalls of every kind
ROOT_PARTITION: Final = 1

_RECORD = struct.Struct("=QQQII")
_STATE = struct.Struct("=12Q")
_FAIL = struct.Struct("=HHI")
_FAULT = struct.Struct("=HHIQQ")
_VECTORS = struct.Struct("=QIIQ")
_WRITE = struct.Struct("=QQQII")
_HVCALL = struct.Struct("=HHHHH6xQQ")
_READ_SIZE = 1024 * _RECORD.size

_WRITES, _READS = 1, 2


def _request(direction: int, kind: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | kind << 8 | number


_GET_STATE = _request(_READS, ord("h"), 0, _STATE.size)
_SET_FAIL = _request(_WRITES, ord("h"), 1, _FAIL.size)
_GET_FAULT = _request(_READS, ord("h"), 2, _FAULT.size)
_GET_VECTORS = _request(_READS | _WRITES, ord("h"), 3, _VECTORS.size)
_GUEST_WRITE = _request(_READS | _WRITES, ord("h"), 4, _WRITE.size)
_ROOT_HVCALL = _request(_READS | _WRITES, 0xB8, 7, _HVCALL.size)
_PROPERTY_ID = 0x68760001


class Hypercall(enum.IntEnum):
    """Hypercall codes that the driver makes for a partition (include/hyperv/hvgdk_mini.h)."""

    CREATE_PARTITION = 0x40
    INITIALIZE_PARTITION = 0x41
    FINALIZE_PARTITION = 0x42
    DELETE_PARTITION = 0x43
    GET_PARTITION_PROPERTY = 0x44
    SET_PARTITION_PROPERTY = 0x45
    DEPOSIT_MEMORY = 0x48
    WITHDRAW_MEMORY = 0x49
    CREATE_VP = 0x4E
    DELETE_VP = 0x4F
    GET_VP_REGISTERS = 0x50
    SET_VP_REGISTERS = 0x51
    DELETE_PORT = 0x58
    DISCONNECT_PORT = 0x5B
    MAP_STATS_PAGE = 0x6C
    UNMAP_STATS_PAGE = 0x6D
    ASSERT_VIRTUAL_INTERRUPT = 0x94
    CREATE_PORT = 0x95
    CONNECT_PORT = 0x96
    MAP_VP_STATE_PAGE = 0xE1
    UNMAP_VP_STATE_PAGE = 0xE2


class Status(enum.IntEnum):
    """HV_STATUS_* values, and in comments the errno the driver makes of them (drivers/hv/hv_common.c)."""

    SUCCESS = 0x0
    INVALID_PARAMETER = 0x5  # EINVAL; "no such statistics area" for the PARENT area of MAP_STATS_PAGE: not an error
    ACCESS_DENIED = 0x6  # EACCES
    INVALID_PARTITION_STATE = 0x7  # EIO
    OPERATION_DENIED = 0x8  # EACCES
    INSUFFICIENT_MEMORY = 0xB  # none: the driver deposits pages and tries again
    INVALID_PARTITION_ID = 0xD  # EINVAL
    INVALID_VP_INDEX = 0xE  # EINVAL
    NO_RESOURCES = 0x1D  # EIO
    OPERATION_FAILED = 0x71  # EIO
    TIME_OUT = 0x78  # EIO


class Scheduler(enum.IntEnum):
    """The scheduler type of this boot. On ROOT the driver's fast path puts vectors into register pages."""

    LP = 1
    LP_SMT = 2
    CORE = 3
    ROOT = 4


@dataclass(frozen=True)
class Asserted:
    """One interrupt that the driver asked the hypervisor to assert."""

    partition_id: int
    vector: int
    destination: int
    delivery_mode: int
    logical: bool
    level: bool
    status: int = 0  # the hypervisor's answer, which the driver ignores


@dataclass(frozen=True)
class Counters:
    """The stand-in's counters: the fields of `struct hvstub_state` in lab/hvstub.c, explained there."""

    scheduler: int
    hypercalls: int
    partitions: int
    vps: int
    ports: int
    connections: int
    mapped_pages: int
    guest_pages: int
    root_pages: int
    stranded_pages: int
    recorded: int
    lost: int

    @property
    def held(self) -> tuple[int, ...]:
        """The counters that return to their old values when every new partition is gone.

        The root's own pages are not among them: the driver deposits some when they run short, and leaves them there.
        """
        return (
            self.partitions,
            self.vps,
            self.ports,
            self.connections,
            self.mapped_pages,
            self.guest_pages,
            self.stranded_pages,
        )


@dataclass(frozen=True)
class Fault:
    """The latest fault: the hypercalls of its kind so far (`seen`), and whether one has failed (`injected`)."""

    code: int
    status: int
    nth: int
    seen: int
    injected: bool


@dataclass
class Outcome:
    """The outcome of a fault that was set for a block; known when the block has ended."""

    injected: bool = False
    seen: int = 0  # hypercalls of its kind, the one that failed included


class InterruptsLostError(Exception):
    """More interrupts were asserted than the stand-in keeps: take them more often. `taken`: those before the gap."""

    def __init__(self, message: str, taken: list[Asserted]) -> None:
        super().__init__(message)
        self.taken = taken


class HvStub:
    """The lab's stand-in hypervisor.

    There is one, and one buffer of interrupts for all partitions: keep one reader, and tell partitions apart by
    `partition_id`. Opening discards the interrupts recorded before.
    """

    def __init__(self) -> None:
        self._fd = os.open(DEVICE, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the device, which ends a fault set through it. A second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def fileno(self) -> int:
        """Readable while there are interrupts to take."""
        return self._fd

    def take(self, timeout: float = 0.0) -> list[Asserted]:
        """Takes all interrupts asserted and not taken yet, in order; waits up to `timeout` seconds for the first.

        Raises InterruptsLostError once for each gap. The device is read until it is empty, so under
        a steady stream of signals this returns late: read from a thread then, or stop the signals first.
        """
        if timeout > 0:
            waiting = select.poll()
            waiting.register(self._fd, select.POLLIN)
            waiting.poll(timeout * 1000)
        taken: list[Asserted] = []
        while True:
            try:
                data = os.read(self._fd, _READ_SIZE)
            except BlockingIOError:
                return taken
            except OSError as error:
                if error.errno != errno.EOVERFLOW:
                    raise
                raise InterruptsLostError(f"lost after {len(taken)} more: {self.counters()}", taken) from None
            for partition, destination, control, vector, status in _RECORD.iter_unpack(data):
                taken.append(
                    Asserted(
                        partition,
                        vector,
                        destination,
                        control & 0xFFFFFFFF,
                        bool(control >> 33 & 1),
                        bool(control >> 32 & 1),
                        status,
                    )
                )
            if len(data) < _READ_SIZE:
                return taken

    def take_until(self, count: int, timeout: float = 10.0) -> list[Asserted]:
        """Takes interrupts until there are at least `count` or the time is up; returns all taken."""
        deadline = time.monotonic() + timeout
        taken = self.take()
        while len(taken) < count and (left := deadline - time.monotonic()) > 0:
            taken += self.take(left)
        return taken

    def discard(self) -> None:
        """Discards the interrupts not taken yet, lost ones included."""
        while True:
            try:
                os.read(self._fd, _READ_SIZE)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.EOVERFLOW:
                    raise

    def counters(self) -> Counters:
        """The counters as they are now."""
        return Counters(*_STATE.unpack(self._call(_GET_STATE, bytes(_STATE.size))))

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler type of this boot."""
        return Scheduler(self.counters().scheduler)

    def fail(self, code: int, status: int = Status.OPERATION_FAILED, nth: int = 1) -> None:
        """Makes the nth hypercall of kind `code` (or ANY) from now on fail with `status`, once.

        Replaces an earlier fault.
        """
        self._call(_SET_FAIL, _FAIL.pack(code, status, nth))

    def heal(self) -> Fault:
        """Ends the latest fault and returns its state."""
        fault = self.fault()
        self._call(_SET_FAIL, _FAIL.pack(0, 0, 0))
        return fault

    def fault(self) -> Fault:
        """The state of the latest fault."""
        code, status, nth, seen, injected = _FAULT.unpack(self._call(_GET_FAULT, bytes(_FAULT.size)))
        return Fault(code, status, nth, seen, bool(injected))

    @contextmanager
    def failing(self, code: int, status: int = Status.OPERATION_FAILED, nth: int = 1) -> Iterator[Outcome]:
        """`fail` for the length of a block.

        In a loop over nth from 1 up, the first round with `injected` False has failed every hypercall of the kind.
        """
        outcome = Outcome()
        self.fail(code, status, nth)
        try:
            yield outcome
        finally:
            fault = self.heal()
            outcome.injected, outcome.seen = fault.injected, fault.seen

    def registers(self, partition_id: int, vp_index: int, *, clear: bool = True) -> list[int]:
        """The vectors in a VP's register page, oldest first; `clear` takes them, as dispatching the VP would.

        Raises FileNotFoundError if there is no such VP.
        """
        packed = _VECTORS.unpack(self._call(_GET_VECTORS, _VECTORS.pack(partition_id, vp_index, clear, 0)))[3]
        count, *vectors = struct.pack("=Q", packed)
        return vectors[:count]

    def fire_doorbell(self, partition_id: int, gpa: int, value: int = 0, size: int = 4) -> int:
        """Writes `size` bytes to `gpa` as a guest does. Returns the number of doorbells that it rang."""
        written = _WRITE.unpack(self._call(_GUEST_WRITE, _WRITE.pack(partition_id, gpa, value, size, 0)))
        return int(written[4])

    def _call(self, request: int, argument: bytes) -> bytes:
        return fcntl.ioctl(self._fd, request, argument)


def partition_id(fd: int) -> int:
    """The hypervisor's id of the partition behind an mshv partition descriptor."""
    given = bytearray(struct.pack("=QII", 0, _PROPERTY_ID, 0))
    found = bytearray(8)
    address_in, address_out = _address(given), _address(found)
    call = _HVCALL.pack(Hypercall.GET_PARTITION_PROPERTY, 0, len(given), len(found), 0, address_in, address_out)
    fcntl.ioctl(fd, _ROOT_HVCALL, bytearray(call), True)
    return int.from_bytes(found, "little")


def _address(buffer: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@contextmanager
def kernel_allocation_fails(nth: int) -> Iterator[Outcome]:
    """Makes the nth kernel allocation by this thread fail, once, from here to the end of the block.

    In a loop over nth from 1 up, the first round with `injected` False has seen every allocation. Everything
    that the thread does counts, so the block should hold little but the call under test. Only under lab/run, which
    lifts the exemption that allocations which may sleep have by default (failslab/ignore-gfp-wait in debugfs).
    """
    outcome = Outcome()
    fd = os.open("/proc/thread-self/fail-nth", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.pwrite(fd, b"%d" % nth, 0)
        try:
            yield outcome
        finally:
            outcome.injected = os.pread(fd, 16, 0).strip(b"\n\0") == b"0"
            os.pwrite(fd, b"0", 0)
    finally:
        os.close(fd)
