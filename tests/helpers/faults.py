"""Fault injection: the faults of the simulated kernel, and failing ioctls on a real one.

A seccomp filter (SECCOMP_RET_USER_NOTIF, seccomp_unotify(2)) stops each ioctl, and a supervisor lets it continue or
fails it with an errno before the driver sees it. A filter can't be removed from a thread, so the calls run in a thread
of their own, and a second thread, which has no filter, supervises. Needs Linux 5.19 and no privilege.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
import threading
from abc import ABC, abstractmethod
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from mshv_irqfd import SimulatedPartition

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from mshv_irqfd import Partition
    from mshv_irqfd.testing import SimulatedCall

T = TypeVar("T")

CALLS: tuple[SimulatedCall, ...] = ("set_msi_routing", "assign_irqfd", "deassign_irqfd")
"""The calls that routes make."""

tried: Counter[tuple[str, str]] = Counter()
"""The number of injected failures by backend and kind, for the summary."""


class Faults(ABC):
    """Faults of one backend: calls that fail on demand."""

    @abstractmethod
    def fail(self, partition: Partition, call: SimulatedCall, number: int, *, after: int = 0, times: int = 1) -> None:
        """Makes `times` calls of a kind fail with an errno, after letting `after` of them through.

        Faults of one kind are used up in the order in which they are injected.
        """

    @abstractmethod
    def clear(self) -> None:
        """Removes the faults of closed partitions."""

    @abstractmethod
    def run(self, function: Callable[[], T]) -> T:
        """Runs a function with the faults in force."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Ends the threads of the faults."""


class SimulatedFaults(Faults):
    """Faults of simulated partitions, which keep them themselves."""

    def fail(self, partition: Partition, call: SimulatedCall, number: int, *, after: int = 0, times: int = 1) -> None:
        assert isinstance(partition, SimulatedPartition)
        partition.fail(call, number, after=after, times=times)

    def clear(self) -> None:
        pass

    def run(self, function: Callable[[], T]) -> T:
        return function()

    def close(self) -> None:
        pass


KVM_IRQFD, KVM_SET_GSI_ROUTING = 0x4020AE76, 0x4008AE6A
KVM_CREATE_VCPU, KVM_GET_LAPIC, KVM_SET_LAPIC = 0xAE41, 0x8400AE8E, 0x4400AE8F
KVM_IOEVENTFD, KVM_SIGNAL_MSI = 0x4040AE79, 0x4020AEA5
MSHV_IRQFD, MSHV_SET_MSI_ROUTING, MSHV_CREATE_VP = 0x4010B803, 0x4008B805, 0x4004B801
MSHV_IOEVENTFD, MSHV_ROOT_HVCALL = 0x4020B804, 0xC020B807

KINDS = {
    KVM_SET_GSI_ROUTING: "set_msi_routing",
    MSHV_SET_MSI_ROUTING: "set_msi_routing",
    KVM_CREATE_VCPU: "create_vp",
    KVM_GET_LAPIC: "create_vp",
    KVM_SET_LAPIC: "create_vp",
    MSHV_CREATE_VP: "create_vp",
    KVM_SIGNAL_MSI: "signal_msi",
    MSHV_ROOT_HVCALL: "signal_msi",
}
FLAGS = {
    KVM_IRQFD: (8, 1, "irqfd"),
    MSHV_IRQFD: (12, 1, "irqfd"),
    KVM_IOEVENTFD: (24, 4, "ioeventfd"),
    MSHV_IOEVENTFD: (24, 4, "ioeventfd"),
}
"""The offset of the flags in the argument of an ioctl that assigns and deassigns; the flag for deassigning."""

SYS_SECCOMP, SYS_IOCTL = 317, 16
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_SET_MODE_FILTER = 1
# A signal must not interrupt a stopped call, which would then be made twice.
SECCOMP_FILTER_FLAGS = 1 << 3 | 1 << 5  # NEW_LISTENER, WAIT_KILLABLE_RECV
SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND = 0xC0502100, 0xC0182101
SECCOMP_USER_NOTIF_FLAG_CONTINUE = 1
NOTIFY, ALLOW = 0x7FC00000, 0x7FFF0000
LOAD, AND, IF_EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06

