"""``python -m eval.gpu_check.roofline``: what a step of an 8B model must cost on an H200, and what we launch for it.

Bytes and FLOP follow from the model's shape. Launches are counted: the model runs as it is on tensors without memory,
and Triton specialises its kernels for an H200 without one. Host microseconds are the only figures measured, on the
machine where this runs: CPU time of preparing a step and handing it out, without the driver's part of a launch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.kernels import Span, Spans, make_kernels
from engine.kernels.static import StaticBatch
from engine.live.graphs import CHUNKS, DECODES
from engine.model import KVPool, Llama, ModelRunner
from engine.model.config import DUMMY_SHAPES, ModelConfig

#: What large copies and bf16 products reach on an H200 (its data sheet says 4.8 TB/s and 989 TFLOP/s).
BYTES_PER_S, FLOP_PER_S = 4.3e12, 788e12
BATCHES, PROMPTS, CONTEXT = (1, 2, 4, 8, 16, 32, 64, 128, 256), (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192), 1024
_SMS, _BLOCK, _REPEATS = 132, 16, 7


def roofline(model: str = "llama-8b", *, timed: bool = True) -> list[dict[str, Any]]:
    """A row for each decode batch at :data:`CONTEXT` tokens and for each prompt.

    :param timed: also measure host microseconds, on this machine
    :raises RuntimeError: no Triton
    """
    config = DUMMY_SHAPES[model]
    launched: list[Any] = []
    with without_device(launched.append):
        runner = _without_memory(config)
        steps = [("decode", n, _decodes(n)) for n in BATCHES] + [("prefill", n, _prompt(n)) for n in PROMPTS]
        return [_row(runner, kind, n, spans, launched, timed) for kind, n, spans in steps]


def _row(runner: ModelRunner, kind: str, n: int, spans: Spans, launched: list[Any], timed: bool) -> dict[str, Any]:
    config, decodes = runner.model.config, kind == "decode"
    n_bytes, flop = _cost(config, n, decodes)
    launched.clear()
    with _Launches() as ours:
        _eager(runner, spans)
    memory_ms, compute_ms = n_bytes / BYTES_PER_S * 1e3, flop / FLOP_PER_S * 1e3
    replayed = n <= (DECODES if decodes else CHUNKS)[-1]
    row = {
        "step": kind, "n": n, "gb": n_bytes * 1e-9, "tflop": flop * 1e-12, "memory_ms": memory_ms,
        "compute_ms": compute_ms, "floor_ms": max(memory_ms, compute_ms), "launches": ours.n + len(launched),
        "replayed": replayed,
    }  # fmt: skip
    if timed:
        row["host_us_launching"] = _microseconds(lambda: _eager(runner, spans))
        row["host_us_replaying"] = _microseconds(_filling(config, n, spans)) if replayed else None
    return row


def _cost(config: ModelConfig, n: int, decodes: bool) -> tuple[float, float]:
    """(bytes, FLOP) that a step cannot do without: weights and KV once; products and attention. No activations."""
    heads = config.n_heads + 2 * config.n_kv_heads
    layer = config.width * (heads + config.n_heads) * config.head_dim + 3 * config.width * config.ffn
    layers, head, rows = config.n_layers * layer, config.width * config.vocab, n if decodes else 1
    read = n * (CONTEXT if decodes else 1)
    seen = n * (CONTEXT + 1) if decodes else n * (n + 1) / 2  # pairs of a query and a key
    kv = config.kv_elements_per_token
    n_bytes = 2.0 * (layers + head + (read + n) * kv)
    flop = 2.0 * (n * layers + rows * head) + 4.0 * seen * config.n_heads * config.head_dim * config.n_layers
    return n_bytes, flop


def _decodes(n: int) -> Spans:
    each = CONTEXT // _BLOCK + 1
    return Spans.of(Span([0], CONTEXT, range(k * each, (k + 1) * each)) for k in range(n))


def _prompt(n: int) -> Spans:
    return replace(Spans.of([Span([0] * n, 0, range(-(-n // _BLOCK)))]), prompts=1)


def _without_memory(config: ModelConfig) -> ModelRunner:
    kernels = make_kernels("triton", "cuda")
    with torch.device("meta"):
        model = Llama(config, kernels).to(torch.bfloat16).requires_grad_(False)
        model.frequencies = model.frequencies.float()
    return ModelRunner(model, KVPool(config, blocks=1, dtype=torch.bfloat16, device="meta"))


@torch.inference_mode()
def _eager(runner: ModelRunner, spans: Spans) -> None:
    batch = runner.batch(spans, sm_count=_SMS)
    runner.model.logits(runner.model(batch, runner.pool), batch).argmax(-1)


def _filling(config: ModelConfig, n: int, spans: Spans) -> Callable[[], object]:
    """What the host does for a replay, but the copy and the launch of the graph."""
    decodes = spans.decodes
    size = next(b for b in (DECODES if decodes else CHUNKS) if b >= n)
    heads = (config.n_heads, config.n_kv_heads, config.head_dim)
    static = StaticBatch(
        rows=size, sequences=size if decodes else min(size, 64), decodes=decodes, width=8192 // _BLOCK,
        block_tokens=_BLOCK, sm_count=_SMS, device="cpu",
        tiling=make_kernels("triton", "cuda").tiling(1 if decodes else size, heads, 2, _SMS),
    )  # fmt: skip
    return lambda: static.fill(spans)


def _microseconds(work: Callable[[], object]) -> float:
    """Least CPU time of ``work`` on this machine."""
    work()
    found = []
    for _ in range(_REPEATS):
        begin = time.thread_time()
        work()
        found.append(time.thread_time() - begin)
    return min(found) * 1e6


class _Launches(TorchDispatchMode):
    """Counts torch's operations that start a kernel or a copy on a GPU."""

    _FREE = ("empty", "detach", "alias", "_to_copy")  # a copy of the input is counted as it is on a GPU: below

    def __init__(self) -> None:
        super().__init__()
        self.n = 2  # the input: the batch, and its work list

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.n += not (func.is_view or name.startswith(self._FREE) or "unsafe_view" in name)
        return func(*args, **(kwargs or {}))


