"""Sixteen float32 numbers as one value inside kernels.

Left to itself, the compiler asks at the door of every short inner loop whether its arrays overlap, and keeps sums in
memory. A value of this type lives in registers (one of AVX-512, two of AVX2, four of NEON), so that a product of
matrices 32 wide runs near the speed of the arithmetic. LLVM's own vectors, hence portable.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic, models, register_model

from engine.jit.rows import RowsType, address

__all__ = [
    "LANES",
    "choose",
    "equal",
    "exponent",
    "fetch",
    "fma",
    "least",
    "load",
    "magnitude",
    "mantissa",
    "most",
    "over",
    "plus",
    "positive",
    "relu",
    "save",
    "signed",
    "splat",
    "times",
    "total",
]

LANES = 16
_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_WORDS = ir.VectorType(_INT, LANES)
_BYTES = ir.IntType(8).as_pointer()
_ALIGN = 4  # bytes: arrays promise no more


class _Lanes(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


_lanes = _Lanes()


@register_model(_Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _constant(x: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [x] * LANES)


def _place(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Pointer to ``LANES`` numbers from ``rows[row, column]`` on; nobody checks that there are so many."""
    axes = 1 + signature.args[0].ndim
    kinds = zip(signature.args[1:axes], arguments[1:axes], strict=True)
    index = [context.cast(builder, value, kind, types.intp) for kind, value in kinds]
    pointer = address(context, builder, signature.args[0], arguments[0], index)
    return builder.bitcast(pointer, _VECTOR.as_pointer())


def _is_matrix(rows: Any) -> bool:
    return isinstance(rows, RowsType) and rows.ndim == 2 and rows.dtype == types.float32


@intrinsic
def load(typing: Any, rows: Any, row: Any, column: Any) -> Any:
    """``rows[row, column : column + LANES]`` of a float32 ``Rows`` with two axes."""
    if not _is_matrix(rows):
        return None

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_place(context, builder, signature, arguments), align=_ALIGN)

    return _lanes(rows, row, column), code


@intrinsic
def save(typing: Any, rows: Any, row: Any, column: Any, x: Any) -> Any:
    """``rows[row, column : column + LANES] = x``"""
    if not _is_matrix(rows):
        return None

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[3], _place(context, builder, signature, arguments), align=_ALIGN)
        return context.get_dummy_value()

    return types.void(rows, row, column, x), code


@intrinsic
def fetch(typing: Any, rows: Any, row: Any, column: Any) -> Any:
    """Have the cache line of ``rows[row, column]`` brought near; of ``rows[row]`` where there is one axis."""
    if not isinstance(rows, RowsType):
        return None

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _place(context, builder, signature, arguments)
        number = ir.Constant(_INT, 0), ir.Constant(_INT, 3), ir.Constant(_INT, 1)  # to read, often, data
        kind = ir.FunctionType(ir.VoidType(), [_BYTES, _INT, _INT, _INT])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, (builder.bitcast(pointer, _BYTES), *number))
        return context.get_dummy_value()

    return types.void(rows, row, column), code


@intrinsic
def splat(typing: Any, x: Any) -> Any:
    """``x`` in every lane."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        single = context.cast(builder, arguments[0], signature.args[0], types.float32)
        first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), single, ir.Constant(_INT, 0))
        return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_INT, LANES), [0] * LANES))

    return _lanes(x), code


def _operation(emit: Any, n: int) -> Any:
    """What every function of ``n`` values with a value as its result shares."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return emit(builder, *arguments)

    return _lanes(*(_lanes,) * n), code


def _bits(builder: Any, x: Any, keep: int, put: int | None) -> Any:
    """``x`` with the bits ``keep`` only, and the bits ``put`` added."""
    words = builder.and_(builder.bitcast(x, _WORDS), ir.Constant(_WORDS, [keep] * LANES))
    if put is not None:
        words = builder.or_(words, ir.Constant(_WORDS, [put] * LANES))
    return builder.bitcast(words, _VECTOR)


