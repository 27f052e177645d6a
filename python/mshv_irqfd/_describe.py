"""A partition at a glance: a table of its routes and its counters, as text or for `rich`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

from mshv_irqfd.errors import ClosedError, IrqFdError
from mshv_irqfd.values import DeliveryMode

if TYPE_CHECKING:
    from mshv_irqfd import _core
    from mshv_irqfd._core import MsiRoute

COLUMNS: Final = ("GSI", "state", "armed at", "MSI", "interrupt", "masked", "pending")


def interrupt(msi: MsiRoute) -> str:
    """The interrupt that an MSI is."""
    to = f"logical {msi.destination:#04x}" if msi.logical else f"APIC {msi.destination}"
    mode = "" if msi.delivery_mode is DeliveryMode.FIXED else f" {msi.delivery_mode.name}"
    return f"vector {msi.vector:#04x} to {to}{mode}"


def row(route: _core.IrqFdRoute) -> tuple[str, ...] | None:
    """The cells of a route; None if it was closed meanwhile."""
    try:
        msi, at = route.msi, route.armed_gsi
        return (
            str(route.gsi),
            route.state.name,
            "-" if at is None else str(at),
            "-" if msi is None else f"{msi.address:#010x}/{msi.data:#06x}",
            "-" if msi is None else interrupt(msi),
            "yes" if route.masked else "-",
            pending(route),
        )
    except ClosedError:
        return None


def pending(route: _core.IrqFdRoute) -> str:
    """Whether a signal is pending; "?" if other code has closed the eventfd, which the table is to show."""
    try:
        return "yes" if route.pending else "-"
    except IrqFdError:
        return "?"


class Description(str):
    """The table as text; `rich.print()` shows it as a table of its own."""

    __slots__ = ("_counters", "_rows", "_title")

    _title: str
    _rows: list[tuple[str, ...]]
    _counters: str

    def __new__(cls, partition: _core.Partition) -> Self:
        """Looks at every route once. Routes may change meanwhile: each cell is true, of its moment."""
        rows = [cells for route in partition.routes if (cells := row(route)) is not None]
        counters = ", ".join(f"{name} {value}" for name, value in partition.stats()._asdict().items())
        widths = [max(len(cells[column]) for cells in (COLUMNS, *rows)) for column in range(len(COLUMNS))]
        lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in (COLUMNS, *rows)]
        title = repr(partition)
        text = super().__new__(cls, "\n".join([title, *(lines if rows else ["no routes"]), counters]))
        text._title, text._rows, text._counters = title, rows, counters
        return text

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """A copy, or what is pickled, is the text alone: it has no partition to look at."""
        return str, (str(self),)

    def __rich__(self) -> Any:  # noqa: ANN401 -- a type of a package that need not be there
        """The table that `rich` shows."""
        from rich.markup import escape  # noqa: PLC0415 -- asked for by rich, so it is there
        from rich.table import Table  # noqa: PLC0415

        table = Table(title=escape(self._title), caption=escape(self._counters), title_justify="left")
        for column in COLUMNS:
            table.add_column(column)
        for cells in self._rows:
            table.add_row(*map(escape, cells))
        return table
