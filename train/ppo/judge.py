"""Judging a policy on validation windows: the same arrivals for everyone, in a process of its own if wanted.

The deployable (compiled) policy is what is judged, through the simulator, so a score is deterministic and
training goes on beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from env.measure.contender import Contender, PointSettings
from env.measure.level import level_settings, measure_level, run_length
from env.measure.pool import processes, watched
from env.scenario import Scenario


@dataclass(frozen=True)
class Verdict:
    """Levels of one policy on validation windows, see ``env.measure.level``.

    :param levels: one row per rate, one column per seed
    """

    levels: tuple[tuple[float, ...], ...]

    @property
    def score(self) -> float:
        """Mean over rates and seeds: what selection maximises."""
        cells = [value for row in self.levels for value in row]
        return sum(cells) / len(cells)


class Judge(Protocol):
    """Scores policies, possibly later and elsewhere."""

    def submit(self, contender: Contender, seeds: Sequence[int]) -> Future[Verdict]:
        """Start judging a rule with values or a checkpoint folder."""
        ...

    def close(self) -> None:
        """Give up what is not finished."""
        ...


def mean_level(
    scenario: Scenario, contender: Contender, rates: Sequence[float], seeds: Sequence[int], settings: PointSettings
) -> Verdict:
    """Simulate every (rate, seed)."""
    rows = []
    for rate in rates:
        n = run_length(scenario, rate, settings.n_requests, settings.split)
        long = level_settings(settings, scenario, n)
        rows.append(tuple(measure_level(scenario, contender, rate, seed, long).metrics["level"] for seed in seeds))
    return Verdict(tuple(rows))


class SimulatorJudge:
    """Judges on windows of the ``valid`` split.

    :param rates: requests per second
    :param background: judge in a second process; otherwise ``submit`` blocks until it is done
    """

    def __init__(self, scenario: Scenario, rates: Sequence[float], n_requests: int, *, background: bool = True) -> None:
        self._scenario, self._rates = scenario, tuple(rates)
        self._settings = PointSettings(n_requests=n_requests, split="valid")
        self._pool = processes(1, niceness=5) if background else None  # it must not slow the training beside it

    def submit(self, contender: Contender, seeds: Sequence[int]) -> Future[Verdict]:
        """See :meth:`Judge.submit`."""
        job = (self._scenario, contender, self._rates, tuple(seeds), self._settings)
        if self._pool is not None:
            return watched(self._pool.submit(mean_level, *job))
        done: Future[Verdict] = Future()
        try:
            done.set_result(mean_level(*job))
        except Exception as error:  # belongs to whoever asks for the result, as with a process
            done.set_exception(error)
        return done

    def close(self) -> None:
        """See :meth:`Judge.close`."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
