"""Measuring points: (policy, rate, seed) -> figures; cached, resumable, in this process or in a small pool.

A point is the smallest unit of work everything above shares: the goodput search, the comparison and the
tuner ask for points and never simulate by themselves. With a folder every finished point is kept there as
one JSON file named by a digest of all that determines it, so an interrupted comparison resumes and a
changed scenario, checkpoint or simulator is measured anew instead of being served an old number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.common.files import digest_of, read_json, write_json
from engine.core.policy import InstancePlan
from engine.errors import SlalomError
from env.measure.contender import Contender, Point, PointSettings
from env.measure.digest import code_sha256, policy_sha256, scenario_hash
from env.measure.metrics import block_counts, detailed, outcomes, summarize
from env.measure.pool import finished, processes
from env.scenario import Scenario
from env.workload.steady import stream

_ARRANGED: dict[tuple[str, str], Any] = {}


def arranged(scenario: Scenario, contender: Contender) -> Scenario:
    """The scenario on the fixed arrangement that ``contender`` brings, made once per content; else as it is."""
    if not contender.cluster:
        return scenario
    key = (scenario.hash(), json.dumps(contender.cluster))
    if key not in _ARRANGED:
        _ARRANGED[key] = scenario.fixed_on(*contender.cluster)
    return _ARRANGED[key]


def _served(scenario: Scenario) -> dict[str, Any]:
    """What is served, under vLLM's names; None for what a surrogate has not (tokenizer, guard)."""
    arrival = getattr(getattr(scenario, "workload", None), "arrival", None)
    kind, cv = getattr(arrival, "kind", None), getattr(arrival, "cv", None)
    shape = 1.0 if kind == "poisson" else cv**-2 if kind == "gamma" and cv else None
    return {
        "model_id": ", ".join(dict.fromkeys(p.model for p in scenario.load_profiles())),
        "tokenizer_id": None,
        "burstiness": shape,
        "fallback_rate": None,
        **{f"{name}_decision_us": None for name in ("p50", "p90", "p99")},
    }


def bound(scenario: Scenario, contender: Contender) -> Any:
    """The policy ready to decide in ``scenario``, on the instance plans that ``contender`` brings, if it does.

    :raises SlalomError: it does not fit the scenario
    """
    from env.surrogate.simulate import bind_policy

    policy: Any = bind_policy(contender.policy, scenario, dict(contender.values) or None)
    if not contender.plans:
        return policy
    return replace(policy, arrangement=tuple(InstancePlan(**plan) for plan in contender.plans))


def simulated(scenario: Scenario, contender: Contender, rate: float, seed: int, settings: PointSettings) -> Any:
    """The run of one point, a ``RunResult``."""
    from env.surrogate.arena import build_trace
    from env.surrogate.simulate import simulate

    scenario = arranged(scenario, contender)
    policy = bound(scenario, contender)
    what: dict[str, Any] = {"n_requests": settings.n_requests}
    if settings.sessions == "stream":
        what = {"trace": stream(lambda n: build_trace(scenario, rate, n, seed, settings.split), settings.n_requests)}
    return simulate(scenario, policy, rate=rate, seed=seed, split=settings.split, **what)


def measure(
    scenario: Scenario, contender: Contender, rate: float, seed: int, settings: PointSettings,
    watch: Callable[[Any], None] | None = None,
) -> Point:  # fmt: skip
    """Simulate one point; ``watch`` is shown the run."""
    run = simulated(scenario, contender, rate, seed, settings)
    if watch is not None:
        watch(run)
    each = {"detailed": detailed(run)} if settings.detailed else {}
    facts = {"backend": "surrogate", **_served(arranged(scenario, contender)), **each}
    return point_of(run, contender, rate, seed, settings, facts)


def point_of(
    run: Any, contender: Contender, rate: float, seed: int, settings: PointSettings, facts: Mapping[str, Any]
) -> Point:
    """The figures of a finished run, on whichever backend; ``facts`` say more about it than the metrics do."""
    sent, good = block_counts(outcomes(run, **settings.windows), settings.n_blocks)
    identity = {
        "label": contender.name,
        **facts,
        "policy_id": contender.policy,
        "policy_sha256": policy_sha256(contender),
    }
    return Point(rate, seed, identity | summarize(run, **settings.windows), sent, good)


