"""QEMU's ivshmem-doorbell device raises our routes, and our signals and our guest's doorbells interrupt it.

QEMU's own registers show what arrived there: pending bits, and the messages that it writes to its memory.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from itertools import cycle
from typing import TYPE_CHECKING

import pytest
from ivshmem import MAILBOX, PROGRAM, SHARED, Ivshmem
from mshv_irqfd import EventFd
from mshv_irqfd.testing import until
from needs import need_program
from support import msi

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from backends import Guest
    from mshv_irqfd import IrqFdRoute

VECTORS = 4
DOORBELL = 0xD0000000
MESSAGES = [msi(0x41 + vector, vector % 2) for vector in range(VECTORS)]
DATA = 0x4000
"""The data of QEMU's messages, plus the vector."""


class Pair:
    """A guest of ours and QEMU, and the eventfds between them."""

    def __init__(self, guest: Guest, program: str, stack: ExitStack) -> None:
        self.guest = guest
        self.routes: list[IrqFdRoute] = []
        for message in MESSAGES:
            self.routes.append(stack.enter_context(guest.partition.new_irqfd_route()))
            self.routes[-1].set_msi(message)
        self.theirs = [stack.enter_context(EventFd()) for _ in range(VECTORS)]
        self.qemu = stack.enter_context(Ivshmem(program, self.routes, self.theirs))
        for vector in range(VECTORS):
            self.qemu.set_data(vector, DATA + vector)

    def arrives(self, vector: int) -> None:
        """Waits until QEMU has sent the message of a vector."""
        until(lambda: self.qemu.sent(vector) == DATA + vector, f"QEMU has sent the message of its vector {vector}")


@pytest.fixture
def ivshmem(open_guest: Callable[..., Guest]) -> Iterator[Pair]:
    program = need_program(PROGRAM)
    guest = open_guest(vps=2)
    with ExitStack() as stack:
        yield Pair(guest, program, stack)


def test_its_doorbell_raises_the_route_of_each_vector(ivshmem: Pair) -> None:
    for _ in range(50):
        for vector, message in enumerate(MESSAGES):
            ivshmem.qemu.ring(vector)
            ivshmem.guest.gets(message)


def test_while_a_route_is_masked_its_rings_wait_and_become_one_interrupt(ivshmem: Pair) -> None:
    route = ivshmem.routes[1]
    route.mask()
    for _ in range(3):
        ivshmem.qemu.ring(1)
    ivshmem.guest.receives_nothing()
    assert route.pending
    ivshmem.qemu.ring(2)
    ivshmem.guest.gets(MESSAGES[2])
    route.unmask()
    ivshmem.guest.receives(MESSAGES[1])
    ivshmem.qemu.ring(1)
    ivshmem.guest.gets(MESSAGES[1])


def test_its_rings_follow_a_route_to_each_message(ivshmem: Pair) -> None:
    messages = cycle(msi(vector, apic_id) for vector in range(0x51, 0x56) for apic_id in (0, 1))
    for _ in range(50):
        message = next(messages)
        ivshmem.routes[3].set_msi(message)
        ivshmem.qemu.ring(3)
        ivshmem.guest.gets(message)


def test_our_signals_interrupt_it_and_wait_in_its_pending_bits_while_masked(ivshmem: Pair) -> None:
    qemu = ivshmem.qemu
    ivshmem.theirs[2].signal()
    until(lambda: qemu.pending() == {2}, "QEMU's vector 2 is pending")
    assert qemu.sent(2) == 0
    qemu.mask(2, masked=False)
    assert (qemu.sent(2), qemu.pending()) == (DATA + 2, set())
    for _ in range(20):
        ivshmem.theirs[2].signal()
        ivshmem.arrives(2)
    assert [qemu.sent(vector) for vector in range(VECTORS)] == [0] * VECTORS


def test_two_machines_interrupt_each_other_with_nothing_of_ours_between(ivshmem: Pair) -> None:
    guest, qemu = ivshmem.guest, ivshmem.qemu
    for vector in range(VECTORS):
        qemu.mask(vector, masked=False)
    with ExitStack() as stack:
        for vector, event in enumerate(ivshmem.theirs):
            stack.enter_context(guest.partition.ioeventfd(DOORBELL, 4, datamatch=vector, event=event))
        for turn in range(40):
            vector = turn % VECTORS
            assert guest.writes(DOORBELL, vector.to_bytes(4, "little"))
            ivshmem.arrives(vector)
            qemu.ring(vector)
            guest.gets(MESSAGES[vector])
    # Without the doorbells nothing arrives.
    assert not guest.writes(DOORBELL, bytes(4))
    assert [qemu.sent(vector) for vector in range(VECTORS)] == [0] * VECTORS


def test_what_a_killed_qemu_signalled_waits_and_the_next_one_raises_the_same_routes(ivshmem: Pair) -> None:
    ivshmem.routes[0].mask()
    ivshmem.qemu.ring(0)
    ivshmem.qemu.close()
    ivshmem.guest.receives_nothing()
    ivshmem.routes[0].unmask()
    ivshmem.guest.receives(MESSAGES[0])
    with Ivshmem(need_program(PROGRAM), ivshmem.routes, ivshmem.theirs) as another:
        for vector, message in enumerate(MESSAGES):
            another.ring(vector)
            ivshmem.guest.gets(message)


def test_memory_is_shared(ivshmem: Pair) -> None:
    ivshmem.qemu.write(SHARED + 0x100, 0x12345678)
    assert os.pread(ivshmem.qemu.memory, 4, 0x100) == (0x12345678).to_bytes(4, "little")
    os.pwrite(ivshmem.qemu.memory, b"abcd", 0x200)
    assert ivshmem.qemu.read(SHARED + 0x200) == int.from_bytes(b"abcd", "little")
    assert ivshmem.qemu.read(MAILBOX) == 0
