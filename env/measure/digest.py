"""Digests of all that determines a measured point: the code, the scenario with its files, and the policy."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml

from engine.jit import sources
from env.measure.contender import Contender
from env.scenario import Scenario


@cache
def code_sha256() -> str:
    """Digest of every source file a point depends on: a stored point never outlives the code that made it."""
    simulator = ("env.surrogate.simulate", "env.measure.evaluator", "env.measure.sustained")
    return sources.sha256([*map(sources.path_of, simulator), *(sources.ROOT / "policies").rglob("*.py")])


def policy_sha256(contender: Contender) -> str:
    """Digest of what decides: every file of a checkpoint folder, or the name and values of a rule."""
    is_folder = os.path.isdir(contender.policy)  # not Path.is_dir: "" is no folder, nor is a spec longer than a name
    parts: list[Any] = ["" if is_folder else contender.policy, sorted(contender.values.items())]
    parts += [contender.cluster] if contender.cluster else []
    parts += [{"plans": contender.plans}] if contender.plans else []
    digest = hashlib.sha256(json.dumps(parts).encode())
    if is_folder:
        folder = Path(contender.policy)
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def scenario_hash(scenario: Scenario) -> str:
    """Digest of a scenario's content, of the latency profiles it names and of the trace files it replays."""
    digest = hashlib.sha256(scenario.hash().encode())
    for profile in scenario.load_profiles():
        digest.update(profile.model_dump_json().encode())
    for path in _files_of(yaml.safe_load(scenario.to_yaml()).get("workload")):
        digest.update(file_sha256(path, path.stat().st_mtime_ns).encode())
    return digest.hexdigest()


def _files_of(spec: Any) -> Iterator[Path]:
    """Existing files that a workload section names: every ``path``, ``rates_path``, ... at any depth."""
    if isinstance(spec, dict):
        for key, value in spec.items():
            if isinstance(value, str) and (key == "path" or key.endswith("_path")):
                if os.path.isfile(value):  # a missing one is reported by whoever reads it
                    yield Path(value)
            else:
                yield from _files_of(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from _files_of(value)


@lru_cache(maxsize=64)
def file_sha256(path: Path, stamp: int) -> str:
    """Digest of a file's content; ``stamp`` (modification time, ns) makes a changed file be read again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
