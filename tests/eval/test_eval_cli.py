"""The command's promises: exit codes, one-line errors, a pure standard output, kept partial results."""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from eval_cases import Scenario, request, true_attainment, true_goodput
from typer.testing import CliRunner

import eval.cli as cli
from engine.common.files import read_json
from engine.errors import SlalomError

FACTORS = {"least_tokens": 1.0, "round_robin": 0.8}


def lasting(scenario, contenders, seeds, settings, targets, **options):
    """Sustained goodputs as ``eval.headline.search_all`` gives them, three quarters of the classic ones."""
    found = {}
    for contender in contenders:
        rates = {f"{t:g}": true_goodput(40.0 * FACTORS[contender.name], t) for t in targets}
        entry = {"above": {"rate": 50.0, "failed": "(b) waits"}, "fails_above": "(b) waits", "at": None, "per_gpu": 1.0}
        found[contender.name] = {
            "goodput": {key: entry | {"rate": 0.75 * rate} for key, rate in rates.items()},
            "classic": {key: entry | {"rate": rate} for key, rate in rates.items()},
            "by_seed": [0.75 * rates[f"{targets[0]:g}"]] * len(seeds),
            "stability_limit": 60.0, "lone_p90_s": 1.0, "tail_factor": 10.0, "warmup_s": 120.0, "missing": [],
            "simulated_requests": 0,
        }  # fmt: skip
    return found


@pytest.fixture
def world(monkeypatch, make_run):
    """A simulator with known goodputs in place of the real one; ``world.fail`` is raised after some runs."""

    class World:
        runs, fail_after, fail = 0, None, KeyboardInterrupt

    def bind(policy, scenario, values=None):
        if policy not in FACTORS:
            raise SlalomError("policy", policy, "choose another")
        return policy

    def simulate(scenario, policy, *, rate, n_requests, seed, split):
        if World.runs == World.fail_after:
            raise World.fail
        World.runs += 1
        luck = np.random.default_rng(seed).random(n_requests)
        good = luck < true_attainment(rate, 40.0 * FACTORS[policy])
        rows = [
            request(i * 1e3 / rate, i * 1e3 / rate + (50 if ok else 500), i * 1e3 / rate + 500)
            for i, ok in enumerate(good)
        ]
        return make_run(rows)

    scenario, simulator = ModuleType("env.scenario"), ModuleType("env.surrogate.simulate")
    watched = ModuleType("eval.compare.shadow")
    watched.shadow = lambda *request: None  # needs the real simulator, see test_shadow
    monkeypatch.setitem(sys.modules, "eval.compare.shadow", watched)
    scenario.Scenario = SimpleNamespace(load=lambda name: Scenario())
    simulator.simulate, simulator.bind_policy = simulate, bind
    monkeypatch.setitem(sys.modules, "env.scenario", scenario)
    monkeypatch.setitem(sys.modules, "env.surrogate.simulate", simulator)
    monkeypatch.setattr("eval.compare.session.search_all", lasting)  # the real search: test_sustained, test_headline
    monkeypatch.setattr("eval.compare.session.meetings", lambda found, settings, target: {22.0: settings})
    return World


def call(monkeypatch, capsys, *arguments):
    """(exit code, standard output, standard error) of the installed command's entry point."""
    monkeypatch.setattr(sys, "argv", ["eval-policy", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


SMALL = ("--scenario", "any", "--seeds", "2", "--requests", "200")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10:20:5", (10.0, 15.0, 20.0)),
        ("10:21:5", (10.0, 15.0, 20.0)),
        ("3", (3.0,)),
        ("7,5,7", (5.0, 7.0)),
        ("0.1:0.3:0.1", (0.1, 0.2, 0.3)),
    ],
)
def test_rates_are_read_as_ranges_or_lists(text, expected):
    assert cli.parse_rates(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "a", "1:2", "2:1:1", "1:2:0", "-1", "0", "nan", "inf", "1:2:3:4", "1:1e8:1e-3"])
