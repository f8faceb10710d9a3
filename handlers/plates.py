"""Read a model's plates as they are for the arguments of one call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro
from numpyro import handlers
from numpyro.infer.initialization import init_to_uniform
from numpyro.primitives import _PYRO_STACK, Messenger


@dataclass(frozen=True)
class ModelPlate:
    """A plate of the model, for the arguments of one call.

    Attributes
    ----------
    name : str
        The plate's name.
    size : int
        Its full size, in rows.
    asked : int or None
        The ``subsample_size`` that the model gives to ``numpyro.plate``.
    subsample_size : int
        How many rows the plate takes in the end.
    dim : int
        The batch dimension it takes, counted from the right.
    rows : jax.Array or None
        The indices, shape ``(subsample_size,)``, where the model pins them itself;
        None where the plate draws them, takes all rows, or gets them from a handler
        around the whole call (which reaches the guide as well).
    """

    name: str
    size: int
    asked: int | None
    subsample_size: int
    dim: int
    rows: jax.Array | None

    @property
    def requested(self) -> int:
        """The rows that a guide has to ask for, to get those that the model gets."""
        if self.rows is not None:
            return self.subsample_size
        return self.size if self.asked is None else self.asked


_Subsample = Callable[[str, int, int | None, int | None], tuple[int, jax.Array]]


@contextmanager
def _plates_made_by(make: Callable[..., tuple[int, jax.Array]]) -> Generator[None]:
    """Let `make` take the rows of every new plate, given NumPyro's way of doing so.

    This is the one place where a plate is met with its arguments and before all
    handlers, those inside the model too.
    """
    as_it_was = vars(numpyro.plate)["_subsample"]
    subsample = partial(make, as_it_was.__func__)
    numpyro.plate._subsample = staticmethod(subsample)  # ty: ignore[invalid-assignment]
    try:
        yield
    finally:
        numpyro.plate._subsample = as_it_was


class _EnoughPlatesError(Exception):
    """Leaves the model once every plate that is wanted has been seen."""


class _PlateWatcher(Messenger):
    """Sees one plate message before all other handlers do, and spares it the draw."""

    drawn: ClassVar[bool]

    def process_message(self, msg: dict[str, Any]) -> None:
        self.message = msg
        self.preset = msg["value"]
        _PlateWatcher.drawn = False
        msg["fn"] = self.draw

    @staticmethod
    def draw(size: int, subsample_size: int, rng_key: Any = None) -> jax.Array:
        # Any rows will do while the plates are read, and a true draw would shuffle
        # the whole plate. (One function for all messages: the branches of a ``cond``
        # must not differ in it.)
        _PlateWatcher.drawn = True
        return jnp.arange(subsample_size)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        # NumPyro's warning of a pin of another length is the model's own to give,
        # once, when it runs in earnest.
        msg["args"] = (msg["args"][0], jnp.shape(msg["value"])[0])


class _Outside(Messenger):
    """Stands for what is around a rehearsal and must still be felt inside."""

    def __init__(self, gives_params: bool) -> None:
        super().__init__()
        self.pinned: set[str] = set()
        self._gives_params = gives_params
        self._pins = [
            handler
            for handler in reversed(_PYRO_STACK)
            if isinstance(handler, handlers.substitute | handlers.replay)
        ]

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate":
            inner = msg["value"]
            for handler in self._pins:
                handler.process_message(msg)
            if msg["value"] is not inner:
                self.pinned.add(msg["name"])
        elif msg["type"] in ("param", "mutable"):
            # Parameters with rows may be those of the batch only.
            if self._gives_params and msg["kwargs"].get("event_dim") is None:
                for handler in self._pins:
                    handler.process_message(msg)
            # The model may write into a container, which is the user's.
            msg["value"] = jax.tree.map(jax.lax.stop_gradient, msg["value"])


def _any_value(msg: dict[str, Any]) -> Any:
    """Spare a rehearsal the prior's sampler, which can be slow or missing."""
    if msg["type"] != "sample" or msg["value"] is not None:
        return None
    try:
        return init_to_uniform(msg)
    except (NotImplementedError, ValueError):
        # No bijection to the support, as of discrete or spherical sites: sample.
        return None


@contextmanager
def rehearsal(*, gives_params: bool = False) -> Generator[_Outside]:
    """Let a model run in here unseen: no trace of it, none of the callers' keys spent.

    Pins of plates reach it from outside all the same, and parameters if wanted.
    """
    outside = _Outside(gives_params)
    with (
        handlers.block(),
        outside,
        handlers.substitute(substitute_fn=_any_value),
        handlers.seed(rng_seed=0),
    ):
        yield outside


def plates_of_latents(
    model: Callable, args: tuple, kwargs: dict[str, Any]
) -> dict[str, set[str]]:
    """Return the plates that each latent site of a model is in, by site."""
    with rehearsal(), handlers.trace() as sites:
        model(*args, **kwargs)
    return {
        name: {frame.name for frame in site["cond_indep_stack"]}
        for name, site in sites.items()
        if site["type"] == "sample" and not site["is_observed"]
    }


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
    raise ValueError(
        f"The model asks plate '{name}' (size {size}) for a subsample of "
        f"{subsample_size} rows; it must be between 1 and {size}. {remedy}"
    )


