"""States that nobody saved: each is refused with an error that names the key, and nothing changes."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
from backends import Backend, Guest
from driver import Driver
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mshv_irqfd import MissingVpError, MsiCapability, MsixTable, Partition
from needs import need
from states import State, carried, everything, kept, new_route
from support import msi, still_works

pytestmark = pytest.mark.thread_unsafe(
    reason="each state is restored at the same GSIs, and all open files are looked at"
)

HUGE = 10**5000
"""Too long for Python to print."""

Restore = Callable[[Partition, Any], Any]
RESTORE: dict[str, Restore] = {
    "mshv_irqfd.Partition": Partition.restore,
    "mshv_irqfd.MsixTable": MsixTable.restore,
    "mshv_irqfd.MsiCapability": MsiCapability.restore,
}


def good(guest: Guest) -> dict[str, State]:
    """A state of each kind, at GSIs that are free again."""
    partition = guest.partition
    kept_free = [partition.new_irqfd_route() for _ in range(4)]
    with partition.new_irqfd_route() as armed, partition.new_irqfd_route() as masked:
        armed.set_msi(msi(0x41))
        masked.mask()
        masked.set_msi(msi(0x42))
        masked.signal()
        table, capability = Driver(guest, 8), MsiCapability(partition, 4)
        table.bring_up(msi(0x51), msi(0x52))
        table.mask(1)
        table[1].signal()
        table[2].signal()
        table.unmask(3)
        capability.write_config(4, (0xFEE00000).to_bytes(4, "little"))
        capability.write_config(12, (0x60).to_bytes(2, "little"))
        capability.write_config(2, (0x11).to_bytes(2, "little"))
        for route in kept_free:
            route.close()
        states = [partition.save(), table.table.save(), capability.save()]
        table.table.close()
        capability.close()
    guest.receives_nothing()
    return {state["kind"]: state for state in map(carried, states)}


@pytest.fixture
def states(guest: Guest) -> dict[str, State]:
    return good(guest)


def changed(state: State, path: str, value: object) -> State:
    """A state with one value set, added or, if that is `...`, taken away."""
    state = copy.deepcopy(state)
    at: Any = state
    *steps, last = [int(step) if step.isdigit() else step for step in re.findall(r"\w+", path)]
    for step in steps:
        at = at[step]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return state


EVERY, ROUTES, TABLE, MSI = ("", *RESTORE)
U32 = "expected u32"


class Bad(NamedTuple):
    kind: str
    path: str
    value: object
    error: type[Exception]
    words: str

    @property
    def name(self) -> str:
        """A name for the test, without brackets."""
        value = "huge" if self.value in (HUGE, -HUGE) else "none" if self.value is ... else repr(self.value)[:20]
        return re.sub(r"\W+", "_", f"{self.kind[11:]} {self.path} {value}").strip("_")


BAD: list[tuple[str, str, object, type[Exception], str]] = [
    (EVERY, "kind", ..., ValueError, 'the state has no key "kind"'),
    (EVERY, "kind", "mshv_irqfd.Route", ValueError, 'kind: expected "mshv_irqfd.'),
    (EVERY, "kind", None, ValueError, "kind: expected"),
    (EVERY, "version", ..., ValueError, 'the state has no key "version"'),
    (EVERY, "version", 0, ValueError, "version: expected 1, the only one so far, not 0"),
    (EVERY, "version", 2, ValueError, "version: expected 1, the only one so far, not 2"),
    (EVERY, "version", True, ValueError, "version: expected 1, the only one so far, not true"),
    (EVERY, "version", 1.0, ValueError, "version: expected 1, the only one so far, not 1.0"),
    (EVERY, "version", "1", ValueError, "version: expected 1"),
    (EVERY, "extra", 1, ValueError, "extra: unknown field `extra`, expected"),
    (EVERY, "extra", {1: 2}, TypeError, "extra: key 1 is not a str"),
    (ROUTES, "routes", ..., ValueError, "the state: missing field `routes`"),
    (ROUTES, "routes", None, ValueError, "routes: invalid type: null, expected a sequence"),
    (ROUTES, "routes", {}, ValueError, "routes: invalid type: map, expected a sequence"),
    (ROUTES, "routes[0]", 24, ValueError, "routes[0]: invalid type: integer `24`, expected a dict"),
    (ROUTES, "routes[0]", [24, False, None, True], ValueError, "routes[0]: invalid type: sequence, expected a dict"),
    (ROUTES, "routes[0].msi", [0xFEE00000, 65], ValueError, "routes[0].msi: invalid type: sequence, expected a dict"),
    (TABLE, "table[0]", [0, 0, 0, True], ValueError, "table[0]: invalid type: sequence, expected a dict"),
    (TABLE, "vectors[1]", [1, 31, None, True, None], ValueError, "vectors[1]: invalid type: sequence, expected a dict"),
    (MSI, "vectors[0]", [0] * 5, ValueError, "vectors[0]: invalid type: sequence, expected a dict"),
    (ROUTES, "routes[0].gsi", ..., ValueError, "routes[0]: missing field `gsi`"),
    (ROUTES, "routes[0].msi", ..., ValueError, "routes[0]: missing field `msi`"),
    (ROUTES, "routes[0].extra", 1, ValueError, "routes[0].extra: unknown field `extra`, expected one of `gsi`"),
    (ROUTES, "routes[0].gsi", True, ValueError, f"routes[0].gsi: invalid type: boolean `true`, {U32}"),
    (ROUTES, "routes[0].gsi", 30.0, ValueError, f"routes[0].gsi: invalid type: floating point `30.0`, {U32}"),
    (ROUTES, "routes[0].gsi", math.nan, ValueError, "routes[0].gsi: nan is not a number of JSON"),
    (ROUTES, "routes[0].gsi", math.inf, ValueError, "routes[0].gsi: inf is not a number of JSON"),
    (ROUTES, "routes[0].gsi", "30", ValueError, f'routes[0].gsi: invalid type: string "30", {U32}'),
    (ROUTES, "routes[0].gsi", -1, ValueError, f"routes[0].gsi: invalid value: integer `-1`, {U32}"),
    (ROUTES, "routes[0].gsi", 1 << 32, ValueError, f"routes[0].gsi: invalid value: integer `4294967296`, {U32}"),
    (ROUTES, "routes[0].gsi", 1 << 64, OverflowError, "routes[0].gsi: 18446744073709551616 does not fit in 64 bits"),
    (ROUTES, "routes[0].gsi", HUGE, OverflowError, "routes[0].gsi: this int does not fit in 64 bits"),
    (ROUTES, "routes[0].gsi", -HUGE, OverflowError, "routes[0].gsi: this int does not fit in 64 bits"),
    (ROUTES, "routes[0].gsi", b"30", TypeError, "routes[0].gsi: b'30' is not a value of JSON"),
    (ROUTES, "routes[0].gsi", {30}, TypeError, "routes[0].gsi: {30} is not a value of JSON"),
    (ROUTES, "routes[0].gsi", "\ud800", ValueError, "routes[0].gsi: "),
    (ROUTES, "routes[0].gsi", 23, ValueError, "routes[0].gsi: GSI 23 is outside gsis range(24, 2072)"),
    (ROUTES, "routes[0].gsi", 2072, ValueError, "routes[0].gsi: GSI 2072 is outside gsis range(24, 2072)"),
    (ROUTES, "routes[0].gsi", 24, ValueError, "routes[0].gsi: GSI 24 is another route's; restore before making routes"),
    (ROUTES, "routes[0].gsi", 29, ValueError, "routes[1].gsi: GSI 29 is that of routes[0] too"),
    (ROUTES, "routes[0].masked", 1, ValueError, "routes[0].masked: invalid type: integer `1`, expected a boolean"),
    (ROUTES, "routes[0].masked", None, ValueError, "routes[0].masked: invalid type: null, expected a boolean"),
    (ROUTES, "routes[0].pending", "no", ValueError, 'routes[0].pending: invalid type: string "no", expected a boolean'),
    (ROUTES, "routes[0].msi", 65, ValueError, "routes[0].msi: invalid type: integer `65`, expected a dict"),
    (ROUTES, "routes[0].msi.data", ..., ValueError, "routes[0].msi: missing field `data`"),
    (ROUTES, "routes[0].msi.data", False, ValueError, "routes[0].msi.data: invalid type: boolean `false`"),
    (
        ROUTES,
        "routes[0].msi.data",
        5,
        ValueError,
        "routes[0].msi: MSI data 0x5 has vector 5; fixed and lowest-priority",
    ),
    (ROUTES, "routes[1].msi.address", 0, ValueError, "routes[1].msi: MSI address 0x0 is outside 0xFEE00000-0xFEEFFFFF"),
    (ROUTES, "routes[0].msi.address", 0xFEE09000, MissingVpError, "routes[0].msi: GSI 28: no VP has APIC id 9"),
    (TABLE, "size", 0, ValueError, "size: 0 is out of range; an MSI-X table has 1 to 2048"),
    (TABLE, "size", 2049, ValueError, "size: 2049 is out of range; an MSI-X table has 1 to 2048"),
    (TABLE, "size", 3, ValueError, "table[2].vector: 3 is out of range; the device has vectors 0 to 2"),
    (TABLE, "enabled", 1, ValueError, "enabled: invalid type: integer `1`, expected a boolean"),
    (TABLE, "enabled", False, ValueError, "vectors[0]: the registers do not let the vector send"),
    (TABLE, "function_mask", True, ValueError, "vectors[0]: the registers do not let the vector send"),
    (TABLE, "table", [], ValueError, "vectors[0]: the registers do not let the vector send"),
    (TABLE, "table[0].vector", 1, ValueError, "table[1].vector: 1 is that of table[0] too"),
    (TABLE, "table[0].address", -1, ValueError, "table[0].address: invalid value: integer `-1`"),
    (TABLE, "table[0].data", 1 << 32, ValueError, "table[0].data: invalid value: integer `4294967296`"),
    (TABLE, "table[0].masked", ..., ValueError, "table[0]: missing field `masked`"),
    (TABLE, "table[1].masked", False, ValueError, "vectors[1]: the registers let the vector send, so it has an msi"),
    (TABLE, "vectors", [], ValueError, "vectors: expected vector 0 among them, as the registers let it send"),
    (TABLE, "vectors[0].vector", 8, ValueError, "vectors[0].vector: 8 is out of range; the device has vectors 0 to 7"),
    (TABLE, "vectors[0].vector", 1, ValueError, "vectors[0]: the registers do not let the vector send"),
    (TABLE, "vectors[1].vector", 0, ValueError, "vectors[1].vector: 0 is that of vectors[0] too"),
    (TABLE, "vectors[0].gsi", None, ValueError, "vectors[0].gsi: expected a GSI, as the vector is armed"),
    (TABLE, "vectors[0].gsi", 24, ValueError, "vectors[0].gsi: GSI 24 is another route's"),
    (TABLE, "vectors[0].gsi", 31, ValueError, "vectors[1].gsi: GSI 31 is that of vectors[0] too"),
    (TABLE, "vectors[0].msi", None, ValueError, "vectors[0]: the registers let the vector send, so it has an msi"),
    (TABLE, "vectors[1].fault", "x", ValueError, "vectors[1]: the registers do not let the vector send"),
    (TABLE, "vectors[3].msi", {"address": 0, "data": 0x41}, ValueError, "vectors[3].msi: MSI address 0x0 is outside"),
    (TABLE, "vectors[0].fault", 1, ValueError, "vectors[0].fault: invalid type: integer `1`, expected a string"),
    (TABLE, "vectors[0].msi.data", 5, ValueError, "vectors[0].msi: MSI data 0x5 has vector 5"),
    (
        TABLE,
        "vectors[1].msi",
        {"address": 0xFEE00000, "data": 0x41},
        ValueError,
        "vectors[1]: the registers do not let",
    ),
    (TABLE, "vectors[0].msi.address", 0xFEE09000, MissingVpError, "vectors[0].msi: GSI 30: no VP has APIC id 9"),
    (MSI, "size", 8.0, ValueError, "size: invalid type: floating point `8.0`"),
    (MSI, "multiple_message_enable", True, ValueError, "multiple_message_enable: invalid type: boolean `true`"),
    (MSI, "enabled", False, ValueError, "vectors[0]: the registers do not let the vector send"),
    (MSI, "mask_bits", 1, ValueError, "vectors[0]: the registers do not let the vector send"),
]


@pytest.mark.parametrize("bad", [Bad(*bad) for bad in BAD], ids=lambda bad: bad.name)
def test_a_bad_state_is_refused_by_the_name_of_the_key_and_changes_nothing(
    guest: Guest, states: dict[str, State], bad: Bad
) -> None:
    new_route(guest).set_msi(msi(0xE9))
    before = everything(guest.partition)
    for kind in [bad.kind] if bad.kind else RESTORE:
        with pytest.raises(bad.error) as refused:
            RESTORE[kind](guest.partition, changed(states[kind], bad.path, bad.value))
        assert str(refused.value).startswith(bad.words), str(refused.value)
        assert unlooked(everything(guest.partition)) == unlooked(before)


def unlooked(seen: tuple[Any, ...]) -> tuple[Any, ...]:
    """What was seen but for the armings and disarmings: `everything` makes some itself, by saving."""
    return tuple(part._replace(arms=0, disarms=0) if hasattr(part, "pushes") else part for part in seen)


@pytest.mark.parametrize("state", [None, 3, "{}", [], [("kind", 1)], b"", {}])
def test_what_is_no_state_at_all_is_refused(guest: Guest, state: object) -> None:
    for restore in RESTORE.values():
        with pytest.raises((TypeError, ValueError), match=r"state must be a dict|the state has no key"):
            restore(guest.partition, state)


def test_a_state_of_another_kind_is_refused(guest: Guest, states: dict[str, State]) -> None:
    for kind, restore in RESTORE.items():
        for other in set(states) - {kind}:
            with pytest.raises(ValueError, match=f'kind: expected "{kind}", the class that is restored, not "{other}"'):
                restore(guest.partition, states[other])


def test_a_state_that_contains_itself_is_refused(guest: Guest, states: dict[str, State]) -> None:
    loop: list[Any] = []
    loop.append(loop)
    for kind, restore in RESTORE.items():
        with pytest.raises(ValueError, match=r"extra(\[0\])+ is nested too deeply for a state"):
            restore(guest.partition, states[kind] | {"extra": loop})


# Any change to any state

NUMBERS = [0, 1, 2, 7, 8, 24, 28, 29, 30, 2071, 2072, 4096, 0x41, 0x5, 0xFEE00000, 0xFEE01000, 2**32, 2**64, -1]
odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.binary(max_size=2),
    st.just(...),
    st.builds(list),
    st.builds(dict),
    st.just(HUGE),
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a state with every key in it."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    found = [(value, key) for key in keys]
    for key in keys:
        found += places(value[key])
    return found


@st.composite
def mutations(draw: st.DrawFn, state: State) -> State:
    state = copy.deepcopy(state)
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(places(state)))
        match draw(st.sampled_from(["set", "set", "flip", "flip", "delete", "add", "twice", "swap"])):
            case "flip" if isinstance(container[key], bool):
                container[key] = not container[key]
            case "set":
                container[key] = draw(odd_values)
            case "delete":
                del container[key]
            case "add" if isinstance(container, dict):
                container[draw(st.text(max_size=3))] = draw(odd_values)
            case "twice" if isinstance(container, list):
                container.append(copy.deepcopy(container[key]))
            case "swap":
                other, at = draw(st.sampled_from(places(state)))
                container[key] = copy.deepcopy(other[at])
    return state


def close(thing: Any) -> None:
    for one in thing.values() if isinstance(thing, dict) else [thing]:
        one.close()


@pytest.mark.parametrize("kind", RESTORE)
@pytest.mark.parametrize("name", ["simulated", "kvm", "mshv"])
def test_any_changed_state_is_restored_exactly_or_refused_with_nothing_changed(name: str, kind: str) -> None:
    need(name)
    backend = Backend(name)
    guest = backend.guest(backend.open(vps=2, gsis=range(24, 64)))
    partition = guest.partition
    original = good(guest)[kind]
    saved: dict[str, Callable[[Any], State]] = {name: type_.save for name, type_ in TYPES.items()}
    restored, refused = [], []

    @settings(
        max_examples=200 if name == "simulated" else 80,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations(original))
    def try_one(state: State) -> None:
        before = everything(partition)
        try:
            thing = RESTORE[kind](partition, state)
        except (ValueError, TypeError, OverflowError, MissingVpError):
            refused.append(state)
            assert unlooked(everything(partition)) == unlooked(before)
            return
        restored.append(state)
        look = partial(saved[kind], partition if kind == ROUTES else thing)
        first = look()
        close(thing)
        again = RESTORE[kind](partition, carried(first))
        guest.arrived()
        assert look() == first if kind == ROUTES else saved[kind](again) == first
        close(again)

    try_one()
    assert len(refused) > 10
    assert len(restored) > 1
    guest.arrived()
    still_works(guest)
    guest.close()


TYPES: dict[str, type[Any]] = {ROUTES: Partition, TABLE: MsixTable, MSI: MsiCapability}


def test_the_unchanged_states_are_good(guest: Guest, states: dict[str, State]) -> None:
    for kind, restore in RESTORE.items():
        kept(guest, restore(guest.partition, states[kind]))
    assert guest.partition.save() == states[ROUTES]
