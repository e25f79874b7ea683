"""How many Triton kernels this process has compiled: once requests are served it should be none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_compiled = 0
_watching = False


def count() -> int:
    """Kernels compiled so far, read from disk or made anew, since :func:`watch` was called first."""
    return _compiled


def watch() -> None:
    """Count from now on; Triton's own hook, which others may use too, calls us."""
    global _watching
    if _watching:
        return
    from triton import knobs

    before: Callable[..., Any] | None = knobs.runtime.jit_post_compile_hook

    def hook(*arguments: Any, **named: Any) -> Any:
        global _compiled
        _compiled += 1
        return before(*arguments, **named) if before is not None else None

    knobs.runtime.jit_post_compile_hook = hook
    _watching = True
