"""``python -m eval.studies.seeds``: the same training with several seeds, and the curve of what it had reached when.

    python -m eval.studies.seeds --scenario azure-conv-4xa100 --seeds 5 --budget 2m --out runs/seeds

Trains every (scenario, seed) one after the other and resumes what was interrupted. Then every policy that a training
would have answered with, had it been stopped (the leader of the search now and then, its final choice, of PPO the
snapshot best on the windows watched so far), is measured: goodput at 90 % on validation windows that neither search
nor selection saw. The yardstick is the best published rule there, tuned or not; each rule is tuned with as many
simulated requests as the longest of the trainings took.

Drawn is goodput ÷ that of the best rule over wall seconds: interquartile mean over all runs with a 95 % interval, runs
resampled within each scenario (stratified bootstrap, Agarwal et al. 2021). A run has *passed* the rule, or reached the
shipped checkpoint, at the first time from which it never falls behind again. Wall seconds are those of one process,
without the compilation of kernels (once per version and machine).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from engine.common.documents import json_of
from engine.common.files import digest_of, kept, read_json, write_bytes, write_json
from engine.common.lines import lines
from engine.common.options import run_command
from engine.errors import SlalomError
from env.measure.stats import stratified_iqm
from env.scenario import Scenario

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_GRID = 80
_WINDOWS = (7_000, 7_001, 7_002, 7_003)  # validation windows away from those of tuning, search and selection
_RULES = ("linear_score", "predicted_ttft")  # to pass, where a scenario has no screening
_NEAR = 0.01  # tolerance of the goodput search: this near the shipped checkpoint counts as there


@dataclass(frozen=True)
class Stage:
    """A policy that a training had at a time: a design as :class:`train.search.rule.SearchResult` names it, or a
    checkpoint folder."""

    seconds: float
    design: dict[str, Any] | None = None
    folder: str = ""


@dataclass(frozen=True)
class Curve:
    """Goodput ÷ the best rule's of one run, a step function of wall seconds.

    :param shipped: the shipped checkpoint's goodput ÷ the best rule's; None where none is shipped
    """

    scenario: str
    seed: int
    seconds: tuple[float, ...]
    ratio: tuple[float, ...]
    shipped: float | None = None

    def at(self, time: float) -> float:
        """What it had by then; 0 before its first policy."""
        known = [ratio for second, ratio in zip(self.seconds, self.ratio, strict=True) if second <= time]
        return known[-1] if known else 0.0

    @property
    def passed_s(self) -> float | None:
        """From when on it was better than the best rule; None: not at the end."""
        return self._from(1.0, strictly=True)

    @property
    def shipped_s(self) -> float | None:
        """From when on it was as good as the shipped checkpoint, within the tolerance of the measurement."""
        return None if self.shipped is None else self._from(self.shipped * (1.0 - _NEAR), strictly=False)

    def _from(self, bar: float, *, strictly: bool) -> float | None:
        time = None
        for second, ratio in zip(reversed(self.seconds), reversed(self.ratio), strict=True):
            if ratio < bar or (strictly and ratio == bar):
                break
            time = second
        return time


def read_stages(folder: Path) -> list[Stage]:
    """The policies of a run in order of time, from its ``log.jsonl``.

    :raises SlalomError: no finished search there
    """
    try:
        events = [json_of(line, "log.jsonl") for line in lines(folder / "log.jsonl", "run folder")]
        base = next(event for event in reversed(events) if event["event"] == "base")
    except (SlalomError, TypeError, KeyError, StopIteration) as error:
        raise SlalomError("run folder", str(folder), "it holds no training that got past its search") from error
    begins = [place for place, event in enumerate(events) if event["event"] == "search"]
    names = ("rule", "values", "plans", "theta")
    stages = [
        Stage(float(event["seconds"]), {name: event[name] for name in names})
        for event in events[begins[-1] if begins else 0 :]  # an earlier search was interrupted and began again
        if event["event"] == "incumbent"
    ]
    start = float(base["seconds"])
    stages.append(Stage(start, {name: base.get(name) for name in names}))
    judged = [event for event in events if event["event"] == "evaluation"]
    best = float(judged[0]["base"]) if judged else 0.0
    for event in judged:
        if event["score"] > best:
            best, snapshot = float(event["score"]), folder / "snapshots" / event["name"]
            stages.append(Stage(start + float(event["trained_s"]), folder=str(snapshot)))
    if judged and any(event["event"] == "selected" for event in events):
        stages.append(Stage(start + float(judged[-1]["trained_s"]), folder=str(folder / "best")))
    return stages


# -- measuring -------------------------------------------------------------------------------------------------


class _Yardstick:
    """The largest rate with a level of 90 % on fresh validation windows; kept in a folder, so measured once."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        from env.measure.digest import code_sha256, scenario_hash
        from env.surrogate.arena import arena_of
        from train.search.fitness import Fitness

        self.scenario, self._folder, self._windows = scenario, folder, _WINDOWS
        self._fitness = Fitness(scenario, arena_of(scenario).setting, "valid")
        self._identity = [code_sha256(), scenario_hash(scenario), list(self._windows)]
        self._start = float(scenario.reference_rate)

    def stage(self, stage: Stage) -> float:
        """Goodput of one policy of a training, requests per second."""
        return self.folder(Path(stage.folder)) if stage.folder else self.design(stage.design or {})

    def design(self, facts: dict[str, Any]) -> float:
        """The same of a design given by its ``rule``, ``values``, ``plans`` and ``theta``."""
        from train.search.space import Design

        design = Design.of(facts)
        return self._kept(list(design.facts.values()), design.bind)

    def folder(self, path: Path) -> float:
        """The same of a checkpoint."""
        from env.measure.contender import Contender
        from env.measure.digest import policy_sha256
        from policies.checkpoint.folder import load

        return self._kept([policy_sha256(Contender(str(path)))], load(path).bind)

    def _kept(self, parts: list[Any], bind: Any) -> float:
        def measured() -> dict[str, Any]:
            policy, n = bind(self._fitness.setting), self.scenario.n_requests
            return {"goodput": self._fitness.goodput(policy, self._start, self._windows, n, 0.01)}

        path = self._folder / f"{digest_of([*self._identity, *parts])[:24]}.json"
        found = float(kept(path, measured)["goodput"])
        self._start = found or self._start  # the next policy is searched near the last
        return found


