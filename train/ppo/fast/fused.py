"""The scoring network's passes for PPO on a CPU, written out and compiled.

Autograd runs some thirty small operations over all candidates of a batch, each a pass over memory. Here some hundreds
of rows go through the whole network, forwards and backwards, before the next ones are touched, and masked candidates
and features that are zero throughout a rollout are left out (their gradient is zero). Results are those of
:class:`policies.network.scoring.ScoringNetwork` under autograd up to rounding.
"""

from __future__ import annotations

import numpy as np
import torch as th
from numpy.typing import NDArray

from engine.jit.rows import addresses
from policies.network.features import N_CONTEXT_FEATURES, N_FEATURES
from policies.network.scoring import ScoringNetwork, observation_size
from train.ppo.batch import Samples
from train.ppo.fast.act import Layers, act_many, values_of
from train.ppo.fast.layers import Weights
from train.ppo.fast.pack import Observed
from train.ppo.fast.packed import Packed
from train.ppo.fast.passes import CHUNK, CHUNK_ROWS, Chunk, Goal, Sums, learn
from train.ppo.fast.products import ROWS, WIDTH
from train.ppo.objective import Losses, Objective

__all__ = ["Fused"]

_CRITIC = ("context", "candidate", "value")  # layers that the value depends on


class Fused:
    """Acts with, and differentiates, a network whose parameters it reads in place.

    :param n_candidates: most candidates of one decision
    """

    def __init__(self, network: ScoringNetwork, n_candidates: int) -> None:
        self.network, self.n_candidates = network, n_candidates
        self._named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._own = {name: p.detach() for name, p in self._named.items()}
        self._gradients = {name: th.zeros_like(weight) for name, weight in self._own.items()}
        width = -network.hidden % WIDTH + network.hidden
        self.weights, self.layers = _weights(width), _layers(width, n_candidates)
        self._chunk, self._sums = _chunk(width, n_candidates), _sums(width)
        #: Address vectors of ``weights`` and ``layers``, as kernels take them.
        self.words = addresses(self.weights), addresses(self.layers)
        self._learning = addresses(self._chunk), addresses(self._sums)
        self._probe = Packed(network, n_candidates, 1)
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
        w, n, width = self.weights, self.network.hidden, self.weights.head.shape[0]
        w.context[:, :n], w.context_bias[0, :n] = own["context.weight"].T, own["context.bias"]
        w.row[:, :n], w.head[:n, :n] = own["candidate.weight"].T, own["head.weight"].T
        for name, to in (("pool", 0), ("value.0", width)):
            w.first[:n, to : to + n] = own[f"{name}.weight"].T[:n]
            w.first[width : width + n, to : to + n] = own[f"{name}.weight"].T[n:]
            w.first_bias[0, to : to + n] = own[f"{name}.bias"]
        w.out[0, :n], w.value_out[0, :n] = own["out.weight"][0], own["value.2.weight"][0]
        w.value_bias[:] = own["value.2.bias"]
        w.scale[0] = np.exp(own["log_scale"][0])
        w.head_back[:], w.first_back[:] = w.head.T, w.first.T
        self.layers.size[1] = 0

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
        observed = Observed.of(observations, masks)
        act_many(addresses(observed), frame, uniform, *packed.words, *self.words, *unit, *out)

    def values(
        self, observations: NDArray[np.float32], masks: NDArray[np.bool_], unit: tuple[float, float]
    ) -> NDArray[np.float32]:
        """Values (n,) of decisions, with the weights as they are now."""
        self.refresh()
        self._probe.clear()
        values = np.zeros(len(observations), np.float32)
        observed = Observed.of(observations, masks)
        values_of(addresses(observed), *self._probe.words, *self.words, *unit, values)
        return values

    # -- backwards

    def differentiate(self, packed: Packed, samples: Samples, order: NDArray[np.int64], goal: Objective) -> Losses:
        """Gradient of ``goal`` over the minibatch ``order`` (decisions of ``packed``) into the parameters' ``grad``."""
        self.refresh()
        sums = self._sums
        for array in sums:
            array.fill(0.0)
        store = packed.store
        order = order[np.argsort(store.first[order])]  # in the order of memory
        width, (weights, _), known = sums.head.shape[0], self.words, packed.words[1]
        learn(order, width, known, addresses(samples), weights, Goal(**vars(goal)), *self._learning)
        self._hand_over(store.columns[: store.n_columns[0]], goal.actor)
        return Losses(*(sums.losses / len(order)).tolist())

    def _hand_over(self, columns: NDArray[np.int64], actor: bool) -> None:
        """The sums as the parameters' gradients."""
        gradients, sums, n = {k: v.numpy() for k, v in self._gradients.items()}, self._sums, self.network.hidden
        width = sums.head.shape[0]
        gradients["context.weight"][:], gradients["context.bias"][:] = sums.context[:, :n].T, sums.context_bias[0, :n]
        gradients["candidate.weight"].fill(0.0)
        gradients["candidate.weight"][:, columns] = sums.row[: len(columns), :n].T
        gradients["head.weight"][:] = sums.head[:n, :n].T
        for name, at in (("pool", 0), ("value.0", width)):
            gradients[f"{name}.weight"][:, :n] = sums.first[:n, at : at + n].T
            gradients[f"{name}.weight"][:, n:] = sums.first[width : width + n, at : at + n].T
            gradients[f"{name}.bias"][:] = sums.first_bias[0, at : at + n]
        gradients["out.weight"][0], gradients["value.2.weight"][0] = sums.out[0, :n], sums.value_out[0, :n]
        gradients["log_scale"][0], gradients["value.2.bias"][0] = sums.scalars
        for name, parameter in self._named.items():
            fitted = actor or name.split(".")[0] in _CRITIC
            parameter.grad = self._gradients[name] if fitted else None  # None: the optimiser leaves it alone


