"""Time of a decision in the engine's scheduler: features, policy, guard, decision log and carrying it out.

Two settings, both with the guard on and every decision logged:

* ``modelled``: the engine's own loop on 16 modelled instances at load, so that the scheduler has the interpreter to
  itself, as it has where instances compute on GPUs in processes or without holding the interpreter's lock;
* ``live``: a running engine on 16 instances of a tiny random model in this process, on this machine's CPU cores, with
  clients in a thread: what the lanes' own Python costs the scheduler is in these numbers.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

INSTANCES = 16
REQUESTS = 6000
WARM_UP = 300
LIVE_S = 15.0
LIVE_RATE = 40.0
HIDDEN = 32  # of the network, the default of training
POLICIES = ("least_tokens", "linear_score", "network")


class _Timed:
    """Stands in for ``engine.core.loop`` in the runtime: stamps each decision from question to answer."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._began = 0
        self.ns: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def ask(self, *arguments: Any) -> Any:
        self._began = time.perf_counter_ns()
        return self._module.ask(*arguments)

    def answer(self, *arguments: Any) -> None:
        self._module.answer(*arguments)
        self.ns.append(time.perf_counter_ns() - self._began)


@contextmanager
def _timing() -> Any:
    import engine.live.runtime as runtime

    before: Any = runtime.loop
    timed = _Timed(before)
    runtime.loop = timed  # type: ignore[assignment]
    try:
        yield timed
    finally:
        runtime.loop = before


def run() -> dict[str, Any]:
    """Microseconds of a decision, and what reached the log."""
    modelled = {name: _modelled(name) for name in POLICIES}
    live = _live()
    worst = max(modelled.values(), key=lambda found: float(found["p50_us"]))
    return {
        "instances": INSTANCES,
        "decision_us_p50": worst["p50_us"],
        "decision_us_p99": worst["p99_us"],
        "modelled": modelled,
        "live": live,
    }


def _summary(ns: list[int], guard: Any, path: Path) -> dict[str, Any]:
    """Figures of one run, once its guard is closed."""
    guard.close()
    report = guard.report()
    kept = np.array(ns[WARM_UP:]) / 1e3
    lines = sum(json.loads(line)["type"] == "decision" for line in path.open())
    return {
        "p50_us": round(float(np.percentile(kept, 50)), 1),
        "p90_us": round(float(np.percentile(kept, 90)), 1),
        "p99_us": round(float(np.percentile(kept, 99)), 1),
        "decisions": len(kept),
        "logged": lines,
        "dropped": report.records_dropped,
        "fallbacks": dict(guard.fallbacks),
    }


def _policy(name: str, setting: Any) -> Any:
    """A rule, or a network of the default width with random weights: their values do not change its speed."""
    from policies.load import load_policy

    if name != "network":
        return load_policy(name, setting)
    import torch

    from engine.core.columns import Need
    from policies.network import compiled
    from policies.network.normalise import default_normalisation
    from policies.network.scoring import ScoringNetwork

    torch.manual_seed(0)
    base: Any = load_policy("linear_score", setting)
    network = ScoringNetwork(np.zeros(compiled.weight_shapes(HIDDEN)["base"]), hidden=HIDDEN)
    rows = compiled.rows_of(setting)
    return replace(
        base,
        name="network",
        decide=compiled.decide,
        kind="network",
        needs=int(Need.LOAD | Need.PREDICT | Need.DIMENSIONLESS),
        params=compiled.pack(network.arrays(), default_normalisation(), rows),
        memory=np.zeros(compiled.memory_cells(HIDDEN, rows)),
    )


def _modelled(name: str) -> dict[str, Any]:
    from engine.core.kinds import Role
    from engine.core.setup import ClusterOptions, InstanceSpec, LinkSpec, SloClass, blank_requests, new_cluster
    from engine.latency import Profile, pack
    from engine.live.modelled import play
    from policies.guard.build import build_guard
    from policies.setting import Setting

    profile, share = pack([Profile.load("llama-8b-a100")])
    state = new_cluster(
        [InstanceSpec(role=Role.MIXED, pool=i, kv_tokens=400_000, gpu=i, link=i) for i in range(INSTANCES)],
        profile,
        share,
        classes=[SloClass(0.5, 0.05)],
        options=ClusterOptions(),
        links=[LinkSpec() for _ in range(INSTANCES)],
        n_requests=REQUESTS,
    )
    rng = np.random.default_rng(0)
    req = blank_requests(REQUESTS)
    req["arrival"] = np.cumsum(rng.exponential(1e12 / (6.0 * INSTANCES), REQUESTS)).astype(np.int64)
    req["prompt"], req["output"] = rng.integers(20, 2000, REQUESTS), rng.integers(10, 400, REQUESTS)
    state = state._replace(req=req)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "decisions.jsonl"
        policy = _policy(name, Setting.of_state(state))
        # The virtual clock brings a minute of traffic in a second or two: room for what real time would spread.
        given = {"log": {"path": str(path), "ring_mb": 512}, "deadline_us": 10_000.0}
        guard = build_guard(state, policy, given=given)
        with _timing() as timed:
            play(state, policy, n_roots=REQUESTS, guard=guard)
        return _summary(timed.ns, guard, path)


def _live() -> dict[str, Any]:
    from engine.model import SamplingParams
    from policies.serve import Options, build

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "decisions.jsonl"
        options = Options(
            "dummy:tiny", instances=INSTANCES, policy="linear_score", decision_log=str(path), deadline_us=10_000.0
        )
        engine, _ = build(options)
        guard: Any = engine.runtime.guard
        params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        rng = np.random.default_rng(1)
        done = threading.Semaphore(0)

        def sink(delta: Any) -> None:
            if delta.finish is not None:
                done.release()

        with _timing() as timed:
            end, sent = time.monotonic() + LIVE_S + WARM_UP / LIVE_RATE, 0
            while time.monotonic() < end:
                engine.submit(rng.integers(0, 256, int(rng.integers(4, 64))).tolist(), params, sink)
                sent += 1
                time.sleep(float(rng.exponential(1.0 / LIVE_RATE)))
            for _ in range(sent):
                done.acquire(timeout=60.0)
            engine.close()
        return _summary(timed.ns, guard, path) | {"requests": sent}
