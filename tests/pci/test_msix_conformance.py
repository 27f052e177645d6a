"""MSI-X by the book: PCI Local Bus 3.0 section 6.8. Each test's name starts with the section of its rule.

PCI Express has the same text: 5.0 section 7.7.2 for the structures, 6.1.4 for their operation.
"""

from __future__ import annotations

import itertools
import os
import struct
from typing import TYPE_CHECKING, Any

import pytest
from driver import ADDRESS, CONTROL, DATA, ENABLE, ENTRY, FUNCTION_MASK, MASK, UPPER_ADDRESS, Driver
from mshv_irqfd import MsixTable
from support import in_child, msi

if TYPE_CHECKING:
    from collections.abc import Callable

    from backends import Guest
    from mshv_irqfd import MsixVector

ONES = 2**64 - 1
PLACES: dict[str, int] = {"table_bar": 0, "table_offset": 0, "pba_bar": 1, "pba_offset": 0}


# 6.8.2: the structures, and accesses to them


@pytest.mark.parametrize("size", [4, 8])
def test_6_8_2_aligned_dwords_and_qwords_reach_every_byte_of_the_table(guest: Guest, size: int) -> None:
    with Driver(guest, 3) as driver:
        for offset in range(0, 3 * ENTRY, size):
            driver.table.write_table(offset, struct.pack("<II", 0x01010101 * offset, 0xFFFF0001)[:size])
        for offset in range(0, 3 * ENTRY, size):
            low, high = 0x01010101 * offset & 0xFFFFFFFF, 0xFFFF0001
            if size == 4 and offset % ENTRY == CONTROL:
                low &= MASK
            if offset % ENTRY == DATA:
                high &= MASK
            assert driver.table.read_table(offset, size) == (low if size == 4 else low | high << 32)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 6, 7, 9, 16, 2**32, 2**80, -1])
def test_6_8_2_accesses_of_other_sizes_read_as_all_ones_and_write_nothing(guest: Guest, size: int) -> None:
    with Driver(guest, 2) as driver:
        before = bytes(byte for at in range(0, 2 * ENTRY, 8) for byte in driver.table.read_table(at, 8).to_bytes(8))
        ones = ONES >> max(0, 64 - 8 * size) if 0 <= size < 8 else ONES
        for offset in (0, 8, 16):
            assert driver.table.read_table(offset, size) == ones
            assert driver.table.read_pba(offset, size) == ones
            if 0 <= size < 100:
                driver.table.write_table(offset, bytes(size))
        after = bytes(byte for at in range(0, 2 * ENTRY, 8) for byte in driver.table.read_table(at, 8).to_bytes(8))
        assert after == before


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("offset", [1, 2, 3, 5, 6, 7, 9, 29, 30, 31, 32, 36, 40, 2**32, 2**63, 2**64, 2**80, -4, -8])
def test_6_8_2_accesses_off_alignment_or_outside_read_as_all_ones_and_write_nothing(
    guest: Guest, offset: int, size: int
) -> None:
    with Driver(guest, 2) as driver:
        assert driver.table.read_table(offset, size) == ONES >> 64 - 8 * size
        assert driver.table.read_pba(offset, size) == ONES >> 64 - 8 * size
        driver.table.write_table(offset, bytes(size))
        assert [driver.table.read_table(at, 8) for at in range(0, 2 * ENTRY, 8)] == [0, MASK << 32] * 2


def test_6_8_2_a_qword_at_a_dwords_place_is_out_of_alignment(guest: Guest) -> None:
    with Driver(guest, 2) as driver:
        driver.table.write_table(CONTROL, bytes(8))
        assert driver.read(0, CONTROL) == MASK
        assert driver.table.read_table(CONTROL, 8) == ONES


# 6.8.2.1 to 6.8.2.5: the capability


def test_6_8_2_1_the_id_is_11h_and_6_8_2_2_the_next_pointer_is_the_device_models(guest: Guest) -> None:
    with Driver(guest, 1) as driver:
        assert driver.table.capability(**PLACES)[:2] == bytes([0x11, 0])


