"""The folder of one run, laid out as in the RL zoo.

config.yml command.txt system.json   what was asked, where it ran
study.journal base.json              trials of the search (Optuna), the tuned base rule
search.jsonl                         answers of a direct search that is not done yet
tb/ log.jsonl evaluations.npz        what happened
train_state/state.safetensors        to resume from
snapshots/                           every judged network, deployable
best/                                the checkpoint to use
result.json                          the summary
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.common import provenance
from engine.common.documents import read_text
from engine.common.files import claim, read_json, write_json, write_text
from engine.errors import SlalomError
from train.config import TrainConfig


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    root: Path

    @property
    def state(self) -> Path:
        return self.root / "train_state" / "state.safetensors"

    @property
    def best(self) -> Path:
        return self.root / "best"

    @property
    def base(self) -> Path:
        return self.root / "base.json"

    @property
    def study(self) -> Path:
        return self.root / "study.journal"

    @property
    def search(self) -> Path:
        return self.root / "search.jsonl"

    @property
    def request(self) -> Path:
        return self.root / "run.json"

    def start(self, request: dict[str, Any], config: TrainConfig) -> None:
        """Claim an empty folder and note what was asked.

        :param request: what decides the result beside ``config`` (scenario digest, algorithm, seed, ...)
        :raises SlalomError: the folder holds a run already, or cannot be written
        """
        claim(self.root)
        if self.request.exists():
            raise SlalomError("--out", str(self.root), "a run is there already; add --resume or name another")
        if self.base.exists():  # it would be taken for what this run has found
            raise SlalomError("--out", str(self.root), "it holds the outcome of another run; name another folder")
        write_text(self.root / "config.yml", config.to_yaml())
        write_text(self.root / "command.txt", _command() + "\n")
        write_json(
            self.root / "system.json",
            {
                "commit": provenance.commit(),
                "versions": provenance.versions(),
                "machine": provenance.machine(),
            },
        )
        write_json(self.request, request)

    def resume(self, request: dict[str, Any], config: TrainConfig) -> None:
        """Check that the run in this folder was asked for in the same words.

        :raises SlalomError: no run here, or another scenario, algorithm, seed or hyper-parameter
        """
        if not os.path.exists(self.request):
            raise SlalomError("--resume", str(self.root), "no run there; start one without --resume")
        claim(self.root)
        damaged = SlalomError("--resume", str(self.request), "the file is damaged; start anew in another folder")
        try:
            before = read_json(self.request)
        except SlalomError as error:
            raise damaged from error
        if not isinstance(before, dict):
            raise damaged
        for name, value in request.items():
            if before.get(name) != value:
                fix = f"the run in {self.root} has {before.get(name)!r}; repeat its command (command.txt)"
                raise SlalomError(f"--resume: {name}", value, fix)
        if read_text(self.root / "config.yml", "--resume") != config.to_yaml():
            raise SlalomError("--resume: hyper-parameters", "others", f"use --config {self.root / 'config.yml'}")


def _command() -> str:
    """This process's command line, without the passwords in its addresses."""
    words = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return re.sub(r"(://[^\s:/@']*):[^\s@']*@", r"\1:***@", words)
