"""The benchmark command: names, one JSON object, errors. The figures themselves are not a test."""

import json
from types import ModuleType

import pytest

import eval.bench as bench
from engine.errors import SlalomError


def test_prints_one_object_with_commit_and_machine(monkeypatch, capsys):
    fake = ModuleType("fake")
    fake.run = lambda: {"requests_per_second": 1.0}
    monkeypatch.setattr(bench, "import_module", lambda name: fake)
    assert bench.main(["surrogate", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    result = json.loads(out)
    assert result["requests_per_second"] == 1.0
    assert {"cpu", "cores", "python", "numba"} <= set(result["machine"])
    assert "commit" in result


def test_unknown_names_are_refused_with_the_known_ones(capsys):
    with pytest.raises(SlalomError, match="surrogate"):
        bench.run("nothing")
    assert bench.main(["nothing"]) == 2
    assert "startup" in capsys.readouterr().err


def test_a_rule_is_timed_on_every_kind_of_decision_it_met(monkeypatch):
    from engine.core.columns import Kind
    from eval.benchmarks import rules

    monkeypatch.setattr(rules, "REQUESTS", 400)
    spent = rules.measure("least_tokens", rules.settings())
    assert set(spent) == set(Kind)
    assert all(us > 0.0 for kind in spent.values() for us in kind)
    alone = rules.settings()[1].with_overrides({"cluster.0.count": 1})
    with pytest.raises(SlalomError, match="two instances"):
        rules.measure("static_split", [alone])
