"""The row-wise kernels in Triton: rotary embedding with KV write, RMS norm with residual, SiLU gate.

All are bound by memory traffic: each reads and writes every element once and keeps one row (or one token's
heads) in registers. Arithmetic is fp32 whatever the storage type.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


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
def _rotated(x, cos, sin, inside, HALF: tl.constexpr):
    """Both halves of heads, rotated; ``x`` points at the first half."""
    first = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + HALF, mask=inside, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def rope_write_kernel(
    query_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, key_cache_ptr, value_cache_ptr, slots_ptr,
    query_token_stride, query_head_stride, key_token_stride, key_head_stride, value_token_stride, slot_stride,
    n_heads, n_kv_heads,
    HEADS_PAD: tl.constexpr, KV_HEADS_PAD: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
):  # fmt: skip
    """Grid: (T,). One token: rotates its query in place; its rotated key and its value go to its slot."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, HALF_PAD)
    cos = tl.load(cos_ptr + row * HALF + lane, mask=lane < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + row * HALF + lane, mask=lane < HALF, other=0.0)[None, :]

    head = tl.arange(0, HEADS_PAD)[:, None]
    inside = (head < n_heads) & (lane < HALF)[None, :]
    query = query_ptr + row * query_token_stride + head * query_head_stride + lane[None, :]
    first, second = _rotated(query, cos, sin, inside, HALF)
    tl.store(query, first.to(query_ptr.dtype.element_ty), mask=inside)
    tl.store(query + HALF, second.to(query_ptr.dtype.element_ty), mask=inside)

    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    head = tl.arange(0, KV_HEADS_PAD)[:, None]
    inside = (head < n_kv_heads) & (lane < HALF)[None, :]
    key = key_ptr + row * key_token_stride + head * key_head_stride + lane[None, :]
    first, second = _rotated(key, cos, sin, inside, HALF)
    into = key_cache_ptr + slot * slot_stride + head * (2 * HALF) + lane[None, :]
    tl.store(into, first.to(key_cache_ptr.dtype.element_ty), mask=inside)
    tl.store(into + HALF, second.to(key_cache_ptr.dtype.element_ty), mask=inside)

    lane = tl.arange(0, WIDTH_PAD)
    value = tl.load(value_ptr + row * value_token_stride + lane, mask=lane < WIDTH)
    tl.store(value_cache_ptr + slot * slot_stride + lane, value, mask=lane < WIDTH)


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


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """:meth:`Kernels.rms_norm`."""
    width = x.shape[-1]
    inner = x.shape[1] if x.dim() == 3 else 1
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    padded = triton.next_power_of_2(width)  # of which warps take an equal part: their number is a power of two as well
    norm_kernel[(x.shape[0] * inner,)](
        x, x if residual is None else residual, weight, out, total, x.stride(0), x.stride(1), inner, eps,
        WIDTH=width, WIDTH_PAD=padded, ADD=residual is not None, num_warps=min(8, max(1, padded // 512)),
    )  # fmt: skip
    return out, total


def rope_write(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor
) -> None:
    """:meth:`Kernels.rope_write`."""
    n_heads, n_kv_heads, half = query.shape[1], key.shape[1], query.shape[2] // 2
    width = n_kv_heads * 2 * half
    rope_write_kernel[(query.shape[0],)](
        query, key, value, cos, sin, cache[0], cache[1], slots,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), cache.stride(2),
        n_heads, n_kv_heads,
        HEADS_PAD=triton.next_power_of_2(n_heads), KV_HEADS_PAD=triton.next_power_of_2(n_kv_heads),
        HALF=half, HALF_PAD=triton.next_power_of_2(half),
        WIDTH=width, WIDTH_PAD=triton.next_power_of_2(width), num_warps=4,
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
