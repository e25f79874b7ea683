"""S6: MuxWise (one GPU shared by SMs between prefill and decode) against chunked prefill and disaggregation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.core.kinds import RequestState
from engine.core.slo import itl_edges_s
from engine.latency import Profile
from engine.latency.profile import Share
from env.measure.metrics import histogram_stats
from env.measure.sustained import backlog_of, backlog_trend
from env.scenario import Scenario
from env.surrogate.simulate import RunResult
from eval.claims.claim import (
    ORIGINAL,
    STEADY,
    SUSTAINED,
    Claim,
    Curve,
    Passes,
    Reading,
    changed_profile,
    ratio,
    ratio_interval,
    search,
    slower,
    sustained,
)


def _keeps_up(run: RunResult) -> bool:
    """Stable: of all that was sent, at most a tenth is still open when the last request arrives."""
    last = run.req["arrival"].max()
    return bool(np.mean((run.req["finished"] < 0) | (run.req["finished"] > last)) <= 0.1)


def _no_trend(run: RunResult) -> bool:
    """Stable in a long run: the backlog has no trend (``env.measure.sustained``), from the first arrival to the last.

    A run of more than 49 days, which has no single clock, is far below what any system here serves.
    """
    if run.origin_s is not None:
        return True
    arrival = run.req["arrival"]
    return not backlog_trend([backlog_of(run.req, int(arrival.min()), int(arrival.max())).tolist()]).found()


def _tbt(target_ms: float, stable: Callable[[RunResult], bool] = _keeps_up) -> Passes:
    """1 where the 99th percentile of token gaps is within the target and the system is stable, else 0."""

    def passes(run: RunResult, warmup: float) -> float:
        p99 = histogram_stats(run.itl, itl_edges_s())["p99_itl_ms"]
        done = (run.req["state"] == RequestState.FINISHED).all()
        return float(p99 is not None and p99 <= target_ms and bool(done) and stable(run))

    return passes


def _tool_agent(*, reuse: bool = True) -> dict[str, Any]:
    """Tool&Agent as the preset has it, with its shared prefixes as prefixes: 37 % share 6,144 tokens, 14 % 2,560.

    :param reuse: False: the same lengths, and nothing shared
    """
    parts = []
    lengths = (
        (0.37, (6200, 8000), (3, 50), 6144),
        (0.14, (2900, 3300), (16, 24), 2560),
        (0.49, None, None, 0),
    )
    for weight, prompt, output, shared in lengths:
        spec: dict[str, Any] = {"kind": "preset", "name": "mooncake-conversation"}
        if prompt is not None and output is not None:
            low_high = [dict(zip(("low", "high"), pair, strict=True)) for pair in (prompt, output)]
            spec = {"kind": "joint", **dict(zip(("prompt", "output"), low_high, strict=True))}
            spec = {k: {"kind": "uniform", **v} if isinstance(v, dict) else v for k, v in spec.items()}
        work: dict[str, Any] = {"kind": "synthetic", "lengths": spec, "max_context": 131072}
        if shared and reuse:
            work["prefix"] = {"kind": "system", "prompts": 1, "tokens": shared}
        parts.append({"weight": weight, "workload": work})
    return {"kind": "mix", "parts": parts}


_PROFILE = "llama-70b-a100-tp8"
_CHUNKS = (128, 256, 512, 1024)


def _chunked(base: Scenario, profile: str) -> dict[str, tuple[Scenario, str]]:
    group = {"count": 1, "role": "mixed", "profile": profile}
    return {
        f"chunked {c}": (base.fixed_on({**group, "chunk_tokens": c}, profile=profile), "least_tokens") for c in _CHUNKS
    }


def _best(base: Scenario, profile: str, target_ms: float) -> tuple[str, float]:
    """The chunk budget that holds the highest rate (requests/s of the instance), and that rate."""
    found = {
        label: search(scenario, _tbt(target_ms), policy, 1.0, _REQUESTS)
        for label, (scenario, policy) in _chunked(base, profile).items()
    }
    label = max(found, key=lambda key: found[key])
    return label, found[label]


def _paid_once(share: Share) -> Share:
    """A fused step pays the constant of prefill and decode once."""
    return share.model_copy(update={"fused_shared_s": min(share.prefill_s[3], share.decode_small_s[2])})


def _half(profile: Profile, folder: Path) -> str:
    """A stand-in for TP 4: every second doubled (no gain from fewer devices to synchronise), KV of half the memory."""
    weights = profile.roofline.weight_bytes if profile.roofline else 0.0
    kv = 0.5 * (profile.kv_tokens * profile.kv_bytes_per_token + weights) - weights
    tokens = int(kv / profile.kv_bytes_per_token)
    return changed_profile(profile, folder, "tp4", share=partial(slower, factor=2.0), tp=4, kv_tokens=tokens)


def _small() -> tuple[float, float, str]:
    """Llama-8B on one A100, ShareGPT, 50 ms: (MuxWise, best chunked prefill, which), requests/s."""
    base = Scenario.load("muxwise-70b-2x8xa100").with_overrides({
        "profile": "llama-8b-a100",
        "cluster": [{"count": 1, "role": "multiplexed"}],
        "workload": {"kind": "synthetic", "lengths": {"kind": "preset", "name": "sharegpt"}, "max_context": 2048},
        "classes": [{"name": "chat", "ttft_s": 10.0, "tpot_s": 0.05}],
        "rates": {"low": 0.5, "high": 100.0},
        "reference_rate": 8.0,
    })  # fmt: skip
    ours = search(base.fixed_on({"count": 1, "role": "multiplexed"}), _tbt(50.0), "muxwise", 1.0, 2000)
    found = {
        c: search(
            base.fixed_on({"count": 1, "role": "mixed", "chunk_tokens": c}), _tbt(50.0), "least_tokens", 1.0, 2000
        )
        for c in (256, 512, 1024, 2048)
    }
    best = max(found, key=lambda c: found[c])
    return ours, found[best], f"chunked {best}"


def _base() -> Scenario:
    return Scenario.load("muxwise-70b-2x8xa100").with_overrides({"workload": _tool_agent()})


def compared() -> dict[str, tuple[Scenario, str]]:
    """The systems on Llama-70B TP 8: label -> scenario and policy."""
    base = _base()
    both = base.fixed_on({"count": 1, "role": "prefill"}, {"count": 1, "role": "decode"})
    return {
        "MuxWise": (base.fixed_on({"count": 1, "role": "multiplexed"}), "muxwise"),
        "pdmux table": (base.fixed_on({"count": 1, "role": "multiplexed"}, decisions={"tune": True}), "pdmux_table"),
        "disaggregated": (both, "distserve"),
    } | _chunked(base, _PROFILE)


def rates_of(systems: Mapping[str, tuple[Scenario, str]]) -> dict[str, float]:
    """What each holds in runs as long as the original's, requests per second on eight GPUs."""
    return {
        label: 8 * search(scenario, _tbt(100.0), policy, 1.0, _REQUESTS) / scenario.n_gpus()
        for label, (scenario, policy) in systems.items()
    }


