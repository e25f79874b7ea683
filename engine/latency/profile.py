"""The latency profile: one JSON file per (model, device, tensor parallelism, engine), checked on the way in.

A file holds one row per SM share, ascending in ``sms``, the last one the whole device. Every time is in
seconds; every key says its unit. The forms are those of :mod:`engine.latency.evaluate`. A profile that is
faster than its device can be (see :class:`Roofline`) is refused: such a fit is an error of measurement or
of extrapolation, and a policy trained on it learns to believe in a machine that does not exist.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.common.documents import bad_input, json_of, read_text
from engine.common.files import write_text
from engine.common.names import Name
from engine.errors import SlalomError, no_such
from engine.jit.sources import ROOT
from engine.latency import evaluate
from engine.latency.evaluate import MAX_KNOTS, PROFILE, SHARE

#: Published constants are rounded; a measured time this much below the roofline is still believed.
ROOFLINE_TOLERANCE = 0.01
#: Held-out error above which a profile is no ground to learn or decide on.
POOR_FIT = 0.10
_LONGEST_STEP_S = 3600.0

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Pause = Annotated[float, Field(ge=0, le=3600)]
Count = Annotated[int, Field(gt=0, lt=2**31)]
Slowdown = Annotated[float, Field(ge=1, le=20, allow_inf_nan=False)]


class Strict(BaseModel):
    """Unknown keys and silent conversions are errors; objects do not change after validation."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Provenance(Strict):
    """Where the numbers come from.

    :param source: publication or program the numbers were taken from
    :param url: where it can be found
    :param commit: version of it
    :param licence: under which the numbers were published
    :param notes: what was read, what was derived, what was inferred
    """

    source: str
    url: str = ""
    commit: str = ""
    licence: str = ""
    notes: str = ""


class Roofline(Strict):
    """What the device cannot beat.

    :param peak_flops: dense FLOP/s of one device at the serving precision
    :param memory_bytes_per_s: memory bandwidth of one device
    :param params: parameters multiplied with every prompt token (embedding and output head excluded)
    :param weight_bytes: bytes of weights read by every decode step, over all devices of the instance
    """

    peak_flops: Positive
    memory_bytes_per_s: Positive
    params: Positive
    weight_bytes: Positive


class FitError(Strict):
    """Mean absolute relative error on points the fit has not seen.

    :param prefill_mape: fraction, e.g. 0.02
    :param decode_mape: fraction
    :param n_prefill: measured points, held-out ones included
    :param n_decode: the same for decode
    """

    prefill_mape: NonNegative
    decode_mape: NonNegative
    n_prefill: Count
    n_decode: Count


class Share(Strict):
    """Coefficients of one SM share, seconds.

    :param sms: streaming multiprocessors (or cores) of the share
    :param prefill_s: a, b, c, d of a·Σn² + b·Σn·r + c·Σn + d
    :param knot_tokens: Σn at the knots of a piecewise-linear curve used instead of c·Σn + d
    :param knot_s: seconds at the knots
    :param decode_small_s: a, b, c of a·Σctx + b·bs + c
    :param decode_large_s: the same from ``regime_bs`` sequences on; None: as ``decode_small_s``
    :param fused_shared_s: saved when prefill and decode share one step (weights are read once)
    :param corun_prefill: slow-down of prefill here while decode runs on the other SMs
    :param corun_decode: slow-down of decode here while prefill runs on the other SMs
    :param guard: worst slow-down of decode that a predictor assumes (MuxWise section 4)
    """

    sms: Count
    prefill_s: tuple[Finite, NonNegative, NonNegative, Finite]
    knot_tokens: Annotated[tuple[NonNegative, ...], Field(max_length=MAX_KNOTS)] = ()
    knot_s: Annotated[tuple[NonNegative, ...], Field(max_length=MAX_KNOTS)] = ()
    decode_small_s: tuple[NonNegative, NonNegative, NonNegative]
    decode_large_s: tuple[NonNegative, NonNegative, NonNegative] | None = None
    fused_shared_s: NonNegative = 0.0
    corun_prefill: Slowdown = 1.0
    corun_decode: Slowdown = 1.0
    guard: Slowdown = 1.0

    @model_validator(mode="after")
    def _check_knots(self) -> Share:
        if len(self.knot_tokens) != len(self.knot_s):
            raise ValueError("knot_tokens and knot_s must have the same length")
        if len(self.knot_tokens) == 1:
            raise ValueError("a piecewise-linear prefill needs two knots or more")
        if any(b <= a for a, b in pairwise(self.knot_tokens)):
            raise ValueError("knot_tokens must ascend")
        if any(b < a for a, b in pairwise(self.knot_s)):
            raise ValueError("knot_s must not descend: more tokens never take less time")
        return self


