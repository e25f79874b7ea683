"""The shipped checkpoints against the best tuned opponents of their scenarios, on test windows.

    python -m eval.studies.scoreboard                       every scenario that has a checkpoint; goes on where it
    stopped python -m eval.studies.scoreboard azure-conv-4xa100     only this one
    python -m eval.studies.scoreboard --slo-scale 0.5       TTFT and TPOT targets halved
    python -m eval.studies.scoreboard --search              only the opponents' searches; the test windows stay unseen
    python -m eval.studies.scoreboard --all-rules           every rule of ``policies/`` instead of the strongest of a
    screening python -m eval.studies.scoreboard --read                the tables again from finished results, nothing
    is simulated

Each opponent is searched with as many simulated requests as the checkpoint's whole training took
(``train.search.tune``, so on the training split, ranked on validation windows); then all meet the same test windows.
``OPPONENTS`` are the best four per scenario of the table of all rules (``eval-policy --scenario all --policy all
--tune 25``), with linear_score.

With scaled targets the opponents are searched anew under them; the checkpoint is the shipped one, which has never met
them. The screening is that of the unscaled targets.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.common.files import read_json, write_json
from engine.errors import SlalomError
from engine.jit.sources import ROOT
from env.measure.contender import PointSettings
from env.scenario import Scenario
from eval.compare.session import Request, Watcher, contenders_of, evaluate, scaled, tune_all
from train.search.tune import KNEE

__all__ = [
    "CHECKPOINTS",
    "OPPONENTS",
    "Effort",
    "Lines",
    "main",
    "pair_ratio",
    "row",
    "score",
    "search",
    "table",
    "trials_for",
]

CHECKPOINTS = ROOT / "checkpoints" / "policies"
OPPONENTS: dict[str, tuple[str, ...]] = {
    "azure-conv-4xa100": ("linear_score", "splitwise", "muxwise", "taichi"),
    "mooncake-pd-8xh100": ("tropical_code", "tropical", "linear_score", "taichi"),
    "creation-pd-4xa100": ("llmd_latency", "chunked", "linear_score", "llmd_token_load"),
    "tiny-4xa100": ("tropical_code", "tropical", "linear_score", "llmd_latency"),
    "rag-prefix-4xa100": ("muxwise", "sglang_cache_aware", "linear_score", "duetserve"),
    "azure-code-mux-4xa100": ("linear_score", "tropical", "tropical_code", "dopd_code"),
    "shift-pd-8xa100": ("lodestar", "muxwise", "linear_score", "taichi"),
    "classes-6xa100": ("linear_score", "mooncake", "tropical_code", "predicted_ttft"),
}
#: Whose best knee says where opponents are tuned when the targets are not the scenario's own.
KNEE_RULES = ("least_tokens", "predicted_ttft", "static_split", "linear_score")
_SEARCH_SEEDS = 2  # of train.search.tune
_TARGETS = ("0.9", "0.95", "0.99")


@dataclass(frozen=True)
class Effort:
    """How much one comparison takes.

    :param share: of the equal budget that opponents get (below 1 the comparison is not equal, and says so)
    :param trials: of every opponent instead, whatever the checkpoint's training took
    :param seeds: windows per rate
    :param slo_scale: factor of every TTFT and TPOT target
    """

    jobs: int = 1
    all_rules: bool = False
    share: float = 1.0
    trials: int | None = None
    seeds: int = 3
    split: Literal["valid", "test"] = "test"
    slo_scale: float = 1.0


class Lines(Watcher):
    """One line per phase on standard error, with the seconds since the start."""

    def __init__(self, what: str) -> None:
        self._what, self._last, self._start = what, "", time.monotonic()

    def phase(self, name: str, points: int | None) -> None:
        head = name.split(":")[0]
        if head != self._last:
            print(f"{time.monotonic() - self._start:6.0f} s  {self._what}: {name}", file=sys.stderr, flush=True)
            self._last = head

    def note(self, text: str) -> None:
        print(f"{self._what}: {text}", file=sys.stderr, flush=True)


def trials_for(requests: float, n_requests: int) -> int:
    """Trials of ``train.search.tune`` that simulate as many requests; ``n_requests`` is the size of one run."""
    return max(1, math.ceil(requests / (len(KNEE) * _SEARCH_SEEDS * n_requests)))


def _trained_with(checkpoint: Path) -> float:
    """Requests that a checkpoint's whole training simulated, decisions of PPO included."""
    training = read_json(checkpoint / "policy.json")["training"]
    return float(training.get("search_requests", 0)) + float(training.get("frames", 0))


