"""The kernel back ends against dense float64 answers; Triton's under its interpreter (see the last test)."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.errors import SlalomError
from engine.kernels import Batch, Kernels, Span, make_kernels
from engine.kernels.packing import upload
from engine.kernels.work import Tiling, work_list

torch.set_num_threads(1)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PAGE = 16
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
ALL = ["torch", "compiled", pytest.param("triton", marks=interpreted)]
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3}


@pytest.fixture(params=ALL)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return make_kernels(request.param, "cpu")


def lay_out(lengths: list[tuple[int, int]], sm_count: int = 1) -> tuple[Batch, int]:
    """A batch of (new tokens, tokens before) sequences on shuffled blocks, and the number of blocks."""
    need = [-(-(new + past) // PAGE) for new, past in lengths]
    order = torch.randperm(sum(need), generator=torch.Generator().manual_seed(0)).add(1).tolist()
    spans = []
    for (new, past), blocks in zip(lengths, need, strict=True):
        spans.append(Span([0] * new, past, [order.pop() for _ in range(blocks)]))
    return Batch.build(spans, block_tokens=PAGE, sm_count=sm_count), sum(need) + 1


def dense_attention(query: Tensor, cache: Tensor, batch: Batch, scale: float) -> Tensor:
    """Softmax in float64, one row and one head at a time, straight from the definition."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    group = query.shape[1] // cache.shape[3]
    row = 0
    for seq, (n, context) in enumerate(zip(batch.query_tokens, batch.context_tokens, strict=True)):
        for i in range(n):
            seen = context - n + i + 1
            places = [(int(batch.block_tables[seq, p // PAGE]), p % PAGE) for p in range(seen)]
            if not places:
                continue
            block, offset = (torch.tensor(x) for x in zip(*places, strict=True))
            for head in range(query.shape[1]):
                keys = cache[0, block, offset, head // group].double()
                values = cache[1, block, offset, head // group].double()
                out[row + i, head] = torch.softmax(keys @ query[row + i, head].double() * scale, 0) @ values
        row += n
    return out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "dim", "sms"),
    [
        ([(1, 129)], 4, 2, 32, 1),
        ([(1, 3), (1, 299), (1, 15), (1, 16)], 3, 1, 16, 16),
        ([(40, 0)], 6, 2, 16, 1),
        ([(24, 37)], 2, 2, 24, 1),
        ([(1, 20), (19, 64), (1, 0), (33, 0)], 6, 2, 16, 1),
        ([(8, 28), (8, 60), (1, 520)], 4, 1, 16, 32),  # some rows see nothing of the later splits
    ],
    ids=["decode", "decode-split", "prefill", "chunk-odd-width", "mixed", "chunk-split"],
)
def test_attention_matches_the_definition(
    kernels: Kernels,
    lengths: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    dim: int,
    sms: int,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(1)
    batch, blocks = lay_out(lengths, sms)
    cache = torch.randn(2, blocks, PAGE, kv_heads, dim).to(dtype)
    packed = torch.randn(batch.n_rows, heads + 3, dim).to(dtype)
    query = packed[:, :heads]  # strided, as a slice of the fused projection is
    scale = 1 / math.sqrt(dim)
    out = kernels.attend(query, cache, batch, scale)
    expected = dense_attention(query, cache, batch, scale)
    assert out.shape == query.shape
    assert (out.double() - expected).abs().max() < TOLERANCE[dtype]


def items_of(counts: list[int], contexts: list[int], tiling: Tiling) -> tuple[np.ndarray, np.ndarray]:
    return work_list(np.array(counts), np.array(contexts), 1000, tiling)


def test_splitting_is_what_the_split_cases_exercise() -> None:
    """Few programs split, short contexts and full lanes do not: by what fills 132 or 32 SMs at 8 KV heads."""
    splits = [
        int(items_of([1] * n, [context] * n, Tiling(1, 64, fill))[1][:, 3].max(initial=1))
        for n, context, fill in [(1, 8192, 33), (1, 128, 33), (64, 8192, 33), (8, 8192, 33), (8, 8192, 8)]
    ]
    assert splits == [32, 1, 1, 4, 1]


def test_a_long_sequence_beside_short_ones_is_spread_over_the_lane() -> None:
    """100 k tokens beside 63 of 200: by one rule for all sequences they would stay on one program for each KV head."""
    items, merges = items_of([1] * 64, [100_000] + [200] * 63, Tiling(1, 64, 33))
    tiles = items[:, 5] - items[:, 4]
    assert merges.tolist() == [[0, 1, 0, 29]], "only the long one is split"
    assert int(tiles.max()) <= 1.05 * 1563 / 29
    assert len(items) == 63 + 29


@given(
    sequences=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 5000)), min_size=1, max_size=40),
    padding=st.integers(0, 3),
    tiling=st.builds(Tiling, st.sampled_from([1, 4, 32]), st.sampled_from([32, 64]), st.integers(1, 66)),
)
def test_every_key_of_every_row_is_in_one_item(sequences: list[tuple[int, int]], padding: int, tiling: Tiling) -> None:
    counts = [new for new, _ in sequences] + [1] * padding
    contexts = [new + past for new, past in sequences] + [0] * padding
    items, merges = items_of(counts, contexts, tiling)
    seen: dict[int, list[tuple[int, int]]] = {}
    for table, row, rows, position, low, high, partial, _ in items.tolist():
        for token in range(rows):
            seen.setdefault(row + token, []).append((low, high))
        sequence = table // 1000
        assert row == sum(counts[:sequence]) + position - (contexts[sequence] - counts[sequence])
        assert high <= -(-(position + rows) // tiling.keys)
        assert partial < tiling.partials
    assert sorted(seen) == list(range(sum(counts))), "a row without an item"
    row = 0
    for count, context in zip(counts, contexts, strict=True):
        for k in range(count):
            pieces = sorted(seen[row])
            assert pieces[0][0] == 0
            assert all(before[1] == after[0] for before, after in itertools.pairwise(pieces))
            assert pieces[-1][1] * tiling.keys >= context - count + k + 1, "keys are left out"
            row += 1
    assert len(items) <= tiling.items(sum(counts), len(counts))
    assert len(merges) <= tiling.merges
    assert merges[:, 3].max(initial=0) <= 32, "more than the merge holds"
    split = items[items[:, 6] >= 0]
    assert sorted(split[:, 6].tolist()) == list(range(int(merges[:, 3].sum()))), "partial results overlap"


@pytest.mark.parametrize("device", ["meta"])
def test_arrays_go_to_a_device_together_and_aligned(device: str) -> None:
    arrays = [np.arange(3, dtype=np.int64), np.zeros((2, 5), np.int32), np.zeros(0, np.int32), np.ones(7, np.int64)]
    placed = upload(arrays, device)
    assert [(tuple(t.shape), t.dtype) for t in placed] == [(a.shape, torch.from_numpy(a).dtype) for a in arrays]
    assert len({t.untyped_storage()._cdata for t in placed}) == 1, "more than one copy"
    assert all(t.storage_offset() * t.element_size() % 16 == 0 for t in placed)


def test_padding_rows_are_zero_and_leave_no_trace(kernels: Kernels) -> None:
    torch.manual_seed(2)
    batch, blocks = lay_out([(1, 40), (1, 5)])
    batch = replace(
        batch,
        context_lens=torch.tensor([41, 0], dtype=torch.int32),
        context_tokens=(41, 0),
        slots=torch.tensor([int(batch.slots[0]), -1]),
    )
    cache = torch.randn(2, blocks, PAGE, 2, 16)
    before = cache.clone()
    key, value = torch.randn(2, 2, 2, 16).unbind(0)
    still = torch.ones(2, 8), torch.zeros(2, 8)  # cosines and sines of no rotation
    kernels.rope_write(torch.randn(2, 4, 16), key, value, *still, cache, batch.slots)
    slot = int(batch.slots[0])
    changed = (cache != before).flatten(1, 2).any(-1).any(-1)
    assert changed[0].nonzero().tolist() == changed[1].nonzero().tolist() == [[slot]]
    assert torch.equal(cache.flatten(1, 2)[:, slot], torch.stack((key[0], value[0])))
    out = kernels.attend(torch.randn(2, 4, 16), cache, batch, 0.25)
    assert torch.equal(out[1], torch.zeros(4, 16))
    assert bool(out[0].isfinite().all())


def test_compiled_attention_of_a_sequence_does_not_depend_on_the_batch() -> None:
    kernels = make_kernels("compiled", "cpu")
    batch, blocks = lay_out([(1, 40), (1, 200), (9, 30), (1, 0)])
    torch.manual_seed(7)
    cache, query = torch.randn(2, blocks, PAGE, 2, 24), torch.randn(batch.n_rows, 6, 24)
    together = kernels.attend(query, cache, batch, 0.2)
    row = 0
    for seq, n in enumerate(batch.query_tokens):
        used = -(-batch.context_tokens[seq] // PAGE)
        span = Span([0] * n, batch.context_tokens[seq] - n, batch.block_tables[seq, :used].tolist())
        alone = kernels.attend(query[row : row + n], cache, Batch.build([span], block_tokens=PAGE), 0.2)
        assert torch.equal(alone, together[row : row + n])
        row += n


def test_compiled_attention_survives_extreme_scores() -> None:
    """Scores far apart (one key takes all) and very negative ones."""
    kernels, oracle = make_kernels("compiled", "cpu"), make_kernels("torch", "cpu")
    batch, blocks = lay_out([(1, 99)])
    torch.manual_seed(8)
    cache, query = torch.randn(2, blocks, PAGE, 1, 16) * 30, torch.randn(1, 2, 16) * 30
    ours, expected = (k.attend(query, cache, batch, 1.0) for k in (kernels, oracle))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rms_norm(kernels: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x, residual = torch.randn(2, 5, 72).to(dtype).unbind(0)
    weight = torch.randn(72).to(dtype)
    normed, total = kernels.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(total, x + residual)
    wide = total.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert (normed.double() - expected).abs().max() < 4 * TOLERANCE[dtype]

    heads = torch.randn(5, 9, 16).to(dtype)[:, 2:6]  # query heads inside the fused projection
    normed, same = kernels.rms_norm(heads, weight[:16], 1e-5)
    wide = heads.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight[:16].double()
    assert (normed.double() - expected).abs().max() < 4 * TOLERANCE[dtype]
    assert same is heads


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rope_is_a_rotation_of_complex_pairs_and_fills_the_slots(kernels: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    packed = torch.randn(4, 7, 24).to(dtype)
    query, key, value = packed[:, :3], packed[:, 3:5], packed[:, 5:].clone()
    cache, slots = torch.zeros(2, 2, PAGE, 2, 24, dtype=dtype), torch.tensor([17, -1, 3, 31])
    angles = torch.rand(4, 12, dtype=torch.float64) * 6

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.complex(x[..., :12].double(), x[..., 12:].double())
        turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.cat((turned.real, turned.imag), -1)

    expected = rotated(query), rotated(key)
    kernels.rope_write(query, key, packed[:, 5:], angles.cos().float(), angles.sin().float(), cache, slots)
    assert (query.double() - expected[0]).abs().max() < TOLERANCE[dtype]
    assert torch.equal(packed[:, 5:], value)
    kept, keys, values = slots >= 0, *cache.flatten(1, 2)
    assert (keys[slots[kept]].double() - expected[1][kept]).abs().max() < TOLERANCE[dtype]
    assert torch.equal(values[slots[kept]], value[kept])
    others = torch.tensor([s not in slots.tolist() for s in range(2 * PAGE)])
    assert not cache.flatten(1, 2)[:, others].any(), "KV where no slot is"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_silu_mul(kernels: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    gate_up = (torch.randn(3, 2 * 70) * 4).to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    out = kernels.silu_mul(gate_up)
    assert out.shape == (3, 70)
    assert (out.double() - gate / (1 + (-gate).exp()) * up).abs().max() < 8 * TOLERANCE[dtype]


@interpreted
def test_whole_model_on_triton_kernels() -> None:
    """The strides and views a model really passes: a prompt, then a mixed step."""
    from engine.model import KVPool, Llama, load_model
    from engine.model.config import DUMMY_SHAPES

    plain = load_model("dummy:tiny")
    config = replace(DUMMY_SHAPES["tiny"], n_layers=2, qk_norm=True, qkv_bias=True)
    results = []
    for name in ("torch", "triton"):
        torch.manual_seed(6)
        model = Llama(config, make_kernels(name, "cpu")).requires_grad_(False)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
        model.frequencies.copy_(plain.frequencies)
        pool = KVPool(config, blocks=8)
        first = Batch.build([Span(list(range(20)), 0, [3, 1])], block_tokens=PAGE, sm_count=8)
        logits = [model.logits(model(first, pool), first)]
        spans = [Span([7], 20, [3, 1]), Span(list(range(40, 57)), 0, [2, 5])]
        mixed = Batch.build(spans, block_tokens=PAGE, sm_count=8)
        results.append(torch.cat([*logits, model.logits(model(mixed, pool), mixed)]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="speaks of a run without the interpreter")
def test_choice_of_kernels_is_never_silent() -> None:
    assert make_kernels("auto", "cpu").name == "compiled"
    with pytest.raises(SlalomError, match="TRITON_INTERPRET"):
        make_kernels("triton", "cpu")
    with pytest.raises(SlalomError, match="choose 'triton'"):
        make_kernels("compiled", "cuda")
    with pytest.raises(SlalomError, match="choose one of"):
        make_kernels("cuda", "cpu")


@interpreted
def test_bf16_is_refused_where_it_would_be_wrong() -> None:
    batch, blocks = lay_out([(1, 4)])
    cache = torch.zeros(2, blocks, PAGE, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(SlalomError, match="float16"):
        make_kernels("triton", "cpu").attend(torch.zeros(1, 1, 16, dtype=torch.bfloat16), cache, batch, 1.0)


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreted run itself")
def test_triton_kernels_under_the_interpreter() -> None:
    """The tests above with Triton's kernels; its decorator reads the switch on import, so in a process."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton or bf16", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout, run.stdout
