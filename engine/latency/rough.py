"""What a few timed steps tell of a device: the one least squares for seconds, and the tables that follow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.latency.evaluate import PROFILE, SHARE


def relative_nnls(features: np.ndarray, y: np.ndarray) -> np.ndarray:
    """argmin over x ≥ 0 of Σ((features·x − y)/y)²; columns are scaled, their units differ by 10¹⁰.

    :param features: (points, k); ``y``: (points,), positive
    :return: x, (k,)
    """
    from scipy.optimize import nnls

    weighted = features / y[:, None]
    scale = np.linalg.norm(weighted, axis=0)
    scale[scale == 0.0] = 1.0
    return np.asarray(nnls(weighted / scale, np.ones(len(y)), maxiter=1000)[0] / scale)


def device_tables(
    prefill: Sequence[float], decode: Sequence[float], *, n_layers: int = 1, sms: Sequence[int] = (1,)
) -> tuple[np.ndarray, np.ndarray]:
    """PROFILE (1,) and SHARE (1, M) of a device of which step times alone are known: every share as fast as the whole.

    :param prefill: (a, b, c, d) of the forms in ``evaluate``, seconds; ``decode``: (a, b, c), for batches of any size
    :param sms: of its shares, ascending, the whole device last
    """
    profile, share = np.zeros(1, PROFILE), np.zeros((1, len(sms)), SHARE)
    profile["n_layers"], profile["n_shares"], profile["total_sms"] = n_layers, len(sms), sms[-1]
    profile["regime_bs"] = 2**30
    share["sms"], share["prefill"] = sms, prefill
    share["decode_small"] = share["decode_large"] = decode
    share["corun_prefill"] = share["corun_decode"] = share["guard"] = 1.0
    return profile, share
