"""The operations in plain torch: what a CPU runs, and what the Triton kernels are tested against."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.base import Kernels
from engine.kernels.batch import Batch


class TorchKernels(Kernels):
    """Reference kernels. ``attend`` loops over sequences on the host (block tables stay on the device)."""

    name: ClassVar[str] = "torch"

    def attend(self, query: Tensor, cache: Tensor, batch: Batch, scale: float) -> Tensor:
        out = torch.empty_like(query)
        self.attend_chunks(query, cache, batch, scale, out, at_least=1)
        return out

    def attend_chunks(
        self, query: Tensor, cache: Tensor, batch: Batch, scale: float, out: Tensor, *, at_least: int
    ) -> None:
        """:meth:`attend` into ``out`` for the sequences with ``at_least`` that many rows."""
        block_tokens = cache.shape[2]
        row = 0
        for seq, (n, context) in enumerate(zip(batch.query_tokens, batch.context_tokens, strict=True)):
            rows = slice(row, row + n)
            row += n
            if n < at_least:
                continue
            if context == 0:
                out[rows] = 0.0
                continue
            blocks = batch.block_tables[seq, : -(-context // block_tokens)]
            # two selections of whole blocks are plain copies; one of both planes at once is done word by word
            keys, values = (
                plane.index_select(0, blocks).flatten(0, 1)[:context].transpose(0, 1)  # [K, context, D]
                for plane in cache
            )
            attend = _attend_one if n == 1 else _attend_chunk
            out[rows] = attend(query[rows], keys, values, scale)

    def rope_write(
        self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor
    ) -> None:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        for x in (query, key):
            first, second = x.float().chunk(2, dim=-1)
            x.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
        if bool((slots < 0).any()):
            kept = slots >= 0
            key, value, slots = key[kept], value[kept], slots[kept]
        flat = cache.flatten(1, 2)
        flat[0].index_copy_(0, slots, key)
        flat[1].index_copy_(0, slots, value)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        wide = total.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return wide.to(x.dtype) * weight, total

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up


def _attend_one(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """One row [1, H, D] over keys [K, c, D]: a KV group's heads are the query rows, so no mask."""
    grouped = query.view(keys.shape[0], -1, query.shape[-1])
    return F.scaled_dot_product_attention(grouped, keys, values, scale=scale).view_as(query)


def _attend_chunk(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """The last n rows [n, H, D] of a context of c tokens, causal."""
    n, context = query.shape[0], keys.shape[1]
    mask = None
    if n < context:
        mask = torch.ones(n, context, dtype=torch.bool, device=query.device).tril(context - n)
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=keys.shape[0] != query.shape[1],
    )
    return out.squeeze(0).transpose(0, 1)
