"""Points measured on the real engine instead of the surrogate: same figures, same files, real time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from env.measure.contender import Contender, Point, PointSettings
from env.measure.evaluator import arranged, bound, point_of
from env.scenario import Scenario


def engine_facts(run: Any) -> dict[str, Any]:
    """What an engine run tells beside the metrics: device, lateness of the client, host time of a step."""
    lag_ms = 1e3 * run.lag_s[np.isfinite(run.lag_s)]
    host_ms = 1e3 * np.array([step.host_s for step in run.steps] or [0.0])
    run_s, cpu_s = sum(s.run_s for s in run.steps), sum(s.cpu_s for s in run.steps)
    return {
        "device": run.device,
        "client_lag_ms": {
            "median": float(np.median(lag_ms)) if len(lag_ms) else None,
            "p99": float(np.percentile(lag_ms, 99)) if len(lag_ms) else None,
            "max": float(lag_ms.max()) if len(lag_ms) else None,
        },
        "host_ms_per_step": {"median": float(np.median(host_ms)), "p99": float(np.percentile(host_ms, 99))},
        "steps": len(run.steps),
        # On a CPU lanes compute in one thread each: wall above thread time means that they waited for a core.
        "waited_for_core": max(run_s / cpu_s - 1.0, 0.0) if "[cpu]" in run.device and cpu_s > 0 else 0.0,
    }


def measure(
    scenario: Scenario, contender: Contender, rate: float, seed: int, settings: PointSettings, *, park: Any
) -> Point:
    """As :func:`env.measure.evaluator.measure`, on the engine of ``park``."""
    from env.live.replay import replay

    return _measured(partial(replay, park=park), "gpu", scenario, contender, rate, seed, settings)


def measure_remote(
    scenario: Scenario, contender: Contender, rate: float, seed: int, settings: PointSettings, *, engines: Any
) -> Point:
    """As :func:`env.measure.evaluator.measure`, on engines of others (:class:`engine.remote.discover.EngineFacts`)."""
    from env.live.remote import replay

    return _measured(partial(replay, engines=engines), "remote", scenario, contender, rate, seed, settings)


def _measured(
    replay: Callable[..., Any], backend: str, scenario: Scenario, contender: Contender, rate: float, seed: int,
    settings: PointSettings,
) -> Point:  # fmt: skip
    """The point of one run, played by ``replay`` on what it was given."""
    scenario = arranged(scenario, contender)
    policy = bound(scenario, contender)
    n, split = settings.n_requests, settings.split
    run = replay(scenario, policy, rate=rate, n_requests=n, seed=seed, split=split)
    return point_of(run, contender, rate, seed, settings, {"backend": backend, "engine": engine_facts(run)})


def on_remote(urls: Sequence[str]) -> dict[str, Any]:
    """How an evaluator measures on the engines at ``urls``.

    :raises SlalomError: one of them does not answer
    """
    from engine.remote.discover import discover

    engines = [discover(url) for url in urls]
    return {"measure": partial(measure_remote, engines=engines), "label": f"remote {engines}"}


def on_park(scenario: Scenario, model: str, note: Callable[[str], None]) -> dict[str, Any]:
    """How an evaluator measures on our engine; ``note`` hears on which."""
    from env.live.replay import park_for

    park = park_for(scenario, model)
    note(f"engine: {park.name}")
    return {"measure": partial(measure, park=park), "label": park.name}
