"""Compiled entries of the surrogate: one signature each, from disk when warm, and policies as plain addresses."""

from __future__ import annotations

from typing import Any

import numba

from engine.core.policy import POLICY_SIGNATURE, POLICY_TYPE
from engine.jit.kernel import is_compiled, is_warm, once
from engine.jit.warm import cores, told, warm
from env.surrogate.parts import PARTS


@once
def compiled(kernel: Any, *signature: Any) -> Any:
    """``kernel`` compiled for one signature: from disk when warm, else audibly and with its parts side by side."""
    if is_compiled(kernel, signature):
        kernel.compile(signature)
    else:
        with told("compiling the scheduling core for this machine, once"):
            if cores() > 1 and not is_warm("engine.core.schedule.batching"):
                warm([PARTS])
            kernel.compile(signature)
    kernel.disable_compile()
    return kernel


class FirstClass:
    """A compiled ``decide`` as a plain function address, so that a driver takes it without a look-up per call."""

    _numba_type_ = POLICY_TYPE

    def __init__(self, decide: Any) -> None:
        result = decide.get_compile_result(POLICY_SIGNATURE)
        self._decide = decide  # keeps the machine code alive
        self._address = result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name)

    def __wrapper_address__(self) -> int:
        return int(self._address)


WORDS = numba.int64[::1]


POLICY_ARGS = (numba.float64[::1], numba.float64[:, ::1], numba.uint8[::1], POLICY_TYPE, numba.float64[::1])
