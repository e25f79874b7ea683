"""The direct search: what it starts from, what it leaves behind, and that a seed fixes it to the byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch as th

from engine.core.kinds import Order
from engine.errors import SlalomError
from env.gym.vector_env import SlalomVecEnv
from env.scenario import Scenario
from env.surrogate.arena import arena_of
from env.surrogate.simulate import simulate
from policies.checkpoint.folder import load
from train.budget import Budget
from train.config import TrainConfig
from train.ppo.learner import DispatchPPO
from train.recipe import load_recipe, recipe_names
from train.run import Request, run
from train.search.direct import DirectConfig, direct_search
from train.search.fitness import Fitness, merged
from train.search.generalist import named, train_generalist
from train.search.space import Design, Space, offspring, random_design, reordered, varied

SHIFT = Scenario.load("shift-pd-8xa100")
CODE = Scenario.load("azure-code-mux-4xa100")
SMALL = {"designs": 8, "starts": 1, "final_seeds": 1, "eval_requests": 200, "direct_size": 200}


def _good(scenario: Scenario, design: Design) -> list[int]:
    policy = design.bind(arena_of(scenario).setting)
    run_ = simulate(scenario, policy, rate=scenario.reference_rate, n_requests=300, seed=1, split="train")
    return run_.req["first_token"].tolist()


@pytest.mark.parametrize("rule", ["round_robin", "tropical_code"])
def test_a_search_around_a_rule_starts_at_the_rule(rule: str) -> None:
    alone = Design(rule)
    space = Space(arena_of(SHIFT).setting, alone)
    assert _good(SHIFT, replace(alone, theta=np.zeros(len(space)))) == _good(SHIFT, alone)


def test_reordered_changes_the_queues_of_a_rule_and_nothing_else() -> None:
    setting, rule = arena_of(SHIFT).setting, Design("muxwise")
    plans = reordered(rule, setting, Order.ON_TIME).bind(setting).arrangement
    published = rule.bind(setting).arrangement
    assert plans is not None
    assert published is not None
    assert [replace(plan, order=Order.ON_TIME) for plan in published] == plans


def test_offspring_have_the_rule_of_one_parent_and_the_arrangement_of_another() -> None:
    setting, rng = arena_of(SHIFT).setting, np.random.default_rng(0)
    placed = reordered(Design("muxwise"), setting, Order.ON_TIME)
    parents = [placed, Design("lodestar")]  # one has no arrangement of its own to give
    found = offspring(parents, 10, rng)
    assert sorted(design.rule for design in found) == ["linear_score", "lodestar"]
    assert all(design.plans == placed.plans for design in found)
    assert len(offspring(parents, 1, rng)) == 1


def test_what_is_missed_at_moderate_load_counts_as_much_as_at_the_knee() -> None:
    spared, hurried = merged([0.99, 0.88]), merged([0.97, 0.90])
    assert spared > hurried  # one miss of three is worth more there than two points of a hundred here
    assert merged([1.0, 1.0]) == pytest.approx(1.0)
    assert merged([0.9]) == pytest.approx(0.9)
    assert merged([0.2, 0.3]) < merged([0.25, 0.3])


def test_a_rule_that_does_not_fit_scores_nothing_and_what_is_wrong_with_the_workload_is_said() -> None:
    alone = Scenario.load("tiny-4xa100").with_overrides({"cluster.0.count": 1})
    fitness = Fitness(alone, arena_of(alone).setting)
    assert fitness.score(Design("splitwise"), [5.0], (0,), 50) == 0.0  # it needs two instances
    assert fitness.score(Design("least_tokens"), [5.0], (0,), 50, waits=False) > 0.5
    with pytest.raises(SlalomError, match="rate"):
        fitness.score(Design("least_tokens"), [-1.0], (0,), 50, waits=False)


def test_random_designs_and_their_neighbours_run_or_are_refused() -> None:
    setting, rng = arena_of(CODE).setting, np.random.default_rng(0)
    ran = 0
    for _ in range(25):
        design = random_design(["least_tokens", "taichi", "muxwise"], setting, rng)
        for candidate in (design, varied(design, rng)):
            try:
                policy = candidate.bind(setting)
            except SlalomError:
                continue
            plans = policy.arrangement
            assert plans is None or len(plans) == setting.n_instances
            simulate(CODE, policy, rate=5.0, n_requests=30, seed=0, split="train")
            ran += 1
    assert ran > 25


def test_the_search_is_not_worse_than_the_best_rule_it_knows() -> None:
    sizes = DirectConfig(designs=10, rounds=1, starts=1, parents=3, n_requests=300, population=6)
    found = direct_search(CODE, sizes, requests=60_000, seed=0)
    assert found.requests >= 60_000
    assert found.best_rule.theta is None
    assert found.best_rule in found.finalists
    assert found.knee > 0.0


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        asked = Request(
            CODE.name, "direct", "auto", Budget(frames=40_000), seed=3, out=tmp_path / name, overrides=SMALL
        )
        run(asked)
    files = sorted(p.name for p in (tmp_path / "a" / "best").iterdir())
    for file in files:
        assert (tmp_path / "a" / "best" / file).read_bytes() == (tmp_path / "b" / "best" / file).read_bytes()
    best = load(tmp_path / "a" / "best")
    assert best.manifest.evaluation
    assert simulate(CODE, str(tmp_path / "a" / "best"), rate=5.0, n_requests=50).decisions > 0


def test_advice_stands_in_the_observation() -> None:
    env = SlalomVecEnv(SHIFT, 3, policy="least_tokens", n_requests=60, advise=True, seed=2)
    observations = env.reset()
    k = env.n_candidates
    for _ in range(80):
        advice, masks = observations[:, -k:], env.action_masks()
        assert (advice.sum(1) == 1).all()
        assert (masks[np.arange(3), advice.argmax(1)]).all()
        observations, *_ = env.step(advice.argmax(1))


def test_ppo_on_an_advised_network_starts_at_the_rule_and_learns() -> None:
    design, setting = Design("least_tokens"), arena_of(SHIFT).setting
    env = SlalomVecEnv(SHIFT, 4, policy="least_tokens", n_requests=60, advise=True, seed=2, groups=2)
    config = TrainConfig(n_envs=4, groups=2, n_steps=16, batch_size=32, hidden=8, critic_warmup=0)
    model = DispatchPPO(env, lambda: design.network(setting, 8, 50.0), config, seed=0)
    before = model.policy.network.out.weight.detach().clone()
    model.learn(4 * 16)
    buffer = model.rollout_buffer
    advised = buffer.observations[..., -env.n_candidates :].argmax(-1)
    assert (advised == buffer.actions).mean() > 0.99
    assert not th.equal(before, model.policy.network.out.weight)


def test_recipes_name_scenarios_and_known_dials() -> None:
    assert recipe_names()
    for name in recipe_names():
        recipe = load_recipe(name)
        Scenario.load(recipe.scenario)
        TrainConfig(**recipe.config)
    with pytest.raises(SlalomError, match="--recipe"):
        load_recipe("nothing-of-the-sort")


def test_a_recipe_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("scenario: tiny-4xa100\nalgorithm: direct\nbudget: 1M\nluck: 7\n")
    with pytest.raises(SlalomError, match="luck"):
        load_recipe(str(path))


def test_shipped_checkpoints_load_and_stand_beside_their_recipes() -> None:
    folder = Path(__file__).resolve().parents[2] / "checkpoints" / "policies"
    names = [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
    assert names
    assert set(names) <= set(recipe_names())
    for name in names:
        loaded = load(folder / name)
        assert sum(file.stat().st_size for file in loaded.folder.iterdir()) < 1_000_000
        scenario = Scenario.load(load_recipe(name).scenario)
        assert loaded.manifest.scenario_sha256 == scenario.hash()
        run_ = simulate(scenario, str(loaded.folder), rate=scenario.reference_rate, n_requests=60, split="train")
        assert run_.decisions > 0


def test_a_generalist_takes_scenarios_of_any_size() -> None:
    pair = [named("azure-conv-4xa100@2"), Scenario.load("classes-6xa100")]
    assert len(pair[0].placements()) == 2
    design, requests, _ = train_generalist(pair, requests=1000, population=4, seed=1)
    assert requests >= 1000
    again, _, _ = train_generalist(pair, requests=1000, population=4, seed=1)
    np.testing.assert_array_equal(design.theta, again.theta)
    for scenario in pair:
        policy = design.bind(arena_of(scenario).setting)
        assert len(policy.arrangement) == len(scenario.placements())


def test_a_small_budget_is_not_spent_on_choosing_among_a_few() -> None:
    sizes = DirectConfig(designs=8, starts=2, n_requests=1000, rules=("round_robin", "muxwise"))
    found = direct_search(CODE, sizes, requests=150_000, seed=3)
    assert found.requests < 300_000
