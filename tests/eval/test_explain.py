"""``explain-policy``: what it says of a log, and of policies whose workings are known."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine.core.columns import Kind
from engine.errors import SlalomError
from engine.live.door import TurnedAway
from engine.live.fate import fate_of, fate_of_refused
from engine.live.request import Ticket
from env.scenario import Scenario
from eval.explain.cli import app, explain_policy
from eval.explain.log import explain_decision, summary
from eval.explain.policy import distil, importance, record

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "policies"))

SCENARIO = "azure-conv-4xa100"


@pytest.fixture(scope="module")
def of_linear_score() -> dict[str, Any]:
    return explain_policy("linear_score", Scenario.load(SCENARIO), requests=250, seeds=2)


def test_a_rule_of_one_column_is_explained_by_that_column() -> None:
    recorder = record(Scenario.load(SCENARIO), "least_tokens", rate=24.0, n_requests=250, seed=0)
    found = importance(recorder, Kind.PLACE_PREFILL)
    assert found[0]["feature"] == "outstanding tokens"
    assert found[0]["changed"] > 0.3
    assert all(f["changed"] == 0 for f in found[1:])
    tree = distil(recorder, Kind.PLACE_PREFILL, depth=2)
    assert tree is not None
    assert tree["baseline_agreement"] == 1.0
    assert tree["agreement"] > 0.95
    assert "outstanding above best" in tree["text"]


def test_a_policy_is_compared_with_least_tokens_on_the_same_arrivals(of_linear_score: dict[str, Any]) -> None:
    placed = of_linear_score["kinds"]["place_prefill"]
    assert 0.0 < placed["deviations"]["share"] < 1.0
    trades = placed["deviations"]["trades"]
    assert trades["outstanding"]["policy"] > trades["outstanding"]["least_tokens"]
    assert trades["ttft_s"]["policy"] < trades["ttft_s"]["least_tokens"]
    top = {f["feature"]: f["changed"] for f in placed["importance"]}
    assert top["predicted TTFT"] > 0.2
    assert top.get("outstanding tokens", 0.0) == 0.0, "a raw column that the score does not read"
    gain = of_linear_score["gain"]
    low, high = gain["interval"]
    assert low <= gain["difference"] <= high
    assert gain["difference"] == pytest.approx(gain["attainment"]["policy"] - gain["attainment"]["least_tokens"])
    json.dumps(of_linear_score, allow_nan=False)


def test_text_and_page(of_linear_score: dict[str, Any]) -> None:
    from eval.explain.render import page, policy_text

    text = policy_text(of_linear_score)
    assert "a tree of depth 3 agrees in" in text
    assert "differs from least_tokens in" in text
    html = page(of_linear_score, text)
    data = html.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(data) == json.loads(json.dumps(of_linear_score))
    assert "http" not in html


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of a guarded run: a policy that fails at times, and outcomes."""
    from guard_cases import Plain, cluster, first, guarded

    from policies.guard.log.log import DecisionLog

    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    state = cluster(60)

    def often(context: Any, candidates: Any, mask: Any) -> int:
        return -1 if policy.asked % 10 == 0 else first(context, candidates, mask)

    policy = Plain(often, "sometimes")
    guard, _ = guarded(
        policy, state, log=DecisionLog(path, writer="thread"), deadline_us=1e6, breaker={"failures": 1000}
    )
    for r, row in enumerate(state.req):
        ticket = Ticket(1, 1, lambda delta: None)
        ticket.number = ticket.slot = r
        guard.outcomes.request_ended(ticket, row, "", fate_of(row, ""))
    guard.close()
    return path


def test_one_decision(log: Path) -> None:
    found = explain_decision(log, request="7")
    assert [d["kind"] for d in found["decisions"]][:1] == ["place_prefill"]
    assert found["decisions"][0]["policy"]["name"] == "sometimes"
    assert found["outcome"]["ttft_s"] > 0
    bad = next(s for s in range(1, 100) if explain_decision(log, seq=str(s))["decisions"][0]["fallback"])
    assert "not allowed" in explain_decision(log, seq=str(bad))["decisions"][0]["why"][0]
    with pytest.raises(SlalomError, match="--request"):
        explain_decision(log, request=str(10**9))