# -- one scenario ----------------------------------------------------------------------------------------------


def row(result: dict[str, Any], learned: str) -> dict[str, Any]:
    """One scenario's figures: the checkpoint, its best opponent at every target, ratio with 95 % interval, and at the
    common rate what happens to waits, classes and throughput.

    :param result: of :func:`eval.compare.session.evaluate`
    :param learned: label of the checkpoint
    """
    mine = next(p for p in result["policies"] if p["label"] == learned)
    rivals = [p for p in result["policies"] if p["label"] != learned]
    found: dict[str, Any] = {"scenario": result["settings"]["scenario"]}
    for target in mine["goodput"]:
        best = _best(rivals, target)
        found[target] = {
            "learned": mine["goodput"][target]["rate"],
            "opponent": best["label"],
            "rate": best["goodput"][target]["rate"],
            **pair_ratio(result["pairs"], mine, best, target),
        }
    rules = [p for p in rivals if not p["cluster"]]
    opponent = _best(rivals, _TARGETS[0])
    for key in ("at_rate", "second_rate"):
        if result.get(key):
            found[key] = {
                "rate": result[key],
                "learned": _standing(mine, result[key]),
                "opponent": _standing(opponent, result[key]),
                "rule": _standing(_best(rules, _TARGETS[0]), result[key]) if rules else None,
            }
    return found


def _best(policies: Sequence[dict[str, Any]], target: str) -> dict[str, Any]:
    return max(policies, key=lambda p: float(p["goodput"][target]["rate"]))


def _standing(policy: dict[str, Any], rate: float) -> dict[str, Any]:
    """What ``policy`` does at ``rate``: its worst class, its longest wait, finished requests per second."""
    point = min(policy["points"], key=lambda p: abs(p["rate"] - rate))
    classes = {name: c["slo_attainment"] for name, c in point["slo_attainment_by_class"].items()}
    worst = min(classes, key=lambda name: classes[name])
    finished = [run["request_throughput"] for run in point["runs"]]
    return {
        "label": policy["label"],
        "attainment": point["slo_attainment"],
        "worst_class": worst,
        "worst_class_attainment": classes[worst],
        "by_class": classes,
        "worst_wait_s": point["worst_wait_s"],
        "finished_per_s": sum(finished) / len(finished),
    }


def pair_ratio(
    pairs: list[dict[str, Any]], ours: dict[str, Any], theirs: dict[str, Any], target: str
) -> dict[str, Any]:
    """Goodput of ``ours`` ÷ goodput of ``theirs`` with its 95 % interval, from the pairs of a comparison.

    :param ours: an entry of ``policies``
    :return: ``ratio`` (None where the rival holds the target at no rate), ``low``, ``high`` (None: without bound)
    :raises KeyError: no such pair
    """
    a, b = ours["label"], theirs["label"]
    mine, rival = (float(p["goodput"][target]["rate"]) for p in (ours, theirs))
    value = mine / rival if rival > 0.0 else None
    for pair in pairs:
        ratio = pair["goodput"][target]["ratio"]
        if (pair["a"], pair["b"]) == (a, b):
            return {"ratio": value, "low": ratio["low"], "high": ratio["high"]}
        if (pair["a"], pair["b"]) == (b, a):
            low, high = (None if not ratio[k] else 1.0 / ratio[k] for k in ("high", "low"))
            return {"ratio": value, "low": low, "high": high}
    raise KeyError((a, b))


def score(name: str, out: Path, effort: Effort) -> dict[str, Any]:
    """Tune, compare, note; read back where this was done before.

    :raises SlalomError: targets that no reference rule meets at any rate
    """
    request, watcher = _request(name, out, effort)
    result = evaluate(request, watcher)
    write_json(out / _folder(name, effort.slo_scale) / "result.json", result)
    return row(result, name) | _budget(result, name)


