"""The model card of a checkpoint: the manifest's main facts in words, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from policies.checkpoint.manifest import Manifest


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    lines += ["| " + " | ".join(_cell(row.get(head, "")) for head in heads) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def model_card(manifest: Manifest) -> str:
    """Markdown text of the checkpoint's README."""
    base = "the rule itself" if manifest.kind == "rule" else "the rule that the network corrects"
    parts = [
        f"# {manifest.name}",
        f"A Slalom dispatch policy ({manifest.kind}). Base: `{manifest.rule.name}`, {base}.",
        f"Scenario: `{manifest.scenario or 'not recorded'}`. Fallback rule: `{manifest.fallback}`.",
        "## Training",
        _table([{"fact": k, "value": v} for k, v in manifest.training.items()])
        if manifest.training
        else "Not recorded.",
        "## Evaluation",
        _table(manifest.evaluation) if manifest.evaluation else "Not recorded.",
        "## Limits",
        "Valid for loads and instances like those it was trained on: the bounds in `policy.json` say which "
        "values of each column occurred. Outside them, the guard hands decisions to the fallback rule.",
        "## Use",
        "Give this folder as the policy to `serve` or `eval-policy`. Loading it executes no code.",
    ]
    return "\n\n".join(parts) + "\n"
