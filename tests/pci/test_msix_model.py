"""A table against a model, for a hostile guest: any access at any offset, of any size, with any value.

`MSHV_IRQFD_MODEL` sets how many runs of how many steps, as in "2000x50".
"""

from __future__ import annotations

import functools

import pytest
from driver import ENTRY
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule
from mshv_irqfd import MsixTable
from msix_model import Model
from needs import need
from stateful import VPS, DeviceMachine, run
from support import counting

OPEN = 0x80
"""The upper byte of message control that enables MSI-X and clears the function mask."""

ADDRESSES = [0xFEE00000, 0xFEE01000, 0xFEE00000, 0xFEE05000, 0xFEE00004, 0xFEE00010, 0xFEE00002, 0, 0x1_FEE00000]
DATA = [0x41, 0x42, 0x43, 0x152, 0x11, 0x0F, 0x341, 0x1_0041, 0xFFFFFFFF, 0]
CONTROLS = [0, 1, 0, 1, 0xFFFFFFFE, 0xFFFFFFFF]

words = st.sampled_from([*(value & 0xFFFFFFFF for value in ADDRESSES), *DATA, *CONTROLS]) | st.integers(0, 2**32 - 1)
bytes_ = st.binary(max_size=9)


@st.composite
def entry_writes(draw: st.DrawFn) -> tuple[int, bytes]:
    """Writes that make sense to a driver, and so get far: whole fields of the first vectors."""
    vector = draw(st.integers(0, 4))
    at, size, values = draw(
        st.sampled_from(
            [
                (0, 4, ADDRESSES),
                (0, 8, ADDRESSES),
                (4, 4, [0, 0, 0, 1]),
                (8, 4, DATA),
                (8, 8, [data | control << 32 for data in DATA for control in (0, 0, 1)]),
                (12, 4, CONTROLS),
            ]
        )
    )
    value = draw(st.sampled_from(values)) & (1 << 8 * size) - 1
    return ENTRY * vector + at, value.to_bytes(size, "little")


@st.composite
def whole_entries(draw: st.DrawFn) -> list[tuple[int, bytes]]:
    """A vector masked, programmed with a good message, and unmasked."""
    vector, vp = draw(st.integers(0, 4)), draw(st.integers(0, VPS - 1))
    data = draw(st.sampled_from(DATA[:5]))
    base = ENTRY * vector
    return [
        (base + 12, b"\1\0\0\0"),
        (base, (0xFEE00000 | vp << 12).to_bytes(8, "little")),
        (base + 8, data.to_bytes(8, "little")),
    ]


class Machine(DeviceMachine):
    device: MsixTable

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.begin(1, 0)

    @initialize(count=st.sampled_from([1, 2, 5, 33, 65]), control=st.sampled_from([0, OPEN, OPEN, 0xC0]))
    def begin(self, count: int, control: int) -> None:
        self.use(MsixTable(self.guest.partition, count), Model(count, set(range(VPS))))
        self.write_control(3, bytes([control]))

    def write(self, offset: int, data: bytes) -> None:
        if any(at % ENTRY == 9 and self.guest.is_upset_by(byte) for at, byte in enumerate(data, offset)):
            return
        with counting(self.guest.partition) as made:
            self.device.write_table(offset, data)
        assert made.stats.pushes <= 1
        self.model.write_table(offset, data)

    def write_control(self, offset: int, data: bytes) -> None:
        with counting(self.guest.partition) as made:
            self.device.write_message_control(offset, data)
        assert made.stats.pushes <= 1
        self.model.write_message_control(offset, data)

    @rule(write=entry_writes())
    def write_a_field(self, write: tuple[int, bytes]) -> None:
        self.write(*write)

    @rule(writes=whole_entries())
    def program_a_vector(self, writes: list[tuple[int, bytes]]) -> None:
        for write in writes:
            self.write(*write)

    @rule(offset=st.integers(-20, 5 * ENTRY + 20) | st.integers(), data=bytes_)
    def write_anything(self, offset: int, data: bytes) -> None:
        self.write(offset, data)

    @rule(vector=st.integers(0, 4), word=st.integers(0, 3), value=words)
    def write_a_dword(self, vector: int, word: int, value: int) -> None:
        self.write(ENTRY * vector + 4 * word, value.to_bytes(4, "little"))

    @rule(
        write=st.sampled_from([(3, 1), (2, 2), (0, 4)]),
        control=st.sampled_from([0, 0x40, OPEN, OPEN, OPEN, 0xC0, 0xFF, 0xBF]),
        rest=st.integers(0, 255),
    )
    def control(self, write: tuple[int, int], control: int, rest: int) -> None:
        offset, size = write
        self.write_control(offset, bytes([rest] * (size - 1) + [control]))

    @rule(offset=st.integers(-4, 16) | st.integers(), data=bytes_)
    def control_anything(self, offset: int, data: bytes) -> None:
        self.write_control(offset, data)

    @rule(offset=st.integers(-20, 66 * ENTRY) | st.integers(), size=st.integers(0, 9) | st.sampled_from([16, 2**70]))
    def read_anything(self, offset: int, size: int) -> None:
        assert self.device.read_table(offset, size) == self.model.read_table(offset, size)
        assert self.device.read_pba(offset, size) == self.model.read_pba(offset, size)

    @invariant()
    def shows_the_same(self) -> None:
        table, model = self.device, self.model
        assert table.message_control == model.control | len(model.vectors) - 1
        for at in range(0, min(model.length, 6 * ENTRY), 8):
            assert table.read_table(at, 8) == model.read_table(at, 8)
        for at in range(0, (len(model.vectors) + 63) // 64 * 8, 8):
            assert table.read_pba(at, 8) == model.read_pba(at, 8)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["simulated", "kvm", "mshv"])
def test_after_any_accesses_a_table_matches_the_model(name: str) -> None:
    need(name)
    run(functools.partial(Machine, name))
