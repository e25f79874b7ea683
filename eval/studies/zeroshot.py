"""A checkpoint on clusters it was not trained on, beside policies trained there.

    python -m eval.studies.zeroshot                                    instances 2, 8, 16, 64 and two other profiles
    python -m eval.studies.zeroshot --instances 8 --profiles "" --budget 60s --out runs/zeroshot
    python -m eval.studies.zeroshot --checkpoint runs/mine/best --scenario shift-pd-8xa100

Every *variant* is the scenario with another number of instances (groups and rates in proportion) or another latency
profile. On each, the checkpoint runs as it is. Beside it stand a *native* policy, which ``--algo direct`` trained on
that very variant within ``--budget``, and rules tuned there with ``--share`` of the native's simulated requests. All
meet the same test windows; runs grow with the cluster, so that arrivals last as long on 64 instances as on 4.

A native policy that a tuned rule beats was trained too briefly to be a yardstick; the table marks it. The generalist
has met azure-conv-4xa100 on 2, 4 and 12 instances in its training; a specialist has met one size and one profile.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine.common.files import write_json, write_text
from engine.common.options import listed, refuses
from engine.errors import SlalomError, no_such
from env.measure.contender import PointSettings
from env.scenario import Scenario
from eval.compare.result import Comparison
from eval.compare.session import Request, evaluate, label_of
from eval.studies.scoreboard import CHECKPOINTS, MOST_TRIALS, OPPONENTS, Lines, told_ratio

#: Share of the native policy's goodput that a checkpoint should keep.
BAR = 0.95
_TARGET = "0.9"
_LONGEST_SEARCH = 10_000  # requests of one simulation of the native's search
_RULES = ("linear_score", "predicted_ttft")  # where a scenario has no screening


@dataclass(frozen=True)
class Effort:
    """How much one variant takes.

    :param budget: of the native training, as for ``train-policy``
    :param share: of the native's simulated requests, for the tuning of each rule
    :param seeds: windows per rate
    :param requests: of one run; None: the scenario's, times the growth of the cluster
    """

    budget: str = "60s"
    share: float = 0.25
    seeds: int = 3
    requests: int | None = None
    split: Literal["valid", "test"] = "test"
    jobs: int = 1


def variant(scenario: Scenario, instances: int | None = None, profile: str | None = None) -> Scenario:
    """The scenario with ``instances`` instances, or with every instance on ``profile``, or both.

    Groups keep their shares as nearly as whole numbers allow, each at least one instance; rates and requests of a run
    follow the number of instances.

    :raises SlalomError: fewer instances than groups, groups that share a GPU, or a profile that does not fit
    """
    groups = [group.model_dump(mode="json") for group in scenario.cluster]
    counts = np.array([group["count"] for group in groups])
    before, name = int(counts.sum()), scenario.name
    growth = 1.0
    if instances is not None and instances != before:
        if instances < len(groups):
            raise SlalomError(
                "instances", instances, f"{scenario.name} has {len(groups)} groups; give at least one each"
            )
        if any(group["share_gpu"] for group in groups):
            raise SlalomError("instances", instances, f"those of {scenario.name} share GPUs: fixed")
        growth = instances / before
        for group, count in zip(groups, _apportioned(counts, instances), strict=True):
            group["count"] = int(count)
        name += f"-x{instances}"
    if profile is not None:
        for group in groups:
            group |= {"profile": None, "gpus_per_instance": None, "kv_tokens": None}
        name += f"-{Path(profile).stem}"
    rates = {"low": scenario.rates.low * growth / 16, "high": scenario.rates.high * growth * 16}  # only a bracket
    return scenario.with_overrides(
        {
            "name": name,
            "cluster": groups,
            "profile": profile or scenario.profile,
            "rates": rates,
            "reference_rate": scenario.reference_rate * growth,
            "n_requests": max(scenario.n_requests, round(scenario.n_requests * growth)),
        }
    )


def _apportioned(counts: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to ``counts`` that add up to ``total``, none below 1 (largest remainders)."""
    exact = counts / counts.sum() * total
    found = np.maximum(np.floor(exact), 1).astype(int)
    while found.sum() != total:
        step = 1 if found.sum() < total else -1
        movable = (found > 1) | (step > 0)
        gap = np.where(movable, step * (exact - found), -np.inf)
        found[int(gap.argmax())] += step
    return found


