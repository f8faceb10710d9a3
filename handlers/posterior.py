"""Run the posterior methods of guides after training on batches of any size."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
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
from .alignment import warn
from .guide_call import GuideCall
from .guides import Serving, is_served, served
from .model_call import ModelCall, Samples
from .padding import check_names
from .plates import as_rows, full_size, take_rows

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
    """Run a posterior method of an autoguide, whatever its first call's size was.

    Latents come back for all rows. Deterministic sites are those of the model's
    arguments where these are given, else those of the first call's at full size. Where
    the model cannot run so, those that need the rows are left out, with a warning.

    ``sample_posterior``, ``median`` and ``quantiles`` take one keyword more, which
    never reaches the model:

    indices : dict of str to array, optional
        For some plates, the rows that are asked for, shape ``(count,)``: their latents
        come back alone, in this order. Rows that a handler around pins are asked for,
        too. Those of ``AutoNormal`` and ``AutoDelta`` are taken from the parameters
        first, so the memory is that of the rows; a joint guide makes its joint draw
        once, of all rows, from which these are taken. So with the same key the draws
        of a row are those of a call for all rows if the guide is joint, and other
        ones if it is ``AutoNormal``: they depend on the number of rows asked for, and
        on the place of the row among them.

    Parameters
    ----------
    guide : AutoGuide
        The guide, trained on batches of whatever sizes.
    method : str
        One of `POSTERIOR_METHODS`.
    run : callable
        The class's own method of that name, bound to the guide.
    *args, **kwargs
        What the method is called with.

    Returns
    -------
    Any
        What the method returns.

    Raises
    ------
    ValueError
        If `indices` name a plate that the model does not have, or rows that it does
        not have.
    """
    no_latents = not internals.initial_values(guide)
    if guide.prototype_trace is None or is_served(guide) or no_latents:
        return run(*args, **kwargs)
    rows: dict[str, jax.Array] = {}
    if method in ("sample_posterior", "median", "quantiles"):
        rows = _rows_asked_for(guide, kwargs.pop("indices", None) or {})
    model_args, model_kwargs = (), {}
    of_params = 0
    if method == "sample_posterior":
        of_params, model_args = 1, args[2:]
        own = ("rng_key", "params", "sample_shape")
        model_kwargs = {k: v for k, v in kwargs.items() if k not in own}
    if isinstance(guide, AutoSemiDAIS):
        # Its local latents are functions of their data: it runs as when called.
        with (
            substitute(data=rows),
            GuideCall(guide.model, model_args, model_kwargs) as call,
            served(guide, call, model_args, model_kwargs),
        ):
            return run(*args, **kwargs)
    with Serving(guide):
        if isinstance(guide, AutoGuideList):
            return _of_parts(guide, method, args, kwargs, rows)
        prototype: Any = guide.prototype_trace
        params = args[of_params] if len(args) > of_params else kwargs["params"]
        in_model = {name: own for name, own in params.items() if name in prototype}
        if rows:
            some = _params_of_rows(guide, params, rows)
            args = tuple(some if i == of_params else a for i, a in enumerate(args))
            kwargs |= {"params": some} if "params" in kwargs else {}
        with substitute(data=in_model):
            if not (model_args or model_kwargs or rows):
                return _of_first_call(guide, run, args, kwargs)
            latents = _take_rows(guide, _latents(guide, run, args, kwargs), rows)
            if not (model_args or model_kwargs):
                why = f"rows of plates {sorted(rows)} are asked for"
                return _with_other_sites(guide, latents, why, {*rows})
            # Without rows asked for, the model takes those of its own from all.
            with substitute(data=rows), Samples(of_all_rows=not rows):
                return latents | _of_arguments(
                    guide, latents, in_model, model_args, model_kwargs
                )


def _rows_asked_for(
    guide: AutoGuide, indices: Mapping[str, ArrayLike]
) -> dict[str, jax.Array]:
    sizes = internals.full_sizes(guide)
    check_names("indices", indices, sizes)
    rows = {}
    for name, size in sizes.items():
        around = internals.plate_outside(name, size, internals.handlers_around())
        own = indices.get(name, around["value"])
        if own is not None:
            rows[name] = as_rows(name, size, own)
    return rows


def _params_of_rows(
    guide: AutoGuide, params: dict[str, Any], rows: dict[str, jax.Array]
) -> dict[str, Any]:
    """Take rows of a mean-field guide's parameters; leave those of other guides."""
    if not isinstance(guide, AutoNormal | AutoDelta):
        return params
    some = dict(params)
    for name, event_dim in internals.event_dims(guide).items():
        for param in (f"{name}_{guide.prefix}_loc", f"{name}_{guide.prefix}_scale"):
            if param in params:
                some[param] = _take(guide, name, params[param], event_dim, rows)
    return some


