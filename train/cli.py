"""``train-policy``: learn a policy for a scenario.

Heavy imports wait until the options are known to be good.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from engine.common.options import command_app, only, option, run_command, takes
from engine.errors import SlalomError

app = command_app()
_BUDGET, _CONTROLLER_BUDGET = "2m", "15m"


@dataclass(frozen=True)
class Options:
    """What is learned, how and for how long."""

    scenario: str = option("azure-conv-4xa100", "name of a shipped scenario, or a YAML file")
    env: str = option("surrogate", "where to practise: surrogate, or gpu: the real engine (needs --init)")
    init: Path | None = option(None, "checkpoint folder that ppo goes on from; with --env gpu on the engine")
    algo: str = option(
        "auto",
        "direct: rules, arrangements and scores; search: one rule; controller: when to change roles; ppo: a network on "
        "top of a direct search, or from --init; auto: controller where roles may follow a drift of hours, else direct",
    )
    rule: str = option("auto", "only this rule: searched (--algo search), or what ppo starts from; auto: all of them")
    budget: str = option(
        "auto",
        "wall time (90s, 2m, 1h), or simulated requests (of ppo: decisions) (500k, 2M); auto: 2m, a controller 15m",
    )
    seed: int = option(0, "seed of everything random", min=0)
    out: Path | None = option(None, "run folder; default runs/SCENARIO-ALGO-SEED")
    resume: bool = option(False, "go on with the run in --out", "--resume")
    config: Path | None = option(None, "YAML file with hyper-parameters, see train/config.py")
    ray: str | None = option(
        None, "search and ppo: spread trials and rollouts over a Ray cluster: auto (else started here) or HOST:PORT"
    )
    storage: str | None = option(
        None, "where the search of one rule keeps its trials: a journal file or postgresql://...; default in OUT"
    )
    accept_poor_fit: bool = option(
        False, "train also on a latency profile with a held-out error above 10 %", "--accept-poor-fit"
    )
    recipe: str | None = option(None, "train a shipped checkpoint again: says scenario, learner, budget and seed")
    as_json: bool = option(False, "print the result as JSON on stdout", "--json")


@app.command()
@takes(Options)
def train_policy(options: Options) -> None:
    """Learn a policy for a scenario on the simulator, and keep the best as a checkpoint in OUT/best.

    \b
    Examples:
      train-policy --scenario azure-conv-4xa100 --budget 3m --out runs/mine
      train-policy --scenario azure-conv-4xa100 --budget 3m --out runs/mine --resume
    """
    if options.env not in ("surrogate", "gpu"):
        raise SlalomError("--env", options.env, "use surrogate or gpu")
    result = _tuned(options) if options.env == "gpu" else _learned(options)
    if options.as_json:
        print(json.dumps(result, indent=1))
    elif options.env == "gpu":
        print(result["text"])


def _tuned(options: Options) -> dict[str, Any]:
    """``--env gpu``: a checkpoint fine-tuned on the engine."""
    from train.budget import parse_budget
    from train.ppo.finetune import finetune

    if options.init is None:
        raise SlalomError("--init", options.init, "name the checkpoint that is to be fine-tuned on the engine")
    used = ("env", "init", "algo", "scenario", "budget", "seed", "out", "accept_poor_fit", "as_json")
    only(options, used, "it does nothing with --env gpu; leave it out")
    if options.algo not in ("auto", "ppo"):
        raise SlalomError("--algo", options.algo, "with --env gpu only ppo learns")
    budget = parse_budget(_BUDGET if options.budget == "auto" else options.budget)
    if budget.frames is not None:
        raise SlalomError("--budget", options.budget, "the engine takes real time; write a time (90s, 2m, 1h)")
    _check_fits(options)
    return finetune(options.scenario, options.init, budget.seconds, seed=options.seed, out=options.out)


def _check_fits(o: Options) -> None:
    """:raises SlalomError: a latency profile of the scenario is a poor fit, and nobody said that this is known"""
    from env.scenario import Scenario

    poor = [] if o.accept_poor_fit else Scenario.load(o.scenario).poor_fits()
    if poor:
        fix = "calibrate on a quiet machine, or say --accept-poor-fit"
        raise SlalomError("--scenario", f"{o.scenario}: {poor[0]}", fix)


def _learned(o: Options) -> dict[str, Any]:
    """Learning on the surrogate, as the options or the recipe say."""
    from train.budget import parse_budget

    overrides: dict[str, object] = {}
    also: tuple[str, ...] = ()
    if o.recipe is not None:
        from train.recipe import load_recipe

        used = ("recipe", "out", "resume", "ray", "storage", "accept_poor_fit", "as_json")
        only(o, used, "a recipe says all of that, and trains from nothing; leave one of the two out")
        found = load_recipe(o.recipe)
        also, overrides = found.also, found.config
        o = replace(
            o, scenario=found.scenario, algo=found.algorithm, rule=found.rule, budget=found.budget, seed=found.seed,
            out=o.out or Path("runs") / Path(o.recipe).stem,
        )  # fmt: skip
    if o.algo not in ("auto", "controller", "ppo", "direct", "search") and o.recipe is None:
        raise SlalomError("--algo", o.algo, "choose auto, controller, direct, ppo or search")
    if o.algo == "controller" and o.rule != "auto" and o.recipe is None:
        raise SlalomError("--rule", o.rule, "a controller is learned for the planner; leave it out")
    if o.init is not None:
        o = _going_on(o)
    o = _decided(o)
    if o.algo == "direct" and o.rule != "auto":
        raise SlalomError("--rule", o.rule, "direct searches all rules; --rule belongs to --algo search or ppo")
    rule = "linear_score" if o.algo == "search" and o.rule == "auto" else o.rule
    one_rule = rule != "auto" and o.algo in ("search", "ppo")
    if o.storage is not None and not one_rule:
        raise SlalomError("--storage", o.storage, "only the search of one rule keeps its trials there; leave it out")
    if o.ray is not None and o.algo not in ("search", "ppo"):
        raise SlalomError("--ray", o.ray, f"{o.algo} runs on this machine alone; leave it out, or use search or ppo")
    spent = parse_budget(o.budget)
    _check_fits(o)

    from train.run import Interrupted, Request, run

    asked = Request(
        o.scenario, o.algo, rule, spent, o.seed, o.out, o.resume, o.config, o.ray, o.storage, overrides, also, o.init
    )
    try:
        return run(asked)
    except Interrupted as stopped:
        print(f"train-policy: {stopped}", file=sys.stderr)
        raise typer.Exit(128 + stopped.number) from None
    except KeyboardInterrupt:  # outside learning, where each finished step is saved as it comes
        print("train-policy: stopped; go on with --resume", file=sys.stderr)
        raise typer.Exit(130) from None


def _going_on(o: Options) -> Options:
    """With ``--init``: PPO, from that checkpoint and nothing else.

    :raises SlalomError: something else is named to learn from
    """
    if o.algo not in ("auto", "ppo"):
        raise SlalomError("--algo", o.algo, "with --init only ppo goes on from a checkpoint")
    if o.rule != "auto":
        raise SlalomError("--rule", o.rule, "with --init the checkpoint is what ppo starts from; leave it out")
    return replace(o, algo="ppo")


def _decided(o: Options) -> Options:
    """With ``auto`` replaced: a controller where roles may follow a drift of hours, and the budget that takes.

    PPO is left out: no gain over the direct search has been measured.
    """
    algo, budget = o.algo, o.budget
    if algo == "auto":
        from env.scenario import Scenario
        from train.control.days import drifts

        if o.rule != "auto":
            algo = "search"
        else:
            algo = "controller" if drifts(Scenario.load(o.scenario)) else "direct"
    if budget == "auto":
        budget = _CONTROLLER_BUDGET if algo == "controller" else _BUDGET
    return replace(o, algo=algo, budget=budget)


def main() -> None:
    """Entry point."""
    run_command("train-policy", app)


if __name__ == "__main__":
    main()
