"""Warn where latents of some rows meet the data of others, and of missing scales."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from math import isclose
from typing import Any
from weakref import WeakKeyDictionary

import jax.numpy as jnp

from . import internals
from .calls import follow_model, hold_to_guide, predicting
from .data_flow import Site, data_follow_rows, flow
from .internals import Handler
from .reading import read_plates
from .rows import PlateRows


class MisalignedSubsampleWarning(UserWarning):
    """Local latents are trained on, or paired with, the data of other rows.

    Given when a guide's local latents follow the rows that a subsampled plate draws,
    and the data that the model sets them against do not. Each guide is looked at
    once per plate, while it is traced.

    Examples
    --------
    To make it an error:

    >>> warnings.simplefilter("error", MisalignedSubsampleWarning)
    """


class UnscaledSubsampleWarning(UserWarning):
    """Data of the rows in a batch count as if they were those of all rows.

    Given when an observed site or a factor stands outside of a subsampled plate,
    depends on latents in it, and has no scale; or if the batch is padded, has a
    constant one, or is a sum over the padded rows. Each guide is looked at once, while
    it is traced.

    Examples
    --------
    To silence it, where the data outside of the plate shall count as they are:

    >>> warnings.simplefilter("ignore", UnscaledSubsampleWarning)
    """


# Per guide, what it has been looked at for. A copy of a guide is another guide.
_looked_at: WeakKeyDictionary[Any, set[tuple[str, str]]] = WeakKeyDictionary()


def looked_at(guide: Any) -> set[tuple[str, str]]:
    """Return the set, to be added to, of what a guide has been looked at for."""
    # A bound method is a new object on every access.
    guide = getattr(guide, "__self__", guide)
    try:
        return _looked_at.setdefault(guide, set())
    except TypeError:
        # Cannot be a weak key, so it is looked at each time it is traced.
        return set()


# Where warnings do not stand: what lies between the user's line and the model.
_STACK = {"numpyro", "jax", "optax", "contextlib", "functools", "threading"}


def warn(message: str, category: type[Warning] = MisalignedSubsampleWarning) -> None:
    """Give a warning whose place is the user's line."""
    frame: Any = inspect.currentframe()
    level = 1
    skipped = {*_STACK, __name__.partition(".")[0]}
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in skipped:
            break
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def warn_of_call(guide: Callable, call: follow_model, rerun: Callable) -> None:
    """Warn of what has gone wrong in a call of a guide without an error.

    Parameters
    ----------
    guide : callable
        The guide that has run.
    call : follow_model
        The call, with the records of its plates.
    rerun : callable
        Runs the guide once more, within a ``follow_model``, with the same arguments.

    Notes
    -----
    What cannot be looked at, since host code needs values where there are none, is no
    reason to stop, nor to warn.
    """
    done = looked_at(guide)
    apart = _what_draws_apart(call)
    for name, latents in call.latents.items():
        plate = call.plates.get(name)
        if plate is None or not plate.drawn or plate.subsample_size == plate.size:
            continue
        key = ("rows" if apart is None else apart, name)
        if key not in done:
            if _named_amiss(call):
                return
            _warn_of_drawn_rows(plate, latents, call, rerun, apart)
            done.add(key)
    context = internals.find(hold_to_guide)
    padded = frozenset() if context is None else context.padded
    plates = [
        plate
        for name, plate in call.plates.items()
        if name in call.latents
        and (plate.subsample_size < plate.size or plate.name in padded)
    ]
    key = ("scale", "padded" if padded else "")
    if plates and key not in done:
        _warn_of_scales(plates, padded, call, done)
        done.add(key)


def _what_draws_apart(call: follow_model) -> str | None:
    """Name what lets the model draw other rows than the guide, None if nothing does."""
    if not call.in_context and internals.enumerating():
        return "TraceEnum_ELBO"
    # Predictive draws latents first, and runs the model on them later.
    return "Predictive" if internals.find(predicting) is not None else None