class Evaluator:
    """Answers for points of one scenario, from memory, from the folder or by simulating.

    :param settings: common to all points
    :param jobs: 1 simulates here; more starts that many processes
    :param folder: finished points are kept here and read back; None keeps them in memory only
    :param on_point: called after each point that was simulated or read back
    :param pool: simulates there instead of in ``jobs`` processes of its own; stays the caller's
    :param measure: replaces the simulator (the engine, tests; a module-level function when ``jobs`` > 1)
    :param label: of what ``measure`` runs on; points of different ones are never mixed up
    """

    def __init__(
        self,
        scenario: Scenario,
        settings: PointSettings,
        *,
        jobs: int = 1,
        folder: Path | None = None,
        on_point: Callable[[Point], None] | None = None,
        measure: Callable[..., Point] = measure,
        pool: Executor | None = None,
        label: str = "surrogate",
    ) -> None:
        self.scenario, self.settings = scenario, settings
        self.simulated_requests = 0
        self._jobs, self._folder, self._on_point, self._measure = jobs, folder, on_point, measure
        self._known: dict[str, Point] = {}
        self._pool: Executor | None = None
        self._given_pool = pool
        self._base = [code_sha256(), scenario_hash(scenario)]
        self._base += [] if label == "surrogate" else [label]

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def points(
        self, contender: Contender, rate: float, seeds: Sequence[int], settings: PointSettings | None = None
    ) -> list[Point]:
        """One point per seed, in the order of ``seeds``.

        :param settings: of these points, where they differ from the others'
        :raises SlalomError: the scenario or the policy is not usable, or a result cannot be written
        """
        settings = settings or self.settings
        keys = {seed: self._key(contender, rate, seed, settings) for seed in seeds}
        missing = [seed for seed in seeds if not self._recall(keys[seed])]
        for point in self._simulate(contender, rate, missing, settings):
            key = keys[point.seed]
            self._known[key] = point
            self.simulated_requests += settings.n_requests
            if self._folder is not None:
                write_json(self._folder / f"{key}.json", point.__dict__, sealed=True)
            if self._on_point is not None:
                self._on_point(point)
        return [self._known[keys[seed]] for seed in seeds]

    def attainment(self, contender: Contender, rate: float, seeds: Sequence[int]) -> float:
        """Attainment over the requests of all seeds together."""
        points = self.points(contender, rate, seeds)
        return sum(sum(p.good) for p in points) / max(sum(sum(p.sent) for p in points), 1)

    def _key(self, contender: Contender, rate: float, seed: int, settings: PointSettings) -> str:
        parts = [*self._base[:2], settings.__dict__, *self._base[2:], policy_sha256(contender), repr(float(rate)), seed]
        return digest_of(parts)[:32]

    def _recall(self, key: str) -> bool:
        if key in self._known:
            return True
        if self._folder is None or not (path := self._folder / f"{key}.json").exists():
            return False
        try:
            self._known[key] = Point(**read_json(path))
        except TypeError as error:
            raise SlalomError("stored point", str(path), "delete this file") from error
        if self._on_point is not None:
            self._on_point(self._known[key])
        return True

    def _executor(self, work: int) -> Executor | None:
        """Where ``work`` simulations run; None: here."""
        if self._given_pool is not None:
            return self._given_pool
        if self._jobs <= 1 or work <= 1:
            return None
        if self._pool is None:
            if self._measure is measure:
                from env.surrogate.simulate import ready

                ready()
            self._pool = processes(self._jobs)
        return self._pool

    def _simulate(
        self, contender: Contender, rate: float, seeds: Sequence[int], settings: PointSettings
    ) -> Iterator[Point]:
        jobs = [(self.scenario, contender, rate, seed, settings) for seed in seeds]
        for _, point in finished(self._executor(len(seeds)), self._measure, jobs):
            yield point


def lone_time(evaluator: Evaluator, contender: Contender, seed: int = 0) -> float:
    """P90 of the time in the system of requests that come one at a time, seconds.

    :raises SlalomError: the policy serves nobody
    """
    rate = evaluator.scenario.reference_rate / 200.0
    settings = replace(evaluator.settings, n_requests=400, warmup=0.0, drain=0.0, detailed=False)
    p90 = evaluator.points(contender, rate, [seed], settings)[0].metrics["p90_e2el_ms"]
    if p90 is None:
        raise SlalomError("policy", contender.name, f"it serves nobody at {rate:.3g}/s: does it fit?")
    return float(p90) / 1e3
