"""The loop on the device by the commands a user types: calibrate, then the surrogate on that profile beside the engine.

Two instances share the device, each multiplexing both phases on SM partitions (mixed ones on a CPU). Targets and
rates follow the measured profile, so that the loop is at work between half load and the knee on any device.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.gpu_check.report import Cases
from eval.gpu_check.rig import Rig


@dataclass(frozen=True)
class _Sizes:
    """What the loop runs at; tokens, seconds as the commands write them."""

    model: str
    dtype: str
    device: str
    prompt: int
    output: int
    kv_tokens: int
    max_batch: int
    calibrate: str
    run_s: float
    role: dict[str, str]


_REAL = _Sizes(
    "dummy:llama-8b", "bfloat16", "cuda", 1024, 64, 65_536, 32, "60s", 4.0,
    {"role": "multiplexed", "batching": "layered"},
)  # fmt: skip
_TINY = _Sizes(
    "dummy:tiny", "float32", "cpu", 32, 6, 1024, 4, "10s", 1.0, {"role": "mixed", "batching": "chunked"}
)  # fmt: skip
_CALIBRATED = ("prefill_held_out_error", "decode_held_out_error", "fused_error", "neighbour_slowdown", "points")
_POLICIES = ("least_tokens", "predicted_ttft")
#: What the commands import beside what every group does.
_NEEDED = ("gymnasium", "matplotlib", "pydantic", "rich", "scipy", "typer", "yaml")


def scenario_of(profile: Path, sizes: _Sizes) -> dict[str, Any]:
    """A scenario on ``profile``: TTFT of eight prompts in a row, TPOT of two full decode steps, lognormal lengths."""
    from engine.latency import Profile

    found = Profile.load(profile)
    prefill = found.prefill_s(sizes.prompt)
    decode = found.decode_s(sizes.max_batch * (sizes.prompt + sizes.output), sizes.max_batch)
    rate = 0.7 * 2.0 / (prefill + sizes.output * decode / sizes.max_batch)
    half = {"kind": "lognormal", "median": sizes.prompt // 2, "p90": sizes.prompt, "low": 8, "high": 2 * sizes.prompt}
    short = {"kind": "lognormal", "median": sizes.output // 2, "p90": sizes.output, "low": 2, "high": 2 * sizes.output}
    group = {"count": 2, "max_batch": sizes.max_batch, "kv_tokens": sizes.kv_tokens} | sizes.role
    return {
        "name": "gpu-check-loop",
        "description": "Two instances on one device, at rates that its measured profile allows.",
        "regime": "balanced",
        "profile": str(profile),
        "cluster": [group],
        "workload": {
            "kind": "synthetic",
            "lengths": {"kind": "joint", "prompt": half, "output": short, "spearman": 0.0},
        },
        "classes": [{"name": "chat", "ttft_s": 8 * prefill, "tpot_s": 2 * decode}],
        "decisions": {"place_decode": True},
        "rates": {"low": rate / 8, "high": rate * 8},
        "reference_rate": rate,
        "n_requests": 400,
    }


def loop(rig: Rig, cases: Cases) -> dict[str, Any]:
    """Held-out error of the calibration, then the fidelity of two rules at one load; aim: within 5 %.

    :raises RuntimeError: packages that these commands need are not installed
    :raises AssertionError: a command failed, with the end of what it said
    """
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise RuntimeError(f"not installed: {', '.join(missing)}; carry their wheels, see docs/gpu.md")
    import yaml

    sizes = _TINY if rig.dry else _REAL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        profile, scenario = folder / "device.json", folder / "loop.yaml"
        told = cases.take({"command": "calibrate"}, lambda: _calibrated(sizes, profile))
        if told is None:
            return {"model": sizes.model}
        scenario.write_text(yaml.safe_dump(scenario_of(profile, sizes)))
        compared = [part for policy in _POLICIES for part in ("--policy", policy)]

        def fidelity() -> dict[str, Any]:
            _command(
                "eval.cli", "--fidelity", "--scenario", str(scenario), *compared, "--loads", "0.6",
                "--repetitions", "2", "--run-s", str(sizes.run_s), "--out", str(folder / "fidelity"),
            )  # fmt: skip
            found = json.loads((folder / "fidelity" / "fidelity.json").read_text())
            errors = {name: e["mean_abs_error"] for name, e in found["summary"]["errors"].items()}
            at_speed = {name: e["mean_abs_error"] for name, e in found["at_speed"]["summary"]["errors"].items()}
            latency = [value for name, value in errors.items() if name.endswith(("_p50", "_p90"))]
            return {"errors": errors, "at_speed": at_speed, "cases": found["summary"]["cases"], "aim": 0.05,
                    "within": bool(max(latency) <= 0.05)}  # fmt: skip

        cases.take({"command": "fidelity"}, fidelity)
    return {"model": sizes.model}


def _calibrated(sizes: _Sizes, profile: Path) -> dict[str, Any]:
    """What ``calibrate`` says, and the profile it wrote."""
    said = _command(
        "eval.calibrate.cli", "--model", sizes.model, "--dtype", sizes.dtype, "--device", sizes.device,
        "--instances", "2", "--budget", sizes.calibrate, "--max-tokens", str(2 * sizes.prompt),
        "--max-batch", str(sizes.max_batch), "--max-context", str(2 * sizes.prompt),
        "--kv-tokens", str(sizes.kv_tokens), "--out", str(profile), "--json",
    )  # fmt: skip
    told = json.loads(said[said.index("{") :])
    return {name: told[name] for name in _CALIBRATED} | {"profile": json.loads(profile.read_text())}


def _command(module: str, *arguments: str) -> str:
    """Standard output of one of the product's commands; what it says beside is passed on line by line, and so kept."""
    command, said = [sys.executable, "-m", module, *arguments], list[str]()
    with tempfile.TemporaryFile("w+") as out:
        with subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True) as child:
            for line in child.stderr or ():
                print(line, end="", file=sys.stderr, flush=True)
                said.append(line)
        out.seek(0)
        told = out.read()
    if child.returncode:
        raise AssertionError(f"{module} ended with {child.returncode}: {(''.join(said) or told)[-1500:]}")
    return told
