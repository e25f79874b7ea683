"""What a policy does in general: recorded decisions, what they hang on, a shallow tree, and what deviating gained.

Decisions are recorded on the engine's own loop with modelled instances (the surrogate's timeline). Four views:

* *importance*: a group of columns is shuffled across the recorded decisions and the policy asked again; the share of
  answers that change is the group's importance (permutation importance, Breiman 2001, with the policy's own answers
  as the target). Groups hold a quantity and its dimensionless twin, so that neither can stand in for the other.
* *tree*: a shallow decision tree on each candidate's distance to the best candidate (per column), trained to say which
  row is chosen; its agreement is the share of held-out decisions where its best row is the policy's.
* *deviations*: where the policy answers differently from ``least_tokens`` asked the same question.
* *gain*: both policies on the same arrivals, paired, with bootstrap 95 % intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.core.columns import Col, Ctx, Kind, Need
from engine.core.kinds import RequestState
from engine.core.policy import Policy
from engine.errors import SlalomError
from env.scenario import Scenario

BASELINE = "least_tokens"
_ALL = int(Need.LOAD | Need.PREDICT | Need.DIMENSIONLESS)

#: Columns of a candidate that say the same thing in two units.
GROUPS: dict[str, tuple[int, ...]] = {
    "predicted TTFT": (Col.TTFT, Col.TTFT_S),
    "wait before prefill": (Col.WAIT, Col.WAIT_S),
    "own prefill time": (Col.PREFILL, Col.PREFILL_S),
    "TPOT slack": (Col.SLACK, Col.MIN_SLACK_S),
    "TPOT slack after": (Col.SLACK_AFTER,),
    "decode step": (Col.STEP, Col.STEP_S),
    "decode step with it": (Col.STEP_WITH, Col.STEP_WITH_S),
    "KV use": (Col.KV, Col.KV_WITH, Col.FREE_BLOCKS),
    "cached prefix": (Col.CACHED, Col.CACHED_TOKENS),
    "batch": (Col.BATCH, Col.RUN_N),
    "queue": (Col.QUEUE, Col.QUEUE_N),
    "queued work": (Col.QUEUE_WORK, Col.QUEUE_TOKENS),
    "outstanding tokens": (Col.OUTSTANDING,),
    "running context": (Col.RUN_CTX,),
    "transfer": (Col.INBOUND, Col.TRANSFER_S, Col.INBOUND_N, Col.INBOUND_TOKENS),
    "in place": (Col.IN_PLACE,),
    "role": (Col.ROLE_PREFILL, Col.ROLE_DECODE, Col.ROLE_MIXED, Col.ROLE_MULTIPLEXED, Col.ROLE),
}
#: What the tree may look at; each as the distance to the least among the allowed candidates.
_TREE = (
    Col.TTFT_S, Col.WAIT_S, Col.PREFILL_S, Col.STEP_WITH_S, Col.MIN_SLACK_S, Col.TRANSFER_S, Col.OUTSTANDING,
    Col.QUEUE_TOKENS, Col.RUN_N, Col.CACHED_TOKENS, Col.KV_WITH, Col.IN_PLACE, Col.ROLE_DECODE, Col.ROLE_PREFILL,
)  # fmt: skip
_CONTEXT = tuple(Ctx(c) for c in range(Ctx.SIZE, Ctx.NOW_S))


@dataclass
class Decision:
    """One recorded question and both answers. ``memory`` is the policy's before it answered."""

    context: np.ndarray
    candidates: np.ndarray
    mask: np.ndarray
    memory: np.ndarray
    choice: int
    baseline: int

    @property
    def kind(self) -> Kind:
        return Kind(int(self.context[Ctx.KIND]))


