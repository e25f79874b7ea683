"""The random cases once more with every access to the state checked: no index ever leaves its array."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.jit.kernel import CACHE_DIR

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_no_access_leaves_its_array() -> None:
    surroundings = os.environ | {
        "SLALOM_BOUNDS": "1",
        "SLALOM_EXAMPLES": "300",
        # Checked kernels are other code under the same sources.
        "SLALOM_CACHE_DIR": str(CACHE_DIR / "checked"),
    }
    suites = [str(TESTS / "engine" / "core" / name) for name in ("test_core_invariants.py", "test_core_behaviour.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *suites],
        env=surroundings, cwd=TESTS.parent, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
