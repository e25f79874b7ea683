"""From a training to deployable checkpoints, with what they should tell about themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th

from engine.common import provenance
from engine.core.columns import CANDIDATE_DIMENSIONLESS, CONTEXT_DIMENSIONLESS, Col, Ctx
from env.scenario import Scenario
from env.surrogate.arena import arena_of
from policies.checkpoint.folder import Facts, load, save_network, save_rule
from policies.network.scoring import ScoringNetwork
from policies.setting import Setting
from train.config import TrainConfig
from train.ppo.callbacks import replace_folder
from train.ppo.learner import DispatchPPO
from train.ppo.start import load_network, network_of
from train.search.rule import SearchResult


@dataclass(frozen=True)
class Publisher:
    """Writes checkpoints of one training.

    :param base: the tuned base rule; its weights are frozen inside every network
    """

    scenario: Scenario
    base: SearchResult
    config: TrainConfig
    seed: int

    def new_network(self) -> ScoringNetwork:
        """An untrained network: its decisions are the base's."""
        hidden, scale = self.config.hidden, self.config.base_scale
        if self.base.init:
            return network_of(load_network(Path(self.base.folder)), hidden, scale)
        return self.base.design.network(self._setting, hidden, scale)

    def start(self, folder: Path, evaluation: Sequence[dict[str, Any]] = ()) -> None:
        """The base, which learning starts from, as a checkpoint; one that was named as it is."""
        design = self.base.design
        if self.base.init:
            replace_folder(Path(self.base.folder), folder)
        elif design.theta is None:
            facts = self._facts({}, evaluation, {})
            save_rule(folder, rule=self.base.rule, values=self.base.values, profile=self._profile(), facts=facts)
        else:
            with th.random.fork_rng(devices=[]):
                th.manual_seed(self.seed)  # the residual is zero, but its hidden weights are in the file
                network = design.network(self._setting, 4, 1.0)
            self._save(folder, network, {}, evaluation, {})

    @property
    def _setting(self) -> Setting:
        return arena_of(self.scenario).setting

    def network(self, folder: Path, model: DispatchPPO) -> None:
        """The network as it is now, with the bounds of what it has seen."""
        network: Any = model.policy.network
        seen = model.policy.seen.tolist()
        pairs = list(zip(seen[0], seen[1], strict=True))
        bounds = {
            "context": {c.name: pairs[c] for c in Ctx if c < CONTEXT_DIMENSIONLESS},
            "candidate": {c.name: pairs[CONTEXT_DIMENSIONLESS + c] for c in Col if c < CANDIDATE_DIMENSIONLESS},
        }
        learned = {
            "frames": model.num_timesteps,
            "updates": model._n_updates,
            "episodes_requests": self.config.n_requests,
        }
        self._save(folder, network, learned, (), bounds)

    def finished(self, snapshot: Path, folder: Path, evaluation: Sequence[dict[str, Any]]) -> None:
        """A snapshot again, now with its evaluation table."""
        loaded = load(snapshot)
        network = self.new_network()
        network.load_state_dict({name: th.from_numpy(array) for name, array in loaded.arrays.items()}, strict=False)
        bounds = loaded.manifest.bounds.model_dump()
        self._save(folder, network, loaded.manifest.training, evaluation, bounds)

    def _save(
        self,
        folder: Path,
        network: ScoringNetwork,
        learned: dict[str, Any],
        evaluation: Sequence[dict[str, Any]],
        bounds: dict[str, Any],
    ) -> None:
        save_network(
            folder,
            network,
            base=self.base.rule,
            base_values=self.base.values,
            profile=self._profile(),
            facts=self._facts(learned, evaluation, bounds),
        )

    def _profile(self) -> Any:
        """The latency profile as JSON data; a list where the scenario has several."""
        profiles = [json.loads(profile.to_json()) for profile in self.scenario.load_profiles()]
        return profiles[0] if len(profiles) == 1 else profiles

    def _facts(self, learned: dict[str, Any], evaluation: Sequence[dict[str, Any]], bounds: dict[str, Any]) -> Facts:
        training = {
            "seed": self.seed,
            "search_trials": self.base.trials,
            "search_requests": self.base.requests,
            "commit": provenance.commit() or "unknown",
            "versions": provenance.versions(),
            "hyper_parameters": self.config.model_dump(mode="json"),
        }
        own = self.base.plans is None and self.base.theta is None  # then it follows from the rule, for any cluster
        return Facts(
            name=f"{self.scenario.name}-{'ppo' if learned else self.base.sampler.lower()}-{self.seed}",
            scenario=self.scenario.name,
            scenario_sha256=self.scenario.hash(),
            training=training | learned | self._poor_fits(),
            evaluation=evaluation,
            bounds=bounds,
            arrangement=None if own else self.base.design.choices(self._setting),
            fitted=self.base.universal,
            fidelity=self._fidelity(),
        )

    def _poor_fits(self) -> dict[str, Any]:
        """For the model card: whether what it was trained on is known badly."""
        found = self.scenario.poor_fits()
        return {"poor_fit": " ".join(found)} if found else {}

    def _fidelity(self) -> dict[str, Any]:
        """How near surrogate and engine were where that was measured; by profile where there are several."""
        found = {p.name: dict(p.fidelity) for p in self.scenario.load_profiles() if p.fidelity}
        return next(iter(found.values())) if len(found) == 1 else dict(found)
