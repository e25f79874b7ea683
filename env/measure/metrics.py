"""From one run to its figures, under the names of ``vllm bench serve`` and a superset of them.

Definitions (DESIGN.md section 4, Metrics):

* TTFT = first token − arrival; a KV hand-over shows in the gap before token 2, not in TTFT.
* TPOT = (last token − first token) / (output tokens − 1). An answer of one token has none: it meets its target by
  definition and enters no mean, median or percentile.
* A request is *good* when it finished and met both of its own targets. Whoever was sent and is shed, failed
  or unfinished when the run ends, counts as missed: attainment is good ÷ **sent**. So do the turns of a session after
  one that was shed or failed: nobody sends them, and they count among these (``env.surrogate.simulate.abandon``).
* The first ``warmup`` and last ``drain`` share of arrivals are left out of every figure except the
  histogram of token gaps (``itl``) and the cluster's counters: those cover the whole run (see ``windows``).
* Of sessions the later turns come for as long as the sessions last, long after the last one has begun. ``settled``
  measures all that arrives while sessions begin, and cuts shares off that time instead of the arrivals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.core.kinds import RequestState
from engine.core.origin import STAMPS
from engine.errors import SlalomError
from engine.latency.evaluate import FOREVER, TICKS_PER_S

PERCENTILES = (90, 95, 99)


@dataclass(frozen=True)
class Outcomes:
    """What became of each measured request (M of them, in order of arrival).

    Times are seconds and NaN where the event never happened; ``*_ok`` are booleans.
    """

    rows: NDArray[np.int64]  # index into RunResult.req
    sent_total: int  # requests sent in the whole run, windows included
    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]
    e2el_s: NDArray[np.float64]
    finished: NDArray[np.bool_]
    ttft_ok: NDArray[np.bool_]
    tpot_ok: NDArray[np.bool_]

    @property
    def good(self) -> NDArray[np.bool_]:
        """Finished with both targets met."""
        return self.finished & self.ttft_ok & self.tpot_ok


def outcomes(run: Any, *, warmup: float = 0.05, drain: float = 0.0, settled: bool = False) -> Outcomes:
    """Seal every request of a run that falls between the warm-up and the drain window.

    :param run: a ``RunResult``
    :param warmup: share of arrivals left out at the start, 0 to 1
    :param drain: share of arrivals left out at the end
    :param settled: shares of the time in which sessions begin instead, and nothing that arrives after it
    :raises SlalomError: the windows leave nothing to measure
    """
    if not (warmup >= 0.0 and drain >= 0.0 and warmup + drain < 1.0):
        raise SlalomError("windows", (warmup, drain), "warm-up and drain are shares of arrivals with a sum below 1")
    req = run.req
    sent = np.flatnonzero((req["arrival"] >= 0) & (req["state"] != RequestState.NEW))
    at = absolute_s(run, "arrival")
    order = sent[np.argsort(at[sent], kind="stable")]
    rows = order[int(warmup * len(order)) : len(order) - int(drain * len(order))]
    if settled:
        first, last = sessions_begin(run)
        length = last - first
        rows = order[(at[order] >= first + warmup * length) & (at[order] <= last - drain * length)]
    if len(rows) == 0:
        raise SlalomError("requests", len(order), "no request falls into the measured window; simulate more")
    r = req[rows]
    started = r["first_token"] >= 0
    finished = r["state"] == RequestState.FINISHED
    wait = waits(r)
    span = np.where(finished, r["last_token"] - r["first_token"], 0)
    gaps = np.maximum(r["generated"].astype(np.int64) - 1, 0)
    tpot_slo = np.minimum(r["tpot_slo"], 2 * FOREVER // np.maximum(gaps, 1))  # the product fits 64 bits
    return Outcomes(
        rows=rows,
        sent_total=len(order),
        ttft_s=np.where(started, wait / TICKS_PER_S, np.nan),
        tpot_s=np.where(finished & (gaps > 0), span / np.maximum(gaps, 1) / TICKS_PER_S, np.nan),
        e2el_s=np.where(finished, (r["last_token"] - r["arrival"]) / TICKS_PER_S, np.nan),
        finished=finished,
        ttft_ok=started & (wait <= r["ttft_slo"]),
        tpot_ok=finished & ((gaps == 0) | (span <= tpot_slo * gaps)),
    )


def refusals(r: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which of the requests ``r`` were refused (ended before a first token), and which of these later than their TTFT
    target."""
    gone = (r["state"] == RequestState.SHED) | (r["state"] == RequestState.FAILED)
    refused = gone & (r["first_token"] < 0)
    return refused, refused & (r["finished"] - r["arrival"] > r["ttft_slo"])


