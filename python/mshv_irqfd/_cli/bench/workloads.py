"""The workloads of the bench, and the state of the routes that each begins and ends with."""

from __future__ import annotations

import random
from enum import Enum

FIRST_GSI = 24
VPS = 4
"""The number of VPs of every design's partition."""
STORM = 4093
"""The number of random retargets after which they repeat: a prime, so that no cycle of a design fits into it."""
WORKLOADS = {
    "create": "routes created, without an MSI",
    "bring-up": "routes created, routed and armed, one by one",
    "bring-up-made": "existing routes, routed and armed, one by one",
    "bring-up-batch": "existing routes, routed and armed in one batch",
    "msix-bring-up": "a device's vectors, set up by its guest's driver: masked, programmed, enabled",
    "msix-retarget": "one vector of a device given another message by its guest's driver: masked, programmed, unmasked",
    "retarget": "one route moved to another vector",
    "retarget-storm": "one random route moved to a random vector of a random VP",
    "retarget-all": "all routes moved to other vectors in one batch",
    "mask-unmask": "one route masked and unmasked",
    "push": "the table pushed while a single route is armed",
    "signal": "an armed eventfd written, until the interrupt is delivered",
    "tear-down": "all routes closed, one by one",
}


class Standing(Enum):
    """How far a design has brought up its routes."""

    NOTHING = 0
    MADE = 1
    ARMED = 2
    QUIET = 3
    """All are in the table, and a single one is armed."""
    DEVICE = 4
    """All are armed, and are vectors of devices. Only the package knows devices; for other designs it is `ARMED`."""


BEGINS = {
    "create": Standing.NOTHING,
    "bring-up": Standing.NOTHING,
    "bring-up-made": Standing.MADE,
    "bring-up-batch": Standing.MADE,
    "msix-bring-up": Standing.NOTHING,
    "msix-retarget": Standing.DEVICE,
    "push": Standing.QUIET,
}
"""The standing before a workload; `ARMED` for the others."""
ENDS = {
    "create": Standing.MADE,
    "bring-up": Standing.ARMED,
    "bring-up-made": Standing.ARMED,
    "bring-up-batch": Standing.ARMED,
    "msix-bring-up": Standing.ARMED,
    "msix-retarget": Standing.DEVICE,
    "push": Standing.QUIET,
    "tear-down": Standing.NOTHING,
}
"""The standing after a workload; `ARMED` for the others."""


def is_repeatable(workload: str) -> bool:
    """Whether a workload ends with the standing that it begins with, and so can be repeated at once."""
    return BEGINS.get(workload, Standing.ARMED) == ENDS.get(workload, Standing.ARMED)


def vector(index: int, *, turn: bool) -> int:
    """The vector of a route; `turn` alternates between its two vectors."""
    return 0x30 + index % 64 + (64 if turn else 0)


def storm(count: int) -> list[tuple[int, int, int]]:
    """Random retargets of `count` routes, the same in every run: the index of a route, a vector and a VP."""
    chosen = random.Random(count)  # noqa: S311 -- not for cryptography
    return [(chosen.randrange(count), 0x30 + chosen.randrange(128), chosen.randrange(VPS)) for _ in range(STORM)]
