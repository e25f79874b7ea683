"""Which device and number format a command chooses, and how the process is prepared for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import engine.calibration.shares  # noqa: F401  (imported within a test it would keep that test's make_device)
from engine.errors import SlalomError
from engine.kernels import compilations
from engine.model.device import choose_device, choose_dtype, where
from eval.calibrate.cli import _parts


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_auto_is_cuda_in_bfloat16_where_there_is_one(two_gpus: None) -> None:
    assert choose_device("auto") == "cuda"
    assert choose_device("cuda:1") == "cuda:1"
    assert choose_dtype("auto", "cuda:1") is torch.bfloat16
    assert choose_dtype("float16", "cuda") is torch.float16
    with pytest.raises(SlalomError, match="there are 2 CUDA devices"):
        choose_device("cuda:2")


def test_auto_is_a_cpu_in_float32_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    assert choose_dtype("auto", "cpu") is torch.float32
    for name in ("cuda", "cuda:0", "tpu", "mps", ""):
        with pytest.raises(SlalomError, match="--device"):
            choose_device(name)
    with pytest.raises(SlalomError, match="use auto, float32"):
        choose_dtype("int8", "cpu")
    assert where("M", "cpu", torch.float32) == "M in float32 on cpu"


def test_cuda_gets_its_queues_before_it_starts_and_the_user_may_say_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    name, seen = "CUDA_DEVICE_MAX_CONNECTIONS", []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(seen.append(os.environ.get(name))))
    monkeypatch.setenv(name, "4")
    choose_device("auto")
    monkeypatch.delenv(name)
    choose_device("auto")
    assert seen == ["4", "32"]


def test_calibrate_cuts_the_device_that_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def make(kind: str, index: int = 0) -> Any:
        asked.append((kind, index))
        return SimpleNamespace(total=132, close=lambda: None)

    monkeypatch.setattr("engine.lanes.partitions.make_device", make)
    assert _parts("auto", "cuda:1") == ([32, 64, 96], 132)
    assert _parts("auto", "cuda") == ([32, 64, 96], 132)
    assert _parts("auto", "cpu") == ([], 132)
    assert asked == [("cuda", 1), ("cuda", 0), ("cpu", 0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("engine.workers.worker", ["--model", "dummy:tiny", "--once"]),
        ("eval.calibrate.cli", ["--model", "dummy:tiny", "--out", "OUT/tiny.json", "--kv-tokens", "1024"]),
        ("policies.serve", ["--model", "dummy:tiny", "--port", "0", "--policy", "no_such_rule"]),
    ],
)
def test_commands_that_load_a_model_share_one_default_and_say_it_first(
    module: str, arguments: list[str], tmp_path: Any
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | {"CUDA_VISIBLE_DEVICES": ""}
    environment |= {"SLALOM_KEY": "for-a-test", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", module, *(a.replace("OUT", str(tmp_path)) for a in arguments)]
    run = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stderr is not None
    said = next((line for line in run.stderr if "dummy:tiny in" in line or not line), "")
    run.kill()
    run.communicate()
    assert "dummy:tiny in float32 on cpu" in said


def test_kernels_that_triton_compiles_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    runtime = SimpleNamespace(jit_post_compile_hook=lambda **named: heard.append(named["repr"]))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(knobs=SimpleNamespace(runtime=runtime)))
    monkeypatch.setattr(compilations, "_watching", False)
    before = compilations.count()
    compilations.watch()
    compilations.watch()
    runtime.jit_post_compile_hook(key="k", repr="attention", fn=None, compile={})
    assert compilations.count() == before + 1
    assert heard == ["attention"], "somebody else's hook is kept"


@pytest.mark.slow
def test_the_hook_is_triton_s_own() -> None:
    """Under its real front end, in a process: one kernel compiled for Hopper is one counted, and a second use none."""
    pytest.importorskip("triton")
    script = """
import json, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from engine.kernels import compilations
class NoDevice:
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
driver.set_active(NoDevice())
from engine.kernels.triton_backend import TritonKernels
from engine.kernels.triton_rows import silu_kernel
import torch
TritonKernels()
x = torch.empty(4, 64, device="meta", dtype=torch.bfloat16)
counts = []
for _ in range(2):
    silu_kernel.warmup(x, x, 64, WIDTH=32, BLOCK=32, num_warps=4, grid=(4, 1))
    counts.append(compilations.count())
print(json.dumps(counts))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == [1, 1]
