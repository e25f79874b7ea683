"""Measuring points: (policy, rate, seed) -> figures; cached, resumable, in this process or in a small pool.

A point is the smallest unit of work everything above shares: the goodput search, the comparison and the
tuner ask for points and never simulate by themselves. With a folder every finished point is kept there as
one JSON file named by a digest of all that determines it, so an interrupted comparison resumes and a
changed scenario, checkpoint or simulator is measured anew instead of being served an old number.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache, lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import yaml

from engine.core import sources
from engine.errors import SlalomError
from eval.metrics import block_counts, detailed, outcomes, summarize
from eval.store import read_json, write_json
from policies.rule import Value

__all__ = [
    "STATIC_PLAN",
    "Contender",
    "Evaluator",
    "Point",
    "PointSettings",
    "arranged",
    "code_sha256",
    "point_of",
    "policy_sha256",
    "scenario_hash",
]

#: The policy that is searched instead of named: the best fixed arrangement of a scenario, see ``eval.static``.
STATIC_PLAN = "static_plan"

Split = Literal["train", "valid", "test"]


@dataclass(frozen=True)
class Contender:
    """One policy in a comparison.

    :param policy: name, ``name:param=value`` or a checkpoint folder
    :param values: parameter values that replace the rule's defaults
    :param label: how the report calls it (unique within a comparison)
    :param tuned: its parameters come from a search
    :param cluster: instance groups that replace the scenario's, with every lever but placement off (a fixed plan)
    """

    policy: str
    values: Mapping[str, Value] = field(default_factory=dict)
    label: str = ""
    tuned: bool = False
    cluster: tuple[Mapping[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return self.label or self.policy


@dataclass(frozen=True)
class PointSettings:
    """What every point of one comparison has in common; ``detailed``: keep every request of a run as well."""

    n_requests: int = 10_000
    split: Split = "test"
    warmup: float = 0.05
    drain: float = 0.0
    n_blocks: int = 20
    detailed: bool = False

    def __post_init__(self) -> None:
        if self.n_requests < self.n_blocks:
            raise SlalomError("requests", self.n_requests, f"at least {self.n_blocks} per run are needed")


@dataclass(frozen=True)
class Point:
    """A measured point: the metrics of ``eval.metrics`` and sent/good counts per block of arrivals."""

    rate: float
    seed: int
    metrics: dict[str, Any]
    sent: list[int]
    good: list[int]

    @property
    def attainment(self) -> float:
        return sum(self.good) / max(sum(self.sent), 1)


@cache
def code_sha256() -> str:
    """Digest of every source file a point depends on: a stored point never outlives the code that made it."""
    simulator = [sources.path_of("env.simulate"), sources.path_of("eval.metrics")]
    simulator += [sources.path_of("eval.sustained")]
    return sources.sha256([*simulator, *(sources.ROOT / "policies").rglob("*.py")])


def policy_sha256(contender: Contender) -> str:
    """Digest of what decides: every file of a checkpoint folder, or the name and values of a rule."""
    parts: list[Any] = [contender.policy, sorted(contender.values.items())]
    parts += [contender.cluster] if contender.cluster else []
    digest = hashlib.sha256(json.dumps(parts).encode())
    folder = Path(contender.policy)
    if os.path.isdir(folder):  # unlike Path.is_dir, answers False for a spec longer than a file name
        digest = hashlib.sha256(json.dumps(sorted(contender.values.items())).encode())
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def scenario_hash(scenario: Any) -> str:
    """Digest of a scenario's content, of the latency profiles it names and of the trace files it replays."""
    digest = hashlib.sha256(scenario.hash().encode())
    for profile in scenario.load_profiles():
        digest.update(profile.model_dump_json().encode())
    for path in _files_of(yaml.safe_load(scenario.to_yaml()).get("workload")):
        digest.update(file_sha256(path, path.stat().st_mtime_ns).encode())
    return digest.hexdigest()


