"""The probe's count of torn signals: those that overlap a push and raise an interrupt that is in no table."""

from __future__ import annotations

import errno
import os
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING

from mshv_irqfd._cli import progress
from mshv_irqfd._cli.probe.finding import UNSEEN, Finding
from mshv_irqfd._cli.probe.scene import GSI, MSI, RECORD, VECTOR, Scene

if TYPE_CHECKING:
    from argparse import Namespace

SLICE = 0.5
"""Seconds between two looks for Ctrl-C."""


class Torn(threading.Thread):
    """A thread that counts the interrupts whose vector is not the routed one."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self.count = 0
        self.overflowed = False
        self._scene = scene
        self._stop_asked = threading.Event()

    def run(self) -> None:
        """Counts until `stop()` is called."""
        while not self._stop_asked.is_set():
            self._look()

    def stop(self) -> int:
        """Ends the thread, reads the remaining interrupts, and returns the count."""
        self._stop_asked.set()
        self.join()
        self._look()
        return self.count

    def _look(self) -> None:
        if self._scene.observer is None:
            arrived = self._scene.arrived() or []
            self.count += sum(not interrupt.startswith(f"{VECTOR:#04x}") for interrupt in arrived)
            return
        while True:
            try:
                data = os.read(self._scene.observer, RECORD.size * 1024)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.EOVERFLOW:
                    raise
                self.overflowed = True
                continue
            # Nearly always all records are equal: a comparison of bytes is enough, and fast.
            if RECORD.unpack_from(data)[3] == VECTOR and data == data[: RECORD.size] * (len(data) // RECORD.size):
                continue
            self.count += sum(vector != VECTOR for _, _, _, vector, _ in RECORD.iter_unpack(data))


def count_torn(options: Namespace, device: str, findings: list[Finding], *, quiesce: bool) -> None:
    """Signals during pushes, with or without quiescing, and counts the signals that raise another interrupt.

    Adds what it found to `findings`, also if Ctrl-C ends it.
    """
    seconds: float = options.torn_pushes
    pushes = signals = 0
    with closing(Scene(options, device)) as scene:
        torn = Torn(scene)
        event = scene.armed()
        seen = not scene.mshv or scene.observer is not None
        torn.start()
        end = time.monotonic() + seconds
        try:
            while (left := end - time.monotonic()) > 0:
                progress.show(f"counting torn signals{', quiesced' if quiesce else ''}: {left:.0f} s left")
                more = scene.partition.push_while_signalling([MSI], event, GSI, quiesce, min(left, SLICE))
                pushes, signals = pushes + more[0], signals + more[1]
        finally:
            count = torn.stop()
            done = f"signals while another thread pushes an unchanged table{', quiesced' if quiesce else ''}"
            found = f"{count} torn in {pushes} pushes and {signals} signals" if seen else UNSEEN
            if torn.overflowed:
                found += "; the observer overflowed, so there may be more"
            # Without quiescing the count depends on timing and cannot fail. It shows why mshv is quiesced by default.
            expected = "none torn" if quiesce or not scene.mshv else "some torn"
            findings.append(Finding(done, expected, found, differs=expected == "none torn" and seen and count > 0))
