"""The stand-in hypervisor itself, by bare ioctls: its records, its counters, and its faults."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

import hvstub
import pytest
from hvstub import Asserted, HvStub, Hypercall, Outcome, Scheduler, Status, kernel_allocation_fails, partition_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(not hvstub.AVAILABLE, reason=hvstub.UNAVAILABLE)

RECORDS = 1 << 17  # lab/hvstub.c


def _iow(number: int, size: int) -> int:
    return 1 << 30 | size << 16 | 0xB8 << 8 | number


CREATE_PARTITION, INITIALIZE, CREATE_VP = _iow(0, 16), 0xB800, _iow(1, 4)
IRQFD, IOEVENTFD, SET_MSI_ROUTING = _iow(3, 16), _iow(4, 32), _iow(5, 8)
ROOT_HVCALL = 3 << 30 | 32 << 16 | 0xB8 << 8 | 7
DEASSIGN = 1


class Partition:
    """An mshv partition by its ioctls; VPs are kept open until it closes."""

    def __init__(self, vps: int = 0, *, initialize: bool = True) -> None:
        device = os.open("/dev/mshv", os.O_RDWR | os.O_CLOEXEC)
        try:
            self.fd = fcntl.ioctl(device, CREATE_PARTITION, bytearray(struct.pack("<QQ", 3, 0)), True)
        finally:
            os.close(device)
        self.vps: list[int] = []
        try:
            if initialize:
                self.initialize()
            for index in range(vps):
                self.create_vp(index)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for fd in (*self.vps, self.fd):
            os.close(fd)

    @property
    def id(self) -> int:
        return partition_id(self.fd)

    def initialize(self) -> None:
        fcntl.ioctl(self.fd, INITIALIZE, 0)

    def create_vp(self, index: int) -> None:
        self.vps.append(fcntl.ioctl(self.fd, CREATE_VP, bytearray(struct.pack("<I", index)), True))

    def push(self, *entries: tuple[int, int, int]) -> None:
        """Entries are (gsi, address, data)."""
        table = struct.pack("<II", len(entries), 0) + b"".join(
            struct.pack("<IIII", gsi, address, 0, data) for gsi, address, data in entries
        )
        fcntl.ioctl(self.fd, SET_MSI_ROUTING, bytearray(table), True)

    def arm(self, event: int, gsi: int) -> None:
        fcntl.ioctl(self.fd, IRQFD, struct.pack("<iiII", event, 0, gsi, 0))

    def disarm(self, event: int, gsi: int) -> None:
        fcntl.ioctl(self.fd, IRQFD, struct.pack("<iiII", event, 0, gsi, DEASSIGN))

    def ioeventfd(
        self, event: int, gpa: int, *, size: int = 4, value: int | None = None, deassign: bool = False
    ) -> None:
        flags = (value is not None) | deassign << 2
        fcntl.ioctl(self.fd, IOEVENTFD, struct.pack("<QQIiI4x", value or 0, gpa, size, event, flags))


def msi(apic_id: int = 0) -> int:
    return 0xFEE00000 | apic_id << 12


def eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def signalled(event: int) -> int:
    try:
        return os.eventfd_read(event)
    except BlockingIOError:
        return 0


@pytest.fixture
def stub() -> Iterator[HvStub]:
    with HvStub() as stub:
        yield stub


@contextmanager
def leaving_nothing(stub: HvStub) -> Iterator[None]:
    """Asserts that the stand-in's counters are the same before and after."""
    before = stub.counters().held
    yield
    assert stub.counters().held == before


def by_assertion(stub: HvStub) -> None:
    """On the root scheduler the driver puts fixed, physically addressed vectors into register pages instead."""
    if stub.scheduler is Scheduler.ROOT:
        pytest.skip("the root scheduler's fast path asserts nothing: run under lab/run --scheduler core")