def _files_of(spec: Any) -> Iterator[Path]:
    """Existing files that a workload section names: every ``path``, ``rates_path``, ... at any depth."""
    if isinstance(spec, dict):
        for key, value in spec.items():
            if isinstance(value, str) and (key == "path" or key.endswith("_path")):
                if os.path.isfile(value):  # a missing one is reported by whoever reads it
                    yield Path(value)
            else:
                yield from _files_of(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from _files_of(value)


@lru_cache(maxsize=64)
def file_sha256(path: Path, stamp: int) -> str:
    """Digest of a file's content; ``stamp`` (modification time, ns) makes a changed file be read again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_ARRANGED: dict[tuple[str, str], Any] = {}


def arranged(scenario: Any, contender: Contender) -> Any:
    """The scenario on the fixed arrangement that ``contender`` brings, made once per content; else as it is."""
    if not contender.cluster:
        return scenario
    key = (scenario.hash(), json.dumps(contender.cluster))
    if key not in _ARRANGED:
        fixed = {"cluster": list(contender.cluster), "decisions": {}, "min_prefill": 1, "min_decode": 1}
        _ARRANGED[key] = scenario.with_overrides(fixed)
    return _ARRANGED[key]


def _served(scenario: Any) -> dict[str, Any]:
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


def measure(
    scenario: Any, contender: Contender, rate: float, seed: int, settings: PointSettings,
    watch: Callable[[Any], None] | None = None,
) -> Point:  # fmt: skip
    """Simulate one point; ``watch`` is shown the run."""
    from env.simulate import simulate

    scenario = arranged(scenario, contender)
    run = simulate(
        scenario,
        contender.policy,
        rate=rate,
        n_requests=settings.n_requests,
        seed=seed,
        split=settings.split,
        values=dict(contender.values) or None,
    )
    if watch is not None:
        watch(run)
    each = {"detailed": detailed(run)} if settings.detailed else {}
    return point_of(run, contender, rate, seed, settings, {"backend": "surrogate", **_served(scenario), **each})


def point_of(
    run: Any, contender: Contender, rate: float, seed: int, settings: PointSettings, facts: Mapping[str, Any]
) -> Point:
    """The figures of a finished run, on whichever backend; ``facts`` say more about it than the metrics do."""
    windows = {"warmup": settings.warmup, "drain": settings.drain}
    sent, good = block_counts(outcomes(run, **windows), settings.n_blocks)
    identity = {
        "label": contender.name,
        **facts,
        "policy_id": contender.policy,
        "policy_sha256": policy_sha256(contender),
    }
    return Point(rate, seed, identity | summarize(run, **windows), sent, good)


def _quiet_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C and keeps what is finished


class Evaluator:
    """Answers for points of one scenario, from memory, from the folder or by simulating.

    :param scenario: ``env.scenario.Scenario``
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
        scenario: Any,
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
        self._pool: ProcessPoolExecutor | None = None
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
                write_json(self._folder / f"{key}.json", point.__dict__)
            if self._on_point is not None:
                self._on_point(point)
        return [self._known[keys[seed]] for seed in seeds]

    def attainment(self, contender: Contender, rate: float, seeds: Sequence[int]) -> float:
        """Attainment over the requests of all seeds together."""
        points = self.points(contender, rate, seeds)
        return sum(sum(p.good) for p in points) / max(sum(sum(p.sent) for p in points), 1)

    def _key(self, contender: Contender, rate: float, seed: int, settings: PointSettings) -> str:
        parts = [*self._base[:2], settings.__dict__, *self._base[2:], policy_sha256(contender), repr(float(rate)), seed]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

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
            self._pool = ProcessPoolExecutor(self._jobs, mp_context=get_context("spawn"), initializer=_quiet_worker)
        return self._pool

    def _simulate(
        self, contender: Contender, rate: float, seeds: Sequence[int], settings: PointSettings
    ) -> Iterator[Point]:
        pool = self._executor(len(seeds))
        if pool is None:
            for seed in seeds:
                yield self._measure(self.scenario, contender, rate, seed, settings)
            return
        waiting = {pool.submit(self._measure, self.scenario, contender, rate, seed, settings) for seed in seeds}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
