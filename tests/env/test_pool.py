"""Processes that simulate end with the one that started them, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from engine.jit.sources import ROOT

STARTER = """
import os, time
from env.measure.pool import processes

if __name__ == "__main__":
    pool = processes(1)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_parent_leaves_no_process_behind(tmp_path: Path) -> None:
    script = tmp_path / "starter.py"
    script.write_text(STARTER)
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        assert _lives(child)
        process.send_signal(signal.SIGKILL)
        process.wait()
        until = time.monotonic() + 60.0  # against a hang only
        while _lives(child) and time.monotonic() < until:
            time.sleep(0.02)
        assert not _lives(child)
    finally:
        process.stdout.close()
        if _lives(child):
            os.kill(child, signal.SIGKILL)
