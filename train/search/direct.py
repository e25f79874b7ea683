"""The learner ``direct``: search over published rules, arrangements and a context-conditioned score.

    explore   successive halving over the published rules, each also with queues on time, over every composition of
              roles, and over random designs: other parameters, other arrangements, linear scores; the survivors'
              neighbours and offspring (the score of one on the arrangement of another) join the next round
    refine    CMA-ES from the best designs of different arrangements, then on from what became best, over the offsets of
              ``train.search.space``: all weights, their slopes in the context, budgets of the arrangement. A rule
              starts as itself, plus deviations. The covariance is diagonal (Ros and Hansen 2008): some hundred
              generations are too few to learn that of sixty to ninety offsets

Every generation meets fresh arrivals, the same for all its members. Rates follow the best so far: where its level
is 99 %, 90 % (the knee), the middle between them, where 95 % is decided, and beyond the knee.
With a budget in requests the outcome depends on the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from cmaes import SepCMA

from engine.core.kinds import Order
from engine.errors import SlalomError
from env.scenario import Scenario
from env.surrogate.arena import arena_of
from policies import registry
from train.search.arrange import composed
from train.search.fitness import Fitness, rates_between
from train.search.journal import Journal, Remembered
from train.search.space import Design, Space, offspring, random_design, reordered, varied

_OWN = ("linear_score", "planner")  # have a search of their own
_STRICT = (0.35, 0.95)  # least and greatest of the lowest, likewise; where the goodput at 99 % lies between
_MODERATE = 0.7  # where it is while that goodput is not known, or none
#: Successive halving: share of the designs still in, loads (times the knee; empty: the rates of the objective), seeds,
#: requests of one simulation (for one of 2000). The first two are a first look: bursts are cheap and tell the worst.
_RUNGS: tuple[tuple[float, tuple[float, ...], int, int], ...] = (
    (1.0, (1.15,), 1, 1000),
    (0.35, (1.0, 1.2), 1, 1500),
    (0.12, (0.8, 1.0, 1.2), 3, 2000),
    (0.0, (), 6, 2500),
)
_FIRST_LOOK = 2  # rungs
_PLACED = 3  # published rules that are tried on every composition of roles
_FIRST_SEED, _CMA_SEED = 10_000, 20_000
_KNEE_SEEDS, _FINAL_SEEDS = 4, 10
_KNEE_RATES = 12  # about so many rates are looked at for a knee
_KNEE_LENGTH = 4  # times the requests of other simulations: a rate that is too high shows it in time only
_RUNG_SHARE, _KNEE_SHARE, _FINAL_SHARE = 0.12, 0.02, 0.08  # of the budget, at most
_RACE = 0.45  # share of the time of CMA-ES in which several starts compete
_FINALISTS = 3  # beside the best rule
_END = 0.97  # share of the budget at which CMA-ES ends


@dataclass(frozen=True)
class DirectConfig:
    """Sizes of the search.

    :param designs: drawn for the first round
    :param rounds: of exploration; each keeps ``parents`` and adds half as many neighbours and newcomers as before
    :param starts: designs that CMA-ES begins to refine; the best of them alone goes on
    :param rules: published rules to draw from; None: all that fit
    :param share: of the budget for exploration
    :param seeds: arrival sequences per rate and generation
    :param light_loads: as multiples of the knee; every third generation of CMA-ES trades one of its two rates for the
        next of these: what is learned around the knee alone may hold prompts back when nothing presses
    :param n_requests: of one simulation in CMA-ES; None: as many as the scenario's own runs, 2000 to 4000
    """

    designs: int = 300
    rounds: int = 2
    parents: int = 10
    starts: int = 3
    share: float = 0.3
    n_requests: int | None = None
    seeds: int = 1
    population: int = 14
    sigma: float = 0.6
    light_loads: tuple[float, ...] = (0.3, 0.6)
    rules: tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class DirectResult:
    """What the search found.

    :param design: the best; ``best_rule`` the best among published rules as they are
    :param finalists: the best, best first; the last is ``best_rule``
    :param knee: the largest rate at which ``design`` has a level of 90 %, on the ``train`` split; ``strict`` that of
        99 %, at least 0.35 of it
    """

    design: Design
    best_rule: Design
    finalists: tuple[Design, ...]
    knee: float
    strict: float
    requests: int
    seconds: float
    history: tuple[dict[str, float], ...]


Report = Callable[[str, float, str], None]


def rules_of(scenario: Scenario, among: Collection[str] | None = None) -> list[str]:
    """Published rules that run in ``scenario`` as compiled code; the linear score and the planner are none.

    :param among: these only
    """
    setting, found = arena_of(scenario).setting, []
    for name in registry.names():
        rule = registry.get(name)
        if rule.python or name in _OWN or (among is not None and name not in among):
            continue
        try:
            rule.bind({}, setting)
        except SlalomError:  # refuses this scenario
            continue
        found.append(name)
    return found


class _Search:
    """The state of one search: budget spent, where the knee is."""

    def __init__(
        self, scenario: Scenario, config: DirectConfig, seed: int, requests: float, seconds: float, report: Report,
        journal: Journal,
    ) -> None:  # fmt: skip
        self.setting = arena_of(scenario).setting
        self.fitness = Remembered(Fitness(scenario, self.setting), journal)
        self.seconds = journal.seconds
        self.config, self.report = config, report
        self.rng = np.random.default_rng([seed, 1])
        self.seed = seed
        self.rules = rules_of(scenario, config.rules)
        self.n_requests = config.n_requests or min(max(scenario.n_requests, 2000), 4000)
        self.most_requests, self.most_seconds = requests, seconds
        self.knee = self.strict = 0.0
        self.ranked: list[Design] = []
        self.rules_seen: list[tuple[int, float, Design]] = []  # (rung, score, published rule as it is)
        self.history: list[dict[str, float]] = []

    @property
    def used(self) -> float:
        """Share of the budget spent."""
        timed = self.seconds() / self.most_seconds if self.most_seconds < float("inf") else 0.0
        return max(self.fitness.requests / self.most_requests, timed)

    def windows(self, most: int, simulations: int, share: float, waits: bool = True) -> int:
        """Arrival sequences (or lengths), at most ``most``, so that ``simulations`` on each cost ``share`` of all."""
        total = self.most_requests
        if total == float("inf"):
            total = self.fitness.requests / max(self.used, 1e-3)
        n = self.fitness.length(self.knee, self.n_requests, waits)
        return int(np.clip(share * total // (simulations * n), 1, most))

    def note(self, phase: str, done: float, best: float) -> None:
        text = f"{self.fitness.requests / 1e6:.1f} M requests  knee {self.knee:.4g}/s  best {100 * best:.2f} %"
        self.report(phase, min(done, 1.0), text)
        self.history.append({"requests": self.fitness.requests, "knee": self.knee, "score": best})

    # -- explore ---------------------------------------------------------------------------------------------

    def explore(self) -> None:
        """Successive halving; leaves the designs it knows best in ``ranked``, best first."""
        config, reference = self.config, self.fitness.scenario.reference_rate
        pool = [Design(name) for name in (*self.rules, "linear_score")]
        knees = [(self.fitness.knee(d, reference, (0,), 1000, 0.1, waits=False), i) for i, d in enumerate(pool)]
        self.knee, _ = max(knees)
        self.strict = _MODERATE * self.knee
        # a round costs about 4000 requests a design; a small budget draws fewer
        afford = 0.25 * config.share * self.most_requests / self.fitness.length(self.knee, self.n_requests, False)
        n = int(max(min(config.designs, afford), 8))
        pool += [reordered(design, self.setting, Order.ON_TIME) for design in pool]
        leaders = [self.rules[i] for _, i in sorted(knees, reverse=True) if i < len(self.rules)][:_PLACED]
        for rule in ("linear_score", *leaders):  # a good rule on the right arrangement is seldom drawn
            plain = [Design(rule, plans=plans) for plans in composed(self.setting)]
            pool += [plain[i] for i in self.rng.permutation(len(plain))[: n if rule == "linear_score" else n // 2]]
        survivors: list[Design] = []
        for turn in range(config.rounds):
            fresh = [random_design(self.rules, self.setting, self.rng) for _ in range(n if turn == 0 else n // 4)]
            if turn:
                fresh += [varied(survivors[i % len(survivors)], self.rng) for i in range(n // 2)]
                fresh += offspring(survivors, n // 4, self.rng)
            survivors = self._halve([*pool, *survivors, *fresh] if turn == 0 else [*survivors, *fresh], turn)
            limit = config.share * (turn + 1) / config.rounds
            if self.used > limit * 1.5:
                break

    def _halve(self, designs: list[Design], turn: int) -> list[Design]:
        keep = self.config.parents
        total = len(designs)
        for rung, (share, loads, seeds, n) in enumerate(_RUNGS):
            left = max(int(share * total), keep)
            designs, cut = designs[:left], designs[left:]
            first = _FIRST_SEED + 100 * turn + 10 * rung
            rates = [load * self.knee for load in loads] or self.rates()
            waits = rung >= _FIRST_LOOK
            seeds = self.windows(seeds, len(designs) * len(rates), _RUNG_SHARE, waits)
            scored = []
            for i, design in enumerate(designs):
                size = n * self.n_requests // 2000
                score = self.fitness.score(design, rates, range(first, first + seeds), size, waits=waits)
                scored.append((score, -i))
                if design.plans is None and design.rule != "linear_score":
                    self.rules_seen.append((rung, score, design))
                if i % 8 == 0:
                    done = turn + (rung + i / len(designs)) / len(_RUNGS)
                    self.note("explore", done / self.config.rounds, max(scored)[0])
            designs = [designs[-i] for _, i in sorted(scored, reverse=True)]
            self.recentre(designs[0], first)
        self.ranked = [*designs, *cut, *self.ranked]  # those of the last rung, those before it, an earlier turn's
        return designs[:keep]

    def rates(self) -> list[float]:
        """Of the objective, lowest first."""
        return rates_between(self.strict, self.knee)

    def recentre(self, design: Design, seed: int) -> None:
        """Move the rates to the goodputs of ``design``, if it has any."""
        try:
            length = self.windows(_KNEE_LENGTH, _KNEE_RATES, _KNEE_SHARE)
            seeds = range(seed, seed + self.windows(_KNEE_SEEDS, length * _KNEE_RATES, _KNEE_SHARE))
            knee, strict = self.fitness.knees(design, max(self.knee, 1e-3), seeds, length * self.n_requests)
        except SlalomError:
            return
        if knee > 0.0:
            least, greatest = _STRICT
            strict = strict or _MODERATE * knee  # nobody may hold 99 % at any rate
            self.knee, self.strict = knee, min(max(strict, least * knee), greatest * knee)

    def pair(self, generation: int) -> tuple[float, float]:
        """The two rates of a generation of CMA-ES."""
        strict, low, knee, high = self.rates()
        light = self.config.light_loads
        if light and generation % 3 == 2:
            return light[generation // 3 % len(light)] * knee, knee
        return (low, high) if generation % 2 else (strict, knee)


class _Climb:
    """CMA-ES from one design, to be gone on with: its answer at any time is the mean of its last generation."""

    def __init__(self, search: _Search, design: Design, number: int) -> None:
        self.search, self.design, self.number = search, design, number
        space = Space(search.setting, design)
        self.optimiser = SepCMA(
            mean=np.zeros(len(space)), sigma=search.config.sigma, population_size=search.config.population,
            seed=(search.seed * 31 + number) % 2**31,
        )  # fmt: skip
        self.generation = 0
        self.ended = False
        self.knee = self.strict = 0.0

    @property
    def answer(self) -> Design:
        """Where it stands; the design it came from before the first generation."""
        return replace(self.design, theta=self.optimiser.mean.copy()) if self.generation else self.design

    def advance(self, until: float) -> None:
        """Go on until the share ``until`` of the search's budget is spent."""
        search, start = self.search, self.search.used
        if self.generation == 0:
            search.recentre(self.design, _FIRST_SEED)
        while search.used < until and not self.ended:
            best = self._generation()
            search.note(f"refine {self.number + 1}", (search.used - start) / max(until - start, 1e-9), best)
        self.knee, self.strict = search.knee, search.strict

    def _generation(self) -> float:
        search, seeds = self.search, self.search.config.seeds
        first = _CMA_SEED + 1000 * self.number + self.generation * seeds
        rates = search.pair(self.generation)
        told, best = [], -1.0
        for _ in range(self.optimiser.population_size):
            theta = self.optimiser.ask()
            candidate = replace(self.design, theta=theta)
            score = search.fitness.score(candidate, rates, range(first, first + seeds), search.n_requests)
            told.append((theta, -score))
            best = max(best, score)
        self.optimiser.tell(told)
        self.generation += 1
        self.ended = self.optimiser.should_stop()
        if self.generation % 12 == 0:
            search.recentre(self.answer, first + 500)
        return best


