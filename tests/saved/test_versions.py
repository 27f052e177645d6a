"""Each version of a state loads for ever: the files in `states/` were saved by the release that wrote that version."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from backends import Guest
from driver import DATA, ENABLE, Driver
from mshv_irqfd import MsiCapability, MsixTable
from states import State, gsis, kept, restored
from support import msi

Open = Callable[..., Guest]

pytestmark = pytest.mark.thread_unsafe(reason="each state is restored at the same GSIs")
VERSIONS = [1]


def state(version: int, kind: str) -> State:
    loaded: State = json.loads((Path(__file__).parent / "states" / f"{version}-{kind}.json").read_text())
    return loaded


@pytest.fixture
def guest(open_guest: Open) -> Guest:
    return open_guest(vps=2)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_routes_of_a_partition(guest: Guest, version: int) -> None:
    routes = restored(guest, state(version, "partition"))
    assert [(gsi, route.masked, route.msi, route.armed, route.pending) for gsi, route in routes.items()] == [
        (25, False, msi(0x41, 1), True, False),
        (26, True, msi(0x42), False, True),
        (27, False, None, False, True),
        (28, True, None, False, False),
    ]
    guest.receives_nothing()
    routes[25].signal()
    routes[26].unmask()
    routes[27].set_msi(msi(0x43))
    guest.receives(msi(0x41, 1), msi(0x42), msi(0x43))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_device_with_msix(guest: Guest, version: int) -> None:
    driver = Driver.of(guest, kept(guest, MsixTable.restore(guest.partition, state(version, "msix"))))
    assert len(driver.table.vectors) == 70
    assert driver.table.message_control == ENABLE | 69
    assert [driver.table.read_table(at, 8) for at in range(0, 48, 8)] == [
        0xFEE00000,
        0x5F,
        0xFEE01000,
        0x52 | 1 << 32,
        0x1_FEE00000,
        0xFFFFFFFF,
    ]
    assert driver.read(69, DATA, 8) == 0x53 | 1 << 32
    assert (driver.armed(), driver.pending_bits(), driver.faulty()) == ({0}, {1, 69}, {2})
    assert "outside 0xFEE00000-0xFEEFFFFF" in str(driver.table.faults()[0][1])
    assert set(gsis(guest.partition)) == {24, 29}
    guest.receives_nothing()
    driver[0].signal()
    driver.unmask(1)
    driver.unmask(69)
    guest.receives(msi(0x51), msi(0x52, 1), msi(0x53))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_device_with_msi(guest: Guest, version: int) -> None:
    device = kept(guest, MsiCapability.restore(guest.partition, state(version, "msi")))
    assert device.capability().hex() == "05009501" + "0000e0fe00000000" + "60000000" + "02000000" + "0a000000"
    assert [vector.route.gsi if vector.route else None for vector in device.vectors] == [30, None, None, None]
    assert device.faults() == []
    guest.receives_nothing()
    device.vectors[0].signal()
    guest.receives(msi(0x60))
    device.write_config(16, bytes(4))
    guest.receives(msi(0x61))


@pytest.mark.parametrize("kind", ["partition", "msix", "msi"])
def test_the_latest_version_is_the_one_that_is_saved(guest: Guest, kind: str) -> None:
    saved = state(VERSIONS[-1], kind)
    if kind == "partition":
        restored(guest, saved)
        again = guest.partition.save()
    else:
        device = (MsixTable if kind == "msix" else MsiCapability).restore(guest.partition, saved)
        again = kept(guest, device).save()
    assert again == saved
    assert list(again) == list(saved)