class Profile(Strict):
    """A latency profile, see the module docstring.

    :param format: version of this file format
    :param name: file name without ``.json``
    :param model: model served
    :param device: device served on
    :param tp: devices of one instance (tensor parallelism)
    :param engine: engine that was measured
    :param provenance: source of the numbers
    :param n_layers: layers of the model (layer-sliced prefill launches groups of them)
    :param total_sms: SMs of one device
    :param max_prompt_tokens: longest prompt the numbers are trusted for
    :param kv_tokens: KV capacity of one instance
    :param kv_bytes_per_token: over all devices of the instance
    :param shares: rows, ascending in SMs, the last one the whole device
    :param regime_bs: decode batches of at least this size use ``decode_large_s``
    :param prefill_min_tokens: Σn is floored here
    :param step_overhead_s: host time added to every step; this and the other pauses are at most an hour
    :param ctx_overhead_s: host time per context token and decode step
    :param migrate_latency_s: fixed part of one KV transfer
    :param switch_s: pause of a role change, after its drain
    :param switch_full: a role change drains everything and loses the prefix cache
    :param roofline: what the device cannot beat
    :param fit: held-out error, where the source states one or the fit is ours
    :param fidelity: measured agreement of surrogate and engine, filled in by calibration
    """

    format: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    model: Name
    device: Name
    tp: Count = 1
    engine: Name
    provenance: Provenance
    n_layers: Count
    total_sms: Count
    max_prompt_tokens: Count
    kv_tokens: Count
    kv_bytes_per_token: Positive
    shares: Annotated[tuple[Share, ...], Field(min_length=1)]
    regime_bs: Count = 2**30
    prefill_min_tokens: Annotated[int, Field(ge=0)] = 0
    step_overhead_s: Pause = 0.0
    ctx_overhead_s: Pause = 0.0
    migrate_latency_s: Pause = 1e-3
    switch_s: Pause = 0.0
    switch_full: bool = False
    roofline: Roofline
    fit: FitError | None = None
    fidelity: dict[str, float | int | str] | None = None

    @property
    def is_poor(self) -> bool:
        """Whether the fit misses what it has not seen by more than :data:`POOR_FIT`: decisions by it are guesses."""
        return self.fit is not None and max(self.fit.prefill_mape, self.fit.decode_mape) > POOR_FIT

    @model_validator(mode="after")
    def _check(self) -> Profile:
        sms = [share.sms for share in self.shares]
        if any(b <= a for a, b in pairwise(sms)):
            raise ValueError("shares must ascend in sms")
        if sms[-1] != self.total_sms:
            raise ValueError(f"the last share must be the whole device ({self.total_sms} SMs)")
        for fault in chain(_range_faults(self), _roofline_faults(self)):
            raise ValueError(fault)
        return self

    # -- files -----------------------------------------------------------------------------------------

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str]) -> Profile:
        """Read a profile by the name of a shipped one or by path.

        :raises SlalomError: no such profile, or its content is refused
        """
        path = Path(name_or_path)
        if path.suffix != ".json":
            path = profiles_dir() / f"{name_or_path}.json"
            if not os.path.isfile(path):
                raise no_such("profile", str(name_or_path), list_profiles(), "a file that ends in .json")
        text = read_text(path, "profile")
        json_of(text, path.name, constants=True)  # the fields say which may be infinite
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise bad_input(path.name, error) from error

    def to_json(self) -> str:
        """The file's content; coefficients keep full precision."""
        return self.model_dump_json(indent=2) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file, see :func:`engine.common.files.write_bytes`."""
        target = Path(path)
        write_text(target, self.to_json())
        return target

    # -- evaluation ------------------------------------------------------------------------------------

    def row(self, sms: int | None = None) -> int:
        """Index of the share row with ``sms`` SMs (None: the whole device)."""
        if sms is None:
            return len(self.shares) - 1
        known = [share.sms for share in self.shares]
        if sms not in known:
            raise SlalomError(f"{self.name}: sms", sms, f"use one of {known}")
        return known.index(sms)

    def prefill_s(self, n: int, r: int = 0, sms: int | None = None) -> float:
        """Seconds to prefill one prompt of ``n`` new tokens behind ``r`` cached ones on ``sms`` SMs."""
        profile, share = pack([self])
        return float(evaluate.prefill_s(profile[0], share[0, self.row(sms)], n * n, n * r, n))

    def decode_s(self, sum_ctx: int, bs: int, sms: int | None = None) -> float:
        """Seconds of a decode step of ``bs`` sequences with ``sum_ctx`` context tokens, overhead included."""
        profile, share = pack([self])
        return float(evaluate.decode_s(profile[0], share[0, self.row(sms)], sum_ctx, bs))

    def floor_s_per_token(self, sms: int) -> float:
        """Least seconds per prompt token on ``sms`` SMs: 2·params FLOPs at the share's part of the peak."""
        share_of_peak = self.roofline.peak_flops * self.tp * sms / self.total_sms
        return 2.0 * self.roofline.params / share_of_peak

    def decode_floor_s(self, sum_ctx: int) -> float:
        """Least seconds of a decode step: weights and context KV read once at full bandwidth."""
        read = self.roofline.weight_bytes + sum_ctx * self.kv_bytes_per_token
        return read / (self.roofline.memory_bytes_per_s * self.tp)


