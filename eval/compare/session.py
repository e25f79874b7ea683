"""One evaluation from request to report: contenders, tuning, comparison, settings, files.

The command ``eval-policy`` is a thin door to :func:`evaluate`; scripts and notebooks call it directly.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from engine.common.files import claim, digest_of, kept
from engine.common.provenance import commit, machine, versions
from engine.errors import SlalomError
from env.measure.contender import STATIC_PLAN as STATIC
from env.measure.contender import Contender, Point, PointSettings
from env.measure.digest import code_sha256, scenario_hash
from env.measure.evaluator import Evaluator
from env.measure.goodput import TARGETS
from env.measure.level import rate_unit
from env.measure.sustained_search import measure_sustained
from env.scenario import Scenario
from eval.compare.headline import SUSTAINED, lead_with, meetings, search_all
from eval.compare.paired import compare
from eval.compare.result import Comparison
from eval.placement.fleet import check_plannable

#: Of one search, where only its simulated requests are bounded.
MOST_TRIALS = 3_000


class Watcher:
    """Hears about progress; the command shows a bar, scripts may ignore it."""

    def phase(self, name: str, points: int | None) -> None:
        """A policy or a tuning search starts; ``points`` is an estimate of its simulations, if known."""

    def point(self, point: Point) -> None:
        """A point is finished (or was read back)."""

    def note(self, text: str) -> None:
        """Something the user should know."""


@dataclass(frozen=True)
class Request:
    """What is to be evaluated.

    :param policies: names, ``name:param=value``, checkpoint folders, ``static_plan`` for the best fixed arrangement,
        or ``all`` for every known rule and the static plan
    :param rates: requests per second; None searches the goodput
    :param seeds: number of seeds, 0 upwards
    :param tune: trials per rule and for the static plan; 0 compares untuned rules only (the plan takes 40 trials)
    :param tune_requests: simulated requests after which each of these searches ends, if its trials last so long
    :param only_tuned: compare a tuned rule in place of the rule as published, not beside it
    :param prune: give up trials that cannot come among the best any more: a trial then costs less than a full one
    :param out: folder of all files; None keeps nothing
    :param ray: ``auto`` or the address of a Ray cluster that simulates; None: this machine
    :param slo_scale: what the TTFT and TPOT targets of ``scenario`` were multiplied by (see :func:`scaled`); told only
    :param targets: shares of requests at which goodput is searched, in ascending order
    :param backend: simulate, or replay in real time on our engine or on ``engines`` (addresses)
    :param model: that the engine serves; that of the scenario's profile if empty
    :param sustained: lead with sustained goodput (see ``eval.sustained``); only where goodput is searched by simulating
    """

    scenario: Scenario
    policies: tuple[str, ...]
    rates: tuple[float, ...] | None = None
    seeds: int = 3
    settings: PointSettings = field(default_factory=PointSettings)
    tune: int = 0
    jobs: int = 1
    out: Path | None = None
    ray: str | None = None
    slo_scale: float = 1.0
    targets: tuple[float, ...] = TARGETS
    backend: Literal["surrogate", "gpu", "remote"] = "surrogate"
    engines: tuple[str, ...] = ()
    model: str = ""
    prune: bool = False
    sustained: bool = False
    tune_requests: float = float("inf")
    only_tuned: bool = False


def open_folder(out: Path | None, resume: bool, kept: str = "points") -> None:
    """Refuse to mix results: a folder with points (or what ``kept`` names) is only used again when asked to.

    :raises SlalomError: the folder holds results and ``resume`` is false, or it is no folder
    """
    if out is None:
        if resume:
            raise SlalomError("--resume", True, "give the folder of the interrupted run with --out")
        return
    if os.path.exists(out) and not os.path.isdir(out):
        raise SlalomError("--out", str(out), "this is a file; name a folder")
    if not resume and os.path.exists(out / kept) and any((out / kept).iterdir()):
        raise SlalomError("--out", str(out), "it holds results already; add --resume or name another folder")
    claim(out)


def contenders_of(request: Request, watcher: Watcher) -> list[Contender]:
    """Turn the policies asked for into contenders; of ``all``, those that fit the scenario.

    :raises SlalomError: an explicitly named policy does not fit
    """
    from policies.registry import names

    chosen: dict[str, Contender] = {}
    probe = replace(request.settings, n_requests=max(64, request.settings.n_blocks))
    with Evaluator(request.scenario, probe) as evaluator:
        for policy in dict.fromkeys(request.policies):
            for name in (*names(), STATIC) if policy == "all" else [policy]:
                label = label_of(name)
                try:
                    if name == STATIC:
                        check_plannable(request.scenario)
                        chosen.setdefault(name, Contender(name))
                        continue
                    evaluator.points(Contender(name), request.scenario.reference_rate, [0])
                except SlalomError as error:
                    if policy != "all":
                        raise
                    watcher.note(f"{name} left out: {error}")
                    continue
                label = label if label not in chosen else name  # two folders of one name go by their paths
                chosen.setdefault(label, Contender(name, label=label))
    if not chosen:
        raise SlalomError("--policy", list(request.policies), "name at least one policy that fits the scenario")
    return list(chosen.values())


def label_of(policy: str) -> str:
    """A folder's own name; of a run's ``best`` folder the run's name, since every run has one."""
    folder = Path(policy)
    if not os.path.isdir(folder):
        return policy
    folder = folder.resolve()
    return folder.parent.name if folder.name in ("best", "last") else folder.name