def _take_rows(guide: AutoGuide, latents: Any, rows: dict[str, jax.Array]) -> Any:
    """Take rows of latents, unless they were taken from the parameters."""
    if isinstance(guide, AutoNormal | AutoDelta) or not rows:
        return latents
    prototype: Any = guide.prototype_trace
    return {
        name: _take(guide, name, value, prototype[name]["fn"].event_dim, rows)
        for name, value in latents.items()
    }


def _take(
    guide: AutoGuide, name: str, value: Any, event_dim: int, rows: dict[str, jax.Array]
) -> Any:
    prototype: Any = guide.prototype_trace
    for frame in prototype[name]["cond_indep_stack"]:
        if frame.name in rows:
            size = internals.full_sizes(guide)[frame.name]
            value = take_rows(value, rows[frame.name], size, frame.dim - event_dim)
    return value


def _of_parts(
    guide: AutoGuideList,
    method: str,
    args: tuple,
    kwargs: dict,
    rows: dict[str, jax.Array],
) -> Any:
    answer = {}
    for part in guide:
        run = getattr(part, method)
        if issubclass(type(part), AutoGuide):
            own = {n: r for n, r in rows.items() if n in internals.full_sizes(part)}
            options = kwargs | {"indices": own} if own else kwargs
            answer |= call_posterior_method(part, method, run, *args, **options)
        else:
            answer |= run(*args, **kwargs)
    return answer


def _of_first_call(guide: AutoGuide, run: Callable, args: tuple, kwargs: dict) -> Any:
    names = _deterministic_sites(guide)
    reordered = _reordered_plates(guide)
    why = f"its rows of plates {sorted(reordered)} have another order"
    if not (names and reordered):
        try:
            with full_size():
                return run(*args, **kwargs)
        except Exception as error:
            why = str(error)
    latents = _latents(guide, run, args, kwargs)
    if not isinstance(latents, dict):
        return latents
    return _with_other_sites(guide, latents, why)


def _with_other_sites(
    guide: AutoGuide, latents: dict[str, jax.Array], why: str, some: Collection = ()
) -> dict[str, jax.Array]:
    """Add the deterministic sites that do not need rows of plates.

    Latents in the plates `some` are those of some rows.
    """
    names = _deterministic_sites(guide)
    rest = _independent_of_rows(guide, latents, some)
    left_out = [name for name in names if name not in rest]
    if left_out:
        warn(
            f"Left out the deterministic sites {left_out}: the model cannot be run for "
            f"them on the arguments of its first call ({why}). Pass the model's "
            "arguments to get them: sample_posterior(rng_key, params, *args).",
            UserWarning,
        )
    return latents | rest


def _deterministic_sites(guide: AutoGuide) -> list[str]:
    prototype: Any = guide.prototype_trace
    return [n for n, site in prototype.items() if site["type"] == "deterministic"]


