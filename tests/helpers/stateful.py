"""Runs of state machines, and what the machines of devices with MSI-X and MSI have in common."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal, Protocol

from backends import Backend
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from states import carried
from support import counting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mshv_irqfd import MsiCapability, MsiRoute, MsixTable

VPS = 2
"""The VPs of a device's partition."""


def run(machine: Callable[[], RuleBasedStateMachine], default: str = "30x30") -> None:
    """Runs a machine as often, and for as many steps, as `MSHV_IRQFD_MODEL` says: "2000x50", for example."""
    runs, _, steps = os.environ.get("MSHV_IRQFD_MODEL", default).partition("x")
    chosen = settings(
        max_examples=int(runs),
        stateful_step_count=int(steps),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    made: Any = machine
    run_state_machine_as_test(made, settings=chosen)


class _Vector(Protocol):
    pending: bool
    message: MsiRoute | None
    faulty: bool
    has_route: bool


class DeviceModel(Protocol):
    """A device in plain Python."""

    sent: list[MsiRoute]

    @property
    def vectors(self) -> Sequence[_Vector]:
        """Its vectors."""

    def masked(self, number: int) -> bool:
        """Whether the guest has masked a vector."""

    def live(self, number: int) -> bool:
        """Whether a vector may send."""

    def signal(self, vector: Any) -> None:
        """A signal of the device."""

    def reset(self) -> None:
        """A reset of the device."""


class DeviceMachine(RuleBasedStateMachine):
    """A device and its model: the steps that the device model makes, and what agrees after every step."""

    device: MsixTable | MsiCapability
    model: Any  # a DeviceModel, with the accesses of its guest

    def __init__(self, name: str) -> None:
        super().__init__()
        backend = Backend(name)
        self.guest = backend.guest(backend.open(vps=VPS))

    def use(self, device: MsixTable | MsiCapability, model: DeviceModel) -> None:
        """Takes another device in the place of the one so far."""
        if hasattr(self, "device"):
            self.device.close()
        self.device, self.model = device, model

    @rule(vector=st.integers(0, 4) | st.integers(0, 31), how=st.sampled_from(["signal", "signal", "event", "bare"]))
    def signal(self, vector: int, how: Literal["signal", "event", "bare"]) -> None:
        vector %= len(self.model.vectors)
        ours, model = self.device.vectors[vector], self.model.vectors[vector]
        match how:
            case "signal":
                ours.signal()
            case "event":
                ours.event.signal(3)
                model.has_route = True
            case "bare":
                os.eventfd_write(ours.event.fileno(), 1)
                model.has_route = True
        self.model.signal(model)

    @rule(vector=st.integers(0, 4) | st.integers(0, 31))
    def consume(self, vector: int) -> None:
        vector %= len(self.model.vectors)
        model = self.model.vectors[vector]
        assert self.device.vectors[vector].consume_pending() == model.pending
        model.pending = False

    @rule()
    def reset(self) -> None:
        self.device.reset()
        self.model.reset()

    def _forget_old_faults(self) -> None:
        """Only a vector that may send has a fault from here on."""
        for number, vector in enumerate(self.model.vectors):
            vector.faulty = vector.faulty and self.model.live(number)

    @rule()
    def retry(self) -> None:
        """No cause of a fault goes away here: what the guest's message needs is not there."""
        failed = {number for number, _ in self.device.retry_faults()}
        self._forget_old_faults()
        assert failed == self._faulty()

    @rule()
    def save_and_restore(self) -> None:
        state = carried(self.device.save())
        self.device.close()
        with counting(self.guest.partition) as made:
            self.device = type(self.device).restore(self.guest.partition, state)
        assert made.stats.pushes <= 1
        assert self.device.save() == state
        self._forget_old_faults()

    def _faulty(self) -> set[int]:
        return {number for number, vector in enumerate(self.model.vectors) if vector.faulty}

    @invariant()
    def agrees(self) -> None:
        self.guest.receives(*(message for message in self.model.sent if self.guest.reaches(message)))
        self.model.sent.clear()
        for number, (ours, vector) in enumerate(zip(self.device.vectors, self.model.vectors, strict=True)):
            route = ours.route
            assert (ours.masked, ours.pending) == (self.model.masked(number), vector.pending)
            assert (route.msi if route and route.armed else None) == vector.message
            # A message for a VP that is not there takes a route before it is refused.
            assert (route is not None) >= vector.has_route
            assert route is None or vector.has_route or vector.faulty or route.msi is None
        assert {number for number, _ in self.device.faults()} == self._faulty()

    def teardown(self) -> None:
        self.device.close()
        self.guest.close()
