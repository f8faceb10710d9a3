"""Steps on the batch's rows of parameters and optimizer state, instead of on all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import constraints
from numpyro.handlers import substitute
from numpyro.infer import SVI, RenyiELBO
from numpyro.infer.svi import SVIState

from ..batches.minibatch import Minibatch
from ..effect.guides import joint_over
from ..effect.internals import Handler
from ..effect.rows import all_in_order
from .optimizers import Axes, axes_of_leaves, check_rows_are_apart


class RowAxes(Handler):
    """Learns, while a loss is computed, in which axes parameters hold rows of plates.

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
        if before != axes and not self._every_plate:
            (plate, axis), *_ = before.items() ^ axes.items()
            if plate in before and plate in axes:
                what = f"in axis {before[plate]} and in axis {axes[plate]}"
                remedy = "Make two parameters of it"
            else:
                what = f"in axis {axis}, and is read outside of the plate too"
                remedy = "Read it inside the plate only"
            raise ValueError(
                f"Parameter '{name}' holds rows of plate '{plate}' (size "
                f"{self.sizes[plate]}) {what}, so that the rows of a batch are not all "
                f"that a step changes. {remedy}, or leave rowwise out."
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


class _TakeFromUnique(Handler):
    """Takes the rows of a batch from parameters that hold each of them once.

    It stands outside of the plates, whose turn comes later.

    Parameters
    ----------
    axes : dict of str to dict
        For each parameter with rows, the axes of the plates.
    places : dict of str to jax.Array
        For each plate, where the parameters hold the rows of the batch.
    """

    def __init__(self, axes: Mapping[str, Axes], places: Mapping[str, jax.Array]):
        super().__init__()
        self._axes = axes
        self._places = places

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "param" or msg["name"] not in self._axes:
            return
        for plate, axis in self._axes[msg["name"]].items():
            msg["value"] = jnp.take(msg["value"], self._places[plate], axis)
        # The plates then find nothing to take.
        msg["kwargs"] = {**msg["kwargs"], "event_dim": None}


def rowwise_step(
    svi: SVI,
    step: Callable[[SVIState], tuple[SVIState, Any]],
    state: SVIState,
    batch: Minibatch,
) -> tuple[SVIState, Any]:
    """Take a step on the rows of parameters and optimizer state that a batch needs.

    It runs within the handlers of a step.

    Parameters
    ----------
    svi : numpyro.infer.SVI
        Whose step it is.
    step : callable
        The ordinary step on the batch, a function of the state.
    state : SVIState
        The state, with all rows.
    batch : Minibatch
        The batch. The loss of it is computed once more for what that tells of the
        parameters; in a compiled step nothing of it remains but the draw of the rows.

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
    with RowAxes() as found, substitute(data=state.mutable_state or {}):
        loss = SVI.evaluate(svi, state, *batch.args, **batch.kwargs)
    _check_rows_can_be_found(svi, found)
    sizes = {plate: found.sizes[plate] for plate in found.plates()}
    counts = {plate: len(found.rows[plate]) for plate in sizes}
    if counts == sizes and not sizes.keys() & batch.valid.keys():
        return step(state)
    of_plates = (svi.optim, state.optim_state, found.axes, sizes, counts)
    check_rows_are_apart(*of_plates)
    leaf_axes = axes_of_leaves(*of_plates)
    unique, places = {}, {}
    for plate, size in sizes.items():
        rows = found.rows[plate]
        if plate in batch.valid:
            # Row numbers from `size` on are padding.
            rows = jnp.where(jnp.arange(len(rows)) < batch.valid[plate], rows, size)
        # Once each, so that the gradients of a row that is there twice add up.
        unique[plate], places[plate] = jnp.unique(
            rows, return_inverse=True, size=len(rows), fill_value=size
        )
    leaves, structure = jax.tree.flatten(state.optim_state)
    indices = [_index(*pair, unique) for pair in zip(leaves, leaf_axes, strict=True)]
    some = [
        leaf.at[index].get(mode="clip") if index else leaf
        for leaf, index in zip(leaves, indices, strict=True)
    ]
    small = state._replace(optim_state=jax.tree.unflatten(structure, some))
    drawn = {plate: found.rows[plate] for plate in found.drawn.intersection(sizes)}
    a_real_row = jnp.any(jnp.array([unique[p][0] < n for p, n in sizes.items()]))
    with substitute(data=drawn), _TakeFromUnique(found.axes, places):
        # A branch is compiled apart from the taking and putting of rows, and so to the
        # last bit as the ordinary step is. Fused with them, it could round otherwise.
        # (A batch in which no row is real is invalid.)
        small, loss = jax.lax.cond(
            a_real_row, step, lambda small: _nan_like((small, loss)), small
        )
    new = [
        leaf.at[index].set(own, mode="drop") if index else own
        for leaf, index, own in zip(
            leaves, indices, jax.tree.leaves(small.optim_state), strict=True
        )
    ]
    return small._replace(optim_state=jax.tree.unflatten(structure, new)), loss


def _check_rows_can_be_found(svi: SVI, found: RowAxes) -> None:
    for plate, rows in found.rows.items():
        size = found.sizes[plate]
        joint = joint_over(svi.guide, plate)
        if joint is not None and len(rows) < size:
            name = joint.__class__.__name__
            raise ValueError(
                f"{name} is one joint distribution over all rows of plate "
                f"'{plate}' (size {size}), so that a step cannot be that of the "
                f"{len(rows)} rows of a batch alone. Use AutoNormal, or leave "
                "rowwise out."
            )
    loss = svi.loss
    if isinstance(loss, RenyiELBO) or getattr(loss, "num_particles", 1) == 1:
        return
    for plate in found.drawn.intersection(found.plates()):
        raise ValueError(
            f"Each of the {loss.num_particles} particles draws rows of its own "
            f"from plate '{plate}' (size {found.sizes[plate]}), and rowwise needs "
            f"those of one batch. Pin them: minibatch(..., rows={{'{plate}': rows}})."
        )


def _nan_like(tree: Any) -> Any:
    def nan_like(leaf: jax.Array) -> jax.Array:
        inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
        return jnp.full_like(leaf, jnp.nan) if inexact else leaf

    return jax.tree.map(nan_like, tree)


def _index(leaf: jax.Array, axes: Axes, rows: Mapping[str, jax.Array]) -> tuple:
    """Return the index of rows, each plate's along its axis; empty without rows."""
    if not axes:
        return ()
    of_axes = {axis: rows[plate] for plate, axis in axes.items()}
    first, last = min(of_axes), max(of_axes)
    # Arrays that stand next to each other leave all axes where they are.
    between = [
        of_axes.get(i, jnp.arange(leaf.shape[i])) for i in range(first, last + 1)
    ]
    return (slice(None),) * first + jnp.ix_(*between)
