"""Latents that nobody draws: sum them out, or draw them given the data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import funsor
import jax
from numpyro.contrib.funsor import enum, plate_to_enum_plate, to_data, to_funsor
from numpyro.contrib.funsor import trace as packed_trace

from ..effect import internals
from ..effect.internals import Handler


def is_enumerated(site: dict[str, Any]) -> bool:
    """Tell whether ``TraceEnum_ELBO`` sums a latent out, if no guide draws it."""
    return site["infer"].get("enumerate") == "parallel"


def assignments(
    model: Callable[[], Any],
    rng_key: jax.Array,
    sites: Mapping[str, Any],
    names: Collection[str],
    known: Collection[str],
) -> dict[str, jax.Array]:
    """Draw enumerated latents from their posterior, given others.

    Parameters
    ----------
    model : callable
        Runs the model, with the values of all other latents.
    rng_key : jax.Array
        The random key.
    sites : dict of str to dict
        A trace of the model.
    names : collection of str
        The enumerated latents.
    known : collection of str
        The latents that are given; the values of others say nothing.

    Returns
    -------
    dict of str to jax.Array
        By name.
    """

    def run() -> None:
        with _true_densities({*names, *known}):
            model()

    drawn = internals.sample_enumerated(run, _first_dim(sites), 1, rng_key)
    return {name: drawn[name].reshape(sites[name]["value"].shape) for name in names}


def log_likelihoods(
    model: Callable[[], Any],
    sites: Mapping[str, Any],
    names: Collection[str],
    plates: set[str],
) -> dict[str, tuple[dict[str, Any], jax.Array]]:
    """Return the log likelihoods of observed sites, enumerated latents summed out.

    Parameters
    ----------
    model, sites, names
        As for ``assignments``.
    plates : set of str
        The plates of the batch, row by row of which likelihoods are taken.

    Returns
    -------
    dict of str to tuple
        By observed site: the site whose plates its log likelihood has, and that.

    Raises
    ------
    ValueError
        If the rows of a site, or two sites of one row, depend on each other, given
        the other latents.
    """
    factors: dict[str, Any] = {}
    if names:
        enumerating = enum(first_available_dim=_first_dim(sites))
        with plate_to_enum_plate(), enumerating, packed_trace() as packed:
            model()
        factors = {
            name: to_funsor(
                site["fn"].log_prob(site["value"]),
                output=funsor.Real,
                dim_to_name=site["infer"]["dim_to_name"],
            )
            for name, site in packed.items()
            if site["type"] == "sample" and (site["is_observed"] or name in names)
        }
    found: dict[str, Any] = {}
    summed_for: dict[str, str] = {}
    for name, site in sites.items():
        if site["type"] != "sample" or not site["is_observed"]:
            continue
        summed = _ancestors(name, factors) if names else []
        if not summed:
            found[name] = site, site["fn"].log_prob(site["value"])
            continue
        around, own = _dims(site), _dims(sites[summed[0]])
        for latent in summed:
            why = None
            if (other := summed_for.setdefault(latent, name)) != name:
                why = f"'{other}' depends on it, too"
            elif _dims(sites[latent]) != own or not own.items() <= around.items():
                why = "it stands in other plates than other sites of the row"
            elif not plates.isdisjoint(around.keys() - own.keys()):
                why = "many rows depend on it"
            if why:
                raise ValueError(
                    f"The log likelihood of site '{name}' cannot be taken row by row: "
                    f"enumerated site '{latent}' is summed out, and {why}. Let the "
                    f"guide draw '{latent}'."
                )
        # All data of a row go together, as those of its points in time.
        total = factors[name].reduce(funsor.ops.add, around.keys() - own.keys())
        total = sum((factors[latent] for latent in summed), total)
        total = total.reduce(funsor.ops.logaddexp, frozenset(summed))
        found[name] = sites[summed[0]], to_data(total, name_to_dim=own)
    return found


def _ancestors(name: str, factors: Mapping[str, Any]) -> list[str]:
    """Return the enumerated latents that a site depends on, by others too."""
    found, inputs = [], list(factors[name].inputs)
    while inputs:
        latent = inputs.pop()
        # Other inputs are plates.
        if latent in factors and latent not in found:
            found.append(latent)
            inputs += factors[latent].inputs
    return found


def _dims(site: dict[str, Any]) -> dict[str, int]:
    return {frame.name: frame.dim for frame in site["cond_indep_stack"]}


def _first_dim(sites: Mapping[str, Any]) -> int:
    """Return the first dim, from the right, that no plate has."""
    fns = [site["fn"] for site in sites.values() if site["type"] == "sample"]
    return -1 - max(len(fn.batch_shape) for fn in fns)


class _true_densities(Handler):
    """Takes the scales off all sites, and their densities off other latents."""

    def __init__(self, latents: Collection[str]) -> None:
        super().__init__()
        self._latents = latents

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample":
            msg["scale"] = None
            if not msg["is_observed"] and msg["name"] not in self._latents:
                msg["fn"] = msg["fn"].mask(False)
