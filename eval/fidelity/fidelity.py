"""How far the surrogate is from the engine: the same arrivals and policies on both, and the engine against itself.

A *case* is (scenario, policy, load). The surrogate answers it once; the engine plays it ``repetitions`` times, cases
interleaved, so that what drifts (heat, neighbours) drifts under all of them. The noise beside every error is what a
repetition of the engine says about the others: no model can be nearer than that. With a gauge
(:mod:`eval.fidelity.gauge`) every run is also compared with the surrogate at the speed the machine had then.

An error is taken apart by its source. *profile*: what the executed steps should have computed for, by the profile,
against what they did. *host*: time between steps, against the profile's. *client*: how late requests were sent.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.common.files import digest_of, kept, write_json
from engine.common.progress import Display
from engine.common.provenance import commit, machine, versions
from engine.core.kinds import LaneKind
from engine.errors import SlalomError
from engine.latency.evaluate import TICKS_PER_S
from env.measure.contender import Contender, PointSettings
from env.measure.digest import code_sha256, scenario_hash
from env.measure.evaluator import Evaluator
from env.measure.metrics import outcomes
from env.scenario import Scenario
from eval.fidelity.errors import Case, row_of, summary_of
from eval.fidelity.promise import promise_of
from eval.fidelity.remote import is_router

_WARMUP = 0.05


def observed(run: Any) -> dict[str, Any]:
    """What is kept of a run: latencies of the measured requests in ms, who was good, rates.

    Who has not finished counts with what the run's end leaves certain: no first token before it, and no token after
    the last one. Who never began has no TPOT; in ``slowness`` (the mean of TTFT and TPOT in units of their targets) it
    is as late with it as with its first token. One token has no TPOT and counts in neither.
    """
    found = outcomes(run, warmup=_WARMUP)
    r = run.req[found.rows]
    first, last = r["arrival"].min(), r["last_token"].max()
    began = np.isfinite(found.ttft_s)
    ttft = np.where(began, found.ttft_s, run.duration_s)
    since_first = np.maximum(run.duration_s - r["first_token"] / TICKS_PER_S, 0.0)
    so_far = np.where(began & ~found.finished, since_first / np.maximum(r["generated"], 1), np.nan)
    tpot = np.where(found.finished, found.tpot_s, so_far)
    late = ttft * TICKS_PER_S / np.maximum(r["ttft_slo"], 1)
    slow = np.where(began, tpot * TICKS_PER_S / np.maximum(r["tpot_slo"], 1), late)
    known = np.isfinite(slow)
    return {
        "ttft_ms": (1e3 * ttft).round(3).tolist(),
        "tpot_ms": (1e3 * tpot[np.isfinite(tpot)]).round(3).tolist(),
        "attainment": float(found.good.mean()),
        "goodput": float(found.good.sum()) / max((int(last) - int(first)) * 1e-12, 1e-9),
        "slowness": float(late.mean()) + (float(slow[known].mean()) if known.any() else 0.0),
        "finished": int(found.finished.sum()),
        "measured": len(found.rows),
    }


def sources(run: Any, scenario: Scenario) -> dict[str, float]:
    """Where an engine run parts from the profile: relative to the time of all its steps."""
    from engine.core.durations import step_ticks
    from engine.latency import pack

    placements, (heads, shares) = scenario.placements(), pack(scenario.load_profiles())
    computed = host = total = predicted = waited = expected_host = 0.0
    for step in run.steps:
        if step.lane["kind"] == LaneKind.IDLE:
            continue
        row = placements[step.instance].profile
        seconds = float(step_ticks(heads[row], shares[row, step.lane["share"]], step.lane)[0]) * 1e-12
        overhead = float(heads[row]["step_overhead_s"])
        predicted += seconds - overhead
        expected_host += overhead
        computed += step.run_s
        waited += max(step.run_s - step.cpu_s, 0.0) if "[cpu]" in run.device else 0.0
        host += step.host_s
        total += step.total_s
    lag = run.lag_s[np.isfinite(run.lag_s)]
    total = max(total, 1e-9)
    return {
        "profile": (predicted - computed) / total,
        "host": (expected_host - host) / total,
        "step": (predicted + expected_host) / total - 1.0,
        "waited_for_core": waited / total,
        "host_ms": 1e3 * host / max(len(run.steps), 1),
        "client_lag_ms": 1e3 * float(np.median(lag)) if len(lag) else 0.0,
        "client_lag_p99_ms": 1e3 * float(np.percentile(lag, 99)) if len(lag) else 0.0,
        "steps": float(len(run.steps)),
    }


# -- planning ------------------------------------------------------------------------------------------------


def plan(scenario: Scenario, policies: Sequence[str], loads: Sequence[float], run_s: float) -> list[Case]:
    """The cases of one scenario: loads are shares of the median goodput the surrogate finds for ``policies``.

    Of the best policy's goodput, most others would be asked for more than they can serve.
    """
    from env.measure.goodput import largest_rate

    settings = PointSettings(n_requests=max(int(20 * scenario.reference_rate), 200))
    goodput = {}
    with Evaluator(scenario, settings) as evaluator:
        for policy in (p for p in policies if not is_router(p)):
            contender = Contender(policy)
            goodput[policy] = largest_rate(
                lambda rate, c=contender: evaluator.attainment(c, rate, [0]),  # type: ignore[misc]
                scenario.reference_rate,
                tolerance=0.02,
            )
    typical = float(np.median(list(goodput.values())))
    if typical <= 0.0:
        fix = "no policy serves 90 % of the requests in time at any rate: loosen the targets of its classes"
        raise SlalomError("scenario", scenario.name, fix)
    cases = []
    for load in loads:
        rate = round(load * typical, 3)
        n = max(int(rate * run_s), 20)
        cases += [Case(scenario.name, p, load, rate, rate / max(goodput.get(p, typical), 1e-9), n) for p in policies]
    return cases


# -- running -------------------------------------------------------------------------------------------------


def fidelity(
    scenarios: Sequence[Any],
    policies: Sequence[str],
    *,
    loads: Sequence[float] = (0.5, 0.65, 0.8),
    repetitions: int = 3,
    run_s: float = 9.0,
    out: Path | None = None,
    park: Callable[[Any], Any],
    say: Callable[[str, int, int], None] = lambda text, done, total: None,
    replay: Callable[..., Any] | None = None,
    gauge: Callable[[Any], Callable[[], float]] | None = None,
) -> dict[str, Any]:
    """Run every case on both and compare; finished engine runs in ``out`` are read back.

    :param park: the model that a scenario is served with on the engine
    :param say: hears what runs, and how many engine runs of how many are done
    :param gauge: by scenario, what measures how much longer than by the profile steps take now; None: not measured
    :raises SlalomError: a policy or scenario that does not fit
    """
    from env.surrogate.simulate import simulate

    if replay is None:
        from env.live.replay import replay
    assert replay is not None
    by_name = {s.name: s for s in scenarios}
    cases = [case for s in scenarios for case in plan(s, policies, loads, run_s)]
    parks = {name: park(s) for name, s in by_name.items()}
    gauges = {name: gauge(s) for name, s in by_name.items()} if gauge is not None else {}
    known = [c for c in cases if not is_router(c.policy)]  # the surrogate does not know routers of others
    ours = {c: observed(_surrogate(simulate, by_name[c.scenario], c)) for c in known}
    theirs: dict[Case, list[dict[str, Any]]] = {c: [] for c in cases}
    done, total = 0, repetitions * len(cases)

    def played(case: Case) -> dict[str, Any]:
        scenario = by_name[case.scenario]
        speed = [gauges[case.scenario]()] if gauges else []
        run = replay(
            scenario, case.policy, rate=case.rate, n_requests=case.n_requests, seed=1, park=parks[case.scenario],
            drain_s=2.0 * run_s,
        )  # fmt: skip
        entry = observed(run) | {"sources": sources(run, scenario)}
        return entry | ({"slowdown": [*speed, gauges[case.scenario]()]} if gauges else {})

    for repetition in range(repetitions):
        for case in cases:
            scenario = by_name[case.scenario]
            say(f"{case.policy} at {case.rate:.3g}/s, {case.scenario}", done, total)
            path = _path(out, scenario, case, repetition, parks[case.scenario].name)
            theirs[case].append(kept(path, partial(played, case)))
            done += 1
    say("done", done, total)
    table = [row_of(case, [ours[case]], theirs[case]) for case in known]
    result = {
        "mode": "fidelity",
        "table": table,
        "summary": summary_of(table, {c: [entry] for c, entry in ours.items()}, theirs),
        "promise": promise_of(cases, ours, theirs),
    }
    if gauges:
        at_speed = {c: [_at_speed(simulate, by_name[c.scenario], c, entry) for entry in theirs[c]] for c in cases}
        table = [row_of(case, at_speed[case], theirs[case]) for case in cases]
        result["at_speed"] = {
            "table": table,
            "summary": summary_of(table, at_speed, theirs),
            "slowdown": [float(np.mean(entry["slowdown"])) for c in cases for entry in theirs[c]],
        }
    return result | {
        "settings": {
            "scenarios": {s.name: scenario_hash(s) for s in scenarios},
            "policies": list(policies),
            "loads": list(loads),
            "repetitions": repetitions,
            "run_s": run_s,
            "device": sorted({p.name for p in parks.values()}),
            "commit": commit(),
            "versions": versions(),
            "machine": machine(),
        },
    }


def _surrogate(simulate: Any, scenario: Scenario, case: Case, slowdown: float = 1.0) -> Any:
    return simulate(
        scenario, case.policy, rate=case.rate, n_requests=case.n_requests, seed=1, slowdown=slowdown
    )  # fmt: skip


def _at_speed(simulate: Any, scenario: Scenario, case: Case, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The surrogate at the speed that the machine had around the engine run ``entry``."""
    return observed(_surrogate(simulate, scenario, case, float(np.mean(entry["slowdown"]))))