class _NoDevice:
    """As much of a driver as Triton's front end asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextmanager
def without_device(launched: Callable[[Any], object]) -> Iterator[None]:
    """Triton's kernels are specialised, and compiled where new, but not run; ``launched`` gets each that would be."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    usual, active = JITFunction.__getitem__, driver._active

    def launch(self: Any, grid: Any) -> Any:
        return lambda *args, **kwargs: launched(self.warmup(*args, grid=grid, **kwargs))

    JITFunction.__getitem__, driver._active = launch, _NoDevice()
    try:
        yield
    finally:
        JITFunction.__getitem__, driver._active = usual, active


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table; the last two columns only where host time was measured."""
    head = "| step | GB | TFLOP | memory floor, ms | compute floor, ms | launches | runs by |"
    lines = [head, "| --- |" + " ---: |" * 5 + " --- |"]
    timed = "host_us_launching" in rows[0]
    if timed:
        lines = [lines[0] + " host µs, launching | host µs, replaying |", lines[1] + " ---: | ---: |"]
    for row in rows:
        line = (
            f"| {row['step']} {row['n']} | {row['gb']:.2f} | {row['tflop']:.2f} | {row['memory_ms']:.2f} | "
            f"{row['compute_ms']:.2f} | {row['launches']} | {'graph' if row['replayed'] else 'launches'} |"
        )
        if timed:
            replaying = row["host_us_replaying"]
            line += f" {row['host_us_launching']:.0f} | {'' if replaying is None else f'{replaying:.0f}'} |"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.gpu_check.roofline", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object with the machine instead of a table")
    options = parser.parse_args(arguments)
    rows = roofline()
    if options.json:
        from engine.common.provenance import commit, machine

        print(json.dumps({"rows": rows, "commit": commit(), "machine": machine()}))
    else:
        print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
