"""Scenarios: one YAML that says which cluster serves which workload, under which targets, with which levers.

A scenario is everything an evaluation depends on besides the policy, the rate and the seed. Unknown keys,
wrong types and settings that contradict each other are errors that name file, field, value and remedy.
``Scenario.load("azure-conv-4xa100").to_yaml()`` shows every default.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from engine.common.regular import check_regular
from engine.core.setup import LEAST_INTERVAL_S
from engine.errors import SlalomError
from engine.latency import Profile
from engine.latency.profile import bad_input
from env.workload import WorkloadSpec

__all__ = [
    "Decisions",
    "InstanceGroup",
    "Links",
    "Placement",
    "Rates",
    "Scenario",
    "SloClass",
    "list_scenarios",
    "scenarios_dir",
]

RoleName = Literal["prefill", "decode", "mixed", "multiplexed"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Interval = Annotated[float, Field(ge=LEAST_INTERVAL_S, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Rows = Annotated[int, Field(ge=1, le=2**16)]
Regime = Literal[
    "prefill-bound", "balanced", "decode-bound", "tiny", "prefix-bound", "bursty", "shifting", "slo-classes"
]
#: Targets above these are none (an hour and more for a first token, a minute for each further one); clocks would
#: overflow on them, and attainment would be a number without a meaning.
_LONGEST_TTFT_S, _LARGEST_FACTOR, _LONGEST_TPOT_S = 86_400.0, 10_000.0, 60.0
_CAN_PREFILL = ("prefill", "mixed", "multiplexed")
_CAN_DECODE = ("decode", "mixed", "multiplexed")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class InstanceGroup(_Strict):
    """Instances that are alike.

    :param count: how many, up to 65536 (as ``max_batch`` and ``max_prefills``)
    :param role: what they do at the start
    :param profile: latency profile, by name or path (None: the scenario's)
    :param gpus_per_instance: tensor parallelism; checked against the profile (None: the profile's)
    :param share_gpu: they sit on one GPU and share its KV pool; moving KV between them is free
    :param batching: how steps are formed (None: layered for multiplexed, else chunked)
    :param chunk_tokens: token budget of a fused step, or of a prefill chunk
    :param prefill_tokens: token budget of a whole-prompt prefill batch
    :param max_batch: running sequences
    :param max_prefills: prompts in one prefill batch
    :param split: SMs for decode while both lanes run; "auto": the predictor's choice; "on_demand": fused steps on
        all SMs, split only while one would miss the target (chunked)
    :param headroom: the predictor aims at this part of the TPOT target
    :param order: prefill queue first come first served, or shortest remaining first; preemptive: at every chunk;
        on_time: earliest TTFT deadline first, prompts that make too many others late last
        (a prefill instance then computes chunks of ``chunk_tokens``)
    :param kv_tokens: KV capacity of one instance (None: the profile's); of the GPU when shared
    """

    count: Rows
    role: RoleName
    profile: str | None = None
    gpus_per_instance: Count | None = None
    share_gpu: bool = False
    batching: Literal["chunked", "prefill_first", "layered"] | None = None
    chunk_tokens: Count = 512
    prefill_tokens: Count = 8192
    max_batch: Rows = 256
    max_prefills: Rows = 128
    split: Literal["auto", "on_demand"] | Count = "auto"
    headroom: Annotated[float, Field(gt=0, le=2)] = 0.9
    order: Literal["fcfs", "srf", "srf_preemptive", "on_time"] = "fcfs"
    kv_tokens: Count | None = None

    @field_validator("batching")
    @classmethod
    def _batching_fits(cls, value: str | None, info: ValidationInfo) -> str | None:
        role = info.data.get("role")
        if value == "layered" and role != "multiplexed":
            raise ValueError("layered needs role multiplexed; use chunked or prefill_first")
        if value == "prefill_first" and role == "multiplexed":
            raise ValueError("a multiplexed instance slices its prefill: use layered or chunked")
        return value

    @field_validator("split")
    @classmethod
    def _split_fits(cls, value: str | int, info: ValidationInfo) -> str | int:
        if value != "auto" and info.data.get("role") != "multiplexed":
            raise ValueError("a split needs role multiplexed; leave it at auto")
        return value

    @property
    def batching_used(self) -> Literal["chunked", "prefill_first", "layered"]:
        """``batching`` with the default of the role filled in."""
        return self.batching or ("layered" if self.role == "multiplexed" else "chunked")


class Links(_Strict):
    """What KV travels on between GPUs.

    :param bandwidth_gb_s: gigabytes (1e9) per second of one link; 0 or .inf: transfers cost nothing
    :param latency_ms: fixed part of a transfer (None: the receiving profile's)
    :param contention: one link into every instance, or one shared by all
    """

    bandwidth_gb_s: NonNegative = 50.0
    latency_ms: NonNegative | None = None
    contention: Literal["ingress", "shared"] = "ingress"

    @field_validator("bandwidth_gb_s", mode="before")
    @classmethod
    def _free(cls, value: Any) -> Any:
        return 0.0 if isinstance(value, float) and value == math.inf else value


class SloClass(_Strict):
    """A class of requests and its targets.

    :param share: of all requests; the shares of a scenario add up to 1
    :param weight: of one request in reward and goodput
    :param ttft_s: target of the time to the first token; with a factor, the least target; more than 26 days is as 26
    :param ttft_factor: target as a multiple of the request's isolated prefill time (0: fixed target)
    :param tpot_s: target of the mean time per output token
    """

    name: Annotated[str, Field(min_length=1)]
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    weight: Positive = 1.0
    ttft_s: Annotated[float, Field(ge=0, le=_LONGEST_TTFT_S, allow_inf_nan=False)] = 0.0
    ttft_factor: Annotated[float, Field(ge=0, le=_LARGEST_FACTOR, allow_inf_nan=False)] = 0.0
    tpot_s: Annotated[float, Field(gt=0, le=_LONGEST_TPOT_S, allow_inf_nan=False)]

    @model_validator(mode="after")
    def _has_target(self) -> SloClass:
        if self.ttft_s == 0 and self.ttft_factor == 0:
            raise ValueError("give ttft_s, ttft_factor or both")
        return self


class Decisions(_Strict):
    """Which levers a policy holds.

    :param place_prefill: choose an instance for every arrival (always)
    :param hold: may answer "not now"
    :param shed: may refuse a request
    :param place_decode: choose where to decode after every prefill, also where staying is possible
    :param reallocate: change roles at control intervals, to one of ``roles``
    :param tune: change SM split and chunk budget at control intervals
    """

    place_prefill: Literal[True] = True
    hold: bool = False
    shed: bool = False
    place_decode: bool = False
    reallocate: bool = False
    roles: tuple[RoleName, ...] = ()
    tune: bool = False

    @model_validator(mode="after")
    def _check(self) -> Decisions:
        if self.reallocate and len(set(self.roles)) < 2:
            raise ValueError("reallocate needs two roles or more, e.g. roles: [prefill, decode]")
        if self.roles and not self.reallocate:
            raise ValueError("roles do nothing without reallocate: true")
        return self


class Rates(_Strict):
    """Requests per second of the whole cluster between which goodput is searched."""

    low: Positive
    high: Positive

    @field_validator("high")
    @classmethod
    def _above_low(cls, value: float, info: ValidationInfo) -> float:
        if value <= info.data.get("low", 0.0):
            raise ValueError("high must be above low")
        return value


@dataclass(frozen=True)
class Placement:
    """One instance: its group, and indices of its (first) GPU, KV pool and profile."""

    group: InstanceGroup
    gpu: int
    pool: int
    profile: int


class Scenario(_Strict):
    """See the module docstring.

    :param profile: latency profile of every group that names none, by name or path
    :param cluster: groups of instances
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
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str
    regime: Regime
    profile: str
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
            if not path.is_file():
                raise SlalomError("scenario", str(name_or_path), "use one of: " + ", ".join(list_scenarios()))
        check_regular(path)
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise SlalomError("scenario", str(path), f"give a readable YAML file ({error})") from error
        return cls.parse(content, path.name)

    @classmethod
    def parse(cls, content: Any, source: str = "scenario") -> Scenario:
        """Validate parsed YAML.

        :param source: named in errors
        """
        try:
            scenario = cls.model_validate_json(json.dumps(content, default=str))
        except ValidationError as error:
            raise bad_input(source, error) from error
        scenario._check_profiles(source)
        return scenario

    def to_yaml(self) -> str:
        """The scenario with every default shown; loading it gives an equal scenario."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=110))

    def with_overrides(self, overrides: Mapping[str, Any]) -> Scenario:
        """A copy with some fields replaced, validated again.

        :param overrides: by dotted path, e.g. ``{"cluster.0.count": 8, "rates.high": 40.0}``
        :raises SlalomError: unknown path or refused value
        """
        content = self.model_dump(mode="json")
        for path, value in overrides.items():
            _replace(content, path, value)
        return Scenario.parse(content, self.name)

    def hash(self) -> str:
        """SHA-256 (hex) of everything but the description, the same on every machine."""
        content = self.model_dump(mode="json", exclude={"description"})
        if self.tail_factor == Scenario.model_fields["tail_factor"].default:
            del content["tail_factor"]  # younger than the hashes in checkpoints
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    # -- what it means ---------------------------------------------------------------------------------

    def profile_names(self) -> tuple[str, ...]:
        """Distinct profiles in the order of their first use; ``Placement.profile`` counts in it."""
        return tuple(dict.fromkeys(group.profile or self.profile for group in self.cluster))

    def load_profiles(self) -> tuple[Profile, ...]:
        """The profiles of :meth:`profile_names`."""
        return tuple(Profile.load(name) for name in self.profile_names())

    def placements(self) -> tuple[Placement, ...]:
        """Every instance, in the order of the cluster's groups."""
        return tuple(self._place(self.load_profiles()))

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
        profiles = dict(zip(self.profile_names(), self.load_profiles(), strict=True))
        for i, group in enumerate(self.cluster):
            profile, where = profiles[group.profile or self.profile], f"{source}: cluster.{i}"
            if group.gpus_per_instance not in (None, profile.tp):
                fix = f"{profile.name} was measured on {profile.tp} GPUs per instance; leave it out"
                raise SlalomError(f"{where}.gpus_per_instance", group.gpus_per_instance, fix)
            if group.role == "multiplexed" and len(profile.shares) < 2:
                fix = f"{profile.name} has no SM shares; choose a profile that has, or another role"
                raise SlalomError(f"{where}.role", group.role, fix)
            if isinstance(group.split, int):
                profile.row(group.split)


class _UniqueKeys(yaml.SafeLoader):
    """The safe loader, refusing a key given twice (plain YAML keeps the last without a word)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", node.start_mark)
        return dict(super().construct_mapping(node, deep))


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
