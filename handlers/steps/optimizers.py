"""Know which numbers of an optimizer's state belong to which rows of a plate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jax.tree_util import keystr, tree_leaves_with_path

from ..effect.internals import Optimizer
from .row_dependence import MIXED, UNKNOWN, Rows, axes_of_rows, follow

# By plate, the axis of an array that runs over the plate's rows.
Axes = dict[str, int]

REMEDY = (
    "Take an optimizer that treats each number by itself, as optax.sgd, optax.adagrad "
    "and optax.adam do, or leave rowwise out."
)


def axes_of_leaves(
    optim: Optimizer,
    optim_state: Any,
    row_axes: Mapping[str, Axes],
    sizes: Mapping[str, int],
    counts: Mapping[str, int],
) -> list[Axes]:
    """Learn which leaves of an optimizer's state hold rows, and in which axes.

    They are those that become shorter when the parameters do. Nothing is computed but
    shapes.

    Parameters
    ----------
    optim : optimizer of numpyro.optim
        The optimizer.
    optim_state : pytree of arrays
        Its state, with all rows.
    row_axes : dict of str to dict
        For each parameter with rows, the axes of the plates.
    sizes, counts : dict of str to int
        For each plate, the number of all rows, and of those in the batch.

    Returns
    -------
    list of dict
        For each leaf of the state, the axes of the plates whose rows it holds.

    Raises
    ------
    ValueError
        If a leaf depends on the number of rows in another way.
    """
    found: list[Axes] = [{} for _ in jax.tree.leaves(optim_state)]
    params = jax.eval_shape(optim.get_params, optim_state)
    for plate, rows, of_rows in _one_plate_at_a_time(params, row_axes, sizes, counts):
        more, fewer = (jax.eval_shape(optim.init, own) for own in of_rows)
        if jax.tree.structure(more) != jax.tree.structure(fewer):
            raise ValueError(_mixes(plate, sizes, "its state depends on their number"))
        leaves = zip(tree_leaves_with_path(more), jax.tree.leaves(fewer), strict=True)
        for ((path, leaf), other), axes in zip(leaves, found, strict=True):
            axis = axes_of_rows(leaf, other, rows)
            if axis is None:
                what = f"its state at {keystr(path)} is not made of single rows"
                raise ValueError(_mixes(plate, sizes, what))
            axes.update((plate, own) for own in axis)
    return found


def check_rows_are_apart(
    optim: Optimizer,
    optim_state: Any,
    row_axes: Mapping[str, Axes],
    sizes: Mapping[str, int],
    counts: Mapping[str, int],
) -> None:
    """Refuse an optimizer whose steps for a batch depend on the other rows.

    It is told from the operations of a step, without a computation. In an ordinary step
    the other rows have no gradient, so that a norm over all gradients, by which an
    optimizer may clip them, is that of the batch.

    Parameters
    ----------
    optim, optim_state, row_axes, sizes, counts
        As for ``axes_of_leaves``.

    Raises
    ------
    ValueError
        If the optimizer needs more than gradients and the loss, or adds up the
        gradients of several steps. If what it computes for the rows of a batch, or for
        what has no rows, depends on parameters or state of other rows, or on how many
        there are.
    """
    check_goes_by_gradients(optim)
    _refuse_accumulation(optim_state)
    params = jax.eval_shape(optim.get_params, optim_state)

    def update(gradients: Any, state: Any, loss: Any) -> Any:
        return optim.update(gradients, state, value=loss)

    def program(params: dict[str, Any]) -> ClosedJaxpr:
        state = jax.eval_shape(optim.init, params)
        loss = jax.ShapeDtypeStruct((), jnp.result_type(float))
        try:
            return jax.make_jaxpr(update)(params, state, loss)
        except Exception as error:
            raise ValueError(
                "The optimizer takes no step from gradients and the loss alone "
                f"({type(error).__name__}: {error}). Take one that does, as optax.adam."
            ) from error

    leaves = tree_leaves_with_path(optim_state)
    for plate, rows, of_rows in _one_plate_at_a_time(params, row_axes, sizes, counts):
        known: list[Any] = []
        for name, values in sorted(params.items()):
            elsewhere = 0 if plate in row_axes.get(name, {}) else UNKNOWN
            known += [elsewhere] * len(jax.tree.leaves(values))
        known += [UNKNOWN] * (len(leaves) + 1)
        results = follow(*map(program, of_rows), known, rows)
        for (path, _), result in zip(leaves, results, strict=True):
            if result is MIXED:
                what = (
                    f"its new state at {keystr(path)} depends on other rows than those "
                    "of a batch, as norms of parameters, means over rows and noise do"
                )
                raise ValueError(_mixes(plate, sizes, what))


def check_goes_by_gradients(optim: Optimizer) -> None:
    """Refuse an optimizer that takes no gradients.

    Raises
    ------
    ValueError
        If it evaluates the loss of all parameters by itself, as ``Minimize`` does.
    """
    for method in ("eval_and_update", "eval_and_stable_update"):
        if getattr(type(optim), method) is not getattr(Optimizer, method):
            raise ValueError(
                f"{type(optim).__name__} optimises all parameters together, so that "
                f"its steps cannot be taken row by row. {REMEDY}"
            )


def _refuse_accumulation(optim_state: Any) -> None:
    def accumulates(node: Any) -> bool:
        return type(node).__name__ in ("MultiStepsState", "ApplyEvery")

    if any(map(accumulates, jax.tree.leaves(optim_state, is_leaf=accumulates))):
        raise ValueError(
            "The optimizer adds up the gradients of several steps, and would apply "
            f"them to the rows of the last one only. {REMEDY}"
        )


def _mixes(plate: str, sizes: Mapping[str, int], what: str) -> str:
    return (
        f"The optimizer mixes rows of plate '{plate}' (size {sizes[plate]}): {what}. "
        f"{REMEDY}"
    )


def _one_plate_at_a_time(
    params: dict[str, Any],
    row_axes: Mapping[str, Axes],
    sizes: Mapping[str, int],
    counts: Mapping[str, int],
) -> Iterator[tuple[str, Rows, list[dict[str, Any]]]]:
    """Yield a plate, numbers of its rows that differ, and parameters with so many.

    Those of the plates before are then as few as in the batch.
    """
    numbers = dict(sizes)
    for plate, count in counts.items():
        rows = Rows(max(sizes[plate], count + 1), count)
        yield (
            plate,
            rows,
            [_with_rows(params, row_axes, numbers | {plate: own}) for own in rows],
        )
        numbers[plate] = count


def _with_rows(
    params: dict[str, Any], row_axes: Mapping[str, Axes], counts: Mapping[str, int]
) -> dict[str, Any]:
    """Give abstract parameters other numbers of rows."""
    changed = {}
    for name, axes in row_axes.items():
        shape = list(params[name].shape)
        for plate, axis in axes.items():
            shape[axis] = counts[plate]
        changed[name] = jax.ShapeDtypeStruct(tuple(shape), params[name].dtype)
    return params | changed
