"""``python -m train.seeds``: the same training with several seeds, and the curve of what it reached when.

Trains every (scenario, seed) one after the other, resumes what was interrupted, and draws the gain over the best
published rule that the same search tuned, over wall seconds of training: interquartile mean over all runs with a
95 % interval, runs resampled within each scenario (stratified bootstrap, Agarwal et al. 2021). A run's gain at a time
is that of the best policy it had by then: from the end of the search its own final ranking, later that plus the gain
of the best snapshot over it on the windows watched during training (both on split ``valid``).
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from engine.errors import SlalomError
from eval.stats import stratified_iqm
from eval.store import write_bytes, write_json

__all__ = ["Curve", "app", "main", "read_curve", "summarise"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_GRID = 80


@dataclass(frozen=True)
class Curve:
    """Gain of one run over the best tuned rule, attainment 0 to 1; a step function of wall seconds."""

    scenario: str
    seed: int
    seconds: tuple[float, ...]
    gain: tuple[float, ...]

    def at(self, time: float) -> float:
        """The best gain so far; before the search has ended there is no policy, and nothing gained."""
        known = [gain for second, gain in zip(self.seconds, self.gain, strict=True) if second <= time]
        return max(known, default=0.0)

    @property
    def passed_s(self) -> float | None:
        """When it first had a policy better than the best tuned rule."""
        times = [second for second, gain in zip(self.seconds, self.gain, strict=True) if gain > 0.0]
        return min(times, default=None)


def read_curve(folder: Path, scenario: str, seed: int) -> Curve:
    """The curve of a run from its ``log.jsonl``.

    :raises SlalomError: no finished search there
    """
    try:
        events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        base = next(event for event in events if event["event"] == "base")
    except (OSError, ValueError, StopIteration) as error:
        raise SlalomError("run folder", str(folder), "it holds no training that got past its search") from error
    start, first = float(base["seconds"]), float(base["score"]) - float(base["default_score"])
    seconds, gains = [start], [first]
    for event in events:
        if event["event"] == "evaluation":
            seconds.append(start + float(event["trained_s"]))
            gains.append(first + float(event["score"]) - float(event["base"]))
    return Curve(scenario, seed, tuple(seconds), tuple(gains))


def summarise(curves: Sequence[Curve]) -> dict[str, Any]:
    """Interquartile mean and interval over a grid of times, and when each run passed the best tuned rule."""
    names = list(dict.fromkeys(curve.scenario for curve in curves))
    grid = np.linspace(0.0, max(max(curve.seconds) for curve in curves), _GRID)
    found = [stratified_iqm([[c.at(float(t)) for c in curves if c.scenario == name] for name in names]) for t in grid]
    passed = [curve.passed_s for curve in curves]
    known = [time for time in passed if time is not None]
    return {
        "scenarios": names,
        "runs": [curve.__dict__ | {"passed_s": curve.passed_s} for curve in curves],
        "seconds": grid.tolist(),
        "gain_iqm": [value for value, _, _ in found],
        "low": [low for _, low, _ in found],
        "high": [high for _, _, high in found],
        "passed": len(known),
        "median_time_to_pass_s": float(np.median(known)) if 2 * len(known) > len(passed) else None,
    }


def _draw(summary: dict[str, Any]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    axis = figure.add_subplot()
    axis.grid(True, alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    for run in summary["runs"]:
        best = np.maximum.accumulate(run["gain"])
        axis.step(run["seconds"], 100 * best, where="post", color="#999999", linewidth=0.8, alpha=0.7)
    seconds, low, high = (np.array(summary[key]) for key in ("seconds", "low", "high"))
    iqm = 100 * np.array(summary["gain_iqm"])
    axis.plot(seconds, iqm, color="#0072B2", linewidth=2, label="interquartile mean")
    axis.fill_between(seconds, 100 * low, 100 * high, color="#0072B2", alpha=0.2, linewidth=0, label="95 % interval")
    axis.axhline(0.0, color="#333333", linewidth=1)
    axis.set(
        xlabel="wall seconds of search and training", ylabel="gain over the best tuned rule\n[points of attainment]"
    )
    axis.legend(frameon=False, fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def _train(scenario: str, seed: int, budget: str, algo: str, config: Path | None, folder: Path) -> None:
    """One run, or the rest of it."""
    from train.budget import parse_budget
    from train.run import Request, run

    if (folder / "result.json").exists():
        return
    resume = (folder / "run.json").exists()
    run(Request(scenario, algo, "auto", parse_budget(budget), seed, folder, resume, config))


@app.command()
def seeds(
    out: Annotated[Path, typer.Option(help="Folder of all runs, curve.json and curve.png.")],
    scenario: Annotated[list[str] | None, typer.Option(help="Scenario; repeat for more.")] = None,
    runs: Annotated[int, typer.Option("--seeds", min=1, help="Trainings of each scenario, seeds 0 upwards.")] = 5,
    budget: Annotated[str, typer.Option(help="Of each training, as for train-policy.")] = "2m",
    algo: Annotated[str, typer.Option(help="ppo or direct, as for train-policy.")] = "ppo",
    config: Annotated[Path | None, typer.Option(help="YAML with hyper-parameters.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Train with several seeds and draw the interquartile mean of the gain over time; run again to resume."""
    if algo not in ("ppo", "direct"):
        raise SlalomError("--algo", algo, "choose ppo or direct")
    curves = []
    for name in scenario or ["azure-conv-4xa100"]:
        for seed in range(runs):
            folder = out / f"{Path(name).stem}-{seed}"
            _train(name, seed, budget, algo, config, folder)
            curves.append(read_curve(folder, name, seed))
    summary = summarise(curves)
    write_json(out / "curve.json", summary)
    write_bytes(out / "curve.png", _draw(summary))
    if as_json:
        print(json.dumps(summary))
        return
    time = summary["median_time_to_pass_s"]
    told = f"{time:.1f} s (median)" if time is not None else "never, for most"
    print(f"passed the best tuned rule: {summary['passed']} of {len(curves)} runs; time to pass: {told}")
    last = [100 * summary[key][-1] for key in ("gain_iqm", "low", "high")]
    print(f"gain at the end: {last[0]:+.2f} points of attainment (95 % interval {last[1]:+.2f} to {last[2]:+.2f})")


def main() -> None:
    """Entry point: :class:`SlalomError` becomes one line on standard error and exit code 2."""
    try:
        app()
    except SlalomError as error:
        print(f"seeds: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
