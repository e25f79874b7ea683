"""One request never hurts another: whatever goes wrong with it ends it alone, and the others get their tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from live_cases import GREEDY, KV, PROMPTS, Caller, Ends, engine_on, mixed, send
from test_runtime_distributed import InThread, served_by
from waiting import until

from engine.core.kinds import Batching, Role
from engine.core.setup import InstanceSpec
from engine.errors import SlalomError
from engine.model import Generation, ModelRunner, SamplingParams
from engine.model import runner as model_runner
from engine.model.sampling import choose_tokens
from engine.workers.pool import Workers
from engine.workers.wire import KEY

LONG = replace(GREEDY, max_tokens=60)
POISON = replace(LONG, seed=666, max_tokens=200)
PD = [InstanceSpec(Role.PREFILL, 0, KV), InstanceSpec(Role.DECODE, 1, KV, link=1)]
PLACES: dict[str, list[InstanceSpec]] = {
    "fused steps": mixed(chunk_tokens=48),
    "prefill and decode apart": PD,
    "slices of layers": mixed(role=Role.MULTIPLEXED, batching=Batching.LAYERED, prefill_tokens=4096, layer_tokens=64),
}


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with engine_on(mixed()) as engine:
        return [send(engine, prompt, LONG).wait().tokens for prompt in PROMPTS]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sampling fails for the request with seed 666 at its ninth token, and so for everybody in its step."""
    sizes: list[int] = []

    def choose(logits: Any, params: Any, steps: Any, eos: Any) -> Any:
        if any(p.seed == 666 and step >= 8 for p, step in zip(params, steps, strict=True)):
            sizes.append(len(params))
            raise IndexError("poisoned")
        return choose_tokens(logits, params, steps, eos)

    monkeypatch.setattr(model_runner, "choose_tokens", choose)
    return sizes


@pytest.mark.parametrize("place", PLACES)
def test_what_fails_in_sampling_ends_that_request_only(
    place: str, poison: list[int], expected: list[list[int]]
) -> None:
    with engine_on(PLACES[place]) as engine:
        callers = [send(engine, prompt, LONG) for prompt in PROMPTS]
        guilty = send(engine, PROMPTS[3], POISON)
        assert [caller.wait().tokens for caller in callers] == expected
        assert guilty.wait().finish == "error"
        assert guilty.tokens == expected[3][:8]
    assert max(poison) > 1, "it never shared a step"
    assert poison[-1] == 1


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layer", [0, 3])
def test_a_pass_that_fails_in_the_middle_is_made_up_for(
    place: str, layer: int, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]]
) -> None:
    """Steps of several sequences fail; each alone goes through, in slices of layers as well."""
    run_layers, failed = ModelRunner.run_layers, []

    def run(self: ModelRunner, batch: Any, layers: Any, carry: Any = None) -> Any:
        if batch.n_seqs > 1 and layers[0] <= layer < layers[1]:
            failed.append(layers)
            raise torch.OutOfMemoryError("too many at once")
        return run_layers(self, batch, layers, carry)

    monkeypatch.setattr(ModelRunner, "run_layers", run)
    with engine_on(PLACES[place], prefix_cache=False) as engine:
        callers = [send(engine, prompt, LONG) for prompt in PROMPTS * 2]
        assert [caller.wait().tokens for caller in callers] == expected * 2
    assert failed


def test_through_workers_the_innocent_go_on_too(poison: list[int], expected: list[list[int]]) -> None:
    os.environ.setdefault(KEY, "only for these tests")
    with served_by(Workers.join([InThread().text()]), [replace(spec, gpu=0) for spec in PD]) as engine:
        callers = [send(engine, prompt, LONG) for prompt in PROMPTS]
        guilty = send(engine, PROMPTS[3], POISON)
        assert [caller.wait().tokens for caller in callers] == expected
        assert guilty.wait().finish == "error"
    assert max(poison) > 1


