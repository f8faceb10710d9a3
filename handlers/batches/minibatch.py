"""One value for all that a step is told: the model's arguments, rows and counts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten

from ..effect.internals import Tracer
from ..effect.rows import check_rows

Capacity = int | Callable[[int], int]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Minibatch:
    """All that a step of ``SubsampleSVI`` is told of its batch; ``minibatch`` makes it.

    It is a pytree, so it goes through ``jax.jit``, and through ``jax.lax.scan`` when
    stacked. It can be pickled, so the worker processes of a loader can make it.

    Attributes
    ----------
    args, kwargs : tuple, dict
        What the model is called with.
    rows : dict of str to array or None
        For each plate, the rows that the batch holds, shape ``(capacity,)``. None
        where the latents of the plate need none.
    counts : dict of str to int
        For each plate, how many of its rows, the first ones, are real.
    padded : tuple of str
        The plates that are padded to a capacity.
    """

    args: tuple
    kwargs: dict[str, Any]
    rows: Mapping[str, Any]
    counts: dict[str, Any]
    padded: tuple[str, ...] = field(metadata={"static": True})

    @property
    def pinned(self) -> dict[str, Any]:
        """The rows of the plates that have some, which pins them."""
        return {plate: rows for plate, rows in self.rows.items() if rows is not None}

    @property
    def valid(self) -> dict[str, Any]:
        """The counts of the plates that are padded, which have padding."""
        return {plate: self.counts[plate] for plate in self.padded}


def minibatch(
    *args: Any,
    rows: Mapping[str, Any],
    along: Mapping[str, Any] | None = None,
    capacity: Capacity | Mapping[str, Capacity] | None = None,
    size: int | Mapping[str, int] | None = None,
    **kwargs: Any,
) -> Minibatch:
    """Put the model's arguments, the rows and the counts of a batch into one value.

    Every method of ``SubsampleSVI`` takes it in place of arguments, ``indices`` and
    ``valid``. Call it on the host, outside of compiled functions.

    Parameters
    ----------
    *args, **kwargs
        What the model is called with. Each is an array of shape ``(count, ...)``, a
        number, or a tree of these in tuples and dicts. Whatever NumPy takes as an
        array is one: also a tensor of torch, a column of pandas, or a list of numbers.
        Numbers become arrays too, so that a compiled step takes new ones.
        A model's argument called `rows`, `along`, `capacity` or `size` is given by
        position.
    rows : dict of str to array or None
        For each plate, the rows that the batch holds: integers, shape ``(count,)``.
        Rows may occur twice. None stands for rows that no latent needs, as with
        amortised guides. Arguments run along the plate that is named here, if it is
        the only one.
    along : dict of str to names, optional
        For other plates, the arguments that run along them: the name or position of
        one, or a tuple of several. Such a plate has a count of its own, as the ratings
        of the batch's students have.
    capacity : int, dict of str to int, or callable, optional
        How many rows to pad to, by repeating the last one: for all plates or for each
        by name. A callable gets the count and returns the capacity;
        ``lambda count: 1 << (count - 1).bit_length()`` takes the next power of two.
        Plates without a capacity are left as they are. A capacity must not exceed the
        rows of the plate.
    size : int or dict of str to int, optional
        The full number of rows of the plates in `rows`, for all or for each by name.
        Rows are then checked against it here, rather than by the step.

    Returns
    -------
    Minibatch
        With one structure for all batches of one capacity, so that a step is compiled
        once for them.

    Raises
    ------
    ValueError
        If an argument is not of numbers, or runs along no known plate; if rows are not
        a vector of integers, are negative or beyond `size`; if a plate has no row, or
        its arguments and rows differ in length; if a capacity is no whole number or
        smaller than the count; if `along`, `capacity` or `size` name something that
        the batch lacks.

    Notes
    -----
    A list is one array. Put several arrays into a tuple or a dict.

    JAX arrays stay JAX arrays. They are padded on the host, where a new count compiles
    nothing.

    Examples
    --------
    >>> batch = minibatch(X[rows], y[rows], rows={"n": rows}, capacity=256, size=len(X))
    >>> state, loss = step(state, batch)

    Students, each with all ratings of theirs:

    >>> minibatch(
    ...     features[students],
    ...     y=y[places],
    ...     rows={"students": students},
    ...     along={"ratings": "y"},
    ...     capacity={"students": 128, "ratings": 4000},
    ... )
    """
    arguments = dict([*enumerate(args), *kwargs.items()])
    plates = _plates(arguments, rows, along or {})
    for what, given, known in (
        ("capacity", capacity, {*rows, *plates.values()}),
        ("size", size, {*rows}),
    ):
        if isinstance(given, Mapping) and (unknown := sorted(given.keys() - known)):
            raise ValueError(
                f"{what} names {unknown}, but the plates of the batch are "
                f"{sorted(known)}."
            )
    lengths: dict[str, dict[str, int]] = {p: {} for p in (*rows, *plates.values())}
    vectors = {}
    for plate, own in rows.items():
        if own is not None:
            full = size.get(plate) if isinstance(size, Mapping) else size
            own = _rows(plate, own, full)
            lengths[plate]["rows"] = len(own)
        vectors[plate] = own
    for argument, given in arguments.items():
        leaves, structure = tree_flatten_with_path(given, is_leaf=_is_list)
        arrays = []
        for path, leaf in leaves:
            label = f"argument {argument!r}{keystr(path)}"
            array = as_array(label, leaf)
            arrays.append(array)
            if array.ndim == 0:
                continue
            if argument not in plates:
                raise ValueError(
                    f"The batch holds rows of {sorted(rows) or 'no plate'}, so `along` "
                    f"must say which plate {label}, of shape {array.shape}, runs along."
                )
            lengths[plates[argument]][label] = len(array)
        arguments[argument] = tree_unflatten(structure, arrays)
    counts = {plate: _count(plate, own) for plate, own in lengths.items()}
    capacities = {plate: _capacity(plate, n, capacity) for plate, n in counts.items()}

    def padded(plate: str | None, tree: Any) -> Any:
        room = None if plate is None else capacities[plate]
        if room is None:
            return tree
        return jax.tree.map(lambda a: repeat_last_row(a, room) if a.ndim else a, tree)

    made = {name: padded(plates.get(name), tree) for name, tree in arguments.items()}
    return Minibatch(
        args=tuple(made[position] for position in range(len(args))),
        kwargs={name: made[name] for name in kwargs},
        # JAX sorts the keys of a plain dict.
        rows=OrderedDict((plate, padded(plate, own)) for plate, own in vectors.items()),
        counts={plate: np.int32(count) for plate, count in counts.items()},
        padded=tuple(plate for plate, room in capacities.items() if room is not None),
    )


def as_minibatch(item: Any) -> Minibatch:
    """Take what a loader yields: a batch, or the arguments, or a single one.

    Plates draw the rows of what is no batch yet.
    """
    if isinstance(item, Minibatch):
        return item
    # A named tuple is one argument.
    args = item if type(item) in (tuple, list) else (item,)
    leaves, structure = tree_flatten_with_path(tuple(args), is_leaf=_is_list)
    arrays = [as_array(f"argument {keystr(path)}", leaf) for path, leaf in leaves]
    return Minibatch(tree_unflatten(structure, arrays), {}, {}, {}, padded=())


def _plates(
    arguments: Mapping[int | str, Any],
    rows: Mapping[str, Any],
    along: Mapping[str, Any],
) -> dict[int | str, str]:
    """Return the plate that each argument runs along."""
    plates = dict.fromkeys(arguments, next(iter(rows))) if len(rows) == 1 else {}
    named: dict[int | str, str] = {}
    for plate, names in along.items():
        for name in names if isinstance(names, tuple | list) else (names,):
            if name not in arguments:
                raise ValueError(
                    f"along['{plate}'] names {name!r}, but the arguments of the batch "
                    f"are {list(arguments)}. Give keywords, or positions from 0."
                )
            if named.setdefault(name, plate) != plate:
                raise ValueError(
                    f"`along` lets argument {name!r} run along '{named[name]}' and "
                    f"'{plate}'. Name it once."
                )
    return plates | named


def _is_list(tree: Any) -> bool:
    return isinstance(tree, list)


def _rows(plate: str, rows: Any, size: int | None) -> np.ndarray | jax.Array:
    """Check the rows of a plate, as far as they go without its arguments."""
    vector = as_array(f"rows of plate '{plate}'", rows)
    if vector.size:
        check_rows(plate, size, vector)
    return vector


def _count(plate: str, lengths: Mapping[str, int]) -> int:
    """Return the one length of all that runs along a plate."""
    if not lengths:
        raise ValueError(
            f"Plate '{plate}' has neither rows nor an array that runs along it, so the "
            "batch cannot tell its count."
        )
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"What runs along plate '{plate}' must have one length, but has {lengths}. "
            "Name in `along` what runs along another plate."
        )
    count = next(iter(lengths.values()))
    if count < 1:
        raise ValueError(
            f"The batch holds no row of plate '{plate}'. Skip steps that have none."
        )
    return count


def _capacity(plate: str, count: int, given: Any) -> int | None:
    """Return how many rows to pad a plate to."""
    capacity = given.get(plate) if isinstance(given, Mapping) else given
    if callable(capacity):
        capacity = capacity(count)
    if capacity is None:
        return None
    return checked_capacity(capacity, count, f" of plate '{plate}'")


def checked_capacity(capacity: Any, count: int, of_plate: str = "") -> int:
    """Return the capacity, unless a batch of `count` rows cannot be padded to it."""
    if isinstance(capacity, bool) or not isinstance(capacity, int | np.integer):
        raise ValueError(
            f"The capacity{of_plate} must be a whole number, not {capacity!r}."
        )
    if capacity < count:
        raise ValueError(
            f"The batch has {count} rows{of_plate}, more than the capacity of "
            f"{capacity}. Give a capacity of at least that of the largest batch."
        )
    return int(capacity)


def as_array(label: str, leaf: Any) -> np.ndarray | jax.Array:
    """Take a leaf as an array of numbers."""
    try:
        array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    # Their type depends on the library that made the leaf.
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"NumPy cannot take {label} as an array: {error}") from error
    numbers = (np.number, np.bool_, jax.dtypes.extended)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in numbers):
        raise ValueError(
            f"{label} is of type {type(leaf).__name__} and holds {array.dtype}, but a "
            "step takes numbers only. Encode it as numbers, or give the model what is "
            "the same in all batches with functools.partial."
        )
    return array


def repeat_last_row(
    array: np.ndarray | jax.Array, capacity: int
) -> np.ndarray | jax.Array:
    """Pad an array of shape ``(count, ...)`` to ``(capacity, ...)``."""
    rows = np.minimum(np.arange(capacity), len(array) - 1)
    if (
        isinstance(array, np.ndarray | Tracer)
        # Typed keys have no NumPy form.
        or jnp.issubdtype(array.dtype, jax.dtypes.extended)
    ):
        return array[rows]
    return jnp.asarray(np.asarray(array)[rows])
