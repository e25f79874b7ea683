"""Attention of long prompts by FlashInfer, an extra; everything else by our Triton kernels. Not yet verified on GPU.

FlashInfer (Ye et al., MLSys 2025, arXiv 2501.01005) cuts a pass on the host, in ``plan``, and a graph would need a new
plan before each replay. So it gets the passes that no graph holds: those of many rows. They are bound by the device,
and a plan on the host costs them nothing. Decodes and short chunks stay with Triton and its graphs.
"""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from engine.kernels.batch import Batch
from engine.kernels.packing import upload
from engine.kernels.triton_backend import TritonKernels

#: Passes of fewer rows may be replayed by graphs, whose kernels must be the same whatever they hold.
LEAST_ROWS = 512
_TYPES = (torch.float16, torch.bfloat16)
_HEAD_DIMS = (64, 128, 256)
_WORKSPACE_BYTES = 128 << 20  # as its documentation recommends


class FlashInferKernels(TritonKernels):
    """Triton's kernels, but for attention of passes of ``LEAST_ROWS`` rows and more in 16 bits."""

    name: ClassVar[str] = "flashinfer"
    warm_rows: ClassVar[tuple[int, ...]] = (*TritonKernels.warm_rows, LEAST_ROWS)

    def __init__(self) -> None:
        import flashinfer

        super().__init__()
        self._wrapper: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper
        self._own = threading.local()  # each lane has a thread, so lanes share no plan

    def attend(self, query: Tensor, cache: Tensor, batch: Batch, scale: float) -> Tensor:
        fits = batch.n_rows >= LEAST_ROWS and query.dtype in _TYPES and query.shape[2] in _HEAD_DIMS
        if not fits or min(batch.context_tokens) == 0:
            return super().attend(query, cache, batch, scale)
        mixed: Tensor = self._planned(query, cache, batch, scale).run(query.contiguous(), (cache[0], cache[1]))
        return mixed

    def _planned(self, query: Tensor, cache: Tensor, batch: Batch, scale: float) -> Any:
        """The wrapper of this thread with the plan of ``batch``: made by its first layer, for all of them.

        Another pass may run between two layers (it stands aside), and then the plan is made again.
        """
        own = self._own.__dict__
        if "wrapper" not in own:
            workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=query.device)
            own["wrapper"] = self._wrapper(workspace, "NHD")
        if own.get("batch") is not batch:
            own["batch"] = None  # none, should this plan fail
            page, (heads, dim), kv_heads = cache.shape[2], query.shape[1:], cache.shape[3]
            rows, pages, last, places = _columns(batch, page)
            (places_there,) = upload((places,), query.device)
            own["wrapper"].plan(
                torch.from_numpy(rows), torch.from_numpy(pages), batch.block_tables.flatten()[places_there],
                torch.from_numpy(last), heads, kv_heads, dim, page, causal=True, sm_scale=scale,
                q_data_type=query.dtype, kv_data_type=cache.dtype,
            )  # fmt: skip
            own["batch"] = batch
        return own["wrapper"]


def _columns(batch: Batch, page: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """First row and first page of each sequence (int32 (S + 1,)), tokens in its last page (int32 (S,)), and where in
    the flat block tables its pages stand (int64).
    """
    context = np.array(batch.context_tokens)
    n_pages = -(-context // page)
    rows, pages = (np.concatenate(([0], np.cumsum(n))).astype(np.int32) for n in (batch.query_tokens, n_pages))
    owner = np.arange(len(context)).repeat(n_pages)
    places = owner * batch.block_tables.shape[1] + np.arange(len(owner)) - pages[owner]
    return rows, pages, ((context - 1) % page + 1).astype(np.int32), places
