"""What goes to `logging`: calls with their reasons at DEBUG when asked for, refused ones at WARNING always."""

from __future__ import annotations

import errno
import gc
import logging
import os
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING

import pytest
from mshv_irqfd import IrqFdError, MsixTable, open_partition
from support import msi

if TYPE_CHECKING:
    from collections.abc import Callable

    from backends import Guest, KvmGuest
    from faults import Faults

    Open = Callable[..., Guest]

NAME = "mshv_irqfd"


def said(caplog: pytest.LogCaptureFixture, level: int = logging.DEBUG) -> list[str]:
    """The messages of a level, without the partition's name. Forgets them."""
    found = [record.getMessage().split(": ", 1)[1] for record in caplog.records if record.levelno == level]
    caplog.clear()
    return found


def test_every_arming_and_disarming_is_logged_with_its_reason(
    open_guest: Open, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, NAME):
        partition = open_guest(preload=False, quiesce=False).partition
        route = partition.new_irqfd_route()
        gsi = route.gsi
        route.set_msi(msi(0x41))
        assert said(caplog)[1:] == [f"armed GSI {gsi}: it has an MSI and is not masked"]
        route.mask()
        assert said(caplog) == [f"disarmed GSI {gsi}: it is masked, or has no MSI"]
        route.unmask()
        assert said(caplog) == [f"armed GSI {gsi}: it has an MSI and is not masked"]
        route.close()
        assert said(caplog) == [f"disarmed GSI {gsi}: it is closed"]


def test_a_push_is_logged_with_what_is_disarmed_for_it(open_guest: Open, caplog: pytest.LogCaptureFixture) -> None:
    partition = open_guest(preload=False, quiesce=True).partition
    partition.log_calls = True
    with caplog.at_level(logging.DEBUG, NAME):
        first, second = partition.new_irqfd_route(), partition.new_irqfd_route()
        first.set_msi(msi(0x41))
        said(caplog)
        second.set_msi(msi(0x42))
        entries = partition.stats().entries_pushed
        disarmed, pushed, armed, again = said(caplog)
    assert disarmed == f"disarmed GSI {first.gsi}: a push follows"
    assert pushed.endswith(" entries: the table lacks an MSI")
    assert 2 <= int(pushed.split()[1]) <= entries
    assert armed == f"armed GSI {second.gsi}: it has an MSI and is not masked"
    assert again == f"armed GSI {first.gsi}: the push is over"
    first.close()
    second.close()


def test_on_kvm_settling_is_logged_at_once(kvm: KvmGuest, caplog: pytest.LogCaptureFixture) -> None:
    kvm.partition.log_calls = True
    with caplog.at_level(logging.DEBUG, NAME), kvm.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        said(caplog)
        kvm.partition.settle()
        why = "the interrupts on their way are waited for"
        assert said(caplog) == [f"disarmed GSI {route.gsi}: {why}", f"armed GSI {route.gsi}: {why}"]


def test_a_move_names_the_gsi_where_the_message_is(loaded: Guest, caplog: pytest.LogCaptureFixture) -> None:
    loaded.partition.log_calls = True
    with caplog.at_level(logging.DEBUG, NAME), loaded.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        said(caplog)
        route.set_msi(msi(0x42))
        assert said(caplog) == [
            f"disarmed GSI {route.gsi}: the table has its MSI at another GSI",
            f"armed GSI {route.gsi} at GSI {route.armed_gsi}: it has an MSI and is not masked",
        ]


def test_a_refused_call_is_logged_at_warning_though_calls_are_not(
    unloaded: Guest, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    partition = unloaded.partition
    route = partition.new_irqfd_route()
    assert not partition.log_calls
    faults.fail(partition, "assign_irqfd", errno.ENOMEM)
    with pytest.raises(IrqFdError):
        faults.run(partial(route.set_msi, msi(0x41)))
    (refused,) = said(caplog, logging.WARNING)
    assert refused.startswith(f"refused: {os.strerror(errno.ENOMEM)}: GSI {route.gsi}: ")
    assert refused.endswith(": the kernel is out of memory")
    assert said(caplog) == []
    route.close()


def test_by_default_calls_are_not_logged(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    assert not guest.partition.log_calls
    with caplog.at_level(logging.DEBUG, NAME), guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
    assert caplog.records == []


def test_a_device_logs_why_a_vector_stays_disarmed(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    guest.partition.log_calls = True
    with caplog.at_level(logging.DEBUG, NAME), MsixTable(guest.partition, 2) as table:
        table.write_table(16, (0xFEE00000).to_bytes(8, "little"))
        table.write_table(24, (0x03).to_bytes(8, "little"))
        table.write_message_control(2, (0x8000).to_bytes(2, "little"))
        (fault,) = [text for text in said(caplog) if text.startswith("vector 1 ")]
    assert fault.startswith("vector 1 of the MSI-X table stays disarmed: MSI data 0x3 has vector 3")


@pytest.mark.thread_unsafe(reason="the logger is the process's")
def test_a_handler_may_use_the_partition_that_it_is_told_about(guest: Guest) -> None:
    partition, seen = guest.partition, []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            route = partition.new_irqfd_route()
            route.mask()
            route.close()
            seen.append((record.getMessage(), partition.stats().arms))

    logger, handler = logging.getLogger(NAME), Handler()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        partition.log_calls = True
        with partition.new_irqfd_route() as route:
            route.set_msi(msi(0x41))
    finally:
        logger.setLevel(logging.NOTSET)
        logger.removeHandler(handler)
    assert any(" armed GSI " in message and arms == 1 for message, arms in seen)


def test_a_log_that_raises_is_no_failure_of_the_call(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_record: object) -> None:
        raise LookupError("no such file")

    unraisable = list[BaseException | None]()
    monkeypatch.setattr(sys, "unraisablehook", lambda hooked: unraisable.append(hooked.exc_value))
    logger = logging.getLogger(NAME)
    monkeypatch.setattr(logger, "log", broken)
    guest.partition.log_calls = True
    route = guest.partition.new_irqfd_route()
    route.set_msi(msi(0x41))
    assert route.armed
    assert [type(error) for error in unraisable] == [LookupError]
    guest.partition.log_calls = False
    unraisable.clear()
    route.close()
    gc.collect()


def test_an_unconfigured_program_prints_nothing_and_imports_no_logging() -> None:
    code = f"""
import sys
from mshv_irqfd import IrqFdError, MsiRoute, open_partition
with open_partition("simulated") as partition:
    route = partition.new_irqfd_route()
    for attempt in range(2):
        partition.fail("assign_irqfd", {errno.ENOMEM})
        try:
            route.set_msi(MsiRoute.fixed(0x41, 0))
        except IrqFdError:
            print("logging" in sys.modules)
            import logging
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "False\nTrue\n", "")


def test_opening_takes_the_level_of_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    with open_partition("simulated") as partition:
        assert not partition.log_calls
    with caplog.at_level(logging.DEBUG, NAME), open_partition("simulated") as partition:
        assert partition.log_calls