def evaluate(request: Request, watcher: Watcher | None = None) -> Comparison:
    """Tune (if asked), compare and return the whole result; with ``out`` every finished part is kept there.

    :raises SlalomError: bad policy, rate or scenario; folder not writable; disk full
    """
    watcher = watcher or Watcher()
    contenders = contenders_of(request, watcher)
    tuning = tune_all(request, contenders, watcher)
    for found in tuning:
        if "cluster" in found:
            place = next(i for i, c in enumerate(contenders) if c.policy == STATIC)
            groups = tuple(found["cluster"])
            contenders[place] = Contender(found["rule"], found["values"], STATIC, tuned=True, cluster=groups)
        elif found["trials"]:
            label = f"{found['policy']} (tuned)"
            plans = tuple(found["plans"])
            contenders.append(Contender(found["rule"], found["values"], label, tuned=True, plans=plans))
            if request.only_tuned:
                contenders = [c for c in contenders if c.policy != found["policy"] or c.tuned]
    for rate in request.rates or (request.scenario.reference_rate,):
        if told := _unfinished(request, rate):
            watcher.note(f"at {rate:.4g} {rate_unit(request.scenario)} {told}")
    seeds = list(range(request.seeds))
    pool, width = _pool(request)
    folder = None if request.out is None else request.out / "points"
    engine = _engine(request, watcher)
    lasting: dict[str, Any] = {}
    if request.sustained and request.rates is None and request.backend == "surrogate":
        watcher.phase("sustained goodput", None)
        lasting = search_all(
            request.scenario, contenders, seeds, request.settings, request.targets, jobs=request.jobs, folder=folder,
            pool=pool, on_policy=lambda name: watcher.phase(f"sustained goodput: {name} is searched", None),
        )  # fmt: skip
        engine = {"measure": measure_sustained, "label": SUSTAINED}
    per_policy = len(seeds) * (len(request.rates) if request.rates else 25)
    with Evaluator(
        request.scenario,
        request.settings,
        jobs=request.jobs,
        folder=folder,
        on_point=watcher.point,
        pool=pool,
        **engine,
    ) as evaluator:
        result = compare(
            evaluator,
            contenders,
            seeds,
            rates=request.rates,
            start=request.scenario.reference_rate,
            targets=request.targets,
            on_policy=lambda name: watcher.phase(name, per_policy),
            parallel=width,
            meetings=meetings(lasting, request.settings, request.targets[0]) if lasting else None,
        )
    if lasting:
        result = lead_with(result, lasting)
    result = result.having(settings=_settings(request, seeds, tuning))
    pair = closest_pair(result, contenders)
    if pair is not None:
        from eval.compare.shadow import shadow

        watcher.phase("timeline", None)
        point = result.meeting_point(result.side(pair[0].name))
        seed = _usual_seed(point, seeds)
        result = result.having(shadow=shadow(request.scenario, *pair, point["rate"], seed, request.settings))
    return result


def _unfinished(request: Request, rate: float) -> str:
    """What runs at ``rate`` break off in the middle, in words."""
    workload = getattr(request.scenario, "workload", None)
    return workload.unfinished(rate, request.settings.n_requests) if workload is not None else ""


def scaled(scenario: Scenario, factor: float) -> Scenario:
    """The scenario with every TTFT and TPOT target multiplied by ``factor``.

    :raises SlalomError: not a positive number
    """
    if not 0.0 < factor < 1e3:
        raise SlalomError("--slo-scale", factor, "give a positive factor, e.g. 0.5 or 2")
    if factor == 1.0:
        return scenario
    changed = {}
    for place, found in enumerate(scenario.classes):
        for name in ("ttft_s", "ttft_factor", "tpot_s"):
            changed[f"classes.{place}.{name}"] = getattr(found, name) * factor
    return scenario.with_overrides(changed)


def closest_pair(result: Comparison, contenders: Sequence[Contender]) -> tuple[Contender, Contender] | None:
    """Whose decisions are worth comparing: the best learned policy (else the best of all) and the best other rule.

    A static plan is no part of it: it decides about other instances.
    """
    by_name = {contender.name: contender for contender in contenders if not contender.cluster}
    if not by_name:
        return None
    subject, rival = result.having(policies=[side for side in result.policies if side.label in by_name]).duel()
    return (by_name[subject.label], by_name[rival.label]) if rival is not None else None