@pytest.mark.parametrize("vectors", [1, 2, 64, 65, 2048])
def test_6_8_2_3_the_size_field_is_the_number_of_vectors_less_one(guest: Guest, vectors: int) -> None:
    with Driver(guest, vectors) as driver:
        assert driver.table.message_control == vectors - 1
        assert driver.table.capability(**PLACES)[2:4] == (vectors - 1).to_bytes(2, "little")


@pytest.mark.parametrize("vectors", [0, 2049, -1, 2**80])
def test_6_8_2_3_a_table_has_1_to_2048_vectors(guest: Guest, vectors: int) -> None:
    with pytest.raises(ValueError, match=rf"vectors {vectors} .* 1 to 2048"):
        MsixTable(guest.partition, vectors)


def test_6_8_2_3_size_and_reserved_bits_are_read_only(guest: Guest) -> None:
    with Driver(guest, 5) as driver:
        driver.control(0xFFFF)
        assert driver.table.message_control == ENABLE | FUNCTION_MASK | 4
        driver.control(0)
        assert driver.table.message_control == 4


def test_6_8_2_3_after_reset_msix_is_disabled_and_the_function_mask_clear(guest: Guest) -> None:
    with Driver(guest, 1) as driver:
        assert driver.table.message_control & (ENABLE | FUNCTION_MASK) == 0
        driver.control(ENABLE | FUNCTION_MASK)
        driver.table.reset()
        assert driver.table.message_control == 0


