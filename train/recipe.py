"""Recipes: the exact request behind every shipped checkpoint, by name.

``train-policy --recipe NAME`` trains what stands in ``checkpoints/policies/NAME`` again, from nothing. Budgets are in
requests or frames, not in seconds, so the outcome follows from the recipe alone.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from engine.common.documents import bad_input
from engine.common.yaml_documents import read_yaml
from engine.errors import no_such

_FOLDER = Path(__file__).parent / "recipes"


class Recipe(BaseModel):
    """What ``train-policy`` is asked for.

    :param also: further scenarios of a generalist, ``NAME`` or ``NAME@16`` for 16 mixed instances of its first group
    :param budget: as on the command line
    :param config: hyper-parameters of :class:`train.config.TrainConfig`
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scenario: str
    also: tuple[str, ...] = ()
    algorithm: Literal["controller", "ppo", "direct", "search", "generalist"]
    rule: str = "auto"
    budget: str
    seed: int = 0
    config: dict[str, Any] = {}


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or any YAML file by path.

    :raises SlalomError: no such recipe, or one with unknown or impossible fields
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _FOLDER / f"{name}.yaml"
    if not os.path.exists(path):
        raise no_such("--recipe", name, recipe_names(), "a YAML file")
    content = read_yaml(path, "--recipe")
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise bad_input(path.name, error) from error