def _range_faults(profile: Profile) -> Iterator[str]:
    """Sentences about steps that take longer than any real one: their sums must fit 64 bits of picoseconds."""
    for share in profile.shares:
        prefill = _prefill_curve(profile, share, np.array([profile.max_prompt_tokens]))[0] * share.corun_prefill
        a, b, c = np.maximum(share.decode_small_s, share.decode_large_s or share.decode_small_s)
        decode = (a * profile.kv_tokens + b * 512 + c) * share.corun_decode + profile.ctx_overhead_s * profile.kv_tokens
        for what, seconds in (
            (f"prefill of {profile.max_prompt_tokens} tokens", prefill),
            (f"a decode step of 512 sequences and {profile.kv_tokens} context tokens", decode),
        ):
            if not seconds <= _LONGEST_STEP_S:
                yield f"{what} on {share.sms} SMs takes {seconds:.3g} s; no step may take more than an hour"


def _roofline_faults(profile: Profile) -> Iterator[str]:
    """Sentences about every place where ``profile`` is faster than its device can be."""
    believed = 1.0 - ROOFLINE_TOLERANCE
    tokens = np.unique(np.geomspace(1, profile.max_prompt_tokens, 33).astype(np.int64))
    batches = sorted({1, 64, 256, profile.regime_bs - 1, profile.regime_bs} & set(range(1, 513)))
    for share in profile.shares:
        seconds = _prefill_curve(profile, share, tokens)
        floor = profile.floor_s_per_token(share.sms) * tokens
        for n in tokens[seconds < believed * floor]:
            yield (
                f"prefill of {n} tokens on {share.sms} SMs takes less than the roofline allows "
                f"({2 * profile.roofline.params * n:.3g} FLOPs); check tp, roofline and the coefficients"
            )
        for bs in batches:
            large = bs >= profile.regime_bs and share.decode_large_s is not None
            a, b, c = share.decode_large_s if large and share.decode_large_s else share.decode_small_s
            for ctx in (bs, profile.kv_tokens):
                if a * ctx + b * bs + c < believed * profile.decode_floor_s(ctx):
                    yield (
                        f"a decode step of {bs} sequences and {ctx} context tokens on {share.sms} SMs is "
                        "shorter than reading weights and KV takes; check tp, roofline and the coefficients"
                    )


def _prefill_curve(profile: Profile, share: Share, tokens: np.ndarray) -> np.ndarray:
    """Seconds of single prompts without the floor; shape of ``tokens``."""
    n = np.maximum(tokens, profile.prefill_min_tokens).astype(float)
    a, _, c, d = share.prefill_s
    if not share.knot_tokens:
        return a * tokens.astype(float) ** 2 + c * n + d
    x, y = np.asarray(share.knot_tokens), np.asarray(share.knot_s)
    i = np.clip(np.searchsorted(x, n), 1, len(x) - 1)
    linear = y[i - 1] + (n - x[i - 1]) * (y[i] - y[i - 1]) / (x[i] - x[i - 1])
    return a * tokens.astype(float) ** 2 + linear


def profiles_dir() -> Path:
    """Folder of the shipped profiles."""
    return ROOT / "checkpoints" / "profiles"


def list_profiles() -> list[str]:
    """Names of the shipped profiles, sorted."""
    return sorted(path.stem for path in profiles_dir().glob("*.json"))


def pack(profiles: Sequence[Profile], *, of_others: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Profiles as the tables the compiled core reads.

    :param of_others: of engines in front of which Slalom only routes: a role is what they are used for, so that beside
        the drain its change costs nothing
    :return: ``PROFILE`` of shape (n,) and ``SHARE`` of shape (n, M) with M the most share rows of any
        profile; unused rows repeat the last one, so that reading one too many is still the whole device
    """
    if not profiles:
        raise SlalomError("profiles", [], "give at least one profile")
    rows = max(len(profile.shares) for profile in profiles)
    heads = np.zeros(len(profiles), PROFILE)
    shares = np.zeros((len(profiles), rows), SHARE)
    for i, profile in enumerate(profiles):
        head = heads[i]
        for field in PROFILE.names or ():
            head[field] = len(profile.shares) if field == "n_shares" else getattr(profile, field)
        for j in range(rows):
            _pack_share(profile, profile.shares[min(j, len(profile.shares) - 1)], shares[i, j])
    if of_others:
        heads["switch_s"], heads["switch_full"] = 0.0, 0
    return heads, shares


def _pack_share(profile: Profile, share: Share, out: np.void) -> None:
    out["sms"] = share.sms
    out["n_knots"] = len(share.knot_tokens)
    out["prefill"] = share.prefill_s
    out["knot_tokens"][: len(share.knot_tokens)] = share.knot_tokens
    out["knot_s"][: len(share.knot_s)] = share.knot_s
    out["floor_s_per_token"] = profile.floor_s_per_token(share.sms)
    out["decode_small"] = share.decode_small_s
    out["decode_large"] = share.decode_large_s or share.decode_small_s
    for field in ("fused_shared_s", "corun_prefill", "corun_decode", "guard"):
        out[field] = getattr(share, field)
