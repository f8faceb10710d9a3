"""The record of a plate's rows in one call, and the model's reading that makes it.

Words, used everywhere in this library:

size
    How many rows a plate has: those of the whole data set.
subsample_size
    How many rows a plate takes in one call: those of the batch.
rows
    Which rows these are: indices into the plate, shape ``(subsample_size,)``.
pinned
    Said of rows that somebody chose: the model, a handler, ``indices``.
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
   ``numpyro.subsample``, a sample given to ``Predictive``, ``substitute`` or
   ``condition``. Nothing is taken from a value of the batch: one that is replayed, that
   a function gives, as in MCMC, or that comes in one dict with the plate's rows. Where
   ``condition`` gives a value that could be either, it is an error.
3. Pinned rows that are not exactly ``arange(size)`` are a batch like any other, also
   when there are as many of them as the plate has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpyro import handlers
from numpyro.infer.initialization import init_to_uniform

from . import internals
from .internals import Handler, Tracer

# By plate: the rows of a batch, shape ``(subsample_size,)``, and how many are valid.
Rows = Mapping[str, ArrayLike]
Counts = Mapping[str, ArrayLike]


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
    dims : frozenset of int
        The batch dimensions of the plate in the model, counted from the right; empty
        if the model was not read.
    gathers : bool
        Whether parameters with ``event_dim`` or ``numpyro.subsample`` stand in the
        plate, as far as the model was read.
    valid : int or None
        How many of the rows are valid, where an argument of the model tells.
    """

    name: str
    size: int
    argument: int | None
    rows: jax.Array | None = None
    pinned_by: str | None = None
    drawn: bool = False
    dims: frozenset[int] = frozenset()
    gathers: bool = False
    valid: Any = None

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
    if internals.is_default(rows):
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


def take_rows_of_plates(value: Any, msg: dict[str, Any]) -> Any:
    """Take the rows of the plates around a site from a value that has all of them."""
    event_dim = msg["fn"].event_dim
    frames = {(frame.dim, frame.size) for frame in msg["cond_indep_stack"]}
    for plate in internals.plates_around():
        # By place: a scope may have changed the names on the way.
        if (plate.dim, plate.subsample_size) in frames:
            rows = internals.rows_of(plate)
            value = take_rows(value, rows, plate.size, plate.dim - event_dim)
    return value


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
    """Return pinned rows as an array, once they have passed ``check_rows``."""
    check_rows(name, size, rows)
    return rows if isinstance(rows, jax.Array) else jnp.asarray(rows)


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


def check_subsample_size(name: str, size: int, subsample_size: int) -> None:
    """Refuse a number of rows that a plate of `size` rows cannot give."""
    if 1 <= subsample_size <= size:
        return
    if subsample_size < 1:
        remedy = "Give every batch at least one row, or skip the step that has none."
    else:
        remedy = (
            "Make size the number of rows of the whole data set and subsample_size "
            "that of the batch, padding included."
        )
    raise RowsError(
        f"The model asks plate '{name}' (size {size}) for a subsample of "
        f"{subsample_size} rows; it must be between 1 and {size}. {remedy}"
    )


def check_size(name: str, of_model: int, of_guide: int) -> None:
    """Refuse a plate whose full size has changed since the guide was made."""
    if of_model == of_guide:
        return
    if of_model > of_guide:
        remedy = "If rows have come in, call the method grow of SubsampleSVI."
    else:
        remedy = (
            "A plate cannot lose rows; one that is in no batch costs row-wise steps "
            "nothing."
        )
    raise ValueError(
        f"Plate '{name}' has size {of_model} in the model, but the guide's parameters "
        f"were made for {of_guide} rows. {remedy} Otherwise keep the plate's size that "
        "of the whole data set, or build a new guide and call svi.init again."
    )


