"""The plot of latency against the number of routes, legible without colour.

One run gets a panel for each workload. Of several runs, each gets a column, and a workload's panels have one scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, NullLocator

from mshv_irqfd._cli.bench.workloads import WORKLOADS

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

    from mshv_irqfd._cli.bench.results import Results, Row

STYLES = {
    "package": ("black", "-", "o"),
    "no preload": ("black", "--", "o"),
    "no preload unquiesced": ("black", "-.", "o"),
    "floor": ("0.45", "-", "_"),
    "floor quiesced": ("0.45", "--", "|"),
    "floor moves": ("0.45", ":", "x"),
    "rebuild": ("black", ":", "s"),
    "plain Python": ("0.45", "-.", "^"),
}
"""Shade, line and marker of each design."""
COLUMNS = 3
MICROSECOND = 1e3


def write(file: Path, runs: list[Results]) -> None:
    """Writes the figure, in the format of the file's suffix: svg, png or pdf."""
    measured = [list(dict.fromkeys(row["workload"] for row in run["rows"] if row["designs"])) for run in runs]
    workloads = list(dict.fromkeys(workload for of_run in measured for workload in of_run))
    beside = len(runs) > 1
    columns = len(runs) if beside else COLUMNS
    lines = max(1, len(workloads) if beside else -(-len(workloads) // COLUMNS))
    # Text in an svg stays text. Without hashes and a date, equal results give equal files.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mshv_irqfd", "font.size": 9}):
        figure = Figure(figsize=(4.5 * columns if beside else 11, 3 * lines + 0.6), layout="constrained")
        handles: dict[str, Line2D] = {}
        for number, workload in enumerate(workloads):
            first: Axes | None = None
            for column, run in enumerate(runs):
                place = number * columns + column if beside else number
                axes = figure.add_subplot(lines, columns, place + 1, sharey=first)
                first = first or axes
                rows = [row for row in run["rows"] if row["workload"] == workload]
                handles |= _panel(axes, rows)
                of_run = f"{_name(run)}\n" if beside and number == 0 else ""
                axes.set_title(f"{of_run}{workload}\n{WORKLOADS.get(workload, '')}", fontsize=8)
            if first is not None:
                _label_decades(first)
        figure.supxlabel("live routes")
        figure.supylabel("median latency, microseconds")
        legend = min(len(handles), 3 * columns)
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=legend, frameon=False)
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=150)


def _name(run: Results) -> str:
    """What tells a run from others."""
    return f"{run['settings']['backend']}, Linux {run['machine']['kernel']}, {run['machine']['cpu']}"


def _panel(axes: Axes, rows: list[Row]) -> dict[str, Line2D]:
    """Draws one workload of one run. Returns the lines by design."""
    handles = {}
    for name, (shade, line, marker) in STYLES.items():
        found = [(row["routes"], row["designs"][name]["median_ns"]) for row in rows if name in row["designs"]]
        points = [(routes, time / MICROSECOND) for routes, time in found if time > 0]
        if points:
            (handles[name],) = axes.plot(
                *zip(*points, strict=True),
                color=shade,
                linestyle=line,
                marker=marker,
                markersize=4,
                markerfacecolor="white",
                linewidth=1.2,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({row["routes"] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, color="0.9")
    return handles


def _label_decades(axes: Axes) -> None:
    """A range below a decade may contain no power of ten to label."""
    low, high = axes.get_ylim()
    if high < 10 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=range(1, 10)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