def _path(out: Path | None, scenario: Scenario, case: Case, repetition: int, device: str) -> Path | None:
    if out is None:
        return None
    # Not the fidelity that this very command writes into the profile: more repetitions may follow.
    profiles = [p.model_dump_json(exclude={"fidelity"}) for p in scenario.load_profiles()]
    about = [code_sha256(), scenario.hash(), profiles, device, case.key, repetition]
    return out / "runs" / f"{digest_of(about)[:24]}.json"


# -- keeping -------------------------------------------------------------------------------------------------


def stored_form(result: Mapping[str, Any]) -> dict[str, float | int | str]:
    """The summary as plain figures, for the profile and every checkpoint trained on it."""
    summary, settings = result["summary"], result["settings"]
    flat: dict[str, float | int | str] = {
        "cases": summary["cases"],
        "cases_within_80_percent": summary["cases_within"],
        "repetitions": settings["repetitions"],
        "scenarios": ", ".join(settings["scenarios"]),
        "policies": ", ".join(settings["policies"]),
        "device": "; ".join(settings["device"]),
        "commit": settings["commit"] or "unknown",
        "step_spread": round(summary["step_spread"], 5),
    }
    for name, e in summary["errors"].items():
        flat |= {f"{name}_mean_abs_error": round(e["mean_abs_error"], 5), f"{name}_noise": round(e["noise"], 5)}
    for name, e in result.get("at_speed", {}).get("summary", {}).get("errors", {}).items():
        flat[f"{name}_mean_abs_error_at_speed"] = round(e["mean_abs_error"], 5)
    for name, found in summary["ranking"].items():
        if found["tau"] is not None:
            flat[f"kendall_tau_{name}"] = round(found["tau"], 4)
    return flat