FILTER = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        (LOAD, 0, 0, 0),  # the number of the system call
        (IF_EQUAL, 0, 4, SYS_IOCTL),
        (LOAD, 0, 0, 24),  # the ioctl's number, whose second byte names the driver
        (AND, 0, 0, 0xFF00),
        (IF_EQUAL, 2, 0, 0xAE00),  # KVM
        (IF_EQUAL, 1, 0, 0xB800),  # mshv
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, NOTIFY),
    )
)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _filter_this_thread(instructions: bytes = FILTER, flags: int = SECCOMP_FILTER_FLAGS) -> int:
    """Stops this thread's ioctls from now on. Returns the descriptor that reports them."""
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(len(instructions) // 8, instructions)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    listener = libc.syscall(SYS_SECCOMP, SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(program))
    if listener < 0:
        raise OSError(ctypes.get_errno(), f"seccomp(SECCOMP_SET_MODE_FILTER) with flags {flags}")
    return int(listener)


SYS_READLINK, SYS_READLINKAT, SYS_EPOLL_CREATE1 = 89, 267, 291
ERRNO = 0x00050000


def without(calls: tuple[int, ...], number: int, function: Callable[[], T]) -> T:
    """Runs a function in a thread whose system calls of these numbers fail with an errno."""
    program = [(LOAD, 0, 0, 0)]
    for call in calls:
        program += [(IF_EQUAL, 0, 1, call), (RETURN, 0, 0, ERRNO | number)]
    program.append((RETURN, 0, 0, ALLOW))
    instructions = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    with ThreadPoolExecutor(1, "refused") as pool:
        pool.submit(_filter_this_thread, instructions, 0).result()
        return pool.submit(function).result()


@dataclass
class _Fault:
    kind: str
    number: int
    after: int
    times: int


class KernelFaults(Faults):
    """Faults of the ioctls of KVM and mshv that `run` makes, and the threads that it starts, one at a time.

    The kinds are those of a simulated partition, "create_vp" for each ioctl that creating a VP takes, and "ioctl" for
    any ioctl.
    """

    def __init__(self) -> None:
        self._faults: list[_Fault] = []
        self._pool = ThreadPoolExecutor(1, "faulty")
        self._listener = self._pool.submit(_filter_this_thread).result()
        self._supervisor = threading.Thread(target=self._supervise, name="faults")
        self._supervisor.start()

    def fail(
        self,
        partition: Partition | None,  # noqa: ARG002 - whichever is in use
        call: SimulatedCall | Literal["create_vp", "ioctl"],
        number: int,
        *,
        after: int = 0,
        times: int = 1,
    ) -> None:
        self._faults.append(_Fault(call, number, after, times))

    def clear(self) -> None:
        self._faults.clear()

    def run(self, function: Callable[[], T]) -> T:
        return self._pool.submit(function).result()

    def close(self) -> None:
        self._pool.shutdown()
        self._supervisor.join()

    def _supervise(self) -> None:
        """Decides on each stopped ioctl until no thread with the filter is left."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        try:
            while not poll.poll()[0][1] & select.POLLHUP:
                held = bytearray(80)  # struct seccomp_notif, and struct seccomp_notif_resp below
                fcntl.ioctl(self._listener, SECCOMP_IOCTL_NOTIF_RECV, held, True)
                cookie, request, argument = struct.unpack_from("Q 32x QQ", held)
                number = self._strikes(request & 0xFFFFFFFF, argument)
                flags = 0 if number else SECCOMP_USER_NOTIF_FLAG_CONTINUE
                fcntl.ioctl(self._listener, SECCOMP_IOCTL_NOTIF_SEND, struct.pack("QqiI", cookie, 0, -number, flags))
        finally:
            os.close(self._listener)

    def _strikes(self, request: int, argument: int) -> int:
        """The errno for an ioctl that must fail; 0 to let it continue."""
        kind = KINDS.get(request)
        if request in FLAGS:
            # The caller is stopped in the system call, so its argument is still in memory.
            offset, deassign, thing = FLAGS[request]
            flags = ctypes.c_uint32.from_address(argument + offset).value
            kind = f"deassign_{thing}" if flags & deassign else f"assign_{thing}"
        for fault in self._faults:
            if fault.times > 0 and fault.kind in (kind, "ioctl"):
                if fault.after > 0:
                    fault.after -= 1
                    return 0
                fault.times -= 1
                return fault.number
        return 0


def unavailable() -> str | None:
    """The reason why ioctls can't be made to fail here; None if they can."""
    try:
        KernelFaults().close()
    except OSError as error:
        missing = (
            "CONFIG_SECCOMP_FILTER" if error.errno in (errno.ENOSYS, errno.EINVAL) else "permission to use seccomp"
        )
        return f"needs Linux 5.19 with {missing} to make ioctls fail: {error}"
    return None


def of(name: str) -> Faults:
    """The fault injection of a backend."""
    return SimulatedFaults() if name == "simulated" else KernelFaults()
