"""``python -m eval.gpu_check --json OUT``. Exit code 0: all measured; 1: something failed; 2: no GPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.gpu_check", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="written anew after every measurement")
    parser.add_argument("--budget", type=float, default=900.0, help="seconds for everything")
    parser.add_argument("--only", default="", help="groups, separated by commas; all if not given")
    parser.add_argument("--dry-run", action="store_true", help="run every line on a CPU, at sizes that mean nothing")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.dry_run and not _has_gpu():
        print("gpu-check: torch sees no GPU here; --dry-run runs the same code on a CPU", file=sys.stderr)
        return 2
    if options.group:
        measure_group(options.group, options.json, dry=options.dry_run)
        return 0
    return _measure_all(options)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _measure_all(options: argparse.Namespace) -> int:
    from engine.common.provenance import commit
    from eval.gpu_check.catalogue import GROUPS

    wanted = [name for name in options.only.split(",") if name] or list(GROUPS)
    if unknown := set(wanted) - set(GROUPS):
        print(f"gpu-check: --only: got {sorted(unknown)}; choose from {', '.join(GROUPS)}", file=sys.stderr)
        return 2
    begin = time.monotonic()
    result: dict[str, Any] = {"commit": commit(), "dry_run": options.dry_run, "measured": {}, "failed": {}}
    for name in wanted:
        left = options.budget - (time.monotonic() - begin)
        names = list(GROUPS[name].measurements)
        if left < 5.0:
            result["failed"] |= dict.fromkeys(names, "not begun: the budget is spent")
            continue
        started = time.monotonic()
        part, ended = _in_a_process(name, options.dry_run, min(GROUPS[name].limit_s, left))
        result["measured"] |= part.get("measured", {})
        result["failed"] |= part.get("failed", {})
        for lost in set(names) - set(result["measured"]) - set(result["failed"]):
            result["failed"][lost] = ended
        result.setdefault("seconds", {})[name] = round(time.monotonic() - started, 1)
        write(options.json, result)
        print(f"gpu-check: {name}: {ended}, {result['seconds'][name]} s", file=sys.stderr, flush=True)
    for name, error in result["failed"].items():
        print(f"gpu-check: {name} failed: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
    write(options.json, result)
    return 1 if result["failed"] else 0


def _in_a_process(group: str, dry: bool, limit_s: float) -> tuple[dict[str, Any], str]:
    """What the group's process wrote, and how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        command = [sys.executable, "-m", "eval.gpu_check", "--group", group, "--json", str(out)]
        # graph replays wait behind eager work in shared queues otherwise (pytorch#176582)
        environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"} | dict(os.environ)
        if dry:
            environment["TRITON_INTERPRET"] = "1"  # read when triton is imported
        try:
            done = subprocess.run(
                command + ["--dry-run"] * dry, env=environment, timeout=limit_s, stderr=subprocess.PIPE, text=True
            )
            ended = "done" if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr[-1500:]}"
        except subprocess.TimeoutExpired:
            ended = f"ended after {limit_s:.0f} s"
        return (json.loads(out.read_text()) if out.exists() else {}), ended


def measure_group(group: str, out: Path, *, dry: bool) -> None:
    """Take the measurements of one group in this process; what fails is written down and the next one begins."""
    from eval.gpu_check.catalogue import GROUPS
    from eval.gpu_check.rig import make_rig

    rig = make_rig(dry=dry)
    result: dict[str, Any] = {"measured": {}, "failed": {}}
    for name, function in GROUPS[group].measurements.items():
        begin = time.monotonic()
        try:
            figures = function(rig)
            rig.sync()
            result["measured"][name] = figures | {"took_s": round(time.monotonic() - begin, 1)}
        except Exception:
            result["failed"][name] = traceback.format_exc()[-3000:]
        write(out, result)


def write(path: Path, result: dict[str, Any]) -> None:
    """Replace ``path`` by ``result``, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(result, indent=1) + "\n")
    fresh.replace(path)


if __name__ == "__main__":
    sys.exit(main())