def test_two_servers_on_one_log_are_never_merged(log: Path, tmp_path: Path) -> None:
    """A restarted server begins to count anew: its request 7 is another one."""
    first = log.read_text()
    server = json.loads(first.splitlines()[0])["server"]
    assert all(json.loads(line)["server"] == server for line in first.splitlines())
    both = tmp_path / "both.jsonl"
    both.write_text(first + first.replace(server, "0badcafe"))
    with pytest.raises(SlalomError, match=f"{server}-7"):
        explain_decision(both, request="7")
    for asked in (f"{server}-7", f"cmpl-{server}-7", f"chatcmpl-{server}-7"):
        assert explain_decision(both, request=asked) == explain_decision(log, request="7")
    with pytest.raises(SlalomError, match="--seq"):
        explain_decision(both, seq="3")
    assert explain_decision(both, seq="0badcafe-3")["decisions"][0]["policy"]["name"] == "sometimes"
    for bad in ("", "x", "1f-", "-1f", "٣"):
        with pytest.raises(SlalomError, match="--request"):
            explain_decision(both, request=bad)


def test_refused_requests_are_part_of_the_log(log: Path, tmp_path: Path) -> None:
    """Nothing was decided about them; overload counts as missed, an operator's drain does not."""
    from policies.guard.config import DriftConfig
    from policies.guard.log.log import DecisionLog
    from policies.guard.outcomes import Outcomes

    path = tmp_path / "more.jsonl"
    path.write_bytes(log.read_bytes())
    writer = DecisionLog(path, writer="thread")
    outcomes = Outcomes(4, DriftConfig(), writer, ["chat"])
    for number, reason in ((901, "overloaded"), (902, "draining")):
        outcomes.request_refused(TurnedAway(number, 0, reason), fate_of_refused(reason))
    writer.close()
    found = explain_decision(path, request="901")
    assert found["decisions"] == []
    assert (found["outcome"]["finish"], found["outcome"]["class"]) == ("overloaded", "chat")
    shown = CliRunner().invoke(app, ["--log", str(path), "--request", "901"])
    assert "outcome: overloaded" in shown.stdout
    before, after = summary(log), summary(path)
    assert after["requests"] == before["requests"] + 1
    assert after["attainment"] < before["attainment"]


def test_a_line_that_a_crash_has_spoilt_is_left_out_and_counted(log: Path, tmp_path: Path) -> None:
    whole, spoilt = log.read_bytes().splitlines(keepends=True), tmp_path / "spoilt.jsonl"
    spoilt.write_bytes(b"".join([*whole[:30], whole[30][:40] + whole[31], *whole[32:], b"\0" * 90]))
    found = summary(spoilt)
    assert found["unreadable"] == [f"{spoilt}:31", f"{spoilt}:{len(whole)}"]
    assert found["requests"] == 60
    run = CliRunner().invoke(app, ["--log", str(spoilt)])
    assert "2 lines cannot be read" in run.stdout


def test_a_log_as_a_whole(log: Path) -> None:
    found = summary(log)
    assert found["reasons"]["invalid"] == found["decisions"] // 10
    assert found["requests"] == 60
    assert found["policies"] == ["sometimes"]
    assert 0.3 < found["actual_over_predicted"]["ttft"] < 3.0


def test_command_line(log: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    result = run(app, ["--log", str(log), "--request", "7", "--html", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    assert "outcome: TTFT" in result.output
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert json.loads(run(app, ["--log", str(log), "--json"]).stdout)["requests"] == 60
    assert run(app, ["--log", str(log), "--html", str(tmp_path / "whole.html")]).exit_code == 0
    assert "60 requests ended" in (tmp_path / "whole.html").read_text()
    nowhere = run(app, ["--log", str(log), "--json", "--html", str(log / "page.html")])
    assert isinstance(nowhere.exception, SlalomError)
    assert json.loads(nowhere.stdout)["requests"] == 60  # said all the same
    assert isinstance(run(app, []).exception, SlalomError)
    for arguments in (["--log", str(log), "--rate", "3"], ["--policy", "least_tokens", "--seq", "3"]):
        assert f"{arguments[2]}: got" in str(run(app, arguments).exception)
    log.with_name("broken").write_text("nonsense\n")
    assert isinstance(run(app, ["--log", str(log.with_name("broken"))]).exception, SlalomError)
