"""`mshv-irqfd probe`: passes on a kernel that behaves as expected, and reports each difference."""

from __future__ import annotations

import itertools
import json
import os
import re
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hvstub import HvStub, Scheduler
from mshv_irqfd._cli import main
from mshv_irqfd._cli.probe import rows, torn_pushes
from mshv_irqfd._cli.probe.scene import Scene

DEVICE = {"kvm": Path("/dev/kvm"), "mshv": Path("/dev/mshv")}
INTERRUPTS = Path("/dev/hvstub")


def arguments(backend: str) -> list[str]:
    if not DEVICE[backend].exists():
        pytest.skip(f"needs {DEVICE[backend]}" + (": run `make lab`" if backend == "mshv" else ""))
    if backend == "mshv" and INTERRUPTS.exists():
        with HvStub() as stub:
            if stub.scheduler == Scheduler.ROOT:
                pytest.skip("on the root scheduler vectors go into register pages, where the probe does not look")
        return ["probe", "--backend", backend, "--interrupts", str(INTERRUPTS)]
    return ["probe", "--backend", backend]


@pytest.mark.parametrize("backend", DEVICE)
def test_the_kernel_behaves_as_the_package_expects(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = main([*arguments(backend), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [row for row in report["rows"] if row["differs"]] == []
    assert status == 0
    assert report["backend"] == backend
    assert len(report["rows"]) == len(rows.ROWS)


@pytest.mark.parametrize("backend", DEVICE)
def test_a_kernel_that_behaves_otherwise_is_reported_with_the_row(
    backend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments(backend)
    (row,) = [row for row in rows.ROWS if row.done == "one eventfd on two GSIs"]
    monkeypatch.setattr(rows, "ROWS", [replace(row, mshv="accepted", kvm="accepted")])
    assert main(words) == 1
    assert "DIFFERS one eventfd on two GSIs" in capsys.readouterr().out


def test_without_a_device_the_probe_names_the_one_that_it_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", "--backend", "kvm", "--device", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("backend", "device", "said"),
    [("kvm", os.devnull, "goes with --backend mshv"), ("mshv", "/dev/none", "/dev/none: there is no such device")],
)
def test_an_observer_of_no_use_is_reported_before_probing(
    backend: str, device: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", "--backend", backend, "--interrupts", device]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["-1", "nan", "long"])
def test_no_number_of_seconds_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["probe", "--backend", "kvm", "--torn-pushes", seconds])
    assert f"'{seconds}' is not a number of seconds" in capsys.readouterr().err


def test_only_the_rows_asked_for_are_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments("kvm"), "--only", "GSI 9999"]) == 0
    assert "1 rows" in capsys.readouterr().out
    assert main([*arguments("kvm"), "--only", "no such row"]) == 2


def test_ctrl_c_leaves_the_rows_found_so_far(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments("kvm")
    measured = rows.measure
    left = iter([True, True, False])

    def interrupted(*row: Any) -> Any:
        if next(left):
            return measured(*row)
        raise KeyboardInterrupt

    monkeypatch.setattr(rows, "measure", interrupted)
    assert main([*words, "--json"]) == 130
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert [row["done"] for row in report["rows"]] == [row.done for row in rows.ROWS[:2]]
    assert report["complete"] is False
    assert shown.err == "interrupted after 2 rows\n"


def test_ctrl_c_during_a_race_ends_its_thread(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments("kvm")
    arrived, looks, threads = Scene.arrived, itertools.count(), threading.enumerate()

    def interrupted(scene: Scene) -> list[str] | None:
        if next(looks) == 10:
            raise KeyboardInterrupt
        return arrived(scene)

    monkeypatch.setattr(Scene, "arrived", interrupted)
    assert main([*words, "--only", "one signal concurrent with the arming"]) == 130
    assert threading.enumerate() == threads
    assert "interrupted after 0 rows" in capsys.readouterr().err


def test_ctrl_c_leaves_the_torn_signals_counted_so_far(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments("kvm")
    monkeypatch.setattr(torn_pushes, "SLICE", 0.01)
    left = iter([None] * 3)

    def interrupted(_text: str) -> None:
        if next(left, "end") == "end":
            raise KeyboardInterrupt

    monkeypatch.setattr(torn_pushes, "progress", SimpleNamespace(show=interrupted))
    monkeypatch.setattr(rows, "ROWS", rows.ROWS[:1])
    assert main([*words, "--torn-pushes", "60"]) == 130
    assert re.search(r"0 torn in [1-9]\d* pushes and \d+ signals", capsys.readouterr().out)
