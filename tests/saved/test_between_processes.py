"""A state goes from one process to another as JSON through a pipe, and the interrupts that waited arrive there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mshv_irqfd.testing import patience

if TYPE_CHECKING:
    from backends import Backend

HELPERS = Path(__file__).parents[1] / "helpers"

SAVE = """
import json, sys
from backends import Backend
from driver import Driver
from mshv_irqfd import MsixTable
from support import msi

backend = Backend(sys.argv[1])
guest = backend.guest(backend.open(vps=2))
armed, masked, bare = (guest.partition.new_irqfd_route() for _ in range(3))
armed.set_msi(msi(0x41, 1))
masked.set_msi(msi(0x42))
masked.mask()
masked.signal()
bare.signal()
driver = Driver(guest, 4)
driver.bring_up(msi(0x51), msi(0x52))
driver.mask(1)
driver[1].signal()
json.dump([guest.partition.save(), driver.table.save()], sys.stdout)
sys.stdout.flush()
driver.table.close()
guest.close()
"""

RESTORE = """
import json, sys
from backends import Backend
from driver import Driver
from mshv_irqfd import MsixTable
from support import counting, msi

backend = Backend(sys.argv[1])
states = json.load(sys.stdin)
guest = backend.guest(backend.open(vps=2))
partition = guest.partition
with counting(partition) as made:
    driver = Driver.of(guest, MsixTable.restore(partition, states[1]))
    armed, masked, bare = partition.restore(states[0]).values()
assert made.stats.pushes <= 2, made.stats
assert [partition.save(), driver.table.save()] == states
guest.receives_nothing()
armed.signal()
driver[0].signal()
guest.receives(msi(0x41, 1), msi(0x51))
masked.unmask()
guest.receives(msi(0x42))
bare.set_msi(msi(0x43))
guest.receives(msi(0x43))
driver.unmask(1)
guest.receives(msi(0x52))
driver.table.close()
guest.close()
print("restored")
"""


def run(code: str, backend: Backend, text: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code, backend.name],
        input=text,
        capture_output=True,
        text=True,
        timeout=2 * patience(),
        check=False,
        cwd=HELPERS,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_state_goes_through_a_pipe_to_another_process(backend: Backend) -> None:
    state = run(SAVE, backend)
    assert "\n" not in state
    assert run(RESTORE, backend, state) == "restored\n"


@pytest.mark.parametrize("indent", [None, 2])
def test_a_state_may_be_written_again_by_another_program(backend: Backend, indent: int | None) -> None:
    state = json.dumps(json.loads(run(SAVE, backend)), indent=indent, sort_keys=True)
    assert run(RESTORE, backend, state) == "restored\n"
