"""The shipped checkpoints against the best tuned opponents of their scenarios, on test windows.

    python -m eval.scoreboard                       every scenario that has a checkpoint; goes on where it stopped
    python -m eval.scoreboard azure-conv-4xa100     only this one
    python -m eval.scoreboard --all-rules           every rule of ``policies/`` instead of the strongest of a screening

Each opponent is searched with as many simulated requests as the checkpoint's whole training took (``eval.tune``, so
on the training split, ranked on validation windows); then all meet the same test windows. ``OPPONENTS`` are the best
four per scenario of a screening of all rules: eight random draws per parameter, ranked on validation arrivals.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from engine.errors import SlalomError
from env.scenario import Scenario
from eval.points import PointSettings
from eval.session import Request, Watcher, evaluate
from eval.store import read_json, write_json
from eval.tune import KNEE

__all__ = ["OPPONENTS", "main", "row", "table"]

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints" / "policies"
OPPONENTS: dict[str, tuple[str, ...]] = {
    "azure-conv-4xa100": ("linear_score", "splitwise", "muxwise", "taichi"),
    "mooncake-pd-8xh100": ("tropical_code", "tropical", "linear_score", "taichi"),
    "creation-pd-4xa100": ("llmd_latency", "chunked", "linear_score", "aibrix_pd"),
    "tiny-4xa100": ("llmd_token_load", "linear_score", "sglang_cache_aware", "taichi"),
    "rag-prefix-4xa100": ("muxwise", "sglang_cache_aware", "linear_score", "predicted_ttft"),
    "azure-code-mux-4xa100": ("linear_score", "tropical", "tropical_code", "muxwise"),
    "shift-pd-8xa100": ("tropical_code", "muxwise", "linear_score", "taichi"),
    "classes-6xa100": ("linear_score", "mooncake", "tropical_code", "predicted_ttft"),
}
_SEARCH_SEEDS = 2  # of eval.tune


class _Bar(Watcher):
    """One line per phase on standard error."""

    def __init__(self, scenario: str) -> None:
        self._scenario, self._last = scenario, ""

    def phase(self, name: str, points: int | None) -> None:
        head = name.split(":")[0]
        if head != self._last:
            print(f"{self._scenario}: {name}", file=sys.stderr, flush=True)
            self._last = head


def trials_for(checkpoint: Path, n_requests: int) -> int:
    """Trials of ``eval.tune`` that simulate as many requests as the checkpoint's training did, decisions included."""
    training = read_json(checkpoint / "policy.json")["training"]
    spent = int(training.get("search_requests", 0)) + int(training.get("frames", 0))
    return max(1, math.ceil(spent / (len(KNEE) * _SEARCH_SEEDS * n_requests)))


def row(result: dict[str, Any], learned: str) -> dict[str, Any]:
    """One scenario's line: the checkpoint, its best opponent at every target, ratio with 95 % interval.

    :param result: of :func:`eval.session.evaluate`
    :param learned: label of the checkpoint
    """
    mine = next(p for p in result["policies"] if p["label"] == learned)
    found: dict[str, Any] = {"scenario": result["settings"]["scenario"]}
    for target in mine["goodput"]:
        rivals = [p for p in result["policies"] if p["label"] != learned]
        best = max(rivals, key=lambda p: p["goodput"][target]["rate"])
        ratio = _ratio(result["pairs"], learned, best["label"], target)
        found[target] = {
            "learned": mine["goodput"][target]["rate"],
            "opponent": best["label"],
            "rate": best["goodput"][target]["rate"],
            **ratio,
        }
    found["worst_wait_s"] = {p["label"]: _at(p, result["at_rate"])["worst_wait_s"] for p in (mine, best)}
    found["by_class"] = _at(mine, result["at_rate"])["slo_attainment_by_class"]
    return found


def _at(policy: dict[str, Any], rate: float) -> dict[str, Any]:
    points: list[dict[str, Any]] = policy["points"]
    return min(points, key=lambda p: abs(p["rate"] - rate))


def _ratio(pairs: list[dict[str, Any]], a: str, b: str, target: str) -> dict[str, float | None]:
    for pair in pairs:
        ratio = pair["goodput"][target]["ratio"]
        if (pair["a"], pair["b"]) == (a, b):
            return {"ratio": ratio["value"], "low": ratio["low"], "high": ratio["high"]}
        if (pair["a"], pair["b"]) == (b, a):
            turned = {k: None if not ratio[k] else 1.0 / ratio[k] for k in ("value", "low", "high")}
            return {"ratio": turned["value"], "low": turned["high"], "high": turned["low"]}
    raise KeyError((a, b))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, with the geometric mean of the ratios at 90 % and the smallest."""
    lines = [
        "| scenario | learned, req/s | best opponent | its req/s | ratio | 95 % interval | ratio at 95 % | at 99 % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for found in rows:
        at = found["0.9"]
        others = " | ".join(_figure(found[t]["ratio"]) if t in found else "" for t in ("0.95", "0.99"))
        lines.append(
            f"| {found['scenario']} | {at['learned']:.2f} | {at['opponent']} | {at['rate']:.2f} "
            f"| {_figure(at['ratio'])} | {_figure(at['low'])} to {_figure(at['high'])} | {others} |"
        )
    ratios = [found["0.9"]["ratio"] for found in rows if found["0.9"]["ratio"]]
    if ratios:
        mean = math.exp(sum(math.log(r) for r in ratios) / len(ratios))
        lines.append(f"\nGeometric mean of the ratios at 90 %: {mean:.3f}; smallest {min(ratios):.3f}.")
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def score(
    name: str, out: Path, jobs: int, all_rules: bool, share: float, seeds: int, split: Any = "test"
) -> dict[str, Any]:
    """Tune, compare, note; read back where this was done before.

    :param share: of the equal budget that opponents get (below 1 the comparison is not equal, and says so)
    """
    scenario, checkpoint = Scenario.load(name), CHECKPOINTS / name
    settings = PointSettings(n_requests=scenario.n_requests, split=split)
    trials = max(1, round(share * trials_for(checkpoint, settings.n_requests)))
    rivals = ("all",) if all_rules else (*OPPONENTS[name], "static_plan")
    request = Request(scenario, (*rivals, str(checkpoint)), None, seeds, settings, trials, jobs, out / name)
    result = evaluate(request, _Bar(name))
    write_json(out / name / "result.json", result)
    learned = next(p["label"] for p in result["policies"] if p["policy_id"] == str(checkpoint))
    return row(result, learned) | {"trials": trials, "share": share}


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 2 on a scenario without a checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m eval.scoreboard", description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="*")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3, help="test windows per rate")
    parser.add_argument("--share", type=float, default=1.0, help="of the equal budget, for a quick look")
    parser.add_argument("--split", choices=("valid", "test"), default="test", help="windows of the comparison")
    parser.add_argument("--all-rules", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/scoreboard"))
    options = parser.parse_args(arguments)
    known = sorted(p.name for p in CHECKPOINTS.glob("*") if p.name in OPPONENTS)
    rows = []
    try:
        for name in options.scenarios or known:
            if name not in known:
                raise SlalomError("scenario", name, f"checkpoints stand for: {', '.join(known) or 'none'}")
            effort = (options.all_rules, options.share, options.seeds, options.split)
            rows.append(score(name, options.out, options.jobs, *effort))
    except SlalomError as error:
        print(f"scoreboard: {error}", file=sys.stderr)
        return 2
    write_json(options.out / "scoreboard.json", rows)
    print(table(rows))
    for found in rows:
        print(json.dumps({k: found[k] for k in ("scenario", "trials", "worst_wait_s", "by_class")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
