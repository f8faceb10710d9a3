"""One value for all that a step is told: the model's arguments, rows and counts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

from ..effect.internals import Tracer
from ..effect.rows import check_rows, check_subsample_size
from ..effect.warn import warn

Capacity = int | Literal["powers of two"]
POWERS_OF_TWO = "powers of two"
STATIC = (bool, str)
ARRAYS = (np.ndarray, jax.Array)
# The types of NumPy that a step takes without a look at the values.
PLAIN = frozenset("?bBhHiIefdFD")
Given = TypeVar("Given")
Label = Callable[[], str]


@dataclass(frozen=True, eq=False)
class Minibatch:
    """A batch: the model's arguments, row indices, and numbers of real rows.

    ``minibatch`` and ``RaggedGroups`` make it. It is a pytree, so it goes through
    ``jax.jit``, and through ``jax.lax.scan`` when stacked. It can be pickled, so the
    worker processes of a loader can make it.

    Attributes
    ----------
    args, kwargs : tuple, dict
        What the model is called with. Arrays and numbers are leaves of the pytree.
        True, False, None and strings belong to its structure: a compiled step takes
        them as they are, and is compiled anew for others.
    rows : dict of str to array or None
        For each plate, the rows that the batch holds, shape ``(capacity,)``, of JAX's
        integer type. None where the latents of the plate need none.
    counts : dict of str to int
        For each plate, how many of its rows, the first ones, are real.
    padded : tuple of str
        The plates that are padded to a capacity.
    axes : tuple
        For each array of `args` and `kwargs`, the plates that it runs along, each with
        the axis.
    pinned : dict of str to array
        The entries of `rows` that are not None.
    valid : dict of str to int
        The entries of `counts` for the plates in `padded`.

    Examples
    --------
    >>> batch = minibatch(X[:3], rows={"people": np.arange(3)}, capacity=4)
    >>> batch.rows["people"].tolist()  # the last one is padding
    [0, 1, 2, 2]
    >>> batch.padded, int(batch.valid["people"])
    (('people',), 3)
    """

    args: tuple
    kwargs: dict[str, Any]
    rows: Mapping[str, Any]
    counts: dict[str, Any]
    padded: tuple[str, ...]
    axes: tuple[tuple[tuple[str, int], ...], ...] = ()

    @property
    def pinned(self) -> dict[str, Any]:
        """The rows of the plates that have some."""
        return {plate: rows for plate, rows in self.rows.items() if rows is not None}

    @property
    def valid(self) -> dict[str, Any]:
        """The counts of the plates that are padded."""
        return {plate: self.counts[plate] for plate in self.padded}

    # A model that is given a batch as it is asks it what it would ask an array.

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in self.__dataclass_fields__:
            raise AttributeError(name)
        raise AttributeError(f"A Minibatch has no attribute {name!r}. {_NOT_AN_ARRAY}")

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"A Minibatch is not an array. {_NOT_AN_ARRAY}")

    __len__ = __getitem__ = __iter__ = __array__ = __jax_array__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse


_NOT_AN_ARRAY = (
    "SubsampleSVI takes it apart, if it is all that follows the state: "
    "svi.update(state, batch). SVI hands it to the model as it is. Use "
    "SubsampleSVI(model, guide, optim, loss), or give SVI the arguments of the model."
)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Static:
    """A part of a batch that JAX takes as it is."""

    value: bool | str


def _parts(batch: Minibatch) -> tuple[tuple, tuple]:
    """Split a batch into what JAX traces, and what belongs to the structure."""
    leaves, structure = jax.tree.flatten((batch.args, batch.kwargs))
    if any(isinstance(leaf, STATIC) for leaf in leaves):
        leaves = [_Static(v) if isinstance(v, STATIC) else v for v in leaves]
        args, kwargs = jax.tree.unflatten(structure, leaves)
    else:
        args, kwargs = batch.args, batch.kwargs
    return (args, kwargs, batch.rows, batch.counts), (batch.padded, batch.axes)


def _parts_with_keys(batch: Minibatch) -> tuple[tuple, tuple]:
    parts, static = _parts(batch)
    names = map(GetAttrKey, ("args", "kwargs", "rows", "counts"))
    return tuple(zip(names, parts, strict=True)), static


def _joined(static: tuple, parts: Iterable[Any]) -> Minibatch:
    args, kwargs, rows, counts = parts

    def is_static(tree: Any) -> bool:
        return isinstance(tree, _Static)

    args, kwargs = jax.tree.map(
        lambda leaf: leaf.value if is_static(leaf) else leaf,
        (args, kwargs),
        is_leaf=is_static,
    )
    return Minibatch(args, kwargs, rows, counts, *static)


jax.tree_util.register_pytree_with_keys(Minibatch, _parts_with_keys, _joined, _parts)


def minibatch(
    *args: Any,
    rows: Mapping[str, Any],
    along: Mapping[str, Any] | None = None,
    capacity: Capacity | Mapping[str, Capacity] | None = None,
    size: int | Mapping[str, int] | None = None,
    **kwargs: Any,
) -> Minibatch:
    """Bundle a batch: the model's arguments, row indices, and numbers of real rows.

    Every method of ``SubsampleSVI`` takes the bundle in place of the model's arguments.
    Inside of a compiled function, where values are not known, shapes are checked.

    Parameters
    ----------
    *args, **kwargs
        What the model is called with. Each is an array of shape ``(count, ...)``, a
        number, or a tree of these in tuples and dicts. Whatever NumPy takes as an
        array is one: also a tensor of torch, a column of pandas, or a list of numbers.
        Numbers become arrays too, so that a compiled step takes new ones. True, False,
        None and strings stay what they are, and a compiled step is compiled anew for
        others.
        A model's argument called `rows`, `along`, `capacity` or `size` is given by
        position.
    rows : dict of str to array or None
        For each plate, the rows that the batch holds: integers from 0, shape
        ``(count,)``. Rows may occur twice. None stands for rows that no latent needs,
        as with amortised guides. If one plate is named here, arguments run along it
        with their first axis.
    along : dict of str to names, optional
        For each plate, the arguments that run along it with their first axis: the name
        or position of one, or a tuple of several. For other axes, a dict of arguments
        to axes: ``{"items": {"ratings": 1}}``. An argument that is named here runs
        along the plates that name it and no other. Plates that are not in `rows` have
        a count of their own, as the ratings of the batch's students have.
    capacity : int, "powers of two", or dict of str to these, optional
        The step in which the padded sizes of batches grow, for all plates or for each
        by name. A batch is padded to the next multiple of a number, or to the next
        power of two, by repeating its last row; but not up to the plate's `size`. So a
        number that no batch exceeds gives one size to all of them, but for a batch of
        all rows. Plates without a capacity are left as they are.
    size : int or dict of str to int, optional
        The full number of rows of the plates in `rows`, for all or for each by name.
        Rows are then checked against it here, rather than by the step. Padding ends
        one row before, so that an array of all rows, which the model should have
        indexed, does not fit by chance.

    Returns
    -------
    Minibatch
        With one structure for all batches of one padded size, so that a step is
        compiled once for them.

    Raises
    ------
    ValueError
        If an argument is not of numbers, is a masked array, holds integers that JAX
        would cut, or runs along no known plate; if it lacks an axis, or two plates run
        along one; if rows are not a vector of integers, are negative or beyond `size`;
        if a plate has no row, or what runs along it differs in length; if a capacity
        is none; if `along`, `capacity` or `size` name something that the batch lacks.

    Warns
    -----
    UserWarning
        Once for each plate and place, if a batch exceeds a capacity that is a number.

    Notes
    -----
    A list is one array. Put several arrays into a tuple or a dict.

    JAX arrays stay JAX arrays. They are padded on the host, where a new count compiles
    nothing.

    Examples
    --------
    >>> rows = np.array([7, 3, 12])
    >>> batch = minibatch(X[rows], y[rows], rows={"people": rows}, capacity=32, size=N)
    >>> batch.args[0].shape, batch.counts
    ((32, 2), {'people': np.int32(3)})
    >>> state, loss = svi.update(state, batch)

    A block of a table, whose columns are rows of a plate too:

    >>> table, users, items = np.zeros((50, 20)), np.array([3, 48, 7]), np.array([2, 9])
    >>> batch = minibatch(
    ...     table[np.ix_(users, items)],
    ...     rows={"users": users, "items": items},
    ...     along={"users": 0, "items": {0: 1}},
    ...     capacity={"users": 8, "items": 4},
    ... )
    >>> batch.args[0].shape
    (8, 4)

    Several series, with time in front:

    >>> batch = minibatch(
    ...     np.zeros((99, 3)), rows={"series": users}, along={"series": {0: -1}}
    ... )

    For groups, each with all of its members, see ``RaggedGroups``.
    """
    return batch_of(args, kwargs, rows, along, capacity, size)


def batch_of(
    args: tuple,
    kwargs: Mapping[str, Any],
    rows: Mapping[str, Any],
    along: Mapping[str, Any] | None,
    capacity: Any,
    size: Any,
) -> Minibatch:
    """Make a batch, for arguments of the model of any name: see ``minibatch``."""
    if not isinstance(rows, Mapping):
        raise ValueError(
            "rows must be a dict with plates for keys, such as {'people': rows}, not "
            f"{type(rows).__name__}."
        )
    arguments: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
    along = along or {}
    lengths: dict[str, list[tuple[Label, int]]] = {p: [] for p in (*rows, *along)}
    capacities = _by_plate("capacity", capacity, lengths)
    sizes = _by_plate("size", size, rows)

    pinned: dict[str, Any] = {}
    for plate, own in rows.items():
        pinned[plate] = None if own is None else as_rows(plate, own, sizes.get(plate))
        if own is not None:
            lengths[plate].append((lambda: "rows", pinned[plate].shape[0]))

    axes = _axes(arguments, rows, along)
    trees = tuple(arguments.values())
    leaves, structure = jax.tree.flatten(trees, is_leaf=_is_list)
    names = [
        name
        for name, tree in zip(arguments, structure.children(), strict=True)
        for _ in range(tree.num_leaves)
    ]
    plates = []
    for number, (name, given) in enumerate(zip(names, leaves, strict=True)):
        label = partial(_label, name, trees, number)
        leaves[number] = leaf = as_leaf(given, label)
        plates.append(_plates(leaf, axes.get(name), rows, label))
        for plate, axis in plates[-1]:
            lengths[plate].append((label, leaf.shape[axis]))

    counts = {plate: _count(plate, found) for plate, found in lengths.items()}
    rooms = {
        plate: _room(plate, count, capacities.get(plate), sizes.get(plate))
        for plate, count in counts.items()
    }
    for number, own_plates in enumerate(plates):
        for plate, axis in own_plates:
            leaves[number] = _padded(leaves[number], axis, rooms[plate])
    made = jax.tree.unflatten(structure, leaves)
    located = zip(names, plates, strict=True)
    integer = integer_type()
    return Minibatch(
        args=made[: len(args)],
        kwargs=dict(zip(kwargs, made[len(args) :], strict=True)),
        # JAX sorts the keys of a plain dict.
        rows=OrderedDict(
            (plate, None if own is None else _padded(own, 0, rooms[plate]))
            for plate, own in pinned.items()
        ),
        counts={plate: integer(count) for plate, count in counts.items()},
        padded=tuple(plate for plate in counts if capacities.get(plate) is not None),
        axes=tuple(tuple(own) for _, own in sorted(located, key=_as_jax_does)),
    )


def as_minibatch(item: Any) -> Minibatch:
    """Take what a loader yields: a batch, or the arguments, or a single one.

    Plates draw the rows of what is no batch yet.
    """
    if isinstance(item, Minibatch):
        return item
    # A named tuple is one argument.
    args = tuple(item) if type(item) in (tuple, list) else (item,)
    leaves, structure = jax.tree.flatten(args, is_leaf=_is_list)
    for number, leaf in enumerate(leaves):
        leaves[number] = as_leaf(leaf, partial(_label, None, args, number))
    return Minibatch(jax.tree.unflatten(structure, leaves), {}, {}, {}, padded=())


def as_leaf(given: Any, label: Label) -> Any:
    """Take a leaf as an array of numbers, or as it is."""
    if type(given) is np.ndarray and given.dtype.char in PLAIN:
        return given
    if isinstance(given, STATIC):
        return given
    if isinstance(given, np.ma.MaskedArray):
        raise ValueError(
            f"{label()} is a masked array, whose mask a step would not see. Give "
            "array.filled(0), and array.mask as an argument of its own, for "
            "handlers.mask."
        )
    try:
        array = given if isinstance(given, ARRAYS) else np.asarray(given)
    # Their type depends on the library that made the leaf.
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"NumPy cannot take {label()} as an array: {error}") from error
    kind = getattr(array.dtype, "kind", "")  # keys have none
    if kind in ("i", "u"):
        if array.dtype.itemsize == 8 and integer_type() is np.int32:
            _check_fit(array, np.int32 if kind == "i" else np.uint32, label)
    elif kind not in ("f", "b", "c") and not any(
        jnp.issubdtype(array.dtype, kind) for kind in (np.number, jax.dtypes.extended)
    ):
        raise ValueError(
            f"{label()} is of type {type(given).__name__} and holds {array.dtype}, but "
            "a step takes numbers only. Encode it as numbers, or give the model what "
            "is the same in all batches with functools.partial."
        )
    return array


def integer_type() -> type[np.signedinteger]:
    """Return JAX's integer type."""
    return jax.dtypes.canonicalize_dtype(int).type