def arguments_for_plates(
    model: Callable,
    names: Mapping[str, str | int],
    args: tuple,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Return the arguments of a model that hold something for plates, by plate.

    Parameters
    ----------
    model : callable
        The model.
    names : dict of str to str or int
        For each plate, the name of the argument or its position, from 0.
    args, kwargs : tuple, dict
        What the model is called with. What it is called without is left out.

    Raises
    ------
    ValueError
        If the model has no such argument.
    """
    if not names:
        return {}
    parameters = signature(model).parameters
    given = dict(zip(parameters, args, strict=False)) | kwargs
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    found = {}
    for plate, name in names.items():
        if isinstance(name, int):
            name = dict(enumerate(parameters)).get(name, str(name))
        if name not in parameters and not open_ended:
            raise ValueError(
                f"The rows of plate '{plate}' are said to be in the argument {name!r}, "
                f"but the arguments of the model are {list(parameters)}."
            )
        if given.get(name) is not None:
            found[plate] = given[name]
    return found


# ------------------------------------------------------------------ reading a model


class _Around(Handler):
    """Passes on what handlers around a hidden run would give to it."""

    def __init__(self, around: list[Any], params: bool) -> None:
        super().__init__()
        self._around = around
        self._givers = internals.gives_params() if params else []
        self.pinned: set[str] = set()

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate":
            name, size = msg["name"], msg["args"][0]
            rows = internals.plate_outside(name, size, self._around)["value"]
            if rows is not None:
                self.pinned.add(name)
                msg["value"] = as_rows(name, size, rows)
        elif msg["type"] in ("param", "mutable"):
            # Parameters with rows may be those of the batch only.
            if msg["kwargs"].get("event_dim") is None:
                for handler in self._givers:
                    handler.process_message(msg)
            # The model may write into a container, which is the user's.
            msg["value"] = jax.tree.map(jax.lax.stop_gradient, msg["value"])


def _any_value(msg: dict[str, Any]) -> Any:
    """Spare a hidden run the prior's sampler, which can be slow or missing."""
    if msg["type"] != "sample" or msg["value"] is not None:
        return None
    try:
        return init_to_uniform(msg)
    except (NotImplementedError, ValueError):
        # No bijection to the support, as of discrete or spherical sites: sample.
        return None


@contextmanager
def hidden_run(
    around: list[Any] | None = None, *, params: bool = False
) -> Generator[_Around]:
    """Let a model run in here unseen: no trace of it, none of the callers' keys spent.

    Its latents have made-up values, which nothing validates or debugs. Effects of
    the model's own, such as ``jax.debug.callback``, happen once more.

    Parameters
    ----------
    around : list of Messenger, optional
        The handlers whose pins reach it all the same, the inner ones first; by default
        all that are entered now.
    params : bool
        Whether parameters reach it too.
    """
    around = internals.handlers_around() if around is None else around
    with (
        internals.without_debugging(),
        handlers.block(),
        _Around(around, params) as outside,
        handlers.substitute(substitute_fn=_any_value),
        handlers.seed(rng_seed=0),
    ):
        yield outside


class _EnoughPlates(BaseException):
    """Leaves the model once every plate that is wanted has been seen.

    Not an ``Exception``, which a model may catch.
    """


class _PlateWatcher(Handler):
    """Sees one plate message before all other handlers do, and spares it the draw."""

    def __init__(self) -> None:
        super().__init__()
        self.message: dict[str, Any] = {}

    def process_message(self, msg: dict[str, Any]) -> None:
        self.message = msg
        if msg["value"] is not None:
            internals.note_default(msg["value"])
        msg["fn"] = _first_rows

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        # Of a pin of another length NumPyro warns when the model itself runs.
        if not internals.is_default(msg["value"]):
            msg["value"] = as_rows(msg["name"], msg["args"][0], msg["value"])
        msg["args"] = (msg["args"][0], msg["value"].shape[0])


def _first_rows(size: int, subsample_size: int, rng_key: Any = None) -> jax.Array:
    # A true draw would shuffle the whole plate. (One function for all messages: those
    # of the branches of a `cond` have to be equal.)
    return internals.note_default(jnp.arange(subsample_size))


class _GatherWatcher(Handler):
    """Notes the plates in which parameters or ``numpyro.subsample`` hold rows."""

    def __init__(self) -> None:
        super().__init__()
        self.plates: set[str] = set()

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] not in ("param", "subsample"):
            return
        event_dim = msg["kwargs"].get("event_dim")
        if event_dim is None:
            return
        shape = jnp.shape(msg["value"])
        for plate in internals.plates_around(self):
            axis = len(shape) + (plate.dim or 0) - event_dim
            if 0 <= axis < len(shape) and shape[axis] != 1:
                self.plates.add(plate.name)


