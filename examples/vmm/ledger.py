"""Which of the guest's accesses pushed the routing table, and why."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mshv_irqfd import Partition


class Ledger:
    """Counts the pushes of a partition by their reasons, access by access.

    A push has one good reason: the kernel's table lacks a vector's message at each GSI where the vector may be armed.
    """

    def __init__(self, partition: Partition) -> None:
        self._partition = partition
        self._lock = threading.Lock()
        self.pushes: Counter[str] = Counter()

    @contextmanager
    def access(self, kind: str) -> Iterator[None]:
        """An access of this kind, which may push."""
        with self._lock:
            before, had = self._partition.stats(), set(self._partition.routing_table())
            yield
            pushes = self._partition.stats().pushes - before.pushes
            if pushes:
                new = len(set(self._partition.routing_table()) - had)
                self.pushes[f"{kind}: {new} new" if pushes == 1 and new else f"{kind}: unexplained"] += pushes
