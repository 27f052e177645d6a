"""`Partition.describe()`: every route and every counter, in one table."""

from __future__ import annotations

import copy
import io
import pickle
from typing import TYPE_CHECKING

import pytest
from mshv_irqfd import MsiRoute, MsixTable
from support import close_as_someone_else, msi

if TYPE_CHECKING:
    from backends import Guest


def test_each_route_has_a_line_with_its_state(unloaded: Guest) -> None:
    partition = unloaded.partition
    armed, masked, bare = (partition.new_irqfd_route() for _ in range(3))
    armed.set_msi(msi(0x41))
    masked.mask()
    masked.set_msi(MsiRoute(0xFEE0_0004, 0x142))
    masked.signal()
    lines = partition.describe().splitlines()
    assert lines[0] == repr(partition)
    assert [line.split() for line in lines[1:-1]] == [
        ["GSI", "state", "armed", "at", "MSI", "interrupt", "masked", "pending"],
        [
            str(armed.gsi),
            "ENABLED",
            str(armed.gsi),
            "0xfee00000/0x0041",
            *("vector", "0x41", "to", "APIC", "0"),
            "-",
            "-",
        ],
        [
            *(str(masked.gsi), "DISABLED", "-", "0xfee00004/0x0142"),
            *("vector", "0x42", "to", "logical", "0x00", "LOWEST_PRIORITY"),
            *("yes", "yes"),
        ],
        [str(bare.gsi), "DISABLED", "-", "-", "-", "-", "-"],
    ]
    for route in (armed, masked, bare):
        route.close()


def test_the_last_line_has_every_counter(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        shown, stats = guest.partition.describe(), guest.partition.stats()
    assert shown.splitlines()[-1] == ", ".join(f"{name} {value}" for name, value in stats._asdict().items())


def test_without_routes_it_says_so_and_a_vector_is_a_route(guest: Guest) -> None:
    assert guest.partition.describe().splitlines()[1] == "no routes"
    with MsixTable(guest.partition, 2) as table:
        table.vectors[1].event.close()
        assert len(guest.partition.describe().splitlines()) == 4


def test_rich_shows_a_table(guest: Guest) -> None:
    console = pytest.importorskip("rich.console", reason='needs rich: pip install "mshv_irqfd[bench]"')
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        terminal = console.Console(width=120, record=True, file=io.StringIO())
        terminal.print(guest.partition.describe())
    shown = terminal.export_text()
    assert "vector 0x41 to APIC 0" in shown
    assert "┃ GSI" in shown
    assert "<" in shown.splitlines()[0]


def test_a_copy_is_the_text(guest: Guest) -> None:
    shown = guest.partition.describe()
    for copied in (copy.copy(shown), copy.deepcopy(shown), pickle.loads(pickle.dumps(shown))):
        assert copied == shown
        assert type(copied) is str


@pytest.mark.thread_unsafe(reason="a closed number goes to whichever thread opens the next descriptor")
def test_a_route_whose_descriptor_other_code_has_closed_has_a_line(guest: Guest) -> None:
    with guest.partition.new_irqfd_route() as route:
        close_as_someone_else(route.fileno())
        line = guest.partition.describe().splitlines()[2].split()
    assert line == [str(route.gsi), "DISABLED", "-", "-", "-", "-", "?"]
