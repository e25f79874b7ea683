"""The learned policy in torch: a base rule's score plus a learned residual, per candidate.

    e_k = relu(W_c c + W_x x_k + b)                 shared encoder; W_c c once per decision
    p   = [mean_k e_k, max_k e_k]                   over allowed candidates
    z_k = relu(W_e e_k + W_p p + b')
    logit_k = −scale · (W_base[kind] · x_k) + w · z_k,      w = 0 at the start
    value   = V_2 relu(V_1 p + b_1) + b_2

Nothing depends on a row's index or on the number of rows: permutation-equivariant, for clusters of any size.
ReLU is the cheapest activation in both runtimes; ``policies.compiled`` runs the same weights without torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from engine.core.columns import CANDIDATE_DIMENSIONLESS, Col, Kind
from policies.features import CLIP, N_CONTEXT_FEATURES, N_FEATURES
from policies.normalise import Normalisation, default_normalisation

__all__ = ["Scores", "ScoringNetwork", "observation_size"]

#: Logit of a masked candidate: its probability underflows to exactly 0.
MASKED = -1e8


def observation_size(rows: int) -> int:
    """Length of a flat observation with room for ``rows`` candidates."""
    return N_CONTEXT_FEATURES + rows * CANDIDATE_DIMENSIONLESS


@dataclass(frozen=True, eq=False)
class Scores:
    """``logits`` (B, K), masked rows at ``MASKED``; ``value`` (B,)."""

    logits: Tensor
    value: Tensor


class ScoringNetwork(nn.Module):
    """Scores candidates; see the module's docstring for the equations.

    :param base: cost weights of the base rule, (4 kinds, N_FEATURES), frozen; see ``linear_score.weights``
    :param hidden: width of the encoder and of both heads
    :param scale: start of the learned positive factor between the base rule's cost and a logit
    """

    context_scale: Tensor
    context_log: Tensor
    candidate_scale: Tensor
    candidate_log: Tensor
    base: Tensor

    def __init__(
        self,
        base: np.ndarray,
        hidden: int = 32,
        scale: float = 5.0,
        normalisation: Normalisation | None = None,
    ) -> None:
        super().__init__()
        if base.shape != (len(Kind), N_FEATURES):
            raise ValueError(f"base weights have shape {base.shape}, expected {(len(Kind), N_FEATURES)}")
        self.hidden = hidden
        self.normalisation = normalisation or default_normalisation()
        for name in ("context_scale", "candidate_scale"):
            self.register_buffer(name, torch.tensor(getattr(self.normalisation, name), dtype=torch.float32))
        for name in ("context_log", "candidate_log"):
            self.register_buffer(name, torch.tensor(getattr(self.normalisation, name), dtype=torch.bool))
        self.register_buffer("base", torch.tensor(base, dtype=torch.float32))
        self.log_scale = nn.Parameter(torch.tensor([float(np.log(scale))]))
        self.context = nn.Linear(N_CONTEXT_FEATURES, hidden)
        self.candidate = nn.Linear(N_FEATURES, hidden, bias=False)
        self.pool = nn.Linear(2 * hidden, hidden)
        self.head = nn.Linear(hidden, hidden, bias=False)
        self.out = nn.Linear(hidden, 1, bias=False)
        first, last = nn.Linear(2 * hidden, hidden), nn.Linear(hidden, 1)
        self.value = nn.Sequential(first, nn.ReLU(), last)
        for layer in (self.context, self.candidate, self.pool, self.head, first):
            nn.init.orthogonal_(layer.weight, gain=2**0.5)
        for layer in (self.context, self.pool, first, last):
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.out.weight)

    def forward(self, observations: Tensor, mask: Tensor) -> Scores:
        """Score a batch of decisions.

        :param observations: float32 (B, C + K·F): dimensionless context, then K rows of dimensionless columns
        :param mask: (B, K), nonzero where the candidate is allowed
        """
        batch, rows = mask.shape
        allowed = mask.bool().unsqueeze(-1)
        observations = observations.nan_to_num(nan=CLIP).clamp(-CLIP, CLIP)
        context = observations[:, :N_CONTEXT_FEATURES]
        columns = observations[:, N_CONTEXT_FEATURES:].reshape(batch, rows, CANDIDATE_DIMENSIONLESS)
        raw = _with_hinges(columns)

        cost = (raw * self.base[context[:, : len(Kind)].argmax(1)].unsqueeze(1)).sum(-1)
        per_context = self.context(self._normal(context, self.context_scale, self.context_log))
        per_row = self.candidate(self._normal(raw, self.candidate_scale, self.candidate_log))
        encoded = torch.relu(per_row + per_context.unsqueeze(1)) * allowed

        count = allowed.sum(1).clamp(min=1)
        # relu ≥ 0 and masked rows are 0, so a plain maximum is the maximum over allowed rows
        pooled = torch.cat([encoded.sum(1) / count, encoded.amax(1)], dim=1)
        mixed = torch.relu(self.head(encoded) + self.pool(pooled).unsqueeze(1))
        logits = self.out(mixed).squeeze(-1) - self.log_scale.exp() * cost
        return Scores(logits.masked_fill(~allowed.squeeze(-1), MASKED), self.value(pooled).squeeze(-1))

    def _normal(self, x: Tensor, scale: Tensor, log: Tensor) -> Tensor:
        bound = self.normalisation.bound
        return (torch.where(log, x.sign() * x.abs().log1p(), x) / scale).clamp(-bound, bound)

    def arrays(self) -> dict[str, np.ndarray]:
        """All weights as float32 arrays, by the names that ``policies.compiled`` and the checkpoint use."""
        skip = {"context_scale", "context_log", "candidate_scale", "candidate_log"}
        state = self.state_dict()
        return {k: v.detach().cpu().numpy().astype(np.float32) for k, v in state.items() if k not in skip}


def _with_hinges(columns: Tensor) -> Tensor:
    """The dimensionless columns and the three hinges of ``policies.features``."""
    hinges = torch.stack(
        [columns[..., Col.TTFT] - 1.0, -columns[..., Col.SLACK_AFTER], columns[..., Col.STEP_WITH] - 1.0], -1
    )
    return torch.cat([columns, hinges.clamp(min=0.0)], -1)
