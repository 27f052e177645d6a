"""The plot of latency against the number of routes: one panel for each workload, legible without colour."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter, NullLocator

from mshv_irqfd._cli.bench.workloads import WORKLOADS

if TYPE_CHECKING:
    from pathlib import Path

    from mshv_irqfd._cli.bench.results import Results

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


def write(file: Path, run: Results) -> None:
    """Writes the figure, in the format of the file's suffix: svg, png or pdf."""
    workloads = list(dict.fromkeys(row["workload"] for row in run["rows"] if row["designs"]))
    lines = max(1, -(-len(workloads) // COLUMNS))
    # Text in an svg stays text. Without hashes and a date, equal results give equal files.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mshv_irqfd", "font.size": 9}):
        figure = Figure(figsize=(11, 3 * lines + 0.6), layout="constrained")
        handles = {}
        for place, workload in enumerate(workloads, start=1):
            axes = figure.add_subplot(lines, COLUMNS, place)
            rows = [row for row in run["rows"] if row["workload"] == workload]
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
            axes.set_title(f"{workload}\n{WORKLOADS[workload]}", fontsize=8)
            axes.set_xscale("log")
            axes.set_yscale("log")
            ticks = sorted({row["routes"] for row in rows})
            axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_minor_formatter(NullFormatter())
            low, high = axes.get_ylim()
            if high < 10 * low:
                # A range below a decade may contain no power of ten to label.
                axes.yaxis.set_major_locator(LogLocator(subs=range(1, 10)))
                axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            axes.grid(visible=True, color="0.9")
        figure.supxlabel("live routes")
        figure.supylabel("median latency, microseconds")
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False)
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=150)