def test_an_interrupt_is_recorded_as_the_driver_asked_for_it(stub: HvStub) -> None:
    by_assertion(stub)
    event = eventfd()
    with Partition(vps=1) as partition:
        me = partition.id
        for address, data, expected in (
            (msi(3), 0x41, Asserted(me, 0x41, 3, 0, False, False)),
            (msi(3) | 4, 0x42, Asserted(me, 0x42, 3, 0, True, False)),
            (msi(0xFE), 0x8143, Asserted(me, 0x43, 0xFE, 1, False, True)),
            (msi(0), 0x400, Asserted(me, 0, 0, 4, False, False)),
        ):
            partition.push((24, address, data))
            partition.arm(event, 24)
            os.eventfd_write(event, 1)
            partition.disarm(event, 24)
            assert stub.take() == [expected]
    os.close(event)


def test_interrupts_are_recorded_in_order_and_none_twice(stub: HvStub) -> None:
    by_assertion(stub)
    events = [eventfd() for _ in range(100)]
    with Partition(vps=1) as partition:
        partition.push(*((24 + i, msi(), 0x30 + i) for i in range(100)))
        for i, event in enumerate(events):
            partition.arm(event, 24 + i)
        for _ in range(20):
            for event in events:
                os.eventfd_write(event, 1)
        assert [asserted.vector for asserted in stub.take()] == [0x30 + i for i in range(100)] * 20
        assert stub.take() == []
    for event in events:
        os.close(event)


def test_taking_waits_for_an_interrupt_that_comes_later(stub: HvStub) -> None:
    by_assertion(stub)
    event = eventfd()
    with Partition(vps=1) as partition:
        partition.push((24, msi(), 0x41))
        partition.arm(event, 24)
        later = threading.Timer(0.2, os.eventfd_write, (event, 1))
        later.start()
        assert [asserted.vector for asserted in stub.take(timeout=30)] == [0x41]
        later.join()
    os.close(event)


def test_interrupts_of_two_partitions_are_told_apart(stub: HvStub) -> None:
    by_assertion(stub)
    events = [eventfd(), eventfd()]
    with Partition(vps=1) as one, Partition(vps=1) as two:
        for partition, event, vector in zip((one, two), events, (0x41, 0x42), strict=True):
            partition.push((24, msi(), vector))
            partition.arm(event, 24)
            os.eventfd_write(event, 1)
        assert [(taken.partition_id, taken.vector) for taken in stub.take()] == [(one.id, 0x41), (two.id, 0x42)]
    for event in events:
        os.close(event)


def test_an_overflow_is_reported_once_and_recording_continues(stub: HvStub) -> None:
    by_assertion(stub)
    event, surplus = eventfd(), 10
    lost = stub.counters().lost
    with Partition(vps=1) as partition:
        partition.push((24, msi(), 0x41))
        partition.arm(event, 24)
        for _ in range(RECORDS + surplus):
            os.eventfd_write(event, 1)
        assert stub.counters().lost - lost == surplus
        with pytest.raises(hvstub.InterruptsLostError, match=f"lost after {RECORDS} more") as lost_some:
            stub.take()
        assert len(lost_some.value.taken) == RECORDS
        os.eventfd_write(event, 1)
        assert len(stub.take()) == 1
    os.close(event)


def test_a_thousand_partitions_with_vps_leave_nothing(stub: HvStub) -> None:
    event = eventfd()

    def live() -> None:
        with Partition(vps=2) as partition:
            partition.push((24, msi(), 0x41))
            partition.arm(event, 24)
            partition.ioeventfd(event, 0xD0000000)

    live()  # deposits the root pages that one partition needs
    before = stub.counters()
    for _ in range(1000):
        live()
    after = stub.counters()
    assert (after.held, after.root_pages) == (before.held, before.root_pages)
    os.close(event)


def test_many_partitions_at_once_are_kept_apart_and_leave_nothing(stub: HvStub) -> None:
    with leaving_nothing(stub):
        partitions = [Partition(vps=3) for _ in range(50)]
        assert len({partition.id for partition in partitions}) == 50
        now = stub.counters()
        assert (now.partitions, now.vps) == (50, 150)
        for partition in partitions:
            partition.close()


