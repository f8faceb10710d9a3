"""Warn, by data flow, where latents of some rows meet the data of others."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Unit
from numpyro.handlers import substitute, trace

from . import internals
from .calls import follow_model, hold_to_guide, predicting
from .internals import Handler, Tracer
from .reading import hidden_run, read_plates
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


# ------------------------------------------------------------------ the data flow


@dataclass(frozen=True)
class Site:
    """What a sample site is made of, as sets of marks.

    Marks are ``("rows", plate)``, ``("latents", plate)`` and ``("argument", length)``.
    A density without `mark` is made of none of them.

    Attributes
    ----------
    plates : frozenset of str
        The plates it stands in.
    observed, factor, subsampled, scaled : bool
        Whether it is observed, is a ``numpyro.factor``, stands in a subsampled plate,
        and has a scale.
    shape : tuple of int
        That of its log density.
    density, scale : frozenset of tuple
        What its log density and its scale are made of.
    """

    plates: frozenset[str]
    observed: bool
    factor: bool
    subsampled: bool
    scaled: bool
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
    subsampled = {
        site["name"]
        for site in sites.values()
        if site["type"] == "plate" and site["args"][0] != len(site["value"])
    }
    densities = {}
    for name, site in sites.items():
        if site["type"] != "sample":
            continue
        density = _log_density(site)
        names = frozenset(frame.name for frame in site["cond_indep_stack"])
        # An observed constant that differs from row to row is data, too.
        constant = site["is_observed"] and _differs_by_row(site["value"])
        found[name] = Site(
            plates=names,
            observed=site["is_observed"],
            factor=isinstance(site["fn"], Unit),
            subsampled=bool(names & subsampled),
            scaled=site["scale"] is not None,
            shape=jnp.shape(density),
            density=frozenset([("constant", ())] if constant else []),
        )
        scale = 1.0 if site["scale"] is None else site["scale"]
        densities[name] = jnp.sum(density), jnp.asarray(scale)
    return densities


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


# ------------------------------------------------------------------ the warnings


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
    where = (
        f"{what} depends on latents of plate '{plate.name}', which takes "
        f"{plate.subsample_size} of its {plate.size} rows, but stands outside of the "
        "plate and"
    )
    sums = site.factor and (not site.shape or plate.subsample_size in site.shape)
    if padded and (sums or (not site.shape and not site.plates)):
        return (
            f"{where} sums over its rows, those of the padding too. Move it into the "
            "plate, or give batches without a capacity."
        )
    if site.subsampled:
        # Data in a subsampled plate of their own have the scale of that.
        return None
    if not site.scaled:
        why = "has no scale, so that its data count too little"
    elif padded and not any(mark == "argument" for mark, _ in site.scale):
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
