"""``WorkloadSpec``: the ``workload:`` section of a scenario, a union of models told apart by ``kind``.

::

    kind: synthetic                 # arrivals x lengths x prefix structure, nothing to download
    arrival: {kind: poisson}        # or gamma {cv}, weibull {cv}, on_off {on_s, off_s, off_rate, cv},
                                    #    bins {bin_s, rates, cv}, sinusoid {amplitude, period_s, cv},
                                    #    replay {source: {path, format, time_unit, ...}}
    lengths: {kind: preset, name: azure-conv}
                                    # or fixed {prompt, output}, joint {prompt, output, spearman},
                                    #    mixture {parts: [{weight, lengths}]}, empirical {source, run}
    prefix: null                    # or system {prompts, tokens, zipf, share}, documents {questions, active,
                                    #    question_tokens}, rag {documents, per_request, chunk_tokens, ...}
    max_context: 16384              # optional; longer draws are drawn again and counted

    kind: trace                     # rows of a file, in order
    source: {path: a.jsonl, format: mooncake, time_unit: ms, spread_s: 3}
    window: null                    # [t0, t1] in seconds of the file, optional
    split_at: [0.6, 0.8]            # train | valid | test, as shares of the window's time
    arrival: null                   # given: body swap, bodies of the file on these arrivals (else replay,
                                    #    stretched to the rate)
    run: null                       # body swap only: rows per contiguous run, null = one run

    kind: sessions                  # closed loop: a turn is sent `think` seconds after the one before ends
    preset: agents                  # or chat; the fields below override it
    turns: 33                       # first, growth, output: marginals; think: {median_s, p90_s, cap_s};
                                    #    shared, prompts, max_context
    arrival: {kind: poisson}        # of sessions

    kind: shift                     # rate and mix move within the episode
    lengths: [A, B]                 # two or more lengths specs (as above)
    phases: [{duration: 0.5, rate: 1, weights: [1, 0]}, {duration: 0.5, rate: 2, weights: [0, 1], ramp: true}]
                                    # or random: {phases: [2, 6], rate: [0.5, 2.0], ramp_share: 0.5}
    duration_s: 600                 # natural length of an episode; phases last their share of it in any run
    cv: 1.0                         # of the gaps, on the moving clock

    kind: clients                   # superposition of clients, the ServeGen way
    preset: m-large                 # or m-small, deepseek-r1; or rates_path and lengths_path
    lengths: null                   # optional, for presets: a lengths spec instead of the preset's own

    kind: mix                       # several at once
    parts: [{weight: 0.5, cls: 0, workload: {...}}, {weight: 0.5, cls: 1, workload: {...}}]

A marginal is a number, ``{kind: uniform, low, high}``, ``{kind: lognormal, median, mean | p90, low, high}``
or ``{kind: quantiles, q: [...], v: [...]}``. Preset names: ``presets.preset_names()``. Classes are normally
drawn with ``assign_classes`` from the scenario's shares; ``cls`` in a mix binds a part to a class, by name or index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from engine.common.documents import bad_input
from engine.errors import SlalomError
from env.workload.arrivals import ArrivalSpec, PoissonArrivals
from env.workload.base import Model, Split, WorkloadBase, check_request, stream
from env.workload.clients import ClientsSpec
from env.workload.prefix import PrefixSpec
from env.workload.presets import LengthsSpec, within_context
from env.workload.replay import TraceSpec
from env.workload.sessions import SessionsSpec
from env.workload.shift import ShiftSpec
from env.workload.trace import Trace, merge, scale_rate


class SyntheticSpec(WorkloadBase):
    """Independent arrivals, lengths and prefixes."""

    kind: Literal["synthetic"]
    arrival: ArrivalSpec = PoissonArrivals(kind="poisson")
    lengths: LengthsSpec
    prefix: PrefixSpec | None = None
    max_context: int | None = Field(default=None, ge=2)

    def build(self, rate: float, n: int, seed: int, split: Split, classes: Sequence[str] = ()) -> Trace:
        check_request(rate, n)
        rng = stream(seed, split)
        arrival_s = self.arrival.times(rate, n, rng, split)
        prompt, output, redrawn = within_context(self.lengths, n, rng, split, self.max_context)
        meta: dict[str, Any] = {"source": "synthetic", "seed": seed, "split": split}
        if redrawn:
            meta["over_context"] = redrawn
        trace = Trace.make(arrival_s, prompt, output, name="synthetic", meta=meta)
        return self.prefix.apply(trace, rng, self.max_context) if self.prefix else trace


class MixPart(Model):
    """A share of the requests, optionally bound to a class."""

    weight: float = Field(gt=0)
    workload: WorkloadSpec
    cls: Annotated[int, Field(ge=0, lt=2**15)] | str | None = None

    def number(self, classes: Sequence[str]) -> int:
        """The class that the part is bound to.

        :raises SlalomError: a name that is none of ``classes``
        """
        if isinstance(self.cls, str) and self.cls not in classes:
            raise SlalomError("workload.parts.cls", self.cls, f"the scenario has {', '.join(classes) or 'no classes'}")
        return list(classes).index(self.cls) if isinstance(self.cls, str) else self.cls or 0


class MixSpec(WorkloadBase):
    """Several workloads on one clock, each with its share of the open-loop rate.

    Every part is stretched to the common duration ``n_roots / rate`` (by a few percent), so that the mix
    does not end with one part alone.
    """

    kind: Literal["mix"]
    parts: tuple[MixPart, ...] = Field(min_length=1)

    @property
    def natural_s(self) -> float:
        return max(part.workload.natural_s for part in self.parts)

    def unfinished(self, rate: float, n: int) -> str:
        total = sum(part.weight for part in self.parts)
        shares = [part.weight / total for part in self.parts]
        told = [
            part.workload.unfinished(rate * share, max(1, round(n * share)))
            for part, share in zip(self.parts, shares, strict=True)
        ]
        return "; ".join(dict.fromkeys(text for text in told if text))

    def build(self, rate: float, n: int, seed: int, split: Split, classes: Sequence[str] = ()) -> Trace:
        check_request(rate, n)
        shares = np.array([part.weight for part in self.parts])
        shares /= shares.sum()
        seeds = stream(seed, split).integers(0, 2**62, len(self.parts)).tolist()
        built = self._parts(rate, shares, n * shares, seeds, split, classes)
        turns = np.array([trace.n / trace.n_roots for trace in built])
        if (turns != 1).any():  # parts with sessions need more requests than their share to last as long
            built = self._parts(rate, shares, n * shares * turns / (shares @ turns), seeds, split, classes)
        return merge(built)

    def _parts(
        self, rate: float, shares: np.ndarray, counts: np.ndarray, seeds: list[int], split: Split,
        classes: Sequence[str],
    ) -> list[Trace]:  # fmt: skip
        """One trace per part with about ``counts`` requests, at least one each, ``sum(counts)`` in all."""
        edges = np.round(np.concatenate([[0.0], counts.cumsum()]))
        whole = np.maximum(np.diff(edges), 1).astype(int)
        whole[np.argmax(whole)] -= whole.sum() - int(edges[-1])
        if whole.min() < 1:
            raise SlalomError("n", int(edges[-1]), f"ask for at least {len(shares)} requests, one per part")
        built = []
        for part, share, count, seed in zip(self.parts, shares, whole.tolist(), seeds, strict=True):
            trace = part.workload.build(rate * share, count, seed, split, classes)
            if trace.n_roots > 1 and trace.duration_s > trace.arrival_s[0]:
                trace = scale_rate(trace, rate * share)
            if part.cls is not None:
                trace = replace(trace, cls=np.full(trace.n, part.number(classes), np.int16), bound=True)
            built.append(trace)
        return built


WorkloadSpec = Annotated[
    SyntheticSpec | TraceSpec | SessionsSpec | ShiftSpec | ClientsSpec | MixSpec, Field(discriminator="kind")
]
MixPart.model_rebuild()
MixSpec.model_rebuild()
_ADAPTER: TypeAdapter[WorkloadBase] = TypeAdapter(WorkloadSpec)


def parse_workload(section: Any, where: str = "workload") -> WorkloadBase:
    """Validate a parsed YAML section.

    :raises SlalomError: unknown key, wrong value, unknown kind; the field names its place
    """
    try:
        return _ADAPTER.validate_python(section)
    except ValidationError as error:
        raise bad_input(where, error) from error
