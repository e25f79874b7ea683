"""The scoring network's passes for PPO on a CPU, written out: large matrix products by torch, the rest compiled.

Autograd runs some thirty small operations over all candidates of a batch, each a pass over memory. Here a chunk of
decisions that fits the cache goes through the whole network, forwards and backwards, before the next one is touched,
and masked candidates and features that are zero throughout a rollout are left out (their gradient is zero). Results
are those of :class:`policies.network.ScoringNetwork` under autograd up to rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch as th
from numpy.typing import NDArray
from torch import Tensor

from policies.features import N_CONTEXT_FEATURES, N_FEATURES
from policies.network import ScoringNetwork, observation_size
from train.kernels.act import Layers, Weights, act_many, values_of
from train.kernels.passes import Minibatch, encode, gather, objective, spread
from train.objective import Losses, Objective
from train.packed import Packed

__all__ = ["Fused", "Samples"]

_CHUNK = 1024  # decisions that go through the network together
_CRITIC = ("context", "candidate", "value")  # layers that the value depends on


class Samples(NamedTuple):
    """What PPO knows of every decision of a rollout, each (frames,)."""

    actions: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    advantages: NDArray[np.float32]
    returns: NDArray[np.float32]


class _Joined(NamedTuple):
    """Weights as the products take them: of the features in use; of the pool to the head, then to the value."""

    row: Tensor  # (H, width)
    first: Tensor  # (2 H, 2 H)
    first_bias: Tensor  # (2 H,)


class _Sums(NamedTuple):
    """Gradients of :class:`_Joined`, of the two scalar parameters, and what :class:`Losses` are the means of."""

    row: Tensor
    first: Tensor
    first_bias: Tensor
    scalars: NDArray[np.float64]
    losses: NDArray[np.float64]


class Fused:
    """Acts with, and differentiates, a network whose parameters it reads in place.

    :param n_candidates: most candidates of one decision
    """

    def __init__(self, network: ScoringNetwork, n_candidates: int) -> None:
        self.network, self.n_candidates = network, n_candidates
        hidden, rows = network.hidden, _CHUNK * n_candidates
        self._named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._own = {name: p.detach() for name, p in self._named.items()}
        self._gradients = {name: th.zeros_like(weight) for name, weight in self._own.items()}
        f4 = np.float32
        self.weights = Weights(
            context=np.zeros((N_CONTEXT_FEATURES, hidden), f4), context_bias=np.zeros(hidden, f4),
            row=np.zeros((N_FEATURES, hidden), f4), head=np.zeros((hidden, hidden), f4),
            first=np.zeros((2 * hidden, 2 * hidden), f4), first_bias=np.zeros(2 * hidden, f4),
            out=np.zeros(hidden, f4), value_out=np.zeros(hidden, f4), value_bias=np.zeros(1, f4),
            scale=np.zeros(1, f4),
        )  # fmt: skip
        self.layers = Layers(
            base=np.zeros((1, hidden), f4), encoded=np.zeros((n_candidates, hidden), f4),
            mixed=np.zeros((n_candidates, hidden), f4), pooled=np.zeros((1, 2 * hidden), f4),
            hidden=np.zeros((1, 2 * hidden), f4), logits=np.zeros(n_candidates), chances=np.zeros(n_candidates),
            live=np.zeros(N_FEATURES, f4), columns=np.zeros(N_FEATURES, np.int64), narrow=np.zeros(1, np.int64),
            x=np.zeros((n_candidates, N_FEATURES), f4), weights=np.zeros((N_FEATURES, hidden), f4),
        )  # fmt: skip
        self._probe, self._batch = Packed(network, n_candidates, 1), self._minibatch(0)
        # layers of one chunk of a minibatch, and their gradients
        self._encoded, self._mixed, self._by_encoded = (th.zeros(rows, hidden) for _ in range(3))
        self._by_context, self._hidden = th.zeros(_CHUNK, hidden), th.zeros(_CHUNK, 2 * hidden)
        self._pooled, self._by_pooled = th.zeros(_CHUNK, 2 * hidden), th.zeros(_CHUNK, 2 * hidden)
        self._ties = np.zeros(hidden, f4)
        self._rehearse()

    def _rehearse(self) -> None:
        """Compile all kernels (or load them) before a clock runs."""
        packed, k = self.packed(1), self.n_candidates
        observations, masks = np.zeros((1, observation_size(k)), np.float32), np.ones((1, k), np.bool_)
        actions, number = np.zeros(1, np.int64), np.zeros(1, np.float32)
        self.values(observations, masks, (0.0, 1.0))
        self.act(packed, 0, observations, masks, number, (0.0, 1.0), (actions, number, number))
        packed.fill(observations, masks)
        goal = Objective(clip=0.2, entropy_weight=0.0, value_weight=0.0, shift=0.0, scale=1.0)
        self.differentiate(packed, Samples(actions, number, number, number), np.zeros(1, np.int64), goal)
        for parameter in self._named.values():
            parameter.grad = None

    def packed(self, capacity: int) -> Packed:
        """Room for ``capacity`` decisions."""
        return Packed(self.network, self.n_candidates, capacity)

    def refresh(self) -> None:
        """Take over changed weights; :meth:`act` and whoever plays with ``weights`` does not look again."""
        own = {name: weight.numpy() for name, weight in self._own.items()}
        w, hidden = self.weights, self.network.hidden
        w.context[:], w.context_bias[:] = own["context.weight"].T, own["context.bias"]
        w.row[:], w.head[:] = own["candidate.weight"].T, own["head.weight"].T
        w.first[:, :hidden], w.first[:, hidden:] = own["pool.weight"].T, own["value.0.weight"].T
        w.first_bias[:hidden], w.first_bias[hidden:] = own["pool.bias"], own["value.0.bias"]
        w.out[:], w.value_out[:], w.value_bias[:] = own["out.weight"][0], own["value.2.weight"][0], own["value.2.bias"]
        w.scale[0] = np.exp(own["log_scale"][0])
        self.layers.narrow[0] = 0

    # -- forwards

    def act(
        self,
        packed: Packed,
        frame: int,
        observations: NDArray[np.float32],
        masks: NDArray[np.bool_],
        uniform: NDArray[np.float32],
        unit: tuple[float, float],
        out: tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]],
    ) -> None:
        """Append n decisions to ``packed`` as numbers ``frame`` and following, and draw an action for each.

        :param uniform: (n,) numbers in [0, 1)
        :param unit: (shift, scale): values become shift + scale × output
        :param out: actions, log-probabilities and values, (n,) each, to be filled
        """
        act_many(
            observations, masks, frame, uniform, packed.constants, packed.store, packed.scratch, self.weights,
            self.layers, *unit, *out,
        )  # fmt: skip

    def values(
        self, observations: NDArray[np.float32], masks: NDArray[np.bool_], unit: tuple[float, float]
    ) -> NDArray[np.float32]:
        """Values (n,) of decisions, with the weights as they are now."""
        self.refresh()
        self._probe.clear()
        values = np.zeros(len(observations), np.float32)
        values_of(
            observations, masks, self._probe.constants, self._probe.store, self._probe.scratch, self.weights,
            self.layers, *unit, values,
        )  # fmt: skip
        return values

    # -- backwards

    def differentiate(self, packed: Packed, samples: Samples, order: NDArray[np.int64], goal: Objective) -> Losses:
        """Gradient of ``goal`` over the minibatch ``order`` (decisions of ``packed``) into the parameters' ``grad``."""
        self.refresh()
        own, store, n = self._own, packed.store, len(order)
        if n > len(self._batch.chosen):
            self._batch = self._minibatch(n)
        present = store.greatest > 0
        present[0] = True  # torch does not take products without a column
        columns = np.flatnonzero(present)
        gather(order[np.argsort(store.first[order])], store, samples, columns, self._batch)  # in the order of memory
        weights = _Joined(
            row=own["candidate.weight"][:, th.from_numpy(columns)].contiguous(),
            first=th.cat([own["pool.weight"], own["value.0.weight"]]),
            first_bias=th.cat([own["pool.bias"], own["value.0.bias"]]),
        )
        row, first, first_bias = (th.zeros_like(weight) for weight in weights)
        sums = _Sums(row, first, first_bias, np.zeros(2), np.zeros(5))
        for gradient in self._gradients.values():
            gradient.zero_()
        for begin in range(0, n, _CHUNK):
            self._chunk(begin, min(begin + _CHUNK, n), weights, sums, goal, 1.0 / n)
        self._hand_over(columns, sums, goal.actor)
        return Losses(*(sums.losses / n).tolist())

    def _minibatch(self, n: int) -> Minibatch:
        rows, f4 = n * self.n_candidates, np.float32
        return Minibatch(
            start=np.zeros(n + 1, np.int64), context=np.zeros((n, N_CONTEXT_FEATURES), f4),
            rows=np.zeros(rows * N_FEATURES, f4), cost=np.zeros(rows, f4), advised=np.zeros(rows, f4),
            chosen=np.zeros(n, np.int64), log_probs=np.zeros(n, f4), advantages=np.zeros(n, f4),
            returns=np.zeros(n, f4),
        )  # fmt: skip

    def _chunk(self, begin: int, end: int, weights: _Joined, sums: _Sums, goal: Objective, share: float) -> None:
        """Decisions ``begin`` to ``end`` of the minibatch through the network and back."""
        own, gradients, batch = self._own, self._gradients, self._batch
        n, at, size = end - begin, int(batch.start[begin]), int(batch.start[end] - batch.start[begin])
        width = weights.row.shape[1]
        rows = th.from_numpy(batch.rows[at * width : (at + size) * width]).view(size, width)
        context = th.from_numpy(batch.context[begin:end])
        encoded, mixed, by_encoded = self._encoded[:size], self._mixed[:size], self._by_encoded[:size]
        pooled, hidden, by_context = self._pooled[:n], self._hidden[:n], self._by_context[:n]
        by_pooled = self._by_pooled[:n]

        th.mm(rows, weights.row.T, out=encoded)
        th.addmm(own["context.bias"], context, own["context.weight"].T, out=by_context)
        encode(batch.start, begin, end, by_context.numpy(), encoded.numpy(), pooled.numpy())
        th.mm(encoded, own["head.weight"].T, out=mixed)
        th.addmm(weights.first_bias, pooled, weights.first.T, out=hidden)
        objective(
            batch, begin, end, mixed.numpy(), hidden.numpy(), own["out.weight"].numpy()[0], self.weights.scale[0],
            own["value.2.weight"].numpy()[0], own["value.2.bias"].numpy()[0], goal.shift, goal.scale, goal.clip,
            goal.entropy_weight, goal.value_weight, goal.actor, share, self.layers.logits, self.layers.chances,
            gradients["out.weight"].numpy()[0], gradients["value.2.weight"].numpy()[0], sums.scalars, sums.losses,
        )  # fmt: skip
        sums.first.addmm_(hidden.T, pooled)
        sums.first_bias.add_(hidden.sum(0))
        th.mm(hidden, weights.first, out=by_pooled)
        if goal.actor:
            gradients["head.weight"].addmm_(mixed.T, encoded)
            th.mm(mixed, own["head.weight"], out=by_encoded)
        else:
            by_encoded.zero_()
        spread(
            batch.start, begin, end, encoded.numpy(), pooled.numpy(), by_pooled.numpy(), by_encoded.numpy(),
            by_context.numpy(), self._ties,
        )  # fmt: skip
        sums.row.addmm_(by_encoded.T, rows)
        gradients["context.weight"].addmm_(by_context.T, context)
        gradients["context.bias"] += by_context.sum(0)

    def _hand_over(self, columns: NDArray[np.int64], sums: _Sums, actor: bool) -> None:
        """The sums over all chunks as the parameters' gradients."""
        gradients, half = self._gradients, self.network.hidden
        gradients["candidate.weight"].index_copy_(1, th.from_numpy(columns), sums.row)
        for name, part in (("pool", slice(half)), ("value.0", slice(half, None))):
            gradients[f"{name}.weight"].copy_(sums.first[part])
            gradients[f"{name}.bias"].copy_(sums.first_bias[part])
        gradients["log_scale"].fill_(sums.scalars[0])
        gradients["value.2.bias"].fill_(sums.scalars[1])
        for name, parameter in self._named.items():
            fitted = actor or name.split(".")[0] in _CRITIC
            parameter.grad = gradients[name] if fitted else None  # None: the optimiser leaves it alone
