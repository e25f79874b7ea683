"""The device: what there is, what splits give, how fast it copies and multiplies."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch

from engine.errors import SlalomError
from eval.gpu_check.report import Cases
from eval.gpu_check.rig import Rig


def versions(rig: Rig, cases: Cases) -> dict[str, Any]:
    """Packages, driver and device by name."""
    found: dict[str, Any] = {}
    for package in ("torch", "triton", "cuda-bindings", "numpy", "numba", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if not rig.dry:
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "multiprocessors": properties.multi_processor_count,
                  "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}  # fmt: skip
    return found


def sm_resource(rig: Rig, cases: Cases) -> dict[str, Any]:
    """SMs that can be partitioned, the fewest of a part, their alignment."""
    whole = rig.driver.sms()
    return {"sms": whole.sms, "least": whole.least, "alignment": whole.alignment}


def all_splits(rig: Rig, cases: Cases) -> dict[str, Any]:
    """What the driver makes of a group of n SMs: (asked, group, remainder)."""
    whole, refused = rig.driver.sms(), {}
    for asked in rig.sizes.decode_sms:
        try:
            group, rest = rig.driver.split(whole, asked)
        except SlalomError as error:  # an answer, not a failure
            refused[str(asked)] = str(error)
        else:
            cases.rows.append({"asked": asked, "group": group.sms, "remainder": rest.sms})
    return {"refused": refused}


def ceilings(rig: Rig, cases: Cases | None = None) -> dict[str, Any]:
    """Bytes per second of a large copy (read and written), FLOP per second of a large matrix product."""
    source = torch.empty(rig.sizes.copy_bytes, dtype=torch.uint8, device=rig.device)
    target = torch.empty_like(source)
    copy_ms = rig.ms(lambda: target.copy_(source))
    n = rig.sizes.square
    a, b = rig.noise(n, n), rig.noise(n, n, seed=1)
    product_ms = rig.ms(lambda: a @ b)
    return {"copy_bytes_per_s": 2 * source.numel() / copy_ms * 1e3, "matmul_flop_per_s": 2 * n**3 / product_ms * 1e3}
