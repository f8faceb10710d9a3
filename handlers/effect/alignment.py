"""Warn where latents of some rows are trained on, or paired with, data of others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import substitute, trace
from numpyro.util import find_stack_level

from ..batches.padding import valid_rows
from . import internals
from .guide_call import GuideCall
from .internals import Handler, Tracer
from .plates import PlateRows, hidden_run, read_plates


class MisalignedSubsampleWarning(UserWarning):
    """Local latents are trained on, or paired with, the data of other rows.

    Given when a guide's local latents follow the rows that a subsampled plate draws,
    and the data that the model sets them against do not. Each guide is looked at
    once per plate, while it is traced. To make it an error, or to silence it, use
    ``warnings.filterwarnings``.
    """


class UnscaledSubsampleWarning(UserWarning):
    """Data of the rows in a batch count as if they were those of all rows.

    Given when an observed site stands outside of a subsampled plate, depends on
    latents in it, and has no scale; or has a constant one, and the batch is padded.
    Each guide is looked at once, while it is traced.
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


def check_drawn_rows(guide: Callable, call: GuideCall, rerun: Callable) -> None:
    """Warn if latents follow the rows that a plate drew, and their data do not.

    Parameters
    ----------
    guide : callable
        The guide that has run.
    call : GuideCall
        The call, with the records of its plates.
    rerun : callable
        Runs the guide once more, within a ``GuideCall``, with the same arguments.

    Notes
    -----
    Latents whose density in the guide does not depend on the rows, as those of an
    amortised guide, belong to whatever data the batch holds, and nothing is wrong.
    """
    for name, latents in call.latents.items():
        plate = call.plates.get(name)
        if plate is None or not plate.drawn or plate.subsample_size == plate.size:
            continue
        apart = _drawn_apart(call)
        key = ("rows" if apart is None else apart, name)
        done = looked_at(guide)
        if key in done:
            continue
        message = _message(plate, latents, call, rerun, apart)
        if message is not None:
            warn(message)
        done.add(key)


def warn(message: str, category: type[Warning] = MisalignedSubsampleWarning) -> None:
    """Give a warning whose place is the user's line."""
    warnings.warn(message, category, stacklevel=find_stack_level())


def _message(
    plate: PlateRows,
    latents: list[str],
    call: GuideCall,
    rerun: Callable,
    apart: str | None,
) -> str | None:
    def run_guide(*args: Any, **kwargs: Any) -> None:
        with GuideCall(*call.run, plates=_undrawn(call.plates)):
            rerun(*args, **kwargs)

    _, args, kwargs = call.run
    try:
        of_guide = _densities_made_from(run_guide, args, kwargs, plate, _is_latent)
        latents = [site for site in latents if "rows" in of_guide.get(site, ())]
        if not latents:
            return None
        if apart is not None:
            return _drawn_apart_message(plate, latents, apart)
        if _data_follow_rows(*call.run, plate, lambda site: site["is_observed"]):
            return None
    except Exception:
        # Host code in the model or the guide needs values where there are none. What
        # cannot be looked at is no reason to stop, nor to warn.
        return None
    return _not_indexed_message(plate, latents)


def _is_latent(site: dict[str, Any]) -> bool:
    return not site["is_observed"]


def _data_follow_rows(
    model: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    plate: PlateRows,
    wanted: Callable[[dict[str, Any]], bool],
) -> bool:
    """Tell whether the data of sites in a plate follow its rows, or there are none.

    What depends neither on the rows nor on the arguments of the model, as a factor that
    is the same for all rows, is no data.
    """
    made_from = _densities_made_from(model, args, kwargs, plate, wanted, data=True)
    found = made_from.values()
    return any("rows" in own for own in found) or not any(found)


