"""`mshv-irqfd bench`: the latency of each call, compared with the bare ioctls, a rebuilt table, and plain Python.

Every design runs the same workloads on a partition of its own. Each round runs all designs in turn, so that other load
on the machine affects them alike: compare ratios, not times. The garbage collector is off during a measurement. Ctrl-C
ends the run with the results so far, and exit status 130.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mshv_irqfd import MshvIrqFdError, _core
from mshv_irqfd._cli.arguments import seconds
from mshv_irqfd._cli.bench import designs, machine, measure, results, scenarios
from mshv_irqfd._cli.bench.workloads import WORKLOADS
from mshv_irqfd._cli.progress import INTERRUPTED

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace, _SubParsersAction
    from collections.abc import Iterable

ROUTES = (1, 16, 64, 256, 1024, 2000)
MOST_ROUTES = 4056
"""KVM's table holds no more beside its pins."""
QUICK_ROUTES = (1, 16)
SHORTEST = 0.01
"""The least time to measure a rate for, in seconds."""
PLOTS = (".svg", ".png", ".pdf")


def add_parser(subcommands: _SubParsersAction[ArgumentParser]) -> None:
    """Adds the subcommand and its options."""
    parser = subcommands.add_parser(
        "bench",
        help="measure every call, compared with the bare ioctls, a rebuilt table, and plain Python",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--backend",
        choices=["best", *designs.BACKENDS],
        default="best",
        help="the kernel to use; null does nothing, which leaves the time spent in user space (default: the best one "
        "that this machine has: mshv, kvm, else simulated)",
    )
    parser.add_argument(
        "--workloads",
        type=_workloads,
        default=list(WORKLOADS),
        metavar="NAME[,NAME...]",
        help=f"any of {', '.join(WORKLOADS)}, or none (default: all)",
    )
    parser.add_argument(
        "--designs",
        type=_designs,
        default=list(designs.MAKERS),
        metavar="NAME[,NAME...]",
        help=f"any of {', '.join(designs.MAKERS)} (default: all that the backend has)",
    )
    parser.add_argument(
        "--routes",
        type=_routes,
        metavar="N[,N...]",
        help=f"numbers of live routes, 1 to {MOST_ROUTES} (default: {','.join(map(str, ROUTES))})",
    )
    parser.add_argument(
        "--seconds",
        type=seconds,
        metavar="S",
        help="seconds for each workload at each number of routes (default: 2)",
    )
    parser.add_argument(
        "--longest",
        type=seconds,
        default=20.0,
        metavar="S",
        help="a design skips a workload if a call would take longer than this (default: 20)",
    )
    parser.add_argument(
        "--scenarios",
        type=_scenarios,
        default=list(scenarios.ALL),
        metavar="NAME[,NAME...]",
        help=f"any of {', '.join(scenarios.ALL)}, or none (default: all)",
    )
    parser.add_argument("--no-scenarios", action="store_const", dest="scenarios", const=[], help="skip the scenarios")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test, not a measurement: few routes, few rounds, no scenarios"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--plot", type=_plot, metavar="FILE", help="plot latency against routes (svg, png or pdf)")
    parser.add_argument(
        "--beside",
        type=Path,
        action="append",
        default=[],
        metavar="RUN.json",
        help="plot this earlier run beside the new one; may be repeated",
    )
    parser.set_defaults(run=run)

    commands = parser.add_subparsers(metavar="compare A.json B.json | plot FILE RUN.json...")
    drawn = commands.add_parser("plot", help="plot earlier runs side by side, and measure nothing")
    drawn.add_argument("plot", type=_plot, metavar="FILE", help="svg, png or pdf")
    drawn.add_argument("runs", type=Path, nargs="+", metavar="RUN.json")
    drawn.set_defaults(run=run_plot)
    compare = commands.add_parser("compare", help="show the differences between two runs")
    compare.add_argument("before", type=Path, metavar="A.json")
    compare.add_argument("after", type=Path, metavar="B.json")
    compare.set_defaults(run=run_compare)


def _workloads(text: str) -> list[str]:
    return _names(text, "a workload", WORKLOADS)


def _scenarios(text: str) -> list[str]:
    return _names(text, "a scenario", scenarios.ALL)


def _designs(text: str) -> list[str]:
    return _names(text, "a design", designs.MAKERS)


def _names(text: str, what: str, known: Iterable[str]) -> list[str]:
    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not {what}; choose from {', '.join(known)}")
    return names


