"""Know which numbers of an optimizer's state belong to which rows of a plate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path
from numpyro.optim import _NumPyroOptim

# By plate, the axis of an array that runs over the plate's rows.
Axes = dict[str, int]

REMEDY = (
    "Take an optimizer that treats each number by itself, as optax.sgd, optax.adagrad "
    "and optax.adam do, or leave rowwise out."
)


def axes_of_leaves(
    optim: _NumPyroOptim,
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
    optim : numpyro.optim._NumPyroOptim
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
    optim: _NumPyroOptim,
    optim_state: Any,
    row_axes: Mapping[str, Axes],
    sizes: Mapping[str, int],
    counts: Mapping[str, int],
    leaf_axes: list[Axes],
) -> None:
    """Refuse an optimizer whose steps are otherwise if a row is left out.

    Some steps are taken with made-up values, from parameters of zero and from others.

    Parameters
    ----------
    optim, optim_state, row_axes, sizes, counts
        As for ``axes_of_leaves``.
    leaf_axes : list of dict
        What that has found.

    Raises
    ------
    ValueError
        If one row's parameters or gradient make a difference to others, or if the
        optimizer adds up gradients over several steps.
    """
    _refuse_accumulation(optim_state)
    params = jax.eval_shape(optim.get_params, optim_state)
    more = {plate: count + 1 for plate, count in counts.items()}
    params = _with_rows(params, row_axes, more)
    # Clipping by a norm may mix rows, and does not set in for so small gradients.
    small = 1e-3 / np.sqrt(sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)))

    def made_up(phase: float) -> dict[str, Any]:
        def wave(leaf: Any) -> jax.Array:
            angles = phase + jnp.arange(np.prod(leaf.shape))
            return jnp.sin(angles).reshape(leaf.shape).astype(leaf.dtype)

        values = jax.tree.map(wave, params)
        for name, axes in row_axes.items():
            for axis in axes.values():
                # The rows to be left out are large, to be missed if they count.
                first = (slice(None),) * axis + (0,)
                values[name] = values[name].at[first].multiply(100.0)
        return values

    def but_first(leaf: jax.Array, axes: Axes) -> jax.Array:
        for axis in axes.values():
            leaf = jax.lax.slice_in_dim(leaf, 1, None, axis=axis)
        return leaf

    def differs(leaf: jax.Array, of_some: jax.Array, axes: Axes) -> jax.Array:
        leaf = but_first(leaf, axes)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.any(leaf != of_some)
        # Rounding may differ; what it is about is much larger.
        return jnp.any(jnp.abs(leaf - of_some) > 1e-3 * jnp.max(jnp.abs(leaf)))

    @jax.jit
    def mixed(start: Any) -> list[jax.Array]:
        state = optim.init(jax.tree.map(lambda leaf: start * leaf, made_up(1.0)))
        leaves, structure = jax.tree.flatten(state)
        of_some = jax.tree.unflatten(structure, map(but_first, leaves, leaf_axes))
        for phase in (2.0, 3.0):
            grads = jax.tree.map(lambda leaf: small * leaf, made_up(phase))
            state = optim.update(grads, state, value=jnp.ones(()))
            for name, axes in row_axes.items():
                grads[name] = but_first(grads[name], axes)
            of_some = optim.update(grads, of_some, value=jnp.ones(()))
        leaves = jax.tree.leaves(state)
        return list(map(differs, leaves, jax.tree.leaves(of_some), leaf_axes))

    with jax.ensure_compile_time_eval():
        found = jax.device_get([mixed(start) for start in (0.0, 1.0)])
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
