"""A whole training on a small real scenario: folder, checkpoint, reproducibility, resume, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from engine.common.files import claim
from engine.errors import SlalomError
from env.scenario import Scenario
from env.surrogate.simulate import simulate
from policies.checkpoint.folder import load
from policies.network.scoring import observation_size
from train.budget import Budget
from train.config import TrainConfig
from train.folder import RunFolder
from train.ppo.start import load_network, network_of
from train.run import Request, run

ROOT = Path(__file__).resolve().parents[2]
SMALL = """default:
  tune_trials: 12
  tune_requests: 60
  n_envs: 8
  groups: 2
  n_steps: 32
  n_requests: 60
  batch_size: 128
  hidden: 8
  critic_warmup: 1
  eval_every_frames: 1024
  eval_requests: 60
  eval_seeds: 2
  final_seeds: 2
  save_every_s: 0.05
  direct_requests: 2000
  direct_size: 60
  designs: 8
  rules: [least_tokens]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def request(tmp_path: Path, config: Path, name: str = "run", **changes: Any) -> Request:
    settings: dict[str, Any] = {
        "scenario": "tiny-4xa100",
        "algorithm": "ppo",
        "rule": "linear_score",
        "budget": Budget(frames=4000),
        "out": tmp_path / name,
        "config": config,
    }
    return Request(**(settings | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a finished training (``run``) and its settings (``small.yaml``), to be read only; its result."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.yaml").write_text(SMALL)
    return folder, run(request(folder, folder / "small.yaml"))


def test_training_leaves_a_checkpoint_that_serves(trained: tuple[Path, dict[str, Any]]) -> None:
    root, result = trained[0] / "run", trained[1]
    for name in ("config.yml", "command.txt", "system.json", "evaluations.npz", "log.jsonl", "result.json"):
        assert (root / name).stat().st_size > 0
    assert list((root / "tb").glob("events*"))
    best = load(root / "best")
    assert best.manifest.evaluation
    assert result["frames"] >= 4000
    assert result["score"] >= result["base_score"]
    tiny = Scenario.load("tiny-4xa100")
    assert simulate(tiny, str(root / "best"), rate=tiny.reference_rate, n_requests=50).decisions > 0
    # the oldest snapshot is already a full policy with the bounds of what it has seen
    snapshot = load(sorted((root / "snapshots").iterdir())[0])
    low, high = snapshot.bounds()[1]
    assert np.isfinite(low).all()
    assert (low <= high).all()


def test_ppo_goes_on_from_a_checkpoint(tmp_path: Path, config: Path) -> None:
    start = ROOT / "checkpoints" / "policies" / "tiny-4xa100"
    result = run(request(tmp_path, config, rule="auto", init=start))
    assert result["frames"] >= 4000
    assert result["base"]["sampler"] == "init"  # nothing was searched
    before, first = load(start), load(sorted((tmp_path / "run" / "snapshots").iterdir())[0])
    assert first.manifest.training["search_requests"] == before.manifest.training["search_requests"]
    assert first.manifest.arrangement == before.manifest.arrangement
    np.testing.assert_array_equal(first.arrays["gate"], before.arrays["gate"])
    assert first.arrays["out.weight"].any()
    assert result["score"] >= result["base_score"]
    if result["winner"] == "base":
        assert load(tmp_path / "run" / "best").manifest == before.manifest
    snapshot = next(iter((tmp_path / "run" / "snapshots").iterdir()))
    with pytest.raises(SlalomError, match="--resume: init"):  # another start is another run
        run(request(tmp_path, config, rule="auto", init=snapshot, resume=True))


def test_a_widened_network_decides_as_the_checkpoint_does() -> None:
    loaded = load_network(ROOT / "checkpoints" / "policies" / "tiny-4xa100")
    narrow, wide = network_of(loaded), network_of(loaded, 16, 3.0)
    obs, mask = torch.rand(64, observation_size(6)), torch.rand(64, 6) < 0.8
    mask[:, 0] = True
    low, high = (network(obs, mask).logits for network in (narrow, wide))
    assert wide.hidden == 16
    np.testing.assert_allclose(high[mask].detach(), 3.0 * low[mask].detach(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        wide.out.weight.normal_()
    learned = replace(loaded, arrays=wide.arrays())
    again = network_of(learned, 32, 3.0)
    assert again.hidden == 16
    np.testing.assert_allclose(again(obs, mask).logits.detach(), wide(obs, mask).logits.detach(), rtol=1e-5)


@pytest.mark.slow
def test_same_seed_same_checkpoint(trained: tuple[Path, dict[str, Any]], tmp_path: Path, config: Path) -> None:
    run(request(tmp_path, config))
    last = [sorted((folder / "run" / "snapshots").iterdir())[-1] for folder in (trained[0], tmp_path)]
    first, second = (load_file(folder / "weights.safetensors") for folder in last)
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


def test_search_saves_a_rule(tmp_path: Path, config: Path) -> None:
    budget = Budget(frames=60 * 8 * 6)
    result = run(request(tmp_path, config, algorithm="search", rule="linear_score", budget=budget))
    assert load(tmp_path / "run" / "best").manifest.kind == "rule"
    assert result["base"]["trials"] == 6


def test_a_rule_without_parameters_is_not_searched(tmp_path: Path, config: Path) -> None:
    with pytest.raises(SlalomError, match="no parameter to search"):
        run(request(tmp_path, config, algorithm="search", rule="least_tokens"))
    assert not any(tmp_path.rglob("run.json"))


def test_folder_of_another_run_is_not_overwritten(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, config = trained[0], trained[0] / "small.yaml"
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")}
    with pytest.raises(SlalomError, match="--resume"):
        run(request(folder, config))
    with pytest.raises(SlalomError, match="repeat its command"):
        run(request(folder, config, resume=True, seed=7))
    with pytest.raises(SlalomError, match="no run there"):
        run(request(folder, config, "nothing", resume=True))
    assert {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")} == before


def test_an_outcome_whose_request_is_damaged_is_not_taken_over(tmp_path: Path, config: Path) -> None:
    asked = request(tmp_path, config)
    run_folder = RunFolder(tmp_path / "run")
    run_folder.base.parent.mkdir()
    run_folder.base.write_text("{}")
    run_folder.request.write_text("{")
    with pytest.raises(SlalomError, match="start anew in another folder"):
        run(replace(asked, resume=True))
    run_folder.request.unlink()
    with pytest.raises(SlalomError, match="outcome of another run"):  # with another seed, for example
        run(asked)


@pytest.mark.slow
def test_killed_command_resumes_and_finishes(tmp_path: Path, config: Path) -> None:
    """Without a rule, that is by the direct search before PPO."""
    arguments = ["--scenario", "tiny-4xa100", "--algo", "ppo", "--budget", "6k"]
    arguments += ["--config", str(config), "--out", str(tmp_path / "run"), "--json"]
    command = [sys.executable, "-m", "train.cli", *arguments]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = tmp_path / "run" / "train_state" / "state.safetensors"
    deadline = time.monotonic() + 300
    written: set[int] = set()  # the first state may be that of the beginning, before any update
    while len(written) < 2 and time.monotonic() < deadline and child.poll() is None:
        if state.exists():
            written.add(state.stat().st_ino)
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    done = subprocess.run([*command, "--resume"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["frames"] >= 6_000
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    resumed = next(e for e in events if e["event"] == "resumed")
    assert resumed["frames"] > 0


@pytest.mark.slow
def test_ctrl_c_saves_and_exits_130(tmp_path: Path, config: Path) -> None:
    arguments = ["--scenario", "tiny-4xa100", "--algo", "ppo", "--rule", "linear_score", "--budget", "90M"]
    arguments += ["--config", str(config), "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "train.cli", *arguments]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    state = tmp_path / "run" / "train_state" / "state.safetensors"
    deadline = time.monotonic() + 300
    while not state.exists() and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "go on with --resume" in stderr
    assert load(tmp_path / "run" / "best").manifest.kind in ("rule", "network")


def test_workers_without_a_cluster_are_refused(tmp_path: Path) -> None:
    request = Request("tiny-4xa100", "ppo", "auto", Budget(seconds=1.0), out=tmp_path / "run", overrides={"workers": 2})
    with pytest.raises(SlalomError, match="--ray auto"):
        run(request)
    assert not (tmp_path / "run").exists()


def test_a_folder_belongs_to_one_process(tmp_path: Path) -> None:
    holder = "import sys; from pathlib import Path; from engine.common.files import claim; claim(Path(sys.argv[1]))"
    holder += "; print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "run")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    try:
        with pytest.raises(SlalomError, match=f"process {process.pid} is working there"):
            claim(tmp_path / "run")
    finally:
        process.kill()
        process.communicate()
    claim(tmp_path / "run")  # a killed process keeps nothing
    claim(tmp_path / "run")


def test_a_command_is_noted_without_its_passwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = "postgresql://me:a-secret@host:5432/studies"
    monkeypatch.setattr(sys, "argv", ["/somewhere/train-policy", "--storage", storage, "--seed", "1"])
    RunFolder(tmp_path / "run").start({"seed": 1}, TrainConfig())
    noted = (tmp_path / "run" / "command.txt").read_text()
    assert noted == "train-policy --storage postgresql://me:***@host:5432/studies --seed 1\n"
