"""A latency profile of somebody else's running engine, from its request log alone.

The surrogate serves the logged arrivals under the engine's own scheduling settings; six step coefficients (seconds per
prompt token, prefill step, context token, sequence, decode step, and saved by a fused step) are searched under which
every request comes out when it did. vLLM V1's rules are options of the core, not of this fit: running requests first,
no blocks held back, a prompt starts when all of it fits (``scheduler_reserve_full_isl``), none in a step that
preempted, a preempted request finds what is left of its blocks in the prefix cache.

Where a benchmark's result has the gaps between tokens, steps are read off them instead (:mod:`eval.calibrate.gaps`).

With prefix caching on, requests that run together may share KV; a log does not say how much. That share is a seventh,
bounded unknown, found on the same requests; it stands in the profile's provenance and in its ``kv_tokens``.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize

from engine.calibration.from_outside import profile_of as profile_of_steps
from engine.calibration.points import Measured
from engine.core.kinds import Batching, Role
from engine.core.setup import ClusterOptions, InstanceSpec, SloClass, blank_requests, new_cluster
from engine.core.ticks import arrival_ticks
from engine.errors import SlalomError
from engine.latency.evaluate import TICKS_PER_S
from engine.latency.profile import FitError, Profile, Provenance, Roofline, Share, pack
from engine.latency.rough import device_tables
from engine.remote.discover import EngineFacts
from env.surrogate.clock import new_sim
from env.surrogate.simulate import driver
from eval.calibrate.gaps import steps_of
from eval.calibrate.request_log import EngineSettings, RequestLog, read_bench, read_log, read_settings
from policies.load import load_policy
from policies.setting import Setting

#: Where the search starts: an 8B model on a GPU of about 1 TB/s.
START = np.array([5e-5, 2e-3, 1e-7, 2e-5, 1.5e-2, 5e-3])
#: Shares of KV that concurrent requests may have in common; tried in turn when prefix caching is on.
SHARED_KV = (0.0, 0.01, 0.02, 0.03)
STATISTICS = ("mean", "p50", "p90", "p99")
_LEAST_TTFT_S = 0.05
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


@dataclass(frozen=True)
class Fitted:
    """:param coefficients: (6,), see the module's first lines
    :param shared_kv: share of KV that concurrent requests have in common
    :param loss: of :func:`fit` at its end
    """

    coefficients: np.ndarray
    shared_kv: float
    loss: float


#: ``PROFILE`` (1,) and ``SHARE`` (1, M), as :func:`engine.latency.profile.pack` gives them.
Tables = tuple[np.ndarray, np.ndarray]


def _tables(coefficients: np.ndarray) -> Tables:
    profile, share = device_tables((0.0, 0.0, *coefficients[:2]), coefficients[2:5].tolist())
    share["fused_shared_s"] = coefficients[5]
    return profile, share


def capacity(settings: EngineSettings, shared_kv: float) -> int:
    """KV tokens that seem to be there when requests have ``shared_kv`` of theirs in common."""
    return int(settings.kv_tokens * (1.0 + shared_kv)) // settings.block_tokens * settings.block_tokens


def replay(
    log: RequestLog, settings: EngineSettings, model: np.ndarray | Tables, shared_kv: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """(TTFT, TPOT) in seconds, (n,) each, of the logged requests on one surrogate instance with these settings.

    :param model: six coefficients, see the module's first lines, or a packed profile
    """
    profile, share = model if isinstance(model, tuple) else _tables(model)
    size = settings.block_tokens
    spec = InstanceSpec(
        role=Role.MIXED,
        pool=0,
        kv_tokens=capacity(settings, shared_kv),
        batching=Batching.CHUNKED,
        chunk_tokens=settings.chunk_tokens,
        max_batch=settings.max_batch,
        max_prefills=settings.max_batch,
        watermark=0.0,
        whole_prompt=settings.whole_prompt,
        pause_preempt=True,
    )
    req = blank_requests(log.n)
    req["arrival"] = arrival_ticks("request log", log.arrival_s)
    req["prompt"], req["output"] = log.prompt, log.output
    hashes = None
    if settings.prefix_caching and settings.known_kv:  # only memory that runs short makes a difference
        blocks = (log.prompt + log.output) // size
        req["hash_off"], req["hash_n"] = np.cumsum(blocks) - blocks, blocks
        hashes = np.random.default_rng(0).integers(1, 2**63, int(blocks.sum()), dtype=np.uint64)
    options = ClusterOptions(block_tokens=size, hash_tokens=0 if hashes is None else size)
    state = new_cluster((spec,), profile, share, classes=(SloClass(1.0, 1.0),), options=options, hashes=hashes)
    bound = load_policy("least_tokens", Setting.of_state(state))
    state.cluster["n_requests"] = log.n
    state = state._replace(req=req)
    sim = new_sim(state, n_roots=log.n)
    driver(state, sim, bound)()
    first, last = state.req["first_token"] / TICKS_PER_S, state.req["finished"] / TICKS_PER_S
    gaps = np.where(log.output > 1, log.output - 1, np.nan)
    return first - log.arrival_s, (last - first) / gaps


def _statistics(seconds: np.ndarray) -> np.ndarray:
    known = seconds[np.isfinite(seconds)]
    return np.array([known.mean(), *np.percentile(known, (50, 90, 99))])


def _loss(log: RequestLog, ttft: np.ndarray, tpot: np.ndarray, n: int) -> float:
    """Mean relative error per request (half weight for TTFT, on at least 50 ms) plus that of mean, P50, P90 and P99.

    Which request waits a wave longer is decided by milliseconds; the spread of all requests is not.
    """
    late = np.abs(ttft - log.ttft_s)[:n] / np.maximum(log.ttft_s[:n], _LEAST_TTFT_S)
    slow = np.abs(tpot / log.tpot_s - 1.0)[:n]
    spread = [
        np.abs(_statistics(ours[:n]) - theirs) / np.maximum(theirs, floor)
        for ours, theirs, floor in (
            (ttft, _statistics(log.ttft_s[:n]), _LEAST_TTFT_S),
            (tpot, _statistics(log.tpot_s[:n]), 0.0),
        )
    ]
    return float(0.5 * np.minimum(late, 3.0).mean() + np.nanmean(slow) + np.mean(spread))


def fit(
    log: RequestLog, settings: EngineSettings, n: int, *, start: np.ndarray = START,
    say: Callable[[str], None] = lambda text: None,
) -> Fitted:  # fmt: skip
    """Coefficients under which the first ``n`` requests come out nearest, by Nelder and Mead from several starts.

    Arrivals and lengths of all requests are used (later ones load the engine, too); times of the first ``n`` only.
    """
    shares = SHARED_KV if settings.prefix_caching and settings.known_kv else (0.0,)
    best: Fitted | None = None
    point = np.log(start)
    for shared in shares:

        def loss(logarithms: np.ndarray, shared: float = shared) -> float:
            return _loss(log, *replay(log, settings, np.exp(logarithms), shared), n)

        for _ in range(2):  # a second start from the first one's end, with a fresh simplex
            found = minimize(loss, point, method="Nelder-Mead", options={"maxiter": 400, "xatol": 1e-4})
            point = found.x
        if best is None or found.fun < best.loss:
            best = Fitted(np.exp(found.x), shared, float(found.fun))
        say(f"shared KV {100 * shared:g} %: loss {found.fun:.4f}")
        point = np.log(best.coefficients)
    assert best is not None
    return best


def compare(log: RequestLog, ours: tuple[np.ndarray, np.ndarray], rows: slice) -> list[dict[str, Any]]:
    """Mean, P50, P90 and P99 of TTFT and TPOT over ``rows``: measured, modelled (ms), relative error."""
    table = []
    for metric, theirs, mine in zip(("ttft", "tpot"), (log.ttft_s, log.tpot_s), ours, strict=True):
        for name, a, b in zip(STATISTICS, _statistics(theirs[rows]), _statistics(mine[rows]), strict=True):
            table.append(
                {"metric": f"{metric}_{name}", "measured_ms": a * 1e3, "modelled_ms": b * 1e3, "error": b / a - 1.0}
            )
    return table


def profile_of(
    name: str, log: RequestLog, settings: EngineSettings, fitted: Fitted, held_out: slice, source: str
) -> Profile:
    """The fitted coefficients as a profile that scenarios and ``serve`` can use."""
    c = fitted.coefficients.tolist()
    ttft, tpot = replay(log, settings, fitted.coefficients, fitted.shared_kv)
    late = np.abs(ttft - log.ttft_s)[held_out] / np.maximum(log.ttft_s[held_out], _LEAST_TTFT_S)
    slow = np.abs(tpot / log.tpot_s - 1.0)[held_out]
    notes = (
        f"Fitted to {log.n} requests, errors on those the fit has not seen (FitError: per request, prefill = TTFT, "
        f"decode = TPOT). Times are of whole steps, host included. Concurrent requests have "
        f"{100 * fitted.shared_kv:g} % of their KV in common: kv_tokens holds that. No roofline was checked."
    )
    return Profile(
        **_head(settings.about),
        name=name,
        provenance=Provenance(source=f"slalom calibrate --from-requests {source}", notes=notes),
        total_sms=1,
        max_prompt_tokens=int(max(log.prompt.max(), 1)),
        kv_tokens=capacity(settings, fitted.shared_kv),
        shares=(
            Share(
                sms=1, prefill_s=(0.0, 0.0, c[0], c[1]), decode_small_s=(c[2], c[3], c[4]), fused_shared_s=c[5]
            ),
        ),
        roofline=Roofline(peak_flops=1e18, memory_bytes_per_s=1e18, params=1.0, weight_bytes=1.0),
        fit=FitError(
            prefill_mape=float(np.minimum(late, 3.0).mean()),
            decode_mape=float(np.nanmean(slow)),
            n_prefill=log.n,
            n_decode=int(np.isfinite(log.tpot_s).sum()),
        ),
    )  # fmt: skip


def _of_steps(name: str, log: RequestLog, settings: EngineSettings, steps: Sequence[Measured], source: str) -> Profile:
    """The profile that explains ``steps``, whose error is of steps that no fit has seen."""
    kv_tokens = settings.kv_tokens if settings.known_kv else None
    facts = EngineFacts(source, str(settings.about.get("model", "unknown")), kv_tokens, settings.max_batch)
    profile = profile_of_steps(steps, facts, name)
    notes = "Steps as the gaps between tokens show them, host included. No roofline was checked, and KV never moves."
    return profile.model_copy(
        update={
            **_head(settings.about),
            "provenance": Provenance(source=f"slalom calibrate --from-requests {source}", notes=notes),
            "max_prompt_tokens": int(max(log.prompt.max(), profile.max_prompt_tokens)),
        }
    )


def _head(about: Mapping[str, Any]) -> dict[str, Any]:
    """The profile's head, by the engine's settings."""
    return {
        "model": str(about.get("model", "unknown")),
        "device": str(about.get("device_name", about.get("device", "unknown"))),
        "tp": int(about.get("tensor_parallel_size", 1)),
        "engine": f"vLLM {about['vllm_version']}" if "vllm_version" in about else str(about.get("engine", "unknown")),
        "n_layers": int(about.get("num_hidden_layers", about.get("n_layers", 32))),
        "kv_bytes_per_token": float(about.get("kv_bytes_per_token", 131072.0)),
    }


def command(path: Path, config: Path | None, out: Path, holdout: float, as_json: bool, unit: str = "") -> None:
    """``calibrate --from-requests``."""
    if config is None:
        raise SlalomError("--engine-config", None, "name the file with that engine's settings")
    if not re.fullmatch(_NAME, out.stem):  # said before the fit, which takes a minute
        raise SlalomError("--out", str(out), "name the profile with letters, digits, '.', '_' and '-'")
    log, settings = read_log(path, unit), read_settings(config)
    if log.left_out:
        print(f"{path.name}: {log.left_out} rows cannot be read and are left out", file=sys.stderr)
    seen = log.n - round(holdout * log.n)
    if seen < 10:
        raise SlalomError("--holdout", holdout, f"that leaves {seen} requests to fit on; at least 10 are needed")
    held_out = slice(seen, None) if seen < log.n else slice(0, None)

    def say(text: str) -> None:
        print(f"fitting the first {seen} of {log.n} requests: {text}", file=sys.stderr)

    steps = steps_of(read_bench(path), seen, settings.chunk_tokens)
    if steps:
        say(f"{len(steps)} points from the gaps between tokens")
        profile, shared_kv = _of_steps(out.stem, log, settings, steps, path.name), 0.0
        played = replay(log, settings, pack([profile]))
    else:
        say("about a minute")
        fitted = fit(log, settings, seen, say=say)
        profile, shared_kv = profile_of(out.stem, log, settings, fitted, held_out, path.name), fitted.shared_kv
        played = replay(log, settings, fitted.coefficients, shared_kv)
    table = compare(log, played, held_out)
    profile.save(out)
    result = {
        "profile": profile.name,
        "out": str(out),
        "requests": log.n,
        "left_out": log.left_out,
        "fitted_on": seen,
        "checked_on": log.n - seen or log.n,
        "shared_kv": shared_kv,
        "points": dict(Counter(m.point.kind for m in steps)),
        "poor_fit": profile.is_poor,
        "table": table,
    }
    print(json.dumps(result, indent=1) if as_json else _text(result, table))


def _text(result: dict[str, Any], table: Sequence[dict[str, Any]]) -> str:
    seen = "the last" if result["checked_on"] < result["requests"] else "all, the fitted"
    lines = [f"{result['profile']}: fitted on {result['fitted_on']} requests; {seen} {result['checked_on']}:"]
    lines.append(f"{'metric':10} {'measured ms':>12} {'modelled ms':>12} {'error':>8}")
    lines += [
        f"{row['metric']:10} {row['measured_ms']:12.2f} {row['modelled_ms']:12.2f} {row['error']:+8.2%}"
        for row in table
    ]
    if result["poor_fit"]:
        lines.append("POOR FIT: an error is above 10 %; train-policy refuses this profile without --accept-poor-fit")
    if result["shared_kv"]:
        lines.append(f"requests that ran together had {100 * result['shared_kv']:g} % of their KV in common")
    return "\n".join([*lines, f"wrote {result['out']}"])
