"""One training from request to checkpoint.

    base     search rules, arrangements and scores on split ``train``       -> base.json, base/, best/
    learn    PPO on top of it, snapshots judged on split ``valid``          -> snapshots/, best/
    select   base and the best snapshots again, on fresh ``valid`` windows  -> best/, result.json

``--algo direct`` stops after the first stage; so does ``--algo search``, which tunes one rule. Every stage resumes.
``--algo controller`` has its own search (``train.control.days``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.vec_env import VecEnv

from engine.common.files import read_json, write_json
from engine.common.progress import Display
from engine.common.provenance import versions
from engine.errors import SlalomError
from engine.jit import sources
from env.gym.vector_env import SlalomVecEnv
from env.measure.contender import Contender, PointSettings
from env.measure.digest import code_sha256, policy_sha256, scenario_hash
from env.measure.evaluator import measure
from env.measure.pool import RayExecutor, connect, cores
from env.scenario import Scenario
from env.surrogate.arena import arena_of
from policies import registry
from train.budget import Budget
from train.collect.workers import RayCollector
from train.config import TrainConfig, load_config
from train.control.stage import CONTROLLER, publish_controller, tune_controller
from train.export import Publisher
from train.folder import RunFolder
from train.learn import learn, monitor_seeds
from train.ppo.callbacks import Evaluation, JsonLog, replace_folder
from train.ppo.judge import SimulatorJudge
from train.ppo.selection import select
from train.ppo.start import load_network, start_from
from train.search.choose import AUTO, search_all
from train.search.direct import rules_of
from train.search.generalist import named, train_generalist
from train.search.journal import Journal
from train.search.rule import SearchResult, search_rule


class Interrupted(Exception):
    """The user asked to stop; everything is saved.

    :param number: of the signal
    """

    def __init__(self, number: int, folder: Path) -> None:
        super().__init__(f"stopped; saved in {folder}, go on with --resume")
        self.number = number


@dataclass(frozen=True)
class Request:
    """What ``train-policy`` was asked for.

    :param scenario: shipped name or YAML file
    :param algorithm: ``controller``, ``ppo``, ``direct``, ``search`` or ``generalist``
    :param rule: the searched rule, or the one PPO starts from; ``auto``: all of them, arrangements and scores
    :param out: run folder; None takes ``runs/SCENARIO-ALGORITHM-SEED``
    :param init: checkpoint that PPO goes on from, instead of a search
    :param also: further scenarios of a generalist, see :class:`train.recipe.Recipe`
    :param overrides: hyper-parameters, above those of ``config``
    :param ray: ``auto`` or the address of a Ray cluster that collects rollouts and runs trials; None: this process
    :param storage: journal file or URL of the database that keeps the search; None: ``study.journal`` in the folder
    """

    scenario: str
    algorithm: str
    rule: str
    budget: Budget
    seed: int = 0
    out: Path | None = None
    resume: bool = False
    config: Path | None = None
    ray: str | None = None
    storage: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    init: Path | None = None


def run(request: Request) -> dict[str, Any]:
    """Train, select, save; returns the summary that is also in ``result.json``.

    :raises SlalomError: bad scenario, hyper-parameters or folder; disk full
    :raises Interrupted: after Ctrl-C or SIGTERM, with everything saved
    """
    scenario = Scenario.load(request.scenario)
    if request.ray is not None:
        connect(request.ray)
    config = load_config(request.config, scenario.name, **request.overrides)
    if config.workers and request.ray is None:
        raise SlalomError("workers", config.workers, "leave it out, or let Ray's workers collect: --ray auto")
    torch.set_num_threads(config.torch_threads)
    if request.rule != AUTO:
        registry.get(request.rule).bind({}, arena_of(scenario).setting)  # it may refuse, before there is a folder
        if request.algorithm == "search" and not registry.get(request.rule).params:
            raise SlalomError("--rule", request.rule, "it has no parameter to search; name one that has")
    if request.init is not None and not request.resume:
        load_network(request.init)
    root = request.out or Path("runs") / f"{scenario.name}-{request.algorithm}-{request.seed}"
    folder = RunFolder(root)
    if request.resume:
        folder.resume(_asked(request, scenario), config)
    else:
        folder.start(_asked(request, scenario), config)
    with Display(keep=True) as display:
        return _stages(request, scenario, config, folder, display)


def run_or_read(request: Request) -> dict[str, Any]:
    """:func:`run` in ``request.out``, gone on with where it was interrupted and read back where it is finished.

    :raises SlalomError: the folder holds a run that was asked for in other words; see also :func:`run`
    """
    assert request.out is not None
    folder = RunFolder(request.out)
    if not os.path.exists(folder.request):
        return run(request)
    finished = folder.root / "result.json"
    if not finished.exists():
        return run(replace(request, resume=True))
    scenario = Scenario.load(request.scenario)
    folder.resume(_asked(request, scenario), load_config(request.config, scenario.name, **request.overrides))
    return dict(read_json(finished))


def _asked(request: Request, scenario: Scenario) -> dict[str, Any]:
    """What decides the result, beside the hyper-parameters."""
    return {
        "scenario": scenario.name,
        "scenario_sha256": scenario.hash(),
        "algorithm": request.algorithm,
        "rule": request.rule,
        "budget": str(request.budget),
        "seed": request.seed,
        "init": None if request.init is None else policy_sha256(Contender(str(request.init))),
    }


def _stages(
    request: Request, scenario: Scenario, config: TrainConfig, folder: RunFolder, display: Display
) -> dict[str, Any]:
    if request.algorithm == "generalist":
        return _generalist(request, scenario, config, folder, display)
    if request.algorithm == CONTROLLER:
        found = _searched(
            request, [scenario], config, folder, display,
            partial(tune_controller, scenario, request.budget, request.seed, folder, display),
        )  # fmt: skip
        publish_controller(found, scenario, config, request.seed, folder)
        what = f"share in the worst phase of a validation day at {found.knee:.3g} req/s"
        summary = {"checkpoint": str(folder.best), "base": asdict(found)}
        return _finish(summary, folder, display, found.score, found.default_score, what)
    log = JsonLog(folder.root / "log.jsonl")
    _warm_up(scenario, config, request.rule, display)
    base = _base(request, scenario, config, folder, display, log)
    publisher = Publisher(scenario, base, config, request.seed)
    summary = {"checkpoint": str(folder.best), "base": asdict(base)}
    if request.algorithm == "search":
        table = [{"policy": f"{base.rule} (tuned)", "score": base.score, "split": "valid"}]
        table.append({"policy": f"{base.rule} (defaults)", "score": base.default_score, "split": "valid"})
        publisher.start(folder.best, table)
        return _finish(summary, folder, display, base.score, base.default_score)
    publisher = replace(publisher, base=_published(publisher, folder.root / "base"))
    if not folder.best.exists():
        publisher.start(folder.best)  # something deployable from here on, whatever happens
    log.write("base", **asdict(base))
    if request.algorithm == "direct":
        publisher.start(folder.best, _table(base))
        what = "score on validation windows from light load to beyond the knee"
        return _finish(summary, folder, display, base.score, base.default_score, what)
    rates = tuple(load * base.knee for load in config.eval_loads)
    judge = SimulatorJudge(scenario, rates, config.eval_requests)
    try:
        evaluations, facts, number = _learn(request, scenario, config, folder, display, log, publisher, judge)
        if number:
            raise Interrupted(number, folder.root)
        chosen = select(evaluations, publisher, config, folder, judge, display)
    finally:
        judge.close()
    log.write("selected", **chosen)
    return _finish(summary | facts | chosen, folder, display, chosen["score"], chosen["base_score"])


def _generalist(
    request: Request, scenario: Scenario, config: TrainConfig, folder: RunFolder, display: Display
) -> dict[str, Any]:
    """One policy for ``scenario`` and those of ``request.also``."""
    several = [scenario, *(named(name) for name in request.also)]
    display.phase("generalist")

    def search(journal: Journal) -> SearchResult:
        design, requests, seconds = train_generalist(
            several,
            requests=request.budget.frames or 10_000_000,
            seed=request.seed,
            report=lambda phase, done, note: display.update(done, note),
            journal=journal,
        )
        return SearchResult(
            **design.facts, knee=0.0, default_score=0.0, score=0.0, trials=0, requests=requests, seconds=seconds,
            sampler="generalist", universal=True,
        )  # fmt: skip

    base = _searched(request, several, config, folder, display, search)
    Publisher(scenario, base, config, request.seed).start(folder.best)
    display.say(f"{folder.best}: one policy for {len(several)} scenarios")
    return {"checkpoint": str(folder.best), "base": asdict(base)}


def _searched(
    request: Request, scenarios: list[Scenario], config: TrainConfig, folder: RunFolder, display: Display,
    search: Callable[[Journal], SearchResult],
) -> SearchResult:  # fmt: skip
    """What ``search`` finds, from an earlier part of this run if it had come to its end there."""
    if folder.base.exists():
        return SearchResult.read(folder.base)
    journal = _journal(request, scenarios, config, folder, display)
    found = search(journal)
    write_json(folder.base, asdict(found), sealed=True)
    journal.close(done=True)
    return found


def _journal(
    request: Request, scenarios: list[Scenario], config: TrainConfig, folder: RunFolder, display: Display
) -> Journal:
    """The answers of this run's search so far, if they are this package's."""
    searches = ("train.search.choose", "train.search.generalist", "train.control.days")
    code = sources.sha256([sources.path_of(name) for name in searches])
    about = [scenario_hash(scenario) for scenario in scenarios], config.to_yaml(), str(request.budget), request.seed
    journal = Journal(folder.search, [code, code_sha256(), versions(), *about])
    if journal.anew:
        display.say("the search begins anew: it was begun by another version, and would not go on as it began")
    return journal


def _table(base: SearchResult) -> list[dict[str, Any]]:
    """What the model card says of a direct search: :func:`train.search.fitness.merged` over loads of 0.3 to 1.1
    knees."""
    rows = [
        ("this policy, score over light load to beyond its knee", base.score),
        ("best published rule, score at the same (for it too high) rates", base.default_score),
    ]
    return [{"policy": name, "score": round(score, 5), "split": "valid"} for name, score in rows]


def _published(publisher: Publisher, folder: Path) -> SearchResult:
    """The base, as a checkpoint where it is more than a rule with values."""
    base = publisher.base
    if base.init or (base.plans is None and base.theta is None):
        return base
    publisher.start(folder)
    return replace(base, folder=str(folder))


def _warm_up(scenario: Scenario, config: TrainConfig, rule: str, display: Display) -> None:
    """Compile the kernels (once per version and machine) before any clock of the budget runs."""
    display.phase("compile")
    display.update(0.0, "kernels, the first time on this machine only")
    rules = [rule] if rule != AUTO else rules_of(scenario, config.rules)
    for number, name in enumerate(rules):
        measure(scenario, Contender(name), scenario.reference_rate, 0, PointSettings(n_requests=20, split="train"))
        display.update((number + 1) / len(rules), name)
    display.update(1.0, "ready")


def _base(
    request: Request, scenario: Scenario, config: TrainConfig, folder: RunFolder, display: Display, log: JsonLog
) -> SearchResult:
    """The tuned rule, from an earlier part of this run if there is one."""
    if folder.base.exists():
        return SearchResult.read(folder.base)
    if request.init is not None:
        kept = folder.root / "base"
        replace_folder(request.init, kept)  # to resume from, whatever becomes of the other
        found = start_from(kept, scenario, config, display)
        write_json(folder.base, asdict(found), sealed=True)
        return found
    if request.rule == AUTO:
        log.write("search")  # from its beginning, also in a resumed run
        alone = request.algorithm == "direct"
        search = partial(search_all, scenario, config, display, request.budget, alone, request.seed)
        return _searched(request, [scenario], config, folder, display, search)
    search_only = request.algorithm == "search"
    budget, share = request.budget, 1.0 if search_only else config.tune_share
    found = search_rule(
        request.rule,
        scenario,
        config,
        display,
        seconds=budget.seconds * share,
        trials=None if search_only else config.tune_trials,
        requests=budget.frames if search_only else None,
        seed=request.seed,
        storage=request.storage or folder.study,
        pool=RayExecutor() if request.ray is not None else None,
        width=2 * cores() if request.ray is not None else 1,
    )
    write_json(folder.base, asdict(found), sealed=True)
    return found


def _learn(
    request: Request,
    scenario: Scenario,
    config: TrainConfig,
    folder: RunFolder,
    display: Display,
    log: JsonLog,
    publisher: Publisher,
    judge: SimulatorJudge,
) -> tuple[list[Evaluation], dict[str, Any], int]:
    base = publisher.base
    env = make_env(publisher, request.ray)
    left = request.budget.seconds * (1.0 - config.final_share) - base.seconds
    try:
        base_score = judge.submit(base.contender, monitor_seeds(config)).result().score
        return learn(
            env,
            publisher,
            config,
            folder,
            judge,
            log,
            display,
            base_score=base_score,
            frames=request.budget.frames,
            seconds=max(left, 1.0),
            resume=request.resume,
        )
    finally:
        env.close()


def _environments(
    worker: int, base: SearchResult, scenario: Scenario, seed: int, advise: bool, **settings: Any
) -> VecEnv:
    """The environments of one process; a compiled rule does not travel, so it is bound here."""
    design, setting = base.design, arena_of(scenario).setting
    policy = replace(design.base(setting), arrangement=design.arrangement(setting))
    return SlalomVecEnv(scenario, seed=seed + 100_003 * worker, split="train", policy=policy, advise=advise, **settings)


def make_env(publisher: Publisher, ray: str | None = None) -> VecEnv:
    """Training environments around the base rule's knee: in this process, or on a Ray cluster."""
    config, base = publisher.config, publisher.base
    workers = _workers(config, ray)
    build = partial(
        _environments,
        scenario=publisher.scenario,
        base=base,
        advise=bool(publisher.new_network().bonus.any()),
        n_envs=config.n_envs // workers,
        groups=max(config.groups // workers, 1),
        seed=publisher.seed,
        n_requests=config.n_requests,
        rates=(config.load_low * base.knee, config.load_high * base.knee),
        beta=1.0 / config.horizon_s,
    )
    if ray is not None:
        return RayCollector(build, publisher.new_network, config, workers, seed=publisher.seed)
    return build(0)


def _workers(config: TrainConfig, ray: str | None) -> int:
    """Rollout workers, 1 or more; on a cluster 0 means one a core but one, which the learner keeps."""
    if ray is None or config.workers:
        return max(config.workers, 1)
    spare = max(cores() - 1, 1)
    return max(w for w in range(1, spare + 1) if config.groups % w == 0 and config.n_envs % w == 0)


def _finish(
    summary: dict[str, Any],
    folder: RunFolder,
    display: Display,
    score: float,
    before: float,
    what: str = "level on validation windows around the knee",
) -> dict[str, Any]:
    write_json(folder.root / "result.json", summary)
    display.say(
        f"{folder.best}: {what}: {100 * score:.2f} %, {100 * (score - before):+.2f} points against what it started from"
    )
    return summary