def keep_in_profile(scenarios: Sequence[Any], result: Mapping[str, Any]) -> list[Path]:
    """Write the table's summary into the profiles that ``scenarios`` use; returns the files."""
    from engine.latency.profile import Profile, profiles_dir

    written = []
    for name in dict.fromkeys(n for s in scenarios for n in s.profile_names()):
        path = Path(name) if name.endswith(".json") else profiles_dir() / f"{name}.json"
        profile = Profile.load(name).model_copy(update={"fidelity": stored_form(result)})
        written.append(profile.save(path))
    return written


# -- the command -----------------------------------------------------------------------------------------------


def _side(model: str, engines: Sequence[str]) -> dict[str, Any]:
    """How :func:`fidelity` plays: on the engines of others at ``engines``, else on our own, whose speed is gauged."""
    if engines:
        from eval.fidelity.remote import engines_of_others

        return engines_of_others(engines)
    from env.live.replay import park_for
    from eval.fidelity.gauge import Gauge

    return {
        "park": lambda s: park_for(s, model),
        "gauge": lambda s: Gauge(park_for(s, model).model, s).slowdown,
    }


def command(
    scenarios: Sequence[str], policies: Sequence[str], loads: str, repetitions: int, run_s: float, model: str,
    engines: Sequence[str], out: Path | None, resume: bool, store: bool, as_json: bool,
) -> None:  # fmt: skip
    """``eval-policy --fidelity``; with ``engines`` on those of others, else on our own."""
    from rich.console import Console

    from eval.options import parse_rates

    if out is not None and not resume and os.path.exists(out / "runs") and any((out / "runs").iterdir()):
        raise SlalomError("--out", str(out), "it holds runs already; add --resume or name another folder")
    chosen = [Scenario.load(name.strip()) for group in scenarios for name in group.split(",")]
    shares = parse_rates(loads)
    console = Console(stderr=True)

    from eval.fidelity.report import print_table

    try:
        with Display() as display:
            side = _side(model, engines)

            def park(s: Any) -> Any:
                found = side["park"](s)
                display.say(f"engine: {found.name}, scenario {s.name}")
                return found

            display.phase("engine runs", None)
            result = fidelity(
                chosen, list(dict.fromkeys(policies)), loads=shares, repetitions=repetitions, run_s=run_s, out=out,
                say=lambda text, done, total: display.update(done, text, total), **(side | {"park": park}),
            )  # fmt: skip
    except KeyboardInterrupt:
        kept = f"; finished runs are in {out}, go on with --resume" if out is not None else ""
        print(f"interrupted{kept}", file=sys.stderr)
        raise SystemExit(130) from None
    if out is not None:
        write_json(out / "fidelity.json", result)
        console.print(f"wrote {out / 'fidelity.json'}", highlight=False)
    if store:
        for path in keep_in_profile(chosen, result):
            console.print(f"kept in {path}", highlight=False)
    if as_json:
        sys.stdout.write(json.dumps(result, allow_nan=False) + "\n")
    else:
        print_table(result, Console(width=None if sys.stdout.isatty() else 120))
