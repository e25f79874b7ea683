"""From what was timed from outside to a latency profile, with its held-out error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.calibration.outside import Limits, held_out
from engine.calibration.points import Measured, arrays
from engine.errors import SlalomError
from engine.latency.fit import MIN_POINTS, DecodeSamples, PrefillSamples, fit_decode, fit_prefill
from engine.latency.profile import FitError, Profile, Provenance, Roofline, Share, pack
from engine.remote.discover import EngineFacts

__all__ = ["fused_error", "profile_of"]

#: Where an engine does not say how much KV it has.
_KV_TOKENS = 2**17


def profile_of(measured: Sequence[Measured], facts: EngineFacts, limits: Limits, name: str) -> Profile:
    """The profile that explains ``measured`` best, its error on the fifth of the points that no fit has seen.

    :raises SlalomError: too few points
    """
    of = {kind: [m for m in measured if m.point.kind == kind] for kind in ("prefill", "decode", "fused")}
    for kind in ("prefill", "decode"):
        if len(of[kind]) < MIN_POINTS:
            raise SlalomError("--budget", f"{len(of[kind])} {kind} points", f"give time for at least {MIN_POINTS}")
    n, p_seconds = map(np.asarray, arrays(of["prefill"], "n", "seconds"))
    bs, ctx, d_seconds = map(np.asarray, arrays(of["decode"], "bs", "ctx", "seconds"))
    prefill = fit_prefill(PrefillSamples(n, np.zeros_like(n), p_seconds))
    decode = fit_decode(DecodeSamples(bs * ctx, bs, d_seconds))
    share = Share(
        sms=1,
        prefill_s=prefill.coefficients,
        knot_tokens=prefill.knot_tokens,
        knot_s=prefill.knot_s,
        decode_small_s=decode.small,
        decode_large_s=decode.large,
    )
    notes = (
        f"Timed from outside, HTTP and host included: {len(of['prefill'])} lone prompts, {len(of['decode'])} decode "
        f"and {len(of['fused'])} fused steps. No roofline was checked, and KV never moves."
    )
    profile = Profile(
        name=name,
        model=facts.model,
        device="unknown",
        engine=f"at {facts.url}",
        provenance=Provenance(source="slalom calibrate --engine", notes=notes),
        n_layers=1,
        total_sms=1,
        max_prompt_tokens=int(n.max()),
        kv_tokens=facts.kv_tokens or _KV_TOKENS,
        kv_bytes_per_token=1.0,
        shares=(share,),
        regime_bs=decode.regime_bs,
        roofline=Roofline(peak_flops=1e18, memory_bytes_per_s=1e18, params=1.0, weight_bytes=1.0),
        fit=FitError(
            prefill_mape=held_out(measured, "prefill"),
            decode_mape=held_out(measured, "decode"),
            n_prefill=len(n),
            n_decode=len(bs),
        ),
    )
    shared = share.model_copy(update={"fused_shared_s": _shared_s(profile, of["fused"])})
    return profile.model_copy(update={"shares": (shared,)})


def _alone_s(profile: Profile, m: Measured) -> tuple[float, float]:
    p = m.point
    return profile.prefill_s(p.n), profile.decode_s(p.bs * p.ctx, p.bs)


def _shared_s(profile: Profile, fused: Sequence[Measured]) -> float:
    """What a step saves that computes a prompt beside decodes: median over the steps, at most a decode step alone."""
    saved = []
    for m in fused:
        prefill, decode = _alone_s(profile, m)
        saved.append(min(max(prefill + decode - m.seconds, 0.0), decode))
    return float(np.median(saved)) if saved else 0.0


def fused_error(profile: Profile, measured: Sequence[Measured]) -> float:
    """Mean absolute relative error of the fused steps; NaN without any."""
    _, share = pack([profile])
    off = []
    for m in measured:
        if m.point.kind == "fused":
            prefill, decode = _alone_s(profile, m)
            saved = min(float(share[0, 0]["fused_shared_s"]), decode, prefill)
            off.append(abs(prefill + decode - saved - m.seconds) / m.seconds)
    return float(np.mean(off)) if off else float("nan")
