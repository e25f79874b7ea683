"""``python -m eval.gpu_check --json OUT``. Exit code 0: all measured; 1: something failed; 2: no GPU, or bad input."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engine.errors import SlalomError

_DRY_SLACK = 5.0  # limits are those of a GPU; a dry run may have to compile everything on one busy core


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.gpu_check", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="written anew after every case")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for everything")
    parser.add_argument("--only", default="", help="groups, separated by commas; all if not given")
    parser.add_argument("--dry-run", action="store_true", help="run every line on a CPU, at sizes that mean nothing")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.dry_run and not _has_gpu():
        print("gpu-check: torch sees no GPU here; --dry-run runs the same code on a CPU", file=sys.stderr)
        return 2
    if options.group:
        from eval.gpu_check.group import measure_group

        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
        measure_group(options.group, options.json, dry=options.dry_run)
        return 0
    try:
        return _measure_all(options)
    except SlalomError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2


def _end_with_parent(parent: int) -> None:
    """End this group's process and its children once whoever started it is gone, however that ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _measure_all(options: argparse.Namespace) -> int:
    from engine.common.files import write_json
    from engine.common.provenance import commit
    from eval.gpu_check.catalogue import GROUPS

    wanted = [name for name in options.only.split(",") if name] or list(GROUPS)
    if unknown := set(wanted) - set(GROUPS):
        print(f"gpu-check: --only: got {sorted(unknown)}; choose from {', '.join(GROUPS)}", file=sys.stderr)
        return 2
    begin, out = time.monotonic(), options.json
    write_json(out, {"commit": commit(), "dry_run": options.dry_run, "measured": {}, "failed": {}, "seconds": {}})
    out.with_suffix(".log").unlink(missing_ok=True)
    with _core_compiled(options, wanted):
        return _measure_groups(options, wanted, begin)


def _measure_groups(options: argparse.Namespace, wanted: list[str], begin: float) -> int:
    from engine.common.files import write_json
    from eval.gpu_check.catalogue import GROUPS
    from eval.gpu_check.report import read

    out = options.json
    for name in wanted:
        left, started = options.budget - (time.monotonic() - begin), time.monotonic()
        ended = "not begun: the budget is spent"
        if left >= 5.0:
            slack = _DRY_SLACK if options.dry_run else 1.0
            ended = _in_a_process(name, options, min(slack * GROUPS[name].limit_s, left))
        report = read(out)
        for lost in GROUPS[name].measurements:
            if lost not in report["failed"] and report["measured"].get(lost, {"unfinished": True}).get("unfinished"):
                report["failed"][lost] = ended
        report["seconds"][name] = round(time.monotonic() - started, 1)
        write_json(out, report)
        print(f"gpu-check: {name}: {ended.splitlines()[0]}, {report['seconds'][name]} s", file=sys.stderr, flush=True)
    report = read(out)
    for name, error in report["failed"].items():
        print(f"gpu-check: {name} failed: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
    return 1 if report["failed"] else 0


@contextmanager
def _core_compiled(options: argparse.Namespace, wanted: list[str]) -> Iterator[None]:
    """Compile what runs on the host, on spare cores while the GPU is measured, by running the groups that need it dry.

    For ``engine`` it is the scheduling core, for ``loop``, whose fidelity comes a minute later, the surrogate as well.
    """
    needed = {"engine"} & set(wanted[1:]) | {"loop"} & set(wanted)  # the first one compiles by itself as soon
    spare = (os.cpu_count() or 1) >= 8 and not options.dry_run
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for name in sorted(needed if spare else ()):
            command = [sys.executable, "-m", "eval.gpu_check", "--dry-run", "--group", name]
            children.append(subprocess.Popen(
                [*command, "--json", f"{folder}/{name}.json"], env=_environment(dry=True),
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            ))  # fmt: skip
        try:
            yield
        finally:
            for child in children:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def _environment(*, dry: bool) -> dict[str, str]:
    """Of a group's process; a dry one sees no GPU, also where there is one."""
    # graph replays wait behind eager work in shared queues otherwise (pytorch#176582)
    usual = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "PYTHONUNBUFFERED": "1"} | dict(os.environ)
    # the former is read when triton is imported, the latter when torch is
    return usual | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if dry else {})


def _in_a_process(group: str, options: argparse.Namespace, limit_s: float) -> str:
    """Let a child measure ``group`` into the report; how it ended. It and its own children are gone afterwards."""
    command = [sys.executable, "-m", "eval.gpu_check", "--group", group, "--json", str(options.json)]
    command += ["--dry-run"] * options.dry_run
    log = options.json.with_suffix(".log")
    with log.open("a+", errors="replace") as said:
        before = said.seek(0, os.SEEK_END)
        environment = _environment(dry=options.dry_run)
        child = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
        usual = {kind: signal.signal(kind, _stop) for kind in (signal.SIGTERM, signal.SIGHUP)}
        try:
            code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"ended after {limit_s:.0f} s; what was measured until then is kept"
        finally:  # an end from outside included
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            for kind, handler in usual.items():
                signal.signal(kind, handler)
        said.seek(before)
        return "done" if code == 0 else f"exit code {code}: {said.read()[-1500:]}"


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