def _usual_seed(point: dict[str, Any], seeds: Sequence[int]) -> int:
    """The seed with the (lower) median attainment, so that the run shown is neither the luckiest nor the worst."""
    shares = [run["slo_attainment"] for run in point["runs"]]
    order = sorted(range(len(seeds)), key=lambda i: (shares[i], i))
    return seeds[order[(len(order) - 1) // 2]]


def _pool(request: Request) -> tuple[Executor | None, int]:
    """Where points are simulated (None: here or in ``jobs`` processes), and how many policies are measured at once."""
    if request.ray is None:
        return None, 1
    from env.measure.pool import RayExecutor, connect, cores

    connect(request.ray)
    return RayExecutor(), max(1, -(-cores() // request.seeds))


def _engine(request: Request, watcher: Watcher) -> dict[str, Any]:
    """How points are measured when not by the surrogate: on one engine, one after the other."""
    if request.backend == "surrogate":
        return {}
    from env.measure.on_engine import on_park, on_remote

    if request.ray is not None:
        raise SlalomError("--ray", request.ray, "engines are driven from this machine: leave it out")
    if request.jobs > 1:
        raise SlalomError("--jobs", request.jobs, "one run at a time on an engine: leave it at 1")
    if request.backend == "remote":
        return on_remote(request.engines)
    return on_park(request.scenario, request.model, watcher.note)


def _settings(request: Request, seeds: Sequence[int], tuning: list[dict[str, Any]]) -> dict[str, Any]:
    scenario = request.scenario
    return {
        "scenario": scenario.name,
        "scenario_sha256": scenario_hash(scenario),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "backend": request.backend,
        "slo_scale": request.slo_scale,
        "rates": None if request.rates is None else list(request.rates),
        "seeds": list(seeds),
        "requests_per_run": request.settings.n_requests,
        "split": request.settings.split,
        "warmup": request.settings.warmup,
        "drain": request.settings.drain,
        "bootstrap_blocks": request.settings.n_blocks,
        "targets": list(request.targets),
        "commit": commit(),
        "code_sha256": code_sha256(),
        "versions": versions(),
        "machine": machine(),
        "tuning": tuning,
        "scenario_yaml": scenario.to_yaml(),
        "rate_unit": rate_unit(scenario),
        "poor_fits": scenario.poor_fits(),
    }


def tune_all(request: Request, contenders: Sequence[Contender], watcher: Watcher) -> list[dict[str, Any]]:
    """Tune every rule, and find the static plan, with the same number of trials; read back what is in ``out``."""
    asked = [c for c in contenders if request.tune > 0 or c.policy == STATIC]
    if not asked:
        return []
    from eval.compare.static import TRIALS, search_static
    from train.search.levers import EVERY
    from train.search.tune import KNEE, best_knee, tune

    pool, width = _pool(request)
    watcher.phase("knee", None)
    knee = best_knee(request.scenario, request.settings)
    rates = tuple(factor * knee for factor in KNEE)

    def search(contender: Contender) -> dict[str, Any]:
        trials = request.tune or TRIALS
        told = _trial_watcher(watcher, contender.name, trials)
        effort: dict[str, Any] = {"settings": request.settings, "jobs": request.jobs, "on_trial": told}
        effort["requests"] = request.tune_requests
        if contender.policy == STATIC:
            return search_static(request.scenario, trials, knee=knee, factors=KNEE, **effort).as_dict()
        best = tune(
            contender.policy, request.scenario, trials, knee=knee, levers=EVERY, prune=request.prune, pool=pool,
            width=2 * width, **effort,
        )  # fmt: skip
        return {"policy": contender.policy, **best.as_dict()}

    found = []
    for contender in asked:
        if os.path.isdir(contender.policy):
            continue
        watcher.phase(f"tune {contender.name}", None)
        found.append(kept(_tuning_file(request, contender, rates), partial(search, contender)))
    return found


def _trial_watcher(watcher: Watcher, name: str, trials: int) -> Callable[[int, float], None]:
    return lambda done, best: watcher.phase(f"tune {name}: {done}/{trials}, {100 * best:.2f} %", None)


def _tuning_file(request: Request, contender: Contender, rates: Sequence[float]) -> Path | None:
    if request.out is None:
        return None
    from train.search.tune import MANNER

    parts = [code_sha256(), scenario_hash(request.scenario), contender.policy, request.tune, list(rates), MANNER]
    parts += ["prunes"] if request.prune else []
    parts += [request.tune_requests] if request.tune_requests < float("inf") else []
    parts.append(request.settings.__dict__)
    return request.out / "tuning" / f"{contender.name.split(':')[0]}-{digest_of(parts)[:16]}.json"
