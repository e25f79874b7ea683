"""The headline of a comparison: sustained goodput of every policy, put where readers look for *the* goodput.

``goodput`` of a policy and of a pair then means sustained goodput (``goodput_kind`` says so). ``classic_goodput`` is
what papers measure, clause (a) alone, over runs of the same length: it is never below the sustained one but for noise.

Intervals: each seed alone has an answer, from runs as long as the definition asks. Around the common answer lies
Student's interval of 95 % of the seeds' answers; of a pair, that of the seeds' differences (same arrivals for both).
It is never narrower than the grid of rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from env.measure.contender import Contender, PointSettings
from env.measure.evaluator import Evaluator
from env.measure.level import run_settings
from env.measure.pool import finished, processes
from env.measure.sustained import DEFINITION
from env.measure.sustained_search import Search, measure_sustained
from env.scenario import Scenario
from eval.compare.result import Comparison

SUSTAINED = "surrogate, sustained"  # label of the points, which know more than those of a plain comparison
GRID = 0.01

Table = Mapping[str, dict[str, Any]]


def search_one(
    scenario: Scenario, contender: Contender, seeds: Sequence[int], settings: PointSettings, targets: Sequence[float],
    folder: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Sustained goodput of one policy, JSON-ready; ``by_seed`` for the first target."""
    with Evaluator(scenario, settings, folder=folder, measure=measure_sustained, label=SUSTAINED) as evaluator:
        search = Search(evaluator, contender, seeds, targets=targets, tolerance=GRID, classic=targets[:1])
        rate = next(f.rate for f in search.found if f.target == targets[0])
        by_seed = search.by_seed(targets[0], rate) if rate > 0.0 else [0.0] * len(seeds)
        return search.as_dict() | {"by_seed": by_seed, "simulated_requests": evaluator.simulated_requests}


def search_all(
    scenario: Scenario,
    contenders: Sequence[Contender],
    seeds: Sequence[int],
    settings: PointSettings,
    targets: Sequence[float],
    *,
    jobs: int = 1,
    folder: Path | None = None,
    pool: Executor | None = None,
    on_policy: Callable[[str], None] = lambda name: None,
) -> dict[str, dict[str, Any]]:
    """:func:`search_one` for every contender, by name; each in one process.

    :param pool: where they run instead of in ``jobs`` processes of their own
    :param on_policy: called with the name of each that is finished
    """
    fixed = (tuple(seeds), settings, tuple(targets), folder if pool is None else None)
    work = [(scenario, contender, *fixed) for contender in contenders]
    done = {}
    with processes(jobs) if pool is None and jobs > 1 else nullcontext(pool) as where:
        for job, found in finished(where, search_one, work):
            done[job[1].name] = found
            on_policy(job[1].name)
    return {contender.name: done[contender.name] for contender in contenders}


def meetings(found: Table, settings: PointSettings, target: float) -> dict[float, PointSettings]:
    """The two best sustained goodputs, where all policies are put side by side, with runs of full length."""
    rates = sorted({entry["goodput"][f"{target:g}"]["rate"] for entry in found.values()} - {0.0}, reverse=True)
    lone_s = max(entry["lone_p90_s"] for entry in found.values())
    settle_s = max(entry["settle_s"] for entry in found.values())
    about = next(iter(found.values()))  # of the workload, the same for all
    length = {"turns": about["turns"], "settle_s": settle_s, "natural_s": about["natural_s"]}
    return {rate: run_settings(settings, rate, lone_s, **length) for rate in rates[:2]}


def lead_with(result: Comparison, found: Table) -> Comparison:
    """Put sustained goodput in the first place of ``result``, the classic in the second.

    :param found: of :func:`search_all`
    """
    first, content = f"{result.lead:g}", result.to_json()
    for policy in content["policies"]:
        policy.update(answers(found[policy["label"]], first))
    for pair in content["pairs"]:
        pair["goodput"] = {key: _pair(pair["a"], pair["b"], found, key, key == first) for key in pair["goodput"]}
    content["goodput_kind"] = "sustained"
    content["definition"] = asdict(DEFINITION)
    content["simulated_requests"] += sum(entry["simulated_requests"] for entry in found.values())
    return Comparison.from_json(content)


def answers(entry: Mapping[str, Any], first: str) -> dict[str, Any]:
    """What :func:`search_one` found of one policy under the names of a result; the target ``first`` has an interval."""
    return {
        "goodput": {
            key: _spread(at, _half([entry["by_seed"]], at["rate"]) if key == first else None)
            for key, at in entry["goodput"].items()
        },
        "classic_goodput": {key: _spread(at, None) for key, at in entry["classic"].items()},
        "sustained": {key: value for key, value in entry.items() if key not in ("goodput", "classic")},
    }


def _spread(at: Mapping[str, Any], half: float | None) -> dict[str, Any]:
    """An answer with its interval, where it has one, and its bracket, under the names of a plain comparison."""
    above = at["above"]["rate"] if at["above"] else None
    return dict(at) | {
        "low": None if half is None else max(at["rate"] - half, 0.0),
        "high": None if half is None else at["rate"] + half,
        "bracket": [at["rate"], above],
        "bracketed": at["rate"] > 0.0 and above is not None,
    }


def _half(columns: Sequence[Sequence[float]], rate: float) -> float:
    """Half the interval: of one policy's answers, or of the differences of two, seed by seed."""
    x = np.asarray(columns[0], dtype=np.float64) - (np.asarray(columns[1]) if len(columns) > 1 else 0.0)
    grid = GRID * rate
    if len(x) < 2:
        return grid
    return max(float(student.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))), grid)


def _pair(a: str, b: str, found: Table, key: str, with_interval: bool) -> dict[str, Any]:
    """How ``a`` stands to ``b`` at one target."""
    ours, theirs = (found[name]["goodput"][key]["rate"] for name in (a, b))
    gap = ours - theirs
    ratio = ours / theirs if theirs > 0.0 else None
    if not with_interval:
        none = {"low": None, "high": None}
        return {"ratio": {"value": ratio, **none}, "difference": {"value": gap, **none, "p_better": None}}
    half = _half([found[a]["by_seed"], found[b]["by_seed"]], max(ours, theirs))
    spread = half / float(student.ppf(0.975, max(len(found[a]["by_seed"]) - 1, 1)))
    better = float(student.cdf(gap / max(spread, 1e-12), max(len(found[a]["by_seed"]) - 1, 1)))
    low, high = (None, None) if ratio is None else (max(ratio - half / theirs, 0.0), ratio + half / theirs)
    return {
        "ratio": {"value": ratio, "low": low, "high": high},
        "difference": {"value": gap, "low": gap - half, "high": gap + half, "p_better": better},
    }
