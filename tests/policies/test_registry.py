"""Names, parameters, third-party packages and plain Python classes."""

from __future__ import annotations

from importlib import metadata

import numpy as np
import optuna
import pytest
from decisions import choose, context, instances, setting

from engine.core.columns import Col, Kind
from engine.errors import SlalomError
from policies import registry
from policies.common import default_answer
from policies.load import load_policy
from policies.rule import Param, Rule

PLACE = context(Kind.PLACE_PREFILL)


class FewestRunning:
    """What a user writes first."""

    name = "fewest_running"

    def __init__(self) -> None:
        self.seen = 0

    def reset(self) -> None:
        self.seen = 0

    def decide(self, context: np.ndarray, candidates: np.ndarray, mask: np.ndarray) -> int:
        self.seen += 1
        load = candidates[:, Col.RUN_N] + 1e9 * (mask == 0) + 1e6 * (candidates[:, Col.INSTANCE] < 0)
        return int(load.argmin())


class Masked:
    name = "masked"

    def decide(self, context: np.ndarray, candidates: np.ndarray, mask: np.ndarray) -> int:
        return 0


class Broken:
    name = "broken"

    def decide(self, context: np.ndarray, candidates: np.ndarray, mask: np.ndarray) -> int:
        raise ZeroDivisionError("user code")


THIRD_PARTY_RULE = Rule("theirs", "a rule of another package", "them", registry.get("least_tokens").decide)


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.entry_points

    def entry_points(**kwargs: str) -> metadata.EntryPoints:
        if kwargs.get("group") != registry.GROUP:
            return real(**kwargs)
        classes = ("FewestRunning", "Masked", "Broken", "THIRD_PARTY_RULE", "PLACE", "missing")
        return metadata.EntryPoints(
            metadata.EntryPoint(name.lower(), f"{__name__}:{name}", registry.GROUP) for name in classes
        )

    monkeypatch.setattr(metadata, "entry_points", entry_points)


def test_built_in_rules_are_found_and_named_like_their_file() -> None:
    assert {"round_robin", "least_tokens", "linear_score"} <= set(registry.names())
    assert all(registry.get(name).name == name for name in registry.names())


def test_every_rule_names_its_source_and_documents_its_parameters() -> None:
    for name in registry.names():
        rule = registry.get(name)
        assert rule.doc
        assert rule.source
        assert all(p.doc for p in rule.params), name


@pytest.mark.usefixtures("third_party")
def test_a_rule_of_another_package() -> None:
    assert "third_party_rule" in registry.names()
    assert registry.get("third_party_rule") is THIRD_PARTY_RULE


@pytest.mark.usefixtures("third_party")
def test_a_plain_class_decides_and_is_reset_with_its_memory() -> None:
    policy = load_policy("fewestrunning", setting())
    rows = instances({"RUN_N": 3}, {"RUN_N": 1}, {"RUN_N": 2})
    assert [choose(policy, PLACE, rows), choose(policy, PLACE, rows, 1)] == [1, 2]
    assert policy.python
    from policies.rules.parts.python import _objects

    assert _objects[int(policy.params[0])].seen == 2
    policy.memory[:] = 0.0
    choose(policy, PLACE, rows)
    assert _objects[int(policy.params[0])].seen == 1


@pytest.mark.usefixtures("third_party")
def test_what_a_plain_class_does_wrong_reaches_the_caller() -> None:
    rows = instances({}, {})
    with pytest.raises(ZeroDivisionError, match="user code"):
        choose(registry.get("broken").bind({}, setting()), PLACE, rows)
    with pytest.raises(SlalomError, match="allowed candidate"):
        choose(registry.get("masked").bind({}, setting()), PLACE, rows, 0)


@pytest.mark.usefixtures("third_party")
@pytest.mark.parametrize("name", ["place", "missing", "nobody"])
def test_entries_that_are_no_policy_are_refused(name: str) -> None:
    with pytest.raises(SlalomError):
        registry.get(name)


def test_parameters_from_text() -> None:
    policy = load_policy("chunked:chunk_tokens=128, router=ttft", setting())
    assert policy.values == {"chunk_tokens": 128, "router": "ttft"}
    assert policy.params.tolist() == [128.0, 2.0]
    assert load_policy("chunked:chunk_tokens=128", setting(), {"chunk_tokens": 99}).params[0] == 99


@pytest.mark.parametrize(
    "spec",
    [
        "nobody",
        "no/such/folder",
        "chunked:budget=3",
        "chunked:chunk_tokens",
        "chunked:chunk_tokens=12",
        "chunked:chunk_tokens=128.5",
        "chunked:chunk_tokens=nan",
        "chunked:chunk_tokens=many",
        "chunked:router=best",
        "chunked:chunk_tokens=128,",
        "chunked:chunk_tokens=128,chunk_tokens=256",
    ],
)
def test_bad_specifications_are_refused(spec: str) -> None:
    with pytest.raises(SlalomError):
        load_policy(spec, setting())


@pytest.mark.parametrize(("spec", "meant"), [("least_token", "least_tokens"), ("chunked:rooter=ttft", "router")])
def test_who_mistypes_a_name_is_told_the_nearest(spec: str, meant: str) -> None:
    with pytest.raises(SlalomError, match=f"did you mean {meant}\\?"):
        load_policy(spec, setting())


def test_a_split_needs_two_instances() -> None:
    with pytest.raises(SlalomError, match="two instances"):
        load_policy("static_split", setting(1))


@pytest.mark.parametrize("name", registry.names())
def test_optuna_draws_values_the_rule_accepts(name: str) -> None:
    rule = registry.get(name)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(5):
        drawn = rule.suggest(study.ask())
        assert rule.values(drawn) == drawn


def test_a_search_may_switch_off_what_it_draws_too_low_to_matter() -> None:
    param = Param("share", 0.0, 1.0, 0.5, off=0.1)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [param.suggest(study.ask()) for _ in range(100)]
    assert 0.0 in drawn
    assert min(value for value in drawn if value) >= 0.1
    assert param.check(0.01) == 0.01  # given by hand it stays


def test_a_default_outside_its_range_is_a_programming_error() -> None:
    with pytest.raises(SlalomError):
        Rule("r", "d", "s", default_answer, (Param("x", 0.0, 1.0, 2.0),))