@pytest.mark.parametrize("method", ["push", "_find_stop"])
def test_what_fails_in_stopping_or_detokenising_ends_that_request_only(
    method: str, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]]
) -> None:
    right: Callable[..., Any] = getattr(Generation, method)

    def wrong(self: Generation, *arguments: Any) -> Any:
        if self._stop == ("no such text",) and self.n_tokens >= 5:
            raise ValueError("cannot be read")
        return right(self, *arguments)

    monkeypatch.setattr(Generation, method, wrong)
    with engine_on(mixed()) as engine:
        guilty = send(engine, PROMPTS[3], replace(LONG, stop=("no such text",)))
        callers = [send(engine, prompt, LONG) for prompt in PROMPTS]
        assert [caller.wait().tokens for caller in callers] == expected
        assert guilty.wait().finish == "error"


class Deaf(Caller):
    """Fails at its fourth token."""

    def __call__(self, delta: Any) -> None:
        super().__call__(delta)
        if len(self.deltas) == 4:
            raise RuntimeError("nobody listens")


def test_a_caller_that_fails_loses_its_own_request(expected: list[list[int]]) -> None:
    with engine_on(mixed()) as engine:
        deaf = Deaf()
        engine.submit(PROMPTS[2], LONG, deaf)
        callers = [send(engine, prompt, LONG) for prompt in PROMPTS]
        assert [caller.wait().tokens for caller in callers] == expected
        until(lambda: engine.n_open == 0)
        assert len(deaf.deltas) == 4


def test_books_and_streams_that_cannot_be_written_stop_nobody(expected: list[list[int]]) -> None:
    seen: list[str | None] = []

    def fail(*what: Any) -> None:
        raise OSError("no room")

    with engine_on(mixed()) as engine:
        deaf = Ends(fail)
        deaf.settled = fail  # type: ignore[method-assign]
        engine.observers += [deaf, Ends(lambda request, record, finish: seen.append(request.finish))]
        assert send(engine, PROMPTS[2], LONG).wait().tokens == expected[2]
        with pytest.raises(OSError, match="no room"):
            engine.call(fail)
        engine.clock.post(engine.runtime.slots.arrival, fail)
        assert send(engine, PROMPTS[3], LONG).wait().tokens == expected[3]
        until(lambda: engine.n_open == 0)
    assert len(seen) == 2, "one observer that fails hides nothing from the others"


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"min_tokens": 2, "stop_token_ids": (512,)}, "stop_token_ids"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
        ({"stop_token_ids": (10**30,)}, "stop_token_ids"),
    ],
    ids=str,
)
def test_stop_tokens_outside_the_vocabulary_are_refused(params: dict[str, Any], named: str) -> None:
    with engine_on(mixed()) as engine, pytest.raises(SlalomError, match=named):
        send(engine, PROMPTS[0], replace(GREEDY, **params))


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"top_k": 10**400}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
        ({"seed": 2**64}, "seed"),
        ({"seed": -(10**400)}, "seed"),
        ({"stop": ("a",) * 65}, "stop"),
        ({"stop": ("a" * 4097,)}, "stop"),
        ({"stop_token_ids": tuple(range(257))}, "stop_token_ids"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": float("nan")}, "top_p"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_numbers_out_of_range_are_refused(params: dict[str, Any], named: str) -> None:
    with pytest.raises(SlalomError, match=named):
        SamplingParams(**params)


@pytest.mark.parametrize(
    "params", [{"temperature": 1e-38}, {"temperature": 1e-300}, {"temperature": 1.0, "top_p": 1e-300}]
)
@pytest.mark.parametrize("top_k", [0, 50])
def test_the_smallest_temperature_and_the_smallest_top_p_are_greedy(params: dict[str, float], top_k: int) -> None:
    logits = torch.randn(64, 3000) * 20
    asked = [SamplingParams(seed=seed, top_k=top_k, **params) for seed in range(64)]
    assert torch.equal(choose_tokens(logits, asked, [0] * 64, frozenset()), logits.argmax(-1))
