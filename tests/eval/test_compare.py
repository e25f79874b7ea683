"""Comparisons of policies whose true goodput is known; resuming; cached points."""

import json
from dataclasses import replace

import pytest
from eval_cases import Scenario, synthetic_measure, true_goodput

from engine.errors import SlalomError
from env.measure.contender import Contender, PointSettings
from env.measure.digest import policy_sha256
from env.measure.evaluator import Evaluator
from eval.compare.paired import compare
from eval.compare.result import Comparison
from eval.compare.verdict import verdict

SETTINGS = PointSettings(n_requests=2_000)
SEEDS = [0, 1, 2, 3]


def with_settings(result, seeds=SEEDS):
    return result.having(settings={"seeds": list(seeds), "scenario": "synthetic"})


def test_goodput_search_finds_the_truth_and_the_ratio_has_a_paired_interval(evaluator):
    result = compare(evaluator, [Contender("x1"), Contender("x1.1")], SEEDS, start=4.0)
    plain, better = result.policies
    for side, factor in ((plain, 1.0), (better, 1.1)):
        found = side.at(0.9)
        exact = true_goodput(40.0 * factor, 0.9)
        assert found.rate == pytest.approx(exact, rel=0.03)
        assert found.low <= exact <= found.high
        assert found.per_gpu == pytest.approx(found.rate / 4)
    ratio = result.pairs[0].goodput["0.9"].ratio
    assert ratio.value == pytest.approx(1 / 1.1, rel=0.02)
    assert ratio.low < 1 / 1.1 < ratio.high < 1.0
    alone = better.at(0.9)
    assert ratio.high - ratio.low < (alone.high - alone.low) / alone.rate  # pairing cancels luck
    found = result.ratio(plain, better)
    assert (found.value, found.low, found.high) == (ratio.value, ratio.low, ratio.high)
    found = result.ratio(better, plain)  # told from the other side
    assert (found.low, found.high) == (1 / ratio.high, 1 / ratio.low)
    assert found.value == pytest.approx(1 / ratio.value)


def test_a_comparison_reads_back_what_it_wrote(evaluator):
    for given in ({"start": 4.0}, {"rates": [20.0]}):
        result = with_settings(compare(evaluator, [Contender("x1"), Contender("x1.1")], SEEDS[:2], **given))
        content = json.loads(json.dumps(result.to_json(), allow_nan=False))
        assert Comparison.from_json(content) == result
        assert Comparison.from_json(content).to_json() == content
        assert ("iqm_attainment" in content["policies"][0]) == ("rates" in given), "no key that was not there before"
        assert not {"shadow", "goodput_kind", "definition"} & set(content)
    with pytest.raises(ValueError, match="targets"):
        Comparison.from_json(content | {"targets": "all"})
    with pytest.raises(ValueError, match="frozen"):
        result.mode = "goodput"


def test_all_policies_meet_at_the_rates_where_the_two_best_just_hold(evaluator):
    result = compare(evaluator, [Contender(name) for name in ("x0.5", "x1", "x2")], SEEDS, start=4.0)
    assert result.at_rate == pytest.approx(true_goodput(80.0, 0.9), rel=0.03)
    assert result.second_rate == pytest.approx(true_goodput(40.0, 0.9), rel=0.03)
    for rate in (result.at_rate, result.second_rate):
        assert all(rate in [p["rate"] for p in side.points] for side in result.policies)
        assert rate in [entry["rate"] for entry in result.pairs[0].attainment]


def test_equal_policies_show_no_difference_and_the_words_say_so(evaluator):
    twins = [Contender("x1", label="one"), Contender("x1", label="other")]
    result = with_settings(compare(evaluator, twins, SEEDS, rates=[20.0, 30.0]))
    gap = result.pairs[0].mean_attainment
    assert (gap.value, gap.low, gap.high, gap.p_better) == (0.0, 0.0, 0.0, 0.5)
    assert any("No difference shown" in s for s in verdict(result))


def test_losses_are_told_as_plainly_as_gains(evaluator):
    for learned, word in (("./x0.5", "loses to"), ("./x2", "beats")):
        contenders = [Contender(learned.removeprefix("./"), label="learned"), Contender("x1")]
        result = with_settings(compare(evaluator, contenders, SEEDS, start=4.0))
        content = result.to_json()
        content["policies"][0]["policy_id"] = learned  # as a checkpoint folder would be named
        result = Comparison.from_json(content)
        assert any(s.startswith(f"learned {word} x1") for s in verdict(result)), verdict(result)
        assert result.ranking()[0].label == ("learned" if word == "beats" else "x1")


def test_a_winner_that_gives_up_requests_is_told_so(evaluator):
    result = with_settings(compare(evaluator, [Contender("x1")], SEEDS, rates=[20.0, 30.0]))
    assert "none lost" in verdict(result)[1]
    result.policies[0].points[-1] |= {"unfinished": 800, "worst_wait_s": 360.0}
    assert "10 % unfinished" in verdict(result)[1]
    assert "360 s" in verdict(result)[1]