def _routes(text: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,16,2000") from None
    if numbers[0] < 1 or numbers[-1] > MOST_ROUTES:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of routes is 1 to {MOST_ROUTES}")
    return numbers


def _plot(text: str) -> Path:
    file = Path(text)
    if file.suffix not in PLOTS:
        raise argparse.ArgumentTypeError(f"{text!r} must end in {', '.join(PLOTS)}")
    return file


def _missing(*packages: str) -> str | None:
    """The message for missing packages; None if none is missing."""
    missing = [package for package in packages if find_spec(package) is None]
    if not missing:
        return None
    return f'the bench needs {" and ".join(missing)}: pip install "mshv_irqfd[bench]"'


def _best() -> str:
    for node in ("mshv", "kvm"):
        if Path("/dev", node).exists():
            return node
    return "simulated"


def _say(problem: str) -> int:
    print(f"mshv-irqfd bench: {problem}", file=sys.stderr)
    return 2


def _warn_of_debug_build(subject: str) -> None:
    print(
        f"WARNING: {subject} a debug build of mshv_irqfd: its times do not apply to a release. "
        "Use `make bench`, or an installed wheel.",
        file=sys.stderr,
    )


def run_compare(options: Namespace) -> int:
    """Shows the differences between two runs; 2 if one cannot be read."""
    if problem := _missing("rich"):
        return _say(problem)
    from mshv_irqfd._cli.bench import report  # noqa: PLC0415 -- needs an extra

    try:
        before, after = results.read(options.before), results.read(options.after)
    except results.UnreadableError as error:
        return _say(str(error))
    for file, read in ((options.before, before), (options.after, after)):
        if machine.is_debug(read["machine"]):
            _warn_of_debug_build(f"{file} is of")
    report.show_difference(report.console(), before, after)
    return 0


def run_plot(options: Namespace) -> int:
    """Plots earlier runs side by side; 2 if one cannot be read."""
    if problem := _missing("rich", "matplotlib") or _unwritable(options.plot):
        return _say(problem)
    from mshv_irqfd._cli.bench import plot  # noqa: PLC0415 -- needs an extra

    try:
        runs = [results.read(file) for file in options.runs]
    except results.UnreadableError as error:
        return _say(str(error))
    plot.write(options.plot, runs)
    return 0


def _unwritable(file: Path | None) -> str | None:
    """Why a file can't be written, before something is measured for it; None if it can."""
    if file is None:
        return None
    if not file.absolute().parent.is_dir():
        return f"{file}: no such directory"
    if file.is_dir():
        return f"{file} is a directory"
    fine = os.access(file if file.exists() else file.absolute().parent, os.W_OK)
    return None if fine else f"{file}: no permission to write it"


def run(options: Namespace) -> int:
    """Measures, and shows the results; 2 if a requirement is missing."""
    if problem := _missing("rich", *(["matplotlib"] if options.plot else [])):
        return _say(problem)
    from mshv_irqfd._cli.bench import report  # noqa: PLC0415 -- needs an extra

    if problem := _unwritable(options.json) or _unwritable(options.plot):
        return _say(problem)
    if options.beside and not options.plot:
        return _say("--beside goes with --plot FILE")
    try:
        beside = [results.read(file) for file in options.beside]
    except results.UnreadableError as error:
        return _say(str(error))
    quick = options.quick
    plan = measure.Plan(
        backend=_best() if options.backend == "best" else options.backend,
        workloads=options.workloads,
        routes=options.routes or list(QUICK_ROUTES if quick else ROUTES),
        seconds=options.seconds if options.seconds is not None else (0.0 if quick else 2.0),
        longest=options.longest,
        rounds=2 if quick else measure.LEAST_ROUNDS,
        designs=options.designs,
    )
    if _core.DEBUG_BUILD:
        _warn_of_debug_build("this is")
    terminal = report.console()
    try:
        found = _measure(plan, chosen=[] if quick else options.scenarios)
    except (MshvIrqFdError, machine.TooFewDescriptorsError, OSError) as error:
        return _say(str(error))
    report.show(terminal, found)
    if options.json:
        results.write(options.json, found)
    if options.plot:
        from mshv_irqfd._cli.bench import plot  # noqa: PLC0415 -- needs an extra

        plot.write(options.plot, [found, *beside])
    if _core.DEBUG_BUILD:
        _warn_of_debug_build("this is")
    return 0 if found.get("complete", True) else INTERRUPTED


def _measure(plan: measure.Plan, chosen: list[str]) -> results.Results:
    from mshv_irqfd._cli.bench import report  # noqa: PLC0415 -- needs an extra

    measurement = measure.Measurement(plan)
    if plan.workloads:
        machine.raise_descriptor_limit(max(plan.routes) * len(measurement.designs))
    rows: list[results.Row] = []
    further: list[results.Scenario] = []
    with report.progress_bar() as bar:
        task = bar.add_task("", total=1.0)

        def progress(part: float, text: str) -> None:
            bar.update(task, completed=part, description=text)

        complete = False
        # What Ctrl-C interrupts is left out; what was measured before is not.
        with suppress(KeyboardInterrupt):
            for cell in measurement.cells(progress):
                rows.append(results.row(cell))  # noqa: PERF401 -- those before a Ctrl-C stay
            for name in chosen:
                bar.update(task, description=name)
                further += scenarios.ALL[name](plan.backend, min(1.0, max(SHORTEST, plan.seconds)))
            complete = True
    return results.results(plan, rows, further, complete=complete)
