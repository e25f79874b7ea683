"""A scoring policy that follows a published rule and learns where not to.

    answer = argmax_k  logit_k + bonus[kind] · [k is the rule's answer]

``logit`` is that of ``policies.network.compiled``. With a bonus above every difference of logits the policy *is* the
rule, so a search that starts there never has to lose; with 0 the rule is not heard. The rule is any of this
package, called as compiled code through its address; it hears of every decision, as its memory expects.

``params``: address of the rule's code (its bits as a float64), number of its params and of its memory cells, a
bonus per kind; then the rule's params, then those of ``policies.network.compiled``. ``memory``: the rule's, then
scratch.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic

from engine.core.columns import Kind
from engine.core.policy import POLICY_SIGNATURE, POLICY_TYPE
from engine.jit.kernel import kernel
from policies.common import hold, kind_of
from policies.network import compiled
from policies.rule import BoundPolicy

_ADDRESS, _PARAMS, _MEMORY, _BONUS = 0, 1, 2, 3
_HEADER = _BONUS + len(Kind)
#: Compiled rules whose addresses are in use: machine code must not be freed under a running policy.
_ALIVE: dict[int, Any] = {}


@intrinsic
def _policy_at(typingctx: Any, bits: Any) -> Any:
    """The policy whose compiled code stands at the address with these float64 bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = context.get_value_type(types.voidptr)
        word = builder.bitcast(args[0], context.get_value_type(types.int64))
        function = cgutils.create_struct_proxy(POLICY_TYPE)(context, builder)
        function.c_addr = builder.inttoptr(word, pointer)
        for unused in ("py_addr", "jit_addr"):
            setattr(function, unused, cgutils.get_null_value(pointer))
        return function._getvalue()

    return POLICY_TYPE(types.float64), codegen


def _address(decide: Any) -> float:
    result = decide.get_compile_result(POLICY_SIGNATURE)
    address = int(result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name))
    _ALIVE[address] = decide
    return ctypes.c_double.from_buffer(ctypes.c_int64(address)).value


def pack(rule: BoundPolicy, bonus: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The ``params`` array, valid in this process only.

    :param bonus: (4,), logits added to the rule's answer per kind
    :param scores: of :func:`policies.network.compiled.pack`
    """
    header = [_address(rule.decide), len(rule.params), len(rule.memory), *bonus]
    return np.concatenate([np.array(header, np.float64), rule.params, scores])


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """Row of the largest logit, bonus included; ties to the lowest row."""
    n_params, n_memory = int(params[_PARAMS]), int(params[_MEMORY])
    rule = _policy_at(params[_ADDRESS])
    ours = _HEADER + n_params
    advice = rule(context, candidates, mask, params[_HEADER:ours], memory[:n_memory])
    scores = compiled.logits(context, candidates, mask, params[ours:], memory[n_memory:])
    best, most = -1, -np.inf
    for k in range(scores.shape[0]):
        score = scores[k]
        if k == advice:
            score += params[_BONUS + kind_of(context)]
        if score > most:
            best, most = k, score
    return best if best >= 0 else hold(candidates, mask)
