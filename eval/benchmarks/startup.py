"""What a user waits for before the first result: a small ``eval-policy`` in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmarks.reference import POLICY, reference_scenario

WARM_REPEATS = 3


def run() -> dict[str, Any]:
    """Seconds of one command with an empty kernel cache, and with a filled one (median)."""
    with tempfile.TemporaryDirectory() as folder:
        scenario = Path(folder) / "reference.yaml"
        scenario.write_text(reference_scenario().to_yaml())
        environment = os.environ | {"SLALOM_CACHE_DIR": str(Path(folder) / "cache")}
        seconds = [_command(scenario, environment) for _ in range(1 + WARM_REPEATS)]
    return {"cold_s": seconds[0], "warm_s": float(np.median(seconds[1:])), "warm_repeats": WARM_REPEATS}


def _command(scenario: Path, environment: dict[str, str]) -> float:
    command = [sys.executable, "-m", "eval.cli", "--scenario", str(scenario), "--policy", POLICY]
    command += ["--rates", "10", "--seeds", "1", "--requests", "200", "--json"]
    started = time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - started
