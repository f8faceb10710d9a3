"""Steps on the batch's rows of parameters and optimizer state, instead of on all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import constraints
from numpyro.handlers import substitute
from numpyro.infer import SVI, RenyiELBO
from numpyro.infer.svi import SVIState

from ..effect.guides import joint_over
from ..effect.internals import Handler, Optimizer
from ..effect.rows import Counts, all_in_order
from .optimizers import REMEDY, Axes, axes_of_leaves, check_rows_are_apart


class RowParams(Handler):
    """Learns, while a loss is computed, which parameters hold the rows of plates.

    Parameters
    ----------
    every_plate : bool
        Learn of plates that take all rows in order, too. Parameters that are read
        outside of their plate as well, or whose rows depend on each other, are then
        no errors; the latter are left out.

    Attributes
    ----------
    axes : dict of str to dict
        For each parameter with rows of a plate that takes some of them, the axes,
        counted from the left, of those plates, the outer plates first.
    rows : dict of str to jax.Array
        The rows that each plate took, shape ``(subsample_size,)``.
    sizes : dict of str to int
        The full size of each plate.
    drawn : set of str
        The plates that drew their rows.
    """

    def __init__(self, *, every_plate: bool = False) -> None:
        super().__init__()
        self._every_plate = every_plate
        self.axes: dict[str, Axes] = {}
        self.rows: dict[str, jax.Array] = {}
        self.sizes: dict[str, int] = {}
        self.drawn: set[str] = set()
        self._seen: dict[str, Axes] = {}

    def plates(self) -> list[str]:
        """Return the plates whose rows parameters hold."""
        return sorted({plate for axes in self.axes.values() for plate in axes})

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "plate" or msg["value"] is not None:
            return
        draw = msg["fn"]

        def drawn(*args: Any, **kwargs: Any) -> jax.Array:
            self.drawn.add(msg["name"])
            return draw(*args, **kwargs)

        msg["fn"] = drawn

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate":
            self.rows[msg["name"]] = msg["value"]
            self.sizes[msg["name"]] = msg["args"][0]
        elif msg["type"] == "param":
            self._learn(msg)

    def _learn(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        axes = self._axes(msg)
        before = self._seen.setdefault(name, axes)
        for plate in set() if self._every_plate else before.keys() ^ axes.keys():
            raise ValueError(
                f"Parameter '{name}' holds rows of plate '{plate}' (size "
                f"{self.sizes[plate]}) and is read outside of it too, where all rows "
                "are wanted. Read it inside the plate only, or leave rowwise out."
            )
        if axes:
            self.axes[name] = axes

    def _axes(self, msg: dict[str, Any]) -> Axes:
        event_dim = msg["kwargs"].get("event_dim")
        shape = jnp.shape(msg["value"]) if event_dim is not None else ()
        axes = {}
        for frame in reversed(msg["cond_indep_stack"]):
            axis = len(shape) + frame.dim - (event_dim or 0)
            # Of size 1, it is shared by all rows.
            if axis < 0 or shape[axis] == 1:
                continue
            in_order = all_in_order(self.rows[frame.name], self.sizes[frame.name])
            if in_order and not self._every_plate:
                continue
            constraint = msg["kwargs"].get("constraint", constraints.real)
            if len(shape) - axis <= constraint.event_dim:
                if self._every_plate:
                    continue
                raise ValueError(
                    f"Parameter '{msg['name']}' is constrained to {constraint} across "
                    f"the rows of plate '{frame.name}' (size {shape[axis]}), which "
                    "then cannot be updated by themselves. Leave rowwise out."
                )
            axes[frame.name] = axis
        return axes


class _ParamsOfTheseRows(Handler):
    """Hands out parameters that hold the batch's rows only, each of them once."""

    def __init__(self, axes: Mapping[str, Axes], places: Mapping[str, jax.Array]):
        super().__init__()
        self._axes = axes
        self._places = places

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "param" or msg["name"] not in self._axes:
            return
        for plate, axis in self._axes[msg["name"]].items():
            msg["value"] = jnp.take(msg["value"], self._places[plate], axis)
        # The plates, whose turn comes later, then find nothing to take.
        msg["kwargs"] = {**msg["kwargs"], "event_dim": None}


