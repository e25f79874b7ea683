"""``calibrate --engine URL``: a running engine of others, timed from outside."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.calibration.from_outside import fused_error, profile_of, step_errors
from engine.calibration.outside import Limits, measure
from engine.common.progress import Display
from engine.latency.profile import POOR_FIT, Profile
from engine.remote.discover import discover
from engine.remote.steps import paced, read_steps, steps_so_far


def command(url: str, out: Path, limits: Limits, as_json: bool, beside: Sequence[str], share: float) -> None:
    """Time the engine at ``url``, write its profile to ``out`` and say how good it is.

    :param beside: engines on the same hardware, which compute for ``share`` of the time meanwhile

    :raises SlalomError: no engine there, one that cannot be timed, or too little time
    """
    facts, others = discover(url), [discover(other) for other in beside]
    limits = limits.within(facts)
    print(f"timing {facts.model} at {url}; nobody else should use it meanwhile", file=sys.stderr)
    begin, before = time.monotonic(), steps_so_far(url)
    with Display() as display:
        display.phase("calibrate")
        measured, stopped = measure(facts, limits, display.update, beside=others, beside_share=share)
    profile = profile_of(measured, facts, out.stem, beside=len(others), share=share)
    profile.save(out)
    errors = {} if before is None else step_errors(profile, paced(read_steps(url, before)))
    how = {"seconds": round(time.monotonic() - begin, 1), "stopped": stopped, "out": str(out)}
    say(profile, fused_error(profile, measured), errors, how, as_json)


def say(
    profile: Profile, fused: float, errors: dict[str, dict[str, float]], how: dict[str, Any], as_json: bool
) -> None:
    """Print how good ``profile`` is.

    :param fused: its error on fused steps, NaN without any; ``errors``: those on the engine's own steps, by kind
    :param how: it came about: ``seconds``, why it ``stopped``, ``out``
    """
    found = _facts(profile, fused) | ({"steps": errors} if errors else {}) | how
    print(json.dumps(found, indent=1) if as_json else _text(found))


def _facts(profile: Profile, fused: float) -> dict[str, Any]:
    assert profile.fit is not None
    return {
        "profile": profile.name,
        "prefill_held_out_error": profile.fit.prefill_mape,
        "decode_held_out_error": profile.fit.decode_mape,
        "fused_error": None if fused != fused else fused,
        "points": {"prefill": profile.fit.n_prefill, "decode": profile.fit.n_decode},
        "poor_fit": profile.is_poor,
        "max_prompt_tokens": profile.max_prompt_tokens,
        "kv_tokens": profile.kv_tokens,
    }


def _text(found: dict[str, Any]) -> str:
    fused = "not seen" if found["fused_error"] is None else f"{100 * found['fused_error']:.1f} %"
    prefill, decode = 100 * found["prefill_held_out_error"], 100 * found["decode_held_out_error"]
    points = found["points"]
    lines = [
        f"{found['profile']}: {found['stopped']} after {found['seconds']} s",
        f"  held-out error: prefill {prefill:.1f} % of {points['prefill']} points, "
        f"decode {decode:.1f} % of {points['decode']}; fused steps {fused}",
        f"  prompts up to {found['max_prompt_tokens']} tokens; KV capacity {found['kv_tokens']} tokens",
    ]
    for kind, e in found.get("steps", {}).items():
        said = f"off by {100 * e['mape']:.1f} % on average (mean {100 * e['bias']:+.1f} %)"
        lines.append(f"  the engine's own {e['n']} {kind} steps: {said}")
    if found["poor_fit"]:
        lines.append(
            f"  POOR FIT: an error is above {100 * POOR_FIT:.0f} %. Repeat it while nobody else uses engine and"
        )
        lines.append("  machine; train-policy refuses this profile without --accept-poor-fit")
    return "\n".join([*lines, f"wrote {found['out']}"])