_limits = cache(np.iinfo)


def _check_fit(array: np.ndarray | jax.Array, dtype: Any, label: Label) -> None:
    """Refuse whole numbers that JAX would cut to a shorter type."""
    if isinstance(array, Tracer) or not array.size:
        return
    limits = _limits(dtype)
    for number in map(int, (array.min(), array.max()) if array.ndim else (array,)):
        if not limits.min <= number <= limits.max:
            raise ValueError(
                f"{label()} holds {number}, but JAX would cut it to {limits.dtype}. "
                "Number from 0, or call jax.config.update('jax_enable_x64', True)."
            )


def as_rows(plate: str, given: Any, size: int | None) -> np.ndarray | jax.Array:
    """Take the rows of a plate in JAX's integer type."""

    def label() -> str:
        return f"rows of plate '{plate}'"

    integer = integer_type()
    rows = given
    if not (type(given) is np.ndarray and _are_rows(given, size, integer)):
        rows = as_leaf(given, label)
        if isinstance(rows, STATIC):
            rows = np.asarray(rows)
        if rows.ndim != 1 or rows.size:
            check_rows(plate, size, rows)
        _check_fit(rows, integer, label)
    if isinstance(rows, np.ndarray | Tracer):
        return rows.astype(integer, copy=False)
    if rows.dtype == integer:
        return rows
    # On the host, where a new length compiles nothing.
    return jnp.asarray(np.asarray(rows).astype(integer))