def check_predictive(predictive: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Warn if ``Predictive`` pairs samples of drawn rows with the data of others.

    Parameters
    ----------
    predictive : numpyro.infer.Predictive
        What predicts, from samples of all rows.
    args, kwargs : tuple, dict
        What its model is called with.
    """
    run, samples = (predictive.model, args, kwargs), predictive.posterior_samples
    done = looked_at(predictive.model)

    def predicted(site: dict[str, Any]) -> bool:
        return site["name"] not in samples

    try:
        plates = read_plates(*run, internals.handlers_around())
        for plate in plates.values():
            key = ("Predictive", plate.name)
            if plate.rows is not None or plate.takes_all or key in done:
                continue
            plate = replace(plate, rows=jnp.arange(plate.subsample_size))
            own = _densities_made_from(*run, plate, lambda site: not predicted(site))
            if own and not _data_follow_rows(*run, plate, predicted):
                done.add(key)
                warning = _not_indexed_message(plate, sorted(own), "Predictive")
                break
        else:
            return
    except Exception:
        return
    warn(warning)


def check_scales(guide: Callable, call: GuideCall) -> None:
    """Warn if data outside of a subsampled plate depend on latents in it, unscaled.

    Parameters
    ----------
    guide : callable
        The guide that has run.
    call : GuideCall
        The call, with the records of its plates.
    """
    counts = internals.find(valid_rows)
    padded = set() if counts is None else set(counts.counts)
    plates = [
        plate
        for name, plate in call.plates.items()
        if name in call.latents
        and (plate.subsample_size < plate.size or plate.name in padded)
    ]
    key = ("scale", "valid" if padded else "")
    done = looked_at(guide)
    if not plates or key in done:
        return
    done.add(key)
    try:
        found = _sites_outside(*call.run, plates)
    except Exception:
        # As above: what cannot be looked at is no reason to stop.
        return
    for site, (plate, scale) in found.items():
        if scale == "none":
            why = "has no scale, so that its data count too little"
        elif scale == "constant" and plate.name in padded:
            why = "has a constant scale, which cannot follow the count of valid rows"
        else:
            continue
        if ("unscaled", site) in done:
            continue
        done.add(("unscaled", site))
        warn(
            f"Site '{site}' depends on latents of plate '{plate.name}', which takes "
            f"{plate.subsample_size} of its {plate.size} rows, but stands outside of "
            f"the plate and {why}. Scale it by the rows of the plate over those in the "
            f"batch: with handlers.scale(scale={plate.size} / groups): ..., where "
            "groups, the number of valid rows, is an argument of the model.",
            UnscaledSubsampleWarning,
        )


class _Marked(Handler):
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


def _sites_outside(
    model: Callable, args: tuple, kwargs: dict[str, Any], plates: list[PlateRows]
) -> dict[str, tuple[PlateRows, str]]:
    """Return the observed sites that depend on latents of plates they stand outside of.

    For each site, the first of the plates, and whether its scale is "none", "constant",
    or "given" by arguments of the model. Sites in a subsampled plate of their own have
    the scale of that and are left out.
    """
    frames: dict[str, set[str]] = {}
    unscaled: set[str] = set()

    def densities_and_scales(sites: dict[str, Any]) -> dict[str, Any]:
        subsampled = {
            site["name"]
            for site in sites.values()
            if site["type"] == "plate" and site["args"][0] != len(site["value"])
        }
        found = {}
        for name, site in sites.items():
            if site["type"] != "sample" or not site["is_observed"]:
                continue
            frames[name] = {frame.name for frame in site["cond_indep_stack"]}
            if site["infer"].get("is_auxiliary") or frames[name] & subsampled:
                continue
            if site["scale"] is None:
                unscaled.add(name)
            scale = 1.0 if site["scale"] is None else site["scale"]
            found[name] = _log_density(site), jnp.asarray(scale)
        return found

    def marked(**marks: Any) -> _Marked:
        return _Marked({plate.name: marks[str(i)] for i, plate in enumerate(plates)})

    marks = {str(i): np.True_ for i, _ in enumerate(plates)}
    run = (model, args, kwargs)
    made_from = _provenance(
        *run, densities_and_scales, lambda leaf: True, marked, marks
    )
    found = {}
    for name, (density, scale) in made_from.items():
        for i, plate in enumerate(plates):
            if str(i) in density and plate.name not in frames[name]:
                how = "given" if "arguments" in scale else "constant"
                found[name] = plate, "none" if name in unscaled else how
                break
    return found


def _undrawn(plates: dict[str, PlateRows]) -> dict[str, PlateRows]:
    """Let the rows of drawn plates come from handlers around."""
    return {
        name: replace(plate, rows=None, drawn=False) if plate.drawn else plate
        for name, plate in plates.items()
    }


def _who(plate: PlateRows, latents: list[str], who: str = "the guide") -> str:
    return (
        f"Plate '{plate.name}' draws {plate.subsample_size} of its {plate.size} rows, "
        f"and {who} takes its latents {latents} from them"
    )


def _pins(name: str) -> str:
    return (
        f"handlers.substitute(data={{'{name}': rows}}) around guide and model, or "
        f"SubsampleSVI's indices={{'{name}': rows}}"
    )


def _not_indexed_message(
    plate: PlateRows, latents: list[str], who: str = "the guide"
) -> str:
    return (
        f"{_who(plate, latents, who)}, but the data in the plate do not depend on "
        "which rows these are: latents of some rows meet the data of others. Either "
        "let the "
        f"model index its data, with numpyro.plate('{plate.name}', ...) as idx: "
        "x[idx], or numpyro.subsample(x, event_dim=...); or, if a batch arrives "
        f"already sliced, pin the rows that it holds: {_pins(plate.name)}."
    )


def _drawn_apart_message(plate: PlateRows, latents: list[str], apart: str) -> str:
    remedy = f"pin the rows: {_pins(plate.name)}"
    if apart == "TraceEnum_ELBO":
        remedy = (
            f"enter dynamic_subsample() around the step, use SubsampleSVI, or {remedy}"
        )
    else:
        remedy = f"take the whole plate, or {remedy.split(', or ')[0]}"
    return (
        f"{_who(plate, latents)}, but {apart} lets the model draw rows of its own: "
        f"latents of some rows meet the data of others. Either {remedy}."
    )


def _drawn_apart(call: GuideCall) -> str | None:
    """Name what lets the model draw other rows than the guide, None if nothing does."""
    if not call.in_context and internals.enumerating():
        return "TraceEnum_ELBO"
    # Predictive draws latents first, and runs the model on them later.
    return "Predictive" if internals.under_predictive() else None


class _ParamsOfAnyRows(Handler):
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


def _densities_made_from(
    run: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    plate: PlateRows,
    wanted: Callable[[dict[str, Any]], bool],
    *,
    data: bool = False,
) -> dict[str, frozenset[str]]:
    """Return what the density of sites in a plate is made from, by data flow.

    That is "rows" for the rows of the plate and, with `data`, "arguments" for arrays
    among these that are as long as the rows, or for an observed constant that differs
    from row to row. Parameters of the model then do not count.
    """
    constant_data: set[str] = set()

    def densities(sites: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, site in sites.items():
            if site["type"] != "sample" or not wanted(site):
                continue
            if plate.name in {frame.name for frame in site["cond_indep_stack"]}:
                found[name] = _log_density(site)
                if data and site["is_observed"] and _differs_by_row(site["value"]):
                    constant_data.add(name)
        return found

    def pinned(rows: jax.Array) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(substitute(data={plate.name: rows}))
        if data:
            stack.enter_context(_ParamsOfAnyRows())
        return stack

    def is_data(leaf: Any) -> bool:
        return data and plate.subsample_size in jnp.shape(leaf)

    rows = {"rows": plate.rows}
    found = _provenance(run, args, kwargs, densities, is_data, pinned, rows)
    return {
        site: made_from | {"arguments"} if site in constant_data else made_from
        for site, made_from in found.items()
    }


def _provenance(
    run: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    describe: Callable[[dict[str, Any]], Any],
    is_data: Callable[[Any], bool],
    inside: Callable[..., AbstractContextManager],
    inputs: dict[str, Any],
) -> Any:
    """Return, by data flow, what is made from what in a hidden run.

    Parameters
    ----------
    run, args, kwargs : callable, tuple, dict
        What runs, and what it is called with.
    describe : callable
        Makes a tree of arrays of the sites.
    is_data : callable
        Tells whether an array among the arguments counts as "arguments".
    inside : callable
        Makes of the inputs the handlers to run in.
    inputs : dict of str to array
        Other things to be made from, by name.

    Returns
    -------
    tree of frozenset
        For each of the described arrays, the names that it is made from.
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = (jax.Array, np.ndarray, np.number)
    arguments = {
        i: leaf
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, arrays) and is_data(leaf)
    }

    def described(arguments: dict[int, Any], **inputs: Any) -> Any:
        traced = [arguments.get(i, leaf) for i, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(structure, traced)
        with hidden_run(), trace() as sites, inside(**inputs):
            run(*args, **kwargs)
        return describe(sites)

    return internals.eval_provenance(described, arguments=arguments, **inputs)


def _differs_by_row(value: Any) -> bool:
    if isinstance(value, Tracer) or jnp.ndim(value) == 0:
        return False
    value = np.asarray(value)
    return bool(value.size) and not np.all(value == value.flat[0])


def _log_density(site: dict[str, Any]) -> jax.Array:
    try:
        return jnp.sum(site["fn"].log_prob(site["value"]))
    except NotImplementedError:
        # A flow without an inverse. Its parameters tell as much.
        leaves = jax.tree.leaves((site["fn"], site["value"]))
        return sum((jnp.sum(leaf) for leaf in leaves), jnp.zeros(()))


class ScoreFunctionWatcher(Handler):
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