def _weights(width: int) -> Weights:
    w, f4 = width, np.float32
    return Weights(
        context=np.zeros((N_CONTEXT_FEATURES, w), f4), context_bias=np.zeros((1, w), f4),
        row=np.zeros((N_FEATURES, w), f4), live=np.zeros((N_FEATURES, w), f4), head=np.zeros((w, w), f4),
        first=np.zeros((2 * w, 2 * w), f4), first_bias=np.zeros((1, 2 * w), f4), out=np.zeros((1, w), f4),
        value_out=np.zeros((1, w), f4), value_bias=np.zeros(1, f4), scale=np.zeros(1, f4),
        head_back=np.zeros((w, w), f4), first_back=np.zeros((2 * w, 2 * w), f4),
    )  # fmt: skip


def _layers(width: int, n_candidates: int) -> Layers:
    rows, f4 = n_candidates + ROWS, np.float32
    return Layers(
        base=np.zeros((1, width), f4), encoded=np.zeros((rows, width), f4), mixed=np.zeros((rows, width), f4),
        pooled=np.zeros((1, 2 * width), f4), hidden=np.zeros((1, 2 * width), f4), logits=np.zeros(n_candidates),
        chances=np.zeros(n_candidates), x=np.zeros((rows, N_FEATURES), f4), size=np.array([width, 0]),
    )  # fmt: skip


def _chunk(width: int, n_candidates: int) -> Chunk:
    d, rows, f4, i8 = CHUNK + ROWS, CHUNK_ROWS + n_candidates + ROWS, np.float32, np.int64
    return Chunk(
        start=np.zeros(d, i8), frame=np.zeros(d, i8), chosen=np.zeros(d, i8), row=np.zeros(rows, i8),
        context=np.zeros((d, N_CONTEXT_FEATURES), f4), cost=np.zeros(rows, f4), advised=np.zeros(rows, f4),
        base=np.zeros((d, width), f4), encoded=np.zeros((rows, width), f4), mixed=np.zeros((rows, width), f4),
        by_encoded=np.zeros((rows, width), f4), pooled=np.zeros((d, 2 * width), f4),
        by_pooled=np.zeros((d, 2 * width), f4), hidden=np.zeros((d, 2 * width), f4), logits=np.zeros(n_candidates),
        chances=np.zeros(n_candidates),
    )  # fmt: skip


def _sums(width: int) -> Sums:
    w, f4 = width, np.float32
    return Sums(
        context=np.zeros((N_CONTEXT_FEATURES, w), f4), context_bias=np.zeros((1, w), f4),
        row=np.zeros((N_FEATURES + ROWS, w), f4), head=np.zeros((w, w), f4), first=np.zeros((2 * w, 2 * w), f4),
        first_bias=np.zeros((1, 2 * w), f4), out=np.zeros((1, w), f4), value_out=np.zeros((1, w), f4),
        scalars=np.zeros(2), losses=np.zeros(5),
    )  # fmt: skip
