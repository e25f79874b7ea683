"""The shipped checkpoints against the best tuned opponents of their scenarios: sustained goodput on test windows.

    python -m eval.studies.scoreboard                       every scenario with a checkpoint; goes on where it stopped
    python -m eval.studies.scoreboard azure-conv-4xa100     only this one
    python -m eval.studies.scoreboard --slo-scale 0.5       TTFT and TPOT targets halved
    python -m eval.studies.scoreboard --search              only the opponents' searches; the test windows stay unseen
    python -m eval.studies.scoreboard --screen              which rules come furthest with a short search each
    python -m eval.studies.scoreboard --all-rules           every rule instead of the strongest of the screening
    python -m eval.studies.scoreboard --read                the tables again from finished results, nothing is simulated

Each opponent is searched with as many simulated requests as the checkpoint's whole training took
(``train.search.tune``, so on the training split, ranked on validation windows), with the levers that the learned policy
has: arrangement, queue order, chunks, SM shares. Then all meet the same test windows. ``OPPONENTS`` are the two best
published rules of ``--screen`` on azure-conv, mooncake, rag-prefix and classes, of the table of all rules elsewhere
(``eval-policy --scenario all --policy all --tune 25``), and least predicted TTFT where that is as strong with these
levers; beside them stands ``static_plan``.

With scaled targets the opponents are searched anew under them; the checkpoint is the shipped one, which has never met
them. The screening is that of the unscaled targets.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.common.files import read_json, write_json
from engine.common.options import refuses
from engine.errors import SlalomError
from engine.jit.sources import ROOT
from env.measure.contender import PointSettings
from env.scenario import Scenario
from eval.compare.result import Comparison, Side
from eval.compare.session import MOST_TRIALS, Request, Watcher, contenders_of, evaluate, scaled, tune_all
from eval.studies.scoretable import TARGETS, table, told
from train.search.direct import rules_of
from train.search.levers import EVERY
from train.search.tune import best_knee, tune

CHECKPOINTS = ROOT / "checkpoints" / "policies"
OPPONENTS: dict[str, tuple[str, ...]] = {
    "azure-conv-4xa100": ("dyn_load", "splitwise", "predicted_ttft", "chunked"),
    "mooncake-pd-8xh100": ("llmd_latency", "muxwise"),
    "creation-pd-4xa100": ("llmd_latency", "chunked"),
    "tiny-4xa100": ("tropical_code", "tropical"),
    "rag-prefix-4xa100": ("sglang_cache_aware", "muxwise"),
    "azure-code-mux-4xa100": ("tropical", "dopd_code", "predicted_ttft"),
    "shift-pd-8xa100": ("lodestar", "muxwise"),
    "classes-6xa100": ("splitwise", "predicted_ttft"),
}
_SHOWN = 3  # opponents in the table of what is held
_SCREENED = 600_000  # simulated requests of a rule's search in a screening


@dataclass(frozen=True)
class Effort:
    """How much one comparison takes.

    :param share: of the equal budget that opponents get (below 1 the comparison is not equal, and says so)
    :param trials: of every opponent at most
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


def _trained_with(checkpoint: Path) -> float:
    """Requests that a checkpoint's whole training simulated, decisions of PPO included."""
    training = read_json(checkpoint / "policy.json")["training"]
    return float(training.get("search_requests", 0)) + float(training.get("frames", 0))


# -- one scenario ----------------------------------------------------------------------------------------------


def row(result: Comparison, learned: str) -> dict[str, Any]:
    """One scenario's figures: the checkpoint, its best opponent at every target, ratio with 95 % interval, and at the
    common rate what happens to waits, classes and throughput.

    :param learned: label of the checkpoint
    """
    mine = result.side(learned)
    rivals = [side for side in result.policies if side is not mine]
    found: dict[str, Any] = {"scenario": result.settings["scenario"]}
    for target in mine.goodput:
        best = _best(rivals, target)
        found[target] = {
            "learned": mine.goodput[target].rate,
            "opponent": best.label,
            "rate": best.goodput[target].rate,
            **told_ratio(result, mine, best, target),
        }
    leaders = sorted(rivals, key=lambda side: -side.goodput[TARGETS[0]].rate)[:_SHOWN]
    found["held"] = [_held(side) for side in (mine, *leaders)]
    rules = [side for side in rivals if not side.cluster]
    opponent = _best(rivals, TARGETS[0])
    for key, rate in (("at_rate", result.at_rate), ("second_rate", result.second_rate)):
        if rate:
            found[key] = {
                "rate": rate,
                "learned": _standing(mine, rate),
                "opponent": _standing(opponent, rate),
                "rule": _standing(_best(rules, TARGETS[0]), rate) if rules else None,
            }
    return found


def told_ratio(result: Comparison, ours: Side, theirs: Side, target: str) -> dict[str, float | None]:
    """``ratio`` of ours to theirs (None where the rival holds the target at no rate), ``low``, ``high`` (no bound)."""
    found = result.ratio(ours, theirs, float(target))
    return {"ratio": found.value, "low": found.low, "high": found.high}


