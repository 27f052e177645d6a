"""`mshv-irqfd bench`: its parts work, and report their limits. No test checks a speed."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from importlib.util import find_spec
from itertools import chain, islice, repeat
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("rich", reason='the bench needs its extra: pip install "mshv_irqfd[bench]"')

from mshv_irqfd import MissingVpError, MsiRoute, _core, open_partition
from mshv_irqfd import _cli as cli
from mshv_irqfd._cli import bench
from mshv_irqfd._cli.bench import designs, machine, measure, results, scenarios
from mshv_irqfd._cli.bench.package import Package
from mshv_irqfd._cli.bench.workloads import WORKLOADS
from needs import need

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def has(backend: str) -> bool:
    return backend in ("simulated", "null") or os.access(f"/dev/{backend}", os.R_OK | os.W_OK)


needs_matplotlib = pytest.mark.skipif(
    find_spec("matplotlib") is None, reason='plots need the extra: pip install "mshv_irqfd[bench]"'
)
BACKENDS = [
    pytest.param(backend, marks=pytest.mark.skipif(not has(backend), reason=f"needs /dev/{backend}"))
    for backend in designs.BACKENDS
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_quick_run_measures_every_workload_with_every_design(backend: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    assert cli.main(["bench", "--quick", "--backend", backend, "--routes", "1,5", "--json", str(file)]) == 0
    run = results.read(file)
    assert [(row["routes"], row["workload"]) for row in run["rows"]] == [
        (routes, workload) for routes in (1, 5) for workload in WORKLOADS
    ]
    for row in run["rows"]:
        ran = {name for name in designs.of_backend(backend) if designs.runs(name, row["workload"])}
        assert set(row["designs"]) == ran
        for summary in row["designs"].values():
            assert 0 <= summary["median_low_ns"] <= summary["median_ns"] <= summary["median_high_ns"]
            assert summary["samples"] >= 2
            assert summary["calls_per_sample"] >= 1
        for ours, ratios in row["ratios"].items():
            assert results.is_ours(ours)
            assert set(ratios) == {name for name in row["designs"] if results.is_compared(ours, name)}
    assert run["machine"]["kernel"] == os.uname().release
    assert run["settings"]["backend"] == backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_workload_of_a_python_design_can_follow_any_other(backend: str) -> None:
    for name in designs.of_backend(backend):
        design = designs.MAKERS[name](backend, 3)
        try:
            for first in WORKLOADS:
                for second in WORKLOADS:
                    assert design.run(first, 2) >= 0
                    assert design.run(second, 1) >= 0
        finally:
            design.close()


@pytest.mark.parametrize("workload", ["bring-up", "bring-up-made"])
@pytest.mark.parametrize(("preload", "pushes"), [(True, 1), (False, 4)])
def test_a_bring_up_one_by_one_begins_with_an_empty_table(*, workload: str, preload: bool, pushes: int) -> None:
    package = Package("simulated", 4, preload=preload)
    try:
        for _ in range(3):
            package.run(workload, 1)
            assert package.partition.stats().pushes == pushes
            assert all(route.armed for route in package.routes)
    finally:
        package.close()


@pytest.mark.parametrize(("preload", "pushes"), [(True, 0), (False, 20)])
@pytest.mark.parametrize("workload", ["msix-retarget", "retarget", "retarget-storm"])
def test_every_retarget_is_a_push_without_preloading_and_none_is_with_it(
    *, workload: str, preload: bool, pushes: int
) -> None:
    package = Package("simulated", 4, preload=preload)
    try:
        package.run(workload, 1)
        before = package.partition.stats().pushes
        package.run(workload, 20)
        # A random MSI may be the one that the route has.
        made = package.partition.stats().pushes - before
        assert pushes - 1 <= made <= pushes
    finally:
        package.close()


@needs_matplotlib
@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_plot_is_drawn_from_a_run(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"plot.{suffix}"
    # In another process, because numpy keeps threads.
    arguments = ["bench", "--quick", "--backend", "null", "--workloads", "retarget", "--plot", str(file)]
    subprocess.run([sys.executable, "-m", "mshv_irqfd._cli", *arguments], check=True, capture_output=True)
    assert file.read_bytes()[:4] == {"svg": b"<?xm", "png": b"\x89PNG"}[suffix]


def test_comparing_tells_slower_rows_from_unchanged_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tmp_path / "a.json"
    arguments = ["bench", "--quick", "--backend", "null", "--routes", "1", "--workloads", "retarget,signal"]
    assert cli.main([*arguments, "--json", str(before)]) == 0
    run = results.read(before)
    # Fixed figures of the same shape, without the noise of a measurement.
    for row in run["rows"]:
        row["designs"]["package"] |= {"median_ns": 1000.0, "median_low_ns": 990.0, "median_high_ns": 1010.0}
    results.write(before, run)
    for name in ("median_ns", "median_low_ns", "median_high_ns"):
        run["rows"][0]["designs"]["package"][name] *= 10
    after = tmp_path / "b.json"
    results.write(after, run)
    capsys.readouterr()
    assert cli.main(["bench", "compare", str(before), str(after)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " package " in line]
    assert ["slower" in line for line in lines] == [True, False]
    assert "10.00" in lines[0]
    assert "no clear difference" in lines[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backend", "xen"], "invalid choice"),
        (["--workloads", "push,pull"], "'pull' is not a workload"),
        (["--scenarios", "memory,mercury"], "'mercury' is not a scenario"),
        (["--designs", "floor,ceiling"], "'ceiling' is not a design"),
        (["--routes", "0"], "a number of routes is 1 to"),
        (["--routes", "5000"], "a number of routes is 1 to"),
        (["--routes", "many"], "not a list of numbers"),
        (["--seconds", "-1"], "not a number of seconds"),
        (["--seconds", "nan"], "not a number of seconds"),
        (["--plot", "plot.gif"], "must end in"),
    ],
)
def test_a_bad_option_is_refused_with_a_correction(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", *arguments])
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


@needs_matplotlib
@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_missing_directory_is_reported_before_measuring(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", option, str(tmp_path / "none" / "run.svg")]) == 2
    assert "no such directory" in capsys.readouterr().err


def test_a_directory_in_the_place_of_a_file_is_reported_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "--json", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"mshv-irqfd bench: {tmp_path} is a directory\n"


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("rich", ["bench"]),
        ("matplotlib", ["bench", "--plot", "plot.svg"]),
        ("rich", ["bench", "compare", "a.json", "b.json"]),
    ],
)
def test_a_missing_extra_is_reported_with_the_command_that_installs_it(
    missing: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda name: None if name == missing else object())
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f'mshv-irqfd bench: the bench needs {missing}: pip install "mshv_irqfd[bench]"\n'


@pytest.mark.parametrize(("debug", "warnings"), [(True, 2), (False, 0)])
def test_a_debug_build_is_warned_of_before_and_after_and_in_a_comparison(
    *, debug: bool, warnings: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_core, "DEBUG_BUILD", debug)
    file = str(tmp_path / "run.json")
    quick = ["bench", "--quick", "--backend", "null", "--routes", "1", "--workloads", "push"]
    assert cli.main([*quick, "--json", file]) == 0
    assert capsys.readouterr().err.count("debug build") == warnings
    assert results.read(tmp_path / "run.json")["machine"]["build"] == ("debug" if debug else "release")
    assert cli.main(["bench", "compare", file, file]) == 0
    assert capsys.readouterr().err.count("debug build") == warnings


def test_a_file_that_is_no_result_is_reported_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, text in enumerate(["", "[]", json.dumps({"format": -1})]):
        file = tmp_path / f"{number}.json"
        file.write_text(text)
        assert cli.main(["bench", "compare", str(file), str(file)]) == 2
        assert str(file) in capsys.readouterr().err


def test_too_few_descriptors_are_reported_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_kind: int, _limits: tuple[int, int]) -> None:
        raise PermissionError

    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (1024, 1024))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    machine.raise_descriptor_limit(100)
    with pytest.raises(machine.TooFewDescriptorsError, match="ulimit -Hn"):
        machine.raise_descriptor_limit(10_000)


def test_the_soft_limit_is_raised_to_the_hard_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (1024, 20_000))
    monkeypatch.setattr(resource, "setrlimit", lambda _kind, limits: asked.append(limits))
    machine.raise_descriptor_limit(10_000)
    assert asked == [(20_000, 20_000)]


def test_a_ratio_compares_one_round_and_means_nothing_if_it_spreads() -> None:
    steady = measure.Cell("push", 1, {"package": [2.0, 20.0, 200.0], "floor": [1.0, 10.0, 100.0]})
    ratio = steady.ratio("package", "floor")
    assert ratio is not None
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    assert ratio.is_meaningful
    spread = measure.interval([1.0, 2.0, 4.0])
    assert not spread.is_meaningful


def test_a_cell_that_would_take_too_long_is_left_out_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    arguments = ["bench", "--quick", "--backend", "null", "--routes", "1,64", "--workloads", "create", "--longest", "0"]
    assert cli.main([*arguments, "--json", str(file)]) == 0
    assert "skipped" in capsys.readouterr().out
    assert [row["left_out"] is None for row in results.read(file)["rows"]] == [True, False]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.046, "1.05 ±0%"), (0.6, "0.60 ±0%"), (0.1008, "1/9.92 ±0%"), (1 / 1090, "1/1090 ±0%"), (2000.0, ">1000")],
)
def test_a_ratio_is_shown_in_a_readable_form(value: float, shown: str) -> None:
    report = pytest.importorskip("mshv_irqfd._cli.bench.report", reason="needs rich")
    assert report.ratio({"value": value, "low": value, "high": value}) == shown


def test_a_design_is_not_measured_on_the_caches_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    last: list[object] = []

    class Cold:
        def run(self, _workload: str, calls: int) -> int:
            """Ten times as slow on the first call after another design."""
            cold = last != [self]
            last[:] = [self]
            return measure.SAMPLE * (calls + 9 * cold)

        def close(self) -> None:
            pass

    monkeypatch.setattr(designs, "MAKERS", {name: lambda _backend, _count: Cold() for name in ("package", "floor")})
    monkeypatch.setattr(designs, "of_backend", lambda _backend: ["package", "floor"])
    plan = measure.Plan("null", ["retarget"], [1], seconds=0.0, longest=4.0)
    (cell,) = measure.Measurement(plan).cells(lambda _part, _text: None)
    assert {sample for samples in cell.samples.values() for sample in samples} == {measure.SAMPLE}


def test_a_cell_that_is_slow_only_at_first_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = chain([1000.0], repeat(0.001))

    class Slow:
        def run(self, _workload: str, _calls: int) -> int:
            self.clock += int(next(seconds) * 1e9)
            return measure.SAMPLE

        clock = 0

        def close(self) -> None:
            pass

    slow = Slow()
    monkeypatch.setattr(measure, "perf_counter_ns", lambda: slow.clock)
    monkeypatch.setattr(designs, "MAKERS", {"package": lambda _backend, _count: slow})
    monkeypatch.setattr(designs, "of_backend", lambda _backend: ["package"])
    plan = measure.Plan("null", ["retarget"], [1, 16, 2000], seconds=0.0, longest=4.0)
    cells = list(measure.Measurement(plan).cells(lambda _part, _text: None))
    assert [cell.left_out for cell in cells] == [None, None, None]


@pytest.mark.parametrize("name", list(scenarios.ALL))
def test_every_scenario_measures_on_a_small_scale(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenarios, "PARTITIONS", 2)
    monkeypatch.setattr(scenarios, "ROUTES", 8)
    backend = "kvm" if name == "handler" else "simulated"
    if backend == "kvm":
        need("kvm")
    found = scenarios.ALL[name](backend, 0.01)
    assert found
    assert len({scenario["what"] for scenario in found}) == len(found)
    for scenario in found:
        assert scenario["low"] <= scenario["value"] <= scenario["high"]


def test_scenarios_measure_something_in_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenarios, "ROUTES", 8)
    names, file = ["threads", "others", "responsiveness"], tmp_path / "run.json"
    words = ["--backend", "simulated", "--workloads", "none", "--seconds", "0", "--scenarios", ",".join(names)]
    assert cli.main(["bench", *words, "--json", str(file)]) == 0
    found = json.loads(file.read_text())["scenarios"]
    assert list(dict.fromkeys(scenario["name"] for scenario in found)) == names
    assert all(scenario["value"] > 0 for scenario in found if "late ones" not in scenario["what"])


def test_the_others_are_signalled_while_one_route_moves() -> None:
    with open_partition("simulated", vps=4) as partition:
        *routes, moved = (partition.new_irqfd_route() for _ in range(4))
        for number, route in enumerate([*routes, moved]):
            route.set_msi(MsiRoute.fixed(0x41 + number, 0))
        msis = [MsiRoute.fixed(0x80 + number, number) for number in range(3)]
        times, late, moves = _core.signal_latencies(routes, moved, msis, 0.05)
        assert all(time > 0 for time in times)
        assert late == 0
        assert moves > 0
        assert moved.msi in msis
        assert _core.signal_latencies(routes, None, [], 0.01)[1:] == (0, 0)
        assert partition.take_interrupts() == []
        with pytest.raises(ValueError, match="at least one"):
            _core.signal_latencies([], moved, msis, 0.01)
        with pytest.raises(MissingVpError):
            _core.signal_latencies(routes, moved, [MsiRoute.fixed(0x80, 4)], 0.01)


@pytest.mark.skipif(not has("kvm"), reason="needs /dev/kvm")
def test_on_kvm_a_signal_is_in_the_irr_when_its_write_returns() -> None:
    with open_partition("kvm") as partition:
        route = partition.new_irqfd_route()
        route.set_msi(MsiRoute.fixed(0x41, 0))
        for _ in range(200):
            os.eventfd_write(route.fileno(), 1)
            assert [interrupt.vector for interrupt in partition.take_interrupts()] == [0x41]


def test_a_run_of_chosen_designs_compares_only_those(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    arguments = ["bench", "--quick", "--backend", "null", "--workloads", "retarget", "--designs", "package,floor moves"]
    assert cli.main([*arguments, "--json", str(file)]) == 0
    for row in results.read(file)["rows"]:
        assert list(row["designs"]) == ["package", "floor moves"]
        assert list(row["ratios"]["package"]) == ["floor moves"]
    assert "package / it" in capsys.readouterr().out


def test_a_run_without_workloads_measures_the_scenarios_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenarios, "ROUTES", 8)
    file = tmp_path / "run.json"
    arguments = ["bench", "--backend", "simulated", "--workloads", "none", "--scenarios", "others", "--seconds", "0.01"]
    assert cli.main([*arguments, "--json", str(file)]) == 0
    run = results.read(file)
    assert run["rows"] == []
    assert {scenario["name"] for scenario in run["scenarios"]} == {"others"}


@needs_matplotlib
def test_runs_are_plotted_side_by_side_with_a_column_for_each(tmp_path: Path) -> None:
    run, file = tmp_path / "run.json", tmp_path / "both.svg"
    arguments = ["bench", "--quick", "--routes", "1,2", "--workloads", "retarget,signal"]
    assert cli.main([*arguments, "--backend", "simulated", "--json", str(run)]) == 0
    drawn = [sys.executable, "-m", "mshv_irqfd._cli", "bench", "plot", str(file), str(run), str(run)]
    subprocess.run(drawn, check=True, capture_output=True)
    text = file.read_text()
    assert text.count(">simulated, Linux") == 2
    assert text.count(">signal<") == 2
    beside = [*arguments, "--backend", "null", "--plot", str(file), "--beside", str(run)]
    subprocess.run([sys.executable, "-m", "mshv_irqfd._cli", *beside], check=True, capture_output=True)
    assert [name in file.read_text() for name in (">null, Linux", ">simulated, Linux")] == [True, True]


def test_beside_without_a_plot_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--quick", "--backend", "null", "--beside", "run.json"]) == 2
    assert "--beside goes with --plot" in capsys.readouterr().err


def test_ctrl_c_leaves_what_was_measured_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    measured = measure.Measurement.cells

    def interrupted(self: measure.Measurement, progress: Callable[[float, str], None]) -> Iterator[measure.Cell]:
        yield from islice(measured(self, progress), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(measure.Measurement, "cells", interrupted)
    arguments = ["bench", "--quick", "--backend", "null", "--routes", "1", "--json", str(file)]
    assert cli.main(arguments) == 130
    run = results.read(file)
    assert [row["workload"] for row in run["rows"]] == list(WORKLOADS)[:2]
    assert run["complete"] is False
    shown = capsys.readouterr()
    assert "Ctrl-C ended this run" in shown.out
    assert "routes" not in shown.err, "progress is for terminals"
