"""Terminal output: the progress bar, the tables of a run, the comparison of two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mshv_irqfd._cli.bench.designs import OURS
from mshv_irqfd._cli.bench.measure import MOST_SPREAD, Ratio
from mshv_irqfd._cli.bench.workloads import WORKLOADS

if TYPE_CHECKING:
    from mshv_irqfd._cli.bench.results import Compared, Results, Row

WIDTH = 200
"""Columns if the output is not a terminal."""


def console() -> Console:
    """A console for standard output; if that is a file, wide enough for the tables."""
    found = Console()
    return found if found.is_terminal else Console(width=WIDTH)


def progress_bar() -> Progress:
    """A progress bar on standard error, removed at the end. Shows nothing where that is not a terminal."""
    terminal = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    return Progress(*columns, TimeElapsedColumn(), console=terminal, transient=True, disable=not terminal.is_terminal)


def time(nanoseconds: float) -> str:
    """A time to three digits, with its unit."""
    for limit, unit, size in ((999.5, "ns", 1.0), (999.5e3, "us", 1e3), (999.5e6, "ms", 1e6)):
        if nanoseconds < limit:
            return f"{nanoseconds / size:.3g} {unit}"
    return f"{nanoseconds / 1e9:.3g} s"


def ratio(found: Compared) -> str:
    """A ratio (1/n if below a half) and the spread of its interval; a dash if the interval is too wide."""
    value = Ratio(**found)
    if not value.is_meaningful:
        return "-"
    if value.value > 1000:  # noqa: PLR2004 -- against the null kernel
        return ">1000"
    if value.value > 0.5:  # noqa: PLR2004 -- half
        shown = f"{value.value:.2f}"
    else:
        # Three digits, and never an exponent.
        times = 1 / value.value
        shown = f"1/{times:.3g}" if times < 999.5 else f"1/{times:.0f}"  # noqa: PLR2004 -- as above
    return f"{shown} ±{100 * value.spread:.0f}%"


def table(workload: str, rows: list[Row]) -> Table:
    """The rows of one workload: a line for each design, with the ratios of the package's designs to it."""
    shown = Table(title=f"{workload}: {WORKLOADS[workload]}", title_justify="left")
    ours = [name for name in OURS if any(name in row["ratios"] for row in rows)]
    shown.add_column("routes", justify="right")
    shown.add_column("design")
    for heading in ("median", "p99", *(f"{name} / it" for name in ours)):
        shown.add_column(heading, justify="right")
    for row in rows:
        for name, summary in row["designs"].items():
            cells = [str(row["routes"]), name, time(summary["median_ns"]), time(summary["p99_ns"])]
            found = (row["ratios"].get(our, {}).get(name) for our in ours)
            shown.add_row(*cells, *(ratio(compared) if compared else "" for compared in found))
        if row["left_out"]:
            shown.add_row(str(row["routes"]), f"skipped: {row['left_out']}")
        shown.add_section()
    return shown


def show(terminal: Console, run: Results) -> None:
    """A whole run."""
    machine = run["machine"]
    terminal.print(
        f"{run['settings']['backend']} on Linux {machine['kernel']}, {machine['cpus']} CPUs ({machine['cpu']}), "
        f"load {machine['load']}; mshv_irqfd {machine['mshv_irqfd']}, {machine['python']}"
    )
    terminal.print(
        "A ratio is the time of a design of the package divided by that of the line's design in the same round: the "
        f"median over the rounds, with its 95 % interval. A dash stands for an interval wider than "
        f"±{100 * MOST_SPREAD:.0f} %.\n"
    )
    for workload in dict.fromkeys(row["workload"] for row in run["rows"]):
        terminal.print(table(workload, [row for row in run["rows"] if row["workload"] == workload]))
    if not run.get("complete", True):
        terminal.print("Ctrl-C ended this run: what had been measured by then.")
    if run["scenarios"]:
        shown = Table(title="scenarios", title_justify="left")
        for heading in ("name", "what"):
            shown.add_column(heading)
        shown.add_column("value (interval)", justify="right")
        for found in run["scenarios"]:
            value = f"{found['value']:.4g} ({found['low']:.4g} to {found['high']:.4g}) {found['unit']}"
            shown.add_row(found["name"], found["what"], value.rstrip())
        terminal.print(shown)


def show_difference(terminal: Console, before: Results, after: Results) -> None:
    """The differences between two runs, design by design."""
    for name, run in (("A", before), ("B", after)):
        machine, settings = run["machine"], run["settings"]
        terminal.print(
            f"{name}: {settings['backend']}, Linux {machine['kernel']}, {machine['cpu']}, "
            f"mshv_irqfd {machine['mshv_irqfd']}, {machine['python']}"
        )
    shown = Table()
    for heading in ("workload", "routes", "design"):
        shown.add_column(heading)
    for heading in ("A", "B", "B / A", ""):
        shown.add_column(heading, justify="right")
    old = {(row["workload"], row["routes"]): row["designs"] for row in before["rows"]}
    for row in after["rows"]:
        for name, new in row["designs"].items():
            was = old.get((row["workload"], row["routes"]), {}).get(name)
            if was is None:
                continue
            if new["median_low_ns"] > was["median_high_ns"]:
                verdict = "slower"
            elif new["median_high_ns"] < was["median_low_ns"]:
                verdict = "faster"
            else:
                verdict = "no clear difference"
            factor = new["median_ns"] / was["median_ns"] if was["median_ns"] else 1.0
            times = time(was["median_ns"]), time(new["median_ns"])
            shown.add_row(row["workload"], str(row["routes"]), name, *times, f"{factor:.2f}", verdict)
    terminal.print(shown)