def read_plates(
    model: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    around: list[Any],
    *,
    until: Collection[str] | None = None,
) -> dict[str, PlateRows]:
    """Learn the rows of a model's plates by running it, hidden from everything around.

    Parameters
    ----------
    model : callable
        The NumPyro model.
    args, kwargs : tuple, dict
        What the model is called with.
    around : list of Messenger
        The handlers around guide and model, whose pins count; the inner ones first.
    until : collection of str, optional
        Leave the model as soon as all of these plates have been seen. By default
        it runs to its end.

    Returns
    -------
    dict of str to PlateRows
        By name. Where plates of one name stand in the model several times, the last
        one counts, as in a trace.

    Raises
    ------
    ValueError
        If a plate is asked for fewer rows than one or for more than it has, or if
        pinned rows are not indices into their plate.
    """
    plates: dict[str, PlateRows] = {}
    final_names: dict[str, str] = {}  # handlers in the model may change them
    dims: dict[str, set[int]] = {}

    # Without their parameters, networks would be initialised at every reading.
    with hidden_run(around, params=True) as outside, _GatherWatcher() as gathering:

        def watched(
            subsample: Callable,
            name: str,
            size: int,
            subsample_size: int | None,
            dim: int | None,
        ) -> tuple[int, jax.Array]:
            check_subsample_size(
                name, size, size if subsample_size is None else int(subsample_size)
            )
            with _PlateWatcher() as watcher:
                dim, rows = subsample(name, size, subsample_size, dim)
            name = final_names[name] = watcher.message["name"]
            dims.setdefault(name, set()).add(dim)
            pinned = not internals.is_default(rows)
            by_handler = pinned and name in outside.pinned
            # Rows that nobody pinned are in order here. The plate draws them later.
            forced = not pinned and rows.shape[0] == size
            plates[name] = PlateRows(
                name=name,
                size=size,
                argument=size if forced and subsample_size else subsample_size,
                rows=rows if pinned else None,
                pinned_by=("handler" if by_handler else "model") if pinned else None,
                dims=frozenset(dims[name]),
            )
            if until is not None and plates.keys() >= set(until):
                raise _EnoughPlates
            return dim, rows

        with internals.plates_made_by(watched), suppress(_EnoughPlates):
            model(*args, **kwargs)
    for made_as in gathering.plates & final_names.keys():
        name = final_names[made_as]
        plates[name] = replace(plates[name], gathers=True)
    return plates


# ------------------------------------------------------------------ all rows


class _AllRows(Handler):
    """Has the last word on the rows of one plate: all of them, in order."""

    def process_message(self, msg: dict[str, Any]) -> None:
        self._rows = internals.note_default(msg["value"])

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        msg["value"] = self._rows
        msg["args"] = (msg["args"][0], None)


class _WholeData(Handler):
    """Refuses observed sites whose data do not cover the plates they are in.

    Parameters
    ----------
    subsampled : set of str
        The plates that the model subsamples, to be added to. In others, data may be
        one for all rows.
    """

    def __init__(self, subsampled: set[str]) -> None:
        super().__init__()
        self._subsampled = subsampled

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or not msg["is_observed"]:
            return
        shape = jnp.shape(msg["value"])
        shape = shape[: len(shape) - msg["fn"].event_dim]
        for frame in msg["cond_indep_stack"]:
            rows = shape[frame.dim] if len(shape) >= -frame.dim else frame.size
            if rows != frame.size and (rows != 1 or frame.name in self._subsampled):
                raise ValueError(
                    f"site '{msg['name']}' has data for {rows} rows of plate "
                    f"'{frame.name}' (size {frame.size})"
                )


@contextmanager
def full_size() -> Generator[None]:
    """Make every plate in here take all its rows, in order.

    Raises
    ------
    ValueError
        Where observed data do not cover their plates. (Sites behind a ``block`` are
        not seen.)
    """

    def all_rows(
        subsample: Callable,
        name: str,
        size: int,
        subsample_size: int | None,
        dim: int | None,
    ) -> tuple[int, jax.Array]:
        if subsample_size is not None and subsample_size != size:
            subsampled.add(name)
        with _AllRows():
            return subsample(name, size, None, dim)

    subsampled: set[str] = set()
    with internals.plates_made_by(all_rows), _WholeData(subsampled):
        yield
