"""Kernels that only kernels can call are parts of them: linked in as bitcode, never machine code of their own.

Numba optimises every function together with all that it calls and makes machine code of it, at each level of a stack
of calls anew, and once for each combination of argument types: ``f(s, 0)``, ``f(s, 1)`` and ``f(s, i)`` are three
functions to it. The scheduling core is ten calls deep, so most of its compilation was work done again. Here

- integers between kernels are int64, whatever literal or width the caller holds;
- a kernel that takes state (``engine.jit.rows``), which Python cannot pass, is only translated. What is entered from
  Python is optimised with all of its parts, once.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding
from numba import types
from numba.core import compiler
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompileResult
from numba.core.dispatcher import _FunctionCompiler

from engine.jit.rows import RowsType, StateType

#: How a part's library calls itself on disk.
PART = "part"


class _Nowhere:
    """Where the environments of a part are bound: nowhere, it has no address; its entry binds them."""

    def set_env(self, name: str, environment: Any) -> None:
        pass


class _Part(JITCodeLibrary):
    """The bitcode of a part and of its own parts."""

    @property
    def codegen(self) -> Any:
        return _Nowhere()

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0

    def serialize_using_object_code(self) -> tuple[str, str, bytes]:
        return self.name, PART, self._get_module_for_linking().as_bitcode()


def rebuilt(context: Any, payload: Any) -> Any:
    """The part that was saved as ``payload``."""
    (name, _, bitcode), fndesc, environment, signature, objectmode, lifted, annotation, reload, environments = payload
    for again in reload:
        again()
    library = _Part(context.codegen(), name)
    library._final_module = binding.parse_bitcode(bitcode)
    library._finalize_final_module()
    return CompileResult(
        target_context=context, typing_context=context.typing_context, library=library, environment=environment,
        entry_point=context.get_executable(library, fndesc, environment), fndesc=fndesc, type_annotation=annotation,
        signature=signature, objectmode=objectmode, lifted=lifted, typing_error=None, call_helper=None,
        metadata=None, reload_init=reload, referenced_envs=environments,
    )  # fmt: skip


def _plain(argument: Any) -> Any:
    """The type by which a kernel takes ``argument`` from another."""
    found = types.unliteral(argument)
    return types.int64 if isinstance(found, types.Integer) and found.signed else found


class Compiler(_FunctionCompiler):
    """Compiles a kernel as an entry or as a part, by its arguments."""

    def fold_argument_types(self, args: Any, kws: Any) -> Any:
        signature, found = super().fold_argument_types(args, kws)
        return signature, tuple(map(_plain, found))

    def _compile_core(self, args: Any, return_type: Any) -> Any:
        if not any(isinstance(argument, RowsType | StateType) for argument in args):
            entry = super()._compile_core(args, return_type)
            for environment in entry._find_referenced_environments():  # also of its parts
                entry.codegen.set_env(environment.env_name, environment)
            return entry
        flags, context = compiler.Flags(), self.targetdescr.target_context
        self.targetdescr.options.parse_as_flags(flags, self.targetoptions)
        flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        return compiler.compile_extra(
            self.targetdescr.typing_context, context, self.py_func, args=args, return_type=return_type, flags=flags,
            locals=self.locals, library=_Part(context.codegen(), self.py_func.__qualname__),
            pipeline_class=self.pipeline_class,
        )  # fmt: skip
