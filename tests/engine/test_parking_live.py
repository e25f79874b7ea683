"""A batch that stands aside half computed, with a real model: its activations are kept, and no token changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from live_cases import GREEDY, MODEL, PROMPTS, cores, engine_on, mixed, send
from test_lanes import CORES, needs_two_cores
from waiting import until

from engine.core.kinds import Batching, Role
from engine.kernels import Span, Spans
from engine.lanes.base import WHOLE
from engine.lanes.partitions import Lanes, make_device
from engine.live.hosts import LocalExecutor
from engine.model import KVPool, ModelRunner, SamplingParams

LAYERS = MODEL.config.n_layers
SAMPLING = SamplingParams(temperature=0.0)


@pytest.fixture
def executor() -> LocalExecutor:
    device = make_device("cpu")
    runner = ModelRunner(MODEL, KVPool(MODEL.config, blocks=64, block_tokens=16))
    return LocalExecutor(runner, Lanes(device, [device.total]), 0)


def span(k: int) -> Span:
    return Span(PROMPTS[k], 0, [1 + 16 * (k % 3) + i for i in range(-(-len(PROMPTS[k]) // 16))])


def run(executor: LocalExecutor, layers: tuple[int, int], *spans: Span) -> list[int]:
    last = layers[1] == LAYERS
    return executor.run(Spans.of(spans) if spans else None, layers, [SAMPLING] * last, [0] * last, WHOLE)


def test_a_pass_goes_on_where_it_stood_aside(executor: LocalExecutor) -> None:
    long, short = (run(executor, (0, LAYERS), span(k)) for k in (5, 3))
    run(executor, (0, 1), span(5))
    run(executor, (0, 1), span(3))
    assert run(executor, (1, LAYERS)) == short
    assert run(executor, (1, LAYERS)) == long


def test_a_pass_that_fails_takes_nobody_along(executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = (run(executor, (0, LAYERS), span(k)) for k in (5, 3))

    def breaks(*anything: object) -> None:
        raise ValueError("a bad kernel")

    def broken(layers: tuple[int, int], *spans: Span) -> None:
        whole = executor._runner.run_layers
        monkeypatch.setattr(executor._runner, "run_layers", breaks)
        with pytest.raises(ValueError, match="bad kernel"):
            run(executor, layers, *spans)
        monkeypatch.setattr(executor._runner, "run_layers", whole)

    run(executor, (0, 1), span(5))
    broken((0, 1), span(3))
    with pytest.raises(RuntimeError, match="before this one failed"):
        run(executor, (1, LAYERS))
    assert run(executor, (1, LAYERS)) == long

    broken((0, 1), span(5))
    assert run(executor, (0, LAYERS), span(3)) == short  # it goes by, although who stood aside has failed
    with pytest.raises(RuntimeError, match="before this one failed"):
        run(executor, (1, LAYERS))
    assert run(executor, (0, LAYERS), span(3)) == short


def slow() -> tuple[np.ndarray, np.ndarray]:
    """The scheduler expects seconds where the tiny model takes milliseconds, so that its choice hangs on no clock."""
    profile, share = cores(len(CORES), LAYERS)()
    share["prefill"] = [0.0, 0.0, 1.0, 0.0]
    return profile, share


@needs_two_cores
def test_tokens_are_those_of_an_engine_in_which_nobody_stands_aside() -> None:
    decoding, long, short = PROMPTS[1], PROMPTS[5], PROMPTS[2]
    many = replace(GREEDY, max_tokens=300)
    with engine_on(mixed()) as engine:
        expected = [send(engine, p, n).wait().tokens for p, n in ((decoding, many), (long, GREEDY), (short, GREEDY))]
    role = {"role": Role.MULTIPLEXED, "batching": Batching.LAYERED, "split": 0, "prefill_tokens": 1}
    with engine_on(mixed(**role, stand_aside=True, layer_tokens=1), tables_of=slow, prefix_cache=False) as engine:
        callers = [send(engine, decoding, many)]
        until(lambda: len(callers[0].tokens) > 2)

        def both() -> None:
            """In the loop's thread: the short prompt is there before the first layer of the long one ends."""
            callers.append(send(engine, long, ttft_s=3600.0))  # 200 s by the profile
            callers.append(send(engine, short, ttft_s=60.0))  # 16 s: it must not wait behind the long one

        engine.call(both)
        assert [caller.wait().tokens for caller in callers] == expected
        assert engine.instances._state.inst[0]["stood_aside"] == 1
