"""Checkpoints: a policy as a folder that is safe to load anywhere.

    policy.json          everything about it, see ``policies.checkpoint.manifest``
    weights.safetensors  the network's weights (kind network only)
    profile.json         the latency profile(s) it was trained on
    README.md            model card

Loading parses JSON and safetensors and executes nothing. Whatever is malformed is a :class:`SlalomError`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as format_safetensors

from engine.common.documents import bad_input, json_of
from engine.common.regular import LARGE, SMALL, check_regular
from engine.core.columns import Kind, Need
from engine.core.policy import InstancePlan
from engine.errors import SlalomError
from policies import registry
from policies.arrangement import fitted, resized
from policies.checkpoint.card import model_card
from policies.checkpoint.golden import golden_vectors, verify
from policies.checkpoint.manifest import (
    FORMAT,
    VERSION,
    Architecture,
    Bounds,
    Manifest,
    NetworkRecord,
    NormalisationRecord,
    PlanRecord,
    RuleRecord,
    column_hash,
)
from policies.network import compiled, guided
from policies.network.features import N_CONTEXT_FEATURES, N_FEATURES
from policies.network.normalise import Normalisation
from policies.rule import BoundPolicy, Value
from policies.setting import Setting

if TYPE_CHECKING:
    from policies.network.scoring import ScoringNetwork

_GATE = (N_CONTEXT_FEATURES, N_FEATURES)
_MANIFEST, _WEIGHTS, _PROFILE, _CARD = "policy.json", "weights.safetensors", "profile.json", "README.md"


@dataclass(frozen=True)
class Facts:
    """What a checkpoint tells beside the policy itself; all plain data (JSON).

    :param training: seed, budget, steps, wall seconds, versions, git commit if known
    :param evaluation: one row per policy compared
    :param fidelity: surrogate against engine, where measured
    :param bounds: least and greatest value of each dimensionless column seen in training
    :param fallback: rule that the guard falls back to
    :param fitted: every instance takes from ``arrangement`` the plan that suits its profile,
        :func:`policies.arrangement.fitted`; else they are the plans of the instances trained on
    """

    name: str
    scenario: str = ""
    scenario_sha256: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Sequence[Mapping[str, Any]] = ()
    fidelity: Mapping[str, Any] = field(default_factory=dict)
    bounds: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    fallback: str = "least_tokens"
    arrangement: Sequence[InstancePlan] | None = None
    fitted: bool = False


@dataclass(frozen=True, eq=False)
class LoadedPolicy:
    """A checkpoint that passed every check. ``arrays`` is empty for kind rule; ``profile`` is parsed JSON."""

    folder: Path
    manifest: Manifest
    arrays: dict[str, np.ndarray]
    profile: Any

    @property
    def name(self) -> str:
        return self.manifest.name

    def bind(self, setting: Setting) -> BoundPolicy:
        """The policy ready to run in ``setting``, which may have another number of instances.

        The stored arrangement is fitted to the profiles, or stretched or shrunk to the number of instances, see
        :func:`fitted` and :func:`resized`.
        """
        record = self.manifest.rule
        base = registry.get(record.name).bind(record.values, setting)
        plans = self.manifest.arrangement
        if plans is not None:
            given = [p.plan() for p in plans]
            arranged = fitted(given, setting) if self.manifest.fitted else resized(given, setting.n_instances)
            base = replace(base, arrangement=arranged)
            setting.check_roles(base.arrangement or (), self.manifest.name)
        network, normal = self.manifest.network, self.manifest.normalisation
        if network is None or normal is None:
            return replace(base, name=self.name, fallback=self.manifest.fallback)
        bound = bind_network(base, self.arrays, normal.constants(), setting, self.name)
        return replace(
            bound,
            values={"base": record.name, "sha256": network.sha256},
            bounds=self.bounds(),
            fallback=self.manifest.fallback,
        )

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Out-of-distribution bounds as float64 (2, context) and (2, candidate): least and greatest value per
        dimensionless column, ±inf where none is known."""
        return self.manifest.bounds.arrays()


def bind_network(
    base: BoundPolicy,
    arrays: Mapping[str, np.ndarray],
    normal: Normalisation,
    setting: Setting,
    name: str,
) -> BoundPolicy:
    """A network ready to run in ``setting``; ``base`` gives the arrangement and, where the network has a bonus for
    it, the advice."""
    rows = compiled.rows_of(setting)
    params = compiled.pack(arrays, normal, rows)
    cells = compiled.memory_cells(arrays["context.bias"].shape[0], rows)
    advised = bool(arrays["bonus"].any())
    return BoundPolicy(
        name=name,
        decide=guided.decide if advised else compiled.decide,
        needs=int(Need.LOAD | Need.PREDICT | Need.DIMENSIONLESS),
        params=guided.pack(base, arrays["bonus"], params) if advised else params,
        memory=np.zeros(cells + (len(base.memory) if advised else 0)),
        arrangement=base.arrangement,
        values={"base": base.name},
        kind="network",
    )


def save_network(
    folder: Path,
    network: ScoringNetwork,
    *,
    base: str,
    base_values: Mapping[str, Value],
    profile: Any,
    facts: Facts,
) -> LoadedPolicy:
    """Write a learned policy; an older checkpoint at ``folder`` is replaced.

    :param base: rule whose weights the network was built on
    :param profile: the latency profile(s) trained on, as JSON data
    :raises SlalomError: weights that are not finite, facts that are not JSON, a disk that is full
    """
    arrays = network.arrays()
    compiled.check_weights(arrays, network.hidden, str(folder))
    blob = format_safetensors(arrays)
    manifest = _manifest(
        facts,
        kind="network",
        rule=RuleRecord(name=base, values=dict(base_values)),
        network=NetworkRecord(hidden=network.hidden, sha256=hashlib.sha256(blob).hexdigest()),
        normalisation=NormalisationRecord.of(network.normalisation),
        golden=golden_vectors(network),
    )
    return _write(folder, manifest, profile, blob)