def waits(r: NDArray[Any]) -> NDArray[np.int64]:
    """How long each of the requests ``r`` waited for its first token, in ticks; 0 where none came."""
    return np.where(r["first_token"] >= 0, r["first_token"] - r["arrival"], 0)


def absolute_s(run: Any, stamp: str) -> NDArray[np.float64]:
    """A stamp of every request in seconds from the beginning of the run, (R,)."""
    seconds: NDArray[np.float64] = run.req[stamp] / TICKS_PER_S
    origin_s = getattr(run, "origin_s", None)
    return seconds if origin_s is None else origin_s + seconds


def sessions_begin(run: Any) -> tuple[float, float]:
    """When the first and the last open-loop request of a run arrived, seconds from its beginning."""
    roots = len(run.req) - int((run.req["next_turn"] > 0).sum())  # each later turn is the next one of one request
    at = absolute_s(run, "arrival")[:roots]
    begun = at[run.req["arrival"][:roots] >= 0]
    return float(begun.min()), float(begun.max())


def on_one_clock(run: Any) -> tuple[NDArray[Any], float]:
    """The requests of a run with all stamps counted from its beginning, and units in a second.

    :return: ``run.req`` and ticks; of a run whose origin moved, a copy in nanoseconds, which last for centuries
    """
    if getattr(run, "origin_s", None) is None:
        return run.req, float(TICKS_PER_S)
    req = run.req.copy()
    for stamp in STAMPS:
        since = np.rint(absolute_s(run, stamp) * 1e9).astype(np.int64)
        req[stamp] = np.where(req[stamp] >= 0, since, req[stamp])
    return req, 1e9


def block_counts(found: Outcomes, n_blocks: int) -> tuple[list[int], list[int]]:
    """Sent and good requests in ``n_blocks`` runs of consecutive arrivals, the unit of the bootstrap."""
    block = np.arange(len(found.rows)) * n_blocks // len(found.rows)
    sent = np.bincount(block, minlength=n_blocks)
    good = np.bincount(block, weights=found.good, minlength=n_blocks)
    return sent.tolist(), good.astype(int).tolist()


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _spread(name: str, seconds: NDArray[np.float64]) -> dict[str, float | None]:
    """mean, median, std and percentiles in ms of what happened; None for all when nothing did."""
    ms = seconds[np.isfinite(seconds)] * 1e3
    keys = [f"{kind}_{name}_ms" for kind in ("mean", "median", "std", *(f"p{p}" for p in PERCENTILES))]
    if len(ms) == 0:
        return dict.fromkeys(keys)
    figures = [ms.mean(), np.median(ms), ms.std(), *np.percentile(ms, PERCENTILES)]
    return dict(zip(keys, map(float, figures), strict=True))


def histogram_stats(counts: Any, edges_s: Any) -> dict[str, float | None]:
    """Spread of the token gaps from their histogram: exact to the width of a bin.

    :param counts: ``(bins,)`` token gaps per bin
    :param edges_s: ``(bins + 1,)`` bin edges, seconds; an unbounded last edge is read as its lower one
    """
    counts = np.asarray(counts, dtype=np.float64)
    edges = np.asarray(edges_s, dtype=np.float64)
    if not np.isfinite(edges[-1]):
        edges = np.append(edges[:-1], edges[-2])
    total = counts.sum()
    keys = [f"{kind}_itl_ms" for kind in ("mean", "median", "std", *(f"p{p}" for p in PERCENTILES))]
    if total == 0:
        return dict.fromkeys(keys)
    middle = (edges[1:] + edges[:-1]) / 2
    mean = (counts * middle).sum() / total
    std = np.sqrt((counts * (middle - mean) ** 2).sum() / total)

    def quantile(share: float) -> float:
        cumulative = np.cumsum(counts)
        i = int(np.searchsorted(cumulative, share * total))
        below = cumulative[i] - counts[i]
        return float(edges[i] + (edges[i + 1] - edges[i]) * (share * total - below) / counts[i])

    figures = [mean, quantile(0.5), std, *(quantile(p / 100) for p in PERCENTILES)]
    return {key: float(figure) * 1e3 for key, figure in zip(keys, figures, strict=True)}


