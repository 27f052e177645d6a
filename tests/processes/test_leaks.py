"""Leaks: partitions, routes, batches and views come and go in every way, and nothing grows with their number."""

from __future__ import annotations

import ctypes
import logging
import sys
from typing import TYPE_CHECKING

import pytest
from lives import LIVES_LED
from mshv_irqfd.testing import until
from support import collect, native_threads, open_files, refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from backends import Backend, SimulatedGuest

LIVES, STRETCHES = 30, 40
"""Partitions in a stretch, and stretches at most. The caches of threads grow in the first 15; a leak grows in each."""

LEAST = 24
"""Bytes of the smallest block of the C library's heap."""


class MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks")] + [
        (name, ctypes.c_size_t) for name in ("fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def bytes_in_use() -> int:
    """The bytes in use on the heap, which Rust shares, from mallinfo2(3)."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def measured() -> tuple[int, int]:
    collect()
    return sys.getallocatedblocks(), bytes_in_use()


@pytest.fixture
def unlogged() -> Iterator[None]:
    """Refused calls make no log records, which pytest would keep for its report."""
    logger = logging.getLogger("mshv_irqfd")
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize("live", LIVES_LED)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("unlogged")
def test_nothing_grows_with_the_number_of_partitions(backend: Backend, live: Callable[[Backend], None]) -> None:
    files, threads = open_files(), native_threads()
    grown = []
    for _ in range(STRETCHES):
        before = measured()
        for _ in range(LIVES):
            live(backend)
        collect()
        until(lambda: native_threads() <= threads, "their threads have ended")
        blocks, size = (now - then for now, then in zip(measured(), before, strict=True))
        grown.append((blocks, size))
        # Less than one for each partition.
        if blocks < LIVES and size < LIVES * LEAST and len(grown) > 1:
            break
    else:
        pytest.fail(f"{LIVES} partitions at a time, growth in (Python blocks, bytes of heap): {grown}")
    print(f"{LIVES * len(grown)} partitions; the last {LIVES} grew Python by {blocks} blocks, the heap by {size} bytes")
    assert open_files() == files


@pytest.mark.thread_unsafe(reason="counts the process's blocks")
def test_attribute_lookups_reuse_one_string(simulated: SimulatedGuest) -> None:
    # The interpreter's attribute cache keeps each name that it looks up, by its address.
    def growth(calls: int) -> int:
        before, _ = measured()
        held = []
        for number in range(calls):
            refusal(lambda: simulated.partition.new_irqfd_route(event=-1))
            # As long as "fileno": it takes the memory of a freed name, so the next name gets another address.
            held.append(f"{number:06}")
        held.clear()
        return measured()[0] - before

    growth(5)
    assert growth(500) < 50