def _are_rows(rows: np.ndarray, size: int | None, integer: type) -> bool:
    """Tell in one look at the rows whether there is nothing to say against them."""
    if rows.dtype.kind not in ("i", "u") or rows.ndim != 1 or not rows.size:
        return False
    if size is None:
        size = _limits(integer).max
    return len(rows) <= size and rows.min() >= 0 and rows.max() < size


def _axes(
    arguments: Mapping[int | str, Any],
    rows: Mapping[str, Any],
    along: Mapping[str, Any],
) -> dict[int | str, dict[str, int]]:
    """Return the plates that each argument runs along, and with which axes."""
    named: dict[int | str, dict[str, int]] = {}
    for plate, given in along.items():
        if not isinstance(given, Mapping):
            given = dict.fromkeys(
                given if isinstance(given, tuple | list) else [given], 0
            )
        for name, axis in given.items():
            if name not in arguments:
                raise ValueError(
                    f"along['{plate}'] names {name!r}, but the arguments of the batch "
                    f"are {list(arguments)}. Give keywords, or positions from 0."
                )
            if isinstance(axis, bool) or not isinstance(axis, int):
                raise ValueError(
                    f"along['{plate}'] gives argument {name!r} the axis {axis!r}, not "
                    "a whole number."
                )
            named.setdefault(name, {})[plate] = axis
    if len(rows) != 1:
        return named
    return dict.fromkeys(arguments, dict.fromkeys(rows, 0)) | named