def _named_amiss(call: follow_model) -> bool:
    """Tell whether a batch names what is no plate, an error of which comes later."""
    context = internals.find(hold_to_guide)
    if context is None or not context.named:
        return False
    try:
        plates = read_plates(*call.run, call.around).values()
    except Exception:
        return False
    outside = {
        internals.plate_outside(plate.name, plate.size, call.around)["name"]
        for plate in plates
    }
    return not context.named <= outside


def _warn_of_drawn_rows(
    plate: PlateRows,
    latents: Collection[str],
    call: follow_model,
    rerun: Callable,
    apart: str | None,
) -> None:
    """Warn if latents follow the rows that a plate drew, and their data do not.

    Latents whose density in the guide does not depend on the rows, as those of an
    amortised guide, belong to whatever data the batch holds, and nothing is wrong.
    """
    _, args, kwargs = call.run

    def run_guide(*args: Any, **kwargs: Any) -> None:
        # The rows of drawn plates come from handlers around.
        plates = {
            name: replace(own, rows=None, drawn=False) if own.drawn else own
            for name, own in call.plates.items()
        }
        with follow_model(*call.run, plates=plates):
            rerun(*args, **kwargs)

    try:
        of_guide = flow(
            run_guide,
            args,
            kwargs,
            [plate],
            arguments=lambda leaf: False,
            params=True,
        )
        mark = ("rows", plate.name)
        latents = [n for n in latents if n in of_guide and mark in of_guide[n].density]
        if not latents or (apart is None and data_follow_rows(call.run, plate)):
            return
    except Exception:
        return
    pins = _pins(plate.name)
    if apart is None:
        _warn_not_indexed(plate, latents, "the guide")
        return
    remedy = f"take the whole plate, or pin the rows: {pins}"
    if apart == "TraceEnum_ELBO":
        remedy = (
            "enter dynamic_subsample() around the step, use SubsampleSVI, or pin the "
            f"rows: {pins}"
        )
    warn(
        f"{_who(plate, latents, 'the guide')}, but {apart} lets the model draw rows of "
        f"its own: latents of some rows meet the data of others. Either {remedy}."
    )


