"""Raw trace files: text, gzip, CSV and JSON Lines into columns that remember their line numbers."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.common.documents import json_of
from engine.common.lines import lines as lines_of
from engine.errors import SlalomError

#: A follow-up turn has no time.
_IN_EVERY_ROW = ("prompt", "output")


@dataclass(frozen=True)
class Table:
    """Columns of raw values under our names, with the line each row came from.

    :param columns: our name -> one raw value per row; absent optional values are None
    :param lines: int (n,), line in the file, from 1
    """

    path: Path
    columns: dict[str, list[Any]]
    lines: np.ndarray

    @property
    def n(self) -> int:
        return len(self.lines)

    def place(self, row: int) -> str:
        """``file: line 17``."""
        return f"{self.path.name}: line {int(self.lines[row])}"

    def rows_at(self, rows: np.ndarray) -> Table:
        """The table of these rows only."""
        if len(rows) == self.n:
            return self
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Table(self.path, columns, self.lines[rows])

    def keep(self, mask: np.ndarray, dropped: dict[str, int], reason: str) -> Table:
        """The rows where ``mask`` holds; the others are counted under ``reason``."""
        dropped[reason] = int((~mask).sum())
        if not mask.any():
            raise SlalomError(self.path.name, self.n, f"every row was dropped ({reason}); give another file")
        return self.rows_at(np.flatnonzero(mask))

    def numbers(self, name: str) -> np.ndarray:
        """f8 (n,); every value must be a finite number."""
        values = self.optional_numbers(name)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            row = int(bad[0])
            raise SlalomError(f"{self.place(row)}, {name}", self.columns[name][row], "give a finite number")
        return values

    def optional_numbers(self, name: str) -> np.ndarray:
        """f8 (n,), nan where absent."""
        raw = self.columns[name]
        self.require(name, _is_number, "give a number")
        return np.array([np.nan if v is None or v == "" else v for v in raw], np.float64)

    def require(self, name: str, holds: Callable[[Any], bool], fix: str) -> None:
        """Refuse the first value that is there and of which ``holds`` is false."""
        for row, value in enumerate(self.columns[name]):
            if value is not None and not holds(value):
                raise SlalomError(f"{self.place(row)}, {name}", value, fix)

    def tokens(self, name: str) -> np.ndarray:
        """i8 (n,); whole numbers, at least 1."""
        values = self.numbers(name)
        bad = np.flatnonzero((values < 1) | (values != np.floor(values)) | (values >= 2**31))
        if len(bad):
            row = int(bad[0])
            raise SlalomError(f"{self.place(row)}, {name}", self.columns[name][row], "give whole tokens, at least 1")
        return values.astype(np.int64)


def _is_number(value: Any) -> bool:
    if not isinstance(value, str):
        return type(value) in (int, float)
    try:
        float(value or 0)
    except ValueError:
        return False
    return True


def _resolve(path: Path, names: dict[str, str], present: list[str]) -> dict[str, str]:
    """Our name -> name in the file, for the columns that are there; required ones must be."""
    found = {}
    for ours, theirs in names.items():
        name = theirs.removeprefix("?")
        if name in present:
            found[ours] = name
        elif not theirs.startswith("?"):
            raise SlalomError(
                f"{path.name}: column {name}",
                present,
                f"name the column that holds {ours} (columns: {{{ours}: ...}})",
            )
    return found


def _rows(reader: Any, path: Path) -> Iterator[list[str]]:
    """What the csv module reads; its own complaints (a field of 128 KiB) as ours."""
    try:
        yield from reader
    except csv.Error as error:
        raise SlalomError(f"{path.name}: line {reader.line_num}", str(error), "give a CSV file") from error


def read_csv(path: Path, names: dict[str, str]) -> Table:
    """A CSV file with a header line."""
    reader = csv.reader(lines_of(path))
    header = [name.strip() for name in next(_rows(reader, path), [])]
    if not header:
        raise SlalomError(path.name, "empty file", "give a CSV file with a header and rows")
    found = _resolve(path, names, header)
    picks = {ours: header.index(theirs) for ours, theirs in found.items()}
    columns: dict[str, list[Any]] = {ours: [] for ours in picks}
    lines = []
    for row in _rows(reader, path):
        if not row:
            continue
        if len(row) != len(header):
            raise SlalomError(
                f"{path.name}: line {reader.line_num}", row, f"give {len(header)} fields as in the header"
            )
        lines.append(reader.line_num)
        for ours, pick in picks.items():
            columns[ours].append(row[pick])
    return _finished(path, columns, lines)


def read_jsonl(path: Path, names: dict[str, str]) -> Table:
    """One JSON object a line; keys not named are ignored, as every reader of the format does."""
    columns: dict[str, list[Any]] = {theirs.removeprefix("?"): [] for theirs in names.values()}
    present: set[str] = set()
    lines: list[int] = []
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        where = f"{path.name}: line {number}"
        value = json_of(line, where, constants=True)
        if not isinstance(value, dict):
            raise SlalomError(where, value, "give one JSON object per line")
        if not lines:  # a file of other columns is refused before all of it is read
            _resolve(path, {ours: theirs for ours, theirs in names.items() if ours in _IN_EVERY_ROW}, sorted(value))
        present |= value.keys()
        for name, column in columns.items():
            column.append(value.get(name))
        lines.append(number)
    found = _resolve(path, names, sorted(present)) if lines else {}
    return _finished(path, {ours: columns[theirs] for ours, theirs in found.items()}, lines)


def _finished(path: Path, columns: dict[str, list[Any]], lines: list[int]) -> Table:
    if not lines:
        raise SlalomError(path.name, "no rows", "give a file with at least one request")
    return Table(path, columns, np.array(lines))