def _reordered_plates(guide: AutoGuide) -> set[str]:
    """Return the plates of which the first call pinned all rows in another order."""
    prototype: Any = guide.prototype_trace
    plates = {n: site for n, site in prototype.items() if site["type"] == "plate"}
    return {
        name
        for name, site in plates.items()
        if not isinstance(site["value"], internals.Tracer)
        and len(site["value"]) == site["args"][0]
        and not np.array_equal(site["value"], np.arange(site["args"][0]))
    }


def _latents(guide: AutoGuide, run: Callable, args: tuple, kwargs: dict) -> Any:
    """Run a posterior method for the latents alone, which needs no run of the model."""
    prototype: Any = guide.prototype_trace

    def constrain(values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: biject_to(prototype[name]["fn"].support)(value)
            for name, value in values.items()
            if prototype[name]["type"] == "sample"
        }

    without = {k: v for k, v in prototype.items() if v["type"] != "deterministic"}
    with internals.with_postprocessing(guide, constrain, without), full_size():
        return run(*args, **kwargs)


def _batch_ndims(guide: AutoGuide, latents: dict[str, jax.Array]) -> int:
    name, value = next(iter(latents.items()))
    prototype: Any = guide.prototype_trace
    return jnp.ndim(value) - jnp.ndim(prototype[name]["value"])


def _of_arguments(
    guide: AutoGuide,
    latents: dict[str, jax.Array],
    params: dict[str, Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> dict[str, jax.Array]:
    """Return the deterministic sites for some arguments of the model."""
    names = _deterministic_sites(guide)
    if not names:
        return {}
    predictive = Predictive(
        guide.model,
        latents,
        params=params,
        return_sites=names,
        batch_ndims=_batch_ndims(guide, latents),
    )
    with ModelCall():
        return predictive(jax.random.key(0), *args, **kwargs)


def _independent_of_rows(
    guide: AutoGuide, latents: dict[str, jax.Array], some: Collection
) -> dict[str, jax.Array]:
    """Return the deterministic sites that the first call's arguments give for any rows.

    They stand in no plate of which the first call had other rows than all in order, or
    of which `latents` hold `some`, and depend, by data flow, on no latent there.
    """
    prototype: Any = guide.prototype_trace
    full_sizes = internals.full_sizes(guide)
    other_rows = _reordered_plates(guide).union(some)

    def of_batch(name: str) -> bool:
        return any(
            frame.name in other_rows or frame.size != full_sizes[frame.name]
            for frame in prototype[name]["cond_indep_stack"]
        )

    names = [name for name in _deterministic_sites(guide) if not of_batch(name)]

    def of_one_sample(latents: dict[str, jax.Array]) -> dict[str, jax.Array]:
        unconstrained = {
            name: biject_to(prototype[name]["fn"].support).inv(value)
            for name, value in latents.items()
        }
        # Rows that are asked for by a pin are not those of the first call.
        hidden = block(hide_fn=lambda msg: msg["type"] == "plate")
        with hidden, ModelCall(), Samples(of_all_rows=True):
            sites = internals.sites_of_first_call(guide, unconstrained)
        return {name: sites[name] for name in names}

    ndims = _batch_ndims(guide, latents)
    shape = next(iter(latents.values())).shape[:ndims]
    for name in latents:
        if any(frame.name in some for frame in prototype[name]["cond_indep_stack"]):
            # What depends on it is left out, so any rows will do that the model takes.
            own = prototype[name]["value"]
            latents = latents | {name: jnp.broadcast_to(own, shape + jnp.shape(own))}
    samples = {n: jnp.reshape(v, (-1, *v.shape[ndims:])) for n, v in latents.items()}
    first = {name: value[0] for name, value in samples.items()}
    try:
        made_from = internals.eval_provenance(
            lambda **local: of_one_sample(first | local),
            **{name: value for name, value in first.items() if of_batch(name)},
        )
        names = [name for name in names if not made_from[name]]
        rest = jax.lax.map(of_one_sample, samples)
    except Exception:
        # Host code in the model, or arguments that cannot be run on any more.
        return {}
    return {name: jnp.reshape(v, shape + v.shape[1:]) for name, v in rest.items()}
