"""``policy.json``: what a checkpoint says about itself, as a strict schema."""

from __future__ import annotations

import hashlib
import json
from enum import StrEnum
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from engine.common.names import Name
from engine.core.columns import CANDIDATE_DIMENSIONLESS, Kind
from engine.core.policy import InstancePlan
from policies.network.features import CANDIDATE_NAMES, CONTEXT_NAMES
from policies.network.normalise import Normalisation

FORMAT: Literal["slalom-policy"] = "slalom-policy"
VERSION = 1

_CONTEXT = CONTEXT_NAMES
_CANDIDATE = CANDIDATE_NAMES[:CANDIDATE_DIMENSIONLESS]
_ACTIONS = {
    Kind.PLACE_PREFILL: ["instance", "HOLD", "SHED"],
    Kind.PLACE_DECODE: ["instance"],
    Kind.REALLOCATE: ["KEEP", "instance and new role"],
    Kind.TUNE: ["KEEP", "SM split down/up", "chunk budget down/up"],
}


def column_hash() -> str:
    """SHA-256 over names and order of the columns a network reads: it fits no core with others. Raw columns may come
    and go; only rules read those, and a rule is code of this package."""
    layout = [list(CONTEXT_NAMES), list(CANDIDATE_NAMES)]
    return hashlib.sha256(json.dumps(layout).encode()).hexdigest()


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Architecture(StrEnum):
    """The networks that ``policies.network.compiled`` can run."""

    SCORING = "scoring-v1"
    GUIDED = "scoring-v2"  # with gates and a bonus for the base rule's answer


class Feature(_Strict):
    """One input of the network. All are dimensionless; the columns' comments give the quotient."""

    name: str
    unit: Literal["1"] = "1"
    scale: Annotated[FiniteFloat, Field(gt=0)] = 1.0
    log: bool = False


class NormalisationRecord(_Strict):
    """See ``policies.network.normalise``."""

    bound: Annotated[FiniteFloat, Field(gt=0)]
    context: list[Feature]
    candidate: list[Feature]

    @classmethod
    def of(cls, normal: Normalisation) -> NormalisationRecord:
        def features(names: tuple[str, ...], scale: np.ndarray, log: np.ndarray) -> list[Feature]:
            rows = zip(names, scale, log, strict=True)
            return [Feature(name=n, scale=float(s), log=bool(flag)) for n, s, flag in rows]

        return cls(
            bound=normal.bound,
            context=features(CONTEXT_NAMES, normal.context_scale, normal.context_log),
            candidate=features(CANDIDATE_NAMES, normal.candidate_scale, normal.candidate_log),
        )

    def constants(self) -> Normalisation:
        """The arrays that both runtimes take."""
        return Normalisation(
            context_scale=np.array([f.scale for f in self.context]),
            context_log=np.array([f.log for f in self.context]),
            candidate_scale=np.array([f.scale for f in self.candidate]),
            candidate_log=np.array([f.log for f in self.candidate]),
            bound=self.bound,
        )

    @model_validator(mode="after")
    def _names_fit(self) -> NormalisationRecord:
        if tuple(f.name for f in self.context) != CONTEXT_NAMES:
            raise ValueError("context features differ from this version's")
        if tuple(f.name for f in self.candidate) != CANDIDATE_NAMES:
            raise ValueError("candidate features differ from this version's")
        return self


class RuleRecord(_Strict):
    """A rule with its values."""

    name: Name
    values: dict[str, FiniteFloat | int | str] = {}


class PlanRecord(_Strict):
    """One instance of the static arrangement; see :class:`engine.core.policy.InstancePlan`."""

    role: Annotated[int, Field(ge=0, le=3)] | None = None
    chunk_tokens: Annotated[int, Field(gt=0)] | None = None
    batching: Annotated[int, Field(ge=0, le=2)] | None = None
    split: int | None = None
    table: tuple[tuple[int, int], ...] | None = None
    layer_tokens: Annotated[int, Field(ge=0)] | None = None
    stand_aside: bool | None = None
    headroom: FiniteFloat | None = None
    prefill_tokens: Annotated[int, Field(gt=0)] | None = None
    order: Annotated[int, Field(ge=0)] | None = None

    def plan(self) -> InstancePlan:
        return InstancePlan(**self.model_dump())


class NetworkRecord(_Strict):
    """Shape of a learned policy and the digest of its weights."""

    architecture: Architecture = Architecture.GUIDED
    hidden: Annotated[int, Field(ge=4, le=1024, multiple_of=4)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Golden(_Strict):
    """One decision with known logits: dimensionless inputs, masked rows left out of ``logits``."""

    context: list[FiniteFloat]
    candidates: list[list[FiniteFloat]]
    mask: list[Annotated[int, Field(ge=0, le=1)]]
    logits: list[FiniteFloat]


class Bounds(_Strict):
    """Least and greatest value seen in training, per dimensionless column."""

    context: dict[str, tuple[FiniteFloat, FiniteFloat]] = {}
    candidate: dict[str, tuple[FiniteFloat, FiniteFloat]] = {}

    @model_validator(mode="after")
    def _known(self) -> Bounds:
        for names, given in ((_CONTEXT, self.context), (_CANDIDATE, self.candidate)):
            for name, (low, high) in given.items():
                if name not in names:
                    raise ValueError(f"{name} is no dimensionless column")
                if low > high:
                    raise ValueError(f"{name}: the lower bound is above the upper one")
        return self

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Float64 (2, context) and (2, candidate): least and greatest value, ±inf where none is given."""
        both = []
        for names, given in ((_CONTEXT, self.context), (_CANDIDATE, self.candidate)):
            pairs = [given.get(name, (-np.inf, np.inf)) for name in names]
            both.append(np.array(pairs, np.float64).T.copy())
        return both[0], both[1]


class Manifest(_Strict):
    """The whole of ``policy.json``."""

    format: Literal["slalom-policy"] = FORMAT
    version: Annotated[int, Field(ge=1, le=VERSION)] = VERSION
    kind: Literal["network", "rule"]
    name: Annotated[Name, Field(min_length=1)]
    columns_sha256: str
    actions: dict[str, list[str]] = {kind.name: actions for kind, actions in _ACTIONS.items()}
    rule: RuleRecord  # kind rule: the policy itself; kind network: its base
    arrangement: list[PlanRecord] | None = None
    fitted: bool = False  # each instance takes the plan of the arrangement that suits its profile best
    network: NetworkRecord | None = None
    normalisation: NormalisationRecord | None = None
    golden: list[Golden] = []
    scenario: Name = ""
    scenario_sha256: str = ""
    training: dict[str, Any] = {}
    evaluation: list[dict[str, Any]] = []
    fidelity: dict[str, Any] = {}
    bounds: Bounds = Bounds()
    fallback: Name = "least_tokens"

    @model_validator(mode="after")
    def _complete(self) -> Manifest:
        if (self.kind == "network") != (self.network is not None and self.normalisation is not None):
            raise ValueError("a network needs `network` and `normalisation`, a rule has neither")
        return self
