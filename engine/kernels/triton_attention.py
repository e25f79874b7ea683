"""Paged attention in Triton: one kernel for decode, prefill chunks and mixed batches, and the split-KV merge.

A program takes an item of the pass's work list (:mod:`engine.kernels.work`) for one KV head: a block of query rows, a
row being one (token, query head of the group) pair, and a contiguous share of the context. It keeps a running softmax
in base 2 (Milakov & Gimelshein 2018). The only item of a block writes the result; of several, each writes a partial
one and its log-sum-exp, merged by a second kernel as in Flash-Decoding. Lengths are in the list, on the device, so that
a launch can be captured in a graph and replayed for other lengths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.batch import Batch
from engine.kernels.work import ITEM, MERGE, Tiling

_LOG2_E = 1.4426950408889634
_PROGRAMS_PER_SM = 2  # one decode program alone cannot keep an SM's share of the memory bandwidth busy
#: Stages of the loop over tiles. A tile is three loads that depend on each other (its pages, then keys, then values),
#: and Triton gives copies of their own stages only from five on: below, the loop waits for every copy that it began.
_STAGES = 5
_MERGE_PARTS = 32  # partial results that the merge holds at once, see engine.kernels.work


@triton.jit
def _tile(
    acc, top, total, query, positions, key_base, value_base, table, tile, end, scale,
    slot_stride, block_stride,
    PAGE: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold one tile of BLOCK_N keys into the running softmax (acc, top, total)."""
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    width = tl.arange(0, D_PAD)
    if MASKED:
        page = tl.load(table + keys // PAGE, mask=keys < end, other=0).to(tl.int64)
    else:
        page = tl.load(table + keys // PAGE).to(tl.int64)
    offsets = page * block_stride + (keys % PAGE) * slot_stride
    where = offsets[:, None] + width[None, :]
    if MASKED:
        inside = (keys < end)[:, None] & (width < D)[None, :]
        key = tl.load(key_base + where, mask=inside, other=0.0)
        value = tl.load(value_base + where, mask=inside, other=0.0)
    elif D == D_PAD:
        key = tl.load(key_base + where)
        value = tl.load(value_base + where)
    else:
        key = tl.load(key_base + where, mask=(width < D)[None, :], other=0.0)
        value = tl.load(value_base + where, mask=(width < D)[None, :], other=0.0)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if MASKED:
        scores = tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # a row that has seen no key yet has top = -inf, and -inf - -inf is not a number
    anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - anchor[:, None])
    shrink = tl.exp2(top - anchor)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    acc += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return acc, new_top, total


@triton.jit
def attention_kernel(
    query_ptr, key_ptr, value_ptr, table_ptr, items_ptr, out_ptr, partial_ptr, lse_ptr,
    scale, query_token_stride, query_head_stride, block_stride, slot_stride, head_stride, n_heads,
    ITEM: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (items, KV heads). ``out`` is [T, H, D]; ``partial`` fp32 [partials, TOKENS, H, D], ``lse`` without D."""
    item = items_ptr + tl.program_id(0) * ITEM
    kv_head = tl.program_id(1)
    n_rows = tl.load(item + 2)
    if n_rows == 0:
        return
    table = table_ptr + tl.load(item)
    first = tl.load(item + 1)
    position = tl.load(item + 3)  # of the first row; -1 of a padding sequence, which sees no key
    low = tl.load(item + 4)
    high = tl.load(item + 5)

    rows = tl.arange(0, BLOCK_M)
    width = tl.arange(0, D_PAD)
    token = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    live = token < n_rows
    inside = live[:, None] & (width < D)[None, :]
    row_offset = (first + token).to(tl.int64) * query_token_stride + head * query_head_stride
    query = tl.load(query_ptr + row_offset[:, None] + width[None, :], mask=inside, other=0.0)

    positions = position + token
    end = position + n_rows  # keys the last row sees
    clear = tl.minimum(high, (position + 1) // BLOCK_N)  # up to here all rows see all keys

    acc = tl.zeros([BLOCK_M, D_PAD], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    key_base = key_ptr + kv_head * head_stride
    value_base = value_ptr + kv_head * head_stride
    for tile in tl.range(low, clear, num_stages=STAGES):
        acc, top, total = _tile(
            acc, top, total, query, positions, key_base, value_base, table, tile, end, scale,
            slot_stride, block_stride, PAGE, BLOCK_N, D, D_PAD, False,
        )  # fmt: skip
    for tile in tl.range(tl.maximum(low, clear), high, num_stages=1):
        acc, top, total = _tile(
            acc, top, total, query, positions, key_base, value_base, table, tile, end, scale,
            slot_stride, block_stride, PAGE, BLOCK_N, D, D_PAD, True,
        )  # fmt: skip

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    part = tl.load(item + 6)  # only now: while tiles are computed, registers are scarce
    if part < 0:
        out_row = (first + token).to(tl.int64) * n_heads + head
        tl.store(out_ptr + out_row[:, None] * D + width[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        out_row = (part.to(tl.int64) * TOKENS + token) * n_heads + head
        lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(tl.where(total == 0.0, 1.0, total)))
        tl.store(lse_ptr + out_row, lse, mask=live)
        tl.store(partial_ptr + out_row[:, None] * D + width[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def merge_kernel(
    partial_ptr, lse_ptr, out_ptr, merges_ptr, n_heads, tokens,
    MERGE: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Grid: (merges, H). Weighs the partial results of each row of a block by their log-sum-exp."""
    merge = merges_ptr + tl.program_id(0) * MERGE
    head = tl.program_id(1)
    rows = tl.load(merge + 1)  # none: a place of a graph's list that this pass does not need
    first_row = tl.load(merge)
    first_part = tl.load(merge + 2)
    parts = tl.load(merge + 3)
    part = tl.arange(0, PARTS)
    width = tl.arange(0, D_PAD)
    inside = (part < parts)[:, None] & (width < D)[None, :]
    for token in tl.range(0, rows, num_stages=1):
        where = ((first_part + part).to(tl.int64) * tokens + token) * n_heads + head
        lse = tl.load(lse_ptr + where, mask=part < parts, other=float("-inf"))
        top = tl.max(lse, 0)
        weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
        total = tl.sum(weight, 0)
        weight = weight / tl.where(total == 0.0, 1.0, total)
        partial = tl.load(partial_ptr + where[:, None] * D + width[None, :], mask=inside, other=0.0)
        out = tl.sum(partial * weight[:, None], 0)
        row = (first_row + token).to(tl.int64) * n_heads + head
        tl.store(out_ptr + row * D + width, out.to(out_ptr.dtype.element_ty), mask=width < D)


class AttentionPlan(NamedTuple):
    """Launch shape of one attention call: a function of shapes only, so every replay of a graph keeps it."""

    block_m: int
    num_warps: int
    tiling: Tiling


def plan_attention(
    *, max_query: int, n_heads: int, n_kv_heads: int, head_dim: int, element_bytes: int, sm_count: int
) -> AttentionPlan:
    """Tile sizes, and how many items fill a lane of ``sm_count`` SMs."""
    group = n_heads // n_kv_heads
    block_m = max(16, triton.next_power_of_2(min(group * max_query, 128)), triton.next_power_of_2(group))
    wide = element_bytes == 4 or head_dim > 128
    if wide:
        block_m = max(min(block_m, 32), triton.next_power_of_2(group))
    tokens = 1 if max_query == 1 else block_m // group
    fill = max(1, _PROGRAMS_PER_SM * sm_count // n_kv_heads)
    return AttentionPlan(block_m, 8 if block_m == 128 else 4, Tiling(tokens, 32 if wide else 64, fill))


def paged_attention(query: Tensor, cache: Tensor, batch: Batch, scale: float) -> Tensor:
    """:meth:`Kernels.attend`; the work list is made in the first layer, and lies in ``batch`` for the others."""
    n_rows, n_heads, head_dim = query.shape
    _, _, page, n_kv_heads, _ = cache.shape
    block_m, num_warps, tiling = plan_attention(
        max_query=batch.max_query, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim,
        element_bytes=query.element_size(), sm_count=batch.sm_count,
    )  # fmt: skip
    work = batch.work(tiling)
    out = torch.empty((n_rows, n_heads, head_dim), dtype=query.dtype, device=query.device)
    rows = work.partials * tiling.tokens * n_heads
    lse = torch.empty(rows, dtype=torch.float32, device=query.device)
    partial = torch.empty((rows, head_dim), dtype=torch.float32, device=query.device)
    d_pad = max(16, triton.next_power_of_2(head_dim))
    attention_kernel[(work.items.shape[0], n_kv_heads)](
        query, cache[0], cache[1], batch.block_tables, work.items, out, partial, lse,
        scale * _LOG2_E, query.stride(0), query.stride(1), cache.stride(1), cache.stride(2), cache.stride(3), n_heads,
        ITEM=ITEM, TOKENS=tiling.tokens, GROUP=n_heads // n_kv_heads, PAGE=page, D=head_dim, D_PAD=d_pad,
        BLOCK_M=block_m, BLOCK_N=tiling.keys, STAGES=_STAGES, num_warps=num_warps,
    )  # fmt: skip
    if work.merges.shape[0]:
        merge_kernel[(work.merges.shape[0], n_heads)](
            partial, lse, out, work.merges, n_heads, tiling.tokens,
            MERGE=MERGE, PARTS=_MERGE_PARTS, D=head_dim, D_PAD=d_pad, num_warps=4,
        )  # fmt: skip
    return out