class PlatesOf(Messenger):
    """Spares a model further readings of its plates, for the arguments of one call.

    Parameters
    ----------
    model, args, kwargs : callable, tuple, dict
        The model, and what it is called with.
    plates : dict of str to ModelPlate
        Those of its plates that have been read.
    """

    def __init__(
        self,
        model: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        plates: dict[str, ModelPlate],
    ) -> None:
        super().__init__()
        self._run = (model, args, kwargs)
        self.plates = plates

    def answers(
        self, model: Callable, args: tuple, kwargs: dict[str, Any], names: Collection
    ) -> bool:
        """Tell whether these plates of this model are known, called with this."""
        own_model, own_args, own_kwargs = self._run
        if model != own_model or kwargs.keys() != own_kwargs.keys():
            return False
        given = (*args, *(kwargs[name] for name in own_kwargs))
        own = (*own_args, *own_kwargs.values())
        same = len(given) == len(own) and all(map(operator.is_, given, own))
        return same and self.plates.keys() >= set(names)


def read_plates(
    model: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    until: Collection[str] | None = None,
) -> dict[str, ModelPlate]:
    """Learn the plates of `model` by running it, hidden from everything around.

    Parameters
    ----------
    model : callable
        The NumPyro model.
    args, kwargs : tuple, dict
        What the model is called with.
    until : collection of str, optional
        Leave the model as soon as all of these plates have been seen. By default
        it runs to its end.

    Returns
    -------
    dict of str to ModelPlate
        By name. Where plates of one name stand in the model several times, the last
        one counts, as in a trace.

    Raises
    ------
    ValueError
        If a plate is asked for fewer rows than one, or for more than it has.
    """
    if until is not None:
        for known in _PYRO_STACK:
            if isinstance(known, PlatesOf) and known.answers(
                model, args, kwargs, until
            ):
                return known.plates
    plates: dict[str, ModelPlate] = {}

    # Without their parameters, networks would be initialised at every reading.
    with rehearsal(gives_params=True) as outside:

        def watched(
            subsample: _Subsample,
            name: str,
            size: int,
            subsample_size: int | None,
            dim: int | None,
        ) -> tuple[int, jax.Array]:
            taken = size if subsample_size is None else int(subsample_size)
            check_subsample_size(name, size, taken)
            watcher = _PlateWatcher()
            with watcher:
                dim, rows = subsample(name, size, subsample_size, dim)
            # Handlers may have renamed the plate.
            name = watcher.message["name"]
            pinned = not watcher.drawn and rows is not watcher.preset
            plates[name] = ModelPlate(
                name=name,
                size=size,
                asked=subsample_size,
                subsample_size=rows.shape[0],
                dim=dim,
                rows=rows if pinned and name not in outside.pinned else None,
            )
            if until is not None and plates.keys() >= set(until):
                raise _EnoughPlatesError
            return dim, rows

        with _plates_made_by(watched), suppress(_EnoughPlatesError):
            model(*args, **kwargs)
    return plates


class _AllRows(Messenger):
    """Has the last word on the rows of one plate: all of them, in order."""

    def process_message(self, msg: dict[str, Any]) -> None:
        self._preset = msg["value"]

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        msg["value"] = self._preset
        msg["args"] = (msg["args"][0], None)


def at_full_size() -> bool:
    """Tell whether the plate that is being made is going to take all its rows."""
    return any(isinstance(handler, _AllRows) for handler in _PYRO_STACK)


class _WholeData(Messenger):
    """Refuses observed sites whose data do not cover the plates they are in."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or not msg["is_observed"]:
            return
        shape = jnp.shape(msg["value"])
        shape = shape[: len(shape) - msg["fn"].event_dim]
        for frame in msg["cond_indep_stack"]:
            rows = shape[frame.dim] if len(shape) >= -frame.dim else frame.size
            if rows != frame.size:
                raise ValueError(
                    f"site '{msg['name']}' has data for {rows} rows of plate "
                    f"'{frame.name}' (size {frame.size})"
                )


def take_rows(value: Any, rows: jax.Array, size: int, axis: int) -> Any:
    """Take `rows` of a value that has all `size` of them at `axis`; else leave it."""
    shape = jnp.shape(value)
    if len(shape) < -axis or shape[axis] == 1 or shape[axis] != size:
        return value
    return jnp.take(value, rows, axis)


def rows_of_enclosing(value: Any, msg: dict[str, Any]) -> Any:
    """Take the rows of the plates around a site of a value that has all of them."""
    event_dim = msg["fn"].event_dim
    dims = {frame.dim: frame.size for frame in msg["cond_indep_stack"]}
    for handler in _PYRO_STACK:
        # NumPyro's plate or funsor's. Their names may have been changed on the way.
        if dims.get(getattr(handler, "dim", None)) == getattr(
            handler, "subsample_size", 0
        ):
            indices = getattr(handler, "indices", handler._indices)
            value = take_rows(value, indices, handler.size, handler.dim - event_dim)
    return value


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
        subsample: _Subsample,
        name: str,
        size: int,
        subsample_size: int | None,
        dim: int | None,
    ) -> tuple[int, jax.Array]:
        with _AllRows():
            return subsample(name, size, None, dim)

    with _plates_made_by(all_rows), _WholeData():
        yield