WRITES: dict[str, tuple[int, Callable[[int], bytes]]] = {
    "byte": (3, lambda control: bytes([control >> 8])),
    "word": (2, lambda control: control.to_bytes(2, "little")),
    "dword": (0, lambda control: (control << 16 | 0xFF11).to_bytes(4, "little")),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_6_8_2_3_guests_write_message_control_as_a_byte_a_word_or_a_dword(
    guest: Guest, write: tuple[int, Callable[[int], bytes]]
) -> None:
    offset, data = write
    with Driver(guest, 300) as driver:
        for control in (FUNCTION_MASK, ENABLE | FUNCTION_MASK, ENABLE, 0):
            driver.table.write_message_control(offset, data(control | 0x3FFF))
            assert driver.table.message_control == control | 299


READ_ONLY = [(0, 1), (1, 1), (2, 1), (0, 2), (4, 4), (8, 4), (12, 4), (11, 1)]
MISALIGNED = [(1, 2), (3, 2), (1, 4), (2, 4), (3, 4), (-1, 4), (2**80, 4)]
ODD_SIZES = [(0, 0), (3, 0), (0, 3), (1, 3), (0, 8), (2, 8), (0, 12)]


@pytest.mark.parametrize(("offset", "size"), [*READ_ONLY, *MISALIGNED, *ODD_SIZES])
def test_6_8_2_3_all_other_writes_to_the_capability_change_nothing(guest: Guest, offset: int, size: int) -> None:
    with Driver(guest, 2) as driver:
        for control in (0, ENABLE, FUNCTION_MASK):
            driver.control(control)
            for byte in (b"\x00", b"\xff"):
                driver.table.write_message_control(offset, byte * size)
                assert driver.table.message_control == control | 1


def test_6_8_2_4_and_6_8_2_5_bits_2_to_0_are_the_bar_and_the_rest_is_the_offset(guest: Guest) -> None:
    with Driver(guest, 2) as driver:
        capability = driver.table.capability(table_bar=2, table_offset=0x1000, pba_bar=5, pba_offset=0xFFFFFFF8)
        assert capability[4:] == struct.pack("<II", 0x1002, 0xFFFFFFFD)
        assert len(capability) == 12


@pytest.mark.parametrize(
    ("place", "value", "rule"),
    [("table_bar", value, "0 to 5") for value in (6, 7, 8, -1, 2**80)]
    + [("pba_bar", value, "0 to 5") for value in (6, -1)]
    + [("table_offset", value, "multiples? of 8") for value in (1, 4, 0x1004, -8)]
    + [("pba_offset", value, "multiples? of 8") for value in (4, 2**80)]
    + [("table_offset", 2**32 - 8, "4 GiB"), ("pba_offset", 2**32, "4 GiB")],
)
def test_6_8_2_4_and_6_8_2_5_other_places_are_refused(guest: Guest, place: str, value: int, rule: str) -> None:
    with Driver(guest, 2) as driver, pytest.raises(ValueError, match=rf"{place} .*{rule}"):
        driver.table.capability(**PLACES | {place: value})


def test_6_8_2_4_and_6_8_2_5_the_structures_do_not_overlap(guest: Guest) -> None:
    with Driver(guest, 8) as driver:
        for offset in (0, 8, 0x78):
            with pytest.raises(ValueError, match="over the table"):
                driver.table.capability(table_bar=0, table_offset=0, pba_bar=0, pba_offset=offset)
        driver.table.capability(table_bar=0, table_offset=0, pba_bar=0, pba_offset=0x80)
        driver.table.capability(table_bar=0, table_offset=8, pba_bar=0, pba_offset=0)


# 6.8.2.6 to 6.8.2.9: an entry


def test_6_8_2_6_to_6_8_2_8_address_and_data_read_back_as_written(guest: Guest) -> None:
    with Driver(guest, 2) as driver:
        for field, value in ((ADDRESS, 0xFEE12344), (UPPER_ADDRESS, 0x12345678), (DATA, 0x89ABCDEF)):
            driver.write(1, field, value)
            assert driver.read(1, field) == value
        assert [driver.read(0, field) for field in (ADDRESS, UPPER_ADDRESS, DATA, CONTROL)] == [0, 0, 0, MASK]


def test_6_8_2_9_after_reset_every_vector_is_masked(guest: Guest) -> None:
    with Driver(guest, 3) as driver:
        assert [driver.read(vector, CONTROL) for vector in range(3)] == [MASK] * 3
        assert all(vector.masked for vector in driver.table.vectors)
        driver.bring_up(msi(0x41), msi(0x42), msi(0x43))
        driver.table.reset()
        assert [driver.read(vector, CONTROL) for vector in range(3)] == [MASK] * 3
        assert driver.armed() == set()


def test_6_8_2_9_reserved_bits_of_vector_control_are_0_whatever_is_written(guest: Guest) -> None:
    with Driver(guest, 1) as driver:
        for written, read in ((0xFFFFFFFE, 0), (0xFFFFFFFF, MASK)):
            driver.write(0, CONTROL, written)
            assert driver.read(0, CONTROL) == read


# 6.8.2.10: the pending bits


def test_6_8_2_10_a_pending_bit_for_each_vector_64_in_a_qword(guest: Guest) -> None:
    with Driver(guest, 130) as driver:
        for vector in (0, 31, 32, 63, 64, 127, 128, 129):
            driver[vector].signal()
        qwords = [driver.table.read_pba(offset, 8) for offset in (0, 8, 16)]
        assert qwords == [1 | 1 << 31 | 1 << 32 | 1 << 63, 1 | 1 << 63, 0b11]
        dwords = [driver.table.read_pba(offset, 4) for offset in range(0, 24, 4)]
        assert dwords == [half for qword in qwords for half in (qword & 0xFFFFFFFF, qword >> 32)]
        assert driver.table.read_pba(24, 8) == ONES


def test_6_8_2_10_after_reset_no_pending_bit_is_set(guest: Guest) -> None:
    with Driver(guest, 2) as driver:
        event = driver[1].event
        driver[0].signal()
        event.signal()
        assert driver.pending_bits() == {0, 1}
        driver.table.reset()
        assert driver.pending_bits() == set()
        driver.bring_up(msi(0x41), msi(0x42))
        guest.receives_nothing()


# 6.8.3: operation


def test_6_8_3_3_nothing_is_sent_before_msix_is_enabled(guest: Guest) -> None:
    with Driver(guest, 1) as driver:
        driver.program(0, msi(0x41))
        driver[0].signal()
        guest.receives_nothing()
        assert driver.armed() == set()
        driver.enable()
        guest.receives(msi(0x41))


def test_6_8_3_3_nothing_is_sent_after_msix_is_disabled(guest: Guest) -> None:
    with Driver(guest, 2) as driver:
        driver.bring_up(msi(0x41), msi(0x42))
        driver.control(0)
        driver[0].signal()
        guest.receives_nothing()
        assert driver.armed() == set()
        assert driver[0].consume_pending()


def test_6_8_3_4_each_vector_sends_its_own_message(guest: Guest) -> None:
    messages = [msi(0x41 + number) for number in range(5)]
    with Driver(guest, 5) as driver:
        driver.bring_up(*messages)
        for vector, message in zip(driver.table.vectors, messages, strict=True):
            vector.signal()
            guest.receives(message)


def test_6_8_3_4_vectors_may_share_a_message(guest: Guest) -> None:
    with Driver(guest, 2) as driver:
        driver.bring_up(msi(0x41), msi(0x41))
        for vector in driver.table.vectors:
            vector.signal()
            guest.receives(msi(0x41))


def test_6_8_3_5_a_masked_vector_is_pending_and_sends_its_message_once_when_it_is_unmasked(guest: Guest) -> None:
    with Driver(guest, 2) as driver:
        driver.bring_up(msi(0x41), msi(0x42))
        driver.mask(0)
        for _ in range(3):
            driver[0].signal()
        guest.receives_nothing()
        assert driver.pending_bits() == {0}
        driver[1].signal()
        guest.receives(msi(0x42))
        driver.unmask(0)
        guest.receives(msi(0x41))
        assert driver.pending_bits() == set()


def test_6_8_3_5_the_function_mask_masks_all_vectors_and_leaves_their_mask_bits(guest: Guest) -> None:
    with Driver(guest, 3) as driver:
        driver.bring_up(msi(0x41), msi(0x42), msi(0x43))
        driver.mask(2)
        driver.control(ENABLE | FUNCTION_MASK)
        assert all(vector.masked for vector in driver.table.vectors)
        assert [driver.read(vector, CONTROL) for vector in range(3)] == [0, 0, MASK]
        for vector in driver.table.vectors:
            vector.signal()
        guest.receives_nothing()
        assert driver.pending_bits() == {0, 1, 2}
        driver.control(ENABLE)
        assert [vector.masked for vector in driver.table.vectors] == [False, False, True]
        guest.receives(msi(0x41), msi(0x42))
        assert driver.pending_bits() == {2}
        driver.unmask(2)
        guest.receives(msi(0x43))


def test_6_8_3_5_a_vector_unmasked_under_the_function_mask_stays_masked(guest: Guest) -> None:
    with Driver(guest, 1) as driver:
        driver.control(ENABLE | FUNCTION_MASK)
        driver.program(0, msi(0x41))
        driver[0].signal()
        guest.receives_nothing()
        assert (driver[0].masked, driver.pending_bits()) == (True, {0})
        driver.mask(0)
        driver.control(ENABLE)
        guest.receives_nothing()
        assert (driver[0].masked, driver.pending_bits()) == (True, {0})
        driver.unmask(0)
        guest.receives(msi(0x41))


def test_6_8_3_5_a_pending_bit_is_cleared_when_the_cause_has_gone(guest: Guest) -> None:
    with Driver(guest, 1) as driver:
        driver.bring_up(msi(0x41))
        driver.mask(0)
        driver[0].signal()
        assert driver[0].pending
        assert driver[0].consume_pending()
        assert not driver[0].pending
        assert not driver[0].consume_pending()
        driver.unmask(0)
        guest.receives_nothing()


def reprogram_by_its_own_bit(driver: Driver) -> None:
    driver.retarget(0, msi(0x52))


def reprogram_by_the_function_mask(driver: Driver) -> None:
    driver.control(ENABLE | FUNCTION_MASK)
    driver.set_message(0, msi(0x52))
    driver.control(ENABLE)


def reprogram_by_disabling(driver: Driver) -> None:
    driver.control(0)
    driver.set_message(0, msi(0x52))
    driver.control(ENABLE)


REPROGRAMMINGS: dict[str, Callable[[Driver], None]] = {
    "own bit": reprogram_by_its_own_bit,
    "function mask": reprogram_by_the_function_mask,
    "enable": reprogram_by_disabling,
}
reprogrammings = pytest.mark.parametrize("reprogram", REPROGRAMMINGS.values(), ids=REPROGRAMMINGS)


@reprogrammings
def test_6_8_3_5_unmasking_takes_the_entrys_new_message(guest: Guest, reprogram: Callable[[Driver], None]) -> None:
    with Driver(guest, 1) as driver:
        driver.bring_up(msi(0x41))
        reprogram(driver)
        driver[0].signal()
        guest.receives(msi(0x52))


@reprogrammings
def test_6_8_3_5_a_message_written_to_an_unmasked_entry_waits_for_the_next_unmasking(
    guest: Guest, reprogram: Callable[[Driver], None]
) -> None:
    with Driver(guest, 1) as driver:
        driver.bring_up(msi(0x41))
        for field, value, size in ((DATA, 0x47, 4), (ADDRESS, 0, 4), (DATA, 0x48, 8), (CONTROL, 0, 4)):
            driver.write(0, field, value, size)
            driver[0].signal()
            guest.receives(msi(0x41))
        assert (driver.read(0, ADDRESS), driver.read(0, DATA)) == (0, 0x48)
        assert driver.faulty() == set()
        reprogram(driver)
        driver[0].signal()
        guest.receives(msi(0x52))


def test_6_8_3_5_a_qword_that_sets_data_and_clears_the_mask_takes_effect_as_a_whole(guest: Guest) -> None:
    with Driver(guest, 1) as driver:
        driver.bring_up(msi(0x41))
        driver.mask(0)
        driver[0].signal()
        driver.write(0, DATA, 0x52, size=8)
        guest.receives(msi(0x52))


# Pending bits, whoever signals, in every combination of vector mask, function mask and enable


def by_the_device(vector: MsixVector) -> None:
    vector.signal()


def by_its_event(vector: MsixVector) -> None:
    vector.event.signal()


def by_a_bare_write(vector: MsixVector) -> None:
    os.eventfd_write(vector.event.fileno(), 1)


def by_another_process(vector: MsixVector) -> None:
    fd = vector.event.fileno()
    in_child(lambda: os.eventfd_write(fd, 1))


SIGNALLERS: dict[str, Any] = {
    signal.__name__: signal for signal in (by_the_device, by_its_event, by_a_bare_write, by_another_process)
}
STATES = list(itertools.product([0, MASK], [0, FUNCTION_MASK], [0, ENABLE]))


@pytest.mark.parametrize("signal", SIGNALLERS.values(), ids=SIGNALLERS)
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_6_8_3_5_pending_bits_tell_the_truth_in_every_state_whoever_signals(
    guest: Guest, signal: Callable[[MsixVector], None], used: bool
) -> None:
    for number, (mask, function_mask, enable) in enumerate(STATES):
        message = msi(0x41 + number)
        with Driver(guest, 2) as driver:
            if used:
                driver.bring_up(message)
            driver.control(enable | function_mask)
            driver.set_message(0, message)
            driver.write(0, CONTROL, mask)
            signal(driver[0])
            if (mask, function_mask, enable) == (0, 0, ENABLE):
                guest.receives(message)
                assert driver.pending_bits() == set()
                assert not driver[0].pending
                continue
            guest.receives_nothing()
            assert driver.pending_bits() == {0}
            assert driver[0].pending
            driver.unmask(0)
            driver.control(ENABLE)
            guest.receives(message)
            assert driver.pending_bits() == set()
