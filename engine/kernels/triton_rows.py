"""The row-wise kernels in Triton: KV write, RMS norm with residual, rotary embedding, SiLU gate.

All are bound by memory traffic: each reads and writes every element once and keeps one row (or one token's
heads) in registers. Arithmetic is fp32 whatever the storage type.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "norm_kernel",
    "rms_norm",
    "rope",
    "rope_kernel",
    "silu_kernel",
    "silu_mul",
    "write_kernel",
    "write_kv",
]


@triton.jit
def write_kernel(
    key_ptr, value_ptr, key_cache_ptr, value_cache_ptr, slots_ptr, key_stride, value_stride, slot_stride,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """Grid: (T,). Copies one token's K * D keys and values to its slot."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    lane = tl.arange(0, WIDTH_PAD)
    key = tl.load(key_ptr + row * key_stride + lane, mask=lane < WIDTH)
    value = tl.load(value_ptr + row * value_stride + lane, mask=lane < WIDTH)
    tl.store(key_cache_ptr + slot * slot_stride + lane, key, mask=lane < WIDTH)
    tl.store(value_cache_ptr + slot * slot_stride + lane, value, mask=lane < WIDTH)


@triton.jit
def norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, token_stride, head_stride, n_inner, eps,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Grid: (rows,). Row r is head ``r % n_inner`` of token ``r // n_inner``; outputs are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, WIDTH_PAD)
    inside = lane < WIDTH
    x_row = x_ptr + (row // n_inner) * token_stride + (row % n_inner) * head_stride
    x = tl.load(x_row + lane, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row * WIDTH + lane, mask=inside, other=0.0).to(tl.float32)
        tl.store(total_ptr + row * WIDTH + lane, x.to(total_ptr.dtype.element_ty), mask=inside)
    x = x * (1.0 / tl.sqrt(tl.sum(x * x, 0) / WIDTH + eps))
    weight = tl.load(weight_ptr + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + lane, (x * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(x, cos, sin, n_heads, stride, HEADS_PAD: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    head = tl.arange(0, HEADS_PAD)[:, None]
    lane = tl.arange(0, HALF_PAD)[None, :]
    inside = (head < n_heads) & (lane < HALF)
    where = x + head * stride + lane
    first = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(where + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(where, (first * cos - second * sin).to(x.dtype.element_ty), mask=inside)
    tl.store(where + HALF, (second * cos + first * sin).to(x.dtype.element_ty), mask=inside)


@triton.jit
def rope_kernel(
    query_ptr, key_ptr, cos_ptr, sin_ptr,
    query_token_stride, query_head_stride, key_token_stride, key_head_stride, n_heads, n_kv_heads,
    HEADS_PAD: tl.constexpr, KV_HEADS_PAD: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
):  # fmt: skip
    """Grid: (T,). Rotates all heads of one token, query and key."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, HALF_PAD)
    cos = tl.load(cos_ptr + row * HALF + lane, mask=lane < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + row * HALF + lane, mask=lane < HALF, other=0.0)[None, :]
    query = query_ptr + row * query_token_stride
    key = key_ptr + row * key_token_stride
    _rotate(query, cos, sin, n_heads, query_head_stride, HEADS_PAD, HALF, HALF_PAD)
    _rotate(key, cos, sin, n_kv_heads, key_head_stride, KV_HEADS_PAD, HALF, HALF_PAD)


@triton.jit
def silu_kernel(gate_up_ptr, out_ptr, token_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (T, ceil(F / BLOCK))."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < WIDTH
    gate = tl.load(gate_up_ptr + row * token_stride + lane, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * token_stride + WIDTH + lane, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp2(gate * -1.4426950408889634)) * up
    tl.store(out_ptr + row * WIDTH + lane, out.to(out_ptr.dtype.element_ty), mask=inside)


def write_kv(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    """:meth:`Kernels.write_kv`."""
    width = key.shape[1] * key.shape[2]
    write_kernel[(key.shape[0],)](
        key, value, cache[0], cache[1], slots, key.stride(0), value.stride(0), cache.stride(2),
        WIDTH=width, WIDTH_PAD=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """:meth:`Kernels.rms_norm`."""
    width = x.shape[-1]
    inner = x.shape[1] if x.dim() == 3 else 1
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    norm_kernel[(x.shape[0] * inner,)](
        x, x if residual is None else residual, weight, out, total, x.stride(0), x.stride(1), inner, eps,
        WIDTH=width, WIDTH_PAD=triton.next_power_of_2(width), ADD=residual is not None,
        num_warps=min(8, max(1, width // 512)),
    )  # fmt: skip
    return out, total


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> None:
    """:meth:`Kernels.rope`."""
    half = query.shape[2] // 2
    rope_kernel[(query.shape[0],)](
        query, key, cos, sin, query.stride(0), query.stride(1), key.stride(0), key.stride(1),
        query.shape[1], key.shape[1],
        HEADS_PAD=triton.next_power_of_2(query.shape[1]), KV_HEADS_PAD=triton.next_power_of_2(key.shape[1]),
        HALF=half, HALF_PAD=triton.next_power_of_2(half), num_warps=4,
    )  # fmt: skip


def silu_mul(gate_up: Tensor) -> Tensor:
    """:meth:`Kernels.silu_mul`."""
    n_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((n_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, triton.next_power_of_2(width))
    silu_kernel[(n_rows, triton.cdiv(width, block))](
        gate_up, out, gate_up.stride(0), WIDTH=width, BLOCK=block, num_warps=4
    )
    return out