def _best_rule(
    scenario: Scenario, rules: Sequence[str], requests: float, yardstick: _Yardstick, out: Path
) -> dict[str, Any]:
    """The best of ``rules``, each as published and tuned with ``requests`` simulated requests.

    :return: ``rule``, ``tuned``, ``goodput``, and ``all`` of them
    """
    from env.measure.contender import PointSettings
    from env.measure.digest import code_sha256, scenario_hash
    from eval.studies.scoreboard import MOST_TRIALS
    from policies import registry
    from train.search.levers import EVERY
    from train.search.tune import MANNER, knee_rate, tune

    settings = PointSettings(n_requests=scenario.n_requests)
    table: list[dict[str, Any]] = []

    @cache
    def knee() -> float:
        return knee_rate(scenario, settings)

    def tuned(rule: str) -> dict[str, Any]:
        print(f"{scenario.name}: tune {rule}, {requests / 1e6:.1f} M requests", file=sys.stderr, flush=True)
        return tune(
            rule, scenario, MOST_TRIALS, knee=knee(), levers=EVERY, requests=requests, settings=settings, prune=True
        ).as_dict()

    for rule in rules:
        defaults = registry.get(rule).values()
        table.append({"rule": rule, "tuned": False, "goodput": yardstick.design({"rule": rule, "values": defaults})})
        identity = [code_sha256(), scenario_hash(scenario), rule, requests, MANNER]
        path = out / f"{scenario.name}-{rule}-{digest_of(identity)[:16]}.json"
        found = kept(path, partial(tuned, rule))
        facts = {"rule": rule, "values": found["values"], "plans": found["plans"] or None}
        table.append({"rule": rule, "tuned": True, "goodput": yardstick.design(facts)})
    best = max(table, key=lambda entry: float(entry["goodput"]))
    if not best["goodput"]:
        raise SlalomError("--rule", list(rules), f"none of them holds 90 % on {scenario.name}; name others")
    return best | {"requests": requests, "all": table}