def check_predictive(predictive: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Warn if ``Predictive`` pairs samples of all rows with rows that a plate draws.

    Parameters
    ----------
    predictive : numpyro.infer.Predictive
        What predicts, from samples of all rows.
    args, kwargs : tuple, dict
        What its model is called with.
    """
    run, samples = (predictive.model, args, kwargs), predictive.posterior_samples
    done = looked_at(predictive.model)
    try:
        plates = read_plates(*run, internals.handlers_around())
        for plate in plates.values():
            key = ("Predictive", plate.name)
            if plate.rows is not None or plate.takes_all or key in done:
                continue
            plate = replace(plate, rows=jnp.arange(plate.subsample_size))
            sites = flow(*run, [plate], arguments=lambda leaf: False)
            own = samples.keys() & sites
            own = sorted(name for name in own if plate.name in sites[name].plates)
            if own and not data_follow_rows(run, plate, lambda n: n not in samples):
                break
        else:
            return
    except Exception:
        return
    _warn_not_indexed(plate, own, "Predictive")
    done.add(key)


def _warn_of_scales(
    plates: list[PlateRows],
    padded: Collection[str],
    call: follow_model,
    done: set[tuple[str, str]],
) -> None:
    """Warn of data outside of plates that depend on latents in them, unscaled."""
    try:
        sites = flow(*call.run, plates, arguments=lambda leaf: True)
    except Exception:
        return
    for name, site in sites.items():
        data = {what for what, _ in site.density} - {"latents"}
        if not site.observed or (site.factor and not data) or ("scale", name) in done:
            continue
        for plate in plates:
            if ("latents", plate.name) in site.density - _inside(site, plate):
                message = _scale_message(name, site, plate, plate.name in padded)
                if message is not None:
                    warn(message, UnscaledSubsampleWarning)
                    done.add(("scale", name))
                break


def _inside(site: Site, plate: PlateRows) -> frozenset[tuple[str, Any]]:
    return frozenset([("latents", plate.name)] if plate.name in site.plates else [])


def _scale_message(name: str, site: Site, plate: PlateRows, padded: bool) -> str | None:
    what = f"{'Factor' if site.factor else 'Site'} '{name}'"
    takes = "is padded to" if padded else "takes"
    where = (
        f"{what} depends on latents of plate '{plate.name}', which {takes} "
        f"{plate.subsample_size} of its {plate.size} rows, but stands outside of the "
        "plate and"
    )
    sums = site.factor and (not site.shape or plate.subsample_size in site.shape)
    if padded and (sums or (not site.shape and not site.plates)):
        return (
            f"{where} sums over its rows, those of the padding too. Move it into the "
            "plate, or give batches without a capacity."
        )
    of_plate = plate.size / plate.subsample_size
    if site.of_plates != 1 and not site.scaled:
        if isclose(site.of_plates, of_plate):
            # As many data for each row.
            return None
        why = (
            f"has the scale of its own plates, {site.of_plates:.4g}, and not that of "
            f"'{plate.name}', {of_plate:.4g}. In batches of rows with all of their "
            "data, rows with few data then count too much"
        )
    elif not site.scaled:
        why = "has no scale, so that its data count too little"
    elif (
        padded
        and site.of_plates == 1
        and not any(mark == "argument" for mark, _ in site.scale)
    ):
        why = "has a constant scale, which cannot follow the count of valid rows"
    else:
        return None
    move = "Move it into the plate, or scale" if site.factor else "Scale"
    return (
        f"{where} {why}. {move} it with handlers.scale, by the rows of the plate over "
        f"those in the batch: with handlers.scale(scale={plate.size} / count): ..., "
        "where count is an argument of the model, the number of rows in the batch "
        "without its padding."
    )


def _who(plate: PlateRows, latents: Collection[str], who: str) -> str:
    return (
        f"Plate '{plate.name}' draws {plate.subsample_size} of its {plate.size} rows, "
        f"and {who} takes its latents {list(latents)} from them"
    )


def _pins(name: str) -> str:
    return (
        f"minibatch(..., rows={{'{name}': rows}}) with SubsampleSVI, or "
        f"handlers.substitute(data={{'{name}': rows}}) around guide and model"
    )


def _warn_not_indexed(plate: PlateRows, latents: Collection[str], who: str) -> None:
    warn(
        f"{_who(plate, latents, who)}, but the data in the plate do not depend on "
        "which rows these are: latents of some rows meet the data of others. Either "
        "let the "
        f"model index its data, with numpyro.plate('{plate.name}', ...) as idx: "
        "x[idx], or numpyro.subsample(x, event_dim=...); or, if a batch arrives "
        f"already sliced, pin the rows that it holds: {_pins(plate.name)}."
    )


class warn_of_score_functions(Handler):
    """Warns of latents for which ``TraceGraph_ELBO`` scales the gradient twice.

    Parameters
    ----------
    guide : callable
        The guide that runs in here.
    """

    def __init__(self, guide: Callable) -> None:
        super().__init__()
        self._done = looked_at(guide)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or msg["is_observed"] or msg["fn"].has_rsample:
            return
        key = ("score function", msg["name"])
        plates = {plate.name: plate for plate in msg.get("plates", {}).values()}
        if key in self._done:
            return
        for frame in msg["cond_indep_stack"]:
            plate = plates.get(frame.name)
            if plate is None or plate.size == frame.size:
                continue
            warn(
                f"TraceGraph_ELBO applies the scale of plate '{frame.name}', "
                f"{plate.size} / {frame.size}, twice to the gradient of site "
                f"'{msg['name']}', which has no reparameterised sampler. Take the "
                "whole plate, or choose a distribution that has one.",
                UserWarning,
            )
            self._done.add(key)
