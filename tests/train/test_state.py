"""A resumed training equals one that was never interrupted; a damaged file is an error, not a surprise."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from engine.errors import SlalomError
from train.ppo.learner import DispatchPPO
from train.ppo.state import load_state, save_state

Make = Callable[..., DispatchPPO]
HERE = Path(__file__).parent


class StopAt(BaseCallback):
    """Ends a training between updates."""

    model: DispatchPPO

    def __init__(self, frames: int) -> None:
        super().__init__()
        self._frames = frames

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.model.stop = self.model.num_timesteps >= self._frames


def weights(model: DispatchPPO) -> np.ndarray:
    return th.cat([value.detach().ravel() for value in model.policy.state_dict().values()]).numpy()


def test_resume_equals_an_uninterrupted_run(make_model: Make, tmp_path: Path) -> None:
    total = 512 * 20  # frames; every rollout has 512
    whole = make_model(seed=2)
    whole.learn(total)

    class Stop(Exception): ...

    first = make_model(seed=2)
    collect = first.collect_rollouts

    def until_half(*arguments: object) -> bool:
        if first.num_timesteps == total // 2:
            save_state(tmp_path / "state.safetensors", first, {"note": [1, 2]})
            raise Stop
        return collect(*arguments)  # type: ignore[arg-type]

    first.collect_rollouts = until_half  # type: ignore[method-assign]
    with pytest.raises(Stop):
        first.learn(total)

    second = make_model(seed=2)
    th.rand(3)
    assert load_state(tmp_path / "state.safetensors", second) == {"note": [1, 2]}
    second.learn(total - second.num_timesteps, reset_num_timesteps=False)
    np.testing.assert_array_equal(weights(whole), weights(second))
    assert list(whole.ep_info_buffer) == list(second.ep_info_buffer)


@pytest.mark.slow
def test_killed_run_resumes_from_its_last_state(make_model: Make, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    child = subprocess.Popen(
        [sys.executable, str(HERE / "kill_me.py"), str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])},
    )
    try:
        deadline = time.monotonic() + 300
        written: set[int] = set()  # the first state may be that of the beginning, before any update
        while len(written) < 2 and time.monotonic() < deadline and child.poll() is None:
            if path.exists():
                written.add(path.stat().st_ino)
            time.sleep(0.02)
        time.sleep(0.2)  # somewhere in the middle of a rollout, an update or a write
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    resumed = make_model(seed=4)
    extra = load_state(path, resumed)
    frames = resumed.num_timesteps
    assert frames == extra["frames"] > 0
    resumed.learn(512 * 2, reset_num_timesteps=False)
    reference = make_model(seed=4)
    # schedules follow the budget, so the reference has the killed run's first, then the new one
    reference.learn(10**8, StopAt(frames))
    reference.learn(512 * 2, reset_num_timesteps=False)
    np.testing.assert_array_equal(weights(resumed), weights(reference))


@pytest.mark.parametrize("damage", [lambda raw: raw[:-40], lambda raw: b"{}", lambda raw: b""])
def test_damaged_state_is_refused(make_model: Make, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    model = make_model()
    model.learn(512)
    path = tmp_path / "state.safetensors"
    save_state(path, model, {})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SlalomError, match=r"state\.safetensors"):
        load_state(path, make_model())


def test_a_flipped_byte_anywhere_is_noticed(make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    model.learn(512)
    path = tmp_path / "state.safetensors"
    save_state(path, model, {"note": 123456789})
    raw = path.read_bytes()
    load_state(path, make_model())
    for at in (raw.index(b"123456789"), len(raw) // 3, len(raw) // 2, len(raw) - 3):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(SlalomError, match="damaged"):
            load_state(path, make_model())


def test_state_of_another_shape_is_refused(make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    model.learn(512)
    save_state(tmp_path / "s", model, {})
    other = make_model(n_envs=16)
    other.policy.network.encode = th.nn.Linear(7, 8)
    with pytest.raises(SlalomError, match="settings the run was started with"):
        load_state(tmp_path / "s", other)


def test_missing_state_is_refused(make_model: Make, tmp_path: Path) -> None:
    with pytest.raises(SlalomError, match="start without it"):
        load_state(tmp_path / "none", make_model())


def test_full_disk_is_reported_and_keeps_the_old_state(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    model.learn(512)
    path = tmp_path / "state.safetensors"
    save_state(path, model, {"turn": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SlalomError, match="disk is full"):
        save_state(path, model, {"turn": 2})
    monkeypatch.undo()
    assert load_state(path, make_model()) == {"turn": 1}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_state_holds_no_pickle(make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    model.learn(512)
    path = tmp_path / "state.safetensors"
    save_state(path, model, {})
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} <= {
        "F32",
        "F64",
        "I64",
        "U8",
        "BOOL",
    }
