"""The best fixed arrangement of a scenario's GPUs: roles, counts, budgets, SM split and tensor parallelism.

Three rounds, each on fewer arrangements with more requests: every arrangement with default budgets, the best
of each family with all their budgets, and the finalists on requests that no earlier round has seen. Goodput is
the joint attainment of both targets at ``goal``, simulated under one simple dispatch: shortest queue where
phases are apart (``distserve``), least predicted TTFT elsewhere (``predicted_ttft``). Nothing moves at run
time: holding, role changes and tuning of the scenario are switched off.

Families: ``mixed`` (chunked prefill or whole prompts first), ``disaggregated`` (prefill and decode apart),
``multiplexed`` (both on disjoint SMs; profiles with SM shares only) and ``hybrid`` (some prefill, the rest
mixed). Instances of one arrangement share a profile, except that prefill and decode may differ in tensor
parallelism. A fleet of several kinds of instance keeps them all, each on its own profile
(``eval.placement.fleet``); a hybrid may then mix on one kind and multiplex on another, and chunks and SM splits
may differ by profile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import SlalomError
from engine.latency import Profile
from env.measure.goodput import largest_rate
from env.scenario import Scenario
from env.sections import InstanceGroup
from eval.placement.disaggregation import (
    Disaggregated,
    algorithm_1,
    algorithm_2,
    choose_algorithm,
    reference,
    shares_met,
    siblings,
    steady_requests,
)
from eval.placement.fleet import is_tradable, layouts

CHUNKS = (256, 512, 1024, 2048, 4096)
PREFILL_BUDGETS = (512, 2048, 8192, 16384)
HEADROOMS = (0.7, 0.9, 1.0)
_FAMILY_FINALISTS = 2
_FINALISTS = 5


@dataclass(frozen=True)
class Arrangement:
    """A fixed arrangement. ``family`` is one of those of the module docstring."""

    family: str
    groups: tuple[InstanceGroup, ...]

    @property
    def label(self) -> str:
        """E.g. ``1 prefill (opt-13b-a100-tp2, batches of 8192 tokens) + 1 decode (opt-13b-a100-tp1)``."""
        return " + ".join(f"{g.count} {g.role} ({g.profile}{_budget(g)})" for g in self.groups)

    @property
    def policy(self) -> tuple[str, dict[str, Any]]:
        """The simple dispatch: (rule, its values)."""
        if self.family != "disaggregated":
            return "predicted_ttft", {}
        return "distserve", {"prefill_tokens": next(g.prefill_tokens for g in self.groups if g.role == "prefill")}

    def applied(self, scenario: Scenario) -> Scenario:
        """The scenario on this arrangement, with every lever but placement switched off."""
        return scenario.fixed_on(*(g.model_dump(mode="json") for g in self.groups))


def _budget(group: InstanceGroup) -> str:
    return _tokens(group) + _ORDERS.get(group.order, "") if group.role != "decode" else ""


def _tokens(group: InstanceGroup) -> str:
    if group.role == "prefill" or group.batching_used == "prefill_first":
        first = "whole prompts first, " if group.role == "mixed" else ""
        return f", {first}batches of {group.prefill_tokens} tokens"
    if group.role == "mixed":
        return f", chunks of {group.chunk_tokens} tokens"
    split = f"{group.split} SMs for decode" if group.split != "auto" else f"predictor, headroom {group.headroom:g}"
    return f", {split}"


_ORDERS = {"srf": ", shortest first", "on_time": ", on time"}


@dataclass(frozen=True)
class Effort:
    """How carefully a goodput is measured: requests and seeds per rate, relative width of the bracket."""

    n_requests: int
    seeds: tuple[int, ...] = (0,)
    tolerance: float = 0.02
    split: Any = "valid"


@dataclass(frozen=True)
class Found:
    """An arrangement and its goodput, requests per second of the whole cluster and per GPU in use."""

    arrangement: Arrangement
    rate: float
    gpus: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "label": self.arrangement.label,
            "family": self.arrangement.family,
            "goodput": self.rate,
            "goodput_per_gpu": self.rate / self.gpus,
            "gpus": self.gpus,
            "dispatch": self.arrangement.policy[0],
            "cluster": [g.model_dump(mode="json", exclude_defaults=True) for g in self.arrangement.groups],
        }


# -- which arrangements there are ------------------------------------------------------------------------------


def _group(scenario: Scenario, profile: Profile, role: str, count: int, **changes: Any) -> InstanceGroup:
    """``count`` instances with the limits of the scenario's first group; its KV capacity where the profile is
    the same."""
    first, named = scenario.cluster[0], reference(scenario, profile)
    facts: dict[str, Any] = {
        "count": count,
        "role": role,
        "profile": named,
        "max_batch": max(g.max_batch for g in scenario.cluster),
        "max_prefills": first.max_prefills,
        "kv_tokens": first.kv_tokens if (first.profile or scenario.profile) == named else None,
    }
    return InstanceGroup(**(facts | changes))


def arrangements(scenario: Scenario, gpus: int) -> Iterator[Arrangement]:
    """Every arrangement on ``gpus`` GPUs with default budgets, of roles that the scenario allows; all of them use as
    many GPUs as they can.

    :raises SlalomError: a fleet of several kinds of instance, and other GPUs than its own or shared ones
    """
    if not is_tradable(scenario):
        if gpus != scenario.n_gpus():
            fix = f"{scenario.name} has instances of several kinds and keeps them: leave it out, or change its cluster"
            raise SlalomError("gpus", gpus, fix)
        yield from (Arrangement(_family(groups), groups) for groups in layouts(scenario))
        return
    usable = scenario.usable_roles()
    for arrangement in _every(scenario, gpus):
        if all(group.role in usable for group in arrangement.groups):
            yield arrangement


def _family(groups: tuple[InstanceGroup, ...]) -> str:
    roles = {group.role for group in groups}
    if roles == {"prefill", "decode"}:
        return "disaggregated"
    return str(roles.pop()) if len(roles) == 1 else "hybrid"


def _every(scenario: Scenario, gpus: int) -> Iterator[Arrangement]:
    profiles = [p for p in siblings(scenario) if p.tp <= gpus]
    for profile in profiles:
        n = gpus // profile.tp
        yield Arrangement("mixed", (_group(scenario, profile, "mixed", n),))
        if len(profile.shares) > 1:
            yield Arrangement("multiplexed", (_group(scenario, profile, "multiplexed", n),))
        for k in range(1, n):
            prefill = _group(scenario, profile, "prefill", k)
            yield Arrangement("hybrid", (prefill, _group(scenario, profile, "mixed", n - k)))
    for p in profiles:
        for d in profiles:
            for k in range(1, (gpus - d.tp) // p.tp + 1):
                m = (gpus - k * p.tp) // d.tp
                yield Arrangement(
                    "disaggregated", (_group(scenario, p, "prefill", k), _group(scenario, d, "decode", m))
                )


def variants(arrangement: Arrangement, profiles: Mapping[str, Profile]) -> Iterator[Arrangement]:
    """The arrangement with each budget worth trying: chunks, prefill batches, or SM splits; for all instances of the
    role at once, and for those of each profile alone (prefill batches are one budget of the dispatch).

    :param profiles: by the name that groups call them
    """
    found: dict[str, Arrangement] = {}  # by label: what one profile alone changes may be what it has
    roles = {group.role for group in arrangement.groups}
    for role in ("mixed", "multiplexed") if roles & {"mixed", "multiplexed"} else ("prefill",):
        names = list(dict.fromkeys(str(g.profile) for g in arrangement.groups if g.role == role))
        budgets = {name: list(_budgets(role, profiles[name])) for name in names}
        together = [dict(zip(names, row, strict=True)) for row in zip(*budgets.values(), strict=True)]
        alone = [{name: budget} for name in names for budget in budgets[name] if role != "prefill"]
        for changes in (*together, *alone):
            groups = [
                g.model_copy(update=changes.get(str(g.profile), {})) if g.role == role else g
                for g in arrangement.groups
            ]  # fmt: skip
            changed = Arrangement(arrangement.family, tuple(groups))
            found.setdefault(changed.label, changed)
    yield from found.values()


def _budgets(role: str, profile: Profile) -> Iterator[dict[str, Any]]:
    if role == "prefill":
        yield from ({"prefill_tokens": tokens} for tokens in PREFILL_BUDGETS)
    elif role == "multiplexed":
        yield from ({"headroom": headroom, "split": "auto"} for headroom in HEADROOMS)
        partial = [share.sms for share in profile.shares[:-1]]
        yield from ({"split": partial[len(partial) * part // 4]} for part in (1, 2, 3))
    else:
        yield from ({"chunk_tokens": chunk, "batching": None} for chunk in CHUNKS)
        yield {"batching": "prefill_first"}


def orders(arrangement: Arrangement) -> Iterator[Arrangement]:
    """The arrangement with every other order of its prefill queues: shortest first, on time."""
    for order in ("srf", "on_time"):
        yield Arrangement(arrangement.family, tuple(g.model_copy(update={"order": order}) for g in arrangement.groups))


# -- what they are worth ---------------------------------------------------------------------------------------


def measure(scenario: Scenario, arrangement: Arrangement, goal: float, effort: Effort) -> Found:
    """Goodput of one arrangement; 0 where no rate reaches the goal.

    :param goal: share of requests that must meet both targets
    """
    applied = arrangement.applied(scenario)

    def attainment(rate: float) -> float:
        return shares_met(applied, arrangement.policy, rate, effort.n_requests, effort.seeds, effort.split)[0]

    rate = largest_rate(attainment, scenario.reference_rate, goal, tolerance=effort.tolerance)
    return Found(arrangement, rate, applied.n_gpus())


def _best(found: list[Found], family: str | None = None) -> list[Found]:
    """Descending in goodput; of equals the one on fewer GPUs, then the first."""
    mine = [f for f in found if family in (None, f.arrangement.family)]
    return sorted(mine, key=lambda f: (-f.rate, f.gpus))


def _families(found: list[Found], each: int, overall: int) -> list[Found]:
    chosen = _best(found)[:overall]
    for family in dict.fromkeys(f.arrangement.family for f in found):
        chosen += [f for f in _best(found, family)[:each] if f not in chosen]
    return chosen


def plan(
    scenario: Scenario,
    *,
    gpus: int | None = None,
    goal: float = 0.9,
    n_requests: int | None = None,
    seeds: int = 3,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Search the best fixed arrangement, see the module docstring.

    :param gpus: budget; by default what the scenario uses
    :param goal: share of requests that must meet both targets
    :param n_requests: per run of the last round (by default the scenario's); earlier rounds use fewer
    :param seeds: of the last round
    :param say: told about progress, one line at a time
    :return: JSON-ready; ``best``, ``runner_up``, ``mixed_only``, ``disaggregated_only`` (None where there is
        none), ``reason``, ``distserve`` (what DistServe's own algorithm places for the reference rate)
    :raises SlalomError: bad goal or budget (see :func:`arrangements`), or no arrangement meets the targets at any rate
    """
    if not 0.0 < goal < 1.0:
        raise SlalomError("goal", goal, "give a share of requests between 0 and 1, e.g. 0.9")
    budget = scenario.n_gpus() if gpus is None else gpus
    first = list(arrangements(scenario, budget)) if budget >= 1 else []
    if not first:
        raise SlalomError("gpus", budget, "give enough GPUs for one instance of the profile")
    last = n_requests or scenario.n_requests
    profiles = {reference(scenario, p): p for p in siblings(scenario)}

    say(f"{len(first)} arrangements of {budget} GPUs")
    quick = Effort(max(min(600, last), 1), tolerance=0.1)
    screened = [measure(scenario, a, goal, quick) for a in first]
    kept = _families(screened, _FAMILY_FINALISTS, _FINALISTS)
    second = [v for f in kept for v in variants(f.arrangement, profiles)]
    say(f"{len(second)} variants of the best {len(kept)}, {kept[0].arrangement.label} leading")
    careful = Effort(last, tolerance=0.03)
    tuned = [measure(scenario, a, goal, careful) for a in second]
    # Another budget for another profile: nothing new where all who have one share theirs.
    known = {a.label for a in second}
    more = {v.label: v for f in _best(tuned)[:_FAMILY_FINALISTS] for v in variants(f.arrangement, profiles)}
    third = [v for label, v in more.items() if label not in known]
    tuned += [measure(scenario, a, goal, careful) for a in third]
    finalists = _families(tuned, 1, 3)
    say(f"{len(finalists)} finalists on unseen requests, {finalists[0].arrangement.label} leading")
    final = Effort(last, tuple(range(seeds)), 0.01, "test")
    ranked = _best([measure(scenario, f.arrangement, goal, final) for f in finalists])
    if ranked[0].rate == 0.0:
        fix = f"no arrangement of {budget} GPUs meets them for {100 * goal:g} % of requests; loosen them"
        raise SlalomError("classes", [c.name for c in scenario.classes], fix)
    return _result(scenario, ranked, budget, goal, final, len(first) + len(second) + len(third))


