"""Calls into a kernel that fail as they are told to: the simulated kernel's own faults, and a real kernel's ioctls.

A real kernel's ioctls are held up by a seccomp filter (SECCOMP_RET_USER_NOTIF, seccomp_unotify(2)) and let go on, or
answered with an errno before the driver sees them. A filter can't be taken off a thread, so there is a thread for it,
which ends with the faults; a second thread, free of it, decides. Needs Linux 5.19 and no privilege.
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

T = TypeVar("T")

Call = Literal["set_msi_routing", "assign_irqfd", "deassign_irqfd"]
CALLS: tuple[Call, ...] = ("set_msi_routing", "assign_irqfd", "deassign_irqfd")

tried: Counter[tuple[str, str]] = Counter()
"""How many failures of which kind were tried on which backend, for the summary."""


class Faults(ABC):
    """Calls that are to fail."""

    @abstractmethod
    def fail(self, partition: Partition, call: Call, number: int, *, after: int = 0, times: int = 1) -> None:
        """Makes `times` calls of a kind fail with an errno, after letting `after` of them through.

        Faults of one kind are used up in the order in which they were asked for.
        """

    @abstractmethod
    def clear(self) -> None:
        """Forgets what was asked of partitions that are closed."""

    @abstractmethod
    def run(self, function: Callable[[], T]) -> T:
        """Runs a function where calls fail."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Ends with the threads that it needed."""


class SimulatedFaults(Faults):
    """Those of simulated partitions, with which they go."""

    def fail(self, partition: Partition, call: Call, number: int, *, after: int = 0, times: int = 1) -> None:
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
MSHV_IRQFD, MSHV_SET_MSI_ROUTING, MSHV_CREATE_VP = 0x4010B803, 0x4008B805, 0x4004B801

KINDS = {
    KVM_SET_GSI_ROUTING: "set_msi_routing",
    MSHV_SET_MSI_ROUTING: "set_msi_routing",
    KVM_CREATE_VCPU: "create_vp",
    KVM_GET_LAPIC: "create_vp",
    KVM_SET_LAPIC: "create_vp",
    MSHV_CREATE_VP: "create_vp",
}
FLAGS = {KVM_IRQFD: 8, MSHV_IRQFD: 12}
"""Where the flags stand in the argument of an irqfd ioctl. Of both kernels the lowest says: deassign."""

SYS_SECCOMP, SYS_IOCTL = 317, 16
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_SET_MODE_FILTER = 1
# Not to be interrupted by a signal once the call is held up, which would make it twice.
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
        (LOAD, 0, 0, 24),  # the ioctl's number, of which the second byte says whose it is
        (AND, 0, 0, 0xFF00),
        (IF_EQUAL, 2, 0, 0xAE00),  # KVM
        (IF_EQUAL, 1, 0, 0xB800),  # mshv
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, NOTIFY),
    )
)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _filter_this_thread() -> int:
    """Holds up this thread's ioctls from now on. Returns the descriptor on which they are told."""
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(len(FILTER) // 8, FILTER)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    listener = libc.syscall(SYS_SECCOMP, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAGS, ctypes.byref(program))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp(SECCOMP_SET_MODE_FILTER) with a listener")
    return int(listener)


@dataclass
class _Fault:
    kind: str
    number: int
    after: int
    times: int


class KernelFaults(Faults):
    """Those of the ioctls of KVM and mshv that `run` makes, and the threads that it starts, one at a time.

    Their kinds: those of a simulated partition's calls; "create_vp" for each call that making a VP takes; "ioctl" for
    any at all.
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
        call: Call | Literal["create_vp", "ioctl"],
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
        """Answers until no thread is left that has the filter."""
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
        """The errno with which an ioctl is to fail; 0 if it is not."""
        kind = KINDS.get(request)
        if request in FLAGS:
            # The caller waits in the system call, so its argument is there.
            flags = ctypes.c_uint32.from_address(argument + FLAGS[request]).value
            kind = "deassign_irqfd" if flags & 1 else "assign_irqfd"
        for fault in self._faults:
            if fault.times > 0 and fault.kind in (kind, "ioctl"):
                if fault.after > 0:
                    fault.after -= 1
                    return 0
                fault.times -= 1
                return fault.number
        return 0


def unavailable() -> str | None:
    """Why ioctls can't be made to fail here; None if they can."""
    try:
        KernelFaults().close()
    except OSError as error:
        missing = "CONFIG_SECCOMP_FILTER" if error.errno in (errno.ENOSYS, errno.EINVAL) else "leave to use seccomp"
        return f"needs Linux 5.19 with {missing} to make ioctls fail: {error}"
    return None


def of(name: str) -> Faults:
    """Faults of a backend's calls."""
    return SimulatedFaults() if name == "simulated" else KernelFaults()
