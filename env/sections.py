"""The sections of a scenario, and the ranges of their numbers."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from engine.common.names import Name
from engine.core.setup import LEAST_INTERVAL_S

RoleName = Literal["prefill", "decode", "mixed", "multiplexed"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Interval = Annotated[float, Field(ge=LEAST_INTERVAL_S, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
#: A minute is more than any system takes to tell its router; 1024 routers are more than any has.
Delay = Annotated[float, Field(ge=0, le=60, allow_inf_nan=False)]
Routers = Annotated[int, Field(ge=1, le=1024)]
Rows = Annotated[int, Field(ge=1, le=2**16)]


#: Targets above these are none (an hour and more for a first token, a minute for each further one); clocks would
#: overflow on them, and attainment would be a number without a meaning.
LONGEST_TTFT_S = 86_400.0
LARGEST_FACTOR = 10_000.0
LONGEST_TPOT_S = 60.0


class Section(BaseModel):
    """A part of a scenario: no unknown key, no guessed type, never changed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class InstanceGroup(Section):
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


class Links(Section):
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


class SloClass(Section):
    """A class of requests and its targets.

    :param share: of all requests; the shares of a scenario add up to 1
    :param weight: of one request in reward and goodput
    :param ttft_s: target of the time to the first token, at most a day; with a factor, the least target
    :param ttft_factor: target as a multiple of the request's isolated prefill time (0: fixed target)
    :param tpot_s: target of the mean time per output token, at most a minute
    """

    name: Annotated[Name, Field(min_length=1)]
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    weight: Positive = 1.0
    ttft_s: Annotated[float, Field(ge=0, le=LONGEST_TTFT_S, allow_inf_nan=False)] = 0.0
    ttft_factor: Annotated[float, Field(ge=0, le=LARGEST_FACTOR, allow_inf_nan=False)] = 0.0
    tpot_s: Annotated[float, Field(gt=0, le=LONGEST_TPOT_S, allow_inf_nan=False)]

    @model_validator(mode="after")
    def _has_target(self) -> SloClass:
        if self.ttft_s == 0 and self.ttft_factor == 0:
            raise ValueError("give ttft_s, ttft_factor or both")
        return self


#: Fields of :class:`Decisions` that say how roles change.
ROLE_CHANGES = ("reallocate", "roles", "start_roles", "at_once", "drain")


class Decisions(Section):
    """Which levers a policy holds.

    :param place_prefill: choose an instance for every arrival (always)
    :param hold: may answer "not now"
    :param shed: may refuse a request
    :param place_decode: choose where to decode after every prefill, also where staying is possible
    :param reallocate: change roles at control intervals, to one of ``roles``
    :param roles: what instances may become
    :param start_roles: what a policy may arrange them as before it starts; empty: as ``roles`` and the cluster say
    :param at_once: role changes under way at the same time
    :param drain: a role change waits for the end of running decodes, or hands them over to other instances
    :param tune: change SM split and chunk budget at control intervals
    """

    place_prefill: Literal[True] = True
    hold: bool = False
    shed: bool = False
    place_decode: bool = False
    reallocate: bool = False
    roles: tuple[RoleName, ...] = ()
    start_roles: tuple[RoleName, ...] = ()
    at_once: Rows = 1
    drain: Literal["wait", "hand_over"] = "wait"
    tune: bool = False

    @model_validator(mode="after")
    def _check(self) -> Decisions:
        if self.reallocate and len(set(self.roles)) < 2:
            raise ValueError("reallocate needs two roles or more, e.g. roles: [prefill, decode]")
        if self.roles and not self.reallocate:
            raise ValueError("roles do nothing without reallocate: true")
        if (self.at_once > 1 or self.drain != "wait" or self.start_roles) and not self.reallocate:
            raise ValueError("at_once, drain and start_roles do nothing without reallocate: true")
        return self


class Randomised(Section):
    """What training draws anew, all values alike, for every episode; empty: what the scenario says. Validation and test
    windows always run as the scenario says.

    :param observation_delay_s: e.g. ``[0.0, 0.1, 1.0]``
    :param routers: e.g. ``[1, 2, 4]``
    """

    observation_delay_s: tuple[Delay, ...] = ()
    routers: tuple[Routers, ...] = ()


class Rates(Section):
    """Requests per second of the whole cluster between which goodput is searched."""

    low: Positive
    high: Positive

    @field_validator("high")
    @classmethod
    def _above_low(cls, value: float, info: ValidationInfo) -> float:
        if value <= info.data.get("low", 0.0):
            raise ValueError("high must be above low")
        return value
