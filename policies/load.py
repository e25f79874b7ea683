"""From the word that a user gives to a policy that decides: a rule with its parameters, or a checkpoint folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.core.policy import Policy
from engine.errors import SlalomError
from policies.registry import get, parse
from policies.setting import Setting


def load_policy(spec: str | Path, setting: Setting, values: Mapping[str, Any] | None = None) -> Policy:
    """The policy that ``spec`` names, bound to ``setting``.

    :param spec: a rule's name, ``NAME:parameter=value,...``, or a checkpoint folder
    :param values: parameters that override those in ``spec`` (rules only)
    :raises SlalomError: unknown name or parameter, or a checkpoint that does not pass its checks
    """
    text = str(spec)
    if os.path.isdir(spec):  # unlike Path.is_dir, answers False for a spec longer than a file name
        if values:
            raise SlalomError("policy parameters", dict(values), "a checkpoint has its values fixed; name a rule")
        from policies.checkpoint.folder import load

        return load(Path(spec)).bind(setting)
    if "/" in text or "\\" in text:
        raise SlalomError("policy", text, "no such folder; give a checkpoint folder or a rule's name")
    name, given = parse(text)
    return get(name).bind({**given, **(values or {})}, setting)
