"""Which variants of the Triton kernels serving meets: launched through the real JIT front end on meta tensors.

Triton compiles a kernel anew for every combination of types, constants, alignments and special values of its arguments
(1, multiples of 16). A step whose shape nobody has seen would compile in flight, which takes a second.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.kernels import Batch, Span, Spans
from engine.kernels.static import StaticBatch
from engine.model import KVPool, Llama, ModelRunner
from engine.model.config import DUMMY_SHAPES, ModelConfig
from engine.model.llama import Carry
from eval.gpu_check.roofline import without_device

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled then")
triton = pytest.importorskip("triton")
STEPS, MOST = 4000, 10
FAMILIES = {"attention_kernel", "merge_kernel", "norm_kernel", "rope_write_kernel", "silu_kernel"}


@contextmanager
def fresh(launched: Callable[[Any], object]) -> Iterator[None]:
    """No GPU, and nothing specialised so far; ``launched`` gets what was compiled."""
    from triton.runtime.jit import JITFunction

    from engine.kernels import triton_attention, triton_rows

    for module in (triton_attention, triton_rows):
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()
    with without_device(launched):
        yield


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[str, str]]]:
    """The (kernel, variant) pairs that are asked for meanwhile; none is compiled."""
    met: set[tuple[str, str]] = set()

    def ask(*_: Any, key: str, fn: Any, **__: Any) -> bool:
        met.add((fn.name.rpartition(".")[2], key))
        return True  # do not compile

    with fresh(lambda kernel: None), monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", ask)
        yield met


@pytest.fixture
def runner() -> ModelRunner:
    """One layer of an 8B Llama in bf16 that takes no memory."""
    return one_layer(DUMMY_SHAPES["llama-8b"])


def one_layer(shape: ModelConfig) -> ModelRunner:
    """A layer of a model of this shape in bf16 that takes no memory."""
    from engine.kernels.triton_backend import TritonKernels

    config = replace(shape, n_layers=1, vocab=1024)
    with torch.device("meta"):
        model = Llama(config, TritonKernels()).to(torch.bfloat16).requires_grad_(False)
        model.frequencies = model.frequencies.float()
    return ModelRunner(model, KVPool(config, blocks=8192, dtype=torch.bfloat16, device="meta"))


def a_step(draw: random.Random) -> Spans:
    """What serving asks for: decodes, chunks, one-token chunks, whole prompts, all in any number and length."""
    spans, prompts = [], draw.choice([0, 0, 0, 1, 1, 2, 7])
    for k in range(prompts + (draw.choice([0, 1, 3, 17, 64, 200]) if prompts else draw.randrange(1, 257))):
        new = draw.choice([1, 3, 16, 100, draw.randrange(1, 2049)]) if k < prompts else 1
        past = draw.choice([0, 0, 16, draw.randrange(8000)]) if k < prompts else draw.randrange(1, 8000)
        spans.append(Span([0] * new, past, range(-(-(new + past) // 16)), draw.random() < 0.7 or k >= prompts))
    return replace(Spans.of(spans), prompts=prompts)


def attended(runner: ModelRunner, batch: Batch) -> None:
    """The kernels of one pass, by way of the model."""
    carry = runner.run_layers(batch, (0, 1))
    if batch.sample_rows.shape[0]:
        runner.model.logits(Carry(carry.hidden, carry.residual, 1), batch)


@pytest.mark.slow
def test_what_serving_launches_has_been_met_in_the_warm_up(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4,000 random steps on lanes of random sizes: few variants of each kernel, all of them met before."""
    draw = random.Random(5)
    with launches(monkeypatch) as met:
        runner.warm(132)
        warm = set(met)
        for _ in range(STEPS):
            attended(runner, runner.batch(a_step(draw), sm_count=draw.choice([20, 44, 60, 72, 112, 132])))
        late = met - warm
    assert late == set()
    families = Counter(name for name, _ in met)
    assert set(families) == FAMILIES
    assert sum(families.values()) == MOST, families


def test_what_graphs_launch_has_been_met_in_the_warm_up(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.live.graphs import CHUNKS, DECODES

    config, kernels = runner.model.config, runner.model.kernels
    heads = (config.n_heads, config.n_kv_heads, config.head_dim)
    with launches(monkeypatch) as met:
        runner.warm(132)
        warm = set(met)
        for decodes, sizes in ((True, DECODES), (False, CHUNKS)):
            for size in sizes:
                static = StaticBatch(
                    rows=size, sequences=size, decodes=decodes, width=512, block_tokens=16, sm_count=72, device="meta",
                    tiling=kernels.tiling(1 if decodes else size, heads, 2, 72),
                )  # fmt: skip
                attended(runner, static.batch)
                assert len(static.batch.works) <= 1, "attention cuts by another list than the one that is filled"
        late = met - warm
    assert late == set()


#: Width, heads of queries and of keys, head width, FFN, as their files say. Most widths are no powers of two.
PUBLISHED = {
    "SmolLM2-135M": (576, 9, 3, 64, 1536), "Qwen2.5-0.5B": (896, 14, 2, 64, 4864),
    "Qwen2.5-1.5B": (1536, 12, 2, 128, 8960), "Qwen3-4B": (2560, 32, 8, 128, 9728),
    "Llama-3.2-3B": (3072, 24, 8, 128, 8192), "Qwen2.5-7B": (3584, 28, 4, 128, 18944),
    "Qwen3-14B": (5120, 40, 8, 128, 17408), "Llama-3.1-70B": (8192, 64, 8, 128, 28672),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_of_every_width_can_be_launched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    width, heads, kv_heads, head_dim, ffn = PUBLISHED[name]
    shape = replace(
        DUMMY_SHAPES["llama-8b"], width=width, n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim, ffn=ffn,
        qk_norm=name.startswith("Qwen3"), qkv_bias=name.startswith("Qwen2"),
    )  # fmt: skip
    with launches(monkeypatch) as met:
        one_layer(shape).warm(132)
    assert {kernel for kernel, _ in met} == FAMILIES


@pytest.mark.slow
def test_every_variant_that_serving_meets_compiles_for_hopper(runner: ModelRunner) -> None:
    compiled: list[Any] = []
    with fresh(compiled.append):
        runner.warm(132)
    kernels = {id(kernel): kernel for kernel in compiled}
    assert len(kernels) == MOST
    for kernel in kernels.values():
        assert kernel.metadata.target.arch == 90
        assert kernel.metadata.shared < 227 * 1024
