"""The search on an objective whose optimum is known, and its budget."""

import json
import sys
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import pytest
from eval_cases import Scenario, synthetic_measure, true_goodput
from optuna.storages.journal import JournalFileBackend

import train.search.tune as tuning
from engine.errors import SlalomError
from env.measure.contender import PointSettings
from policies.rule import Param, Rule
from train.search import trials

KEYWORDS = tuning.Evaluator.__init__.__kwdefaults__
SETTINGS = PointSettings(n_requests=2_000)


def fake_rule(monkeypatch, *params):
    rule = Rule(name="weighted", doc="", source="", decide=None, params=params)
    monkeypatch.setattr(tuning, "get", lambda name: rule)


def as_asked(scenario, rate, n, split):
    """Runs as long as they are asked for: the synthetic scenario has no workload to look at."""
    return n


def tune(name, scenario, trials, **options):
    return tuning.tune(name, scenario, trials, settings=SETTINGS, length=as_asked, **options)


def run(measure=synthetic_measure, **options):
    return tune("weighted", Scenario(), 25, rates=(30.0, 40.0), measure=measure, **options)


WEIGHT = Param("weight", 0.0, 1.0, 0.9)


def test_finds_the_known_optimum_and_beats_the_defaults(monkeypatch):
    fake_rule(monkeypatch, WEIGHT)
    found = run()
    assert found.values["weight"] == pytest.approx(0.3, abs=0.1)
    assert found.score > found.default + 0.05
    assert found.default == next(e["final"] for e in found.ranking if e["values"]["weight"] == 0.9)


def test_every_rule_gets_the_same_budget_and_test_data_stay_untouched(monkeypatch):
    calls = []

    def spy(scenario, contender, rate, seed, settings):
        calls.append((settings.split, seed, dict(contender.values)))
        return synthetic_measure(scenario, contender, rate, seed, settings)

    costs = set()
    for params in ([WEIGHT], [WEIGHT, Param("other", 0.0, 2.0, 1.0)]):
        fake_rule(monkeypatch, *params)
        calls.clear()
        found = run(measure=spy)
        searched = [c for c in calls if c[0] == "train"]
        costs.add(len(searched))
        assert searched[0][2]["weight"] == 0.9  # defaults first
        assert {split for split, _, _ in calls} == {"train", "valid"}
        train = {seed for split, seed, _ in calls if split == "train"}
        assert not train & {seed for split, seed, _ in calls if split == "valid"}
        assert found.simulated_requests == len(calls) * SETTINGS.n_requests
    assert costs == {25 * 2 * 2}


def test_the_same_seed_gives_the_same_search(monkeypatch):
    fake_rule(monkeypatch, WEIGHT)
    assert run(seed=3) == run(seed=3)


@pytest.mark.parametrize("sampler", ["tpe", "cma"])
def test_a_killed_search_ends_as_if_it_had_never_been_killed(monkeypatch, tmp_path, sampler):
    fake_rule(monkeypatch, WEIGHT, Param("other", 0.0, 2.0, 1.0))
    whole, calls = run(sampler=sampler), []

    def stop(number, best):
        if number == 10:
            raise KeyboardInterrupt

    def spy(scenario, contender, rate, seed, settings):
        calls.append(settings.split)
        return synthetic_measure(scenario, contender, rate, seed, settings)

    storage = tmp_path / "weighted.journal"
    with pytest.raises(KeyboardInterrupt):
        run(sampler=sampler, storage=storage, on_trial=stop)
    found = run(spy, sampler=sampler, storage=storage)
    assert (found.ranking, found.trials) == (whole.ranking, 25)
    assert found.simulated_requests == whole.simulated_requests, "those before the kill are part of the search"
    assert calls.count("train") == (25 - 10) * 2 * 2
    assert run(sampler=sampler, storage=storage, seed=1).ranking != found.ranking  # another study


