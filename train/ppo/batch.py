"""What one pass of PPO learns from: a minibatch of tensors, or the columns of a whole rollout."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch as th
from numpy.typing import NDArray

__all__ = ["Batch", "Samples"]


class Batch(NamedTuple):
    """A minibatch of B frames."""

    observations: th.Tensor
    masks: th.Tensor
    actions: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor


class Samples(NamedTuple):
    """What PPO knows of every decision of a rollout, each (frames,)."""

    actions: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    advantages: NDArray[np.float32]
    returns: NDArray[np.float32]
