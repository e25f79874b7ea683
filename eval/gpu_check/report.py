"""The file with the results: written after every case, so that whatever ends a run leaves what was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.common.files import read_json


def read(path: Path) -> dict[str, Any]:
    """What the file holds; an empty report where there is none."""
    found = read_json(path) if path.exists() else {}
    return {"measured": {}, "failed": {}} | found


class Cases:
    """The rows of one measurement, each tried by itself: what fails becomes a row with its ``error``.

    :param keep: called with all rows so far after each of them
    """

    def __init__(self, keep: Callable[[list[dict[str, Any]]], None]) -> None:
        self.rows: list[dict[str, Any]] = []
        self._keep = keep

    def take(self, about: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Measure one case; its figures, or None where it failed.

        :param about: what the case is
        """
        try:
            figures = measure()
        except Exception as error:  # out of memory, a kernel that refuses a shape, a cut that cannot be had
            self.rows.append(about | {"error": f"{type(error).__name__}: {error}"[:600]})
            self._keep(self.rows)
            return None
        self.rows.append(about | figures)
        self._keep(self.rows)
        return figures

    @property
    def errors(self) -> list[str]:
        """What went wrong, in words."""
        return [row["error"] for row in self.rows if "error" in row]
