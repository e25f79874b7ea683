"""A rule of somebody else's package: installed metadata, a plain class, both commands."""

from __future__ import annotations

import json
from importlib import invalidate_caches
from pathlib import Path

import pytest
from typer.testing import CliRunner

import eval.cli
import train.cli
from engine.errors import SlalomError
from env.scenario import Scenario
from env.surrogate.simulate import simulate
from policies import registry
from policies.load import load_policy
from policies.setting import Setting

SOURCE = """
from engine.core.columns import Col, Ctx, Kind
from policies.rule import Param

class FewestTokens:
    \"\"\"The shortest prefill queue, decodes counted as well.\"\"\"
    name = "fewest_tokens"
    params = (Param("decode_weight", 0.0, 1.0, 0.1, doc="of a context token against a queued one"),)

    def __init__(self, decode_weight):
        self.weight = decode_weight

    def decide(self, context, candidates, mask):
        if context[Ctx.KIND] != Kind.PLACE_PREFILL:
            return int(mask.argmax())
        load = candidates[:, Col.QUEUE_TOKENS] + self.weight * candidates[:, Col.RUN_CTX]
        load[(mask == 0) | (candidates[:, Col.INSTANCE] < 0)] = float("inf")
        return int(load.argmin())
"""
RAISING = """
class Raising:
    name = "raising"

    def decide(self, context, candidates, mask):
        raise ValueError("oops")

class Astray(Raising):
    name = "astray"

    def decide(self, context, candidates, mask):
        return len(mask)
"""
CONFIG = "default: {tune_trials: 4, tune_requests: 40, eval_requests: 40, eval_seeds: 1, final_seeds: 1}"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``pip install my-package`` leaves behind: the module and its metadata on the path."""
    site = tmp_path / "site"
    info = site / "my_package-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "my_package.py").write_text(SOURCE + RAISING)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[slalom.policies]\n" + "".join(
        f"{name} = my_package:{cls}\n"
        for name, cls in (("fewest_tokens", "FewestTokens"), ("raising", "Raising"), ("astray", "Astray"))
    ))  # fmt: skip
    monkeypatch.syspath_prepend(str(site))
    invalidate_caches()


@pytest.mark.usefixtures("installed")
def test_both_commands_run_the_rule_of_an_installed_package(tmp_path: Path) -> None:
    assert "fewest_tokens" in registry.names()
    run = ["--scenario", "tiny-4xa100", "--policy", "fewest_tokens", "--policy", "fewest_tokens:decode_weight=1"]
    load = ["--rates", "40:40:1", "--requests", "60", "--seeds", "1", "--json", "--out", str(tmp_path / "report")]
    shown = CliRunner().invoke(eval.cli.app, run + load)
    assert shown.exit_code == 0, shown.output
    assert "fewest_tokens" in shown.output

    (tmp_path / "small.yaml").write_text(CONFIG)
    out = tmp_path / "run"
    search = ["--algo", "search", "--rule", "fewest_tokens", "--scenario", "tiny-4xa100", "--budget", "3s"]
    done = CliRunner().invoke(train.cli.app, [*search, "--config", str(tmp_path / "small.yaml"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads((out / "best" / "policy.json").read_text())
    assert "fewest_tokens" in json.dumps(found)
    assert 0.0 <= load_policy(str(out / "best"), _setting()).describe()["values"]["decode_weight"] <= 1.0


def _setting() -> Setting:
    from env.scenario import Scenario
    from env.surrogate.arena import arena_of

    return arena_of(Scenario.load("tiny-4xa100")).setting


@pytest.mark.usefixtures("installed")
def test_what_a_class_does_wrong_ends_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    """The compiled loop goes on with anything: the figures would be those of no policy."""
    day = Scenario.load("tiny-4xa100")
    for _ in range(2):  # the same the second time
        with pytest.raises(SlalomError, match=r"policy raising: got 'ValueError: oops'.*my_package.py, line"):
            simulate(day, "raising", rate=10.0, n_requests=20)
        with pytest.raises(SlalomError, match="return the row of an allowed candidate"):
            simulate(day, "astray", rate=10.0, n_requests=20)
    assert capfd.readouterr().err == ""
    assert simulate(day, "fewest_tokens", rate=10.0, n_requests=20).decisions >= 20
