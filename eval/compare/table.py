"""Every policy on every scenario in one table: sustained goodput untuned and tuned, the classic one beside it.

A *cell* is one policy on one scenario and runs in one process: sustained goodput at 90 % of the defaults
(``env.measure.sustained``; classic: clause (a) alone, over runs as long), a search of the parameters with ``tune``
trials (``train`` split, ranked on ``valid``), and sustained goodput of what it found (``test``). Economy: the
sequential search of ``env.measure.sustained_search``, the same arrivals in all cells (common random numbers), a trial
that stops once it cannot become a finalist, a bound of the simulated requests of each search, and defaults left out
where only tuned rules are asked for. Rules are tuned, and latencies read at the scenario's ``reference_rate``, in
shorter runs that flatter nobody (requests that arrive last meet a cluster that is not full yet): arrivals span at least
ten times what one request may take within its targets. Finished cells are kept, so an interrupted table resumes; what
changed since is measured anew.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from engine.common.files import digest_of
from engine.common.options import listed
from engine.common.provenance import commit, machine, versions
from engine.errors import SlalomError
from engine.jit import sources
from env.measure.contender import STATIC_PLAN as STATIC
from env.measure.contender import Contender, PointSettings
from env.measure.digest import code_sha256, policy_sha256, scenario_hash
from env.measure.evaluator import Evaluator
from env.measure.level import rate_unit
from env.scenario import Scenario
from env.surrogate.arena import build_trace
from eval.compare.cells import measured
from eval.compare.headline import answers, search_one
from eval.compare.session import label_of, scaled
from eval.compare.static import TRIALS, search_static
from policies import registry
from train.search.levers import EVERY
from train.search.tune import MANNER, best_knee, tune

#: The eight bundled traffic regimes; the other bundled scenarios are set-ups of papers.
TRAFFIC = (
    "azure-conv-4xa100",
    "mooncake-pd-8xh100",
    "creation-pd-4xa100",
    "tiny-4xa100",
    "rag-prefix-4xa100",
    "azure-code-mux-4xa100",
    "shift-pd-8xa100",
    "classes-6xa100",
)
#: Rates of the tuning objective, as multiples of the scenario's knee.
FACTORS = (0.85, 1.05, 1.3)
SPANS = 10.0
MOST_REQUESTS = 20_000
TARGET = 0.9
_LATENCIES = ("p90_ttft_ms", "p99_ttft_ms", "p90_tpot_ms", "p99_itl_ms")


@dataclass(frozen=True)
class TableRequest:
    """What the table holds.

    :param scenarios: names or files; ``policies``: names, specs, checkpoint folders, ``static_plan`` or ``all``
    :param requests: per run (None: the scenario's)
    :param seeds: of the ``test`` split; ``tune``: trials per policy and scenario, 0 compares untuned policies
    :param tune_requests: simulated requests after which each search ends, if its trials last so long; None: no bound
    :param only_tuned: leave out the defaults of a rule that was tuned
    :param slo_scale: multiplies every TTFT and TPOT target
    """

    scenarios: tuple[str, ...]
    policies: tuple[str, ...]
    requests: int | None = None
    seeds: int = 2
    tune: int = 0
    tune_requests: float | None = None
    only_tuned: bool = False
    warmup: float = 0.05
    drain: float = 0.0
    slo_scale: float = 1.0


@dataclass(frozen=True)
class _Task:
    scenario: str
    policy: str
    request: TableRequest
    knee: float = 0.0
    requests: int = 0  # per run; 0: the request's or the scenario's

    def loaded(self) -> tuple[Any, PointSettings]:
        asked = self.request
        scenario = scaled(Scenario.load(self.scenario), asked.slo_scale)
        n = self.requests or asked.requests or scenario.n_requests
        return scenario, PointSettings(n_requests=n, warmup=asked.warmup, drain=asked.drain)

    def file(self, folder: Path) -> Path:
        """Where the cell is kept: the name holds a digest of all that determines it."""
        scenario, settings = self.loaded()
        policy = policy_sha256(Contender(self.policy))
        parts: list[Any] = [code_sha256(), scenario_hash(scenario), policy, asdict(settings)]
        parts += [self.request.seeds, self.request.tune, self.knee, list(FACTORS), MANNER]
        parts += [self.request.tune_requests, self.request.only_tuned, _measuring()]
        label = label_of(self.policy).split(":")[0] if self.policy else "knee"
        return folder / "cells" / f"{Path(self.scenario).stem}.{label}-{digest_of(parts)[:16]}.json"


@cache
def _measuring() -> str:
    """Digest of the sources that say what sustained goodput is and how it is searched."""
    return sources.sha256([sources.path_of("eval.compare.headline")])


def scenario_names(asked: Sequence[str]) -> tuple[str, ...]:
    """Scenarios named with commas, repeated options or ``all`` (the eight traffic regimes), each once."""
    names = [name for text in asked for name in listed(text)]
    return tuple(dict.fromkeys(s for name in names for s in (TRAFFIC if name == "all" else (name,))))


def cells_of(request: TableRequest) -> list[str]:
    """Policies of the table; ``all``: every rule and ``static_plan``."""
    named = [p for asked in request.policies for p in ((*registry.names(), STATIC) if asked == "all" else (asked,))]
    return list(dict.fromkeys(named))


# -- one cell --------------------------------------------------------------------------------------------------


def steady_requests(scenario: Scenario, rate: float) -> int:
    """Requests of a run at ``rate`` that is long against the time one request may take, at least the scenario's."""
    trace = build_trace(scenario, rate, 1000, 0, "train")
    shares = np.bincount(trace.cls, minlength=len(scenario.classes)) / trace.n
    tpot = float(sum(share * c.tpot_s for share, c in zip(shares, scenario.classes, strict=True)))
    stay = float(trace.output.mean()) * tpot + max(c.ttft_s for c in scenario.classes)
    return int(min(max(scenario.n_requests, math.ceil(SPANS * stay * rate)), MOST_REQUESTS))


def _knee(task: _Task) -> dict[str, Any]:
    """The best knee of a few reference rules on the ``train`` split, and the requests of a run."""
    scenario, settings = task.loaded()
    knee = best_knee(scenario, settings)
    return {"knee": knee, "requests": task.request.requests or steady_requests(scenario, knee)}


def run_cell(task: _Task) -> dict[str, Any]:
    """One policy on one scenario; ``refused`` holds the reason where it does not fit."""
    scenario, settings = task.loaded()
    cell: dict[str, Any] = {"scenario": scenario.name, "policy": task.policy, "label": label_of(task.policy)}
    try:
        with Evaluator(scenario, settings) as evaluator:
            if task.policy == STATIC:
                return cell | _static(task, scenario, settings, evaluator)
            tuned = _tuned(task, scenario, settings, evaluator)
            alone = task.request.only_tuned and tuned is not None
            plain = None if alone else _figures(task, scenario, evaluator, Contender(task.policy))
            return cell | {"untuned": plain, "tuned": tuned}
    except SlalomError as error:
        return cell | {"refused": str(error), "untuned": None, "tuned": None}


def _figures(task: _Task, scenario: Scenario, evaluator: Evaluator, contender: Contender) -> dict[str, Any]:
    """Sustained goodput with interval, and what the policy does at the scenario's reference rate."""
    seeds, key = range(task.request.seeds), f"{TARGET:g}"
    found = answers(search_one(scenario, contender, seeds, evaluator.settings, (TARGET,), None), key)
    runs = [p.metrics for p in evaluator.points(contender, scenario.reference_rate, seeds)]
    at = {key: _mean([run[key] for run in runs]) for key in _LATENCIES}
    lost = sum(run[kind] for run in runs for kind in ("shed", "failed", "unfinished"))
    return {
        "goodput": found["goodput"][key],
        "classic": found["classic_goodput"][key]["rate"],
        "stability_limit": found["sustained"]["stability_limit"],
        "missing": found["sustained"]["missing"],
        "simulated_requests": found["sustained"]["simulated_requests"],
        "rate": scenario.reference_rate,
        "attainment": evaluator.attainment(contender, scenario.reference_rate, seeds),
        "lost": lost / max(sum(run["num_prompts"] for run in runs), 1),
        **at,
        "decisions_per_second": sum(r["decisions"] for r in runs) / max(sum(r["wall_s"] for r in runs), 1e-9),
        "policy": contender.policy,
        "values": dict(contender.values),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _effort(scenario: Scenario, settings: PointSettings, asked: float | None) -> dict[str, Any]:
    """Of a search: half the requests of a run, one seed; then four finalists on two fresh seeds.

    :param asked: simulated requests, at most
    """
    n = min(settings.n_requests, max(scenario.n_requests, settings.n_requests // 2))
    bound = math.inf if asked is None else asked
    return {
        "settings": replace(settings, n_requests=n), "seeds": (0,), "valid_seeds": 2, "finalists": 4,
        "requests": bound,
    }  # fmt: skip


def _tuned(task: _Task, scenario: Scenario, settings: PointSettings, evaluator: Evaluator) -> dict[str, Any] | None:
    if task.request.tune == 0 or os.path.isdir(task.policy):
        return None
    rates = [factor * task.knee for factor in FACTORS]
    effort = _effort(scenario, settings, task.request.tune_requests)
    effort |= {"rates": rates, "knee": task.knee, "levers": EVERY, "prune": True}
    found = tune(task.policy, scenario, task.request.tune, **effort)
    search = {"trials": found.trials, "simulated_requests": found.simulated_requests, "default": found.default}
    search |= {"score": found.score}
    if found.trials == 0:
        return None  # nothing to tune
    contender = Contender(found.rule, found.values, task.policy, tuned=True, plans=found.plans)
    return _figures(task, scenario, evaluator, contender) | {"search": search}


def _static(task: _Task, scenario: Scenario, settings: PointSettings, evaluator: Evaluator) -> dict[str, Any]:
    trials = task.request.tune or TRIALS
    effort = _effort(scenario, settings, task.request.tune_requests)
    found = search_static(scenario, trials, knee=task.knee, factors=FACTORS, **effort)
    figures = _figures(task, scenario, evaluator, found.contender)
    search = found.as_dict()
    return {"untuned": None, "tuned": figures | {"arrangement": found.arrangement, "search": search}}


# -- all of them -----------------------------------------------------------------------------------------------


def run_table(
    request: TableRequest,
    *,
    jobs: int = 1,
    out: Path | None = None,
    say: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> dict[str, Any]:
    """Measure every cell.

    :param jobs: cells at once, each in its own process
    :param out: finished cells are kept here and read back; None keeps nothing
    :param say: hears what is finished, how many cells are, and of how many
    :return: JSON-ready: ``scenarios`` (knee, rate), ``cells`` in order, ``settings``
    :raises SlalomError: unknown scenario or rule, a policy that fits none of them, a folder that cannot be written
    """
    for policy in request.policies:  # a slip costs a second, not the hours before its cell
        if policy not in ("all", STATIC) and not os.path.isdir(policy):
            rule, values = registry.parse(policy)
            registry.get(rule).values(values)
    policies = cells_of(request)
    total = len(policies) * len(request.scenarios)
    say("knees", 0, total)
    alone = [_Task(name, "", request) for name in request.scenarios]
    knees = {task.scenario: found for task, found in measured(alone, _knee, jobs, out)}
    tasks = [_Task(name, policy, request, **knees[name]) for name in request.scenarios for policy in policies]
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for task, cell in measured(tasks, run_cell, jobs, out):
        cells[task.scenario, task.policy] = cell
        say(f"{task.scenario}: {task.policy}", len(cells), total)
    for policy in policies:
        mine = [cells[name, policy] for name in request.scenarios]
        if "all" not in request.policies and all("refused" in cell for cell in mine):
            raise SlalomError("--policy", policy, mine[0]["refused"])
    return {
        "mode": "table",
        "target": TARGET,
        "goodput_kind": "sustained",
        "scenarios": [_about(name, knees[name]) for name in request.scenarios],
        "policies": [label_of(policy) for policy in policies],
        "cells": [cells[task.scenario, task.policy] for task in tasks],
        "settings": {
            **asdict(request),
            "factors": list(FACTORS),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "code_sha256": code_sha256(),
            "versions": versions(),
            "machine": machine(),
        },
    }


def _about(name: str, found: dict[str, Any]) -> dict[str, Any]:
    scenario = Scenario.load(name)
    facts = {
        "name": scenario.name,
        "description": " ".join([scenario.description, *scenario.poor_fits()]),
        "regime": scenario.regime,
        "rate_unit": rate_unit(scenario),
    }
    return facts | {"gpus": scenario.n_gpus(), "reference_rate": scenario.reference_rate, **found}