def _plates(
    leaf: Any, axes: Mapping[str, int] | None, rows: Mapping[str, Any], label: Label
) -> list[tuple[str, int]]:
    """Return the plates that an array runs along, and with which axes, from 0."""
    if isinstance(leaf, STATIC) or not leaf.ndim:
        return []
    if axes is None:
        raise ValueError(
            f"The batch holds rows of {sorted(rows) or 'no plate'}, so `along` must "
            f"say which plate {label()}, of shape {leaf.shape}, runs along."
        )
    if len(axes) == 1 and 0 in axes.values():
        return list(axes.items())
    plates: dict[int, str] = {}
    for plate, given in axes.items():
        axis = given + leaf.ndim if given < 0 else given
        if not 0 <= axis < leaf.ndim:
            raise ValueError(
                f"{label()} has shape {leaf.shape}, and so no axis {given} to run "
                f"along plate '{plate}' with."
            )
        if axis in plates:
            raise ValueError(
                f"`along` lets axis {axis} of {label()} run along '{plates[axis]}' and "
                f"'{plate}'. Give one of them another axis, as in "
                f"{{'{plate}': {{argument: 1}}}}."
            )
        plates[axis] = plate
    return [(plate, axis) for axis, plate in plates.items()]


def _as_jax_does(named: tuple[int | str, Any]) -> tuple[bool, int | str]:
    """Order leaves as those of a batch: positions, then keywords by their name."""
    name, _ = named
    return isinstance(name, str), name


