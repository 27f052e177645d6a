"""MsiRoute and the other value types: fields, equality, repr, validation, copying and pickling."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
from mshv_irqfd import DeliveryMode, GsiState, Interrupt, MsiRoute, PartitionStats, RoutingEntry
from support import msi, still_works

if TYPE_CHECKING:
    from backends import Guest


def test_an_msi_is_decoded_field_by_field() -> None:
    route = MsiRoute(0xFEE12004, 0x8145)
    assert (route.address, route.data) == (0xFEE12004, 0x8145)
    assert (route.vector, route.destination) == (0x45, 0x12)
    assert route.delivery_mode is DeliveryMode.LOWEST_PRIORITY
    assert (route.logical, route.level) == (True, True)
    plain = MsiRoute(0xFEE00000, 0x41)
    assert (plain.logical, plain.level) == (False, False)


def test_fixed_is_an_edge_triggered_physical_msi() -> None:
    assert MsiRoute.fixed(0x41, 3) == MsiRoute(0xFEE03000, 0x41)
    assert MsiRoute.fixed(255, 255) == MsiRoute(0xFEEFF000, 0xFF)
    assert MsiRoute.fixed(16, 0) == MsiRoute(0xFEE00000, 0x10)


def test_equal_msis_are_one_key() -> None:
    assert {msi(0x41): 1, MsiRoute(0xFEE00000, 0x41): 2} == {msi(0x41): 2}
    assert msi(0x41) != msi(0x42)
    assert msi(0x41) != msi(0x41, 1)
    assert msi(0x41) != (0xFEE00000, 0x41)


def test_an_msi_can_not_be_changed() -> None:
    route: Any = msi(0x41)
    for name in ("address", "data", "vector"):
        with pytest.raises(AttributeError):
            setattr(route, name, 1)


@pytest.mark.parametrize(
    "value",
    [
        MsiRoute(0xFEEFF00C, 0xC7FF),
        GsiState.BROKEN,
        DeliveryMode.NMI,
        Interrupt(0x41, 1, DeliveryMode.FIXED, logical=False, level=True),
        Interrupt(0x41),
        RoutingEntry(24, 0xFEE00000, 0x41),
        PartitionStats(1, 2, 3, 4, 5, 6, 7, 8, 9),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_survives_copying_and_pickling(value: Any) -> None:
    assert pickle.loads(pickle.dumps(value)) == value
    assert type(pickle.loads(pickle.dumps(value))) is type(value)
    assert copy.deepcopy(value) == value


def test_the_repr_of_an_msi_recreates_it() -> None:
    assert repr(MsiRoute(0xFEE01000, 0x41)) == "MsiRoute(address=0xfee01000, data=0x0041)"
    assert eval(repr(msi(0x41, 1))) == msi(0x41, 1)
    assert repr(RoutingEntry(24, 0xFEE00000, 0x41)) == "RoutingEntry(gsi=24, address=0xfee00000, data=0x0041)"


@pytest.mark.parametrize(
    ("address", "data"),
    [
        (0xFEE00000, 0x10),
        (0xFEE00000, 0x110),
        (0xFEEFF00C, 0xC7FF),
        (0xFEE00000, 0x400),
        (0xFEE00000, 0x500),
        (0xFEE00000, 0x200),
        (0xFEE00000, 0x700),
    ],
)
def test_an_msi_at_the_edge_of_the_rules_is_accepted(address: int, data: int) -> None:
    assert (MsiRoute(address, data).address, MsiRoute(address, data).data) == (address, data)


REFUSED = [
    pytest.param(0xFEDFFFFC, 0x41, ValueError, "0xfedffffc.*0xFEE00000-0xFEEFFFFF", id="below-the-window"),
    pytest.param(0xFEF00000, 0x41, ValueError, "0xfef00000.*0xFEE00000-0xFEEFFFFF", id="above-the-window"),
    pytest.param(0x1FEE00000, 0x41, ValueError, "0x1fee00000", id="upper-half"),
    pytest.param(0, 0x41, ValueError, "0xFEE00000-0xFEEFFFFF", id="address-0"),
    *(
        pytest.param(
            0xFEE00000 | 1 << bit, 0x41, ValueError, f"{0xFEE00000 | 1 << bit:#x}.*11:4 or 1:0", id=f"bit-{bit}"
        )
        for bit in (0, 1, *range(4, 12))
    ),
    pytest.param(0xFEE00000, 0x341, ValueError, "0x341.*delivery mode 3.*reserved", id="delivery-mode-3"),
    pytest.param(0xFEE00000, 0x641, ValueError, "0x641.*delivery mode 6.*reserved", id="delivery-mode-6"),
    pytest.param(0xFEE00000, 0x0F, ValueError, "vector 15.*16 to 255", id="fixed-vector-15"),
    pytest.param(0xFEE00000, 0x00, ValueError, "vector 0.*16 to 255", id="fixed-vector-0"),
    pytest.param(0xFEE00000, 0x10F, ValueError, "vector 15.*16 to 255", id="lowest-priority-vector-15"),
    pytest.param(0xFEE00000, 0x10041, ValueError, "0x10041.*above 15", id="data-bit-16"),
    pytest.param(0xFEE00000, 1 << 31 | 0x41, ValueError, "above 15", id="data-bit-31"),
    pytest.param(-1, 0x41, OverflowError, "-1.*0xFEE00000-0xFEEFFFFF", id="address-negative"),
    pytest.param(0xFEE00000, -1, OverflowError, "-1.*16 bits", id="data-negative"),
    pytest.param(1 << 64, 0x41, OverflowError, "18446744073709551616", id="address-beyond-64-bits"),
    pytest.param(0xFEE00000, 1 << 64, OverflowError, "18446744073709551616", id="data-beyond-64-bits"),
    pytest.param("0xFEE00000", 0x41, TypeError, "'0xFEE00000'", id="address-str"),
    pytest.param(0xFEE00000, 65.0, TypeError, "65.0", id="data-float"),
    pytest.param(None, 0x41, TypeError, "None", id="address-none"),
    pytest.param(0xFEE00000, b"A", TypeError, "b'A'", id="data-bytes"),
]


@pytest.mark.parametrize(("address", "data", "error", "words"), REFUSED)
def test_an_invalid_msi_is_refused_with_the_value_and_the_rule(
    address: Any, data: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        MsiRoute(address, data)


@pytest.mark.parametrize(("address", "data", "error", "words"), REFUSED)
def test_a_route_refuses_an_invalid_msi_before_any_ioctl(
    guest: Guest, address: Any, data: Any, error: type[Exception], words: str
) -> None:
    with guest.partition.new_irqfd_route() as route:
        route.set_msi(msi(0x41))
        before = guest.partition.stats(), guest.partition.routing_table()
        with pytest.raises(error, match=words):
            route.set_msi(address, data)
        assert (guest.partition.stats(), guest.partition.routing_table()) == before
        assert (route.msi, route.armed) == (msi(0x41), True)
    still_works(guest)


@pytest.mark.parametrize(
    ("vector", "apic_id", "error"),
    [
        (15, 0, ValueError),
        (256, 0, ValueError),
        (-1, 0, ValueError),
        (0x41, 256, ValueError),
        (0x41, -1, ValueError),
        (1 << 64, 0, OverflowError),
        ("65", 0, TypeError),
        (0x41, 0.0, TypeError),
    ],
)
def test_fixed_refuses_an_invalid_vector_or_apic_id(vector: Any, apic_id: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        MsiRoute.fixed(vector, apic_id)


def test_set_msi_takes_an_msi_or_an_address_and_data(simulated: Guest) -> None:
    set_msi: Any = simulated.partition.new_irqfd_route().set_msi
    for arguments in ((msi(0x41), 0x41), (0xFEE00000,), (), (None, None), ((0xFEE00000, 0x41),)):
        with pytest.raises(TypeError):
            set_msi(*arguments)
    [route] = simulated.partition.routes or [simulated.partition.new_irqfd_route()]
    route.set_msi(0xFEE00000, 0x41)
    assert route.msi == msi(0x41)
    route.close()


def test_any_object_with_index_is_an_integer() -> None:
    class Index:
        def __init__(self, value: int) -> None:
            self.value = value

        def __index__(self) -> int:
            return self.value

    address: Any = Index(0xFEE00000)
    assert MsiRoute(address, 0x41) == msi(0x41)
