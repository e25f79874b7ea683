"""How every kernel of the core is compiled, and where the machine code is kept.

Numba's on-disk cache only looks at the file of the function itself: a kernel that calls a changed
helper in another file would be served stale. All kernels therefore share one cache folder whose name
is a hash of every kernel source, so an upgrade starts a fresh folder and can never run old code.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import njit

__all__ = ["CACHE_DIR", "is_warm", "kernel"]

_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = ("engine/core", "engine/latency", "env", "policies", "train/kernels")


def _source_hash() -> str:
    digest = hashlib.sha256(f"{numba.__version__}".encode())
    for folder in _SOURCES:
        for path in sorted((_ROOT / folder).glob("*.py")):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _cache_dir() -> Path:
    override = os.environ.get("SLALOM_CACHE_DIR") or os.environ.get("NUMBA_CACHE_DIR")
    if override:
        return Path(override) / _source_hash()
    base = Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")))
    folder = base / "slalom" / _source_hash()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"slalom-cache-{os.getuid()}" / _source_hash()
        folder.mkdir(parents=True, exist_ok=True)
    return folder


CACHE_DIR = _cache_dir()
setattr(numba.config, "CACHE_DIR", str(CACHE_DIR))  # noqa: B010  (numba declares it at run time only)


def is_warm() -> bool:
    """Whether this exact version of the kernels was compiled on this machine before."""
    return any(CACHE_DIR.rglob("*.nbi"))


def kernel(signature: Any = None, **options: Any) -> Callable[..., Any]:
    """``numba.njit`` with the settings every kernel shares: cached, GIL released, IEEE arithmetic.

    :param signature: optional eager signature (policies need one, see ``engine.core.decision``);
        used bare (``@kernel``) it compiles lazily.
    """
    settings: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"} | options
    if callable(signature):
        return njit(**settings)(signature)
    return njit(signature, **settings) if signature is not None else njit(**settings)
