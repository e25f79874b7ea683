"""Scenarios: one YAML that says which cluster serves which workload, under which targets, with which levers.

A scenario is everything an evaluation depends on besides the policy, the rate and the seed. Unknown keys,
wrong types and settings that contradict each other are errors that name file, field, value and remedy.
``Scenario.load("azure-conv-4xa100").to_yaml()`` shows every default.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from engine.common.documents import bad_input
from engine.common.yaml_documents import read_yaml, yaml_text
from engine.errors import SlalomError, no_such
from engine.latency import Profile
from env.others import EngineName, filled_in, misfits, roles_of
from env.sections import (
    Count,
    Decisions,
    Delay,
    InstanceGroup,
    Interval,
    Links,
    Positive,
    Randomised,
    Rates,
    Routers,
    Section,
    SloClass,
)
from env.workload import WorkloadSpec

Regime = Literal[
    "prefill-bound", "balanced", "decode-bound", "tiny", "prefix-bound", "bursty", "shifting", "slo-classes"
]
_CAN_PREFILL = ("prefill", "mixed", "multiplexed")
_CAN_DECODE = ("decode", "mixed", "multiplexed")


@dataclass(frozen=True)
class Placement:
    """One instance: its group, and indices of its (first) GPU, KV pool and profile."""

    group: InstanceGroup
    gpu: int
    pool: int
    profile: int


class Scenario(Section):
    """See the module docstring.

    :param profile: latency profile of every group that names none, by name or path
    :param cluster: groups of instances
    :param engine: what the instances are: ours, or engines of others behind ``route``, which leaves a policy fewer
        levers and fills in some defaults (:mod:`env.others`)
    :param workload: the ``workload:`` section, see ``env/workload/spec.py``
    :param control_interval_s: time between REALLOCATE and TUNE decisions, 10 µs or more (as ``hold_interval_s``)
    :param hold_interval_s: a held request is asked for again at the latest after this
    :param hold_scan: held requests asked for again per epoch
    :param hold_limit_s: nobody is held longer than this after arrival, nor past the TTFT target less the prefill
    :param tail_factor: nobody waits for a first token longer than so many TTFT targets, where that is possible at all
    :param min_prefill: instances that must stay able to prefill
    :param min_decode: instances that must stay able to decode
    :param rates: bracket of the goodput search
    :param reference_rate: requests per second near the knee, for single runs and training
    :param latency_jitter: relative spread of step times; "profile": the profile's held-out error
    :param n_requests: per evaluation run
    :param observation_delay_s: who decides knows the state of instances so late (roles, SM shares, chunk budgets and
        prefix caches at once), but its own placements at once; on the surrogate
    :param routers: arrivals are split among so many at random; each has its own books and its own policy's memory, and
        sees what others placed no sooner than the delay; on the surrogate
    :param randomise: what training draws anew for every episode
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str
    regime: Regime
    profile: str
    engine: EngineName = "own"
    cluster: Annotated[tuple[InstanceGroup, ...], Field(min_length=1)]
    links: Links = Links()
    workload: WorkloadSpec
    classes: Annotated[tuple[SloClass, ...], Field(min_length=1)]
    decisions: Decisions = Decisions()
    control_interval_s: Interval = 1.0
    hold_interval_s: Interval = 0.05
    hold_scan: Count = 8
    hold_limit_s: Positive = 10.0
    min_prefill: Count = 1
    min_decode: Count = 1
    rates: Rates
    reference_rate: Positive
    latency_jitter: Literal["profile"] | Annotated[float, Field(ge=0, le=1)] = "profile"
    n_requests: Count = 2000
    tail_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 10.0
    observation_delay_s: Delay = 0.0
    routers: Routers = 1
    randomise: Randomised = Randomised()

    @field_validator("classes")
    @classmethod
    def _classes_fit(cls, value: tuple[SloClass, ...]) -> tuple[SloClass, ...]:
        if abs(sum(c.share for c in value) - 1.0) > 1e-6:
            raise ValueError("the shares of classes must add up to 1")
        if len({c.name for c in value}) != len(value):
            raise ValueError("class names must differ")
        return value

    @field_validator("reference_rate")
    @classmethod
    def _within_rates(cls, value: float, info: ValidationInfo) -> float:
        rates = info.data.get("rates")
        if rates and not rates.low <= value <= rates.high:
            raise ValueError(f"must lie within rates ({rates.low} to {rates.high})")
        return value

    @model_validator(mode="after")
    def _roles_suffice(self) -> Scenario:
        for roles, least, field in (
            (_CAN_PREFILL, self.min_prefill, "min_prefill"),
            (_CAN_DECODE, self.min_decode, "min_decode"),
        ):
            able = sum(group.count for group in self.cluster if group.role in roles)
            if able < least:
                raise ValueError(f"{able} instances of the cluster count towards {field}: {least}; add some")
        return self

    # -- files -----------------------------------------------------------------------------------------

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str]) -> Scenario:
        """Read a bundled scenario by name, or any YAML file by path.

        :raises SlalomError: no such scenario, or its content (or that of a profile it names) is refused
        """
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            path = scenarios_dir() / f"{name_or_path}.yaml"
            if not os.path.isfile(path):  # unlike Path.is_file, False for a name that no file can have
                raise no_such("scenario", str(name_or_path), list_scenarios(), "a file that ends in .yaml")
        return cls.parse(read_yaml(path, "scenario"), path.name)

    @classmethod
    def parse(cls, content: Any, source: str = "scenario") -> Scenario:
        """Validate parsed YAML.

        :param source: named in errors
        """
        try:
            scenario = cls.model_validate_json(json.dumps(filled_in(content), default=str))
        except ValidationError as error:
            raise bad_input(source, error) from error
        scenario._check_profiles(source)
        if scenario.engine != "own":
            for wrong in misfits(scenario.engine, scenario.cluster, scenario.decisions):
                raise SlalomError(f"{source}: {wrong.field}", wrong.value, wrong.fix)
        return scenario

    def to_yaml(self) -> str:
        """The scenario with every default shown; loading it gives an equal scenario."""
        return yaml_text(self.model_dump(mode="json"))

    def with_overrides(self, overrides: Mapping[str, Any]) -> Scenario:
        """A copy with some fields replaced, validated again.

        :param overrides: by dotted path, e.g. ``{"cluster.0.count": 8, "rates.high": 40.0}``
        :raises SlalomError: unknown path or refused value
        """
        content = self.model_dump(mode="json")
        for path, value in overrides.items():
            _replace(content, path, value)
        return Scenario.parse(content, self.name)

    def fixed_on(self, *groups: Mapping[str, Any], **overrides: Any) -> Scenario:
        """The scenario on these groups of instances, with every lever but placement off; ``overrides``: by path too."""
        fixed = {"cluster": [dict(group) for group in groups], "decisions": {}, "min_prefill": 1, "min_decode": 1}
        return self.with_overrides(fixed | overrides)

    def hash(self) -> str:
        """SHA-256 (hex) of everything but the description, the same on every machine."""
        content = self.model_dump(mode="json", exclude={"description"})
        # Fields younger than the hashes in checkpoints count only where they say something.
        for name in ("engine", "tail_factor", "observation_delay_s", "routers", "randomise"):
            if getattr(self, name) == Scenario.model_fields[name].default:
                del content[name]
        for name in ("at_once", "drain", "start_roles"):
            if getattr(self.decisions, name) == Decisions.model_fields[name].default:
                del content["decisions"][name]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    # -- what it means ---------------------------------------------------------------------------------

    def profile_names(self) -> tuple[str, ...]:
        """Distinct profiles in the order of their first use; ``Placement.profile`` counts in it."""
        return tuple(dict.fromkeys(group.profile or self.profile for group in self.cluster))

    def load_profiles(self) -> tuple[Profile, ...]:
        """The profiles of :meth:`profile_names`."""
        return tuple(Profile.load(name) for name in self.profile_names())

    def poor_fits(self) -> list[str]:
        """A sentence for every profile that misses what its fit has not seen by more than it may."""
        return [
            f"The latency profile {p.name} is a poor fit: held out, it misses prefill by "
            f"{100 * p.fit.prefill_mape:.0f} % and decode by {100 * p.fit.decode_mape:.0f} %."
            for p in self.load_profiles()
            if p.fit is not None and p.is_poor
        ]

    def placements(self) -> tuple[Placement, ...]:
        """Every instance, in the order of the cluster's groups."""
        return tuple(self._place(self.load_profiles()))

    def usable_roles(self) -> frozenset[str]:
        """What a policy may arrange instances as: ``decisions.start_roles``, by default the ``decisions.roles`` and the
        cluster's own; anything that the engine can be where none are named."""
        if not self.decisions.roles:
            every = _CAN_PREFILL + _CAN_DECODE
            return frozenset(every if self.engine == "own" else roles_of(self.engine, self.decisions))
        return frozenset(self.decisions.start_roles or self.decisions.roles) | {group.role for group in self.cluster}

    def check_live(self, *, of_others: bool = False) -> None:
        """:param of_others: it is to be played on engines of others, whose router learns of them late by itself
        :raises SlalomError: it is about routers as only the surrogate has them, or about other engines than these
        """
        if self.engine != "own" and not of_others:
            fix = "our engine has other levers: play it with --env remote, or on the surrogate"
            raise SlalomError("engine", self.engine, fix)
        late = self.observation_delay_s > 0 and self.engine == "own"
        if late or self.routers > 1:
            fix = "engines have one router with its own books; leave routers and observation_delay_s out"
            raise SlalomError("routers", f"{self.routers}, {self.observation_delay_s:g} s late", fix)

    def n_gpus(self) -> int:
        """GPUs of the cluster: what goodput per GPU divides by."""
        profiles = dict(zip(self.profile_names(), self.load_profiles(), strict=True))
        return sum(
            profiles[group.profile or self.profile].tp * (1 if group.share_gpu else group.count)
            for group in self.cluster
        )

    def _place(self, profiles: tuple[Profile, ...]) -> Iterator[Placement]:
        names, gpu, pool = self.profile_names(), 0, 0
        for group in self.cluster:
            index = names.index(group.profile or self.profile)
            for k in range(group.count):
                yield Placement(group, gpu, pool, index)
                if not group.share_gpu or k == group.count - 1:
                    gpu, pool = gpu + profiles[index].tp, pool + 1

    def _check_profiles(self, source: str) -> None:
        try:
            profiles = dict(zip(self.profile_names(), self.load_profiles(), strict=True))
        except SlalomError as error:  # which scenario names such a profile
            raise SlalomError(f"{source}: {error.field}", error.value, error.fix) from error
        for i, group in enumerate(self.cluster):
            profile, where = profiles[group.profile or self.profile], f"{source}: cluster.{i}"
            if group.gpus_per_instance not in (None, profile.tp):
                fix = f"{profile.name} was measured on {profile.tp} GPUs per instance; leave it out"
                raise SlalomError(f"{where}.gpus_per_instance", group.gpus_per_instance, fix)
            if group.role == "multiplexed" and len(profile.shares) < 2:
                fix = f"{profile.name} has no SM shares; choose a profile that has, or another role"
                raise SlalomError(f"{where}.role", group.role, fix)
            if "multiplexed" in self.decisions.roles and len(profile.shares) < 2:
                fix = f"{profile.name} has no SM shares; leave multiplexed out"
                raise SlalomError(f"{source}: decisions.roles", list(self.decisions.roles), fix)
            if isinstance(group.split, int):
                profile.row(group.split)


def _replace(content: Any, path: str, value: Any) -> None:
    """Set ``content`` at a dotted path in place."""
    *parents, last = path.split(".")
    at = content
    try:
        for step in parents:
            at = at[int(step) if isinstance(at, list) else step]
        if isinstance(at, list):
            at[int(last)] = value
        else:
            at[last] = value
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise SlalomError(path, value, "no such place in the scenario; see its YAML") from error


def scenarios_dir() -> Path:
    """Folder of the bundled scenarios."""
    return Path(__file__).resolve().parent / "scenarios"


def list_scenarios() -> list[str]:
    """Names of the bundled scenarios, sorted."""
    return sorted(path.stem for path in scenarios_dir().glob("*.yaml"))