def _curves(scenario_name: str, runs: int, rules: Sequence[str], out: Path) -> tuple[list[Curve], dict[str, Any]]:
    """The curves of one scenario's trainings and the rule they are measured by."""
    from eval.studies.scoreboard import CHECKPOINTS, OPPONENTS

    scenario = Scenario.load(scenario_name)
    folders = [_folder(out, scenario_name, seed) for seed in range(runs)]
    requests = max(float(read_json(folder / "base.json")["requests"]) for folder in folders)
    yardstick = _Yardstick(scenario, out / "goodput")
    rule = _best_rule(scenario, rules or OPPONENTS.get(scenario.name, _RULES), requests, yardstick, out / "rules")
    shipped = CHECKPOINTS / scenario.name
    bar = yardstick.folder(shipped) / rule["goodput"] if (shipped / "policy.json").is_file() else None
    curves = []
    for seed, folder in enumerate(folders):
        stages = read_stages(folder)
        ratios = []
        for number, stage in enumerate(stages):
            print(f"{scenario.name} seed {seed}: policy {number + 1}/{len(stages)}", file=sys.stderr, flush=True)
            ratios.append(yardstick.stage(stage) / rule["goodput"])
        curves.append(Curve(scenario.name, seed, tuple(stage.seconds for stage in stages), tuple(ratios), bar))
    return curves, rule | {"scenario": scenario.name, "shipped_ratio": bar}


# -- summary ---------------------------------------------------------------------------------------------------


def summarise(curves: Sequence[Curve]) -> dict[str, Any]:
    """Interquartile mean and interval over a grid of times, and when each run passed rule and shipped checkpoint."""
    names = list(dict.fromkeys(curve.scenario for curve in curves))
    first = max(curve.seconds[0] for curve in curves)  # before, some run has no policy at all
    grid = np.linspace(first, max(max(curve.seconds) for curve in curves), _GRID)
    found = [stratified_iqm([[c.at(float(t)) for c in curves if c.scenario == name] for name in names]) for t in grid]
    return {
        "scenarios": names,
        "runs": [asdict(curve) | {"passed_s": curve.passed_s, "shipped_s": curve.shipped_s} for curve in curves],
        "seconds": grid.tolist(),
        "ratio_iqm": [value for value, _, _ in found],
        "low": [low for _, low, _ in found],
        "high": [high for _, _, high in found],
        "best_rule": _times([curve.passed_s for curve in curves]),
        "shipped": _times([curve.shipped_s for curve in curves if curve.shipped is not None]),
    }


def _times(times: Sequence[float | None]) -> dict[str, Any]:
    """How many got there; median and latest time, None unless most or all did."""
    known = sorted(time for time in times if time is not None)
    most = 2 * len(known) > len(times)
    return {
        "runs": len(times),
        "reached": len(known),
        "median_s": float(np.median([*known, *[float("inf")] * (len(times) - len(known))])) if most else None,
        "latest_s": known[-1] if known and len(known) == len(times) else None,
    }


def _draw(summary: dict[str, Any]) -> bytes:
    from eval.report.plots import blank, png_of

    figure, (axis,) = blank(8.0, 4.6)
    for run in summary["runs"]:
        axis.step(run["seconds"], run["ratio"], where="post", color="#999999", linewidth=0.8, alpha=0.7)
    axis.plot(summary["seconds"], summary["ratio_iqm"], color="#0072B2", linewidth=2, label="interquartile mean")
    band = (summary["seconds"], summary["low"], summary["high"])
    axis.fill_between(*band, color="#0072B2", alpha=0.2, linewidth=0, label="95 % interval")
    axis.axhline(1.0, color="#333333", linewidth=1, label="best tuned rule")
    shipped = sorted({run["shipped"] for run in summary["runs"] if run["shipped"] is not None})
    for number, bar in enumerate(shipped):
        label = "" if number else "shipped checkpoint"
        axis.axhline(bar, color="#D55E00", linewidth=1, linestyle="--", label=label)
    axis.set(xlabel="wall seconds of search and training", ylabel="goodput at 90 % ÷ the best tuned rule's")
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    return png_of(figure)


