"""Waiting in asyncio for signals: on the running loop, without threads.

The Rust classes import this at the first wait, because it imports asyncio.

A task takes signals only after it has been resumed, and returns them before it is suspended again. So a task that is
cancelled, at whatever moment, has taken nothing: the signals are there for the next one.

Each wait has descriptors of its own, those of a watch. So nothing else on the eventfd interferes with it: not other
waits, not the caller's readers, not a close, after which another file may get the number.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol, TypeVar

from mshv_irqfd.errors import ClosedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mshv_irqfd._core import Watch

T = TypeVar("T", int, bool)


class _Watched(Protocol):
    def _watch(self) -> Watch: ...


class _Counted(_Watched, Protocol):
    def consume(self) -> int: ...


class _Armable(_Watched, Protocol):
    @property
    def pending(self) -> bool: ...


async def signals(source: _Counted) -> int:
    """Waits for signals, and takes them. Returns their number."""
    return await _until(source, source.consume)


async def pending(source: _Armable) -> None:
    """Waits until a signal is pending."""
    await _until(source, lambda: source.pending)


class Signals:
    """The asynchronous iterator over the signals of an eventfd or a doorbell."""

    __slots__ = ("_source",)

    def __init__(self, source: _Counted) -> None:
        self._source = source

    def __aiter__(self) -> Signals:
        return self

    async def __anext__(self) -> int:
        try:
            return await signals(self._source)
        except ClosedError:
            raise StopAsyncIteration from None


async def _until(source: _Watched, look: Callable[[], T]) -> T:
    """Returns what `look` finds, once it finds something. It raises `ClosedError` if the source is closed."""
    # A task that never waits, as signals come without pause, must not starve the others.
    await asyncio.sleep(0)
    found = look()
    while not found:
        # A watch ends when the eventfd is closed or replaced. Then another one begins, if `look` doesn't raise.
        with source._watch() as watch:  # noqa: SLF001 -- half of the same class
            ended = False
            # From here on nothing is missed, so look at what happened before.
            while not (found := look()) and not ended:
                ended = await _resumed(watch)
    return found


async def _resumed(watch: Watch) -> bool:
    """Waits until the eventfd may be readable, or the watch has ended. Returns whether it has ended."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[int] = loop.create_future()

    def resume(fd: int) -> None:
        # The loop may find both descriptors readable, or one again, before the task runs.
        if not future.done():
            future.set_result(fd)

    descriptors = (watch.signalled, watch.changed)
    try:
        for fd in descriptors:
            loop.add_reader(fd, resume, fd)
        return await future == watch.changed
    finally:
        # In a forked child the loop is a copy, but its epoll set is the parent's, where the wait goes on.
        if watch.is_own:
            for fd in descriptors:
                loop.remove_reader(fd)
