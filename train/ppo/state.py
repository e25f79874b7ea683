"""Training checkpoints: everything a killed run needs to go on exactly where it was.

One safetensors file holds network, optimiser, random generators, environment and counters, so a checkpoint is
either the whole old one or the whole new one. Nothing in it can execute code when it is read.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors

from engine.common.documents import json_of
from engine.common.files import write_bytes
from engine.common.regular import LARGE, check_regular
from engine.errors import SlalomError
from train.ppo.learner import DispatchPPO

FORMAT = 2


def save_state(path: Path, model: DispatchPPO, extra: dict[str, Any]) -> None:
    """Write the training state. Call it between updates (``on_rollout_start``).

    :param extra: JSON-ready state of the callbacks (best so far, evaluations)
    :raises SlalomError: the disk is full or the place cannot be written; the old checkpoint is kept
    """
    env: Any = model.env
    optimizer = model.policy.optimizer.state_dict()
    tensors = {f"policy.{name}": value for name, value in model.policy.state_dict().items()}
    for index, slots in optimizer["state"].items():
        tensors |= {f"optimizer.{index}.{name}": th.as_tensor(value) for name, value in slots.items()}
    tensors |= {
        "rng.policy": model.policy.generator.get_state(),
        "rng.torch": th.get_rng_state(),
        "env.state": th.frombuffer(bytearray(env.env_state()), dtype=th.uint8),
        "last.obs": th.from_numpy(np.array(model._last_obs)),
        "last.starts": th.from_numpy(np.array(model._last_episode_starts)),
        "last.clock_s": th.from_numpy(model.clock_s.copy()),
    }
    kind, keys, *position = np.random.get_state()  # noqa: NPY002 - the generator SB3 seeds
    tensors["rng.numpy"] = th.from_numpy(np.asarray(keys).astype(np.int64))
    facts = {
        "format": FORMAT,
        "counters": model.counters(),
        "numpy": [kind, *position],
        "extra": extra,
    }
    tensors = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    state = json.dumps(facts)
    write_bytes(path, dump_tensors(tensors, {"state": state, "sha256": _sum(tensors, state)}))


def _sum(tensors: dict[str, th.Tensor], state: str) -> str:
    """SHA-256 of everything in the file: what a resumed training would not notice is changed."""
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().flatten().view(th.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_state(path: Path, model: DispatchPPO) -> dict[str, Any]:
    """Restore ``model`` (built with the same settings) and its environment; returns the saved ``extra``.

    :raises SlalomError: no such file, damaged, of another format, or of another network or environment
    """
    check_regular(path, LARGE)
    try:
        raw = path.read_bytes()
        tensors = load_tensors(raw)
        header = json_of(raw[8 : 8 + int.from_bytes(raw[:8], "little")], str(path))
        about = header["__metadata__"]
        facts = json_of(about["state"], str(path))
        if not isinstance(facts, dict):
            raise TypeError
    except FileNotFoundError as error:
        raise SlalomError("--resume", str(path), "no training checkpoint there; start without it") from error
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        raise SlalomError(str(path), type(error).__name__, "the file is damaged; start a new run") from error
    if facts.get("format") != FORMAT:
        raise SlalomError(f"{path}: format", facts.get("format"), f"this version reads {FORMAT}")
    if about.get("sha256") != _sum(tensors, about["state"]):
        raise SlalomError(str(path), "another sum", "the file is damaged; start a new run")
    try:
        _restore(model, tensors, facts)
        return dict(facts["extra"])
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, OverflowError) as error:
        fix = "resume with the settings the run was started with"
        raise SlalomError(str(path), str(error) or type(error).__name__, fix) from error


def _restore(model: DispatchPPO, tensors: dict[str, th.Tensor], facts: dict[str, Any]) -> None:
    optimizer = model.policy.optimizer
    slots: dict[int, dict[str, th.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, slot = name.split(".")
            slots.setdefault(int(index), {})[slot] = value
    prefix = "policy."
    model.policy.load_state_dict(
        {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    )
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    model.set_counters(facts["counters"])
    env: Any = model.env
    env.set_env_state(tensors["env.state"].numpy().tobytes())
    last = tensors["last.obs"].numpy()
    if last.shape != (model.n_envs, *(model.observation_space.shape or ())):
        raise ValueError(f"observations of shape {last.shape}")
    # an environment goes on where it was, or with its next episode if it keeps no more than that
    now = env.reset()
    fresh = (now != last).any(axis=1)
    model._last_obs = now
    model._last_episode_starts = tensors["last.starts"].numpy() | fresh
    model.clock_s = np.where(fresh, 0.0, tensors["last.clock_s"].numpy())
    kind, position, has_gauss, gauss = facts["numpy"]
    keys = tensors["rng.numpy"].numpy().astype(np.uint32)
    np.random.set_state((kind, keys, position, has_gauss, gauss))  # noqa: NPY002
    model.policy.generator.set_state(tensors["rng.policy"])
    th.set_rng_state(tensors["rng.torch"])