@dataclass
class Recorder:
    """A policy that writes down what it was asked, and what the baseline would have said; answers stay its own.

    :param limit: decisions kept; a later one replaces a random earlier one, so that the whole run is sampled
    """

    inner: Policy
    baseline: Policy
    limit: int = 4000
    seen: int = 0
    differing_requests: set[int] = field(default_factory=set)
    kept: list[Decision] = field(default_factory=list)

    arrangement = None
    needs = _ALL

    def __post_init__(self) -> None:
        self.name, self.params, self.memory = self.inner.name, self.inner.params, self.inner.memory.copy()
        self._baseline_memory = self.baseline.memory.copy()
        self._rng = np.random.default_rng(0)

    def describe(self) -> dict[str, Any]:
        """As the policy's."""
        return self.inner.describe()

    def decide(self, context: Any, candidates: Any, mask: Any, params: Any, memory: Any) -> int:
        """The policy's answer."""
        base = self.baseline
        before = memory.copy()
        choice = int(self.inner.decide(context, candidates, mask, params, memory))
        other = int(base.decide(context, candidates, mask, base.params, self._baseline_memory))
        if choice != other and int(context[Ctx.KIND]) <= Kind.PLACE_DECODE:
            self.differing_requests.add(int(context[Ctx.REQUEST]))
        if int(mask.sum()) > 1:
            self._keep(Decision(context.copy(), candidates.copy(), mask.copy(), before, choice, other))
        return choice

    def _keep(self, decision: Decision) -> None:
        self.seen += 1
        if len(self.kept) < self.limit:
            self.kept.append(decision)
            return
        at = int(self._rng.integers(self.seen))
        if at < self.limit:
            self.kept[at] = decision


def record(scenario: Scenario, policy: Any, *, rate: float, n_requests: int, seed: int, limit: int = 4000) -> Recorder:
    """Play ``n_requests`` of the scenario's test window and keep what was decided.

    :raises SlalomError: unknown policy; a run without a single choice
    """
    from engine.live.modelled import play
    from env.surrogate.arena import arena_of, build_trace, horizon_s
    from env.surrogate.simulate import bind_policy

    arena = arena_of(scenario)
    bound, baseline = bind_policy(policy, scenario), bind_policy(BASELINE, scenario)
    trace = build_trace(scenario, rate, n_requests, seed, "test")
    state = arena.cluster(bound.arrangement, trace, horizon_s(trace))
    recorder = Recorder(bound, baseline, limit)
    play(state, recorder, n_roots=trace.n_roots)
    if not recorder.kept:
        raise SlalomError("scenario", scenario.name, "nothing was ever there to choose; take one with more instances")
    return recorder


def _ask(policy: Policy, decision: Decision, candidates: np.ndarray, context: np.ndarray) -> int:
    return int(policy.decide(context, candidates, decision.mask, policy.params, decision.memory.copy()))