def muxwise() -> Claim:
    """S6: MuxWise against chunked prefill and disaggregation, Llama-70B TP 8, Tool&Agent, P99 TBT of 100 ms."""
    base, profile = _base(), Profile.load(_PROFILE)
    systems = compared()
    rates = rates_of(systems)
    chunked = max((label for label in rates if label.startswith("chunked")), key=lambda label: rates[label])
    ours = rates["MuxWise"]
    with tempfile.TemporaryDirectory() as folder:
        half = _half(profile, Path(folder))
        rivals = {"MuxWise": systems["MuxWise"], "chunked": systems[chunked]}
        rivals["apart"] = (_apart(base, half), "distserve")
        apart = search(rivals["apart"][0], _tbt(100.0), "distserve", 1.0, _REQUESTS)
        alone = _apart(base.with_overrides({"workload": _tool_agent(reuse=False)}), half)
        unshared = search(alone, _tbt(100.0), "distserve", 1.0, _REQUESTS)
        tables = _other_tables(profile, Path(folder))
        changed = {label: _best(base, path, 100.0) for label, path in tables.items()}
        steady = {
            label: search(scenario, _tbt(100.0, _no_trend), policy, 1.0, None, (0,))
            for label, (scenario, policy) in rivals.items()
        }
        held = {label: sustained(*system) for label, system in rivals.items()}
        long = {}
        for label in (_NO_FLOOR, _ONCE):
            scenario, policy = _chunked(base, tables[label])[changed[label][0]]
            long[label] = search(scenario, _tbt(100.0, _no_trend), policy, 1.0, None, (0,))
        no_reuse = search(alone, _tbt(100.0, _no_trend), "distserve", 1.0, None, (0,))
    small, small_chunked, which = _small()
    over = ratio(ours, apart)
    chunk_ms, step_ms = 1e3 * profile.prefill_s(256, 4000), 1e3 * profile.decode_s(8 * 8000, 8)
    interval = ratio_interval(systems["MuxWise"], systems[chunked], _tbt(100.0), 1.0, _REQUESTS)
    tokens = 8596 + 182
    reused_nothing = _beyond(ratio(ours, unshared))
    no_floor, lasts = changed[_NO_FLOOR], _beyond(ratio(steady["MuxWise"], steady["apart"]))
    return Claim(
        name="S6",
        title="MuxWise against the best chunked prefill, Llama-70B TP 8, Tool&Agent, P99 TBT 100 ms, stable",
        source="MuxWise (ASPLOS 2026), goodput of Tool&Agent, 70B",
        unit="x requests",
        published="3.06 over chunked prefill, 1.62 over disaggregation (TP 4 + TP 4); 8B ShareGPT on one A100 1.2",
        value=ratio(ours, rates[chunked]),
        band=(2.3, 3.8),
        interval=interval,
        length="not published; 800 requests, two draws",
        extra=_beyond(over),
        lasting=(
            Reading(STEADY, ratio(steady["MuxWise"], steady["chunked"]), lasts),
            Reading(
                SUSTAINED,
                ratio(held["MuxWise"], held["chunked"]),
                _beyond(ratio(held["MuxWise"], held["apart"])),
            ),
        ),
        causes=(
            *(Reading(f"{at}, {ORIGINAL}", ratio(ours, rate), _beyond(over)) for at, (_, rate) in changed.items()),
            Reading(f"{_NO_REUSE}, {ORIGINAL}", ratio(ours, rates[chunked]), reused_nothing),
            Reading(f"{_NO_FLOOR}; and {_NO_REUSE}, {ORIGINAL}", ratio(ours, no_floor[1]), reused_nothing),
            *(Reading(f"{at}, {STEADY}", ratio(steady["MuxWise"], rate), lasts) for at, rate in long.items()),
        ),
        note=(
            f"MuxWise itself serves {ours:.2f} req/s (published 7,430 tokens/s, about 0.85 req/s). Chunked prefill "
            f"collapses in the authors' table, which starts at 512 tokens: a chunk of 256 (the paper's budget) costs "
            f"{chunk_ms:.0f} ms, beside a decode step of {step_ms:.0f} ms close to 100 ms already. With the line "
            f"continued below 512 tokens {no_floor[0]} holds {no_floor[1]:.2f} req/s. Over disaggregation ours is "
            f"{over:.2f} on two TP 4 halves (a stand-in, the TP 8 table with every second doubled), "
            f"{ratio(ours, unshared):.2f} where disaggregation shares no prefix (a conversation's KV then lies on the "
            f"decode side), and {ratio(ours, rates['disaggregated']):.2f} against two TP 8 instances per GPU. 8B "
            f"ShareGPT against the best of four budgets ({which}): {ratio(small, small_chunked):.2f}. The trace is a "
            "surrogate that shares 2.6k prompt tokens, not 4.9k. Sustained goodput asks for five times the isolated "
            "prefill (at least 1 s) and a mean of 100 ms a token, not for P99 TBT."
        ),
        rows=(
            *((label, rate, "req/s per 8 GPUs") for label, rate in rates.items()),
            ("disaggregated, TP 4 + TP 4 (stand-in)", apart, "req/s per 8 GPUs"),
            ("disaggregated, TP 4 + TP 4, no prefix reuse", unshared, "req/s per 8 GPUs"),
            *((f"{label}: {which_one}", rate, "req/s per 8 GPUs") for label, (which_one, rate) in changed.items()),
            *((f"{_ROWS[label]}, steady state", rate, "req/s per 8 GPUs") for label, rate in steady.items()),
            *((f"{label}, steady state", rate, "req/s per 8 GPUs") for label, rate in long.items()),
            ("disaggregated, no prefix reuse, steady state", no_reuse, "req/s per 8 GPUs"),
            *((f"{_ROWS[label]}, sustained", rate, "req/s per 8 GPUs") for label, rate in held.items()),
            ("8B ShareGPT, one A100: MuxWise", small, "req/s"),
            (f"8B ShareGPT, one A100: {which}", small_chunked, "req/s"),
            ("ratio over disaggregated TP 4 + TP 4", over, "x"),
            ("the same, no prefix reuse", ratio(ours, unshared), "x"),
            ("the same, steady state", ratio(steady["MuxWise"], steady["apart"]), "x"),
            ("the same, sustained", ratio(held["MuxWise"], held["apart"]), "x"),
            ("ratio 8B ShareGPT", ratio(small, small_chunked), "x"),
        ),
        curves=(
            Curve(
                "published (tokens/s ÷ mean tokens)",
                ("chunked", "disaggregated", "MuxWise"),
                (2269 / tokens, 4538 / tokens, 7430 / tokens),
                published=True,
            ),
            Curve("ours", ("chunked", "disaggregated", "MuxWise"), (rates[chunked], apart, ours)),
            Curve("ours, no 512-token floor, no prefix reuse", ("chunked", "disaggregated"), (no_floor[1], unshared)),
        ),
        axes=("", "goodput on eight GPUs [req/s]"),
    )