def _peaks(
    arrival_s: NDArray[np.float64], leave_s: NDArray[np.float64], first_s: NDArray[np.float64],
    last_s: NDArray[np.float64], generated: NDArray[Any],
) -> tuple[int, float]:  # fmt: skip
    """(most requests in the system at once, most output tokens in one second).

    Only first and last token of a request are known, so its tokens are spread evenly between them.

    :param first_s: of finished requests, as the two after it
    """
    stamps = np.concatenate([arrival_s, leave_s])
    step = np.concatenate([np.ones(len(arrival_s), dtype=np.int64), -np.ones(len(leave_s), dtype=np.int64)])
    concurrent = int(np.cumsum(step[np.lexsort((step, stamps))]).max())
    if len(first_s) == 0:
        return concurrent, 0.0
    span = np.maximum(last_s - first_s, 1e-9)
    speed = generated / span
    times = np.concatenate([first_s, first_s + span])
    change = np.concatenate([speed, -speed])
    order = np.argsort(times, kind="stable")
    times, rate = times[order], np.cumsum(change[order])
    produced = np.concatenate([[0.0], np.cumsum(rate[:-1] * np.diff(times))])
    # Seconds, counted from the first token, in which something begins or ends, and those after them: others are alike.
    busy = np.floor(times - times[0])
    grid = times[0] + np.unique(np.concatenate([busy, busy + 1.0]))
    per_second = np.interp(grid + 1.0, times, produced) - np.interp(grid, times, produced)
    return concurrent, float(per_second.max())


def _rates(run: Any) -> dict[str, float]:
    """``request_rate`` as asked; of a workload of sessions, whose rate is asked, the rate of requests as they came."""
    rate, turns = float(run.rate), int((run.req["next_turn"] > 0).sum())
    if turns == 0:
        return {"request_rate": rate}
    arrived = absolute_s(run, "arrival")[run.req["arrival"] >= 0]
    span = max(float(arrived.max() - arrived.min()), 1e-9)
    return {"request_rate": (len(arrived) - 1) / span, "session_rate": rate}


def detailed(run: Any) -> dict[str, list[Any]]:
    """Per request in order of arrival, under the names of ``vllm bench serve --save-detailed`` (seconds, tokens).

    Gaps between single tokens are not kept per request (``itls``): the surrogate counts them in one histogram.
    """
    found = outcomes(run, warmup=0.0)
    r = run.req[found.rows]
    fates = zip(found.finished, r["state"], strict=True)
    return {
        "start_times": absolute_s(run, "arrival")[found.rows].tolist(),
        "input_lens": r["prompt"].tolist(),
        "output_lens": r["generated"].tolist(),
        "ttfts": [_number(x) for x in found.ttft_s],
        "tpots": [_number(x) for x in found.tpot_s],
        "e2els": [_number(x) for x in found.e2el_s],
        "good": found.good.tolist(),
        "errors": ["" if ok else RequestState(int(state)).name.lower() for ok, state in fates],
    }


def _by_class(run: Any, found: Outcomes) -> dict[str, dict[str, float]]:
    cls = run.req["cls"][found.rows]
    table = {}
    for index, name in enumerate(run.class_names):
        mine = cls == index
        if not mine.any():
            continue
        table[name] = {
            "sent": int(mine.sum()),
            "slo_attainment": float(found.good[mine].mean()),
            "ttft": float(found.ttft_ok[mine].mean()),
            "tpot": float(found.tpot_ok[mine].mean()),
        }
    return table


