"""Hyper-parameters of one training: documented fields, safe YAML, nothing evaluated."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.common.documents import bad_input
from engine.common.yaml_documents import read_yaml, yaml_text
from engine.errors import SlalomError, no_such
from env.scenario import list_scenarios


class TrainConfig(BaseModel):
    """Every dial of ``train-policy``; the defaults suit two cores and about two minutes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # -- budget
    tune_share: float = Field(0.3, ge=0, le=0.9, description="share of the budget to tune one base rule")
    direct_share: float = Field(0.6, ge=0, le=1, description="share of ppo's budget for the direct search before it")
    direct_requests: int | None = Field(
        None, ge=1000, description="requests of the direct search instead: reproducible runs need it"
    )
    designs: int = Field(300, ge=2, description="random rules, arrangements and scores that the direct search draws")
    rules: tuple[str, ...] | None = Field(None, description="published rules it draws from; default: all that fit")
    direct_size: int | None = Field(
        None, ge=20, description="requests of its simulations; default: the scenario's, 2000 to 4000"
    )
    direct_seeds: int = Field(1, ge=1, description="arrival sequences per rate and generation of CMA-ES")
    light_loads: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.3, 0.6), description="times the goodput: light load that the direct search looks at as well; empty: never"
    )
    starts: int = Field(
        3, ge=1, description="designs of different arrangements that CMA-ES begins to refine; the best of them goes on"
    )
    tune_trials: int = Field(600, ge=4, description="most trials of the base rule's search")
    tune_requests: int = Field(
        3000,
        ge=20,
        description="requests of one simulation of the search; short ones reward letting queues grow",
    )
    final_share: float = Field(0.12, ge=0, le=0.5, description="share of a wall-time budget for selection")

    # -- rollouts
    n_envs: int = Field(64, ge=1, description="environments stepped together")
    groups: int = Field(8, ge=1, description="groups of environments that share an arrival trace")
    n_requests: int = Field(3000, ge=10, description="requests of one training episode")
    n_steps: int = Field(256, ge=2, description="decisions of each environment between two updates")
    load_low: float = Field(0.9, gt=0, description="least training load, times the base rule's goodput")
    load_high: float = Field(1.1, gt=0, description="greatest training load, times the base rule's goodput")
    workers: int = Field(0, ge=0, description="rollout workers on Ray (--ray); 0: one a core but one")

    # -- network
    hidden: int = Field(32, ge=4, le=512, multiple_of=4, description="width of the shared encoder")
    base_scale: float = Field(2.0, gt=0, description="logits per unit of the base rule's cost at the start")

    # -- PPO
    learning_rate: float = Field(1e-3, gt=0)
    learning_rate_final: float = Field(1e-4, ge=0, description="reached linearly at the end of the budget")
    batch_size: int = Field(4096, ge=2, description="frames of a minibatch")
    n_epochs: int = Field(2, ge=1, description="passes over a rollout")
    clip_range: float = Field(0.2, gt=0, lt=1)
    horizon_s: float = Field(10.0, gt=0, description="simulated seconds over which rewards are discounted by e")
    gae_lambda: float = Field(0.99, ge=0, le=1)
    ent_coef: float = Field(1e-3, ge=0, description="entropy bonus at the start")
    ent_coef_final: float = Field(0.0, ge=0, description="reached linearly at the end of the budget")
    vf_coef: float = Field(0.5, ge=0)
    max_grad_norm: float = Field(0.5, gt=0)
    target_kl: float | None = Field(0.03, gt=0, description="an update stops past 1.5 times this")
    critic_warmup: int = Field(2, ge=0, description="first updates that train the value only")
    baseline_slice_s: float = Field(
        5.0, ge=0, description="time slice of the input-driven baseline, in seconds; 0 turns it off"
    )

    # -- evaluation and safety copies
    eval_every_s: float = Field(8.0, gt=0, description="wall seconds between evaluations")
    eval_every_frames: int | None = Field(
        None, ge=1, description="frames between evaluations instead: reproducible runs need it"
    )
    eval_requests: int = Field(5000, ge=10, description="requests of an evaluation window")
    eval_seeds: int = Field(3, ge=1, description="validation windows, the same for every policy")
    final_seeds: int = Field(6, ge=1, description="fresh validation windows of the final selection")
    finalists: int = Field(3, ge=1, description="snapshots in the final selection, beside the base rule")
    eval_loads: tuple[float, ...] = Field((0.9, 1.0, 1.1), description="times the base rule's goodput")
    save_every_s: float = Field(15.0, gt=0, description="wall seconds between training checkpoints")
    torch_threads: int = Field(1, ge=1, description="threads of torch; more lose when the cores are shared")

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.load_low > self.load_high:
            raise ValueError("load_low must not exceed load_high")
        if self.n_envs % self.groups:
            raise ValueError("n_envs must be a multiple of groups")
        if self.workers and (self.n_envs % self.workers or self.groups % self.workers):
            raise ValueError("n_envs and groups must be multiples of workers")
        if not self.eval_loads or min(self.eval_loads) <= 0:
            raise ValueError("eval_loads needs at least one positive load")
        return self

    def to_yaml(self) -> str:
        """In the layout :func:`load_config` reads."""
        return yaml_text({"default": self.model_dump(mode="json")})


def load_config(path: Path | None, scenario: str, **overrides: Any) -> TrainConfig:
    """Defaults, overridden by the file's ``default`` section, that of the scenario, and ``overrides``.

    :param path: YAML file whose top-level keys are ``default`` and scenario names (as in the RL zoo)
    :raises SlalomError: file unreadable, not YAML, or with an unknown or impossible value
    """
    values: dict[str, Any] = {}
    if path is not None:
        sections = _read(path)
        _check_sections(path, sections, scenario)
        for section in ("default", scenario):
            part = sections.get(section) or {}
            if not isinstance(part, dict):
                raise SlalomError(f"{path}: {section}", part, "write 'field: value' lines below it")
            values |= part
    try:
        return TrainConfig(**(values | overrides))
    except ValidationError as error:
        where = str(path or "hyper-parameters")
        first = error.errors()[0]
        if first["type"] == "extra_forbidden":
            raise no_such(f"{where}: setting", str(first["loc"][0]), TrainConfig.model_fields) from error
        raise bad_input(where, error) from error


def _check_sections(path: Path, sections: Mapping[Any, Any], scenario: str) -> None:
    """Sections of other scenarios may be there; what is none, or misspelt, must not be passed over.

    :raises SlalomError: a setting outside the sections, or a section that no scenario has
    """
    for name in sections:
        if name in TrainConfig.model_fields:
            fix = f"settings stand in a section: 'default:' or '{scenario}:', and below it '{name}: ...'"
            raise SlalomError(f"{path}: {name}", sections[name], fix)
    known = ["default", scenario, *list_scenarios()]
    for name in sections:
        # A section of a scenario in a file of its own cannot be known here; one close to a known name is a slip.
        near = difflib.get_close_matches(str(name), known, 1, 0.75)
        if name not in known and near:
            raise SlalomError(
                f"{path}: {name}", "unknown section", f"did you mean {near[0]}? If not, give it a file of its own"
            )
    if not {"default", scenario} & set(sections):
        fix = f"nothing in it is for this run: name a section 'default' or '{scenario}'"
        raise SlalomError(f"{path}", f"sections {', '.join(map(str, sections)) or 'none'}", fix)


def _read(path: Path) -> dict[Any, Any]:
    sections = read_yaml(path, "--config")
    if not isinstance(sections, dict):
        raise SlalomError(str(path), sections, "start with 'default:' or a scenario name")
    return sections
