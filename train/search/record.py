"""Samplers by name, and studies that outlive their process.

A search asks a sampler in memory; what a trial was worth is recorded in an Optuna study on disk (a journal file) or
in a database (any SQLAlchemy URL, e.g. ``postgresql://``). A resumed search asks the same sampler again from the
start and looks up what is recorded instead of simulating it, so it goes on exactly where it was killed, with any
sampler. Nothing recorded is executable: CMA-ES would otherwise keep a pickled optimiser in the storage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.storages.journal import JournalFileBackend

from engine.errors import SlalomError

__all__ = ["SAMPLERS", "Outcome", "Record", "choose_sampler", "new_sampler"]

#: ``auto`` picks one of the others; ``gp`` needs half a second for a suggestion.
SAMPLERS = ("auto", "tpe", "cma", "gp", "random")
_CMA_FROM = 9  # continuous parameters; below, TPE is at least as good at equal budget


class Outcome(NamedTuple):
    """What a trial was worth.

    :param value: its score, or the most it could have reached when it was given up early
    :param cells: attainment at each rate that was simulated, hardest first
    """

    value: float
    cells: tuple[float, ...]


def choose_sampler(name: str, free: Sequence[Any]) -> str:
    """The sampler ``auto`` stands for, given the parameters to search; other names stand for themselves.

    :raises SlalomError: unknown name
    """
    if name not in SAMPLERS:
        raise SlalomError("--sampler", name, f"choose one of {', '.join(SAMPLERS)}")
    if name != "auto":
        return name
    continuous = all(p.choices is None and not p.integer for p in free)
    return "cma" if continuous and len(free) >= _CMA_FROM else "tpe"


def new_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler called ``name`` (not ``auto``)."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if name == "cma":
        return optuna.samplers.CmaEsSampler(seed=seed)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed, deterministic_objective=False)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed)


class Record:
    """Finished trials of one search, looked up by their parameters.

    :param storage: journal file, or URL of a database; None forgets everything
    :param name: of the study; it must tell apart whatever changes a trial's worth
    :raises SlalomError: driver missing, database not reachable, or file damaged
    """

    def __init__(self, storage: str | Path | None, name: str) -> None:
        self._known: dict[str, Outcome] = {}
        self._study: optuna.Study | None = None
        if storage is None:
            return
        self._study = _open(storage, name)
        for trial in self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)):
            cells = tuple(trial.user_attrs.get("cells", ()))
            self._known[_key(trial.params)] = Outcome(float(trial.value or 0.0), cells)

    def __len__(self) -> int:
        return len(self._known)

    def find(self, params: Mapping[str, Any]) -> Outcome | None:
        """What these parameters were worth, if they were tried before."""
        return self._known.get(_key(params))

    def add(self, trial: optuna.Trial, outcome: Outcome, seconds: float) -> None:
        """Keep the outcome of a trial just asked for."""
        if self._study is None:
            return
        self._known[_key(trial.params)] = outcome
        kept = optuna.trial.create_trial(
            params=trial.params,
            distributions=trial.distributions,
            value=outcome.value,
            user_attrs={"cells": list(outcome.cells), "seconds": seconds},
        )
        self._study.add_trial(kept)


def _key(params: Mapping[str, Any]) -> str:
    return json.dumps(dict(params), sort_keys=True)


def _open(storage: str | Path, name: str) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" in str(storage):
        return _open_database(str(storage), name)
    path = Path(storage)
    try:
        if path.exists() and path.stat().st_size:
            with path.open("rb") as file:
                json.loads(file.readline())
        path.parent.mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
        return optuna.create_study(study_name=name, storage=backend, direction="maximize", load_if_exists=True)
    except OSError as error:
        raise SlalomError("--storage", str(path), f"name a file that can be written ({error.strerror})") from error
    except (ValueError, KeyError) as error:
        raise SlalomError("--storage", str(path), "this is no journal of Optuna; name another file") from error


def _open_database(url: str, name: str) -> optuna.Study:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    try:
        parsed = make_url(url)
        shown = parsed.render_as_string(hide_password=True)
        if parsed.drivername == "postgresql":  # SQLAlchemy's own default driver changed with 2.1
            url = parsed.set(drivername="postgresql+psycopg2").render_as_string(hide_password=False)
    except (ArgumentError, ValueError):
        raise SlalomError("--storage", "a URL", "write postgresql://USER:PASSWORD@HOST:PORT/DATABASE") from None
    try:
        return optuna.create_study(study_name=name, storage=url, direction="maximize", load_if_exists=True)
    except (ImportError, NoSuchModuleError) as error:
        fix = f"its driver is missing ({_line(error)}); for PostgreSQL: pip install 'slalom[postgresql]'"
        raise SlalomError("--storage", shown, fix) from error
    except SQLAlchemyError as error:
        raise SlalomError("--storage", shown, f"the database does not answer: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__
