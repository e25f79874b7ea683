"""One group in its own process: measurement by measurement, case by case, into the report."""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.common.files import write_json
from eval.gpu_check.catalogue import GROUPS
from eval.gpu_check.report import Cases, read
from eval.gpu_check.rig import Rig, make_rig


def measure_group(group: str, out: Path, *, dry: bool) -> None:
    """Take the measurements of ``group`` in this process and add them to the report ``out``.

    A measurement whose cases failed in part is in both lists: its figures in ``measured``, the errors in ``failed``.
    """
    rig = make_rig(dry=dry)
    for name, address in GROUPS[group].measurements.items():
        begin = time.monotonic()
        report = read(out)

        def keep(rows: list[dict[str, Any]], name: str = name, report: dict[str, Any] = report) -> None:
            report["measured"][name] = {"unfinished": True, "rows": rows}
            write_json(out, report)

        cases = Cases(keep)
        try:
            figures = _function(address)(rig, cases)
            rig.sync()
            report["measured"][name] = figures | {"took_s": round(time.monotonic() - begin, 1)}
            if cases.rows:
                report["measured"][name]["rows"] = cases.rows
            if cases.errors:
                report["failed"][name] = f"{len(cases.errors)} of {len(cases.rows)} cases, the first: {cases.errors[0]}"
        except Exception:
            report["failed"][name] = traceback.format_exc()[-3000:]
        write_json(out, report)


def _function(address: str) -> Callable[[Rig, Cases], dict[str, Any]]:
    """``module:function`` of this package; a module's imports are its own affair."""
    module, _, name = address.partition(":")
    found: Callable[[Rig, Cases], dict[str, Any]] = getattr(importlib.import_module(f"eval.gpu_check.{module}"), name)
    return found
