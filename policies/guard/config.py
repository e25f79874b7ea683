"""What the guard allows: one validated object, from a YAML or JSON file and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from engine.common.documents import bad_input, read_json
from engine.common.yaml_documents import read_yaml
from engine.errors import SlalomError

Positive = Annotated[FiniteFloat, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BreakerConfig(_Strict):
    """After ``failures`` within ``window_s`` the fallback answers everything for ``cooldown_s``; then single decisions
    go to the policy, and ``probes`` good ones in a row close the breaker. A bad one doubles the cooldown."""

    failures: Annotated[int, Field(ge=1)] = 5
    window_s: Positive = 30.0
    cooldown_s: Positive = 10.0
    max_cooldown_s: Positive = 300.0
    probes: Annotated[int, Field(ge=1)] = 3


class RoleConfig(_Strict):
    """Bounds on what a policy may change about the instances.

    ``min_prefill`` and ``min_decode`` instances stay able to do each; ``cooldown_s`` between the beginnings of two
    changes and at most ``max_per_hour``, as many at once as the scenario or server allows; a change that is not seen
    done after ``verify_s`` is an alarm, and the last one."""

    min_prefill: Annotated[int, Field(ge=1)] = 1
    min_decode: Annotated[int, Field(ge=1)] = 1
    cooldown_s: Annotated[FiniteFloat, Field(ge=0)] = 10.0
    max_per_hour: Annotated[int, Field(ge=0)] = 60
    verify_s: Positive = 60.0


class DriftConfig(_Strict):
    """Alarm when actual TTFT or TPOT is off the prediction by more than a factor 1 + ``tolerance``, smoothed over some
    ``memory`` requests; with ``demote`` the fallback decides while it lasts."""

    tolerance: Positive = 0.5
    memory: Annotated[int, Field(ge=2)] = 100
    min_requests: Annotated[int, Field(ge=1)] = 50
    demote: bool = False


class LogConfig(_Strict):
    """See :class:`policies.guard.log.log.DecisionLog`."""

    path: str | None = None
    max_mb: Positive = 64.0
    keep: Annotated[int, Field(ge=0)] = 5
    features: Literal["compact", "full"] = "compact"
    ring_mb: Annotated[int, Field(ge=1, le=1024)] = 16
    writer: Literal["process", "thread"] = "process"


class GuardConfig(_Strict):
    """Everything about the guard.

    :param fallback: rule that answers where the policy may not, ``NAME:parameter=value`` included; by default the one
        that a checkpoint names, else least_tokens
    :param deadline_us: an answer later than this is not used. Code of this package is timed on the processor's clock,
        everything else runs in a thread of its own and is left there when the time is up
    :param isolate: ``auto`` gives that thread to code that is not of this package, ``always`` to every policy
    :param advisory: ask the policy and log its answer, but act by the fallback
    :param ood_margin: features may leave the bounds of training by this share of their width
    :param predict: compute predictions also for a policy that reads none, for the log and the drift alarm
    """

    fallback: str | None = None
    deadline_us: Positive = 2000.0
    isolate: Literal["auto", "always"] = "auto"
    advisory: bool = False
    ood_margin: Annotated[FiniteFloat, Field(ge=0)] = 0.25
    predict: bool = True
    breaker: BreakerConfig = BreakerConfig()
    roles: RoleConfig = RoleConfig()
    drift: DriftConfig = DriftConfig()
    log: LogConfig = LogConfig()

    @classmethod
    def load(cls, path: str | Path | None = None, **given: Any) -> GuardConfig:
        """The file at ``path`` (YAML or JSON, any part of it), with what ``given`` says and is not None on top.

        :raises SlalomError: unreadable, an unknown field, a value out of range
        """
        data: Any = {}
        where = str(path or "guard")
        if path is not None:
            reader = read_json if str(path).endswith(".json") else read_yaml
            data = reader(path, "--guard-config") or {}
            if not isinstance(data, dict):
                raise SlalomError("--guard-config", where, "write a mapping, e.g. `deadline_us: 500`")
        try:
            config = cls.model_validate(data)
            return cls.model_validate(config.model_dump() | {k: v for k, v in given.items() if v is not None})
        except ValidationError as error:
            raise bad_input(where, error) from error
