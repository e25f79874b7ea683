"""Pieces of work that are kept as they finish, so that what was interrupted goes on: cells of a table, claims."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar

from engine.common.files import read_json, write_json
from env.measure.pool import finished, processes


class Cell(Protocol):
    """One piece of work."""

    def file(self, folder: Path) -> Path:
        """Where its result is kept: the name holds a digest of all that determines it."""


C = TypeVar("C", bound=Cell)


def measured(
    cells: Sequence[C], work: Callable[[C], dict[str, Any]], jobs: int, out: Path | None
) -> Iterator[tuple[C, dict[str, Any]]]:
    """(cell, what it found): first what is kept in ``out``, then the others as they finish, ``jobs`` at once.

    :raises SlalomError: whatever ``work`` raises, or a folder that cannot be written
    """
    missing = []
    for cell in cells:
        if out is not None and cell.file(out).exists():
            yield cell, read_json(cell.file(out))
        else:
            missing.append(cell)
    if jobs > 1 and missing:
        from env.surrogate.simulate import ready

        ready()  # compiled here once, not in every process
    with processes(jobs) if jobs > 1 else nullcontext() as pool:
        for (cell,), found in finished(pool, work, [(cell,) for cell in missing]):
            if out is not None:
                write_json(cell.file(out), found, sealed=True)
            yield cell, found
