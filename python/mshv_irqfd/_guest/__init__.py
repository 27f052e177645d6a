"""A guest for KVM that counts the interrupts which its CPUs take. `mshv-irqfd demo` and the tests run it.

The guest is some 200 bytes of machine code (`code.s`) in real mode. A thread for each VP makes KVM_RUN. The guest halts
inside the kernel, and its counters are memory that it shares with this process, so an interrupt that it takes costs
this process nothing.

A local APIC has one bit for each vector that waits to be taken: two interrupts of one vector merge, unless the guest
takes the first before the second is raised. `fence()` waits for that.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
import threading
import time
from collections import Counter
from contextlib import nullcontext, suppress
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

from mshv_irqfd.errors import ClosedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from mshv_irqfd._core import HasFileno
    from mshv_irqfd.handles import KvmPartition

KVM_GET_VCPU_MMAP_SIZE, KVM_RUN = 0xAE04, 0xAE80
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS = 0x4090AE82, 0x8138AE83, 0x4138AE84
KVM_SET_SIGNAL_MASK, KVM_SET_MP_STATE = 0x4004AE8B, 0x4004AE99
KVM_SIGNAL_MSI = 0x4020AEA5
KVM_EXIT_IO, KVM_EXIT_MMIO = 2, 6
KVM_MP_STATE_RUNNABLE = 0

# The guest's memory, which begins with the table of the vectors' handlers. code.s has the fields of a page.
CODE, STUBS, PAGES = 0x1000, 0x2000, 0x3000
PAGE = 0x1000
MOST_VPS = 255
VECTORS = 256
ASKED, MADE, ROUTINE, ADDRESS, VALUE = 0x400, 0x404, 0x408, 0x40C, 0x410
SIZES = (1, 2, 4, 8)

CS, SS = 0, 5
DATA_SEGMENTS = range(1, 5)
"""Places in struct kvm_sregs."""

FENCE = 16
"""The vector of fences. It has the lowest priority, so a VP takes it after all that waited when it was raised."""

KICK = signal.SIGRTMIN
"""The signal that makes KVM_RUN return."""

# Python's own ioctl() may call again after a signal; this one returns.
_libc = ctypes.CDLL(None, use_errno=True)


class GuestError(Exception):
    """The guest did something else than it should, or nothing at all. The message says what."""


class Access(NamedTuple):
    """An access of the guest that left the kernel, for its VMM to emulate."""

    address: int
    """A guest-physical address, or the number of a port."""
    size: int
    """1, 2, 4 or 8 bytes."""
    data: bytes | None
    """The bytes that are written, the lowest first. None: a read."""
    port: bool


def _nothing(_: Access) -> bytes | None:
    return None


class _Vp:
    """A vCPU, and the thread that runs it."""

    def __init__(self, guest: CountingGuest, index: int, fd: int, page: int) -> None:
        self.index = index
        self.page = page
        self.seen = bytes(4 * VECTORS)
        """The counters at the last `take()`."""
        self.failure: BaseException | None = None
        self._guest = guest
        self._fd = fd
        self._may_end = threading.Event()
        self._run = mmap.mmap(fd, _run_size())
        try:
            _set_up(fd, guest.entry, page)
            self._thread = threading.Thread(target=self._turn, name=f"vp-{index}", daemon=True)
            # Blocked from the thread's first moment on: what it kicks before `_turn` would end this process.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, [KICK])
            try:
                self._thread.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        except BaseException:
            self._run.close()
            raise

    def stop(self) -> None:
        """Ends the thread, and closes the vCPU. In a forked child there is no thread."""
        if self._thread.is_alive():
            # The thread keeps the signal blocked, so it stays pending until KVM_RUN sees it: no race.
            signal.pthread_kill(self._thread.ident or 0, KICK)
            self._may_end.set()
            self._thread.join()
        self._run.close()
        os.close(self._fd)

    def _turn(self) -> None:
        try:
            # Other signals are for the other threads. KVM_RUN lets the kick in.
            signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
            mask = ~(1 << KICK - 1) & (1 << 64) - 1
            fcntl.ioctl(self._fd, KVM_SET_SIGNAL_MASK, struct.pack("<IQ", 8, mask))
            while self._runs():
                self._emulate()
        except BaseException as error:  # noqa: BLE001 -- whoever waits for the guest gets it
            self.failure = error
        # Until it is kicked: a signal to a thread that has ended would hit nothing, or worse.
        self._may_end.wait()

    def _runs(self) -> bool:
        """Runs the vCPU until it needs its VMM. False once it is kicked."""
        if _libc.ioctl(self._fd, ctypes.c_ulong(KVM_RUN), 0) == 0:
            return True
        number = ctypes.get_errno()
        if number == errno.EINTR:
            return False
        raise GuestError(f"VP {self.index}: KVM_RUN: {os.strerror(number)}")

    def _emulate(self) -> None:
        (reason,) = struct.unpack_from("<I", self._run, 8)
        if reason == KVM_EXIT_MMIO:
            address, _, size, writes = struct.unpack_from("<Q8sIB", self._run, 32)
            at, port = 40, False
        elif reason == KVM_EXIT_IO:
            writes, size, address, _, at = struct.unpack_from("<BBHIQ", self._run, 32)
            port = True
        else:
            raise GuestError(f"VP {self.index} stopped with KVM's exit reason {reason}")
        data = self._run[at : at + size] if writes else None
        self._guest.left_kernel += 1
        answer = self._guest.vmm(Access(address, size, data, port))
        if not writes:
            self._run[at : at + size] = (answer or b"")[:size].ljust(size, b"\0")


def _run_size() -> int:
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE)
    finally:
        os.close(kvm)


def _set_up(vcpu: int, entry: int, page: int) -> None:
    """Sets the registers of a vCPU to the start of the code, in real mode with a data segment of 4 GiB."""
    # Runnable even if it is not VP 0, which would wake it.
    fcntl.ioctl(vcpu, KVM_SET_MP_STATE, struct.pack("<I", KVM_MP_STATE_RUNNABLE))
    sregs = bytearray(312)
    fcntl.ioctl(vcpu, KVM_GET_SREGS, sregs)
    for place, base, limit, kind in [
        (CS, 0, 0xFFFF, 11),
        (SS, page, 0xFFFF, 3),
        *((place, 0, 0xFFFFFFFF, 3) for place in DATA_SEGMENTS),
    ]:
        large = limit > 0xFFFFF  # noqa: PLR2004 -- a limit beyond 20 bits counts pages
        segment = (base, limit, base >> 4, kind, 1, 0, 0, 1, 0, large, 0, 0, 0)
        struct.pack_into("<QIHBBBBBBBBBB", sregs, 24 * place, *segment)
    fcntl.ioctl(vcpu, KVM_SET_SREGS, bytes(sregs))
    registers = [0, page, 0, 0, 0, 0, PAGE, 0, *[0] * 8, entry, 2]  # rbx, rsp, rip, rflags
    fcntl.ioctl(vcpu, KVM_SET_REGS, struct.pack("<18Q", *registers))


class CountingGuest:
    """The guest of a VM of KVM, whose memory begins at guest-physical address 0.

    Its methods may be called in several threads.

    Args:
        vm: the VM's descriptor, or an object with `fileno()`. The VM must have its interrupt controllers in the kernel,
            and no memory in slot 0.
        vmm: called in the VP's thread for each access that leaves the kernel. Returns the bytes of a read; zeros
            follow if it returns too few.
        patience: the seconds to wait for something that the guest must do.

    Raises:
        OSError: an ioctl failed.
    """

    def __init__(
        self,
        vm: HasFileno | int,
        *,
        vmm: Callable[[Access], bytes | None] = _nothing,
        patience: float = 10.0,
    ) -> None:
        self.vmm = vmm
        self.left_kernel = 0
        """How many accesses have left the kernel."""
        self._vm = vm
        self._owner = os.getpid()
        self._patience = patience
        self._vps: dict[int, _Vp] = {}
        self._lock = threading.RLock()
        code = resources.files(__name__).joinpath("code.bin").read_bytes()
        self.entry, take, *routines = struct.unpack_from("<13I", code)
        self._routines = {
            ("write", False): dict(zip(SIZES, routines[:4], strict=True)),
            ("read", False): dict(zip(SIZES, routines[4:8], strict=True)),
            ("write", True): dict(zip(SIZES[:3], routines[8:], strict=True)),
        }
        self._memory = mmap.mmap(-1, PAGES + MOST_VPS * PAGE)
        self._memory[CODE : CODE + len(code)] = code
        # Exceptions are counted too: the guest has none, so their count tells that it went wrong.
        for vector in range(VECTORS):
            stub = STUBS + 4 * vector
            struct.pack_into("<Bh", self._memory, stub, 0xE8, take - (stub + 3))  # call take
            struct.pack_into("<HH", self._memory, 4 * vector, stub, 0)
        self._words = memoryview(self._memory).cast("I")
        try:
            address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
            region = struct.pack("<IIQQQ", 0, 0, 0, len(self._memory), address)
            fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, region)
        except BaseException:
            self._words.release()
            self._memory.close()
            raise

    @property
    def vps(self) -> tuple[int, ...]:
        """The VPs that run the guest."""
        return tuple(self._vps)

    def add(self, index: int, vcpu: int) -> None:
        """Runs the guest on another VP, and returns when it does.

        Args:
            index: the VP's index, which is its APIC id.
            vcpu: a descriptor of the vCPU, which the guest closes.

        Raises:
            GuestError, OSError: the guest does not run here.
        """
        with self._lock:
            page = PAGES + PAGE * len(self._vps)
            # A first access, to memory of its own, tells that the guest runs and that its local APIC is on.
            self._ask(page, self._routines["read", False][4], page, 0)
            try:
                vp = _Vp(self, index, vcpu, page)
            except BaseException:
                os.close(vcpu)
                raise
            self._vps[index] = vp
            self._until(lambda: self._made(page), f"VP {index} runs", vp)

    def fence(self) -> None:
        """Returns once the guest has taken every interrupt that waited in its local APICs at the call.

        Raises:
            GuestError: it does not take them.
        """
        with self._lock:
            before = {index: self.count(index, FENCE) for index in self._vps}
            for index in self._vps:
                self._kick(index)
            for index, vp in self._vps.items():
                self._until(lambda: self.count(index, FENCE) != before[index], f"VP {index} takes what waits", vp)  # noqa: B023 -- called before the next iteration

    def count(self, vp: int, vector: int) -> int:
        """How many interrupts of a vector a VP has taken since the guest began, modulo 2^32."""
        return self._words[self._vps[vp].page // 4 + vector]

    def take(self) -> Counter[tuple[int, int]]:
        """The interrupts that the guest has taken since the last call: how many of each vector, by vector and VP."""
        taken = Counter[tuple[int, int]]()
        with self._lock:
            for index, vp in self._vps.items():
                self._check(vp)
                now = self._memory[vp.page : vp.page + 4 * VECTORS]
                if now == vp.seen:
                    continue
                for vector, (new, old) in enumerate(zip(_counts(now), _counts(vp.seen), strict=True)):
                    if new != old and vector != FENCE:
                        taken[vector, index] = new - old & 0xFFFFFFFF
                vp.seen = now
        return taken

    def write(self, address: int, data: bytes, *, vp: int = 0, port: bool = False) -> bool:
        """Makes the guest write to an address below 4 GiB or to a port.

        Args:
            address: the guest-physical address, or the number of the port.
            data: 1, 2, 4 or 8 bytes (not 8 to a port), written by one instruction.
            vp: the VP that writes.
            port: whether `address` is a port.

        Returns:
            Whether the kernel kept the write to itself: a doorbell rang, or it wrote memory or a device of the kernel.
        """
        with self._lock:
            before = self.left_kernel
            self._make(vp, Access(address, len(data), data, port))
            return self.left_kernel == before

    def read(self, address: int, size: int, *, vp: int = 0) -> bytes:
        """Makes the guest read 1, 2, 4 or 8 bytes at an address below 4 GiB, by one instruction."""
        with self._lock:
            at = self._make(vp, Access(address, size, None, port=False)) + VALUE
            return self._memory[at : at + size]

    def _make(self, vp: int, access: Access) -> int:
        """Makes a VP access memory or a port, and returns the address of its page."""
        routines = self._routines["write" if access.data is not None else "read", access.port]
        if access.size not in routines:
            raise ValueError(f"an access has {', '.join(map(str, routines))} bytes, not {access.size}")
        page = self._vps[vp].page
        self._ask(page, routines[access.size], access.address, int.from_bytes(access.data or b"", "little"))
        before = self.count(vp, FENCE)
        self._kick(vp)
        # The kick too must be taken, or it would be mistaken for the next one.
        self._until(
            lambda: self._made(page) and self.count(vp, FENCE) != before, f"VP {vp} makes {access}", self._vps[vp]
        )
        return page

    def _ask(self, page: int, routine: int, address: int, value: int) -> None:
        struct.pack_into("<IIQ", self._memory, page + ROUTINE, routine, address, value)
        at = (page + ASKED) // 4
        self._words[at] = self._words[at] + 1 & 0xFFFFFFFF

    def _made(self, page: int) -> bool:
        return self._words[(page + ASKED) // 4] == self._words[(page + MADE) // 4]

    def _kick(self, vp: int) -> None:
        """Raises the fence's vector."""
        message = bytearray(struct.pack("<IIII16x", 0xFEE00000 | vp << 12, 0, FENCE, 0))
        if fcntl.ioctl(self._vm, KVM_SIGNAL_MSI, message) <= 0:
            raise GuestError(f"the local APIC of VP {vp} is off")

    def _until(self, condition: Callable[[], bool], what: str, vp: _Vp) -> None:
        """Waits for something that a VP must do."""
        deadline, turns = time.monotonic() + self._patience, 0
        while not condition():
            self._check(vp)
            if time.monotonic() > deadline:
                raise GuestError(f"{self._patience:g} s passed before {what}")
            # It takes some 10 us as a rule. Sleeping lets go of the interpreter, which an access may need.
            time.sleep(0 if turns < 100 else 0.0001)  # noqa: PLR2004
            turns += 1

    def _check(self, vp: _Vp) -> None:
        if vp.failure is not None:
            raise GuestError(f"VP {vp.index} failed: {vp.failure}") from vp.failure

    def close(self) -> None:
        """Stops the VPs, and takes the guest's memory from the VM if that is still open. Closing twice is fine.

        In a forked child, where no VP runs, it closes the child's descriptors and does nothing else.
        """
        # In a forked child a thread that it does not have may hold the lock.
        with self._lock if os.getpid() == self._owner else nullcontext():
            if self._memory.closed:
                return
            for vp in self._vps.values():
                vp.stop()
            if os.getpid() == self._owner:
                # A VM that is closed has nothing to give back.
                with suppress(OSError, ClosedError):
                    fcntl.ioctl(self._vm, KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", 0, 0, 0, 0, 0))
            self._words.release()
            self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()


def _counts(page: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{VECTORS}I", page)


class GuestOfPartition(CountingGuest):
    """The guest of a partition that this package made. It runs on all VPs.

    Meanwhile the partition's `take_interrupts()` raises `io.UnsupportedOperation`.

    Args:
        partition: a partition of KVM, not an adopted one. It must not run a guest already.
        vmm, patience: as for `CountingGuest`.

    Raises:
        GuestError, OSError: the guest does not run here.
    """

    def __init__(
        self,
        partition: KvmPartition,
        *,
        vmm: Callable[[Access], bytes | None] = _nothing,
        patience: float = 10.0,
    ) -> None:
        super().__init__(partition, vmm=vmm, patience=patience)
        self._partition = partition
        try:
            self.add_new_vps()
        except BaseException:
            self.close()
            raise

    def add_new_vps(self) -> None:
        """Runs the guest on the VPs that the partition has made since."""
        for index in self._partition.vps or ():
            if index not in self._vps:
                self.add(index, self._partition._lend_vcpu(index))  # noqa: SLF001 -- for this module alone

    def close(self) -> None:
        """Stops the VPs, and gives them back to the partition, once: the next guest may run on them by now."""
        with self._lock if os.getpid() == self._owner else nullcontext():
            if self._memory.closed:
                return
            super().close()
            if os.getpid() == self._owner and not self._partition.closed:
                self._partition._take_vcpus_back()  # noqa: SLF001 -- for this module alone
