"""How features are brought to a common size before the network: fixed constants, the same in both runtimes.

    y = clip(s(x) ÷ scale, ±bound),   s(x) = sign(x) · log(1 + |x|) where ``log`` is set, else x

Constants are fixed rather than running means, so a checkpoint means the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.core.columns import Col, Ctx
from policies.network.features import CANDIDATE_NAMES, CONTEXT_NAMES, LATE, SLACK_MISS, STEP_MISS

#: Ratios to a target have heavy tails under overload; shares and one-hots do not.
_HEAVY_CONTEXT = (
    *(Ctx.SIZE, Ctx.AGE, Ctx.TPOT_TIGHTNESS, Ctx.LOAD_MEAN, Ctx.LOAD_MIN, Ctx.PREFILL_RHO),
    *(Ctx.DECODE_RHO, Ctx.HELD, Ctx.PROMPT_RATIO, Ctx.EXPECTED_OUTPUT),
)
_HEAVY_CANDIDATE = (
    *(Col.TTFT, Col.WAIT, Col.PREFILL, Col.SLACK, Col.SLACK_AFTER, Col.STEP, Col.STEP_WITH, Col.INBOUND),
    *(Col.QUEUE_WORK, LATE, SLACK_MISS, STEP_MISS),
)


@dataclass(frozen=True, eq=False)
class Normalisation:
    """``scale`` float64 and ``log`` bool per context feature and per candidate feature; one ``bound``."""

    context_scale: np.ndarray
    context_log: np.ndarray
    candidate_scale: np.ndarray
    candidate_log: np.ndarray
    bound: float = 5.0


def default_normalisation() -> Normalisation:
    """Logarithm for the heavy-tailed columns, scale 1, bound 5 (x = 147 under the logarithm)."""

    def flags(names: tuple[str, ...], heavy: tuple[int, ...]) -> np.ndarray:
        return np.isin(np.arange(len(names)), [int(h) for h in heavy])

    return Normalisation(
        context_scale=np.ones(len(CONTEXT_NAMES)),
        context_log=flags(CONTEXT_NAMES, _HEAVY_CONTEXT),
        candidate_scale=np.ones(len(CANDIDATE_NAMES)),
        candidate_log=flags(CANDIDATE_NAMES, _HEAVY_CANDIDATE),
    )