def _larger(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


@intrinsic
def fma(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """x · y + z, rounded once where the machine can."""

    def emit(builder: Any, x: Any, y: Any, z: Any) -> Any:
        name = f"llvm.fmuladd.v{LANES}f32"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), name)
        return builder.call(function, (x, y, z))

    return _operation(emit, 3)


@intrinsic
def plus(typing: Any, x: Any, y: Any) -> Any:
    """x + y"""
    return _operation(lambda builder, x, y: builder.fadd(x, y), 2)


@intrinsic
def times(typing: Any, x: Any, y: Any) -> Any:
    """x · y"""
    return _operation(lambda builder, x, y: builder.fmul(x, y), 2)


@intrinsic
def over(typing: Any, x: Any, y: Any) -> Any:
    """x ÷ y"""
    return _operation(lambda builder, x, y: builder.fdiv(x, y), 2)


@intrinsic
def most(typing: Any, x: Any, y: Any) -> Any:
    """The larger of x and y, lane by lane."""
    return _operation(_larger, 2)


@intrinsic
def relu(typing: Any, x: Any) -> Any:
    """max(x, 0)"""
    return _operation(lambda builder, x: _larger(builder, x, _constant(0.0)), 1)


@intrinsic
def choose(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """y where x > 0, else z"""

    def emit(builder: Any, x: Any, y: Any, z: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", x, _constant(0.0)), y, z)

    return _operation(emit, 3)


@intrinsic
def positive(typing: Any, x: Any, y: Any) -> Any:
    """y where x > 0, else 0"""

    def emit(builder: Any, x: Any, y: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", x, _constant(0.0)), y, _constant(0.0))

    return _operation(emit, 2)


@intrinsic
def equal(typing: Any, x: Any, y: Any, z: Any) -> Any:
    """z where x = y, else 0"""

    def emit(builder: Any, x: Any, y: Any, z: Any) -> Any:
        return builder.select(builder.fcmp_ordered("==", x, y), z, _constant(0.0))

    return _operation(emit, 3)


@intrinsic
def least(typing: Any, x: Any, y: Any) -> Any:
    """The smaller of x and y, lane by lane; y where either is not a number."""
    return _operation(lambda builder, x, y: builder.select(builder.fcmp_ordered("<", x, y), x, y), 2)


@intrinsic
def magnitude(typing: Any, x: Any) -> Any:
    """Absolute value."""
    return _operation(lambda builder, x: _bits(builder, x, 0x7FFFFFFF, None), 1)


@intrinsic
def signed(typing: Any, size: Any, x: Any) -> Any:
    """``size``, which is not negative, with the sign of x."""

    def emit(builder: Any, size: Any, x: Any) -> Any:
        sign = builder.and_(builder.bitcast(x, _WORDS), ir.Constant(_WORDS, [0x80000000] * LANES))
        return builder.bitcast(builder.or_(builder.bitcast(size, _WORDS), sign), _VECTOR)

    return _operation(emit, 2)


@intrinsic
def mantissa(typing: Any, x: Any) -> Any:
    """The mantissa of positive x, in [1, 2)."""
    return _operation(lambda builder, x: _bits(builder, x, 0x7FFFFF, 0x3F800000), 1)


@intrinsic
def exponent(typing: Any, x: Any) -> Any:
    """The binary exponent of positive x, as a float."""

    def emit(builder: Any, x: Any) -> Any:
        raised = builder.lshr(builder.bitcast(x, _WORDS), ir.Constant(_WORDS, [23] * LANES))
        return builder.sitofp(builder.sub(raised, ir.Constant(_WORDS, [127] * LANES)), _VECTOR)

    return _operation(emit, 1)


@intrinsic
def total(typing: Any, x: Any) -> Any:
    """Sum over the lanes, halves first, so that the order of additions is the same everywhere."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (sums,), width = arguments, LANES
        while width > 1:
            width //= 2
            low, high = (
                builder.shuffle_vector(sums, sums, ir.Constant(ir.VectorType(_INT, width), list(range(at, at + width))))
                for at in (0, width)
            )
            sums = builder.fadd(low, high)
        return builder.extract_element(sums, ir.Constant(_INT, 0))

    return types.float32(x), code
