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
    """Draw enumerated latents from their posterior, given all other latents.

    Parameters
    ----------
    model : callable
        Runs the model, with its latents given.
    rng_key : jax.Array
        The random key.
    sites : dict of str to dict
        A trace of the model.
    names : collection of str
        The enumerated latents.
    known : collection of str
        The other latents that are known; the rest has still to be drawn.

    Returns
    -------
    dict of str to jax.Array
        By name.
    """
    unknown = {
        name
        for name, site in sites.items()
        if site["type"] == "sample" and not site["is_observed"]
    }.difference(names, known)

    def run() -> None:
        with _TrueDensities(unknown):
            model()

    drawn = internals.sample_enumerated(run, _first_dim(sites), 1, rng_key)
    return {name: drawn[name].reshape(sites[name]["value"].shape) for name in names}


def log_likelihoods(
    model: Callable[[], Any], sites: Mapping[str, Any], names: Collection[str]
) -> dict[str, tuple[dict[str, Any], jax.Array]]:
    """Sum enumerated latents out of the log likelihoods of observed sites.

    Parameters
    ----------
    model, sites, names
        As for ``assignments``.

    Returns
    -------
    dict of str to tuple
        By observed site: the site whose plates the log likelihood has, and that.

    Raises
    ------
    ValueError
        If the rows of a site are not independent, given the other latents.
    """
    with plate_to_enum_plate(), enum(first_available_dim=_first_dim(sites)):
        with packed_trace() as packed, _TrueDensities():
            model()
    factors = {
        name: to_funsor(
            site["fn"].log_prob(site["value"]),
            funsor.Real,
            dim_to_name=site["infer"]["dim_to_name"],
        )
        for name, site in packed.items()
        if site["type"] == "sample" and (site["is_observed"] or name in names)
    }
    found, summed_by = {}, {}
    for name, site in sites.items():
        if site["type"] != "sample" or not site["is_observed"]:
            continue
        total, summed, layout = factors[name], [], site
        while new := [n for n in total.inputs if n in names and n not in summed]:
            layout = packed[new[0]]
            own = {frame.name: frame.dim for frame in layout["cond_indep_stack"]}
            if not summed:
                total = total.reduce(
                    funsor.ops.add, frozenset(total.inputs) - {*own, *names}
                )
            for latent in new:
                _check_of_one_row(name, latent, packed, own, summed_by)
                summed_by[latent] = name
                total = total + factors[latent]
                summed.append(latent)
        if summed:
            total = total.reduce(funsor.ops.logaddexp, frozenset(summed))
            found[name] = layout, to_data(total, name_to_dim=own)
        else:
            found[name] = site, site["fn"].log_prob(site["value"])
    return found


def _check_of_one_row(
    site: str, latent: str, packed: Mapping, own: dict, summed_by: dict[str, str]
) -> None:
    frames = {f.name: f.dim for f in packed[latent]["cond_indep_stack"]}
    around = {f.name: f.dim for f in packed[site]["cond_indep_stack"]}
    if frames != own or not frames.items() <= around.items():
        why = f"'{latent}' stands in the plates {sorted(frames)}, and not in one row"
    elif summed_by.get(latent, site) != site:
        why = f"site '{summed_by[latent]}' depends on '{latent}', too"
    else:
        return
    raise ValueError(
        f"The log likelihood of site '{site}' cannot be taken row by row: enumerated "
        f"{why}. Let the guide draw '{latent}'."
    )


def _first_dim(sites: Mapping[str, Any]) -> int:
    """Return the first dim, from the right, that no plate has."""
    fns = [site["fn"] for site in sites.values() if site["type"] == "sample"]
    return -1 - max(len(fn.batch_shape) for fn in fns)


class _TrueDensities(Handler):
    """Takes the scales off all sites, and off some their densities."""

    def __init__(self, without: Collection[str] = ()) -> None:
        super().__init__()
        self._without = without

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample":
            msg["scale"] = None
            if msg["name"] in self._without:
                msg["fn"] = msg["fn"].mask(False)
