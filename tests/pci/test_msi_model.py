"""An MSI capability against a model, for a hostile guest: any access at any offset, of any size, with any value.

`MSHV_IRQFD_MODEL` sets how many runs of how many steps, as in "2000x50".
"""

from __future__ import annotations

import functools

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule
from mshv_irqfd import MsiCapability
from msi_model import LENGTH, Model
from needs import need
from stateful import VPS, DeviceMachine, run
from support import counting

VECTORS = [1, 2, 4, 8, 32]

ADDRESSES = [0xFEE00000, 0xFEE01000, 0xFEE00000, 0xFEE05000, 0xFEE00004, 0xFEE00010, 0xFEE00003, 0]
DATA = [0x40, 0x44, 0x60, 0x152, 0x20, 0x0F, 0x341, 0xFFFF, 0]
FIELDS: list[tuple[int, int, list[int]]] = [
    (2, 2, [0, 1, 0x11, 0x21, 0x31, 0x51, 0x71, 0xFFFF, 0x10]),
    (2, 1, [0, 1, 0x21, 0xFF]),
    (4, 4, ADDRESSES),
    (8, 4, [0, 0, 0, 1]),
    (12, 2, DATA),
    (12, 4, DATA),
    (13, 1, [0, 1, 3]),
    (16, 4, [0, 0, 1, 2, 3, 0xFFFFFFFF, 0xF0]),
    (16, 1, [0, 1, 5]),
    (20, 4, [0, 0xFFFFFFFF]),
]


@st.composite
def field_writes(draw: st.DrawFn) -> tuple[int, bytes]:
    """Writes that make sense to a driver, and so get far: whole registers."""
    at, width, values = draw(st.sampled_from(FIELDS))
    return at, draw(st.sampled_from(values)).to_bytes(width, "little")


class Machine(DeviceMachine):
    device: MsiCapability

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.begin(1, 0, 0)

    @initialize(count=st.sampled_from(VECTORS), granted=st.integers(0, 5), data=st.sampled_from(DATA[:4]))
    def begin(self, count: int, granted: int, data: int) -> None:
        self.use(MsiCapability(self.guest.partition, count), Model(count, set(range(VPS))))
        self.write(4, (0xFEE00000).to_bytes(4, "little"))
        self.write(12, data.to_bytes(2, "little"))
        self.write(2, bytes([1 | granted << 4]))

    def write(self, offset: int, data: bytes) -> None:
        if self.guest.is_upset_by(dict(enumerate(data, offset)).get(13, 0)):
            return
        with counting(self.guest.partition) as made:
            self.device.write_config(offset, data)
        assert made.stats.pushes <= 1
        self.model.write(offset, data)

    @rule(write=field_writes())
    def write_a_register(self, write: tuple[int, bytes]) -> None:
        self.write(*write)

    @rule(vp=st.integers(0, VPS - 1), data=st.sampled_from(DATA[:4]))
    def set_a_message(self, vp: int, data: int) -> None:
        self.write(4, (0xFEE00000 | vp << 12).to_bytes(4, "little"))
        self.write(8, bytes(4))
        self.write(12, data.to_bytes(2, "little"))

    @rule(offset=st.integers(-4, LENGTH + 4) | st.integers(), data=st.binary(max_size=9))
    def write_anything(self, offset: int, data: bytes) -> None:
        self.write(offset, data)

    @rule(offset=st.integers(-4, LENGTH + 4) | st.integers(), width=st.integers(0, 9) | st.sampled_from([16, 2**70]))
    def read_anything(self, offset: int, width: int) -> None:
        assert self.device.read_config(offset, width) == self.model.read(offset, width)

    @invariant()
    def shows_the_same(self) -> None:
        assert self.device.capability() == self.model.shown


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["simulated", "kvm", "mshv"])
def test_after_any_accesses_a_capability_matches_the_model(name: str) -> None:
    need(name)
    run(functools.partial(Machine, name))