def direct_search(
    scenario: Scenario,
    config: DirectConfig,
    *,
    requests: float = float("inf"),
    seconds: float = float("inf"),
    seed: int = 0,
    report: Report = lambda phase, done, note: None,
    journal: Journal | None = None,
) -> DirectResult:
    """Search until ``requests`` were simulated or ``seconds`` have passed; at least one of them is finite.

    :param report: called with (phase, share done, note)
    :param journal: what an interrupted search knew already; it goes on from there
    """
    search = _Search(scenario, config, seed, requests, seconds, report, journal or Journal())
    search.explore()
    starts = _different(search.ranked, config.starts, ordered=not search.setting.is_uniform)
    climbs = [_Climb(search, design, number) for number, design in enumerate(starts)]
    begun, left = search.used, max(_END - search.used, 0.0)
    if len(climbs) > 1:  # arrangements show what they can become only after some generations: race, then go on
        for number, climb in enumerate(climbs):
            climb.advance(begun + left * _RACE * (number + 1) / len(climbs))
        far = max(climbs, key=lambda climb: climb.knee)
        search.knee, search.strict = far.knee, far.strict
        rates = search.rates()
        scores = [search.fitness.score(c.answer, rates, range(4_000, 4_006), search.n_requests) for c in climbs]
        first = climbs[scores.index(max(scores))]
        search.recentre(first.answer, 4_500)
    else:
        first = climbs[0]
    first.advance(_END)
    refined = [first.answer, *(climb.answer for climb in climbs if climb is not first)]
    # the published rule that came furthest, however soon that was: what is shipped must not lose to it
    rule = Design("linear_score")
    if search.rules_seen:
        rule = max(search.rules_seen, key=lambda seen: seen[:2])[2]
    finalists = [*refined, *starts, rule]
    rates = search.rates()
    windows = search.windows(_FINAL_SEEDS, len(finalists) * len(rates), _FINAL_SHARE)
    scores = [search.fitness.score(d, rates, range(5_000, 5_000 + windows), search.n_requests) for d in finalists]
    best = finalists[scores.index(max(scores))]
    search.recentre(best, 6_000)
    ranked = [finalists[i] for i in sorted(range(len(finalists) - 1), key=lambda i: -scores[i])]
    return DirectResult(
        best, rule, (*ranked[:_FINALISTS], rule), search.knee, search.strict, search.fitness.requests,
        round(search.seconds(), 2), tuple(search.history),
    )  # fmt: skip


def _different(designs: Sequence[Design], n: int, *, ordered: bool) -> list[Design]:
    """The best designs of different arrangements, then of different rules; among equals linear scores first: CMA-ES
    moves them further than scores that have a rule to talk out of its answer.

    :param ordered: whether it matters which instance does what
    """

    def roles(design: Design) -> object:
        if design.plans is None:
            return None
        found = [-1 if p.role is None else p.role for p in design.plans]
        return tuple(found if ordered else sorted(found))

    found: dict[object, Design] = {}
    for design in designs:
        found.setdefault(roles(design), design)
    for design in (*designs[:1], *sorted(designs[1:], key=lambda d: d.rule != "linear_score")):
        found.setdefault((design.rule, roles(design)), design)
    return list({id(design): design for design in found.values()}.values())[:n]
