"""Saved states in tests: carried as JSON, and what must not change if one is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeVar

from mshv_irqfd import GsiState
from support import open_files

if TYPE_CHECKING:
    from backends import Guest
    from mshv_irqfd import IrqFdRoute, Partition

State = dict[str, Any]
T = TypeVar("T")


def kept(guest: Guest, thing: T) -> T:
    """Keeps a thing until the guest is closed, which closes it."""
    vars(guest).setdefault("_kept", []).append(thing)
    return thing


def new_route(guest: Guest, **options: Any) -> IrqFdRoute:
    return kept(guest, guest.partition.new_irqfd_route(**options))


def restored(guest: Guest, state: State, **options: Any) -> dict[int, IrqFdRoute]:
    return kept(guest, guest.partition.restore(carried(state), **options))


def carried(state: State) -> State:
    """A state as it is on the other side of a pipe."""
    copy: State = json.loads(json.dumps(state, allow_nan=False))
    assert copy == state
    return copy


def gsis(partition: Partition) -> dict[int, GsiState]:
    """The states of all GSIs that are in use."""
    states = {gsi: partition.gsi_state(gsi) for gsi in partition.gsis}
    return {gsi: state for gsi, state in states.items() if state is not GsiState.UNALLOCATED}


def everything(partition: Partition) -> tuple[object, ...]:
    """What a refused state must leave as it was."""
    return (
        gsis(partition),
        partition.routing_table(),
        partition.stats(),
        partition.routes,
        partition.ioeventfds,
        partition.save(),
        open_files(),
    )
