"""The whole API against a model: after every step the states, the table, the armed irqfds and the interrupts agree.

`MSHV_IRQFD_MODEL` sets how many runs of how many steps, as in "2000x50". A failing run ends with a script that
replays it.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest
from machine import Machine
from needs import need_faults
from stateful import run

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["simulated", "kvm", "adopted", "mshv"])
def test_after_any_steps_a_partition_matches_the_model(name: str) -> None:
    need_faults("kvm" if name == "adopted" else name)
    Machine.runs = Machine.steps = Machine.failed = Machine.races = Machine.pushes = Machine.hits = 0
    run(functools.partial(Machine, name), default="40x30")
    sys.stdout.write(
        f"{name}: {Machine.runs} runs, {Machine.steps} steps, {Machine.failed} calls failed, "
        f"{Machine.races} signals raced, {Machine.pushes} pushes, {Machine.hits} hits\n"
    )


def test_a_failing_run_ends_with_a_script_that_replays_it() -> None:
    machine = Machine("simulated")
    machine.begin(quiesce=None, size=2, any_vp=False, loading="all", routes=1)
    machine.change(number=0, action="set_msi", msi=1, racing=True, failures=[("assign_irqfd", 0, 1)])
    machine.model.pushes += 1
    with pytest.raises(AssertionError) as failure:
        machine.signal(number=0, how="thread")
    machine.teardown()
    (note,) = failure.value.__notes__
    _, _, script = note.partition("\n")
    assert script.endswith("machine.signal(number=0, how='thread')")
    # The replay succeeds, because the test spoiled the model and not the partition.
    replay = subprocess.run([sys.executable, "-c", script], cwd=HELPERS, check=False)
    assert replay.returncode == 0