def _is_list(tree: Any) -> bool:
    return isinstance(tree, list)


def _label(name: int | str | None, trees: tuple, number: int) -> str:
    """Name the leaf of this number of all arguments."""
    paths, _ = tree_flatten_with_path(trees, is_leaf=_is_list)
    argument, *path = paths[number][0]
    return f"argument {argument.idx if name is None else name!r}{keystr(tuple(path))}"


def _by_plate(what: str, given: Any, plates: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return by plate what is given for all plates or for each by name."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return dict.fromkeys(plates, given)
    if unknown := sorted(given.keys() - plates.keys()):
        raise ValueError(
            f"{what} names {unknown}, but the plates of the batch are {sorted(plates)}."
        )
    return given


def _count(plate: str, lengths: list[tuple[Label, int]]) -> int:
    """Return the one length of all that runs along a plate."""
    if not lengths:
        raise ValueError(
            f"Plate '{plate}' has neither rows nor an array that runs along it, so the "
            "batch cannot tell its count."
        )
    count = lengths[0][1]
    for _, length in lengths:
        if length != count:
            found = {label(): length for label, length in lengths}
            raise ValueError(
                f"What runs along plate '{plate}' must have one length, but has "
                f"{found}. Name in `along` what runs along another plate."
            )
    if count < 1:
        raise ValueError(
            f"The batch holds no row of plate '{plate}'. Skip steps that have none."
        )
    return count


def _room(plate: str, count: int, capacity: Any, size: int | None) -> int:
    """Return how many rows to pad a plate to."""
    if size is not None:
        check_subsample_size(plate, size, count)
    if capacity is None:
        return count
    if isinstance(capacity, str) and capacity == POWERS_OF_TWO:
        room = 1 << (count - 1).bit_length()
    elif (
        isinstance(capacity, int | np.integer)
        and not isinstance(capacity, bool)
        and capacity > 0
    ):
        room = int(capacity) * -(-count // int(capacity))
        if room > capacity:
            warn(
                f"A batch has more rows of plate '{plate}' than its capacity of "
                f"{capacity}, and is padded to the next multiple of it. A step is "
                "compiled for each multiple. For one compilation, give a capacity that "
                "no batch exceeds.",
                UserWarning,
            )
    else:
        raise ValueError(
            f"The capacity of plate '{plate}' must be a whole number above 0 or "
            f"'{POWERS_OF_TWO}', not {capacity!r}."
        )
    # Below the size, where an array of all rows that is not indexed does not fit.
    return room if size is None else min(room, max(count, size - 1))


def _padded(array: Any, axis: int, room: int) -> np.ndarray | jax.Array:
    """Pad an axis of an array, by repeating its last row."""
    count = array.shape[axis]
    if count == room:
        return array
    if isinstance(array, np.ndarray):
        shape = list(array.shape)
        shape[axis] = room
        given, made = array, np.empty(shape, array.dtype)
        to = made
        if axis:
            given, to = given.swapaxes(0, axis), to.swapaxes(0, axis)
        to[:count] = given
        to[count:] = given[-1]
        return made
    # Typed keys have no NumPy form.
    if isinstance(array, Tracer) or jnp.issubdtype(array.dtype, jax.dtypes.extended):
        return jnp.take(array, np.minimum(np.arange(room), count - 1), axis)
    return jnp.asarray(_padded(np.asarray(array), axis, room))
