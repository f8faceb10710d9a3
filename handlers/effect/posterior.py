"""Run the posterior methods of guides after training on batches of any size."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions.transforms import biject_to
from numpyro.handlers import block, substitute
from numpyro.infer import Predictive
from numpyro.infer.autoguide import (
    AutoDelta,
    AutoGuide,
    AutoGuideList,
    AutoNormal,
    AutoSemiDAIS,
)

from . import internals
from .calls import follow_model, predicting
from .guides import is_served, mark_served, served
from .reading import full_size
from .rows import as_rows, take_rows
from .warn import warn

POSTERIOR_METHODS = (
    "sample_posterior",
    "median",
    "quantiles",
    "get_transform",
    "get_posterior",
)


def call_posterior_method(
    guide: AutoGuide, method: str, run: Callable, /, *args: Any, **kwargs: Any
) -> Any:
    """Run a posterior method of an autoguide, whatever the size of its first call was.

    Latents are those of all rows of their plates. Of a plate whose rows a handler
    around pins, they are those of these rows, in their order.

    Parameters
    ----------
    guide : AutoGuide
        The guide.
    method : str
        One of `POSTERIOR_METHODS`.
    run : callable
        The class's own method of that name, bound to the guide.
    *args, **kwargs
        The arguments of the method.

    Returns
    -------
    Any
        The result of the method.
    """
    as_it_is = guide.prototype_trace is None or guide.create_plates is not None
    if as_it_is or is_served(guide) or not internals.initial_values(guide):
        return run(*args, **kwargs)
    call = signature(run).bind(*args, **kwargs)
    of_model = call.arguments.get("args", ()), call.arguments.get("kwargs", {})
    if isinstance(guide, AutoSemiDAIS):
        # Its local latents are functions of their data: it runs as when called.
        with follow_model(guide.model, *of_model) as own, served(guide, own):
            return run(*args, **kwargs)
    with mark_served(guide):
        if isinstance(guide, AutoGuideList):
            # Its parts are asked for the rows, too.
            return run(*args, **kwargs)

        def run_with(params: dict[str, Any]) -> Any:
            call.arguments["params"] = params
            return run(*call.args, **call.kwargs)

        rows = {} if method in ("get_transform", "get_posterior") else _pinned(guide)
        params = call.arguments["params"]
        return _latents_and_others(guide, run_with, params, rows, *of_model)


def _pinned(guide: AutoGuide) -> dict[str, jax.Array]:
    """Return the rows that handlers around pin, by plate."""
    rows = {}
    for name, size in internals.full_sizes(guide).items():
        outside = internals.plate_outside(name, size, internals.handlers_around())
        if outside["value"] is not None:
            rows[name] = as_rows(name, size, outside["value"])
    return rows


def _latents_and_others(
    guide: AutoGuide, run: Callable, params: dict, rows: dict, args: tuple, kwargs: dict
) -> Any:
    """Return latents of all rows, or of some, and deterministic sites."""
    prototype: Any = guide.prototype_trace
    others = [n for n, site in prototype.items() if site["type"] == "deterministic"]
    in_model = {name: own for name, own in params.items() if name in prototype}
    reordered = _reordered_plates(prototype)
    why = f"rows of plates {sorted(rows)} are asked for"
    with substitute(data=in_model):
        if not (args or kwargs or rows):
            why = f"its rows of plates {sorted(reordered)} have another order"
            try:
                if not (others and reordered):
                    with full_size():
                        return run(params)
            except Exception as error:
                why = str(error)
        latents = _latents(guide, run, params, rows)
        if not others or not isinstance(latents, dict):
            return latents
        # How many axes of draws or quantiles latents have.
        name, value = next(iter(latents.items()))
        ndims = jnp.ndim(value) - jnp.ndim(prototype[name]["value"])
        if args or kwargs:
            predictive = partial(Predictive, guide.model, latents, params=in_model)
            predict = predictive(return_sites=others, batch_ndims=ndims)
            # Latents that are of all rows are taken by the model's own rows.
            with predicting(of_all_rows=not rows):
                return latents | predict(jax.random.key(0), *args, **kwargs)
        found = _independent_of_rows(guide, latents, others, ndims, {*reordered, *rows})
    left_out = [name for name in others if name not in found]
    if left_out:
        warn(
            f"Left out the deterministic sites {left_out}: the model cannot be run for "
            f"them on the arguments of its first call ({why}). Pass the model's "
            "arguments to get them: sample_posterior(rng_key, params, *args).",
            UserWarning,
        )
    return latents | found


def _latents(guide: AutoGuide, run: Callable, params: dict, rows: dict) -> Any:
    """Run a method for the latents alone, which needs no run of the model."""
    prototype: Any = guide.prototype_trace

    def constrain(values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: biject_to(prototype[name]["fn"].support)(value)
            for name, value in values.items()
            if prototype[name]["type"] == "sample"
        }

    def take(values: dict, sites: dict[str, tuple[str, int]]) -> dict:
        """Take rows of values; `sites` has the site and the event_dim of each."""
        values = dict(values)
        for name in sites.keys() & values.keys():
            site, event_dim = sites[name]
            for plate, dim, _ in prototype[site]["cond_indep_stack"]:
                if plate in rows:
                    size, axis = internals.full_sizes(guide)[plate], dim - event_dim
                    values[name] = take_rows(values[name], rows[plate], size, axis)
        return values

    mean_field = isinstance(guide, AutoNormal | AutoDelta)
    if mean_field:
        # So the memory is that of these rows.
        of_params = {
            f"{site}_{guide.prefix}_{kind}": (site, event_dim)
            for site, event_dim in internals.event_dims(guide).items()
            for kind in ("loc", "scale")
        }
        params = take(params, of_params)
    without = {n: s for n, s in prototype.items() if s["type"] != "deterministic"}
    with internals.with_postprocessing(guide, constrain, without), full_size():
        latents = run(params)
    if mean_field or not rows:
        return latents
    return take(latents, {n: (n, prototype[n]["fn"].event_dim) for n in latents})


def _independent_of_rows(
    guide: AutoGuide,
    latents: dict[str, jax.Array],
    others: list[str],
    ndims: int,
    other_rows: Collection[str],
) -> dict[str, jax.Array]:
    """Return the deterministic sites that the first call's arguments give for any rows.

    They stand in no plate of which the first call took some rows, or has `other_rows`
    than `latents`, and depend, by data flow, on no latent there.
    """
    prototype: Any = guide.prototype_trace
    full_sizes = internals.full_sizes(guide)

    def plates_of(name: str) -> dict[str, int]:
        return {f.name: f.size for f in prototype[name]["cond_indep_stack"]}

    def of_batch(name: str) -> bool:
        plates = plates_of(name)
        some = any(size != full_sizes[plate] for plate, size in plates.items())
        return some or not plates.keys().isdisjoint(other_rows)

    def sites_of(latents: dict[str, jax.Array]) -> dict[str, jax.Array]:
        unconstrained = {
            name: biject_to(prototype[name]["fn"].support).inv(value)
            for name, value in latents.items()
        }
        # The first call had other rows than those that are pinned around.
        hidden = block(hide_fn=lambda msg: msg["type"] == "plate")
        with hidden, predicting(of_all_rows=True):
            sites = internals.sites_of_first_call(guide, unconstrained)
        return {name: sites[name] for name in names}

    names = [name for name in others if not of_batch(name)]
    # What depends on these is left out, so any value of the right shape will do.
    any_value = {
        name: prototype[name]["value"]
        for name in latents
        if not plates_of(name).keys().isdisjoint(other_rows)
    }
    first = {name: value[(0,) * ndims] for name, value in latents.items()} | any_value
    local = {name: value for name, value in first.items() if of_batch(name)}

    def of_draw(latents: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return sites_of(latents | any_value)

    of_draws: Callable = of_draw
    for _ in range(ndims):
        of_draws = partial(jax.lax.map, of_draws)
    try:
        made_from = internals.eval_provenance(
            lambda **local: sites_of(first | local), **local
        )
        names = [name for name in names if not made_from[name]]
        return of_draws(latents)
    except Exception:
        # Host code in the model, or arguments that cannot be run on any more.
        return {}


def _reordered_plates(prototype: dict[str, Any]) -> set[str]:
    """Return the plates of which the first call pinned all rows in another order."""
    return {
        name
        for name, site in prototype.items()
        if site["type"] == "plate"
        and not isinstance(site["value"], internals.Tracer)
        and len(site["value"]) == site["args"][0]
        and not np.array_equal(site["value"], np.arange(site["args"][0]))
    }