def _result(
    scenario: Scenario, ranked: list[Found], budget: int, goal: float, effort: Effort, searched: int
) -> dict[str, Any]:
    def only(family: str) -> dict[str, Any] | None:
        found = _best(ranked, family)
        return found[0].as_dict() if found else None

    return {
        "scenario": scenario.name,
        "scenario_sha256": scenario.hash(),
        "gpus": budget,
        "goal": goal,
        "best": ranked[0].as_dict(),
        "runner_up": ranked[1].as_dict() if len(ranked) > 1 else None,
        "mixed_only": only("mixed"),
        "disaggregated_only": only("disaggregated"),
        "multiplexed_only": only("multiplexed"),
        "reason": reason(scenario, ranked, goal, effort),
        "distserve": _distserve(scenario, budget, goal),
        "searched": searched,
        "settings": {"requests": effort.n_requests, "seeds": len(effort.seeds), "split": effort.split},
    }


def reason(scenario: Scenario, ranked: list[Found], goal: float, effort: Effort) -> str:
    """One line: what the best arrangement of another family misses at the winner's goodput."""
    best = ranked[0]
    others = [f for f in ranked[1:] if f.arrangement.family != best.arrangement.family]
    if not others:
        return "No other family of arrangements fits on these GPUs."
    rival = others[0].arrangement
    on = rival.applied(scenario)
    both, ttft, tpot = shares_met(on, rival.policy, best.rate, effort.n_requests, effort.seeds, effort.split)
    slow = [text for share, text in ((ttft, "prompts wait"), (tpot, "decode steps are too slow")) if share < goal]
    cause = " and ".join(slow) or "different requests miss one or the other"
    return (
        f"At {best.rate:.3g} requests/s the winner meets both targets for {100 * goal:g} % of requests; "
        f"{rival.label} meets them for {100 * both:.0f} % (TTFT {100 * ttft:.0f} %, TPOT {100 * tpot:.0f} %): "
        f"there {cause}."
    )


def _distserve(scenario: Scenario, budget: int, goal: float) -> dict[str, Any] | None:
    """DistServe's placement for the reference rate, or None where it finds none on these GPUs."""
    algorithm = algorithm_1 if choose_algorithm(scenario) == 1 else algorithm_2
    most, n = max(group.max_batch for group in scenario.cluster), steady_requests(scenario)
    try:
        placed: Disaggregated = algorithm(
            scenario, scenario.reference_rate, node_gpus=budget, goal=goal, max_batch=most, n_requests=n
        )
    except SlalomError:
        return None
    return placed.__dict__ | {"rate": scenario.reference_rate}
