"""docs/saved-state.md describes every key of a state."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mshv_irqfd import MsiCapability, MsiRoute, MsixTable, open_partition

PAGE = (Path(__file__).parents[2] / "docs" / "saved-state.md").read_text()


def keys(state: Any) -> set[str]:
    if isinstance(state, dict):
        return set(state).union(*map(keys, state.values()))
    return set().union(*map(keys, state)) if isinstance(state, list) else set()


def test_the_page_describes_every_key_of_a_state() -> None:
    with open_partition("simulated") as partition, MsixTable(partition, 4) as table, MsiCapability(partition, 2) as msi:
        route = partition.new_irqfd_route()
        route.set_msi(MsiRoute.fixed(0x41, 0))
        table.write_table(12, bytes(4))
        table.vectors[1].signal()
        states = [partition.save(), table.save(), msi.save()]
    described = set(re.findall(r"[a-z_]+", " ".join(re.findall(r"`([^`\n]*)`", PAGE))))
    assert keys(states) - described == set()
    assert {"gsi", "fault", "masked", "mask_bits"} <= keys(states)
