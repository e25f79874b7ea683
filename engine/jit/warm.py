"""Compile kernels before they are needed: in processes side by side, and never silently.

A floor lists what it wants compiled in a module of its own: ``STAGES``, groups of functions without arguments. Those of
a group run at the same time, each in a process of its own; what they leave behind is on disk (``engine.jit.kernel``).

    python -m engine.jit.warm env.warm policies.warm
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import zip_longest

from engine.jit import sources

Step = Callable[[], None]
#: Seconds after which somebody who waits hears that it goes on.
QUIET_S = 10.0
_PROGRAM = "import importlib, sys; getattr(importlib.import_module(sys.argv[1]), sys.argv[2])()"


@contextmanager
def told(what: str, quiet_s: float = QUIET_S) -> Iterator[None]:
    """Say on standard error ``what`` is going on, and again every ``quiet_s`` seconds until it is over."""
    began, over = time.monotonic(), threading.Event()

    def repeat() -> None:
        while not over.wait(quiet_s):
            print(f"{what}: {time.monotonic() - began:.0f} s so far", file=sys.stderr, flush=True)

    print(f"{what} ...", file=sys.stderr, flush=True)
    teller = threading.Thread(target=repeat, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compile(step: Step) -> str:
    """Run ``step`` in a process of its own; returns what went wrong."""
    ours = [str(sources.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    surroundings = os.environ | {"PYTHONPATH": os.pathsep.join(ours), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _PROGRAM, step.__module__, step.__name__]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason given"])[-1]


def warm(stages: Sequence[Sequence[Step]], *, aloud: bool = False) -> bool:
    """Run the steps of each stage side by side on all cores, stage after stage; one that fails is told and left out.

    :param aloud: say on standard error what is done
    :return: whether all of them succeeded
    """
    failed, done, total = 0, 0, sum(map(len, stages))
    with ThreadPoolExecutor(cores()) as pool:
        for stage in stages:
            running = {pool.submit(_compile, step): step.__name__.replace("_", " ") for step in stage}
            for future in as_completed(running):
                done += 1
                if wrong := future.result():
                    failed += 1
                    print(f"could not compile {running[future]} beforehand: {wrong}", file=sys.stderr, flush=True)
                elif aloud:
                    print(f"compiled {running[future]}, {done} of {total}", file=sys.stderr, flush=True)
    return not failed


def main(modules: Sequence[str]) -> int:
    """Warm what ``modules`` list, the first stages of all before the second ones; returns the exit code."""
    listed = [importlib.import_module(module).STAGES for module in modules]
    stages = [[step for part in parts for step in part] for parts in zip_longest(*listed, fillvalue=())]
    with told(f"compiling for this machine, once, on {cores()} cores"):
        return 0 if warm(stages, aloud=True) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
