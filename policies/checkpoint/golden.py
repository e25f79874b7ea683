"""Golden vectors: made-up decisions with known logits, checked wherever a checkpoint is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.core.columns import (
    CANDIDATE_DIMENSIONLESS,
    CONTEXT_DIMENSIONLESS,
    N_CANDIDATE,
    N_CONTEXT,
    Col,
    Ctx,
    Kind,
)
from engine.errors import SlalomError
from policies.checkpoint.manifest import Golden
from policies.network.compiled import logits, memory_cells, pack
from policies.network.normalise import Normalisation

if TYPE_CHECKING:
    from policies.network.scoring import ScoringNetwork

N_GOLDEN = 16
#: Relative to 1 + |logit|: float32 sums in another order, over costs of very different size.
TOLERANCE = 1e-4


def _inputs(rng: np.random.Generator, kind: Kind) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One plausible decision: heavy-tailed ratios, proper one-hots, some rows masked, HOLD or KEEP last."""
    rows = int(rng.integers(2, 9))
    context = rng.exponential(0.7, CONTEXT_DIMENSIONLESS).astype(np.float32)
    context[: len(Kind)] = np.eye(len(Kind), dtype=np.float32)[kind]
    candidates = rng.exponential(0.7, (rows, CANDIDATE_DIMENSIONLESS)).astype(np.float32)
    candidates[:, Col.SLACK : Col.SLACK_AFTER + 1] -= 0.7
    candidates[:, : Col.ROLE_MULTIPLEXED + 1] = 0.0
    candidates[:, Col.TO_PREFILL : Col.TO_MULTIPLEXED + 1] = 0.0
    candidates[:, Col.IS_INSTANCE] = 1.0
    candidates[np.arange(rows), Col.ROLE_PREFILL + rng.integers(0, 4, rows)] = 1.0
    candidates[-1] = 0.0
    candidates[-1, Col.IS_HOLD if kind in (Kind.PLACE_PREFILL, Kind.PLACE_DECODE) else Col.IS_KEEP] = 1.0
    mask = (rng.random(rows) < 0.8).astype(np.uint8)
    mask[int(rng.integers(rows))] = 1
    return context, candidates, mask


def golden_vectors(network: ScoringNetwork, seed: int = 0) -> list[Golden]:
    """``N_GOLDEN`` decisions with the logits that torch gives, in double precision."""
    import copy

    import torch

    exact = copy.deepcopy(network).cpu().double()
    rng = np.random.default_rng(seed)
    vectors = []
    for i in range(N_GOLDEN):
        context, candidates, mask = _inputs(rng, Kind(i % len(Kind)))
        flat = torch.tensor(np.concatenate([context, candidates.ravel()]), dtype=torch.float64)[None]
        with torch.no_grad():
            row = exact(flat, torch.tensor(mask)[None]).logits[0].numpy()
        vectors.append(
            Golden(
                context=context.tolist(),
                candidates=candidates.tolist(),
                mask=mask.tolist(),
                logits=row[mask > 0].tolist(),
            )
        )
    return vectors


def verify(vectors: list[Golden], arrays: dict[str, np.ndarray], normal: Normalisation, where: str) -> None:
    """Run the compiled network on the golden vectors.

    :raises SlalomError: malformed vectors, or logits that differ
    """
    if len(vectors) < N_GOLDEN:
        raise SlalomError(f"{where}: golden", len(vectors), f"a network needs {N_GOLDEN} golden vectors")
    hidden = arrays["context.bias"].shape[0]
    for i, vector in enumerate(vectors):
        rows = len(vector.mask)
        widths = {len(row) for row in vector.candidates}
        fits = (
            len(vector.context) == CONTEXT_DIMENSIONLESS
            and len(vector.candidates) == rows > 0
            and widths == {CANDIDATE_DIMENSIONLESS}
            and len(vector.logits) == sum(vector.mask) > 0
        )
        if not fits:
            raise SlalomError(f"{where}: golden[{i}]", "lengths do not agree", "the file is damaged")
        context, candidates = np.zeros(N_CONTEXT), np.zeros((rows, N_CANDIDATE))
        context[:CONTEXT_DIMENSIONLESS] = vector.context
        context[Ctx.KIND] = int(np.argmax(vector.context[: len(Kind)]))
        candidates[:, :CANDIDATE_DIMENSIONLESS] = vector.candidates
        mask = np.array(vector.mask, np.uint8)
        got = logits(context, candidates, mask, pack(arrays, normal, rows), np.zeros(memory_cells(hidden, rows)))
        want = np.array(vector.logits)
        worst = float(np.max(np.abs(got[mask > 0] - want) / (1.0 + np.abs(want))))
        if not worst <= TOLERANCE:
            raise SlalomError(f"{where}: golden[{i}]", worst, "this machine does not reproduce the network")
