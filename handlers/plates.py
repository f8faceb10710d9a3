"""Read a model's plates as they are for the arguments of one call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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
        How many of its rows the model takes: those it pins, those it asks for, or
        all.
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


class _EnoughPlatesError(Exception):
    """Leaves the model once every plate that is wanted has been seen."""


class _PlateWatcher(Messenger):
    """Sees one plate message before and after all other handlers do.

    A value that is there in the end, was not there in the beginning and was not
    drawn is one that a handler pinned.
    """

    def process_message(self, msg: dict[str, Any]) -> None:
        self._preset = msg["value"]
        self._drawn = False
        # Any rows will do while the plates are read, and a true draw would shuffle
        # the whole plate.
        msg["fn"] = self._draw

    def _draw(self, size: int, subsample_size: int, rng_key: Any = None) -> jax.Array:
        self._drawn = True
        return jnp.arange(subsample_size)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        self.pinned = not self._drawn and msg["value"] is not self._preset
        # NumPyro's warning of a pin of another length is the model's own to give,
        # once, when it runs in earnest.
        msg["args"] = (msg["args"][0], jnp.shape(msg["value"])[0])


class _Outside(Messenger):
    """Stands for what is around a rehearsal and must still be felt inside."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: set[str] = set()
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
        elif msg["type"] == "mutable":
            # The model may write into this container, which is the user's.
            msg["value"] = jax.tree.map(lambda leaf: leaf, msg["value"])


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
def rehearsal() -> Generator[_Outside]:
    """Let a model run in here unseen: no trace of it, none of the callers' keys spent.

    Pins of plates reach it from outside all the same.
    """
    outside = _Outside()
    with (
        handlers.block(),
        outside,
        handlers.substitute(substitute_fn=_any_value),
        handlers.seed(rng_seed=0),
    ):
        yield outside


def check_subsample_size(name: str, size: int, subsample_size: int) -> None:
    """Refuse a number of rows that a plate of `size` rows cannot give."""
    if 1 <= subsample_size <= size:
        return
    if subsample_size < 1:
        remedy = "Give every batch at least one row, or skip the step that has none."
    else:
        remedy = (
            "Make size the number of rows of the whole data set and subsample_size "
            "that of the batch."
        )
    raise ValueError(
        f"The model asks plate '{name}' (size {size}) for a subsample of "
        f"{subsample_size} rows; it must be between 1 and {size}. {remedy}"
    )


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
    plates: dict[str, ModelPlate] = {}
    as_it_was = vars(numpyro.plate)["_subsample"]

    with rehearsal() as outside:

        def subsample(
            name: str, size: int, subsample_size: int | None, dim: int | None
        ) -> tuple[int, jax.Array]:
            taken = size if subsample_size is None else int(subsample_size)
            check_subsample_size(name, size, taken)
            watcher = _PlateWatcher()
            with watcher:
                dim, rows = as_it_was.__func__(name, size, subsample_size, dim)
            model_pins = watcher.pinned and name not in outside.pinned
            plates[name] = ModelPlate(
                name=name,
                size=size,
                asked=subsample_size,
                subsample_size=rows.shape[0] if model_pins else taken,
                dim=dim,
                rows=rows if model_pins else None,
            )
            if until is not None and plates.keys() >= set(until):
                raise _EnoughPlatesError
            return dim, rows

        numpyro.plate._subsample = staticmethod(subsample)  # ty: ignore[invalid-assignment]
        try:
            model(*args, **kwargs)
        except _EnoughPlatesError:
            pass
        finally:
            numpyro.plate._subsample = as_it_was
    return plates