def _told(summary: dict[str, Any], rules: Sequence[dict[str, Any]]) -> str:
    """The summary in a few lines."""
    lines = []
    for rule in rules:
        tuned = "tuned with" if rule["tuned"] else "as published, better than tuned with"
        text = f"{rule['scenario']}: best rule {rule['rule']} ({tuned} {rule['requests'] / 1e6:.1f} M requests)"
        text += f" {rule['goodput']:.2f} req/s"
        if rule["shipped_ratio"] is not None:
            text += f"; shipped checkpoint {rule['shipped_ratio']:.3f} of it"
        lines.append(text)
    near = f"reached the shipped result (within {100 * _NEAR:g} %)"
    what = {"best_rule": "passed the best tuned rule", "shipped": near}
    for key, text in what.items():
        found = summary[key]
        if not found["runs"]:
            continue
        median, latest = (_time(found[name]) for name in ("median_s", "latest_s"))
        lines.append(f"{text}: {found['reached']} of {found['runs']} runs; time median {median}, latest {latest}")
    last = [summary[key][-1] for key in ("ratio_iqm", "low", "high")]
    lines.append(
        f"at the end, {summary['seconds'][-1]:.0f} s: {last[0]:.3f} of the best tuned rule's goodput "
        f"(interquartile mean, 95 % interval {last[1]:.3f} to {last[2]:.3f})"
    )
    return "\n".join(lines)


def _time(seconds: float | None) -> str:
    return "not within the budget" if seconds is None else f"{seconds:.1f} s"


def _folder(out: Path, scenario: str, seed: int) -> Path:
    return out / f"{Path(scenario).stem}-{seed}"


@app.command()
def seeds(
    out: Annotated[Path, typer.Option(help="Folder of all runs, curve.json and curve.png.")],
    scenario: Annotated[list[str] | None, typer.Option(help="Scenario; repeat for more.")] = None,
    runs: Annotated[int, typer.Option("--seeds", min=1, help="Trainings of each scenario, seeds 0 upwards.")] = 5,
    budget: Annotated[str, typer.Option(help="Of each training, as for train-policy.")] = "2m",
    algo: Annotated[str, typer.Option(help="direct or ppo, as for train-policy.")] = "direct",
    rule: Annotated[
        list[str] | None, typer.Option(help="Rule to pass; repeat for more. Default: the best four of a screening.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML with hyper-parameters.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Train with several seeds and draw goodput against the best tuned rule over time; run again to resume."""
    from train.budget import parse_budget
    from train.run import Request, run_or_read

    if algo not in ("ppo", "direct"):
        raise SlalomError("--algo", algo, "choose direct or ppo")
    spent = parse_budget(budget)
    names = scenario or ["azure-conv-4xa100"]
    for name in names:
        for seed in range(runs):
            print(f"{name}: training {seed + 1}/{runs} ({budget})", file=sys.stderr, flush=True)
            run_or_read(Request(name, algo, "auto", spent, seed, _folder(out, name, seed), config=config))
    curves: list[Curve] = []
    rules = []
    for name in names:
        found, best = _curves(name, runs, rule or (), out)
        curves += found
        rules.append(best)
    summary = summarise(curves) | {"rules": rules, "budget": budget, "algo": algo}
    write_json(out / "curve.json", summary)
    write_bytes(out / "curve.png", _draw(summary))
    print(json.dumps(summary) if as_json else _told(summary, rules))


def main() -> None:
    """Entry point."""
    run_command("seeds", app)


if __name__ == "__main__":
    main()
