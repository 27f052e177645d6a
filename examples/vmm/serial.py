"""A 16550A serial port, as much of it as a console needs (National Semiconductor, PC16550D)."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

PORT: Final = 0x3F8
IRQ: Final = 4

_ENABLE, _LINE_CONTROL, _MODEM_CONTROL = 1, 3, 4
_DIVISOR_ACCESS = 0x80
_RECEIVED, _EMPTY = 1, 2  # of the interrupt enable register


class Serial:
    """The port.

    Args:
        output: takes what the guest writes.
        set_irq: sets the level of the port's interrupt.
    """

    def __init__(self, output: Callable[[bytes], None], set_irq: Callable[[bool], None]) -> None:
        self._output, self._set_irq = output, set_irq
        self._registers = bytearray(8)
        self._divisor = bytearray(2)
        self._input: deque[int] = deque()
        self._sent = False  # the transmitter has become empty, and the guest has not been told
        self._level = False
        self._lock = threading.Lock()

    def type(self, data: bytes) -> None:
        """Gives the guest input."""
        with self._lock:
            self._input.extend(data)
            self._update()

    def read(self, offset: int, size: int) -> int:
        """Reads a register for the guest."""
        del size
        with self._lock:
            if offset < len(self._divisor) and self._registers[_LINE_CONTROL] & _DIVISOR_ACCESS:
                return self._divisor[offset]
            match offset:
                case 0:
                    value = self._input.popleft() if self._input else 0
                case 2:
                    value = 0xC0 | self._cause()
                    if value == 0xC2:
                        self._sent = False
                case 5:
                    value = 0x60 | bool(self._input)
                case 6:
                    control = self._registers[_MODEM_CONTROL]
                    loop = (control & 0xC) << 4 | (control & 2) << 3 | (control & 1) << 5  # the outputs are the inputs
                    value = loop if control & 0x10 else 0xB0  # carrier, ready, clear to send
                case _:
                    value = self._registers[offset]
            self._update()
            return value

    def write(self, offset: int, data: bytes) -> None:
        """Writes a register for the guest."""
        with self._lock:
            if offset < len(self._divisor) and self._registers[_LINE_CONTROL] & _DIVISOR_ACCESS:
                self._divisor[offset] = data[0]
                return
            match offset:
                case 0:
                    self._output(data[:1])
                    self._sent = False
                    self._update()
                    self._sent = True
                case 1:
                    self._sent |= bool(data[0] & ~self._registers[_ENABLE] & _EMPTY)
                    self._registers[_ENABLE] = data[0] & 0xF
                case 3 | 4 | 7:
                    self._registers[offset] = data[0]
            self._update()

    def save(self) -> dict[str, Any]:
        """The port, for `restore()`."""
        return {"registers": self._registers.hex(), "divisor": self._divisor.hex(), "sent": self._sent}

    def restore(self, state: dict[str, Any]) -> None:
        """Makes a new port what another one was. The level of its interrupt is in the interrupt controllers already."""
        self._registers[:], self._divisor[:] = bytes.fromhex(state["registers"]), bytes.fromhex(state["divisor"])
        self._sent = state["sent"]
        self._level = self._cause() != 1

    def _cause(self) -> int:
        enabled = self._registers[_ENABLE]
        if enabled & _RECEIVED and self._input:
            return 4
        return 2 if enabled & _EMPTY and self._sent else 1

    def _update(self) -> None:
        level = self._cause() != 1
        if level != self._level:
            self._level = level
            self._set_irq(level)
