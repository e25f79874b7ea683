"""``python -m eval.claims.peers``: another simulator's answers beside ours, under its latency model and definitions.

DistServe's simulator (``simdistserve``, LLMServe/DistServe at commit 82831f1) was run on OPT-13B, A100, 512
tokens in, 128 out, Poisson arrivals, 5,000 requests, numpy seed 0. Its rules, as options of this comparison:

* a step costs the published coefficients (``estimators/time_estimator.py``; the context of a decode step
  counts the token in work) plus 2 ms and 1e-4 ms per context token, for prompts too
  (``Worker.add_ray_overhead``);
* the first token is what prefill yields, and 128 decode steps follow: in our terms 129 output tokens. TTFT
  ends with the prefill; TPOT is the time from there to the end ÷ 128, so it holds the wait before decode;
* a prefill batch takes the whole queue; the "vllm" worker runs prompts first and whole;
* a decode step holds at most 50,000 context tokens, and who was in the last one queues up again behind those
  left out (``Worker._enter_decodes``): decode takes turns;
* KV moves for free and memory never runs out;
* a request goes to the worker with the fewest queued requests, ties to the first. A decode worker's queue is
  what waits for its next step, whatever is in the present one (``Scheduler._find_best_worker_and_queue``).

Steps here last whole picoseconds per context token. With its two coefficients rounded to that grid (a change
below 1e-6), simdistserve gives every one of the 5,000 requests our time stamps to within 0.3 ns, in all four
runs. Against the coefficients as published the last digits differ, and dispatch by least queue turns them
into other choices: moved by 3e-6 or less, simdistserve's own "vllm" run at 16 req/s answers 649 to 715 ms
(p90 TPOT) and 829 to 903 ms (p99). Those two figures say no more than that.

With folders of real vLLM runs (``requests.jsonl`` and ``meta.json`` as LLMServingSim publishes them in
``bench/examples``), ``python -m eval.claims.peers FOLDER ...`` also replays these: a profile is fitted to the times
of the first half of the requests (``calibrate --from-requests``), and the second half is the comparison.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from engine.core.columns import Kind
from engine.core.kinds import Batching, Role
from engine.core.lists import inbound_of, queue_of, ready_of
from engine.core.setup import InstanceSpec, LinkSpec, SloClass, blank_requests, new_cluster
from engine.core.state import attach
from engine.core.ticks import arrival_ticks
from engine.errors import SlalomError, no_such
from engine.jit.kernel import kernel
from engine.jit.rows import addresses
from engine.latency import Profile, pack
from engine.latency.evaluate import TICKS_PER_S
from env.surrogate.clock import attach_sim, new_sim
from env.surrogate.loop import advance, answer
from eval.calibrate.from_requests import compare, fit, replay
from eval.calibrate.request_log import EngineSettings, RequestLog, read_log, read_settings

Setup = Literal["2P+2D", "4 x vllm"]

PROMPT, DECODE_STEPS = 512, 128
MAX_CONTEXT = 50_000
PERCENTILES = (50, 90, 99)

_Figures = tuple[float, float, float]

#: (setup, requests per second, metric) -> p50, p90, p99 in ms, measured on simdistserve itself: with its
#: coefficients as published, and with the two per context token rounded to 1e-9 ms.
DISTSERVE: dict[tuple[Setup, float, str], tuple[_Figures, _Figures]] = {
    ("2P+2D", 4.0, "ttft"): ((75.2, 75.2, 122.37), (75.2, 75.2, 122.37)),
    ("2P+2D", 4.0, "tpot"): ((28.69, 31.01, 33.83), (28.68, 30.97, 33.81)),
    ("2P+2D", 16.0, "ttft"): ((75.2, 151.98, 256.65), (75.2, 151.98, 256.65)),
    ("2P+2D", 16.0, "tpot"): ((58.01, 60.88, 61.71), (57.7, 60.84, 61.55)),
    ("4 x vllm", 4.0, "ttft"): ((114.61, 127.45, 132.63), (114.58, 127.25, 132.75)),
    ("4 x vllm", 4.0, "tpot"): ((42.23, 50.02, 56.36), (42.26, 50.03, 55.4)),
    ("4 x vllm", 16.0, "ttft"): ((127.01, 161.96, 228.45), (126.76, 162.63, 229.66)),
    ("4 x vllm", 16.0, "tpot"): ((96.03, 715.14, 902.76), (95.91, 669.13, 854.98)),
}

_PROFILES = {"2P+2D": "opt-13b-a100-tp1", "4 x vllm": "opt-13b-a100-tp1-vllm"}
_PLACE_PREFILL = int(Kind.PLACE_PREFILL)
_PREFILL, _DECODE = int(Role.PREFILL), int(Role.DECODE)
#: More than any of these runs needs: simdistserve knows neither KV pools nor seats.
_KV_TOKENS, _SEATS = 4_000_000, 4096


class Row(NamedTuple):
    """One figure of the peer and ours.

    :param metric: e.g. ``tpot_p90_ms``
    :param published: the peer's figure
    :param on_grid: the peer's figure with its coefficients rounded to our grid
    :param relative_error: ours ÷ published − 1
    """

    setup: str
    rate: float
    metric: str
    published: float
    on_grid: float
    ours: float
    relative_error: float


@kernel
def _shortest_queues(state_words, sim_words):
    """Run to the end under simdistserve's dispatcher.

    No policy column separates what waits for the next decode step from what is in the present one, so this
    dispatcher, which sees the queues themselves, drives the surrogate directly.
    """
    s, q = attach(state_words), attach_sim(sim_words)
    while advance(s, q) >= 0:
        best, least = 0, 2**31
        for i in range(s.cluster[0].n_instances):
            if q.sim[0].kind == _PLACE_PREFILL:
                able = s.inst[i].role != _DECODE
                waiting = s.lists[queue_of(i), 2]
            else:
                able = s.inst[i].role != _PREFILL
                waiting = s.lists[inbound_of(i), 2] + s.inst[i].moving_n + s.lists[ready_of(i), 2]
            if able and waiting < least:
                best, least = i, waiting
        answer(s, q, best)


def _latency(setup: Setup) -> tuple[np.ndarray, np.ndarray]:
    """simdistserve's step times, from the bundled profile of its coefficients: PROFILE (1,), SHARE (1, 1).

    Two terms are too small for the profile but not for this comparison: the token in work as context, and the
    host's time per token of a prompt.
    """
    profile, share = pack((Profile.load(_PROFILES[setup]),))
    share["prefill"][:, :, 2] += profile["ctx_overhead_s"][:, None]
    for regime in ("decode_small", "decode_large"):
        share[regime][:, :, 1] += share[regime][:, :, 0]
    return profile, share


def _instances(setup: Setup) -> tuple[InstanceSpec, ...]:
    rules: dict[str, Any] = {
        "kv_tokens": _KV_TOKENS,
        "batching": Batching.PREFILL_FIRST,
        "prefill_tokens": 10**7,
        "max_batch": _SEATS,
        "max_prefills": _SEATS,
        "max_ctx": MAX_CONTEXT,
        "rotate": True,
    }
    roles = (Role.PREFILL,) * 2 + (Role.DECODE,) * 2 if setup == "2P+2D" else (Role.MIXED,) * 4
    return tuple(InstanceSpec(role=role, pool=i, gpu=i, link=i, **rules) for i, role in enumerate(roles))


def _arrivals(rate: float, n: int, seed: int) -> np.ndarray:
    """Ticks, int64 (n,): the first request at once, then gamma gaps of shape 1.

    They come from numpy's legacy generator because the peer's do: the sequence is part of the comparison.
    """
    gaps_s = np.random.RandomState(seed).gamma(1.0, 1.0 / rate, n - 1)
    return arrival_ticks("rate", np.concatenate([[0.0], np.cumsum(gaps_s)]))


def distserve_run(
    setup: Setup, rate: float, n_requests: int = 5000, seed: int = 0, fast_forward: bool = True
) -> np.ndarray:
    """DistServe's reference workload on our surrogate under simdistserve's rules.

    :param setup: two prefill and two decode instances, or four of its "vllm" workers
    :param rate: requests per second
    :return: REQUEST (n_requests,), stamps in ticks
    :raises SlalomError: unknown setup, or a rate or number of requests that is not positive
    """
    if setup not in _PROFILES:
        raise no_such("setup", setup, _PROFILES)
    if not rate > 0:
        raise SlalomError("rate", rate, "give a positive number of requests per second")
    if n_requests < 1:
        raise SlalomError("n_requests", n_requests, "simulate at least one request")
    profile, share = _latency(setup)
    targets = (SloClass(ttft_s=1.0, tpot_s=1.0),)  # no rule of this comparison reads them
    links = (LinkSpec(bytes_per_s=0.0, latency_s=0.0),) * 4
    state = new_cluster(_instances(setup), profile, share, classes=targets, links=links)
    req = blank_requests(n_requests)
    req["arrival"], req["prompt"], req["output"] = _arrivals(rate, n_requests, seed), PROMPT, DECODE_STEPS + 1
    state.cluster["n_requests"] = n_requests
    state = state._replace(req=req)
    sim = new_sim(state, n_roots=n_requests, fast_forward=fast_forward)
    _shortest_queues(addresses(state), addresses(sim))
    return state.req


def _percentiles(req: np.ndarray) -> dict[str, np.ndarray]:
    """TTFT and TPOT in milliseconds by simdistserve's definitions, at ``PERCENTILES``."""
    per_ms = TICKS_PER_S / 1000
    ttft = (req["first_token"] - req["arrival"]) / per_ms
    tpot = (req["finished"] - req["first_token"]) / DECODE_STEPS / per_ms
    return {"ttft": np.percentile(ttft, PERCENTILES), "tpot": np.percentile(tpot, PERCENTILES)}


