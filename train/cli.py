"""``train-policy``: learn a policy for a scenario.

Heavy imports wait until the options are known to be good.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from engine.errors import SlalomError

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train_policy(
    scenario: Annotated[str, typer.Option(help="name of a shipped scenario, or a YAML file")] = "azure-conv-4xa100",
    env: Annotated[
        str, typer.Option(help="where to practise: surrogate, or gpu: the real engine (needs --init)")
    ] = "surrogate",
    init: Annotated[
        Path | None, typer.Option(help="checkpoint folder to go on from (with --env gpu: fine-tune it)")
    ] = None,
    algo: Annotated[
        str, typer.Option(help="ppo: a network on top of a direct search; direct: that search alone; search: one rule")
    ] = "ppo",
    rule: Annotated[
        str, typer.Option(help="only this rule: searched (--algo search), or what ppo starts from; auto: all of them")
    ] = "auto",
    budget: Annotated[str, typer.Option(help="wall time (90s, 2m, 1h) or frames (500k, 2M)")] = "2m",
    seed: Annotated[int, typer.Option(min=0, help="of everything random")] = 0,
    out: Annotated[Path | None, typer.Option(help="run folder; default runs/SCENARIO-ALGO-SEED")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    config: Annotated[Path | None, typer.Option(help="YAML with hyper-parameters")] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="spread rollouts and trials over a Ray cluster: auto (else started here) or HOST:PORT"),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="where the search keeps its trials: a journal file or postgresql://...; default in OUT"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="train a shipped checkpoint again: sets all of the above but --out"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")] = False,
) -> None:
    """Learn a dispatch policy and keep the best as a deployable checkpoint in OUT/best."""
    from train.budget import parse_budget

    if env not in ("surrogate", "gpu"):
        raise SlalomError("--env", env, "use surrogate or gpu")
    if env == "gpu":
        from train.ppo.finetune import finetune

        if init is None:
            raise SlalomError("--init", init, "name the checkpoint that is to be fine-tuned on the engine")
        tuned = finetune(scenario, init, parse_budget(budget).seconds, seed=seed, out=out)
        print(json.dumps(tuned, indent=1) if as_json else tuned["text"])
        return
    if init is not None:
        raise SlalomError("--init", str(init), "give it together with --env gpu")
    overrides: dict[str, object] = {}
    also: tuple[str, ...] = ()
    if recipe is not None:
        from train.recipe import load_recipe

        found = load_recipe(recipe)
        scenario, algo, rule, budget, seed = found.scenario, found.algorithm, found.rule, found.budget, found.seed
        also, overrides, out = found.also, found.config, out or Path("runs") / Path(recipe).stem
    if algo not in ("ppo", "direct", "search") and recipe is None:
        raise SlalomError("--algo", algo, "choose ppo, direct or search")
    if algo == "direct" and rule != "auto":
        raise SlalomError("--rule", rule, "direct searches all rules; --rule belongs to --algo search or ppo")
    if algo == "search" and rule == "auto":
        rule = "linear_score"
    spent = parse_budget(budget)

    from train.run import Interrupted, Request, run

    try:
        result = run(Request(scenario, algo, rule, spent, seed, out, resume, config, ray, storage, overrides, also))
    except Interrupted as stopped:
        print(f"train-policy: {stopped}", file=sys.stderr)
        raise typer.Exit(128 + stopped.number) from None
    except KeyboardInterrupt:  # outside learning, where each finished step is saved as it comes
        print("train-policy: stopped; go on with --resume", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(result, indent=1))


def main() -> None:
    """Entry point: a mistake of the user becomes one line on standard error and exit code 2."""
    try:
        app()
    except SlalomError as error:
        print(f"train-policy: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
