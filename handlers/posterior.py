"""Run the posterior methods of guides after training on batches of any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions.transforms import biject_to
from numpyro.handlers import substitute
from numpyro.infer import Predictive
from numpyro.infer.autoguide import AutoGuide, AutoGuideList, AutoSemiDAIS

from . import internals
from .alignment import warn
from .guide_call import GuideCall
from .guides import Serving, is_served, served
from .model_call import ModelCall, Samples
from .plates import full_size

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
    """
    no_latents = not internals.initial_values(guide)
    if guide.prototype_trace is None or is_served(guide) or no_latents:
        return run(*args, **kwargs)
    model_args, model_kwargs = (), {}
    of_params = 0
    if method == "sample_posterior":
        of_params, model_args = 1, args[2:]
        own = ("rng_key", "params", "sample_shape")
        model_kwargs = {k: v for k, v in kwargs.items() if k not in own}
    if isinstance(guide, AutoSemiDAIS):
        # Its local latents are functions of their data: it runs as when called.
        call = GuideCall(guide.model, model_args, model_kwargs)
        with call, served(guide, call, model_args, model_kwargs):
            return run(*args, **kwargs)
    with Serving(guide):
        if isinstance(guide, AutoGuideList):
            return _of_parts(guide, method, args, kwargs)
        prototype: Any = guide.prototype_trace
        params = args[of_params] if len(args) > of_params else kwargs["params"]
        in_model = {name: own for name, own in params.items() if name in prototype}
        with substitute(data=in_model):
            if model_args or model_kwargs:
                latents = _latents(guide, run, args, kwargs)
                return latents | _of_arguments(
                    guide, latents, in_model, model_args, model_kwargs
                )
            return _of_first_call(guide, run, args, kwargs)


def _of_parts(guide: AutoGuideList, method: str, args: tuple, kwargs: dict) -> Any:
    answer = {}
    for part in guide:
        run = getattr(part, method)
        if issubclass(type(part), AutoGuide):
            answer |= call_posterior_method(part, method, run, *args, **kwargs)
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
    rest = _independent_of_rows(guide, latents, reordered)
    left_out = [name for name in names if name not in rest]
    if left_out:
        warn(
            f"Left out the deterministic sites {left_out}: the model cannot be run on "
            f"all rows with the arguments of its first call ({why}). Pass the model's "
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
    with ModelCall(), Samples(of_all_rows=True):
        return predictive(jax.random.key(0), *args, **kwargs)


def _independent_of_rows(
    guide: AutoGuide, latents: dict[str, jax.Array], reordered: set[str]
) -> dict[str, jax.Array]:
    """Return the deterministic sites that the first call's arguments give for any rows.

    They stand in no plate of which the first call had other rows than all in order, and
    depend, by data flow, on no latent there.
    """
    prototype: Any = guide.prototype_trace
    full_sizes = internals.full_sizes(guide)

    def of_batch(name: str) -> bool:
        return any(
            frame.name in reordered or frame.size != full_sizes[frame.name]
            for frame in prototype[name]["cond_indep_stack"]
        )

    names = [name for name in _deterministic_sites(guide) if not of_batch(name)]

    def of_one_sample(latents: dict[str, jax.Array]) -> dict[str, jax.Array]:
        unconstrained = {
            name: biject_to(prototype[name]["fn"].support).inv(value)
            for name, value in latents.items()
        }
        with ModelCall(), Samples(of_all_rows=True):
            sites = internals.sites_of_first_call(guide, unconstrained)
        return {name: sites[name] for name in names}

    ndims = _batch_ndims(guide, latents)
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
    shape = next(iter(latents.values())).shape[:ndims]
    return {name: jnp.reshape(v, shape + v.shape[1:]) for name, v in rest.items()}