class RowSteps:
    """Takes steps on those rows of parameters and optimizer state that a batch needs.

    Parameters
    ----------
    svi : numpyro.infer.SVI
        Whose steps these are.

    Raises
    ------
    ValueError
        If the optimizer does not go by gradients alone.
    """

    def __init__(self, svi: SVI) -> None:
        optim = type(svi.optim)
        for method in ("eval_and_update", "eval_and_stable_update"):
            if getattr(optim, method) is not getattr(Optimizer, method):
                raise ValueError(
                    f"{optim.__name__} optimises all parameters together, so that its "
                    f"steps cannot be taken row by row. {REMEDY}"
                )
        self._svi = svi
        self._checked = False

    def __call__(
        self,
        step: Callable[[SVIState], tuple[SVIState, Any]],
        evaluate: Callable[[SVIState], Any],
        state: SVIState,
        valid: Counts,
    ) -> tuple[SVIState, Any]:
        """Take one step.

        Parameters
        ----------
        step : callable
            The ordinary step, a function of the state.
        evaluate : callable
            Gives the loss that the step lowers, with the same random key, also a
            function of the state. It is run for what it tells of the parameters;
            in a compiled step nothing of it remains but the draw of the rows.
        state : SVIState
            The state, with all rows.
        valid : dict of str to int
            For some plates, how many of their rows, the first ones, are real.

        Returns
        -------
        state : SVIState
            The state after the step. The other rows are as they were.
        loss : jax.Array
            The loss.

        Raises
        ------
        ValueError
            If the rows cannot be updated by themselves.
        """
        found = RowParams()
        with found, substitute(data=state.mutable_state or {}):
            loss = evaluate(state)
        self._check_rows_can_be_found(found)
        sizes = {plate: found.sizes[plate] for plate in found.plates()}
        counts = {plate: len(found.rows[plate]) for plate in sizes}
        if counts == sizes:
            return step(state)
        of_plates = (state.optim_state, found.axes, sizes, counts)
        leaf_axes = axes_of_leaves(self._svi.optim, *of_plates)
        if not self._checked:
            check_rows_are_apart(self._svi.optim, *of_plates, leaf_axes)
            self._checked = True
        unique, places = {}, {}
        for plate, size in sizes.items():
            rows = found.rows[plate]
            if plate in valid:
                # Row numbers from `size` on are padding, which is not written back.
                rows = jnp.where(jnp.arange(len(rows)) < valid[plate], rows, size)
            # Once each, so that the gradients of a row that is there twice add up.
            unique[plate], places[plate] = jnp.unique(
                rows, return_inverse=True, size=len(rows), fill_value=size
            )
        leaves, structure = jax.tree.flatten(state.optim_state)
        some = map(partial(_take, rows=unique), leaves, leaf_axes)
        small = state._replace(optim_state=jax.tree.unflatten(structure, some))
        drawn = {p: found.rows[p] for p in found.drawn.intersection(sizes)}
        a_real_row = jnp.any(jnp.array([unique[p][0] < n for p, n in sizes.items()]))
        with substitute(data=drawn), _ParamsOfTheseRows(found.axes, places):
            # A branch is compiled apart from the taking and putting of rows, and so to
            # the last bit as the ordinary step is. Fused with them, it could round
            # otherwise. (A batch in which no row is real is invalid.)
            small, loss = jax.lax.cond(
                a_real_row, step, lambda small: _nan_like((small, loss)), small
            )
        some = jax.tree.leaves(small.optim_state)
        new = map(partial(_put, rows=unique), leaves, leaf_axes, some)
        return small._replace(optim_state=jax.tree.unflatten(structure, new)), loss

    def _check_rows_can_be_found(self, found: RowParams) -> None:
        for plate, rows in found.rows.items():
            size = found.sizes[plate]
            joint = joint_over(self._svi.guide, plate)
            if joint is not None and len(rows) < size:
                name = joint.__class__.__name__
                raise ValueError(
                    f"{name} is one joint distribution over all rows of plate "
                    f"'{plate}' (size {size}), so that a step cannot be that of the "
                    f"{len(rows)} rows of a batch alone. Use AutoNormal, or leave "
                    "rowwise out."
                )
        loss = self._svi.loss
        if isinstance(loss, RenyiELBO) or getattr(loss, "num_particles", 1) == 1:
            return
        for plate in found.drawn.intersection(found.plates()):
            raise ValueError(
                f"Each of the {loss.num_particles} particles draws rows of its own "
                f"from plate '{plate}' (size {found.sizes[plate]}), and rowwise needs "
                f"those of one batch. Pin them: indices={{'{plate}': rows}}."
            )


def _nan_like(tree: Any) -> Any:
    def nan_like(leaf: jax.Array) -> jax.Array:
        inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
        return jnp.full_like(leaf, jnp.nan) if inexact else leaf

    return jax.tree.map(nan_like, tree)


def _index(leaf: jax.Array, axes: Axes, rows: Mapping[str, jax.Array]) -> tuple:
    index: list[Any] = [slice(None)] * leaf.ndim
    plates = sorted(axes, key=axes.__getitem__)
    for plate, along in zip(
        plates, jnp.ix_(*[rows[plate] for plate in plates]), strict=True
    ):
        index[axes[plate]] = along
    return tuple(index)


def _take(leaf: jax.Array, axes: Axes, *, rows: Mapping[str, jax.Array]) -> jax.Array:
    """Take rows of a leaf, each plate's along its axis.

    A row number from the plate's size on is padding. The first row is taken there.
    """
    if not axes:
        return leaf
    real = {
        plate: jnp.where(rows[plate] < leaf.shape[axis], rows[plate], rows[plate][0])
        for plate, axis in axes.items()
    }
    some = leaf[_index(leaf, axes, real)]
    if _are_apart(axes):
        some = jnp.moveaxis(some, range(len(axes)), sorted(axes.values()))
    return some


def _put(
    leaf: jax.Array,
    axes: Axes,
    some: jax.Array,
    *,
    rows: Mapping[str, jax.Array],
) -> jax.Array:
    """Write rows of a leaf back, but no padding."""
    if not axes:
        return some
    if _are_apart(axes):
        some = jnp.moveaxis(some, sorted(axes.values()), range(len(axes)))
    return leaf.at[_index(leaf, axes, rows)].set(some, mode="drop")


def _are_apart(axes: Axes) -> bool:
    """Tell whether indexing puts these axes in front of all others."""
    return max(axes.values()) - min(axes.values()) >= len(axes)
