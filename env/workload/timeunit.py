"""Time columns into seconds. A number alone does not say its unit, so nobody guesses it here."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np

from engine.errors import SlalomError
from env.workload.rawfile import Table

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def to_seconds(table: Table, unit: str | None, multiplier: float | None) -> tuple[np.ndarray, str]:
    """Arrivals of the open-loop rows in seconds from the first, and the unit used.

    :raises SlalomError: unit missing or unknown, both given, values not sorted, not finite or not times
    """
    if multiplier is not None:
        if not (np.isfinite(multiplier) and multiplier > 0):
            raise SlalomError("multiplier", multiplier, "give seconds per unit, > 0")
        return _ascending(table, table.numbers("time") * multiplier), f"multiplier {multiplier}"
    if unit == "datetime":
        return _ascending(table, _datetimes(table)), unit
    if unit is None:
        raise SlalomError(f"{table.path.name}: time_unit", None, _choices(table))
    if unit not in UNITS:
        raise SlalomError("time_unit", unit, f"give one of {', '.join(UNITS)} or datetime")
    return _ascending(table, table.numbers("time") * UNITS[unit]), unit


def _ascending(table: Table, seconds: np.ndarray) -> np.ndarray:
    back = np.flatnonzero(np.diff(seconds) < 0)
    if len(back):
        row = int(back[0]) + 1
        raise SlalomError(f"{table.place(row)}, time", table.columns["time"][row], "sort the rows by time")
    return seconds - seconds[0]


def _datetimes(table: Table) -> np.ndarray:
    """Seconds from the first stamp; fractions of any length (Azure writes seven digits)."""
    raw = table.columns["time"]
    first: datetime | None = None
    seconds = np.empty(table.n)
    for row, text in enumerate(raw):
        try:
            head, _, fraction = _plain(text).partition(".")
            stamp = datetime.fromisoformat(head)
            first = first or stamp
            seconds[row] = (stamp - first).total_seconds() + (float(f"0.{fraction}") if fraction else 0.0)
        except (TypeError, ValueError):
            raise SlalomError(f"{table.place(row)}, time", text, "write times as YYYY-MM-DD HH:MM:SS.ffffff") from None
    return seconds


def _plain(text: Any) -> str:
    """UTC stamps without their zone; other zones are refused by ``fromisoformat`` arithmetic or here."""
    if not isinstance(text, str):
        raise TypeError(text)
    return text.strip().removesuffix("Z").removesuffix("+00:00")


def _choices(table: Table) -> str:
    """What the file would mean in each unit: the reader of the message knows which is right."""
    values = table.numbers("time")
    span, n = float(values[-1] - values[0]), max(table.n - 1, 1)
    shown = "; ".join(
        f"{unit}: {span * factor:,.6g} s long, {n / (span * factor):,.4g} req/s" if span > 0 else f"{unit}: 0 s long"
        for unit, factor in UNITS.items()
    )
    return f"the file does not say its unit, pass time_unit ({shown})"
