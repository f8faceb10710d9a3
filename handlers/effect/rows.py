"""The record of a plate's rows in one call: words, rules and checks.

Words, used everywhere in this library:

size
    How many rows a plate has: those of the whole data set.
subsample_size
    How many rows a plate takes in one call: those of the batch.
rows
    Which rows these are: indices into the plate, shape ``(subsample_size,)``.
pinned
    Said of rows that somebody chose: the model, a handler, a ``Minibatch``.
drawn
    Said of rows that the plate chose at random.
valid
    Said of the first rows of a padded batch, those that are not padding.

Rules, true everywhere:

1. Within a call everything with one entry per row of a plate uses the same rows:
   latents, parameters of guide and model, ``numpyro.subsample``, what the model
   indexes, what is replayed.
2. A value is either of all rows, in the plate's order, or of the batch, in the batch's
   order. Rows are taken from a value of all rows once, where it enters: a parameter,
   ``numpyro.subsample``, what ``substitute``, ``condition`` or ``do`` give to a site.
   Nothing is taken from a value of the batch: one that is replayed, or that comes in
   one dict with the plate's rows. Where a value could be either, it is an error.
3. Pinned rows that are not exactly ``arange(size)`` are a batch like any other, also
   when there are as many of them as the plate has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import internals
from .internals import Tracer


class RowsError(ValueError):
    """Rows, or a number of them, that a plate cannot give."""


@dataclass(frozen=True)
class PlateRows:
    """The rows that a plate takes in one call.

    Attributes
    ----------
    name : str
        The plate's name, as handlers around the call see it.
    size : int
        How many rows the plate has.
    argument : int or None
        The ``subsample_size`` that the model gives to ``numpyro.plate``; None if none.
    rows : jax.Array or None
        The indices, shape ``(subsample_size,)``; None until the plate has drawn them.
    pinned_by : str or None
        Who pinned the rows: "model", "guide", or "handler", which stands around the
        whole call; None where the plate takes all rows or draws.
    drawn : bool
        Whether the plate has drawn the rows.
    gathers : bool
        Whether parameters with ``event_dim`` or ``numpyro.subsample`` stand in the
        plate, as far as the model was read.
    """

    name: str
    size: int
    argument: int | None
    rows: jax.Array | None = None
    pinned_by: str | None = None
    drawn: bool = False
    gathers: bool = False

    @property
    def subsample_size(self) -> int:
        """How many rows the plate takes."""
        if self.rows is not None:
            return self.rows.shape[0]
        return self.size if self.argument is None else self.argument

    @property
    def takes_all(self) -> bool:
        """Whether the plate takes all rows in order, unless somebody pins others."""
        return self.argument is None or self.argument == self.size

    @property
    def in_order(self) -> bool:
        """Whether the rows are known to be all of the plate's, in its order."""
        if self.rows is None:
            return self.takes_all
        return all_in_order(self.rows, self.size)

    @property
    def is_reordered(self) -> bool:
        """Whether as many rows are pinned as the plate has, and not in its order."""
        return self.subsample_size == self.size and not self.in_order


def all_in_order(rows: jax.Array, size: int) -> bool:
    """Tell whether `rows` are known to be ``arange(size)``."""
    if rows.shape[0] != size:
        return False
    if internals.is_default(rows, size):
        return True
    return not isinstance(rows, Tracer) and np.array_equal(rows, np.arange(size))


def take_rows(value: Any, rows: jax.Array, size: int, axis: int) -> Any:
    """Take `rows` of a value that has all `size` of them at `axis`; else leave it."""
    shape = jnp.shape(value)
    if len(shape) < -axis or shape[axis] == 1 or shape[axis] != size:
        return value
    if all_in_order(rows, size):
        return value
    return jnp.take(value, rows, axis)


def take_pinned_rows(plate: Any, msg: dict[str, Any]) -> None:
    """Take rows from a parameter or ``numpyro.subsample`` where NumPyro leaves them.

    A plate takes rows from these only if it takes fewer than it has. See rule 3.
    """
    event_dim = msg["kwargs"].get("event_dim") if "kwargs" in msg else None
    if msg["type"] not in ("param", "subsample") or event_dim is None:
        return
    if plate.subsample_size == plate.size and plate.dim is not None:
        rows = internals.rows_of(plate)
        msg["value"] = take_rows(msg["value"], rows, plate.size, plate.dim - event_dim)


