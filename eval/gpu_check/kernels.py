"""The Triton kernels on the device, against torch in float32 on the same inputs; and one model against the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.kernels import Batch, Kernels, Span, make_kernels
from engine.kernels.reference import TorchKernels
from engine.model import KVPool, Llama, ModelRunner, SamplingParams, open_checkpoint
from engine.model.weights import DummyCheckpoint
from eval.gpu_check.report import Cases
from eval.gpu_check.rig import Rig

#: Relative error (of norms) that a kernel may have; operands are rounded to the type, sums are fp32.
_LIMIT = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
_ROWS = ("rms_norm", "rope_write", "silu_mul")
_CASES = {
    "decode": [(1, 129)],
    "decode ragged": [(1, 3), (1, 299), (1, 15), (1, 16), (1, 700)],
    "prefill": [(200, 0)],
    "chunk": [(64, 137)],
    "mixed, a padding row": [(1, 20), (70, 64), (1, -1), (33, 0)],
}


def correct(rig: Rig, cases: Cases) -> dict[str, Any]:
    """Relative error of every kernel in every type; a case beyond its limit has failed."""
    kernels = make_kernels("triton", rig.device)
    heads, kv_heads, dim = rig.sizes.heads
    shapes = [(heads, kv_heads, dim)] if rig.dry else [(heads, kv_heads, dim), (9, 3, 64)]
    passes = dict(list(_CASES.items())[:2]) if rig.dry else _CASES

    def attend(lengths: list[tuple[int, int]], shape: tuple[int, int, int], dtype: torch.dtype, sms: int) -> Any:
        return _judged(_attention(rig, kernels, lengths, shape, dtype, sms), dtype)

    def rows(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Any:
        return _judged(_rows(rig, kernels, shape, dtype)[name], dtype)

    for dtype in rig.sizes.dtypes:
        for shape in shapes:
            about = {"heads": list(shape), "dtype": str(dtype)}
            for name, lengths in passes.items():
                for sms in (1, 132):
                    cases.take(
                        about | {"kernel": f"attend, {name}, {sms} SMs"},
                        partial(attend, lengths, shape, dtype, sms),
                    )
            for name in _ROWS:
                cases.take(
                    about | {"kernel": name},
                    partial(rows, name, shape, dtype),
                )
    return {"limits": {str(dtype): limit for dtype, limit in _LIMIT.items()}}


def flashinfer(rig: Rig, cases: Cases) -> dict[str, Any]:
    """FlashInfer's attention of long prompts: its error, and milliseconds beside ours, whole and on a partition."""
    if rig.dry or importlib.util.find_spec("flashinfer") is None:
        return {"installed": False}
    dtype, shape, total = torch.bfloat16, rig.sizes.heads, rig.gpu.total
    lanes = {"whole": rig.gpu.whole().prefill, "half": rig.gpu.split(total // 2 // 8 * 8).prefill}

    def taken(past: int, lane: str) -> dict[str, Any]:
        found = _judged(_attention(rig, make_kernels("flashinfer", rig.device), [(1024, past)], shape, dtype, 1), dtype)
        for name in ("triton", "flashinfer"):
            attend = _attending(rig, make_kernels(name, rig.device), [(1024, past)], shape, dtype, lanes[lane].size)[0]
            found[f"{name}_ms"] = rig.ms(attend, lanes[lane])
        return found

    for past in (0, 7168):
        for lane in lanes:
            cases.take({"rows": 1024, "past": past, "lane": lane}, partial(taken, past, lane))
    return {"installed": True}


def _judged(error: float, dtype: torch.dtype) -> dict[str, Any]:
    """:raises AssertionError: the error is above what the type allows"""
    if not error < _LIMIT[dtype]:
        raise AssertionError(f"relative error {error:.2g}, {_LIMIT[dtype]:g} allowed")
    return {"relative_error": error}


def relative(ours: Tensor, expected: Tensor) -> float:
    """‖ours - expected‖ / ‖expected‖; infinite where ours is not a number."""
    if not bool(ours.isfinite().all()):
        return float("inf")
    return float((ours.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12))


def _attention(rig: Rig, *given: Any) -> float:
    """Relative error of :func:`_attending`'s attention."""
    attend, (query, cache, batch, scale) = _attending(rig, *given)
    return relative(attend(), TorchKernels().attend(query.float(), cache.float(), batch, scale))


def _attending(
    rig: Rig,
    kernels: Kernels,
    lengths: list[tuple[int, int]],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    sms: int,
) -> tuple[Callable[[], Tensor], tuple[Tensor, Tensor, Batch, float]]:
    """Attention of sequences of these (new, past) tokens, and what it is given."""
    heads, kv_heads, dim = shape
    need = [-(-max(new + past, 1) // 16) for new, past in lengths]
    order = torch.randperm(sum(need), generator=torch.Generator().manual_seed(0)).add(1).tolist()
    spans = [
        Span([0] * new, max(past, 0), [order.pop() for _ in range(n)])
        for (new, past), n in zip(lengths, need, strict=True)
    ]
    batch = Batch.build(spans, block_tokens=16, device=rig.device, sm_count=sms)
    contexts = tuple(new + past for new, past in lengths)
    lens = torch.tensor(contexts, dtype=torch.int32, device=rig.device)  # 0 for the padding row
    batch = replace(batch, context_lens=lens, context_tokens=contexts)
    cache = rig.noise(2, sum(need) + 1, 16, kv_heads, dim, dtype=dtype, seed=1)
    query = rig.noise(batch.n_rows, heads + 2 * kv_heads, dim, dtype=dtype, seed=2)[:, :heads]
    given = query, cache, batch, dim**-0.5
    return partial(kernels.attend, *given), given


def _rows(rig: Rig, kernels: Kernels, shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, float]:
    """Errors of the row-wise kernels at a model's width."""
    heads, kv_heads, dim = shape
    n, width = 37, heads * dim
    oracle = TorchKernels()
    x, residual, weight = (rig.noise(n, width, dtype=dtype, seed=k) for k in (3, 4, 5))
    found = {}
    ours, total = kernels.rms_norm(x, weight[0], 1e-5, residual)
    expected, expected_total = oracle.rms_norm(x.float(), weight[0].float(), 1e-5, residual.float())
    found["rms_norm"] = max(relative(ours, expected), relative(total, expected_total))

    slots = torch.randperm(64, generator=torch.Generator().manual_seed(9))[:n].to(rig.device)
    slots[3] = -1
    packed = rig.noise(n, heads + 2 * kv_heads, dim, dtype=dtype, seed=6)
    angles = rig.noise(n, dim // 2, dtype=torch.float32, seed=7) * 3
    turned, wide = packed.clone(), packed.float()
    caches = [torch.zeros(2, 4, 16, kv_heads, dim, dtype=t.dtype, device=rig.device) for t in (turned, wide)]
    for back_end, x, cache in ((kernels, turned, caches[0]), (oracle, wide, caches[1])):
        query, key, value = x.split((heads, kv_heads, kv_heads), dim=1)
        back_end.rope_write(query, key, value, angles.cos(), angles.sin(), cache, slots)
    found["rope_write"] = max(relative(turned[:, :heads], wide[:, :heads]), relative(*caches))

    gate_up = rig.noise(n, 2 * 3 * width, dtype=dtype, seed=8)
    found["silu_mul"] = relative(kernels.silu_mul(gate_up), oracle.silu_mul(gate_up.float()))
    return found


def same_tokens(rig: Rig, cases: Cases) -> dict[str, Any]:
    """Greedy tokens of the tiny model in fp32: the device's kernels against the reference on the CPU."""
    prompts = [list(range(3, 3 + n)) for n in (1, 17, 70)]

    def tokens(runner: ModelRunner) -> list[list[int]]:
        greedy, found = SamplingParams(temperature=0.0), []
        for prompt in prompts:
            said, done, blocks = list(prompt), 0, list(range(1, 9))
            for _ in range(12):
                new = runner.run(runner.batch([Span(said[done:], done, blocks)], sm_count=16), [greedy], [0])
                done, said = len(said), said + new
            found.append(said)
        return found

    checkpoint = open_checkpoint("dummy:tiny")
    assert isinstance(checkpoint, DummyCheckpoint)

    def made(device: torch.device, kernels: str) -> ModelRunner:
        """The model, its weights drawn on the CPU: another device draws others."""
        with torch.device("meta"):
            model = Llama(checkpoint.config, make_kernels(kernels, device))
        state = {
            name: checkpoint.rope_frequencies()
            if name == "frequencies"
            else checkpoint.fill(name, torch.empty(t.shape))
            for name, t in model.state_dict().items()
        }
        model.load_state_dict({name: tensor.to(device) for name, tensor in state.items()}, assign=True)
        model.requires_grad_(False)
        return ModelRunner(model, KVPool(model.config, blocks=16, device=device))

    ours, expected = tokens(made(rig.device, "auto")), tokens(made(torch.device("cpu"), "torch"))
    if ours != expected:
        raise AssertionError(f"tokens differ: {ours} {expected}")
    return {"prompts": len(prompts), "equal": True}
