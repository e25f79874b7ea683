"""Samplers by name, and studies that outlive their process.

A search asks a sampler in memory; what a trial was worth is recorded in an Optuna study on disk (a journal file) or
in a database (any SQLAlchemy URL, e.g. ``postgresql://``). A resumed search asks the same sampler again from the
start and looks up what is recorded instead of simulating it, so it goes on exactly where it was killed, with any
sampler. Nothing recorded is executable: CMA-ES would otherwise keep a pickled optimiser in the storage.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from engine.common.appends import heal
from engine.common.regular import LARGE, check_regular
from engine.errors import SlalomError, no_such

#: ``auto`` picks one of the others; ``gp`` needs half a second for a suggestion.
SAMPLERS = ("auto", "tpe", "cma", "gp", "random")
_HEAD = b'{"op_code":'  # how every journal begins
_CMA_FROM = 9  # continuous parameters; below, TPE is at least as good at equal budget


class Outcome(NamedTuple):
    """What a trial was worth.

    :param value: its score, or the most it could have reached when it was given up early
    :param cells: attainment at each rate that was simulated, hardest first
    :param requests: simulated for it
    """

    value: float
    cells: tuple[float, ...]
    requests: int = 0


def choose_sampler(name: str, free: Sequence[Any]) -> str:
    """The sampler ``auto`` stands for, given the parameters to search; other names stand for themselves.

    :raises SlalomError: unknown name
    """
    if name not in SAMPLERS:
        raise no_such("--sampler", name, SAMPLERS)
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
        self._earlier: dict[str, int] = {}
        self._storage = str(storage)
        self._study: optuna.Study | None = None
        if storage is None:
            return
        self._study = _open(storage, name)
        for trial in self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)):
            cells = tuple(trial.user_attrs.get("cells", ()))
            requests = int(trial.user_attrs.get("requests", 0))
            self._known[_key(trial.params)] = Outcome(float(trial.value or 0.0), cells, requests)
            self._earlier[_key(trial.params)] = requests

    def __len__(self) -> int:
        return len(self._known)

    def find(self, params: Mapping[str, Any]) -> Outcome | None:
        """What these parameters were worth, if they were tried before."""
        return self._known.get(_key(params))

    def spent_before(self, params: Mapping[str, Any]) -> int:
        """Requests that an earlier part of this search simulated for these parameters; 0 when asked again."""
        return self._earlier.pop(_key(params), 0)

    def once(self, name: str, value: int) -> int:
        """``value``, or what was kept under this name before.

        :raises SlalomError: the disk is full
        """
        if self._study is None:
            return value
        if name not in self._study.user_attrs:
            with self._told():
                self._study.set_user_attr(name, value)
        return int(self._study.user_attrs[name])

    def add(self, trial: optuna.Trial, outcome: Outcome, seconds: float) -> None:
        """Keep the outcome of a trial just asked for.

        :raises SlalomError: the disk is full
        """
        if self._study is None:
            return
        self._known[_key(trial.params)] = outcome
        kept = optuna.trial.create_trial(
            params=trial.params,
            distributions=trial.distributions,
            value=outcome.value,
            user_attrs={"cells": list(outcome.cells), "seconds": seconds, "requests": outcome.requests},
        )
        with self._told():
            self._study.add_trial(kept)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            fix = f"it cannot be written ({error.strerror}); repeat with --resume, finished trials are kept"
            raise SlalomError("--storage", self._storage, fix) from error


def _key(params: Mapping[str, Any]) -> str:
    return json.dumps(dict(params), sort_keys=True)


def _open(storage: str | Path, name: str) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" in str(storage):
        return _open_database(str(storage), name)
    path = Path(storage)
    try:
        return optuna.create_study(
            study_name=name, storage=open_journal(path), direction="maximize", load_if_exists=True
        )
    except OSError as error:
        raise SlalomError("--storage", str(path), f"name a file that can be written ({error.strerror})") from error
    except (ValueError, KeyError) as error:
        raise SlalomError("--storage", str(path), "this journal is damaged; name another file") from error


def open_journal(path: Path) -> optuna.storages.JournalStorage:
    """Optuna's journal in a file. What a crash cut off at its end is left out: that trial is simulated again.

    :raises SlalomError: it cannot be written, or is no journal
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            check_regular(path, LARGE)
            with path.open("rb") as file:
                head = file.read(len(_HEAD)).rstrip(b"\0")
            if head != _HEAD[: len(head)]:  # somebody's file, which must stay as it is
                raise SlalomError("--storage", str(path), "this is no journal of Optuna; name another file")
        lock = JournalFileSymlinkLock(str(path))
        backend = JournalFileBackend(str(path), lock)
        lock.acquire()  # somebody else may be writing
        try:
            heal(path)
        finally:
            lock.release()
        return optuna.storages.JournalStorage(backend)
    except OSError as error:
        raise SlalomError("--storage", str(path), f"name a file that can be written ({error.strerror})") from error


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