@pytest.mark.parametrize("end", [b'{"op_code":4,"wor', b"\0" * 700, b'{"op_code":4,"wor' + b"\0" * 100])
def test_a_journal_that_ends_in_the_middle_is_mended(monkeypatch, tmp_path, end):
    """Killed in the middle of a line, or a power loss that left zero bytes."""
    fake_rule(monkeypatch, WEIGHT)
    whole, storage = run(), tmp_path / "weighted.journal"

    def stop(number, best):
        if number == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(storage=storage, on_trial=stop)
    kept = storage.read_bytes()
    storage.write_bytes(kept + end)
    found = run(storage=storage)
    assert (found.ranking, found.simulated_requests) == (whole.ranking, whole.simulated_requests)
    assert storage.read_bytes().startswith(kept)
    assert all(json.loads(line) for line in storage.read_bytes().splitlines())
    storage.write_bytes(kept[: len(kept) // 2])  # in the middle of a trial
    assert run(storage=storage).ranking == whole.ranking
    storage.write_bytes(end)  # not one whole line
    assert run(storage=storage).ranking == whole.ranking


def test_a_full_disk_is_one_clear_error(monkeypatch, tmp_path):
    fake_rule(monkeypatch, WEIGHT)

    whole, write = run(), JournalFileBackend.append_logs
    for room in (0, 5):
        left = iter(range(room))

        def full(backend, logs, left=left):
            if next(left, None) is None:
                raise OSError(28, "No space left on device")
            write(backend, logs)

        monkeypatch.setattr(JournalFileBackend, "append_logs", full)
        with pytest.raises(SlalomError, match=r"--storage.*No space left"):
            run(storage=tmp_path / "weighted.journal")
    monkeypatch.undo()
    fake_rule(monkeypatch, WEIGHT)
    assert run(storage=tmp_path / "weighted.journal").ranking == whole.ranking


def test_an_unusable_storage_is_one_clear_error_without_the_password(monkeypatch, tmp_path):
    fake_rule(monkeypatch, WEIGHT)
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises(SlalomError, match=r"slalom\[postgresql\]") as caught:
        run(storage="postgresql://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(caught.value)
    with pytest.raises(SlalomError, match="does not answer"):
        run(storage=f"sqlite:///{tmp_path}/missing/folder/file.db")
    (tmp_path / "text").write_text("not a journal")
    with pytest.raises(SlalomError, match="journal"):
        run(storage=tmp_path / "text")
    assert (tmp_path / "text").read_text() == "not a journal"


def test_pruning_saves_simulations_and_keeps_the_winner(monkeypatch):
    fake_rule(monkeypatch, WEIGHT)
    whole, pruned = run(), run(prune=True, finalists=2)
    assert pruned.pruned > 0
    assert pruned.trials == whole.trials
    assert pruned.simulated_requests < whole.simulated_requests
    assert pruned.values["weight"] == pytest.approx(0.3, abs=0.1)
    assert pruned.score >= whole.score - 0.02


def test_trials_in_parallel_are_a_search_of_their_own_that_repeats(monkeypatch):
    fake_rule(monkeypatch, WEIGHT)
    with ThreadPoolExecutor(4) as pool:
        found = [run(pool=pool, width=4) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0].trials == 25
    assert found[0].values["weight"] == pytest.approx(0.3, abs=0.1)


def test_a_search_out_of_time_ranks_what_it_has(monkeypatch):
    fake_rule(monkeypatch, WEIGHT)
    left = iter([False] * 7 + [True] * 100)
    found = run(stop=lambda: next(left))
    assert found.trials == 3  # two rates each, the fourth had one left
    assert found.ranking


def test_many_continuous_parameters_go_to_cma_es(monkeypatch):
    fake_rule(monkeypatch, WEIGHT, *(Param(f"p{i}", 0.0, 1.0, 0.5) for i in range(9)))
    assert run().sampler == "CmaEsSampler"


def test_settings_that_do_not_fit_score_zero_but_unfit_defaults_are_an_error(monkeypatch):
    fake_rule(monkeypatch, WEIGHT)

    def picky(scenario, contender, rate, seed, settings):
        if contender.values["weight"] < limit:
            raise SlalomError("weight", contender.values["weight"], "too small for this cluster")
        return synthetic_measure(scenario, contender, rate, seed, settings)

    limit = 0.5
    assert run(measure=picky).values["weight"] >= 0.5
    limit = 0.95
    with pytest.raises(SlalomError, match="too small"):
        run(measure=picky)


def test_a_rule_without_parameters_costs_nothing(monkeypatch):
    fake_rule(monkeypatch)
    found = run()
    assert (found.trials, found.simulated_requests, found.values) == (0, 0, {})


def test_the_knee_is_the_goodput_of_the_reference_rule():
    knee = tuning.knee_rate(Scenario(), SETTINGS, policy="x1", measure=synthetic_measure, length=as_asked)
    assert knee == pytest.approx(true_goodput(40.0, 0.9), rel=0.05)


def test_rates_follow_the_best_setting_to_where_settings_differ(monkeypatch):
    fake_rule(monkeypatch, WEIGHT)
    easy = {"rates": (5.6, 6.7, 8.0, 9.2), "measure": synthetic_measure}  # met by every setting
    stays = tune("weighted", Scenario(), 25, **easy)
    assert stays.score - stays.default < 0.005
    follows = tune("weighted", Scenario(), 25, knee=8.0, **easy)
    assert follows.rates[2] == pytest.approx(true_goodput(40.0, 0.9), rel=0.1)
    assert follows.values["weight"] == pytest.approx(0.3, abs=0.1)
    assert follows.score > follows.default + 0.05
    assert follows.trials == 25


@pytest.mark.parametrize("ends", [5, 12])
def test_a_search_that_follows_is_resumed_where_it_was_and_counts_what_it_simulates(monkeypatch, tmp_path, ends):
    fake_rule(monkeypatch, WEIGHT)
    calls = []

    def spy(scenario, contender, rate, seed, settings):
        calls.append(rate)
        return synthetic_measure(scenario, contender, rate, seed, settings)

    def stop(number, best):
        if number == ends:
            raise KeyboardInterrupt

    options = {"rates": (6.8, 8.0), "knee": 8.0, "measure": spy}
    whole = tune("weighted", Scenario(), 25, **options)
    assert whole.simulated_requests == len(calls) * SETTINGS.n_requests
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        tune("weighted", Scenario(), 25, storage=tmp_path / "j", on_trial=stop, **options)
    found = tune("weighted", Scenario(), 25, storage=tmp_path / "j", **options)
    assert (found.ranking, found.rates, found.trials) == (whole.ranking, whole.rates, 25)
    assert whole.simulated_requests <= found.simulated_requests <= len(calls) * SETTINGS.n_requests


class Endless(Executor):
    """A cluster on which, after the first trial, nothing is ever done."""

    def __init__(self):
        self.begun = []

    def submit(self, fn, /, *args, **kwargs):
        job = Future()
        if not self.begun:
            job.set_result(fn(*args))
        self.begun.append(job)
        return job


@pytest.mark.parametrize("looks", [0, 1, 3])
def test_a_search_on_a_cluster_keeps_its_time(monkeypatch, looks):
    """Trials that run when the time is up are not waited for, and none is begun any more."""
    fake_rule(monkeypatch, WEIGHT)
    monkeypatch.setattr(trials, "_LOOK_S", 0.001)
    pool, left = Endless(), iter(range(looks))
    subject = trials.Subject(tuning.get("weighted"), {}, None)
    here = tuning.Evaluator(Scenario(), SETTINGS, measure=synthetic_measure)
    means = (synthetic_measure, as_asked)
    objective = trials.Objective(
        subject, here, (30.0, 40.0), (0, 1), 0, lambda: next(left, None) is None, means
    )  # fmt: skip
    study = trials.Study(objective, "tpe", 0, None, [], ())
    assert study.search(0, trials.Budget(25, float("inf")), pool, 4, None) == 1
    assert len(pool.begun) == (1 if looks == 0 else 5)
    assert all(job.cancelled() for job in pool.begun[1:])
