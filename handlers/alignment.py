"""Decide which order a model's data have, and whether they follow a plate's rows."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jax.errors import JAXTypeError
from numpyro.handlers import mask, substitute, trace
from numpyro.ops.provenance import eval_provenance
from numpyro.primitives import _PYRO_STACK, Messenger
from numpyro.util import find_stack_level

from .plates import rehearsal


class MisalignedSubsampleWarning(UserWarning):
    """Local latents are trained on, or paired with, the data of other rows.

    Given when a guide's local latents follow the rows that a subsampled plate draws,
    and the data that the model sets them against do not. Each guide is looked at
    once per plate, while it is traced. To make it an error, or to silence it, use
    ``warnings.filterwarnings``.
    """


class Drawn(NamedTuple):
    """A plate of a guide that drew some of its rows, and the latents in it."""

    name: str
    size: int
    rows: jax.Array
    latents: list[str]


def joint_depends_on_rows(
    model: Callable, args: tuple, kwargs: dict[str, Any], name: str, rows: jax.Array
) -> bool:
    """Tell whether the log joint density depends on the rows that a plate takes.

    It is data flow in the jaxpr that decides, be it through indexing,
    ``numpyro.subsample`` or anything else.
    """

    def log_joint(rows: jax.Array) -> list[jax.Array]:
        with rehearsal(), trace() as sites, substitute(data={name: rows}):
            model(*args, **kwargs)
        return [_log_density(s) for s in sites.values() if s["type"] == "sample"]

    return any(eval_provenance(log_joint, rows=rows))


class _GatheringWatcher(Messenger):
    """Notes which primitives leave it to a plate to take their rows."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self.seen: set[str] = set()

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] not in ("subsample", "param"):
            return
        event_dim = msg["kwargs"].get("event_dim")
        if event_dim is None:
            return
        shape = jnp.shape(msg["value"])
        # A message of `subsample` does not say which plates it stands in.
        for handler in _PYRO_STACK:
            if getattr(handler, "name", None) == self._name:
                axis = getattr(handler, "dim", 0) - event_dim
                if axis < 0 and len(shape) >= -axis and shape[axis] != 1:
                    self.seen.add(msg["type"])


def keeps_rows_in_order(
    model: Callable, args: tuple, kwargs: dict[str, Any], name: str, rows: jax.Array
) -> bool:
    """Tell whether a model ignores the order in which all rows of a plate are pinned.

    NumPyro gathers the rows of ``numpyro.subsample`` and of parameters only in a
    plate that takes fewer rows than it has, so with all rows pinned these stay in
    order. Data that the model indexes, or gets already sliced, are in the pinned one.

    Raises
    ------
    ValueError
        If the model does both.
    """
    watcher = _GatheringWatcher(name)
    with rehearsal(), watcher:
        model(*args, **kwargs)
    if not watcher.seen:
        return False
    if watcher.seen == {"param"} or joint_depends_on_rows(
        model, args, kwargs, name, rows
    ):
        raise ValueError(
            f"All {rows.shape[0]} rows of plate '{name}' are pinned in an order of "
            "their own. NumPyro then leaves numpyro.subsample and parameters with "
            "event_dim in the original order, while other data of the model are in "
            "the pinned one, and they cannot be lined up. Index data and parameters "
            f"with the plate's indices instead: with numpyro.plate('{name}', ...) as "
            "idx: x[idx]."
        )
    return True


# Per guide, what has been looked at. A copy of a guide is another guide.
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


def check_drawn_rows(
    guide: Callable,
    model: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    plate: Drawn,
    around: Callable[[], AbstractContextManager],
    apart: str | None,
) -> None:
    """Warn if latents follow the rows that a plate drew, and their data do not.

    Parameters
    ----------
    guide, model : callable
        The guide that has drawn the rows, and the model that it follows.
    args, kwargs : tuple, dict
        What both are called with.
    plate : Drawn
        The plate, its rows, and the guide's latents in it.
    around : callable
        Makes what the guide has to run in to take its rows from handlers around it.
    apart : str or None
        Who runs the model such that it draws other rows than the guide, if anybody.

    Notes
    -----
    Latents whose density in the guide does not depend on the rows, as those of an
    amortised guide, belong to whatever data the batch holds, and nothing is wrong.
    """
    name, _, rows, latents = plate
    done = looked_at(guide)
    key = ("rows" if apart is None else apart, name)
    if key in done:
        return
    try:
        depends = _provenance(guide, args, kwargs, name, rows, inside=around)
        latents = [site for site in latents if "rows" in depends.get(site, ())]
        if latents and apart is not None:
            _warn(_drawn_apart(plate, latents, apart))
        elif latents and not _data_follow_rows(model, args, kwargs, name, rows):
            _warn(_not_indexed(plate, latents))
    except JAXTypeError:
        # Needs concrete values, so that nothing can be said about this call.
        return
    done.add(key)


def _warn(message: str) -> None:
    warnings.warn(message, MisalignedSubsampleWarning, stacklevel=find_stack_level())


def _who(plate: Drawn, latents: list[str]) -> str:
    return (
        f"Plate '{plate.name}' draws {plate.rows.shape[0]} of its {plate.size} rows, "
        f"and the guide takes its latents {latents} from them"
    )