def distserve_reference() -> list[Row]:
    """Percentiles that simdistserve gave, ours for the same arrivals, and how far apart they are."""
    rows = []
    for (setup, rate, metric), (published, on_grid) in DISTSERVE.items():
        figures = _percentiles(distserve_run(setup, rate))[metric]
        for p, theirs, rounded, ours in zip(PERCENTILES, published, on_grid, figures, strict=True):
            name = f"{metric}_p{p}_ms"
            rows.append(Row(setup, rate, name, theirs, rounded, float(ours), float(ours) / theirs - 1.0))
    return rows


class VllmRun(NamedTuple):
    """A recorded run of one real vLLM instance: its requests and the settings it ran with."""

    log: RequestLog
    settings: EngineSettings

    @classmethod
    def load(cls, folder: Path) -> VllmRun:
        """Read a folder of LLMServingSim's ``bench/examples``.

        :raises SlalomError: a file is missing, is not JSON, or lacks a key
        """
        try:
            return cls(read_log(folder / "requests.jsonl"), read_settings(folder / "meta.json"))
        except SlalomError as error:
            fix = f"give a folder as LLMServingSim has it ({error})"
            raise SlalomError("vLLM run", str(folder), fix) from error


def vllm_reference(folder: Path) -> list[Row]:
    """Mean, P50, P90 and P99 of TTFT and TPOT over the second half of a real run, and ours.

    Arrivals and lengths of all requests go in; of the times that came out, the fit sees the first half
    (:mod:`eval.calibrate.from_requests`). ``on_grid`` is ``nan``: nothing was rounded.

    :raises SlalomError: see :meth:`VllmRun.load`
    """
    log, settings = VllmRun.load(folder)
    half = log.n // 2
    fitted = fit(log, settings, half)
    table = compare(log, replay(log, settings, fitted.coefficients, fitted.shared_kv), slice(half, None))
    rate = log.n / float(log.arrival_s[-1])
    return [
        Row(folder.parent.name, rate, f"{r['metric']}_ms", r["measured_ms"], math.nan, r["modelled_ms"], r["error"])
        for r in table
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; with folders of real vLLM runs, theirs too."""
    parser = argparse.ArgumentParser(prog="python -m eval.claims.peers", description="Peers' answers beside ours.")
    parser.add_argument("folder", nargs="*", type=Path, help="a real vLLM run (requests.jsonl, meta.json)")
    folders = parser.parse_args(arguments).folder
    print(f"{'setup':10} {'req/s':>5} {'metric':12} {'published':>9} {'on grid':>9} {'ours':>9} {'error':>8}")
    for row in [*distserve_reference(), *(row for folder in folders for row in vllm_reference(folder))]:
        print(
            f"{row.setup:10} {row.rate:5.3g} {row.metric:12} {row.published:9.2f} {row.on_grid:9.2f}"
            f" {row.ours:9.2f} {row.relative_error:+8.3%}"
        )


if __name__ == "__main__":
    main()