_REQUESTS = 800
_NO_FLOOR = "engine speed: the prefill line continued below the 512 tokens at which the authors' table starts"
_ONCE = "engine speed: a fused step pays the constant of prefill and decode once"
_NO_REUSE = "prefix cache: disaggregation reuses no prefix"
_ROWS = {"MuxWise": "MuxWise", "chunked": "chunked prefill", "apart": "disaggregated, TP 4 + TP 4"}


def _beyond(over: float) -> bool:
    """Whether the ratio over disaggregation came out, published as 1.62."""
    return 1.2 <= over <= 2.1


def _apart(base: Scenario, half: str) -> Scenario:
    """Prefill and decode on one half of the GPUs each."""
    groups = ({"count": 1, "role": role, "profile": half} for role in ("prefill", "decode"))
    return base.fixed_on(*groups, profile=half)


def _other_tables(profile: Profile, folder: Path) -> dict[str, str]:
    """The authors' step times with one thing changed, and with both: what is changed -> file."""
    once = {"share": _paid_once}
    return {
        _NO_FLOOR: changed_profile(profile, folder, "no-floor", prefill_min_tokens=1),
        _ONCE: changed_profile(profile, folder, "once", **once),
        f"{_NO_FLOOR}; and the constant paid once": changed_profile(
            profile, folder, "no-floor-once", prefill_min_tokens=1, **once
        ),
    }
