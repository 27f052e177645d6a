"""The JSON of a run: machine, settings and measurements."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, NotRequired, TypedDict

from mshv_irqfd._cli.bench import designs, machine
from mshv_irqfd._cli.bench.measure import interval

if TYPE_CHECKING:
    from pathlib import Path

    from mshv_irqfd._cli.bench.measure import Cell, Plan, Ratio

FORMAT = 1
KEYS = {"machine", "settings", "rows", "scenarios"}


class Summary(TypedDict):
    """The samples of one design."""

    median_ns: float
    median_low_ns: float
    median_high_ns: float
    p99_ns: float
    samples: int
    calls_per_sample: int


class Compared(TypedDict):
    """A ratio of times and its 95 % interval."""

    value: float
    low: float
    high: float


class Row(TypedDict):
    """One workload at one number of routes."""

    workload: str
    routes: int
    left_out: str | None
    designs: dict[str, Summary]
    ratios: dict[str, dict[str, Compared]]
    """By design of the package, then by the design that it is compared with."""


class Scenario(TypedDict):
    """A measurement other than the latency of one call."""

    name: str
    what: str
    value: float
    low: float
    high: float
    unit: str


class Results(TypedDict):
    """A whole run."""

    format: int
    machine: dict[str, str | float]
    settings: dict[str, object]
    rows: list[Row]
    scenarios: list[Scenario]
    complete: NotRequired[bool]
    """False if Ctrl-C ended the run; older results do not say."""


class UnreadableError(Exception):
    """A file does not hold a result of this bench."""


def compared(ratio: Ratio) -> Compared:
    """A ratio, for JSON."""
    return {"value": ratio.value, "low": ratio.low, "high": ratio.high}


def row(cell: Cell) -> Row:
    """The summary of a cell."""
    summaries: dict[str, Summary] = {}
    ratios: dict[str, dict[str, Compared]] = {}
    for name, samples in cell.samples.items():
        middle = interval(samples)
        summaries[name] = {
            "median_ns": middle.value,
            "median_low_ns": middle.low,
            "median_high_ns": middle.high,
            "p99_ns": cell.percentile_99(name),
            "samples": len(samples),
            "calls_per_sample": cell.calls[name],
        }
        if is_ours(name):
            ratios[name] = {
                other: compared(ratio)
                for other in cell.samples
                if is_compared(name, other) and (ratio := cell.ratio(name, other)) is not None
            }
    return {
        "workload": cell.workload,
        "routes": cell.routes,
        "left_out": cell.left_out,
        "designs": summaries,
        "ratios": ratios,
    }


def is_ours(design: str) -> bool:
    """Whether a design is the package, not a baseline."""
    return design in designs.OURS


def is_compared(design: str, other: str) -> bool:
    """Whether a design of the package is compared with another: each with every baseline, the first with the rest."""
    return not is_ours(other) or (design == designs.OURS[0] != other)


def results(plan: Plan, rows: list[Row], scenarios: list[Scenario], *, complete: bool) -> Results:
    """A run."""
    return {
        "format": FORMAT,
        "machine": machine.describe(),
        "settings": asdict(plan),
        "rows": rows,
        "scenarios": scenarios,
        "complete": complete,
    }


def write(file: Path, run: Results) -> None:
    """Writes a run."""
    file.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def read(file: Path) -> Results:
    """Reads a run.

    Raises:
        UnreadableError: the file does not hold one.
    """
    try:
        run: Results = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnreadableError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise UnreadableError(f"{file} is not JSON: {error}") from error
    if not isinstance(run, dict) or run.get("format") != FORMAT or not run.keys() >= KEYS:
        raise UnreadableError(f"{file} is not a result of this version's bench (format {FORMAT})")
    return run
