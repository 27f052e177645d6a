"""A Linux guest on `examples/vmm`: its disks' interrupts are `MsixTable`, its kicks doorbells.

`lab/guest.c` is the guest's only program: it writes and reads its disks while it moves, masks and unbinds their
interrupts, and takes CPUs off line. Meanwhile the VMM is saved and restored twice, each time in another process. Here
the guest's log and the VMMs' counts are judged.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import vmm

KERNEL, INITRAMFS = "LAB_IMAGE", "LAB_INITRAMFS"
"""The environment variables with the guest's files; `lab/run` sets the first, `lab/check` the second."""

DISK = 2048 * 4096
ROUNDS = {"moves": 20, "masks": 3, "offline": 2, "unbind": 2}
CPUS = DISKS = 2

EXPECTED = re.compile(
    # The lab's kernel has KVM, which finds no SVM in the guest.
    r"kvm_amd: SVM not supported by CPU \d"
)


class Run:
    """What a guest printed, and what its VMMs counted, one after the other."""

    def __init__(self, output: str, reports: list[dict[str, Any]], disks: list[Path]) -> None:
        self.lines, self.reports, self.disks = output.splitlines(), reports, disks
        self.counts = Counter[str]()
        for line in self.lines:
            if found := re.fullmatch(r"guest: (\w+) (\d+)", line):
                self.counts[found[1]] += int(found[2])


# The first test runs the whole guest, which gives up only after a minute without I/O.
pytestmark = pytest.mark.timeout(390)

SAVES = ["moves", "masks"]
"""The steps at whose beginning the VMM saves the guest, with I/O under way, and another process goes on with it."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run of the guest, in three processes, which the tests look at from several sides."""
    if not Path("/dev/hvstub").exists() or INITRAMFS not in os.environ:
        pytest.skip(f"needs the lab, and {INITRAMFS}: run `make lab`")
    work = tmp_path_factory.mktemp("vmm")
    disks = [work / f"disk{number}" for number in range(DISKS)]
    machine = ["--memory", "96", "--cpus", str(CPUS)]
    # The queues of the first disk share a vector, which root may move. Each of the second disk's has its own, which the
    # kernel binds to CPUs.
    for disk, vectors in zip(disks, (2, CPUS + 1), strict=True):
        disk.touch()
        os.truncate(disk, DISK)
        machine += ["--disk", str(disk), "--vectors", str(vectors)]
    words = " ".join(["quiet", *(f"{name}={rounds}" for name, rounds in ROUNDS.items())])
    source = ["--kernel", os.environ[KERNEL], "--initrd", os.environ[INITRAMFS], "--append", words]
    output, reports = "", list[dict[str, Any]]()
    for number, step in enumerate([*SAVES, None]):
        saved, report = work / f"saved{number}", work / f"report{number}"
        output += until(step, [*machine, *source, "--save", str(saved), "--report", str(report)])
        reports.append(json.loads(report.read_text()))
        if not saved.exists():
            break  # the guest has ended: done, or because it failed
        source = ["--restore", str(saved)]
    return Run(output, reports, disks)


def until(step: str | None, words: list[str]) -> str:
    """Runs a VMM until the guest ends, or begins a step: then the VMM saves it. Returns what the guest printed."""
    paths = [str(Path(vmm.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "vmm", *words]
    output = ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as running:
        try:
            assert running.stdout is not None
            assert running.stderr is not None
            for line in running.stdout:
                output += line
                if line.rstrip() == f"guest: begins {step}":
                    running.send_signal(signal.SIGUSR2)
            status, complaints = running.wait(), running.stderr.read()
        finally:
            running.kill()
    assert (status, complaints) == (0, ""), output
    return output


def test_the_guest_finds_every_byte_as_it_wrote_it(run: Run) -> None:
    assert "guest: done" in run.lines, run.lines
    assert run.counts["cpus"] == CPUS
    assert run.counts["disks"] == DISKS
    assert min(run.counts[name] for name in ("reads", "writes", "flushes")) > 0
    assert run.counts["crc32"] == sum(zlib.crc32(disk.read_bytes()) for disk in run.disks)


def test_the_guest_went_on_in_other_processes(run: Run) -> None:
    assert len(run.reports) == len(SAVES) + 1
    for report in run.reports:
        assert sum(sum(disk["requests"].values()) for disk in report["disks"]) > 0


def test_no_request_waits_for_an_interrupt_that_was_lost(run: Run) -> None:
    # The guest's driver has no timer: a request whose interrupt is lost waits for the next one of its vector. If all of
    # them wait, no I/O makes progress, and the guest gives up.
    assert 0 < run.counts["slowest_ms"] < 30_000


def test_the_log_of_the_guest_is_free_of_warnings(run: Run) -> None:
    warnings = [line.removeprefix("kernel: ") for line in run.lines if line.startswith("kernel: ")]
    assert [line for line in warnings if not EXPECTED.fullmatch(line)] == []


def test_interrupts_follow_where_the_guest_moves_them(run: Run) -> None:
    moves = ROUNDS["moves"] + ROUNDS["unbind"]
    # Of the first disk: one for changes of its configuration, which never comes, and the one of its queues; of the
    # second: only the first of these.
    assert run.counts["moved"] == 3 * moves
    assert run.counts["refused"] == CPUS * moves
    assert run.counts["followed"] == moves


def test_each_mask_left_an_interrupt_pending(run: Run) -> None:
    assert run.counts["masked"] == 2 * DISKS * ROUNDS["masks"]


def test_every_push_has_its_reason(run: Run) -> None:
    pushes = 0
    for report in run.reports:
        assert not [reason for reason in report["pushes"] if "unexplained" in reason]
        assert sum(report["pushes"].values()) == report["stats"]["pushes"] <= report["stats"]["misses"]
        assert report["stats"]["failures"] == 0
        pushes += report["stats"]["pushes"]
    # A push for each interrupt that is set up, at boot and after each binding, and for each that has moved.
    bindings = 1 + 2 * ROUNDS["unbind"]
    assert pushes >= bindings + ROUNDS["moves"]


def test_the_disks_served_what_the_guest_asked_for(run: Run) -> None:
    served = Counter[str]()
    for disk in [disk for report in run.reports for disk in report["disks"]]:
        assert disk["faults"] == []
        assert sum(disk["signals"].values()) <= sum(disk["requests"].values())
        served.update(disk["requests"])
    # The kernel looks for partitions, and the guest reads everything in the end.
    assert served["reads"] >= run.counts["reads"]
    assert (served["writes"], served["flushes"]) == (run.counts["writes"], run.counts["flushes"])