def _pins(name: str) -> str:
    return (
        f"handlers.substitute(data={{'{name}': rows}}) around guide and model, or "
        f"SubsampleSVI's indices={{'{name}': rows}}"
    )


def _not_indexed(plate: Drawn, latents: list[str]) -> str:
    return (
        f"{_who(plate, latents)}, but the data in the plate do not depend on which "
        "rows these are: latents of some rows meet the data of others. Either let the "
        f"model index its data, with numpyro.plate('{plate.name}', ...) as idx: "
        "x[idx], or numpyro.subsample(x, event_dim=...); or, if a batch arrives "
        f"already sliced, pin the rows that it holds: {_pins(plate.name)}."
    )


def _drawn_apart(plate: Drawn, latents: list[str], apart: str) -> str:
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


def drawn_apart(context: bool) -> str | None:
    """Name who runs the model such that it draws other rows than the guide does.

    Parameters
    ----------
    context : bool
        Whether the model runs in a context that gives it the guide's rows.
    """
    if not context and under_enumeration():
        return "TraceEnum_ELBO"
    # Predictive draws latents first and runs the model on them later, both so masked.
    if any(isinstance(h, mask) and h.mask is False for h in _PYRO_STACK):
        return "Predictive"
    return None


def under_enumeration() -> bool:
    """Tell whether funsor enumerates sites, as ``TraceEnum_ELBO`` does."""
    module = sys.modules.get("numpyro.contrib.funsor.enum_messenger")
    return module is not None and any(isinstance(h, module.enum) for h in _PYRO_STACK)


def _data_follow_rows(
    model: Callable, args: tuple, kwargs: dict[str, Any], name: str, rows: jax.Array
) -> bool:
    """Tell whether the data in a plate follow its rows, or there are none.

    It is the density of the observed sites in the plate that must depend on the rows.
    That parameters of the model follow the rows says nothing about the data and does
    not count. What depends neither on the rows nor on the arguments of the model and
    has no axis of its own, as a factor that is the same for all rows, is no data.
    """
    sites = _provenance(
        model, args, kwargs, name, rows, inside=_ParamsOfAnyRows, observed=True
    )
    return any("rows" in found for found in sites.values()) or not any(sites.values())


class _ParamsOfAnyRows(Messenger):
    """Takes the first rows of parameters, so that these do not follow a plate."""

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


def _provenance(
    run: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    name: str,
    rows: jax.Array,
    *,
    inside: Callable[[], AbstractContextManager],
    observed: bool = False,
) -> dict[str, frozenset[str]]:
    """Return what the density of each site in a plate is made from.

    That is "rows" for the rows of the plate and, of observed sites, "data" for arrays
    among the arguments, or an observed value with axes.
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    batch = {
        i: leaf
        for i, leaf in enumerate(leaves)
        if observed and isinstance(leaf, jax.Array | np.ndarray) and leaf.ndim
    }
    with_axes: set[str] = set()

    def log_densities(rows: jax.Array, data: dict[int, Any]) -> dict[str, jax.Array]:
        given = [data.get(i, leaf) for i, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(structure, given)
        with rehearsal(), trace() as sites, substitute(data={name: rows}), inside():
            run(*args, **kwargs)
        log_densities = {}
        for site in sites.values():
            if site["type"] != "sample" or site["is_observed"] != observed:
                continue
            if name not in {frame.name for frame in site["cond_indep_stack"]}:
                continue
            if observed and jnp.size(site["value"]) and jnp.ndim(site["value"]):
                with_axes.add(site["name"])
            log_densities[site["name"]] = _log_density(site)
        return log_densities

    found = eval_provenance(log_densities, rows=rows, data=batch)
    return {
        site: made_from | {"data"} if site in with_axes else made_from
        for site, made_from in found.items()
    }


def _log_density(site: dict[str, Any]) -> jax.Array:
    try:
        return jnp.sum(site["fn"].log_prob(site["value"]))
    except NotImplementedError:
        # A flow without an inverse. Its parameters tell as much.
        leaves = jax.tree.leaves((site["fn"], site["value"]))
        return sum((jnp.sum(leaf) for leaf in leaves), jnp.zeros(()))


class ScoreFunctionWatcher(Messenger):
    """Warns of latents for which ``TraceGraph_ELBO`` scales the gradient twice.

    Parameters
    ----------
    guide : callable
        The guide that runs in here.
    full_size : callable
        Gives the full size of a plate, by name, while the guide runs, else None.
    """

    def __init__(self, guide: Callable, full_size: Callable[[str], int | None]) -> None:
        super().__init__()
        self._done = looked_at(guide)
        self._full_size = full_size

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "sample" or msg["is_observed"] or msg["fn"].has_rsample:
            return
        key = ("score function", msg["name"])
        if key in self._done:
            return
        for frame in msg["cond_indep_stack"]:
            size = self._full_size(frame.name)
            if size is None or size == frame.size:
                continue
            warnings.warn(
                f"TraceGraph_ELBO applies the scale of plate '{frame.name}', "
                f"{size} / {frame.size}, twice to the gradient of site "
                f"'{msg['name']}', which has no reparameterised sampler. Take the "
                "whole plate, or choose a distribution that has one.",
                stacklevel=find_stack_level(),
            )
            self._done.add(key)
