"""FlashInfer behind the kernels' contract, with a stand-in of its documented interface; a GPU has not seen it."""

from __future__ import annotations

import importlib.machinery
import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from test_kernels import lay_out

from engine.errors import SlalomError
from engine.kernels import Batch, Span, make_kernels
from engine.kernels.reference import TorchKernels

pytest.importorskip("triton")
pytest.importorskip("engine.kernels.triton_backend")  # before a test asks for the interpreter, which would stay
HEADS, KV_HEADS, DIM, PAGE = 4, 2, 64, 16
SCALE = 0.2


class Wrapper:
    """The arguments of flashinfer 0.7.4 that are used here, by their names; computed densely, page by page."""

    plans = 0

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "NHD"

    def plan(
        self, qo_indptr: torch.Tensor, paged_kv_indptr: torch.Tensor, paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, *,
        causal: bool = False, sm_scale: float | None = None, q_data_type: Any = "float16", kv_data_type: Any = None,
    ) -> None:  # fmt: skip
        Wrapper.plans += 1
        columns = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(column.dtype == torch.int32 for column in columns)
        assert (num_qo_heads, num_kv_heads, head_dim_qk, page_size) == (HEADS, KV_HEADS, DIM, PAGE)
        assert causal
        assert q_data_type == kv_data_type
        assert q_data_type in (torch.float16, torch.bfloat16)
        self.columns, self.scale = [column.tolist() for column in columns], sm_scale

    def run(self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        assert q.is_contiguous()
        rows, pages, indices, last = self.columns
        out = torch.empty_like(q)
        for s in range(len(last)):
            mine = indices[pages[s] : pages[s + 1]]
            context = (len(mine) - 1) * PAGE + last[s]
            keys, values = (x[mine].flatten(0, 1)[:context].repeat_interleave(2, 1).float() for x in paged_kv_cache)
            query = q[rows[s] : rows[s + 1]].float()
            n = len(query)
            seen = torch.ones(n, context, dtype=torch.bool).tril(context - n)
            scores = torch.einsum("qhd,khd->hqk", query, keys) * self.scale
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            out[rows[s] : rows[s + 1]] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
        return out


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Wrapper
    module.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # nothing of Triton is launched
    Wrapper.plans = 0
    return make_kernels("flashinfer", "cpu")


def tensors(batch: Batch, blocks: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(batch.n_rows, HEADS + 2 * KV_HEADS, DIM, generator=generator).to(torch.float16)
    cache = torch.randn(2, blocks, PAGE, KV_HEADS, DIM, generator=generator).to(torch.float16)
    return packed[:, :HEADS], cache


def expected(query: torch.Tensor, cache: torch.Tensor, batch: Batch) -> torch.Tensor:
    return TorchKernels().attend(query.float(), cache.float(), batch, SCALE)


def test_long_prompts_beside_short_ones_and_decodes(kernels: Any) -> None:
    batch, blocks = lay_out([(1, 20), (500, 77), (3, 0), (16, 16), (40, 600)])
    query, cache = tensors(batch, blocks)
    for _ in range(3):  # the layers of a pass share its plan
        ours = kernels.attend(query, cache, batch, SCALE)
    torch.testing.assert_close(ours.float(), expected(query, cache, batch), atol=2e-3, rtol=2e-3)
    assert Wrapper.plans == 1
    other, blocks = lay_out([(600, 0)])
    theirs = tensors(other, blocks, 1)
    torch.testing.assert_close(
        kernels.attend(*theirs, other, SCALE).float(), expected(*theirs, other), atol=2e-3, rtol=2e-3
    )
    torch.testing.assert_close(kernels.attend(query, cache, batch, SCALE), ours)  # it had stood aside
    assert Wrapper.plans == 3


@pytest.mark.parametrize("reason", ["few rows", "32 bits", "padding"])
def test_the_rest_is_triton_s(kernels: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Batch] = []
    monkeypatch.setattr(
        "engine.kernels.triton_attention.paged_attention", lambda query, cache, batch, scale: taken.append(batch)
    )
    rows = 511 if reason == "few rows" else 600
    batch, blocks = lay_out([(rows, 0)])
    if reason == "padding":
        batch = Batch.build([Span([0] * 600, 0, range(38))], block_tokens=PAGE, pad_to=2)
        object.__setattr__(batch, "context_tokens", (600, 0))
    query, cache = tensors(batch, blocks)
    if reason == "32 bits":
        query, cache = query.float(), cache.float()
    kernels.attend(query, cache, batch, SCALE)
    assert taken == [batch]
    assert Wrapper.plans == 0


def test_it_is_warmed_and_never_chosen_unasked(kernels: Any) -> None:
    assert 512 in kernels.warm_rows
    assert make_kernels("auto", "cpu").name == "compiled"


def test_where_it_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SlalomError, match="flashinfer on cpu"):
        make_kernels("flashinfer", "cpu")
    if importlib.util.find_spec("flashinfer") is None:
        with pytest.raises(SlalomError, match=r"slalom\[flashinfer\]"):
            make_kernels("flashinfer", "cuda")


def test_the_stand_in_has_the_real_signatures() -> None:
    real = pytest.importorskip("flashinfer").BatchPrefillWithPagedKVCacheWrapper
    for name in ("__init__", "plan", "run"):
        theirs = inspect.signature(getattr(real, name)).parameters
        for k, (argument, ours) in enumerate(inspect.signature(getattr(Wrapper, name)).parameters.items()):
            assert argument in theirs, f"{name}({argument})"
            if ours.kind is not inspect.Parameter.KEYWORD_ONLY:
                assert list(theirs)[k] == argument