def test_the_driver_frees_the_kernels_memory_with_each_partition() -> None:
    def pages(field: str) -> int:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields[field].split()[0]) // 4

    def use() -> None:
        for _ in range(50):
            Partition(vps=4).close()

    use()
    free, slab = pages("MemFree"), pages("SUnreclaim")
    for _ in range(4):
        use()
    # 200 partitions hold 570 deposited pages each, and some 300 pages of the driver's own objects together.
    # Free pages that wait in the CPUs' own lists are not counted as free: a noise of thousands.
    assert free - pages("MemFree") < 200 * 100
    assert pages("SUnreclaim") - slab < 100


def hold_one_partition() -> None:
    Partition(vps=1).close()


@pytest.mark.parametrize(
    "code",
    [
        Hypercall.CREATE_PARTITION, Hypercall.INITIALIZE_PARTITION, Hypercall.CREATE_VP, Hypercall.DEPOSIT_MEMORY,
        Hypercall.MAP_VP_STATE_PAGE, Hypercall.MAP_STATS_PAGE,
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (Status.OPERATION_FAILED, errno.EIO),
        (Status.ACCESS_DENIED, errno.EACCES),
        (Status.INVALID_PARTITION_STATE, errno.EIO),
    ],
)
def test_each_hypercall_of_creation_that_fails_is_reported_and_leaves_nothing(
    stub: HvStub, code: Hypercall, status: Status, expected: int
) -> None:
    hold_one_partition()
    for nth in range(1, 100):
        outcome, error = Outcome(), None
        with leaving_nothing(stub):
            try:
                with stub.failing(code, status, nth) as outcome:
                    hold_one_partition()
            except OSError as raised:
                error = raised.errno
        assert error == (expected if outcome.injected else None), f"{code.name} number {nth}"
        hold_one_partition()
        if not outcome.injected:
            assert nth > 1, f"{code.name} is not called at all"
            return
    pytest.fail("the hypercalls never end")


def test_memory_that_the_hypervisor_asks_for_is_deposited(stub: HvStub) -> None:
    hold_one_partition()
    for code in (
        Hypercall.CREATE_PARTITION,
        Hypercall.INITIALIZE_PARTITION,
        Hypercall.CREATE_VP,
        Hypercall.MAP_STATS_PAGE,
    ):
        with leaving_nothing(stub), stub.failing(code, Status.INSUFFICIENT_MEMORY) as outcome:
            hold_one_partition()
        assert outcome.injected


@pytest.mark.parametrize("code", [Hypercall.CREATE_PORT, Hypercall.CONNECT_PORT])
def test_a_doorbell_that_fails_is_reported_and_leaves_nothing(stub: HvStub, code: Hypercall) -> None:
    event = eventfd()
    with Partition() as partition, leaving_nothing(stub):
        with pytest.raises(OSError, match="Input/output error"), stub.failing(code):
            partition.ioeventfd(event, 0xD0000000)
        assert stub.fire_doorbell(partition.id, 0xD0000000) == 0
        partition.ioeventfd(event, 0xD0000000)
        assert stub.fire_doorbell(partition.id, 0xD0000000) == 1
        partition.ioeventfd(event, 0xD0000000, deassign=True)
    os.close(event)


def test_a_fault_fails_the_nth_hypercall_once_and_counts_the_others(stub: HvStub) -> None:
    with Partition() as partition:
        stub.fail(Hypercall.CREATE_VP, Status.ACCESS_DENIED, nth=3)
        partition.create_vp(0)
        partition.create_vp(1)
        assert (stub.fault().seen, stub.fault().injected) == (2, False)
        with pytest.raises(PermissionError):
            partition.create_vp(2)
        assert (stub.fault().seen, stub.fault().injected) == (3, True)
        partition.create_vp(2)


