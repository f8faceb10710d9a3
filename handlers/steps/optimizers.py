"""Know which numbers of an optimizer's state belong to which rows of a plate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from ..effect.internals import Optimizer, compiled

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

    They are those that become longer when the parameters do. Nothing is computed but
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
    params = jax.eval_shape(optim.get_params, optim_state)

    def leaves_given(rows: Mapping[str, int]) -> list[Any]:
        return jax.tree.leaves(
            jax.eval_shape(optim.init, _with_rows(params, row_axes, rows))
        )

    found: list[Axes] = []
    longer = {plate: leaves_given({plate: size + 1}) for plate, size in sizes.items()}
    fewer = leaves_given(counts)
    for i, (path, leaf) in enumerate(tree_leaves_with_path(optim_state)):
        axes = {
            plate: axis
            for plate, size in sizes.items()
            for axis in range(leaf.ndim)
            if leaf.shape[axis] == size
            and longer[plate][i].shape == _shape(leaf, {plate: axis}, {plate: size + 1})
        }
        if fewer[i].shape != _shape(leaf, axes, counts):
            raise ValueError(_mixes(path, sizes))
        found.append(axes)
    return found


def check_rows_are_apart(
    optim: Optimizer,
    optim_state: Any,
    row_axes: Mapping[str, Axes],
    sizes: Mapping[str, int],
    counts: Mapping[str, int],
    leaf_axes: list[Axes],
) -> None:
    """Refuse an optimizer whose steps for a batch depend on the other rows.

    It takes a step with made-up values, with and without the other rows. In an ordinary
    step these have no gradient, so that a norm over all gradients, by which an
    optimizer may clip them, is that of the batch.

    Parameters
    ----------
    optim, optim_state, row_axes, sizes, counts
        As for ``axes_of_leaves``.
    leaf_axes : list of dict
        What that has found.

    Raises
    ------
    ValueError
        If other rows make a difference to those of the batch. If the optimizer needs
        more than gradients and the loss.
    """
    _refuse_accumulation(optim_state)
    # Half of the rows are others, so that a mean over rows differs by as much.
    twice = {plate: 2 * count for plate, count in counts.items()}
    params = jax.eval_shape(optim.get_params, optim_state)
    params = _with_rows(params, row_axes, twice)
    draw = np.random.default_rng(0)

    def made_up(scale: float, of_others: float) -> dict[str, Any]:
        values = jax.tree.map(lambda leaf: scale * draw.normal(size=leaf.shape), params)
        for name, axes in row_axes.items():
            for plate, axis in axes.items():
                others = (slice(None),) * axis + (slice(counts[plate]),)
                values[name][others] *= of_others
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), values, params)

    def of_batch(leaf: jax.Array, axes: Axes) -> jax.Array:
        for plate, axis in axes.items():
            leaf = jax.lax.slice_in_dim(leaf, counts[plate], None, axis=axis)
        return leaf

    def differs(leaf: jax.Array, of_some: jax.Array, axes: Axes) -> jax.Array:
        leaf = of_batch(leaf, axes)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.any(leaf != of_some)
        # Rounding may differ; what it is about is much larger.
        return jnp.any(jnp.abs(leaf - of_some) > 1e-3 * jnp.max(jnp.abs(leaf)))

    def mixed(start: Any, before: Any, grads: Any) -> list[jax.Array]:
        loss = jnp.ones(())
        # All rows have had gradients, of which the state may keep something.
        state = optim.update(before, optim.init(start), value=loss)
        leaves, structure = jax.tree.flatten(state)
        some = jax.tree.unflatten(structure, map(of_batch, leaves, leaf_axes))
        state = optim.update(grads, state, value=loss)
        grads = {n: of_batch(leaf, row_axes.get(n, {})) for n, leaf in grads.items()}
        some = optim.update(grads, some, value=loss)
        return list(map(differs, *map(jax.tree.leaves, (state, some)), leaf_axes))

    # A norm over all gradients is that of the batch where other rows have none. It may
    # clip these, and does not clip small ones.
    runs = [
        (made_up(start, 10.0), made_up(size, 10.0), made_up(size, of_others))
        for start, size, of_others in ((0.0, 1e-6, 10.0), (1.0, 1e3, 0.0))
    ]
    try:
        compare = compiled(mixed, *runs[0])
    except Exception as error:
        raise ValueError(
            "The optimizer takes no step from gradients and the loss alone "
            f"({type(error).__name__}: {error}). Take one that does, as optax.adam."
        ) from error
    found = jax.device_get([compare(*run) for run in runs])
    for i, (path, _) in enumerate(tree_leaves_with_path(optim_state)):
        if any(leaves[i] for leaves in found):
            raise ValueError(_mixes(path, sizes))


def _refuse_accumulation(optim_state: Any) -> None:
    def accumulates(node: Any) -> bool:
        return type(node).__name__ == "MultiStepsState"

    if any(map(accumulates, jax.tree.leaves(optim_state, is_leaf=accumulates))):
        raise ValueError(
            "optax.MultiSteps adds up the gradients of several steps, and would apply "
            f"them to the rows of the last one only. {REMEDY}"
        )


def _mixes(path: Any, sizes: Mapping[str, int]) -> str:
    plates = " and ".join(f"'{plate}' (size {size})" for plate, size in sizes.items())
    return (
        f"The optimizer mixes rows of plate {plates}: what its state holds at "
        f"{keystr(path)} does not belong to one row, or depends on others. {REMEDY}"
    )


def _shape(leaf: Any, axes: Axes, counts: Mapping[str, int]) -> tuple[int, ...]:
    shape = list(leaf.shape)
    for plate, axis in axes.items():
        shape[axis] = counts.get(plate, shape[axis])
    return tuple(shape)


def _with_rows(
    params: dict[str, Any], row_axes: Mapping[str, Axes], counts: Mapping[str, int]
) -> dict[str, Any]:
    """Give abstract parameters other numbers of rows."""
    return params | {
        name: jax.ShapeDtypeStruct(
            _shape(params[name], axes, counts), params[name].dtype
        )
        for name, axes in row_axes.items()
    }
