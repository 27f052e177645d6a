"""The front end of vhost-user: what a virtual machine monitor says to a device in another process.

The messages are those of QEMU's docs/interop/vhost-user.rst. They hand over the guest's memory, and for each queue its
place in that memory and two eventfds: the guest's notifications arrive in `kick`, and the device signals `call`. From
then on guest and device need neither the socket nor the front end.
"""

from __future__ import annotations

import os
import socket
import struct
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from types import TracebackType

    from .memory import Memory
    from .ring import Ring


class HasFileno(Protocol):
    """An object with a descriptor."""

    def fileno(self) -> int:
        """The descriptor."""
        ...


class Request(IntEnum):
    """The kinds of messages used here."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24


class Feature(IntFlag):
    """Features of virtio, of which the guest's driver accepts those that it knows."""

    PROTOCOL_FEATURES = 1 << 30
    """Not virtio's: the device speaks the protocol's extensions."""
    VERSION_1 = 1 << 32


class ProtocolFeature(IntFlag):
    """Extensions of the protocol."""

    REPLY_ACK = 1 << 3
    """Each message is answered if asked for."""
    CONFIG = 1 << 9
    """The device has the configuration space."""


HEADER = struct.Struct("<III")
"""Request, flags, and the size of the payload that follows."""
VERSION, IS_REPLY, NEEDS_REPLY = 1, 4, 8
U64 = struct.Struct("<Q")
STATE = struct.Struct("<II")
ADDRESSES = struct.Struct("<IIQQQQ")
REGION = struct.Struct("<QQQQ")
CONFIG = struct.Struct("<III")
LONGEST_PAYLOAD = 4096
WANTED = ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG


class BackEndError(Exception):
    """The device's process did not do what it was asked for."""


class FrontEnd:
    """A connection to a device in another process.

    Args:
        path: the device's Unix socket.
        timeout: how long to wait for an answer, in seconds.

    Raises:
        OSError: nobody listens there, or the connection breaks. Every method raises this.
        BackEndError: the device lacks a feature that is needed here, refuses a message, or goes away.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = 60.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(os.fspath(path))
            self._negotiate()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the connection. The device stops its queues when the requests in flight are done."""
        self._socket.close()

    def _negotiate(self) -> None:
        wanted = Feature.PROTOCOL_FEATURES | Feature.VERSION_1
        self.features = self._ask_u64(Request.GET_FEATURES)
        self._require("features", self.features, wanted)
        offered = self._ask_u64(Request.GET_PROTOCOL_FEATURES)
        self._require("protocol features", offered, WANTED)
        self._send(Request.SET_PROTOCOL_FEATURES, U64.pack(WANTED))
        self._tell(Request.SET_OWNER)
        # The driver accepts nothing beyond virtio 1.0, so each used chain raises an interrupt.
        self._tell(Request.SET_FEATURES, U64.pack(wanted))

    def _require(self, what: str, offered: int, wanted: int) -> None:
        if missing := wanted & ~offered:
            raise BackEndError(f"the device lacks {what} {missing:#x} of {wanted:#x}")

    def config(self, size: int) -> bytes:
        """The first bytes of the device's configuration space."""
        space = self._ask(Request.GET_CONFIG, CONFIG.pack(0, size, 0) + bytes(size))[CONFIG.size :]
        if len(space) != size:
            raise BackEndError(f"the device has {len(space)} bytes of configuration space, not {size}")
        return space

    def share(self, memory: Memory) -> None:
        """Shares guest memory with the device.

        The addresses of rings are the front end's own addresses, and those in descriptors the guest's. Any numbers do
        for the former, as long as both messages agree, so the guest's serve for both.
        """
        region = REGION.pack(memory.address, memory.size, memory.address, 0)
        self._tell(Request.SET_MEM_TABLE, struct.pack("<II", 1, 0) + region, memory.fileno())

    def start(self, ring: Ring, *, kick: HasFileno, call: HasFileno) -> None:
        """Starts queue 0, at its first chain.

        Args:
            ring: where it is in the memory that was shared.
            kick: the eventfd that the guest's notifications signal.
            call: the eventfd that the device signals.
        """
        self._tell(Request.SET_VRING_NUM, STATE.pack(0, ring.size))
        self._tell(Request.SET_VRING_BASE, STATE.pack(0, 0))
        self._tell(Request.SET_VRING_ADDR, ADDRESSES.pack(0, 0, ring.descriptors, ring.used, ring.available, 0))
        self.set_call(call)
        self._tell(Request.SET_VRING_KICK, U64.pack(0), kick.fileno())
        self._tell(Request.SET_VRING_ENABLE, STATE.pack(0, 1))

    def set_call(self, call: HasFileno) -> None:
        """Names the eventfd that the device signals, also while the queue runs."""
        self._tell(Request.SET_VRING_CALL, U64.pack(0), call.fileno())

    def _tell(self, request: Request, payload: bytes = b"", fd: int | None = None) -> None:
        """Sends a message, and waits until the device has done what it says."""
        self._send(request, payload, fd, NEEDS_REPLY)
        if self._receive(request) != U64.pack(0):
            raise BackEndError(f"the device refused {request.name}")

    def _ask(self, request: Request, payload: bytes = b"") -> bytes:
        self._send(request, payload)
        return self._receive(request)

    def _ask_u64(self, request: Request) -> int:
        return int.from_bytes(self._ask(request), "little")

    def _send(self, request: Request, payload: bytes = b"", fd: int | None = None, flags: int = 0) -> None:
        message = HEADER.pack(request, VERSION | flags, len(payload)) + payload
        if socket.send_fds(self._socket, [message], [] if fd is None else [fd]) != len(message):
            raise BackEndError(f"{request.name} was sent in part only")

    def _receive(self, request: Request) -> bytes:
        """Receives the answer to a request. None of those used here comes with descriptors."""
        kind, flags, size = HEADER.unpack(self._receive_bytes(HEADER.size, request))
        if kind != request or not flags & IS_REPLY or size > LONGEST_PAYLOAD:
            raise BackEndError(f"the device answered {request.name} with {kind}, flags {flags:#x}, {size} bytes")
        return self._receive_bytes(size, request)

    def _receive_bytes(self, size: int, request: Request) -> bytes:
        data = b""
        while len(data) < size:
            more = self._socket.recv(size - len(data))
            if not more:
                raise BackEndError(f"the device went away at {request.name}")
            data += more
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()
