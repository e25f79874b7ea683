"""``python -m eval.samplers``: Optuna's samplers, with and without pruning, by what they find.

Every sampler searches the continuous parameters of one rule with the same number of trials, the same arrivals and
several seeds; the settings found are scored on fresh windows of the ``valid`` split. Prints one row per sampler and
scenario. ``auto`` in ``train.search.record`` follows from this table.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any

import numpy as np
import typer

from engine.errors import SlalomError
from env.measure.contender import PointSettings
from env.scenario import Scenario
from train.search.record import SAMPLERS
from train.search.tune import KNEE, knee_rate, tune

__all__ = ["app", "compare_samplers", "main"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_CONTINUOUS = "linear_score:layout=scenario,prefill_fraction=0.5,chunk_tokens=2048"


def compare_samplers(
    scenario: str, rule: str, samplers: list[str], *, trials: int, repeats: int, requests: int
) -> list[dict[str, Any]]:
    """One row per sampler, without and with pruning: mean and spread of the score over ``repeats`` seeds.

    :param rule: ``name:param=value``; what is not given is searched
    :raises SlalomError: unknown scenario, rule or sampler
    """
    chosen = Scenario.load(scenario)
    settings = PointSettings(n_requests=requests)
    knee = knee_rate(chosen, settings, policy=rule, start=chosen.reference_rate)  # where its settings differ
    rates = tuple(factor * knee for factor in KNEE)
    rows = []
    for sampler in samplers:
        for prune in (False, True):
            found, seconds = [], []
            for seed in range(repeats):
                begin = time.perf_counter()
                found.append(
                    tune(rule, chosen, trials, rates=rates, settings=settings, seed=seed, sampler=sampler, prune=prune)
                )
                seconds.append(time.perf_counter() - begin)
                print(f"{scenario} {sampler} prune={prune} seed {seed}: {found[-1].score:.4f}", file=sys.stderr)
            scores = np.array([result.score for result in found])
            rows.append(
                {
                    "scenario": scenario,
                    "sampler": sampler,
                    "prune": prune,
                    "score": float(scores.mean()),
                    "worst": float(scores.min()),
                    "spread": float(scores.std(ddof=1)) if repeats > 1 else None,
                    "default": found[0].default,
                    "requests": float(np.mean([result.simulated_requests for result in found])),
                    "pruned_share": float(np.mean([result.pruned / max(result.trials, 1) for result in found])),
                    "seconds": float(np.mean(seconds)),
                    "trials": trials,
                    "repeats": repeats,
                }
            )
    return rows


@app.command()
def samplers(
    scenario: Annotated[list[str], typer.Option(help="Scenario; repeat for more.")],
    rule: Annotated[str, typer.Option(help="Rule whose open parameters are searched.")] = _CONTINUOUS,
    sampler: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SAMPLERS)}; repeat.")] = None,
    trials: Annotated[int, typer.Option(min=4, help="Trials of one search.")] = 80,
    repeats: Annotated[int, typer.Option(min=1, help="Searches with other seeds.")] = 3,
    requests: Annotated[int, typer.Option(min=20, help="Requests of one simulation.")] = 2000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare samplers on the same search."""
    rows = []
    for name in scenario:
        chosen = sampler or ["random", "tpe", "cma", "gp"]
        rows += compare_samplers(name, rule, chosen, trials=trials, repeats=repeats, requests=requests)
    if as_json:
        print(json.dumps(rows))
        return
    print("| scenario | sampler | pruning | attainment [%] | worst seed | requests [M] | seconds |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        pruning = f"{100 * row['pruned_share']:.0f} % of trials" if row["prune"] else "off"
        print(
            f"| {row['scenario']} | {row['sampler']} | {pruning} | {100 * row['score']:.2f} | "
            f"{100 * row['worst']:.2f} | {row['requests'] / 1e6:.2f} | {row['seconds']:.1f} |"
        )


def main() -> None:
    """Entry point: :class:`SlalomError` becomes one line on standard error and exit code 2."""
    try:
        app()
    except SlalomError as error:
        print(f"samplers: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
