"""Where work is done beside this process: it ends with it, within its time, and says when it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.errors import SlalomError
from engine.jit.sources import ROOT
from env.measure.pool import RayExecutor, finished, processes, watched

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


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_one_line() -> None:
    with processes(1) as pool, pytest.raises(SlalomError, match="--jobs: got 'a process that was killed'"):
        list(finished(pool, _killed, [()]))
    with processes(1) as pool, pytest.raises(SlalomError, match="--jobs"):
        watched(pool.submit(_killed)).result(60)
    with processes(1) as pool:
        assert watched(pool.submit(os.getpid)).result(60) != os.getpid()


class FakeRay:
    """As much of Ray as an executor needs: ``ends`` says what becomes of each try of a job."""

    class exceptions:
        class RayError(Exception):
            cause: BaseException | None = None

        class WorkerCrashedError(RayError): ...

        class RayTaskError(RayError): ...

    def __init__(self) -> None:
        self.tries, self.cancelled = 0, 0
        self.ends = self.exceptions.WorkerCrashedError("The worker died unexpectedly\nwhile executing this task.")
        self.future: Future[Any] = Future()

    def remote(self, *, num_cpus: int, max_retries: int) -> Any:
        self.tries = max_retries + 1
        reference = SimpleNamespace(future=lambda: self.future)
        return lambda function: SimpleNamespace(remote=lambda *given: reference)

    def cancel(self, reference: Any, *, force: bool) -> None:
        self.cancelled += 1
        self.future.set_exception(self.exceptions.RayError("cancelled"))


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    found = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", found)
    return found


def test_a_job_that_always_kills_its_worker_is_given_up_with_a_word(ray: FakeRay) -> None:
    job = RayExecutor().submit(os.getpid)
    assert 1 < ray.tries < 10
    ray.future.set_exception(ray.ends)
    with pytest.raises(SlalomError, match="--ray: got 'The worker died unexpectedly'; a job ended its worker 4 times"):
        job.result(1)


def test_what_a_job_itself_raises_comes_out_as_it_was(ray: FakeRay) -> None:
    job = RayExecutor().submit(os.getpid)
    error = ray.exceptions.RayTaskError("wrapped")
    error.cause = SlalomError("rate", 1, "another one")
    ray.future.set_exception(error)
    with pytest.raises(SlalomError, match="another one"):
        job.result(1)


def test_a_cancelled_job_is_ended_where_it_runs(ray: FakeRay) -> None:
    job = RayExecutor().submit(os.getpid)
    job.cancel()
    assert (ray.cancelled, job.done()) == (1, True)
    job.cancel()
    assert ray.cancelled == 1