def test_a_fault_ends_when_the_file_that_set_it_is_closed() -> None:
    with Partition() as partition:
        with HvStub() as stub:
            stub.fail(hvstub.ANY)
        partition.create_vp(0)


def test_a_refused_assertion_is_recorded_with_its_status(stub: HvStub) -> None:
    """The driver ignores the status, so the signal is lost without an error."""
    by_assertion(stub)
    event = eventfd()
    with Partition(vps=1) as partition:
        partition.push((24, msi(), 0x41))
        partition.arm(event, 24)
        with stub.failing(Hypercall.ASSERT_VIRTUAL_INTERRUPT, Status.NO_RESOURCES):
            os.eventfd_write(event, 1)
        assert stub.take() == [Asserted(partition.id, 0x41, 0, 0, False, False, Status.NO_RESOURCES)]
        assert signalled(event) == 0
    os.close(event)


def test_a_doorbell_rings_only_for_its_own_writes(stub: HvStub) -> None:
    by_size, by_value, by_any = eventfd(), eventfd(), eventfd()
    with Partition() as partition, Partition() as other:
        partition.ioeventfd(by_size, 0xD0000000, size=4)
        partition.ioeventfd(by_value, 0xD0000010, size=2, value=7)
        partition.ioeventfd(by_any, 0xD0000020, size=0)
        for gpa, value, size, rung in (
            (0xD0000000, 1, 4, by_size),
            (0xD0000000, 1, 2, None),
            (0xD0000010, 7, 2, by_value),
            (0xD0000010, 8, 2, None),
            (0xD0000020, 9, 1, by_any),
            (0xD0000020, 9, 8, by_any),
            (0xD0000030, 1, 4, None),
        ):
            assert stub.fire_doorbell(partition.id, gpa, value, size) == (rung is not None)
            assert [signalled(event) for event in (by_size, by_value, by_any)] == [
                event == rung for event in (by_size, by_value, by_any)
            ]
            assert stub.fire_doorbell(other.id, gpa, value, size) == 0
        for _ in range(500):  # more often than the event ring has slots
            assert stub.fire_doorbell(partition.id, 0xD0000000) == 1
        assert signalled(by_size) == 500
    for event in (by_size, by_value, by_any):
        os.close(event)


def test_a_doorbell_reaches_an_irqfd_on_the_same_eventfd(stub: HvStub) -> None:
    by_assertion(stub)
    event = eventfd()
    with Partition(vps=1) as partition:
        partition.push((24, msi(), 0x41))
        partition.arm(event, 24)
        partition.ioeventfd(event, 0xD0000000)
        stub.fire_doorbell(partition.id, 0xD0000000)
        assert [asserted.vector for asserted in stub.take()] == [0x41]
    os.close(event)


def test_ids_that_do_not_exist_are_refused(stub: HvStub) -> None:
    with Partition(initialize=False) as partition:
        with pytest.raises(OSError, match="Input/output error"):  # HV_STATUS_INVALID_PARTITION_STATE
            partition.create_vp(0)
        partition.initialize()
        partition.create_vp(0)
        with pytest.raises(FileExistsError):  # the driver refuses it without a hypercall
            partition.create_vp(0)
        with pytest.raises(FileNotFoundError):
            stub.registers(partition.id, 1)
        with pytest.raises(OSError, match="Invalid argument"):
            get_registers(partition.fd, vp_index=1)
        get_registers(partition.fd, vp_index=0)
    with pytest.raises(FileNotFoundError):
        stub.registers(1 << 40, 0)


def get_registers(fd: int, vp_index: int) -> None:
    """HVCALL_GET_VP_REGISTERS of one register, by the driver's passthrough."""
    given = ctypes.create_string_buffer(struct.pack("=QIIII", 0, vp_index, 0, 0, 0))
    found = ctypes.create_string_buffer(16)
    call = struct.pack(
        "=HHHHH6xQQ", Hypercall.GET_VP_REGISTERS, 1, 24, 16, 0, ctypes.addressof(given), ctypes.addressof(found)
    )
    fcntl.ioctl(fd, ROOT_HVCALL, bytearray(call), True)