def native(scenario: Scenario, folder: Path, effort: Effort) -> dict[str, Any]:
    """Train on the variant from nothing (or read the finished training back); its ``result.json``.

    :raises SlalomError: the folder holds a training with another budget
    """
    from train.budget import parse_budget
    from train.config import load_config
    from train.run import Request as Training
    from train.run import run_or_read

    path = folder / "scenario.yaml"
    write_text(path, scenario.to_yaml())
    size = min(max(scenario.n_requests, 2000), _LONGEST_SEARCH)
    # a simulation of a larger cluster costs more: fewer designs are drawn, so that time is left to refine the best
    designs = max(round(load_config(None, scenario.name).designs * 2000 / size), 30)
    sizes = {"eval_requests": max(scenario.n_requests, 5000), "direct_size": size, "designs": designs}
    asked = Training(
        str(path), "direct", "auto", parse_budget(effort.budget), out=folder / "native", overrides=sizes
    )  # fmt: skip
    return run_or_read(asked)


def zeroshot(
    scenario: Scenario, checkpoints: Sequence[Path], rules: Sequence[str], folder: Path, effort: Effort
) -> list[dict[str, Any]]:
    """Train the native policy, tune the rules, compare; one row per checkpoint."""
    watcher = Lines(scenario.name)
    watcher.phase(f"train the native policy ({effort.budget})", None)
    trained = native(scenario, folder, effort)
    requests = int(trained["base"]["requests"])
    settings = PointSettings(n_requests=effort.requests or scenario.n_requests, split=effort.split)
    policies = (*(str(path) for path in checkpoints), str(folder / "native" / "best"), *rules)
    request = Request(
        scenario, policies, None, effort.seeds, settings, MOST_TRIALS, effort.jobs, folder,
        targets=(float(_TARGET),), prune=True, sustained=True,
        tune_requests=effort.share * requests, only_tuned=True,
    )  # fmt: skip
    result = evaluate(request, watcher)
    write_json(folder / "result.json", result.to_json())
    facts = {
        "budget": effort.budget,
        "native_requests": requests,
        "native_seconds": trained["base"]["seconds"],
        "share": effort.share,
        "split": effort.split,
    }
    return [row | facts for row in rows_of(result, [label_of(str(path)) for path in checkpoints])]


