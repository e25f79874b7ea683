"""``kind: clients``: requests as the sum of skewed, bursty clients (ServeGen, arXiv 2505.09999).

Independent equal clients average to Poisson; real ones do not, because the biggest few carry most of the
rate. Each client keeps its share of the asked rate, its family of gaps and its coefficient of variation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from engine.errors import SlalomError
from env.workload.arrivals import gamma_gaps, weibull_gaps
from env.workload.base import Split, WorkloadBase, check_request, stream
from env.workload.lengths import QuantileMarginal, draw_marginal
from env.workload.presets import LengthsSpec, PresetLengths, within_context
from env.workload.rawfile import read_csv, read_jsonl
from env.workload.trace import Trace

_DATA = Path(__file__).parent / "data" / "clients.json"
_MIN_CV, _MAX_CV = 0.1, 30.0


@dataclass(frozen=True, eq=False)
class ClientPool:
    """Clients of one window: ``share`` of the rate (sums to 1), ``cv`` of gaps, whether gaps are Weibull,
    and per client its (prompt, output) marginals where known."""

    share: np.ndarray
    cv: np.ndarray
    weibull: np.ndarray
    lengths: tuple[tuple[QuantileMarginal, QuantileMarginal] | None, ...] = ()


class ClientsSpec(WorkloadBase):
    """Published statistics by ``preset``, or ServeGen's own files by path.

    :param preset: m-large, m-small or deepseek-r1: mean share, CV and family of every client
    :param rates_path: CSV client_id, timestamp, rate, cv, pattern; a random 600-s window of the split's part
        of the days is drawn per episode
    :param lengths_path: JSON Lines of the clients' length PDFs per 6-hour window; clients without lengths
        are left out
    :param lengths: use this model for all clients instead
    """

    kind: Literal["clients"]
    preset: Literal["m-large", "m-small", "deepseek-r1"] | None = None
    rates_path: str | None = None
    lengths_path: str | None = None
    lengths: LengthsSpec | None = None
    split_at: tuple[float, float] = (0.6, 0.8)
    max_context: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _one_source(self) -> ClientsSpec:
        if (self.preset is None) == (self.rates_path is None):
            raise ValueError("give preset or rates_path, not both")
        if self.rates_path and not (self.lengths_path or self.lengths):
            raise ValueError("give lengths_path or lengths with rates_path")
        return self

    def build(self, rate: float, n: int, seed: int, split: Split, classes: Sequence[str] = ()) -> Trace:
        check_request(rate, n)
        rng = stream(seed, split)
        if self.preset:
            pool = _preset_pool(self.preset)
        else:
            assert self.rates_path is not None
            windows = read_clients(self.rates_path, None if self.lengths else self.lengths_path)
            pool = _pick(windows, self.split_at, split, rng)
        arrival_s, client = client_times(pool, rate, n, rng)
        if pool.lengths and self.lengths is None:
            prompt, output = _client_lengths(pool, client, rng)
        else:
            model = self.lengths or PresetLengths(kind="preset", name=f"servegen-{self.preset}")
            prompt, output, _ = within_context(model, n, rng, split, self.max_context)
        meta = {"source": self.preset or Path(self.rates_path or "").name, "seed": seed, "split": split}
        trace = Trace.make(arrival_s, prompt, output, name="clients", meta=meta)
        if self.max_context is None:
            return trace
        fits = prompt.astype(np.int64) + output <= self.max_context
        return trace if fits.all() else trace.rows(fits)


def client_times(pool: ClientPool, rate: float, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Superpose the clients over ``n / rate`` seconds.

    Each client's number of requests is drawn from its share, its gaps from its family with one gap more
    than requests; rescaled gaps fill the span (ServeGen section 5): burstiness stays, the rate is exact.

    :return: times f8 (n,) sorted, and the client of each, i8 (n,)
    """
    span = n / rate
    counts = rng.multinomial(n, pool.share)
    times, owners = [], []
    for client in np.flatnonzero(counts):
        draw = weibull_gaps if rng.random() < pool.weibull[client] else gamma_gaps
        gaps = draw(int(counts[client]) + 1, float(pool.cv[client]), rng)
        edges = np.cumsum(gaps)
        offset = rng.random() * edges[-1]  # the span starts at a random moment of the client's own process
        times.append(np.sort((edges[:-1] + offset) % edges[-1]) * (span / edges[-1]))
        owners.append(np.full(counts[client], client))
    joined, owner = np.concatenate(times), np.concatenate(owners)
    order = np.argsort(joined, kind="stable")
    return joined[order], owner[order]


@lru_cache(maxsize=3)
def _preset_pool(name: str) -> ClientPool:
    entry = json.loads(_DATA.read_text(encoding="utf-8"))[name]
    share = np.array(entry["share"])
    return ClientPool(share / share.sum(), np.array(entry["cv"]), np.array(entry["weibull"]))


