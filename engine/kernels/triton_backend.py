"""The Triton kernels behind the contract."""

from __future__ import annotations

from typing import ClassVar

import torch
import triton
from torch import Tensor

from engine.errors import SlalomError
from engine.kernels import compilations, triton_attention, triton_rows
from engine.kernels.base import Kernels
from engine.kernels.batch import Batch
from engine.kernels.work import Tiling


class TritonKernels(Kernels):
    """Kernels of a CUDA device; on a CPU they need Triton's interpreter, which computes bf16 products wrong.

    :raises SlalomError: (``attend``) bfloat16 under the interpreter
    """

    name: ClassVar[str] = "triton"
    replayable: ClassVar[bool] = True

    def __init__(self) -> None:
        compilations.watch()

    def tiling(self, max_query: int, heads: tuple[int, int, int], element_bytes: int, sm_count: int) -> Tiling | None:
        n_heads, n_kv_heads, head_dim = heads
        return triton_attention.plan_attention(
            max_query=max_query, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim,
            element_bytes=element_bytes, sm_count=sm_count,
        ).tiling  # fmt: skip

    def attend(self, query: Tensor, cache: Tensor, batch: Batch, scale: float) -> Tensor:
        if query.dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
            raise SlalomError("dtype", "bfloat16", "use float32 or float16 under TRITON_INTERPRET=1")
        return triton_attention.paged_attention(query, cache, batch, scale)

    def rope_write(
        self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor
    ) -> None:
        triton_rows.rope_write(query, key, value, cos, sin, cache, slots)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return triton_rows.rms_norm(x, weight, eps, residual)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return triton_rows.silu_mul(gate_up)