def rows_of(result: Comparison, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Every checkpoint's goodput beside that of ``native`` and of the best rule.

    :param labels: of the checkpoints
    """
    twin = result.side("native")
    rules = [side for side in result.policies if side.label not in (*labels, "native")]
    rule = max(rules, key=lambda side: side.goodput[_TARGET].rate)
    return [
        {
            "variant": result.settings["scenario"],
            "checkpoint": mine.label,
            "zero_shot": mine.goodput[_TARGET].rate,
            "native": twin.goodput[_TARGET].rate,
            "to_native": told_ratio(result, mine, twin, _TARGET),
            "rule": rule.label,
            "rule_rate": rule.goodput[_TARGET].rate,
            "to_rule": told_ratio(result, mine, rule, _TARGET),
        }
        for mine in map(result.side, labels)
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, and how often the bar is met; a native policy below the best rule is marked."""
    lines = [
        "| variant | checkpoint | zero-shot, req/s | native | ratio | 95 % interval | best rule | its req/s | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        at, mark = row["to_native"], " *" if row["native"] < row["rule_rate"] else ""
        lines.append(
            f"| {row['variant']} | {row['checkpoint']} | {row['zero_shot']:.2f} | {row['native']:.2f}{mark} "
            f"| {_figure(at['ratio'])} | {_figure(at['low'])} to {_figure(at['high'])} "
            f"| {row['rule']} | {row['rule_rate']:.2f} | {_figure(row['to_rule']['ratio'])} |"
        )
    lines.append("")
    for label in dict.fromkeys(row["checkpoint"] for row in rows):
        lines.append(_verdict(label, [row for row in rows if row["checkpoint"] == label]))
    if any(row["native"] < row["rule_rate"] for row in rows):
        lines.append("* a tuned rule beats this native policy: it was trained too briefly to be a yardstick.")
    return "\n".join(lines)


def _verdict(label: str, rows: Sequence[dict[str, Any]]) -> str:
    met = [row for row in rows if (row["to_native"]["ratio"] or 0.0) >= BAR]
    sure = [row for row in met if (row["to_native"]["low"] or 0.0) >= BAR]
    also = [row for row in met if (row["to_rule"]["ratio"] or 0.0) >= BAR]
    return (
        f"{label}: at least {BAR:.2f} of the native policy's goodput on {len(met)} of {len(rows)} variants, the whole "
        f"interval above it on {len(sure)}; of the best tuned rule's as well on {len(also)}."
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _variants(scenario: Scenario, instances: str, profiles: str) -> list[Scenario]:
    """What the command line asks for, every variant once."""
    found = []
    for text in listed(instances):
        if not text.isdigit() or not 1 <= int(text) <= 1024:
            raise SlalomError("--instances", text, "write whole numbers with commas, e.g. 2,8,16")
        found.append(variant(scenario, instances=int(text)))
    found += [variant(scenario, profile=text) for text in listed(profiles)]
    if not found:
        raise SlalomError("--instances", instances, "name at least one number of instances or one profile")
    return list({each.name: each for each in found}.values())


def _checkpoint(text: str) -> Path:
    for path in (Path(text), CHECKPOINTS / text):
        if (path / "policy.json").is_file():
            return path
    known = sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir())
    raise no_such("--checkpoint", text, known, "a checkpoint folder")


@refuses("zeroshot")
def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 2 on bad input."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m eval.studies.zeroshot", description=about)
    parser.add_argument("--checkpoint", action="append", help="shipped name or folder; repeat for more")
    parser.add_argument("--scenario", default="azure-conv-4xa100", help="what the variants are made of")
    parser.add_argument("--instances", default="2,8,16,64")
    parser.add_argument("--profiles", default="llama-8b-h100,llama-70b-a100-tp8", help="another GPU, another model")
    parser.add_argument("--budget", default=Effort.budget, help="of each native training: 60s, 2m, 5M requests")
    parser.add_argument("--share", type=float, default=Effort.share, help="of the native's requests, per tuned rule")
    parser.add_argument("--rule", action="append", help="tuned on every variant; default: the best two of a screening")
    parser.add_argument("--seeds", type=int, default=Effort.seeds, help="windows per rate")
    parser.add_argument("--requests", type=int, help="of one run")
    parser.add_argument("--split", choices=("valid", "test"), default="test", help="windows of the comparison")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/zeroshot"))
    options = parser.parse_args(arguments)
    effort = Effort(
        options.budget, options.share, options.seeds, options.requests, options.split, options.jobs
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    scenario = Scenario.load(options.scenario)
    checkpoints = [_checkpoint(text) for text in options.checkpoint or ("generalist", "azure-conv-4xa100")]
    rules = options.rule or OPPONENTS.get(scenario.name, _RULES)[:2]
    chosen = _variants(scenario, options.instances, options.profiles)
    for each in chosen:
        try:
            rows += zeroshot(each, checkpoints, rules, options.out / each.name, effort)
        except SlalomError as error:  # a policy or rule that does not fit one variant may fit the others
            if len(chosen) == 1:
                raise
            refused[each.name] = str(error)
        write_json(options.out / "zeroshot.json", rows)
    if rows:
        print(table(rows))
        print(f"\nWindows: {effort.split}; native trainings: {effort.budget} each.")
    for name, reason in refused.items():
        print(f"Left out, {name}: {reason}")
    return 0 if rows else 2


if __name__ == "__main__":
    sys.exit(main())
