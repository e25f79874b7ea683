"""Where a number comes from: commit, versions and machine."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engine.jit.sources import ROOT

_PACKAGES = ("slalom", "numpy", "numba", "optuna", "torch", "stable-baselines3")


def _git(*arguments: str) -> str | None:
    if not (ROOT / ".git").exists():  # installed: a repository further up would not be ours
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@cache
def commit() -> str | None:
    """Commit of this checkout, with ``-dirty`` when tracked files were edited; None outside a checkout."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result, as installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def machine() -> dict[str, Any]:
    """CPU model, logical cores this process may use, Python, numba and numpy versions."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    known = versions()
    return {
        "cpu": model,
        "cores": cores,
        "python": known["python"],
        "numba": known.get("numba"),
        "numpy": known.get("numpy"),
        "system": f"{platform.system()} {platform.release()}",
    }
