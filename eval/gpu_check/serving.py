"""The whole engine on the device: partitions, graphs and hand-over together change no token."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import numpy as np
import torch

from engine.core.kinds import Batching, Role
from engine.core.setup import InstanceSpec, SloClass
from engine.latency.rough import device_tables
from engine.live.engine import Engine, build_state
from engine.model import SamplingParams, load_model, load_tokenizer
from eval.gpu_check.report import Cases
from eval.gpu_check.rig import Rig


class _First:
    """Always the first answer that is allowed."""

    name, needs, arrangement = "first", 1, None
    params, memory = np.zeros(1), np.zeros(1)

    def decide(self, context: Any, candidates: Any, mask: Any, params: Any, memory: Any) -> int:
        return int(mask.nonzero()[0][0])

    def describe(self) -> dict[str, Any]:
        return {}


def engine_tokens(rig: Rig, cases: Cases) -> dict[str, Any]:
    """Greedy tokens of the tiny model in fp32: the same in every mode, with graphs and without."""
    model, tokenizer = load_model("dummy:tiny", device=rig.device), load_tokenizer("dummy:tiny")
    total = torch.get_num_threads() if rig.dry else rig.gpu.total
    sizes = [1] if rig.dry else [20, 60, total]
    profile, share = device_tables(
        (0.0, 0.0, 1e-5, 1e-3), (1e-7, 1e-5, 1e-3), n_layers=model.config.n_layers, sms=sizes
    )
    profile["kv_bytes_per_token"] = 512.0
    greedy = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    prompts = [list(range(1, 1 + n)) for n in (5, 33, 200, 70, 16, 120)]
    kv = 2048
    modes = {
        "mixed": [InstanceSpec(Role.MIXED, 0, kv, batching=Batching.PREFILL_FIRST)],
        "chunked": [InstanceSpec(Role.MIXED, 0, kv, chunk_tokens=24)],
        "multiplexed, layers": [InstanceSpec(Role.MULTIPLEXED, 0, kv, batching=Batching.LAYERED)],
        "multiplexed, chunks": [InstanceSpec(Role.MULTIPLEXED, 0, kv, chunk_tokens=24)],
        "copied": [InstanceSpec(Role.PREFILL, 0, kv), InstanceSpec(Role.DECODE, 1, kv)],
        "in place": [InstanceSpec(Role.PREFILL, 0, kv), InstanceSpec(Role.DECODE, 0, kv)],
    }
    expected: list[list[int]] = []

    def one(mode: str, specs: list[InstanceSpec], eager: bool) -> dict[str, Any]:
        nonlocal expected
        state = build_state(specs, profile, share, classes=[SloClass(1.0, 0.1)], prefix_cache=False, max_requests=16)
        begin = time.monotonic()
        engine: Any = Engine(model, tokenizer, state, _First(), eager=eager).start()
        ready = time.monotonic() - begin
        try:
            said = _serve(engine, prompts, greedy)
        finally:
            closed = engine.close()
        if not closed or engine.failure is not None:
            raise AssertionError(f"{mode}: the engine did not end well: {engine.failure!r}")
        expected = expected or said
        if said != expected:
            raise AssertionError(f"{mode}: other tokens than in the first mode")
        lanes = [host.lanes.describe() for host in engine.instances.hosts]
        without = [dict(lane.runner.executor.without_graph) for lane in engine.instances._lanes]
        return {"ready_s": ready, "lanes": lanes, "without_graph": without}

    for mode, specs in modes.items():
        for eager in (True, False):
            cases.take({"mode": mode, "eager": eager}, partial(one, mode, specs, eager))
    return {"equal": not cases.errors}


def _serve(engine: Any, prompts: list[list[int]], params: Any) -> list[list[int]]:
    said: list[list[int]] = [[] for _ in prompts]
    done = threading.Semaphore(0)

    def sink_of(tokens: list[int]) -> Any:
        def sink(delta: Any) -> None:
            if delta.token is not None:
                tokens.append(delta.token)
            if delta.finish is not None:
                done.release()

        return sink

    for prompt, tokens in zip(prompts, said, strict=True):
        engine.submit(prompt, params, sink_of(tokens))
    for _ in prompts:
        if not done.acquire(timeout=240):  # the first one waits for the core to be compiled
            raise AssertionError("a request did not end")
    return said
