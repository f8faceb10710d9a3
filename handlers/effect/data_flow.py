"""Learn, by data flow, what the sites of a model are made of. Nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Unit
from numpyro.handlers import substitute, trace

from . import internals
from .internals import Handler, Tracer
from .reading import hidden_run
from .rows import PlateRows


@dataclass(frozen=True)
class Site:
    """What a sample site is made of, as sets of marks.

    Marks are ``("rows", plate)``, ``("latents", plate)`` and ``("argument", length)``.
    A density without `mark` is made of none of them.

    Attributes
    ----------
    plates : frozenset of str
        The plates it stands in.
    observed, factor, scaled : bool
        Whether it is observed, is a ``numpyro.factor``, and has a scale that is not
        that of its plates.
    of_plates : float
        The scale of its subsampled plates, 1.0 without one.
    shape : tuple of int
        That of its log density.
    density, scale : frozenset of tuple
        What its log density and its scale are made of.
    """

    plates: frozenset[str]
    observed: bool
    factor: bool
    scaled: bool
    of_plates: float
    shape: tuple[int, ...]
    density: frozenset[tuple[str, Any]] = frozenset()
    scale: frozenset[tuple[str, Any]] = frozenset()


def flow(
    run: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    plates: Iterable[PlateRows],
    *,
    arguments: Callable[[Any], bool],
    params: bool = False,
) -> dict[str, Site]:
    """Learn what the sites of a hidden run are made of. Nothing is computed.

    Parameters
    ----------
    run, args, kwargs : callable, tuple, dict
        What runs, and what it is called with.
    plates : iterable of PlateRows
        The plates whose rows and latents are marked.
    arguments : callable
        Tells whether an array among the arguments is marked. Host code in the model
        may need the values of the others.
    params : bool
        Whether parameters count that follow the rows.

    Returns
    -------
    dict of str to Site
        By name.
    """
    plates = list(plates)
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = (jax.Array, np.ndarray, np.number)
    marked: dict[str, Any] = {
        f"argument {i}": leaf
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, arrays) and arguments(leaf)
    }
    marks: dict[str, tuple[str, Any]] = {
        name: ("argument", jnp.shape(leaf)[:1]) for name, leaf in marked.items()
    }
    for plate in plates:
        marked[f"latents {plate.name}"] = np.True_
        marks[f"latents {plate.name}"] = ("latents", plate.name)
        if plate.rows is not None:
            marked[f"rows {plate.name}"] = plate.rows
            marks[f"rows {plate.name}"] = ("rows", plate.name)
    found: dict[str, Site] = {}

    def described(**given: Any) -> dict[str, Any]:
        traced = [given.get(f"argument {i}", leaf) for i, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(structure, traced)
        own = [plate for plate in plates if plate.rows is not None]
        with ExitStack() as stack:
            stack.enter_context(hidden_run())
            sites = stack.enter_context(trace())
            rows = {plate.name: given[f"rows {plate.name}"] for plate in own}
            stack.enter_context(substitute(data=rows))
            latents = {plate.name: given[f"latents {plate.name}"] for plate in plates}
            stack.enter_context(_mark_latents(latents))
            if not params:
                stack.enter_context(_take_first_rows_of_params())
            run(*args, **kwargs)
        return _described(sites, found)

    made_from = internals.eval_provenance(described, **marked)
    return {
        name: replace(
            site,
            density=site.density | {marks[mark] for mark in made_from[name][0]},
            scale=frozenset(marks[mark] for mark in made_from[name][1]),
        )
        for name, site in found.items()
    }


def _described(sites: dict[str, Any], found: dict[str, Site]) -> dict[str, Any]:
    """Return densities and scales, and add what is known of the sites to `found`."""
    scales = {
        site["name"]: site["args"][0] / len(site["value"])
        for site in sites.values()
        if site["type"] == "plate"
    }
    densities = {}
    for name, site in sites.items():
        if site["type"] != "sample":
            continue
        density = _log_density(site)
        names = frozenset(frame.name for frame in site["cond_indep_stack"])
        # An observed constant that differs from row to row is data, too.
        constant = site["is_observed"] and _differs_by_row(site["value"])
        of_plates = prod(scales.get(name, 1.0) for name in names)
        found[name] = Site(
            plates=names,
            observed=site["is_observed"],
            factor=isinstance(site["fn"], Unit),
            scaled=not (
                site["scale"] is None
                or (of_plates != 1 and _is_close(site["scale"], of_plates))
            ),
            of_plates=of_plates,
            shape=jnp.shape(density),
            density=frozenset([("constant", ())] if constant else []),
        )
        scale = 1.0 if site["scale"] is None else site["scale"]
        densities[name] = jnp.sum(density), jnp.asarray(scale)
    return densities


def _is_close(value: Any, other: float) -> bool:
    return not isinstance(value, Tracer) and bool(np.all(np.isclose(value, other)))


def _log_density(site: dict[str, Any]) -> jax.Array:
    try:
        return site["fn"].log_prob(site["value"])
    except NotImplementedError:
        # A flow without an inverse. Its parameters tell as much.
        leaves = jax.tree.leaves((site["fn"], site["value"]))
        return sum((jnp.sum(leaf) for leaf in leaves), jnp.zeros(()))


def _differs_by_row(value: Any) -> bool:
    if isinstance(value, Tracer) or jnp.ndim(value) == 0:
        return False
    value = np.asarray(value)
    return bool(value.size) and not np.all(value == value.flat[0])


class _mark_latents(Handler):
    """Lets latents in some plates depend on a mark, so that their use can be seen."""

    def __init__(self, marks: dict[str, Any]) -> None:
        super().__init__()
        self._marks = marks

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or msg["is_observed"]:
            return
        for frame in msg["cond_indep_stack"]:
            if frame.name in self._marks:
                value = msg["value"]
                msg["value"] = jnp.where(self._marks[frame.name], value, value)


class _take_first_rows_of_params(Handler):
    """Takes the first rows of parameters, so that these do not follow a plate.

    That parameters of the model follow the rows says nothing about its data.
    """

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        event_dim = msg["kwargs"].get("event_dim") if msg["type"] == "param" else None
        if event_dim is None:
            return
        value = jnp.asarray(msg["value"])
        for frame in msg["cond_indep_stack"]:
            axis = value.ndim + frame.dim - event_dim
            if axis >= 0 and value.shape[axis] > frame.size:
                value = jax.lax.slice_in_dim(value, 0, frame.size, axis=axis)
        msg["value"] = value
        # The plates then find nothing to take.
        msg["kwargs"] = {**msg["kwargs"], "event_dim": None}


def data_follow_rows(
    run: tuple, plate: PlateRows, predicted: Callable[[str], bool] | None = None
) -> bool:
    """Tell whether data of sites in a plate follow its rows, or there are none.

    What depends neither on the rows nor on the arguments of the model, as a factor that
    is the same for all rows, is no data.

    Parameters
    ----------
    run : tuple
        The model, and what it is called with.
    plate : PlateRows
        The plate, with rows.
    predicted : callable, optional
        Tells by its name whether a site is looked at; by default all that are observed.
    """

    def along(leaf: Any) -> bool:
        return plate.subsample_size in jnp.shape(leaf)

    sites = {
        name: site.density - {("latents", plate.name)}
        for name, site in flow(*run, [plate], arguments=along).items()
        if plate.name in site.plates
        and (site.observed if predicted is None else predicted(name))
    }
    if any(("rows", plate.name) in density for density in sites.values()):
        return True
    return predicted is None and not any(sites.values())
