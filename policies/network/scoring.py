"""The learned policy in torch: a base rule's score plus a learned residual, per candidate.

    e_k = relu(W_c c + W_x x_k + b)                 shared encoder; W_c c once per decision
    p   = [mean_k e_k, max_k e_k]                   over allowed candidates
    z_k = relu(W_e e_k + W_p p + b')
    logit_k = −scale · (W_base[kind] + c · G[kind]) · x_k + w · z_k + bonus[kind] · [k is the advice]
    value   = V_2 relu(V_1 p + b_1) + b_2

At the start w = 0. G, the gates, let the weights of the cost follow the context (a searched policy uses nothing
else); the advice is the answer of a published rule, which the policy then departs from only where that pays.

Nothing depends on a row's index or on the number of rows: permutation-equivariant, for clusters of any size.
ReLU is the cheapest activation in both runtimes; ``policies.network.compiled`` runs the same weights without torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from engine.core.columns import CANDIDATE_DIMENSIONLESS, Col, Kind
from policies.network.features import CLIP, N_CONTEXT_FEATURES, N_FEATURES
from policies.network.normalise import Normalisation, default_normalisation

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
    :param gate: G, (4 kinds, context features, N_FEATURES); None: zeros
    :param bonus: logits added to the advised candidate, per kind; None: zeros, and no advice is asked for
    :param hidden: width of the encoder and of both heads
    :param scale: start of the learned positive factor between the base rule's cost and a logit
    """

    context_scale: Tensor
    context_log: Tensor
    candidate_scale: Tensor
    candidate_log: Tensor
    base: Tensor
    bonus: Tensor
    gate: Tensor

    def __init__(
        self,
        base: np.ndarray,
        hidden: int = 32,
        scale: float = 5.0,
        normalisation: Normalisation | None = None,
        gate: np.ndarray | None = None,
        bonus: np.ndarray | None = None,
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
        zeros = np.zeros((len(Kind), N_CONTEXT_FEATURES, N_FEATURES))
        given_bonus = np.zeros(len(Kind)) if bonus is None else bonus
        for name, given in (("gate", zeros if gate is None else gate), ("bonus", given_bonus)):
            self.register_buffer(name, torch.tensor(given, dtype=torch.float32))
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
        """Score a batch of decisions. Only the candidates that are allowed are read: M rows of all decisions together.

        :param observations: float32 (B, C + K·F [+ K]): dimensionless context, K rows of dimensionless columns and,
            where the environment gives advice, 1 at the advised row
        :param mask: (B, K), nonzero where the candidate is allowed
        """
        (batch, rows), allowed = mask.shape, mask.bool()
        of, row = places = allowed.nonzero(as_tuple=True)  # (M,) each: a row's decision, and its place there
        end = N_CONTEXT_FEATURES + rows * CANDIDATE_DIMENSIONLESS
        columns = observations[:, N_CONTEXT_FEATURES:end].reshape(batch, rows, CANDIDATE_DIMENSIONLESS)
        raw = _with_hinges(_cut(columns[places]))
        kind, normal, weights = self._weigh(_cut(observations[:, :N_CONTEXT_FEATURES]))
        logits = -self.log_scale.exp() * (raw * weights[of]).sum(-1)
        if observations.shape[1] > end:
            logits = logits + observations[:, end:][places] * self.bonus[kind][of]
        normal_rows = self._normal(raw, self.candidate_scale, self.candidate_log)
        encoded = torch.relu(self.candidate(normal_rows) + self.context(normal)[of])
        pooled = _pool(encoded, places, allowed)
        mixed = torch.relu(self.head(encoded) + self.pool(pooled)[of])
        logits = logits + self.out(mixed).squeeze(-1)
        spread = logits.new_full((batch, rows), MASKED).index_put(places, logits)
        return Scores(spread, self.value(pooled).squeeze(-1))

    def _weigh(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Kind (B,), normalised context (B, C) and the weights of the cost (B, F)."""
        kind = context[:, : len(Kind)].argmax(1)
        normal = self._normal(context, self.context_scale, self.context_log)
        one_hot = nn.functional.one_hot(kind, len(Kind)).to(normal.dtype)
        by_kind = (one_hot.unsqueeze(2) * normal.unsqueeze(1)).flatten(1)
        return kind, normal, self.base[kind] + by_kind @ self.gate.flatten(0, 1)

    def _normal(self, x: Tensor, scale: Tensor, log: Tensor) -> Tensor:
        bound = self.normalisation.bound
        return (torch.where(log, x.sign() * x.abs().log1p(), x) / scale).clamp(-bound, bound)

    def arrays(self) -> dict[str, np.ndarray]:
        """All weights as float32 arrays, by the names that ``policies.network.compiled`` and the checkpoint use."""
        skip = {"context_scale", "context_log", "candidate_scale", "candidate_log"}
        state = self.state_dict()
        return {k: v.detach().cpu().numpy().astype(np.float32) for k, v in state.items() if k not in skip}


def _cut(x: Tensor) -> Tensor:
    return x.nan_to_num(nan=CLIP).clamp(-CLIP, CLIP)


def _pool(encoded: Tensor, places: tuple[Tensor, ...], allowed: Tensor) -> Tensor:
    """Mean and maximum (B, 2H) over the rows (M, H) of each decision; zeros where nothing is allowed."""
    # relu ≥ 0, so a maximum with the zeros of other rows is the maximum over allowed rows
    spread = encoded.new_zeros(*allowed.shape, encoded.shape[1]).index_put(places, encoded)
    return torch.cat([spread.sum(1) / allowed.sum(1, keepdim=True).clamp(min=1), spread.max(1).values], dim=1)


def _with_hinges(columns: Tensor) -> Tensor:
    """The dimensionless columns and the three hinges of ``policies.network.features``."""
    hinges = torch.stack(
        [columns[..., Col.TTFT] - 1.0, -columns[..., Col.SLACK_AFTER], columns[..., Col.STEP_WITH] - 1.0], -1
    )
    return torch.cat([columns, hinges.clamp(min=0.0)], -1)