def test_rates_that_make_no_sense_are_refused(text):
    with pytest.raises(SlalomError):
        cli.parse_rates(text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--policy", "least_tokens", "--env", "gpu", "--scenario", "another"), "one scenario at a time"),
        (("--policy", "least_tokens", "--env", "moon"), "--env"),
        (("--policy", "least_tokens", "--rates", "5", "--goodput"), "either"),
        (("--policy", "least_tokens", "--rates", "x"), "--rates"),
        (("--policy", "nobody"), "nobody"),
        (("--policy", "least_tokens", "--warmup", "1.5"), "warm-up"),
        (("--policy", "least_tokens", "--resume"), "--out"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(world, monkeypatch, capsys, arguments, said):
    code, out, err = call(monkeypatch, capsys, *SMALL, *arguments)
    assert code == 2
    assert out == ""
    assert said in err.splitlines()[-1]
    assert sum(line.startswith("eval-policy: ") for line in err.splitlines()) == 1
    assert "Traceback" not in err


def test_unknown_options_are_exit_code_2(monkeypatch, capsys):
    assert call(monkeypatch, capsys, "--nonsense")[0] == 2


def test_json_puts_one_object_on_stdout_and_nothing_else(world, monkeypatch, capsys):
    arguments = ("--policy", "least_tokens", "--policy", "round_robin", "--rates", "20:40:10", "--json")
    code, out, err = call(monkeypatch, capsys, *SMALL, *arguments)
    assert code == 0, err
    result = json.loads(out)
    assert out.count("\n") == 1
    assert [p["label"] for p in result["policies"]] == ["least_tokens", "round_robin"]
    assert result["settings"]["scenario"] == "synthetic"


def test_table_names_the_winner_and_files_lie_in_the_folder(world, monkeypatch, capsys, tmp_path):
    arguments = ("--policy", "least_tokens", "--policy", "round_robin", "--goodput", "--out", tmp_path)
    code, out, err = call(monkeypatch, capsys, *SMALL, *arguments)
    assert code == 0, err
    assert "least_tokens beats round_robin" in " ".join(out.split())
    assert {"result.json", "report.html", "attainment.png", "goodput.png", "points"} <= {
        p.name for p in tmp_path.iterdir()
    }
    result = read_json(tmp_path / "result.json")
    assert (result["mode"], result["goodput_kind"]) == ("goodput", "sustained")
    assert "sustained goodput" in out
    assert "classic at 90 %" in out
    best = result["policies"][0]
    assert best["goodput"]["0.9"]["rate"] == 0.75 * best["classic_goodput"]["0.9"]["rate"]


def test_interrupt_keeps_points_and_resume_needs_no_point_twice(world, monkeypatch, capsys, tmp_path):
    arguments = (*SMALL, "--policy", "least_tokens", "--rates", "10:40:10", "--out", tmp_path)
    world.fail_after = 6
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert (code, out) == (130, "")
    assert "--resume" in err
    kept = len(list((tmp_path / "points").glob("*.json")))
    assert kept == 5  # six runs, one of them the probe that the policy fits
    world.fail_after = None
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "--resume" in err
    world.runs = 0
    code, _, err = call(monkeypatch, capsys, *arguments, "--resume")
    assert code == 0, err
    assert world.runs == 1 + 8 - kept


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--reproduce", "all", "--seeds", "2"], "--seeds: got 2; it does nothing with --reproduce"),
        (["--fidelity", "--rates", "1,2"], "--rates: got '1,2'; it does nothing with --fidelity"),
        (["--loads", "0.5"], "give it together with --fidelity"),
        (["--markdown"], "--markdown: got True; it is for several scenarios"),
        (["--scenario", "all", "--ray", "auto"], "--ray: got 'auto'; with several scenarios"),
    ],
)
def test_what_would_be_ignored_is_refused(arguments, says):
    compared = [] if "--reproduce" in arguments else ["--scenario", "x", "--policy", "y"]
    assert says in str(CliRunner().invoke(cli.app, [*compared, *arguments]).exception)


def test_help_explains_every_option():
    shown = CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "200"}).output
    for option in (
        "--scenario",
        "--policy",
        "--rates",
        "--goodput",
        "--seeds",
        "--tune",
        "--out",
        "--json",
        "--resume",
    ):
        assert option in shown


def test_importing_the_command_loads_no_heavy_library():
    import subprocess

    heavy = "{'torch', 'pandas', 'plotly', 'optuna', 'matplotlib', 'numba', 'scipy'}"
    code = f"import sys, eval.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
