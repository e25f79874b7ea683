"""Plain pointers to the state arrays, for use inside kernels.

Numba passes an array as seven words and counts a reference at every call; with a state of two dozen arrays that
costs more than the scheduling itself (measured: 30 µs against 1 µs a request). Inside kernels the state is
therefore one pointer to a vector of addresses, and its arrays are ``Rows``: an address and a row length, nothing
to count. Entry points take the vector (``addresses``) and ``attach`` it; the Python caller keeps the arrays alive.

With ``SLALOM_BOUNDS=1`` every access is checked (debugging; used by one pass of the tests).
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic, lower_builtin, models, register_model
from numba.core.imputils import lower_getattr_generic
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, AttributeTemplate, infer_getattr, infer_global
from numba.np.numpy_support import from_dtype

CHECKED = os.environ.get("SLALOM_BOUNDS", "") == "1"
#: int64 words per array in the address vector: address, rows, columns.
WORDS = 3


class RowsType(types.Type):
    """Pointer to a C-contiguous array of ``dtype`` (a record or a scalar) with one or two axes."""

    def __init__(self, dtype: types.Type, ndim: int) -> None:
        self.dtype, self.ndim = dtype, ndim
        super().__init__(name=f"Rows({dtype}, {ndim}d)")


@register_model(RowsType)
class _RowsModel(models.StructModel):
    def __init__(self, manager: Any, fe_type: RowsType) -> None:
        members: list[tuple[str, Any]] = [("data", types.voidptr)]
        if fe_type.ndim == 2 or CHECKED:
            members.append(("columns", types.intp))
        if CHECKED:
            members.append(("rows", types.intp))
        super().__init__(manager, fe_type, members)


def _item_size(context: Any, dtype: types.Type) -> int:
    if isinstance(dtype, types.Record):
        return int(dtype.size)
    return int(context.get_abi_sizeof(context.get_data_type(dtype)))


def _check(context: Any, builder: Any, rows_type: RowsType, bad: Any) -> None:
    fields = list(rows_type.dtype.fields) if isinstance(rows_type.dtype, types.Record) else [rows_type.dtype]
    what = f"index outside a state array of {fields[0]} ({rows_type.ndim} axes)"
    with builder.if_then(bad, likely=False):
        context.call_conv.return_user_exc(builder, IndexError, (what,))


def address(context: Any, builder: Any, rows_type: RowsType, rows: Any, indices: Sequence[Any]) -> Any:
    """LLVM pointer (i8*) to the element at ``indices``."""
    view = cgutils.create_struct_proxy(rows_type)(context, builder, value=rows)
    offset = indices[0]
    if CHECKED:
        _check(context, builder, rows_type, builder.icmp_unsigned(">=", offset, view.rows))
    if len(indices) == 2:
        if CHECKED:
            _check(context, builder, rows_type, builder.icmp_unsigned(">=", indices[1], view.columns))
        offset = builder.add(builder.mul(offset, view.columns), indices[1])
    elif rows_type.ndim == 2:
        offset = builder.mul(offset, view.columns)
    size = ir.Constant(offset.type, _item_size(context, rows_type.dtype))
    return builder.gep(view.data, [builder.mul(offset, size)])


def _indices(builder: Any, index_type: Any, index: Any) -> list[Any]:
    """LLVM integers of an index, which is an integer or a pair of them."""
    count = getattr(index_type, "count", 0)
    return list(cgutils.unpack_tuple(builder, index, count)) if count else [index]


@infer_global(operator.getitem)
class _GetItem(AbstractTemplate):
    """``rows[i]``, ``rows[i, j]``: an element (records by reference), or a row of a two-axis Rows."""

    def generic(self, args: Any, kws: Any) -> Any:
        rows, index = args
        if not isinstance(rows, RowsType):
            return None
        if isinstance(index, types.BaseTuple):
            return signature(rows.dtype, rows, types.UniTuple(types.intp, 2))
        return signature(RowsType(rows.dtype, 1) if rows.ndim == 2 else rows.dtype, rows, types.intp)


@infer_global(operator.setitem)
class _SetItem(AbstractTemplate):
    """``rows[i] = x``, ``rows[i, j] = x`` for Rows of scalars."""

    def generic(self, args: Any, kws: Any) -> Any:
        rows, index, _ = args
        if not isinstance(rows, RowsType):
            return None
        position = types.UniTuple(types.intp, 2) if isinstance(index, types.BaseTuple) else types.intp
        return signature(types.none, rows, position, rows.dtype)


@lower_builtin(operator.getitem, RowsType, types.Any)
def _get(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    rows, index = sig.args
    result = sig.return_type
    pointer = address(context, builder, rows, args[0], _indices(builder, index, args[1]))
    if isinstance(result, RowsType):
        view = cgutils.create_struct_proxy(rows)(context, builder, value=args[0])
        row = cgutils.create_struct_proxy(result)(context, builder)
        row.data = pointer
        if CHECKED:
            row.rows = view.columns
            row.columns = ir.Constant(view.columns.type, 1)
        return row._getvalue()
    if isinstance(result, types.Record):
        return builder.bitcast(pointer, context.get_value_type(result))
    typed = builder.bitcast(pointer, context.get_data_type(result).as_pointer())
    return context.data_model_manager[result].from_data(builder, builder.load(typed))


@lower_builtin(operator.setitem, RowsType, types.Any, types.Any)
def _put(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    rows, index, _ = sig.args
    pointer = address(context, builder, rows, args[0], _indices(builder, index, args[1]))
    typed = builder.bitcast(pointer, context.get_data_type(rows.dtype).as_pointer())
    builder.store(context.data_model_manager[rows.dtype].as_data(builder, args[2]), typed)
    return context.get_dummy_value()


class StateType(types.Type):
    """Pointer to an address vector whose arrays are reached as attributes (``s.req``, ``s.lane``, ...)."""

    def __init__(self, name: str, fields: Sequence[tuple[str, RowsType]]) -> None:
        self.fields = dict(fields)
        self.order = {field: k for k, (field, _) in enumerate(fields)}
        super().__init__(name=f"{name}({', '.join(f'{n}: {r}' for n, r in fields)})")


@register_model(StateType)
class _StateModel(models.OpaqueModel):
    """A bare pointer: calls between kernels pass one word, however many arrays the state has."""


@infer_getattr
class _StateAttributes(AttributeTemplate):
    key = StateType

    def generic_resolve(self, typ: Any, attr: str) -> Any:  # type: ignore[override]
        return typ.fields.get(attr)


@lower_getattr_generic(StateType)
def _state_attribute(context: Any, builder: Any, typ: Any, value: Any, attr: str) -> Any:
    rows = typ.fields[attr]
    words = builder.bitcast(value, ir.IntType(64).as_pointer())

    def word(j: int) -> Any:
        loaded = builder.load(builder.gep(words, [ir.Constant(ir.IntType(64), WORDS * typ.order[attr] + j)]))
        # Nothing inside a kernel moves an array, so the loads may be hoisted out of loops and past stores.
        loaded.set_metadata("invariant.load", builder.module.add_metadata([]))
        return loaded

    view = cgutils.create_struct_proxy(rows)(context, builder)
    view.data = builder.inttoptr(word(0), context.get_value_type(types.voidptr))
    if rows.ndim == 2 or CHECKED:
        view.columns = word(2)
    if CHECKED:
        view.rows = word(1)
    return view._getvalue()


def make_attach(name: str, fields: Sequence[tuple[str, Any, int]]) -> Any:
    """An intrinsic ``attach(vector)`` for kernels: the state behind an address vector, an array or Rows of int64.

    :param fields: (attribute, dtype, axes) in the order of the vector
    """
    state = StateType(name, [(field, RowsType(from_dtype(np.dtype(dtype)), ndim)) for field, dtype, ndim in fields])

    @intrinsic
    def attach(typingctx: Any, vector: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if isinstance(vector, RowsType):
                data = cgutils.create_struct_proxy(vector)(context, builder, value=args[0]).data
            else:
                data = context.make_array(vector)(context, builder, value=args[0]).data
            return builder.bitcast(data, context.get_value_type(state))

        return state(vector), codegen

    return attach


def _copy_rows(typingctx: Any, target: Any, at: Any, source: Any, begin: Any, n: Any) -> Any:
    if not isinstance(target, RowsType) or target != source:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to = address(context, builder, target, args[0], [args[1]])
        of = address(context, builder, target, args[2], [args[3]])
        count = args[4]
        if target.ndim == 2:
            view = cgutils.create_struct_proxy(target)(context, builder, value=args[0])
            count = builder.mul(count, view.columns)
        cgutils.raw_memcpy(builder, to, of, count, _item_size(context, target.dtype))
        return context.get_dummy_value()

    return types.none(target, types.intp, source, types.intp, types.intp), codegen


#: ``copy_rows(target, at, source, begin, n)`` for kernels: ``target[at : at + n] = source[begin : begin + n]``.
#: Both are Rows of one type (records too), with as many columns where they have two axes; n is at least 1.
copy_rows: Any = intrinsic(_copy_rows)


def state_type(attach: Any) -> Any:
    """The type of what an ``attach`` of :func:`make_attach` returns."""
    return attach._defn(None, types.int64[::1])[0].return_type


def addresses(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The address vector of ``arrays``, int64 (3 · len,). The caller must keep the arrays alive.

    :raises ValueError: an array is not C-contiguous or has more than two axes
    """
    words = np.zeros(WORDS * len(arrays), np.int64)
    for k, array in enumerate(arrays):
        if not array.flags.c_contiguous or array.ndim > 2:
            raise ValueError("state arrays must be C-contiguous with at most two axes")
        columns = array.shape[1] if array.ndim == 2 else 1
        words[WORDS * k : WORDS * (k + 1)] = array.ctypes.data, array.shape[0], columns
    return words