def summarize(run: Any, *, warmup: float = 0.05, drain: float = 0.0, settled: bool = False) -> dict[str, Any]:
    """All figures of a run as one JSON-ready dict; times in ms, rates per second, None where undefined.

    ``duration`` runs from the first measured arrival to the last measured finish (to the end of the run if
    some are unfinished), as in ``vllm bench serve``; rates and throughputs are per that second.

    :param run: a ``RunResult``
    :param warmup: see :func:`outcomes`
    :param drain: see :func:`outcomes`
    :param settled: see :func:`outcomes`
    :raises SlalomError: the windows leave nothing to measure
    """
    from engine.core.slo import itl_edges_s

    found = outcomes(run, warmup=warmup, drain=drain, settled=settled)
    r, good = run.req[found.rows], found.good
    cluster = np.atleast_1d(run.cluster)[0]
    state, n = r["state"], len(r)
    end_s = float(run.duration_s)
    stamps = ("arrival", "first_token", "last_token")
    arrival_s, first_s, last_s = (absolute_s(run, name)[found.rows] for name in stamps)
    gone = found.finished | (state == RequestState.SHED) | (state == RequestState.FAILED)
    last = float(last_s.max()) if gone.all() and found.finished.any() else end_s
    duration = max(last - float(arrival_s[0]), 1e-9)
    tokens_in, tokens_out = int(r["prompt"].sum()), int(r["generated"].sum())
    waits_s = np.where(r["first_token"] >= 0, found.ttft_s, end_s - arrival_s)
    waited = ~((state == RequestState.SHED) | (state == RequestState.FAILED))
    done = found.finished
    leave_s = np.where(done, last_s, np.where(gone, absolute_s(run, "finished")[found.rows], end_s))
    concurrent, peak_tokens = _peaks(arrival_s, leave_s, first_s[done], last_s[done], r["generated"][done])
    return {
        "num_prompts": n,
        **_rates(run),
        "max_concurrency": None,
        "duration": duration,
        "completed": int(found.finished.sum()),
        "shed": int((state == RequestState.SHED).sum()),
        "failed": int((state == RequestState.FAILED).sum()),
        "unfinished": int((~gone).sum()),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": float(found.finished.sum()) / duration,
        "request_goodput": float(good.sum()) / duration,
        "output_throughput": tokens_out / duration,
        "total_token_throughput": (tokens_in + tokens_out) / duration,
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": concurrent,
        **_spread("ttft", found.ttft_s),
        **_spread("tpot", found.tpot_s),
        **histogram_stats(run.itl, itl_edges_s()),
        **_spread("e2el", found.e2el_s),
        "slo_attainment": float(good.mean()),
        "slo_attainment_by_metric": {
            "ttft": float(found.ttft_ok.mean()),
            "tpot": float(found.tpot_ok.mean()),
        },
        "slo_attainment_by_class": _by_class(run, found),
        "goodput_per_gpu": float(good.sum()) / duration / run.n_gpus,
        "token_goodput": float(r["generated"][good].sum()) / duration,
        "worst_wait_s": _number(waits_s[waited].max()) if waited.any() else None,
        "preemptions": int(cluster["n_preempted"]),
        "migrations": int(cluster["n_migrated"]),
        "migrated_tokens": int(cluster["migrated_tokens"]),
        "role_switches": int(cluster["n_switches"]),
        "prefix_hit_rate": float(r["cached"].sum()) / max(int(r["prompt"][r["prefill_start"] >= 0].sum()), 1),
        "decisions": int(run.decisions),
        "n_gpus": int(run.n_gpus),
        "simulated_s": float(run.duration_s),
        "wall_s": float(run.wall_s),
        "seed": int(run.seed),
        "windows": {
            "warmup_share": warmup,
            "drain_share": drain,
            **({"of": "time in which sessions begin"} if settled else {}),
            "sent_total": found.sent_total,
            "measured": n,
            "whole_run": [
                "itl",
                "preemptions",
                "migrations",
                "migrated_tokens",
                "role_switches",
                "decisions",
            ],
        },
    }