def as_rows(name: str, size: int, rows: Any) -> jax.Array:
    """Return pinned rows as an array of JAX's integers, once they have been checked."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(rows)):
        rows = jnp.asarray(rows)
    check_rows(name, size, rows)
    return as_integers(rows)


def as_integers(rows: Any) -> jax.Array:
    """Return rows as an array of JAX's integers, if they are integers.

    A size that is compared in a narrow type wraps.
    """
    if not isinstance(rows, jax.Array):
        rows = jnp.asarray(rows)
    narrow = jnp.issubdtype(rows.dtype, jnp.integer) and rows.dtype != int
    return rows.astype(int) if narrow else rows


def check_rows(name: str, size: int | None, rows: Any) -> None:
    """Refuse pinned rows that are no indices into a plate of `size` rows.

    Where the size is not known, it is None.

    Raises
    ------
    ValueError
        If they are not a vector of integers, not between 1 and `size` many, or,
        where their values are known, not between 0 and `size` - 1.
    """
    if not isinstance(rows, Tracer):
        # On NumPy's side, as JAX traces what is computed from a known array, too.
        rows = np.asarray(rows)
    plate = f"plate '{name}'" + ("" if size is None else f" (size {size})")
    if rows.ndim != 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
        remedies = {"b": " Give np.flatnonzero(mask).", "f": " Give rows.astype(int)."}
        raise RowsError(
            f"The rows pinned for {plate} must be a vector of integers, but have shape "
            f"{rows.shape} and type {rows.dtype}.{remedies.get(rows.dtype.kind, '')}"
        )
    if size is not None:
        check_subsample_size(name, size, rows.shape[0])
    if isinstance(rows, Tracer):
        return
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or (size is not None and high >= size):
        where = "below 0" if size is None else f"outside 0 to {size - 1}"
        raise RowsError(
            f"The rows pinned for {plate} run from {low} to {high}, {where}. JAX would "
            "clamp them to other rows, or count them from the end; pin indices into "
            "the whole plate. If rows have come in, the plate needs its new size, and "
            "the method grow of SubsampleSVI; to predict rows that the plate does not "
            "have, name it in unseen=, and give None for its rows."
        )


def check_subsample_size(name: str, size: int, subsample_size: Any) -> None:
    """Refuse a number of rows that a plate of `size` rows cannot give."""
    if isinstance(subsample_size, Tracer):
        raise RowsError(
            f"Plate '{name}' (size {size}) is asked for a number of rows that is "
            "traced, and shapes have to be known. Leave subsample_size out, so that "
            "the rows of the batch decide; or take the length of an array of the "
            "batch, or an argument that is static: SubsampleSVI(..., count=...)."
        )
    if 1 <= subsample_size <= size:
        return
    if subsample_size < 1:
        remedy = "Give every batch at least one row, or skip the step that has none."
    else:
        remedy = (
            "Make size the number of rows of the whole data set and subsample_size "
            f"that of the batch. If the batch is padded, give a capacity of {size} or "
            f"less, or minibatch(..., size={size}), where padding ends."
        )
    raise RowsError(
        f"Plate '{name}' (size {size}) is asked for a subsample of {subsample_size} "
        f"rows; it must be between 1 and {size}. {remedy}"
    )


def check_size(name: str, of_model: int, of_guide: int) -> None:
    """Refuse a plate whose full size has changed since the guide was made."""
    if of_model == of_guide:
        return
    more = (
        " If rows have come in, call the method grow of SubsampleSVI."
        if of_model > of_guide
        else " A plate cannot lose rows: leave old ones out of the batches instead."
    )
    raise ValueError(
        f"Give plate '{name}' the number of rows of the whole data set, here "
        f"{of_guide}: numpyro.plate('{name}', {of_guide}, subsample_size=...). In the "
        f"model it has size {of_model}, but the guide's parameters were made for "
        f"{of_guide} rows.{more} For other data, build a new guide and call svi.init "
        "again."
    )
