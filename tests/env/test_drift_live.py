"""Two real instances on CPU under a drift compressed to seconds: roles follow it, and no request is lost."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from engine.core.kinds import RequestState, Role
from engine.live.engine import Engine
from env.live.replay import park_of, replay
from env.measure.metrics import outcomes
from env.measure.phases import phases_of
from env.scenario import Scenario
from env.surrogate.arena import build_trace

pytestmark = pytest.mark.slow

PHASE_S = 12.0
#: Prompts of 180 tokens with next to no answer keep an instance busy that prefills only; short prompts with answers of
#: 48 tokens want both to decode.
CHANGES = {
    "cluster": [
        {"count": 1, "role": "prefill", "max_batch": 16, "kv_tokens": 4096},
        {"count": 1, "role": "mixed", "batching": "chunked", "chunk_tokens": 128, "max_batch": 16, "kv_tokens": 4096},
    ],
    "workload": {
        "kind": "shift",
        "lengths": [
            {"kind": "fixed", "prompt": 180, "output": 2},
            {"kind": "fixed", "prompt": 12, "output": 48},
        ],
        "phases": [
            {"duration": PHASE_S, "rate": 1.6, "weights": [1, 0]},
            {"duration": PHASE_S, "rate": 0.4, "weights": [0, 1]},
            {"duration": PHASE_S, "rate": 1.6, "weights": [1, 0]},
        ],
        "cv": 0.3, "duration_s": 3 * PHASE_S,
    },
    "decisions": {"hold": True, "place_decode": True, "reallocate": True, "roles": ["prefill", "mixed"],
                  "drain": "hand_over"},
    "control_interval_s": 0.25,
}  # fmt: skip
CONTROLLER = {
    "side": "mixed", "interval_s": 1.0, "window_s": 2.0, "commit_s": 0.0, "hysteresis": 0.1, "prefill": 1.0,
    "decode": 1.0, "lead": 1.0, "spare": 0.0, "backlog": 0.0, "ttft_risk": 0.0, "tpot_risk": 0.0, "start": 0.5,
}  # fmt: skip


class Roles:
    """Looks every 20 ms at which instances prefill only, once the changes under way are done."""

    def __init__(self) -> None:
        self.at_s: list[float] = []
        self.prefill: list[int] = []
        self._over = threading.Event()

    def watch(self, engine: Engine) -> None:
        begin, inst = time.perf_counter(), engine.state.inst

        def look() -> None:
            while not self._over.wait(0.02):
                after = np.where(inst["target_role"] >= 0, inst["target_role"], inst["role"])
                self.at_s.append(time.perf_counter() - begin)
                self.prefill.append(int((after == Role.PREFILL).sum()))

        self.thread = threading.Thread(target=look, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self._over.set()
        self.thread.join()

    def share(self, start_s: float, end_s: float) -> float:
        """Of the looks in between, those that saw an instance that prefills only."""
        at = np.array(self.at_s)
        inside = (at >= start_s) & (at < end_s)
        return float(np.array(self.prefill)[inside].mean())


def test_the_controller_follows_a_drift_on_the_real_engine_and_loses_no_request() -> None:
    scenario = Scenario.load("smollm2-2xcpu").with_overrides(CHANGES)
    rate = 5.0
    trace = build_trace(scenario, rate, int(rate * 3 * PHASE_S), 0, "test")
    phases = phases_of(trace)
    assert len(phases) == 3
    roles = Roles()
    run = replay(
        scenario, "planner", rate=rate, values=CONTROLLER, trace=trace, park=park_of("dummy:tiny", "cpu"),
        watch=roles.watch,
    )  # fmt: skip
    roles.close()
    found = outcomes(run, warmup=0.0)
    assert found.sent_total == trace.n
    assert (run.req["state"][: trace.n] == RequestState.FINISHED).all()
    assert run.cluster["n_switches"] >= 2  # there and back
    for k, (start, end) in enumerate(phases):
        settled = roles.share(0.5 * (start + end), end)
        assert settled > 0.8 if k % 2 == 0 else settled < 0.2