def test_rates_mode_reports_every_rate_with_an_interval_around_it(evaluator):
    result = compare(evaluator, [Contender("x1")], SEEDS, rates=[30.0, 20.0])
    points = result.policies[0].points
    assert [p["rate"] for p in points] == [20.0, 30.0]
    assert all(p["low"] <= p["slo_attainment"] <= p["high"] for p in points)
    assert len(points[0]["runs"]) == len(SEEDS)
    json.dumps(result.to_json(), allow_nan=False)


def test_a_rival_that_never_meets_the_target_has_no_ratio(evaluator):
    zero = Contender("x1", {"weight": 1.3}, label="never")  # capacity factor 0
    result = with_settings(compare(evaluator, [Contender("x1"), zero], SEEDS, start=4.0))
    assert result.pairs[0].goodput["0.9"].ratio.value is None
    json.dumps(result.to_json(), allow_nan=False)
    assert any("at no rate" in s for s in verdict(result))


@pytest.mark.parametrize(("contenders", "seeds"), [([], [0]), (["x1", "x1"], [0]), (["x1"], []), (["x1"], [0, 0])])
def test_ambiguous_comparisons_are_refused(evaluator, contenders, seeds):
    with pytest.raises(SlalomError):
        compare(evaluator, [Contender(c) for c in contenders], seeds, rates=[1.0])


class Interrupting:
    """Measures ``n`` points, then stops like a user pressing Ctrl-C."""

    def __init__(self, n):
        self.left, self.measured = n, []

    def __call__(self, scenario, contender, rate, seed, settings):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.measured.append((contender.policy, rate, seed))
        return synthetic_measure(scenario, contender, rate, seed, settings)


def test_an_interrupted_comparison_resumes_without_repeating_a_point(tmp_path):
    contenders = [Contender("x1"), Contender("x1.1")]
    first, rest = Interrupting(9), Interrupting(10_000)
    with (
        pytest.raises(KeyboardInterrupt),
        Evaluator(Scenario(), SETTINGS, folder=tmp_path, measure=first) as ev,
    ):
        compare(ev, contenders, SEEDS, start=4.0)
    assert len(list(tmp_path.glob("*.json"))) == 9
    with Evaluator(Scenario(), SETTINGS, folder=tmp_path, measure=rest) as ev:
        resumed = compare(ev, contenders, SEEDS, start=4.0)
    assert not set(first.measured) & set(rest.measured)
    with Evaluator(Scenario(), SETTINGS, measure=synthetic_measure) as ev:
        fresh = compare(ev, contenders, SEEDS, start=4.0)
    assert (resumed.policies, resumed.pairs) == (fresh.policies, fresh.pairs)


def test_a_pool_of_two_measures_the_same_points(scenario):
    with (
        Evaluator(scenario, SETTINGS, jobs=2, measure=synthetic_measure) as pool,
        Evaluator(scenario, SETTINGS, measure=synthetic_measure) as here,
    ):
        assert pool.points(Contender("x1"), 30.0, SEEDS) == here.points(Contender("x1"), 30.0, SEEDS)


def test_stored_points_serve_only_what_they_were_measured_for(tmp_path):
    for changed in (
        (Scenario(41.0), SETTINGS, Contender("x1")),
        (Scenario(), replace(SETTINGS, warmup=0.1), Contender("x1")),
        (Scenario(), SETTINGS, Contender("x1", {"weight": 0.2})),
    ):
        counter = Interrupting(10)
        for scenario, settings, contender in ((Scenario(), SETTINGS, Contender("x1")), changed, changed):
            with Evaluator(scenario, settings, folder=tmp_path / str(id(changed)), measure=counter) as ev:
                ev.points(contender, 10.0, [0])
        assert len(counter.measured) == 2


def test_a_checkpoint_is_known_by_its_content_not_its_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "policy.json").write_text("{}")
    one, two = (Contender(str(tmp_path / name)) for name in ("a", "b"))
    assert policy_sha256(one) == policy_sha256(two)
    assert policy_sha256(one) != policy_sha256(replace(two, plans=({"role": 2},)))
    assert policy_sha256(one) != policy_sha256(replace(two, cluster=({"role": "mixed"},)))
    (tmp_path / "b" / "policy.json").write_text("{ }")
    assert policy_sha256(one) != policy_sha256(two)


def test_a_damaged_stored_point_names_the_file(tmp_path, scenario):
    with Evaluator(scenario, SETTINGS, folder=tmp_path, measure=synthetic_measure) as ev:
        ev.points(Contender("x1"), 10.0, [0])
    (file,) = tmp_path.glob("*.json")
    for text in ("{", '{"rate": 1}'):
        file.write_text(text)
        with (
            pytest.raises(SlalomError, match=file.name),
            Evaluator(scenario, SETTINGS, folder=tmp_path) as ev,
        ):
            ev.points(Contender("x1"), 10.0, [0])
