"""The network of ``policies.network.scoring`` as one compiled ``decide`` for every checkpoint; needs no torch.

Weights travel in ``params``, so machine code cached on disk can never hold old ones. ``params`` is a header
of float64 cells and float32 weights packed two to a cell; ``memory`` is scratch (float32, likewise), then one
float64 logit per row. Nothing is allocated during a decision.

All matrix work is :func:`_affine`: its inner loop runs over hidden units, contiguous and without a reduction,
four inputs at a time, which the compiler turns into SIMD.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.core.columns import Kind, max_candidates
from engine.core.policy import POLICY_SIGNATURE
from engine.errors import SlalomError
from engine.jit.kernel import kernel
from policies.common import hold
from policies.network.features import N_CONTEXT_FEATURES, N_FEATURES, cut, feature
from policies.network.normalise import Normalisation
from policies.setting import Setting

# header cells
_HIDDEN, _ROWS, _SCALE, _BOUND, _GATED, _RESIDUAL = range(6)
_HEADER = 6
# after the header, float64: scale and log flag per context and candidate feature, the base weights, the gates
_C, _F = N_CONTEXT_FEATURES, N_FEATURES
_CTX_SCALE = _HEADER
_CTX_LOG = _CTX_SCALE + _C
_ROW_SCALE = _CTX_LOG + _C
_ROW_LOG = _ROW_SCALE + _F
_BASE = _ROW_LOG + _F
_GATE = _BASE + len(Kind) * _F  # (kind, context feature, candidate feature)
_WEIGHTS = _GATE + len(Kind) * _C * _F


def weight_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every float32 array of a checkpoint with this width."""
    h = hidden
    return {
        "base": (len(Kind), _F),
        "gate": (len(Kind), _C, _F),
        "bonus": (len(Kind),),
        "log_scale": (1,),
        "context.weight": (h, _C),
        "context.bias": (h,),
        "candidate.weight": (h, _F),
        "pool.weight": (h, 2 * h),
        "pool.bias": (h,),
        "head.weight": (h, h),
        "out.weight": (1, h),
        "value.0.weight": (h, 2 * h),
        "value.0.bias": (h,),
        "value.2.weight": (1, h),
        "value.2.bias": (1,),
    }


#: Order of the float32 block; matrices are stored transposed, (inputs, hidden).
_ORDER = (
    *("context.bias", "context.weight", "candidate.weight"),
    *("pool.bias", "pool.weight", "head.weight", "out.weight"),
)
_PAD = -_F % 4  # zero inputs that make the number of candidate features a multiple of four
_X = _F + _PAD


def memory_cells(hidden: int, rows: int) -> int:
    """Float64 cells that ``decide`` needs for decisions of up to ``rows`` candidates."""
    floats = rows * (_X + 2 * hidden) + _C + 4 * hidden
    return (floats + 1) // 2 + rows + _F


def rows_of(setting: Setting) -> int:
    """Most candidates that one decision of this scenario can have."""
    return max_candidates(setting.n_instances, realloc=Kind.REALLOCATE in setting.kinds)


def pack(arrays: Mapping[str, np.ndarray], normal: Normalisation, rows: int) -> np.ndarray:
    """The ``params`` array of a network.

    :param arrays: float32 weights by name, see :func:`weight_shapes`
    :param rows: most candidates of one decision, see :func:`rows_of`
    """
    hidden = arrays["context.bias"].shape[0]
    blocks = [np.atleast_2d(arrays[name]).T.ravel() for name in _ORDER]
    blocks.insert(3, np.zeros(_PAD * hidden, np.float32))
    flat = np.concatenate(blocks).astype(np.float32)
    return np.concatenate(
        [
            [hidden, rows, float(np.exp(arrays["log_scale"][0])), normal.bound],
            [float(arrays["gate"].any()), float(arrays["out.weight"].any())],
            normal.context_scale,
            normal.context_log.astype(np.float64),
            normal.candidate_scale,
            normal.candidate_log.astype(np.float64),
            arrays["base"].astype(np.float64).ravel(),
            arrays["gate"].astype(np.float64).ravel(),
            flat.view(np.float64),
        ]
    )