def importance(recorder: Recorder, kind: Kind, *, limit: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """Share of answers that change when a group of columns is shuffled, greatest first; context columns as one each."""
    decisions = [d for d in recorder.kept if d.kind == kind][:limit]
    policy, rng = recorder.inner, np.random.default_rng(seed)
    rows = [(d, np.flatnonzero(d.mask.astype(bool) & (d.candidates[:, Col.INSTANCE] >= 0))) for d in decisions]
    found = []
    for name, columns in GROUPS.items():
        pool = np.concatenate([d.candidates[np.ix_(k, np.array(columns))] for d, k in rows])
        if len(pool) == 0 or (pool == pool[0]).all():
            continue
        shuffled, at, changed = rng.permutation(pool), 0, 0
        for d, k in rows:
            candidates = d.candidates.copy()
            candidates[np.ix_(k, np.array(columns))] = shuffled[at : at + len(k)]
            at += len(k)
            changed += _ask(policy, d, candidates, d.context) != d.choice
        found.append({"feature": name, "of": "candidate", "changed": changed / len(decisions)})
    for column in _CONTEXT:
        values = np.array([d.context[column] for d in decisions])
        if len(values) == 0 or (values == values[0]).all():
            continue
        changed = 0
        for d, value in zip(decisions, rng.permutation(values), strict=True):
            context = d.context.copy()
            context[column] = value
            changed += _ask(policy, d, d.candidates, context) != d.choice
        found.append({"feature": column.name.lower(), "of": "context", "changed": changed / len(decisions)})
    return sorted(found, key=lambda f: -float(f["changed"]))


def _relative(decision: Decision) -> tuple[np.ndarray, np.ndarray]:
    """(rows that are allowed, their columns of _TREE as the distance to the least, plus IS_HOLD and IS_SHED)."""
    rows = np.flatnonzero(decision.mask)
    values = decision.candidates[np.ix_(rows, np.array(_TREE, dtype=int))]
    own = decision.candidates[rows, Col.INSTANCE] >= 0
    least = values[own].min(axis=0) if own.any() else np.zeros(len(_TREE))
    values = np.where(own[:, None], values - least, 0.0)
    extra = decision.candidates[np.ix_(rows, np.array([Col.IS_HOLD, Col.IS_SHED], dtype=int))]
    return rows, np.concatenate([values, extra], axis=1)


def distil(recorder: Recorder, kind: Kind, *, depth: int = 3, seed: int = 0) -> dict[str, Any] | None:
    """A tree of ``depth`` that names the chosen row, and how often it does on decisions it was not made from.

    :return: ``agreement``, ``baseline_agreement`` (least_tokens on the same decisions), ``text``; None with fewer than
        50 decisions
    :raises SlalomError: scikit-learn is not installed
    """
    try:
        from sklearn.tree import DecisionTreeClassifier
    except ImportError as error:
        raise SlalomError("--depth", depth, "the tree needs scikit-learn: pip install 'slalom[explain]'") from error
    decisions = [d for d in recorder.kept if d.kind == kind]
    if len(decisions) < 50:
        return None
    order = np.random.default_rng(seed).permutation(len(decisions))
    cut = int(0.7 * len(decisions))
    train, test = ([decisions[i] for i in part] for part in (order[:cut], order[cut:]))
    features, chosen = [], []
    for d in train:
        rows, values = _relative(d)
        features.append(values)
        chosen.append(rows == d.choice)
    tree = DecisionTreeClassifier(
        max_depth=depth, class_weight="balanced", min_samples_leaf=max(len(train) // 100, 5), random_state=seed
    ).fit(np.concatenate(features), np.concatenate(chosen))
    agreed = 0
    for d in test:
        rows, values = _relative(d)
        likely = tree.predict_proba(values)[:, 1] if len(tree.classes_) == 2 else np.ones(len(rows))
        # Among equally likely rows the one with the fewest tokens, as a person would read the tree.
        best = np.lexsort((d.candidates[rows, Col.OUTSTANDING], -likely))[0]
        agreed += int(rows[best]) == d.choice
    names = [f"{Col(c).name.lower()} above best" for c in _TREE] + ["is_hold", "is_shed"]
    return {
        "depth": depth,
        "decisions": len(test),
        "agreement": agreed / len(test),
        "baseline_agreement": float(np.mean([d.baseline == d.choice for d in test])),
        "text": "\n".join(_tree_lines(tree, names)),
    }


def _tree_lines(tree: Any, names: Sequence[str], node: int = 0, depth: int = 0) -> list[str]:
    """The tree with, at each leaf, how likely a candidate that ends there is the chosen one (both kinds weighted alike)
    and the share of all candidates that end there."""
    t, pad = tree.tree_, "|   " * depth
    if t.children_left[node] < 0:
        value = t.value[node][0]
        likely = value[-1] / value.sum() if len(value) > 1 else 1.0
        share = t.n_node_samples[node] / t.n_node_samples[0]
        return [f"{pad}chosen {100 * likely:.0f} %  ({100 * share:.0f} % of candidates)"]
    name, threshold = names[t.feature[node]], t.threshold[node]
    return [
        f"{pad}{name} <= {threshold:.4g}",
        *_tree_lines(tree, names, t.children_left[node], depth + 1),
        f"{pad}{name} > {threshold:.4g}",
        *_tree_lines(tree, names, t.children_right[node], depth + 1),
    ]


def deviations(recorder: Recorder, kind: Kind) -> dict[str, Any] | None:
    """How often and where the policy parts from the baseline; None where nothing of ``kind`` was decided."""
    decisions = [d for d in recorder.kept if d.kind == kind]
    if not decisions:
        return None
    differ = np.array([d.choice != d.baseline for d in decisions])
    contexts = np.array([d.context[list(_CONTEXT)] for d in decisions])
    found: dict[str, Any] = {"decisions": len(decisions), "share": float(differ.mean()), "when": [], "trades": {}}
    if differ.all() or not differ.any():
        return found
    spread = contexts.std(axis=0)
    shift = (contexts[differ].mean(axis=0) - contexts[~differ].mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    for k in np.argsort(-np.abs(shift))[:4]:
        if spread[k] > 0:
            found["when"].append(
                {
                    "feature": _CONTEXT[k].name.lower(),
                    "differing": float(contexts[differ, k].mean()),
                    "same": float(contexts[~differ, k].mean()),
                    "standard_deviations": float(shift[k]),
                }
            )
    placed = [
        d.candidates[[d.choice, d.baseline]]
        for d, other in zip(decisions, differ, strict=True)
        if other and (d.candidates[[d.choice, d.baseline], Col.INSTANCE] >= 0).all()
    ]
    if placed:
        mean = np.array(placed).mean(axis=0)
        for column in (Col.TTFT_S, Col.STEP_WITH_S, Col.TRANSFER_S, Col.OUTSTANDING, Col.CACHED_TOKENS, Col.KV_WITH):
            if mean[:, column].any():
                found["trades"][column.name.lower()] = {
                    "policy": float(mean[0, column]),
                    BASELINE: float(mean[1, column]),
                }
    return found


def gain(
    scenario: Scenario,
    policy: Any,
    *,
    rate: float,
    n_requests: int,
    seeds: Sequence[int],
    differing: Mapping[int, set[int]],
) -> dict[str, Any]:
    """Attainment of both policies on the same arrivals, and of the requests where they differed.

    :param differing: per seed, the requests for which the policy deviated
    """
    from env.measure.metrics import block_counts, outcomes, summarize
    from env.measure.stats import bootstrap_attainment, bootstrap_weights, interval
    from env.surrogate.simulate import simulate

    good, sent, rows, touched = [], [], [], np.zeros(3)
    for seed in seeds:
        runs = [simulate(scenario, p, rate=rate, n_requests=n_requests, seed=seed) for p in (policy, BASELINE)]
        counts = [block_counts(outcomes(run), 20) for run in runs]
        sent.append([c[0] for c in counts])
        good.append([c[1] for c in counts])
        rows.append([summarize(run) for run in runs])
        some = sorted(r for r in differing.get(seed, ()) if r < n_requests)
        ok = [
            (run.req["state"] == RequestState.FINISHED) & (run.req["ttft_ok"] == 1) & (run.req["tpot_ok"] == 1)
            for run in runs
        ]
        touched += (len(some), ok[0][some].sum(), ok[1][some].sum())
    counted, hit = np.array(sent).transpose(1, 0, 2), np.array(good).transpose(1, 0, 2)
    weights = bootstrap_weights(len(seeds), 20, 2000, 0)
    samples = bootstrap_attainment(hit, counted, weights)
    total = hit.sum(axis=(1, 2)) / counted.sum(axis=(1, 2))
    metrics = {}
    for key in ("p90_ttft_ms", "p90_tpot_ms"):
        pairs = [[r[k].get(key) for r in rows] for k in range(2)]
        metrics[key] = [float(np.mean([v for v in values if v is not None])) for values in pairs]
    n = max(touched[0], 1.0)
    return {
        "rate": rate,
        "seeds": len(seeds),
        "requests": n_requests,
        "attainment": {"policy": float(total[0]), BASELINE: float(total[1])},
        "difference": float(total[0] - total[1]),
        "interval": interval(samples[:, 0] - samples[:, 1]),
        **{key: {"policy": values[0], BASELINE: values[1]} for key, values in metrics.items()},
        "deviating_requests": {
            "share": float(touched[0] / (len(seeds) * n_requests)),
            "good_policy": float(touched[1] / n),
            f"good_{BASELINE}": float(touched[2] / n),
        },
    }