def test_the_vectors_of_the_fast_path_are_read_from_the_register_page(stub: HvStub) -> None:
    if stub.scheduler is not Scheduler.ROOT:
        pytest.skip("only the root scheduler has a fast path: run under lab/run --scheduler root")
    events = [eventfd() for _ in range(9)]
    with Partition(vps=2) as partition:
        me = partition.id
        partition.push(*((24 + i, msi(apic_id=1), 0x40 + i) for i in range(9)))
        for i, event in enumerate(events):
            partition.arm(event, 24 + i)
        os.eventfd_write(events[2], 1)
        os.eventfd_write(events[0], 1)
        os.eventfd_write(events[2], 1)
        assert stub.registers(me, 1, clear=False) == [0x42, 0x40]
        assert stub.registers(me, 0) == []
        assert stub.registers(me, 1) == [0x42, 0x40]
        assert stub.registers(me, 1) == []
        assert stub.take() == []
        for event in events:
            os.eventfd_write(event, 1)
        assert stub.registers(me, 1) == [0x40 + i for i in range(7)]
        assert [asserted.vector for asserted in stub.take()] == [
            0x47,
            0x48,
        ]  # the page holds seven: these went by hypercall
    for event in events:
        os.close(event)


def test_the_device_is_readable_exactly_while_there_is_something_to_take(stub: HvStub) -> None:
    by_assertion(stub)
    event, poll = eventfd(), select.poll()
    poll.register(stub.fileno(), select.POLLIN)
    with Partition(vps=1) as partition:
        partition.push((24, msi(), 0x41))
        partition.arm(event, 24)
        assert poll.poll(0) == []
        os.eventfd_write(event, 1)
        assert poll.poll(10_000) == [(stub.fileno(), select.POLLIN)]
        stub.take()
        assert poll.poll(0) == []
    os.close(event)


def each_failing_allocation(action: Callable[[], object]) -> Iterator[OSError | None]:
    """Runs `action` with its first kernel allocation failing, then the second, until none is left to fail."""
    for nth in range(1, 1000):
        failed: OSError | None = None
        outcome = Outcome()
        try:
            with kernel_allocation_fails(nth) as outcome:
                action()
        except OSError as error:
            failed = error
        if not outcome.injected:
            assert failed is None
            return
        yield failed
    pytest.fail("the allocations never end")


def test_each_failing_allocation_of_a_push_is_reported_and_the_old_table_stays(stub: HvStub) -> None:
    by_assertion(stub)
    event = eventfd()
    with Partition(vps=1) as partition:
        partition.push((24, msi(), 0x41))
        partition.arm(event, 24)
        failures = 0
        for failed in each_failing_allocation(lambda: partition.push((24, msi(), 0x42))):
            failures += failed is not None
            os.eventfd_write(event, 1)
            assert [asserted.vector for asserted in stub.take()] == ([0x41] if failed else [0x42])
            if failed:
                assert failed.errno == errno.ENOMEM
            else:
                partition.push((24, msi(), 0x41))
        assert failures > 0
    os.close(event)


def test_each_failing_allocation_of_creation_is_reported_and_leaves_no_partition(stub: HvStub) -> None:
    hold_one_partition()
    made: list[Partition] = []
    before = stub.counters().held
    for failed in each_failing_allocation(lambda: made.append(Partition(vps=1))):
        while made:
            made.pop().close()
        # If an allocation fails during teardown, the driver leaves the partition's pages in the hypervisor.
        assert stub.counters().held[:-1] == before[:-1]
        assert failed is None or failed.errno in {errno.ENOMEM, errno.ENFILE}
    while made:
        made.pop().close()
    hold_one_partition()