def search(name: str, out: Path, effort: Effort) -> None:
    """Only the opponents' searches, kept for :func:`score`.

    :raises SlalomError: as :func:`score`
    """
    request, watcher = _request(name, out, effort)
    tune_all(request, contenders_of(request, watcher), watcher)


def _request(name: str, out: Path, effort: Effort) -> tuple[Request, Lines]:
    checkpoint = CHECKPOINTS / name
    scenario = scaled(Scenario.load(name), effort.slo_scale)
    settings = PointSettings(n_requests=scenario.n_requests, split=effort.split)
    equal = trials_for(_trained_with(checkpoint), settings.n_requests)
    trials = effort.trials or max(1, round(effort.share * equal))
    rivals = ("all",) if effort.all_rules else (*OPPONENTS[name], "static_plan")
    folder = out / _folder(name, effort.slo_scale)
    request = Request(
        scenario, (*rivals, str(checkpoint)), None, effort.seeds, settings, trials, effort.jobs, folder,
        slo_scale=effort.slo_scale, knee_rules=KNEE_RULES,
    )  # fmt: skip
    return request, Lines(folder.name)


def _budget(result: dict[str, Any], name: str) -> dict[str, Any]:
    """Trials that the opponents got, as a share of the equal budget."""
    settings = result["settings"]
    trials = max((int(entry["trials"]) for entry in settings["tuning"]), default=0)
    equal = trials_for(_trained_with(CHECKPOINTS / name), int(settings["requests_per_run"]))
    facts = {"trials": trials, "share": round(trials / equal, 3), "split": settings["split"]}
    return facts | {"slo_scale": settings["slo_scale"]}


def _folder(name: str, slo_scale: float) -> str:
    return name if slo_scale == 1.0 else f"{name}-slo{slo_scale:g}"


def _read(name: str, out: Path, slo_scale: float) -> dict[str, Any]:
    result = read_json(out / _folder(name, slo_scale) / "result.json")
    return row(result, name) | _budget(result, name)


