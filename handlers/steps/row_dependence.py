"""Whether a program treats the rows of a plate apart, told from its operations.

The program for all rows is compared with the one for some of them, operation by
operation. A value of the first *agrees* with that of the second if they are equal, or,
where they hold rows, if the second is the first at these rows. Nothing is computed, and
an operation that is not known here is taken to mix rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# What is known of a value. MIXED: it may not agree. All else says that it agrees, and
# what it holds in the rows that the second program lacks (everywhere, if it holds no
# rows): a number, or UNKNOWN.
MIXED, UNKNOWN = "mixed", "unknown"

# They make each number from those at its place, or from scalars.
_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp conj
    convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1
    floor ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max min mul
    ne neg nextafter not or pow real reduce_precision rem round rsqrt select_n sign sin
    sinh sqrt square sub tan tanh xor
"""
# Those through which numbers are followed: norms, clipping and the search for numbers
# that are not finite are made of them.
_OF_NUMBERS = {
    "abs": np.abs,
    "add": np.add,
    "convert_element_type": np.asarray,
    "copy": np.asarray,
    "integer_pow": np.float_power,
    "is_finite": np.isfinite,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "square": np.square,
    "sub": np.subtract,
}
# Reductions, and the number that makes no difference to them.
_NEUTRAL = {
    "reduce_and": True,
    "reduce_max": -inf,
    "reduce_min": inf,
    "reduce_or": False,
    "reduce_prod": 1,
    "reduce_sum": 0,
}
_LAYOUT = frozenset(["broadcast_in_dim", "reshape", "squeeze", "transpose"])
_CALLS = """
    checkpoint closed_call core_call custom_jvp_call custom_vjp_call jit pjit
"""


class Rows(NamedTuple):
    """How many rows a plate has in the two programs.

    Attributes
    ----------
    all : int
        Their number in the first program.
    some : int
        Their number in the second, which is less.
    """

    all: int
    some: int


def axes_of_rows(first: Any, second: Any, rows: Rows) -> tuple[int, ...] | None:
    """Return the axis in which an array holds rows, told from its two shapes.

    Parameters
    ----------
    first, second : jax.ShapeDtypeStruct or similar
        The array in the program for all rows, and in the one for some of them.
    rows : Rows
        The numbers of rows.

    Returns
    -------
    tuple of int, or None
        The axis, or nothing if it holds no rows. None if other numbers of rows do not
        explain how the arrays differ.
    """
    if first.ndim != second.ndim or first.dtype != second.dtype:
        return None
    lengths = list(zip(first.shape, second.shape, strict=True))
    axes = tuple(axis for axis, (all_, some) in enumerate(lengths) if all_ != some)
    are_rows = not axes or (len(axes) == 1 and lengths[axes[0]] == rows)
    return axes if are_rows else None


def follow(first: Any, second: Any, known: Sequence[Any], rows: Rows) -> list[Any]:
    """Follow values through two programs.

    Parameters
    ----------
    first, second : jax.extend.core.ClosedJaxpr
        The program for all rows, and the one for some of them.
    known : sequence
        What is known of each argument: ``MIXED``, ``UNKNOWN`` or a number.
    rows : Rows
        The numbers of rows.

    Returns
    -------
    list
        What is known of each result.
    """
    if isinstance(first, ClosedJaxpr):
        known = [*map(_of_constants, first.consts, second.consts), *known]
        first, second = first.jaxpr, second.jaxpr
    if _outline(first) != _outline(second):
        return [MIXED] * len(first.outvars)
    values: dict[Any, tuple[Any, Any]] = {}

    def note(ours: Sequence[Any], theirs: Sequence[Any], known: Sequence[Any]) -> None:
        for our, their, own in zip(ours, theirs, known, strict=True):
            values[our] = (
                their,
                MIXED if axes_of_rows(our.aval, their.aval, rows) is None else own,
            )

    def read(our: Any, their: Any) -> Any:
        if isinstance(our, Literal):
            alike = isinstance(their, Literal)
            return _of_constants(our.val, their.val) if alike else MIXED
        expected, known = values[our]
        return known if expected is their else MIXED

    note([*first.constvars, *first.invars], [*second.constvars, *second.invars], known)
    for our, their in zip(first.eqns, second.eqns, strict=True):
        operands = list(map(read, our.invars, their.invars))
        note(our.outvars, their.outvars, _of_results(our, their, operands, rows))
    return list(map(read, first.outvars, second.outvars))


