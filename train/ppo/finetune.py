"""Some minutes of PPO on the real engine, from a checkpoint that was learned on the surrogate.

The engine answers in real time, so minutes bring thousands of decisions where the surrogate brings millions: this
adapts, it does not learn anew. Whether it helped is measured, not assumed: start and result serve the same arrivals on
the engine, in turns, and the better one is the checkpoint that is kept. Not yet verified on a GPU.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.common.files import claim, write_json
from engine.errors import SlalomError
from env.gym.engine_env import EngineVecEnv
from env.live.replay import replay
from env.measure.metrics import outcomes
from env.scenario import Scenario
from env.surrogate.simulate import bind_policy
from policies.checkpoint.folder import Facts, LoadedPolicy, save_network
from train.config import TrainConfig
from train.ppo.callbacks import replace_folder
from train.ppo.learner import DispatchPPO
from train.ppo.start import load_network, network_of

#: Small steps: a policy that works must not be undone by a few hundred noisy decisions.
CONFIG = {
    "n_envs": 1, "groups": 1, "n_steps": 128, "batch_size": 64, "learning_rate": 1e-4, "learning_rate_final": 2e-5,
    "critic_warmup": 1, "baseline_slice_s": 0.0, "target_kl": 0.02, "clip_range": 0.1, "n_requests": 100,
}  # fmt: skip
_ROUNDS = 2  # comparisons of start and result on the engine


def _save(folder: Path, loaded: LoadedPolicy, scenario: Scenario, model: DispatchPPO) -> None:
    """The network as it is now, with all that the checkpoint it came from said about itself."""
    manifest, profiles = loaded.manifest, scenario.load_profiles()
    tuned = {"finetuned_decisions": model.num_timesteps, "finetuned_s": round(model.trained_s, 1)}
    plans = manifest.arrangement
    facts = Facts(
        name=f"{manifest.name}-engine",
        scenario=scenario.name,
        scenario_sha256=scenario.hash(),
        training=manifest.training | tuned,
        evaluation=manifest.evaluation,
        fidelity=dict(profiles[0].fidelity or {}) if len(profiles) == 1 else {},
        bounds=manifest.bounds.model_dump(),
        fallback=manifest.fallback,
        arrangement=None if plans is None else [p.plan() for p in plans],
        fitted=manifest.fitted,
    )
    data = [json.loads(profile.to_json()) for profile in profiles]
    network: Any = model.policy.network
    save_network(
        folder, network, base=manifest.rule.name, base_values=dict(manifest.rule.values),
        profile=data[0] if len(data) == 1 else data, facts=facts,
    )  # fmt: skip


def _attainment(scenario: Scenario, folder: Path, seed: int, env: EngineVecEnv) -> float:
    run = replay(
        scenario, str(folder), rate=scenario.reference_rate, n_requests=env.n_requests, seed=seed, split="valid",
        park=env.park,
    )  # fmt: skip
    return float(outcomes(run).good.mean())


def finetune(
    scenario: str,
    init: Path,
    seconds: float,
    *,
    seed: int = 0,
    out: Path | None = None,
) -> dict[str, Any]:
    """Fine-tune ``init`` on the engine; ``OUT/best`` is the result, or ``init`` itself where the result is no better.

    :param seconds: of learning; the comparison afterwards comes on top
    :return: facts and figures, also in ``OUT/result.json``
    :raises SlalomError: a checkpoint that is no network, or a scenario whose profile is of another engine
    """
    loaded, chosen = load_network(init), Scenario.load(scenario)
    config = TrainConfig(**CONFIG)  # type: ignore[arg-type]
    torch.set_num_threads(config.torch_threads)
    folder = out or Path("runs") / f"{chosen.name}-engine-{seed}"
    claim(folder)  # before anything is learned that could not be written
    if (folder / "result.json").exists():
        raise SlalomError("--out", str(folder), "a run is there already; name another folder")
    rule = loaded.manifest.rule
    env = EngineVecEnv(
        chosen, seed=seed, n_requests=config.n_requests, policy=bind_policy(rule.name, chosen, dict(rule.values)),
        advise=bool(np.any(loaded.arrays.get("bonus", 0.0))),
    )  # fmt: skip
    print(f"fine-tuning {init} for {seconds:g} s on {env.park.name}", file=sys.stderr)
    try:
        model = DispatchPPO(env, partial(network_of, loaded), config, seed=seed)
        model.learn(10**9, time_limit_s=seconds, log_interval=0)
    finally:
        env.close()
    tuned = folder / "tuned"
    _save(tuned, loaded, chosen, model)
    pairs = [[_attainment(chosen, place, 10_000 + k, env) for place in (init, tuned)] for k in range(_ROUNDS)]
    before, after = np.mean(pairs, axis=0).tolist()
    better = after > before
    replace_folder(tuned if better else init, folder / "best")
    result = {
        "checkpoint": str(folder / "best"),
        "device": env.park.name,
        "decisions": model.num_timesteps,
        "updates": model._n_updates,
        "attainment_before": before,
        "attainment_after": after,
        "kept": "result" if better else "start",
    }
    kept = "the result is kept" if better else "that is no better, so the start is kept"
    result["text"] = (
        f"{model.num_timesteps} decisions, {model._n_updates} updates on {env.park.name}\n"
        f"attainment on the same arrivals: {100 * before:.1f} % before, {100 * after:.1f} % after; {kept} in "
        f"{result['checkpoint']}"
    )
    write_json(folder / "result.json", result)
    return result