@kernel
def _normal(x, scale, log, bound):
    if log != 0.0:
        x = np.log1p(x) if x >= 0.0 else -np.log1p(-x)
    return np.float32(min(max(x / scale, -bound), bound))


@kernel(fastmath={"contract"})
def _affine(x, weights, out):
    """out += x @ weights for x (K, I), weights (I, H), out (K, H); I a multiple of four, all float32."""
    for k in range(x.shape[0]):
        row, xk = out[k], x[k]
        for quarter in range(x.shape[1] // 4):
            i = 4 * quarter
            a, b, c, d = xk[i], xk[i + 1], xk[i + 2], xk[i + 3]
            wa, wb, wc, wd = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
            for h in range(row.shape[0]):
                row[h] += a * wa[h] + b * wb[h] + c * wc[h] + d * wd[h]


@kernel
def _relu(x):
    for k in range(x.shape[0]):
        row = x[k]
        for h in range(row.shape[0]):
            row[h] = max(row[h], np.float32(0.0))


@kernel
def _kind(context):
    """The kind, as the network sees it: position of the largest of the four one-hot columns."""
    best = 0
    for i in range(1, 4):
        if context[i] > context[best]:
            best = i
    return best


@kernel(fastmath={"contract"})
def _weigh(context, params, c, w):
    """Normalised context into ``c`` (1, C); the cost weights of this decision, base + c · gate, into ``w`` (F,)."""
    kind = _kind(context)
    for f in range(_C):
        c[0, f] = _normal(cut(context[f]), params[_CTX_SCALE + f], params[_CTX_LOG + f], params[_BOUND])
    base = _BASE + kind * _F
    w[:] = params[base : base + _F]
    if params[_GATED] == 0.0:
        return
    for i in range(_C):
        by = float(c[0, i])
        if by == 0.0:
            continue
        at = _GATE + (kind * _C + i) * _F
        row = params[at : at + _F]
        for f in range(_F):
            w[f] += by * row[f]


@kernel
def _read(candidates, mask, params, w, x, out):
    """Normalised features, packed without gaps, into ``x`` (allowed, F + pad); costs under the weights ``w``, as
    logits, into ``out``. Returns how many rows are allowed."""
    bound = params[_BOUND]
    n = 0
    for k in range(candidates.shape[0]):
        if mask[k] == 0:
            out[k] = -np.inf
            continue
        row = x[n]
        row[:] = np.float32(0.0)
        cost = 0.0
        for f in range(_F):
            raw = feature(candidates, k, f)
            if raw != 0.0:
                cost += w[f] * raw
                row[f] = _normal(raw, params[_ROW_SCALE + f], params[_ROW_LOG + f], bound)
        out[k] = -params[_SCALE] * cost
        n += 1
    return n


@kernel
def _pool(encoded, pooled):
    """Mean and maximum of ``encoded`` (K, H) into ``pooled`` (1, 2H)."""
    n, hidden = encoded.shape
    mean, most = pooled[0, :hidden], pooled[0, hidden:]
    pooled[:] = np.float32(0.0)
    for k in range(n):
        row = encoded[k]
        for h in range(hidden):
            mean[h] += row[h]
            most[h] = max(most[h], row[h])
    share = np.float32(1.0 / max(n, 1))
    for h in range(hidden):
        mean[h] *= share


@kernel
def _take(flat, start, rows, columns):
    """Rows × columns of a flat array as a view, and where the next block starts."""
    end = start + rows * columns
    return flat[start:end].reshape((rows, columns)), end


@kernel
def logits(context, candidates, mask, params, memory):
    """Logits as a view (K,) of ``memory``; masked rows hold -inf.

    :raises ValueError: more candidates than the policy was bound for
    """
    hidden, capacity, rows = int(params[_HIDDEN]), int(params[_ROWS]), candidates.shape[0]
    if rows > capacity:
        raise ValueError("more candidates than this policy was bound for")
    out = memory[memory.shape[0] - capacity :]
    w = memory[memory.shape[0] - capacity - _F : memory.shape[0] - capacity]

    scratch = memory.view(np.float32)
    x, at = _take(scratch, 0, capacity, _X)
    encoded, at = _take(scratch, at, capacity, hidden)
    mixed, at = _take(scratch, at, capacity, hidden)
    c, at = _take(scratch, at, 1, _C)
    from_context, at = _take(scratch, at, 1, hidden)
    from_pool, at = _take(scratch, at, 1, hidden)
    pooled, at = _take(scratch, at, 1, 2 * hidden)

    weights = params[_WEIGHTS:].view(np.float32)
    context_bias, at = _take(weights, 0, 1, hidden)
    context_weight, at = _take(weights, at, _C, hidden)
    candidate_weight, at = _take(weights, at, _X, hidden)
    pool_bias, at = _take(weights, at, 1, hidden)
    pool_weight, at = _take(weights, at, 2 * hidden, hidden)
    head_weight, at = _take(weights, at, hidden, hidden)
    last, at = _take(weights, at, 1, hidden)

    _weigh(context, params, c, w)
    n = _read(candidates, mask, params, w, x, out)
    if params[_RESIDUAL] == 0.0:
        return out[:rows]
    from_context[:] = context_bias
    _affine(c, context_weight, from_context)
    encoded, mixed = encoded[:n], mixed[:n]
    encoded[:] = from_context
    _affine(x[:n], candidate_weight, encoded)
    _relu(encoded)

    _pool(encoded, pooled)
    from_pool[:] = pool_bias
    _affine(pooled, pool_weight, from_pool)
    mixed[:] = from_pool
    _affine(encoded, head_weight, mixed)
    _relu(mixed)
    _add_residual(mixed, last[0], mask, out)
    return out[:rows]


def score_cells(params: np.ndarray) -> int:
    """How many cells at the end of ``memory`` hold the logits of the last decision, row by row."""
    return int(params[_ROWS])


@kernel(fastmath={"contract", "reassoc"})
def _add_residual(mixed, last, mask, out):
    """out[k] += mixed · last for allowed rows, which ``mixed`` holds without gaps."""
    n = 0
    for k in range(mask.shape[0]):
        if mask[k] != 0:
            row, total = mixed[n], np.float32(0.0)
            for h in range(last.shape[0]):
                total += row[h] * last[h]
            out[k] += total
            n += 1


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """Row of the largest logit, ties to the lowest row."""
    scores = logits(context, candidates, mask, params, memory)
    best, most = -1, -np.inf
    for k in range(scores.shape[0]):
        if scores[k] > most:
            best, most = k, scores[k]
    return best if best >= 0 else hold(candidates, mask)


def check_weights(arrays: Mapping[str, np.ndarray], hidden: int, where: str) -> None:
    """Refuse weights that the kernel cannot run.

    :raises SlalomError: a missing or unknown array, a wrong shape or dtype, a value that is not finite
    """
    shapes = weight_shapes(hidden)
    if set(arrays) != set(shapes):
        raise SlalomError(f"{where}: arrays", sorted(arrays), f"expected {sorted(shapes)}")
    for name, shape in shapes.items():
        array = arrays[name]
        if array.shape != shape or array.dtype != np.float32:
            raise SlalomError(f"{where}: {name}", f"{array.dtype}{array.shape}", f"expected float32{shape}")
        if not np.isfinite(array).all():
            raise SlalomError(f"{where}: {name}", "NaN or infinity", "the training diverged; use an earlier save")