def _of_results(our: Any, their: Any, operands: list[Any], rows: Rows) -> list[Any]:
    name = our.primitive.name
    if name in _CALLS.split():
        key = "jaxpr" if "jaxpr" in our.params else "call_jaxpr"
        return follow(our.params[key], their.params[key], operands, rows)
    if name == "cond" and operands[0] is not MIXED:
        branches = zip(our.params["branches"], their.params["branches"], strict=True)
        found = [follow(*branch, operands[1:], rows) for branch in branches]
        return [_in_either_case(known) for known in zip(*found, strict=True)]
    mixed = [MIXED] * len(our.outvars)
    differ = {
        key
        for key, param in our.params.items()
        if not _are_same(param, their.params[key], rows)
    }
    if MIXED in operands or differ - {"shape", "new_sizes"}:
        return mixed

    def axes(ours: Sequence[Any], theirs: Sequence[Any]) -> list[Any]:
        pairs = zip(ours, theirs, strict=True)
        return [axes_of_rows(one.aval, other.aval, rows) for one, other in pairs]

    ins, outs = axes(our.invars, their.invars), axes(our.outvars, their.outvars)
    if name in _ELEMENTWISE.split():
        return [_elementwise(our, operands, ins)]
    if name in _LAYOUT:
        return operands if _keeps_rows(our, *ins, *outs) else mixed
    if not any(ins) and not any(outs):
        # Equal arguments give equal results, whatever it is.
        return [UNKNOWN] * len(our.outvars)
    if name in _NEUTRAL:
        is_neutral = operands[0] == _NEUTRAL[name]
        if ins[0][0] not in our.params["axes"]:
            return operands if is_neutral else [UNKNOWN]
        return [UNKNOWN] if is_neutral else mixed
    return mixed


def _elementwise(eqn: Any, operands: list[Any], axes: list[Any]) -> Any:
    """Return the number that an operation makes in other rows."""
    name = eqn.primitive.name
    if name == "select_n":
        return _in_either_case(operands[1:])
    if name in ("mul", "div"):
        # What all rows share is finite, or no step is taken in either program.
        first, second = (known == 0 for known in operands)
        if (first and not axes[1]) or (name == "mul" and second and not axes[0]):
            return 0
    if name not in _OF_NUMBERS or UNKNOWN in operands:
        return UNKNOWN
    exponent = [eqn.params["y"]] if name == "integer_pow" else []
    with np.errstate(all="ignore"):
        number = _OF_NUMBERS[name](*operands, *exponent)
        return number.astype(eqn.outvars[0].aval.dtype).item()


def _keeps_rows(eqn: Any, before: Any, after: Any) -> bool:
    """Tell whether the rows of an array, laid out anew, are still those of an axis."""
    if after is None or not before:
        return after is not None
    if eqn.primitive.name == "broadcast_in_dim":
        return after == (eqn.params["broadcast_dimensions"][before[0]],)
    shapes = eqn.invars[0].aval.shape[: before[0]], eqn.outvars[0].aval.shape
    if eqn.primitive.name == "reshape":
        return bool(after) and prod(shapes[0]) == prod(shapes[1][: after[0]])
    return True


def _in_either_case(known: Sequence[Any]) -> Any:
    if MIXED in known:
        return MIXED
    return known[0] if all(own == known[0] for own in known) else UNKNOWN


def _of_constants(our: Any, their: Any) -> Any:
    try:
        same = our is their or np.array_equal(our, their, equal_nan=True)
    except TypeError:  # of abstract values, and of keys
        same = False
    if not same:
        return MIXED
    is_number = np.ndim(our) == 0 and not isinstance(our, jax.Array)
    return np.asarray(our).item() if is_number else UNKNOWN


def _outline(program: Jaxpr) -> list[Any]:
    """Return what two programs have in common whose operations do."""
    operations = [
        (eqn.primitive, len(eqn.invars), len(eqn.params.get("branches", ())))
        for eqn in program.eqns
    ]
    variables = program.constvars, program.invars, program.outvars
    return [*map(len, variables), *operations]


def _are_same(ours: Any, theirs: Any, rows: Rows) -> bool:
    """Tell whether two parameters of an operation are, programs among them."""
    if isinstance(ours, ClosedJaxpr):
        agree = [UNKNOWN] * len(ours.jaxpr.invars)
        return MIXED not in follow(ours, theirs, agree, rows)
    try:
        return ours is theirs or bool(ours == theirs)
    except (TypeError, ValueError):  # of arrays
        return False