def _held(side: Side) -> dict[str, Any]:
    """What a policy sustains at each target, its classic goodput and limit, and who fares worst at its rate."""
    first, classic = side.goodput[TARGETS[0]], side.classic_goodput.get(TARGETS[0])
    return {
        "label": side.label,
        **{target: side.goodput[target].rate for target in TARGETS},
        "classic": classic and classic.rate,
        "limit": side.sustained.get("stability_limit"),
        "at": first.at,
        "ends_by": first.fails_above.split(";")[0],
    }


def _best(sides: Sequence[Side], target: str) -> Side:
    return max(sides, key=lambda side: side.goodput[target].rate)


def _standing(side: Side, rate: float) -> dict[str, Any]:
    """What a policy does at ``rate``: its worst class, its longest wait, finished requests per second."""
    point = min(side.points, key=lambda p: abs(p["rate"] - rate))
    classes = {name: c["slo_attainment"] for name, c in point["slo_attainment_by_class"].items()}
    worst = min(classes, key=lambda name: classes[name])
    finished = [run["request_throughput"] for run in point["runs"]]
    return {
        "label": side.label,
        "attainment": point["slo_attainment"],
        "worst_class": worst,
        "worst_class_attainment": classes[worst],
        "by_class": classes,
        "worst_wait_s": point["worst_wait_s"],
        "finished_per_s": sum(finished) / len(finished),
    }


def score(name: str, out: Path, effort: Effort) -> dict[str, Any]:
    """Tune, compare, note; read back where this was done before.

    :raises SlalomError: targets that no reference rule meets at any rate
    """
    request, watcher = _request(name, out, effort)
    result = evaluate(request, watcher)
    write_json(out / _folder(name, effort.slo_scale) / "result.json", result.to_json())
    return row(result, name) | _budget(result, name)


def search(name: str, out: Path, effort: Effort) -> None:
    """Only the opponents' searches, kept for :func:`score`.

    :raises SlalomError: as :func:`score`
    """
    request, watcher = _request(name, out, effort)
    tune_all(request, contenders_of(request, watcher), watcher)


def screen(name: str, requests: float = _SCREENED) -> list[tuple[str, float, dict[str, Any]]]:
    """How far every published rule of a scenario comes on the training split with a short search over all levers.

    :return: (rule, knee in requests per second, its levers), furthest first
    """
    scenario = Scenario.load(name)
    settings = PointSettings(n_requests=scenario.n_requests)
    knee = best_knee(scenario, settings)
    found = []
    for rule in rules_of(scenario):
        best = tune(
            rule, scenario, MOST_TRIALS, knee=knee, levers=EVERY, requests=requests, settings=settings, prune=True
        )
        found.append((rule, best.rates[2], dict(best.levers)))
        print(f"{name}: {rule} {best.rates[2]:.2f}/s, {best.levers}", file=sys.stderr, flush=True)
    return sorted(found, key=lambda entry: -entry[1])


def _request(name: str, out: Path, effort: Effort) -> tuple[Request, Lines]:
    checkpoint = CHECKPOINTS / name
    scenario = scaled(Scenario.load(name), effort.slo_scale)
    settings = PointSettings(n_requests=scenario.n_requests, split=effort.split)
    rivals = ("all",) if effort.all_rules else (*OPPONENTS[name], "static_plan")
    folder = out / _folder(name, effort.slo_scale)
    request = Request(
        scenario, (*rivals, str(checkpoint)), None, effort.seeds, settings, effort.trials or MOST_TRIALS, effort.jobs,
        folder, slo_scale=effort.slo_scale, prune=True, sustained=True,
        tune_requests=effort.share * _trained_with(checkpoint), only_tuned=True,
    )  # fmt: skip
    return request, Lines(folder.name)


def _budget(result: Comparison, name: str) -> dict[str, Any]:
    """Simulated requests of the rules' searches, as a share of the checkpoint's; a static plan's ends when it knows no
    further arrangement."""
    settings = result.settings
    rules = [entry for entry in settings["tuning"] if "cluster" not in entry]
    spent = min((int(entry["simulated_requests"]) for entry in rules), default=0)
    facts = {
        "requests": spent,
        "share": round(spent / _trained_with(CHECKPOINTS / name), 3),
        "split": settings["split"],
    }
    return facts | {"slo_scale": settings["slo_scale"]}


def _folder(name: str, slo_scale: float) -> str:
    return name if slo_scale == 1.0 else f"{name}-slo{slo_scale:g}"


def _read(name: str, out: Path, slo_scale: float) -> dict[str, Any]:
    result = Comparison.from_json(read_json(out / _folder(name, slo_scale) / "result.json"))
    return row(result, name) | _budget(result, name)


@refuses("scoreboard")
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
    parser.add_argument("--screen", action="store_true", help="only find out which rules come furthest")
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
            if options.screen:
                print("\n".join(f"{name} {rule} {knee:.2f} {levers}" for rule, knee, levers in screen(name)))
                continue
            if options.search:
                search(name, options.out, effort)
                continue
            rows.append(score(name, options.out, effort))
        except SlalomError as error:  # the others have their comparison all the same
            refused[name] = str(error)
    if rows:
        write_json(options.out / f"{_folder('scoreboard', effort.slo_scale)}.json", rows)
        print(table(rows))
        print(f"\n{told(rows)}")
    for name, reason in refused.items():
        print(f"Left out, {name}: {reason}")
    return 0 if rows or ((options.search or options.screen) and not refused) else 2


if __name__ == "__main__":
    sys.exit(main())
