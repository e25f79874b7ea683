"""First contact: every call that has never met a GPU, once, the smallest first; under half a minute in all."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engine.lanes.base import Lane
from engine.lanes.gpu import GpuDevice
from eval.gpu_check.report import Cases
from eval.gpu_check.rig import Rig

_PROGRAMS = 2048  # several for every SM
_WRONG = 2e-2  # relative error of a bf16 product that is none


@triton.jit
def smid_kernel(out_ptr, SPIN: tl.constexpr):
    """Grid: (programs,). Each writes the number of the SM that it runs on, after so many steps of keeping it busy."""
    where = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    x = tl.program_id(0).to(tl.float32)
    for _ in range(SPIN):
        x = x * 1.0000001 + 1e-7
    tl.store(out_ptr + tl.program_id(0), tl.where(x > -1.0, where, -1))


def _launch(rig: Rig, out: Tensor) -> Tensor:
    """Fill ``out`` with SM numbers; dry, with 0: an interpreter has no SMs and no assembly."""
    if rig.dry:
        return out.zero_()
    smid_kernel[(_PROGRAMS,)](out, SPIN=20_000)
    return out


def _met(rig: Rig, lane: Lane | None, launch: Callable[[Tensor], Any], out: Tensor) -> set[int]:
    """SMs that ``launch`` ran on, from ``lane`` or the default stream."""
    out.fill_(-1)
    rig.sync()
    if lane is None:
        launch(out)
    else:
        with lane.open():
            launch(out)
        lane.wait()
    rig.sync()
    return set(out.tolist())


def lanes_are_disjoint(rig: Rig, cases: Cases) -> dict[str, Any]:
    """SM numbers seen on both lanes of each cut: as many as the lane has, and none on both."""
    out = torch.zeros(_PROGRAMS, dtype=torch.int32, device=rig.device)

    def one(cut: int) -> dict[str, Any]:
        pair = rig.gpu.split(cut)
        prefill, decode = (_met(rig, lane, partial(_launch, rig), out) for lane in pair)
        found = {"prefill_sms": pair.prefill.size, "decode_sms": pair.decode.size, "prefill_seen": len(prefill),
                 "decode_seen": len(decode), "on_both": len(prefill & decode)}  # fmt: skip
        if not rig.dry and (prefill & decode or len(decode) > cut):
            raise AssertionError(f"lanes are not disjoint: {found}")
        return found

    for cut in rig.sizes.cuts:
        cases.take({"cut": cut}, partial(one, cut))
    return {}


def products_on_lanes(rig: Rig, cases: Cases) -> dict[str, Any]:
    """Relative error of products on every lane: libraries choose their kernels, clusters too, by the device's SMs."""
    n = 64 if rig.dry else 4096
    w = rig.noise(n, n)

    def one(cut: int, l: int, rows: int) -> dict[str, Any]:
        lane, x = rig.gpu.split(cut)[l], rig.noise(rows, n, seed=rows)
        rig.sync()
        with lane.open():
            y = F.linear(x, w)
        lane.wait()
        expected = x.double() @ w.double().t()
        error = float((y.double() - expected).norm() / expected.norm())
        if not error < _WRONG:
            raise AssertionError(f"relative error {error:.2g}")
        return {"sms": lane.size, "relative_error": error}

    for cut in rig.sizes.cuts[:2]:
        for l in (0, 1):
            for rows in (1, 2) if rig.dry else (1, 32, 512, 4096):
                cases.take({"cut": cut, "lane": l, "rows": rows}, partial(one, cut, l, rows))
    return {}


def graph_stays_on_its_sms(rig: Rig, cases: Cases) -> dict[str, Any]:
    """SM numbers of a graph by the lane it was captured on and where it is replayed: those of the capture."""
    small, whole = rig.gpu.split(rig.sizes.cuts[0]).decode, rig.gpu.whole().decode
    out = torch.zeros(_PROGRAMS, dtype=torch.int32, device=rig.device)
    kept = []
    for name, lane in (("small", small), ("whole", whole)):
        replay, _ = rig.capturer().capture(lane, partial(_launch, rig, out))
        kept.append(replay)
        for on, where in (("small", small), ("whole", whole), ("default stream", None)):

            def one(replay: Callable[[], None] = replay, where: Lane | None = where, most: int = lane.size) -> Any:
                seen = len(_met(rig, where, lambda out: replay(), out))
                if seen > most:
                    raise AssertionError(f"ran on {seen} SMs, captured on {most}")
                return {"sms": seen}

            cases.take({"captured": name, "replayed": on}, one)
    kept.clear()
    return {"small_sms": small.size}


def close_and_reopen(rig: Rig, cases: Cases) -> dict[str, Any]:
    """Partitions are given back, and can be had again."""
    first = GpuDevice(rig.driver, rig.streams)
    first.split(rig.sizes.cuts[0])
    first.close()
    gc.collect()
    second = GpuDevice(rig.driver, rig.streams)
    lane = second.split(rig.sizes.cuts[0]).decode
    x = torch.ones(1 << 16, device=rig.device)
    rig.sync()
    with lane.open():
        y = (x + 1).sum()
    lane.wait()
    second.close()
    if float(y) != 2.0 * (1 << 16):
        raise AssertionError(f"a sum on the second device is {float(y)}")
    return {"sms": lane.size}