def save_rule(folder: Path, *, rule: str, values: Mapping[str, Value], profile: Any, facts: Facts) -> LoadedPolicy:
    """Write a rule with tuned values; see :func:`save_network`."""
    checked = registry.get(rule).values(values)
    manifest = _manifest(facts, kind="rule", rule=RuleRecord(name=rule, values=checked))
    return _write(folder, manifest, profile, None)


def _manifest(facts: Facts, **parts: Any) -> Manifest:
    plans = facts.arrangement
    try:
        return Manifest(
            name=facts.name,
            columns_sha256=column_hash(),
            arrangement=None if plans is None else [PlanRecord(**asdict(p)) for p in plans],
            fitted=facts.fitted,
            scenario=facts.scenario,
            scenario_sha256=facts.scenario_sha256,
            training=_plain(dict(facts.training), "training"),
            evaluation=_plain([dict(row) for row in facts.evaluation], "evaluation"),
            fidelity=_plain(dict(facts.fidelity), "fidelity"),
            bounds=Bounds.model_validate(facts.bounds),
            fallback=facts.fallback,
            **parts,
        )
    except ValidationError as error:
        raise bad_input("checkpoint", error) from error


def _json(data: Any, where: str) -> bytes:
    try:
        return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise SlalomError(where, str(error), "only finite numbers, text, lists and mappings can be saved") from error


def _plain(data: Any, where: str) -> Any:
    """``data`` as JSON gives it back, so that pydantic cannot turn NaN into null unseen."""
    return json.loads(_json(data, where))


def _write(folder: Path, manifest: Manifest, profile: Any, blob: bytes | None) -> LoadedPolicy:
    """All files into a new folder beside the target, proven by loading it, then moved into place."""
    folder = Path(folder)
    if os.path.exists(folder) and not (folder / _MANIFEST).is_file():
        raise SlalomError("checkpoint folder", str(folder), "it exists and is no checkpoint; choose another")
    files = {
        _MANIFEST: _json(manifest.model_dump(mode="json"), _MANIFEST),
        _PROFILE: _json(profile, _PROFILE),
        _CARD: model_card(manifest).encode(),
    }
    if blob is not None:
        files[_WEIGHTS] = blob
    fresh: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        for name, content in files.items():
            with open(fresh / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        loaded = load(fresh)
        fresh.chmod(0o755)
        _swap(fresh, folder)
    except OSError as error:
        raise SlalomError("checkpoint folder", str(folder), f"cannot write there: {error}") from error
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
    return replace(loaded, folder=folder)


def _swap(fresh: Path, folder: Path) -> None:
    """Move ``fresh`` to ``folder``; a checkpoint already there steps aside and comes back on failure."""
    if not os.path.exists(folder):
        os.replace(fresh, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    try:
        os.replace(folder, old)
    except OSError:
        old.rmdir()
        raise
    try:
        os.replace(fresh, folder)
    except OSError:
        os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path) -> LoadedPolicy:
    """Read and check a checkpoint.

    :raises SlalomError: a missing, truncated or altered file, a newer format, other columns, an unknown rule,
        weights of a wrong shape or not finite, golden vectors that this machine does not reproduce
    """
    folder = Path(folder)
    where = str(folder / _MANIFEST)
    data = _read_json(folder / _MANIFEST)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise SlalomError(where, data, f'no policy: "format" must be "{FORMAT}"')
    version = data.get("version")
    if isinstance(version, int) and version > VERSION:
        raise SlalomError(f"{where}: version", version, f"this Slalom reads up to {VERSION}; update it")
    try:
        manifest = Manifest.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise bad_input(where, error) from error
    if manifest.columns_sha256 != column_hash():
        raise SlalomError(
            f"{where}: columns_sha256",
            manifest.columns_sha256,
            "made for other decision columns; train it again",
        )
    registry.get(manifest.rule.name).values(manifest.rule.values)
    if manifest.fallback not in registry.names():
        raise SlalomError(f"{where}: fallback", manifest.fallback, "no such rule")
    profile = _read_json(folder / _PROFILE)
    return LoadedPolicy(folder, manifest, _read_weights(folder, manifest), profile)


def _read_weights(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    network, normal = manifest.network, manifest.normalisation
    if network is None or normal is None:
        return {}
    where = str(folder / _WEIGHTS)
    blob = _read(folder / _WEIGHTS)
    digest = hashlib.sha256(blob).hexdigest()
    if digest != network.sha256:
        raise SlalomError(f"{where}: sha256", digest, f"{_MANIFEST} says {network.sha256}; copy it again")
    try:
        arrays = parse_safetensors(blob)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise SlalomError(where, str(error), "not a safetensors file") from error
    if network.architecture is Architecture.SCORING:  # made before there were gates and advice
        arrays |= {"gate": np.zeros((len(Kind), *_GATE), np.float32), "bonus": np.zeros(len(Kind), np.float32)}
    compiled.check_weights(arrays, network.hidden, where)
    verify(manifest.golden, arrays, normal.constants(), str(folder / _MANIFEST))
    return arrays


def _read(path: Path) -> bytes:
    check_regular(path, LARGE if path.name == _WEIGHTS else SMALL)
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a path with a null byte
        why = getattr(error, "strerror", None) or error
        raise SlalomError("checkpoint", str(path), f"a checkpoint folder needs this file ({why})") from error


def _read_json(path: Path) -> Any:
    return json_of(_read(path), str(path))