# -- tables ----------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: goodput against the best opponent with geometric means, then waits, classes and throughput."""
    lines = [
        "| scenario | learned, req/s | best opponent | its req/s | ratio | 95 % interval | ratio at 95 % | at 99 % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for found in rows:
        at = found["0.9"]
        others = " | ".join(_ratio_text(found.get(target)) for target in _TARGETS[1:])
        lines.append(
            f"| {found['scenario']} | {at['learned']:.2f} | {at['opponent']} | {at['rate']:.2f} "
            f"| {_ratio_text(at)} | {_figure(at['low'])} to {_figure(at['high'])} | {others} |"
        )
    lines.append("")
    lines += [line for target in _TARGETS if (line := _mean(rows, target))]
    for key, title in (
        ("at_rate", "Where the better of the two holds 90 %:"),
        ("second_rate", "Where the other does:"),
    ):
        standings = [found for found in rows if found.get(key)]
        if standings:
            lines += ["", title, "", *_waits_and_classes(standings, key)]
    return "\n".join(lines)


def _ratio_text(at: dict[str, Any] | None) -> str:
    """A ratio, or who alone holds the target."""
    if at is None:
        return ""
    if at["ratio"] is None:
        return "only learned" if at["learned"] > 0.0 else "nobody"
    return _figure(at["ratio"])


def _mean(rows: list[dict[str, Any]], target: str) -> str:
    """Geometric mean and smallest ratio; scenarios whose ratio has no value are counted, not averaged."""
    known = [found[target]["ratio"] for found in rows if target in found and found[target]["ratio"] is not None]
    if not known:
        return ""
    mean = 0.0 if min(known) <= 0.0 else math.exp(sum(math.log(r) for r in known) / len(known))
    without = len(rows) - len(known)
    left_out = f"; {without} without a ratio left out" if without else ""
    return f"At {100 * float(target):g} %: geometric mean {mean:.3f}, smallest {min(known):.3f}{left_out}."


def _waits_and_classes(rows: list[dict[str, Any]], key: str) -> list[str]:
    """What goodput does not show, at one common rate of each scenario: learned against the best opponent, longest
    waits also against the best rule. Throughput is that of ``vllm bench serve``: finished requests until the last of
    them is, so a few that wait long count against it."""
    lines = [
        "| scenario | at req/s | worst class: learned | opponent | longest wait s: learned | opponent | best rule "
        "| finished/s: learned | opponent | given up |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for found in rows:
        mine, rival, rule = (found[key][who] for who in ("learned", "opponent", "rule"))
        lost = rival["finished_per_s"] - mine["finished_per_s"]
        given_up = f"{lost:.2f} ({100 * lost / rival['finished_per_s']:.1f} %)" if lost > 0.0 else "nothing"
        waits = " | ".join("-" if p is None else f"{p['worst_wait_s']:.1f}" for p in (mine, rival, rule))
        lines.append(
            f"| {found['scenario']} | {found[key]['rate']:.2f} | {_class(mine)} | {_class(rival)} | {waits} "
            f"| {mine['finished_per_s']:.2f} | {rival['finished_per_s']:.2f} | {given_up} |"
        )
    return lines


def _class(standing: dict[str, Any]) -> str:
    name = f" {standing['worst_class']}" if len(standing["by_class"]) > 1 else ""
    return f"{standing['worst_class_attainment']:.3f}{name}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _told(rows: list[dict[str, Any]]) -> str:
    """What the comparison was, in one line."""
    first = rows[0]
    shares = sorted({found["share"] for found in rows})
    share = f"{shares[0]:g}" if len(shares) == 1 else f"{shares[0]:g} to {shares[-1]:g}"
    scale = "" if first["slo_scale"] == 1.0 else f", targets × {first['slo_scale']:g}"
    return f"Windows: {first['split']}; opponents' budget ÷ the checkpoint's: {share}{scale}."


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 2 on a scenario without a checkpoint."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m eval.studies.scoreboard", description=about)
    parser.add_argument("scenarios", nargs="*")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3, help="test windows per rate")
    parser.add_argument("--share", type=float, default=1.0, help="of the equal budget, for a quick look")
    parser.add_argument("--trials", type=int, help="of every opponent, instead of a share of the equal budget")
    parser.add_argument("--search", action="store_true", help="only search the opponents, compare later")
    parser.add_argument("--slo-scale", type=float, default=1.0, help="multiply every TTFT and TPOT target by this")
    parser.add_argument("--split", choices=("valid", "test"), default="test", help="windows of the comparison")
    parser.add_argument("--all-rules", action="store_true")
    parser.add_argument("--read", action="store_true", help="print what --out holds, simulate nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/scoreboard"))
    options = parser.parse_args(arguments)
    known = sorted(p.name for p in CHECKPOINTS.glob("*") if p.name in OPPONENTS)
    effort = Effort(
        options.jobs, options.all_rules, options.share, options.trials, options.seeds, options.split,
        options.slo_scale,
    )  # fmt: skip
    rows = []
    refused: dict[str, str] = {}
    try:
        for name in options.scenarios:
            if name not in known:
                raise SlalomError("scenario", name, f"checkpoints stand for: {', '.join(known) or 'none'}")
        scaled(Scenario.load(known[0]), effort.slo_scale)  # refuses a factor that is none
        for name in options.scenarios or known:
            if options.read:
                stored = options.out / _folder(name, effort.slo_scale) / "result.json"
                if options.scenarios or stored.exists():
                    rows.append(_read(name, options.out, effort.slo_scale))
                continue
            try:
                if options.search:
                    search(name, options.out, effort)
                    continue
                rows.append(score(name, options.out, effort))
            except SlalomError as error:  # the others have their comparison all the same
                refused[name] = str(error)
    except SlalomError as error:
        print(f"scoreboard: {error}", file=sys.stderr)
        return 2
    if rows:
        write_json(options.out / f"{_folder('scoreboard', effort.slo_scale)}.json", rows)
        print(table(rows))
        print(f"\n{_told(rows)}")
    for name, reason in refused.items():
        print(f"Left out, {name}: {reason}")
    return 0 if rows or (options.search and not refused) else 2


if __name__ == "__main__":
    sys.exit(main())