def read_clients(rates_path: str, lengths_path: str | None) -> tuple[ClientPool, ...]:
    """One pool per 600-s window of a ServeGen rates file, in time order; idle windows are left out.

    :raises SlalomError: missing column, value that is not a number, no client with rate and lengths
    """
    stamps = tuple(_stamp(path) for path in (rates_path, lengths_path) if path)
    return _read_clients(rates_path, lengths_path, stamps)


def _stamp(path: str) -> int:
    try:
        return Path(path).stat().st_mtime_ns
    except (OSError, ValueError) as error:
        raise SlalomError("workload.clients path", path, "give a file that exists") from error


@lru_cache(maxsize=4)
def _read_clients(rates_path: str, lengths_path: str | None, stamps: tuple[int, ...]) -> tuple[ClientPool, ...]:
    names = {"client": "client_id", "time": "timestamp", "rate": "rate", "cv": "cv", "pattern": "pattern"}
    table = read_csv(Path(rates_path), names)
    client, time, rate, cv = (table.numbers(name) for name in ("client", "time", "rate", "cv"))
    bad = np.flatnonzero((rate < 0) | (cv < 0))
    if len(bad):
        raise SlalomError(table.place(int(bad[0])), [rate[bad[0]], cv[bad[0]]], "rates and cvs are >= 0")
    pattern = np.array(table.columns["pattern"])
    lengths = _read_lengths(Path(lengths_path)) if lengths_path else {}
    pools = []
    for start in np.unique(time):
        known = [
            row
            for row in np.flatnonzero((time == start) & (rate > 0))
            if lengths_path is None or (int(client[row]), int(start) // 21600 * 21600) in lengths
        ]
        if known:
            window = int(start) // 21600 * 21600
            pairs = tuple(lengths[int(client[row]), window] for row in known) if lengths_path else ()
            pools.append(
                ClientPool(
                    rate[known] / rate[known].sum(),
                    np.clip(cv[known], _MIN_CV, _MAX_CV),
                    (pattern[known] == "Weibull").astype(float),
                    pairs,
                )
            )
    if not pools:
        raise SlalomError(Path(rates_path).name, 0, "no window has a client with a rate and lengths")
    return tuple(pools)


def _read_lengths(path: Path) -> dict[tuple[int, int], tuple[QuantileMarginal, QuantileMarginal]]:
    table = read_jsonl(path, {"client": "client_id", "windows": "windows"})
    found = {}
    table.require("windows", lambda windows: isinstance(windows, dict), "give a mapping from start to PDFs")
    for row, windows in enumerate(table.columns["windows"]):
        for start, pdfs in (windows or {}).items():
            try:
                pair = _marginal(pdfs["input_tokens"]), _marginal(pdfs["output_tokens"])
                known = int(table.columns["client"][row]), int(start)
            except (KeyError, ValueError, TypeError, AttributeError, OverflowError, IndexError) as error:
                raise SlalomError(
                    table.place(row), start, f"write PDFs as {{tokens: probability}} ({error})"
                ) from error
            if pair[0] is not None and pair[1] is not None:
                found[known] = (pair[0], pair[1])
    return found


def _marginal(text: str) -> QuantileMarginal | None:
    """``"{45: 0.1, 46: 0.9}"`` as a step-like quantile table; None for an idle window."""
    items = [item.split(":") for item in text.strip("{} ").split(",") if item.strip()]
    if not items:
        return None
    values = np.array([[float(key), float(value)] for key, value in items])
    values = values[values[:, 1] > 0]
    values = values[np.argsort(values[:, 0])]
    upper = values[:, 1].cumsum() / values[:, 1].sum()
    upper[-1] = 1.0
    steps, first = np.unique(np.concatenate([[0.0], upper]), return_index=True)
    tokens = np.maximum(np.concatenate([values[:1, 0], values[:, 0]])[first], 1.0)
    return QuantileMarginal(kind="quantiles", q=tuple(steps.tolist()), v=tuple(tokens.tolist()))


def _pick(
    pools: tuple[ClientPool, ...], split_at: tuple[float, float], split: Split, rng: np.random.Generator
) -> ClientPool:
    """A random window of the split's stretch of time."""
    cuts = np.round(np.array([0.0, *split_at, 1.0]) * len(pools)).astype(int)
    first, last = {"train": cuts[0:2], "valid": cuts[1:3], "test": cuts[2:4]}[split]
    if first >= last:
        raise SlalomError("workload.split_at", split_at, f"the {split} part has no window; move the cuts")
    return pools[int(rng.integers(first, last))]


def _client_lengths(pool: ClientPool, client: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    prompt, output = np.empty(len(client), np.int32), np.empty(len(client), np.int32)
    for place in np.unique(client):
        rows = np.flatnonzero(client == place)
        pair = pool.lengths[place]
        assert pair is not None
        prompt[rows] = draw_marginal(pair[0], rng.random(len(rows)))
        output[rows] = draw_marginal(pair[1], rng.random(len(rows)))
    return prompt, output
