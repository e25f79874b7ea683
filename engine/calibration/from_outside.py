"""From what was timed from outside to a latency profile, with its held-out error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.calibration.outside import held_out
from engine.calibration.points import Measured, arrays
from engine.errors import SlalomError
from engine.latency.fit import MIN_POINTS, DecodeSamples, PrefillSamples, fit_decode, fit_prefill
from engine.latency.profile import FitError, Profile, Provenance, Roofline, Share, pack
from engine.remote.discover import EngineFacts

#: Where an engine does not say how much KV it has.
KV_TOKENS = 2**17


def profile_of(
    measured: Sequence[Measured], facts: EngineFacts, name: str, *, how: str = "", beside: int = 0, share: float = 0.0
) -> Profile:
    """The profile that explains ``measured`` best, its error on the fifth of the points that no fit has seen.

    :param how: the steps came to be known, for its provenance; from outside unless it says otherwise
    :param beside: engines on the same hardware that were busy for ``share`` of the time meanwhile

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
    row = Share(
        sms=1,
        prefill_s=prefill.coefficients,
        knot_tokens=prefill.knot_tokens,
        knot_s=prefill.knot_s,
        decode_small_s=decode.small,
        decode_large_s=decode.large,
    )
    company = f"{beside} more engines on its hardware computed for {share:.0%} of the time. " if beside else ""
    notes = company + (
        f"{how or 'Timed from outside, HTTP and host included'}: {len(of['prefill'])} prompts, {len(of['decode'])} "
        f"decode and {len(of['fused'])} fused steps. No roofline was checked, and KV never moves."
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
        kv_tokens=facts.kv_tokens or KV_TOKENS,
        kv_bytes_per_token=1.0,
        shares=(row,),
        regime_bs=decode.regime_bs,
        roofline=Roofline(peak_flops=1e18, memory_bytes_per_s=1e18, params=1.0, weight_bytes=1.0),
        fit=FitError(
            prefill_mape=held_out(measured, "prefill"),
            decode_mape=held_out(measured, "decode"),
            n_prefill=len(n),
            n_decode=len(bs),
        ),
    )
    shared = row.model_copy(update={"fused_shared_s": _shared_s(profile, of["fused"])})
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


def step_errors(profile: Profile, steps: np.ndarray) -> dict[str, dict[str, float]]:
    """How far ``profile`` is from the engine's own ``steps`` (:func:`engine.remote.steps.paced`), by kind of step.

    The engine tells how much KV is in use, not the contexts of a step: that is taken for their sum.

    :return: for each kind that was seen ``n``, ``mape`` (mean absolute relative error) and ``bias`` (mean error)
    """
    _, share = pack([profile])
    shared = float(share[0, 0]["fused_shared_s"])
    off: dict[str, list[float]] = {"prefill": [], "decode": [], "fused": []}
    for step in steps[steps["prompts"] <= 1]:  # of several prompts the square of each would have to be known
        n, bs = int(step["prompt_tokens"]), int(step["decodes"])
        if n + bs == 0 or step["elapsed_s"] <= 0.0:
            continue
        context = max(round(float(step["kv"]) * profile.kv_tokens) - n, bs)
        prefill = profile.prefill_s(n) if n else 0.0
        decode = profile.decode_s(context, bs) if bs else 0.0
        kind = "fused" if n and bs else "prefill" if n else "decode"
        predicted = prefill + decode - (min(shared, prefill, decode) if kind == "fused" else 0.0)
        off[kind].append(predicted / float(step["elapsed_s"]) - 1.0)
    return {
        kind: {"n": len(found), "mape": float(np.abs(found).mean()), "bias": float(np.mean(found))}
        for kind, found in off.items()
        if found
    }
