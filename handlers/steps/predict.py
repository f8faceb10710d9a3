"""Predict the rows of batches, and compute the log likelihoods of their data.

Guide and model draw twice: first what stands outside of the batch's plates, with a key
of the draw alone, then, given this, what stands in them, with a key of draw and batch.
So what is global is the same in all batches, and rows of different batches have no
randomness in common, whoever makes the keys.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxpr_as_fun
from numpyro.distributions import Unit
from numpyro.handlers import block, replay, seed, substitute, trace
from numpyro.infer.autoguide import (
    AutoContinuous,
    AutoLaplaceApproximation,
    AutoSemiDAIS,
)
from numpyro.infer.svi import SVIState
from tqdm.auto import tqdm

from ..batches.minibatch import Minibatch, as_minibatch
from ..batches.padding import check_count, check_names
from ..effect import internals
from ..effect.dynamic_subsample import dynamic_subsample
from ..effect.guides import autoguides_in
from ..effect.internals import Handler
from ..effect.plates import check_rows
from .enumerated import assignments, is_enumerated, log_likelihoods

if TYPE_CHECKING:
    from .subsample_svi import SubsampleSVI

# What the draws that are made at once may take, in bytes.
_BLOCK = 2**24
# About how many values as large as the largest are there at the same time.
_AT_ONCE = 8


def predict(
    self: SubsampleSVI,
    rng_key: jax.Array,
    fitted: Any,
    batches: Minibatch | Iterable[Any],
    num_samples: int = 1000,
    return_sites: Sequence[str] | None = None,
    unseen: Sequence[str] = (),
    infer_discrete: bool = False,
    progress_bar: bool = True,
) -> dict[str, np.ndarray]:
    """Draw from the posterior predictive distribution of the rows of batches.

    Each draw takes latents of the batch's rows from the guide, as ``sample_posterior``
    draws them, and runs the model with them. Observed values and conditions hold for
    all that depends on them. What is returned for an observed site is a new draw from
    its distribution.

    Parameters
    ----------
    rng_key : array
        The random key.
    fitted : FitResult, SVIRunResult, SVIState or dict
        What ``fit`` or ``run`` has returned, a state, or parameters as ``get_params``
        gives them, which lack mutable state.
    batches : Minibatch or iterable
        One batch, or a list or a loader of batches. Memory holds one of these and its
        draws at a time.
    num_samples : int, default 1000
        How many draws to make.
    return_sites : sequence of str, optional
        The sites to return, latents of the guide too. By default all deterministic
        sites, and those sample sites that the guide does not draw.
    unseen : sequence of str, optional
        Plates that do not have the rows of these batches. Their latents are drawn from
        the model, given the other latents. There may be more of them than the plate
        has rows, and the batch's rows of such a plate say nothing.
    infer_discrete : bool, default False
        Draw enumerated latents given the data, and return them. Otherwise they are
        drawn from the model, and not returned.
    progress_bar : bool, default True
        Show a progress bar, if there are many batches.

    Returns
    -------
    dict of str to numpy.ndarray
        By site, draws of shape ``(num_samples, ...)``. Those of rows stand one after
        another along their plate's axis, in the order of the batches: with shuffled
        batches, in that order, and not in that of the data. Rows of padding are left
        out. Sites outside of the batch's plates are there once.

    Raises
    ------
    ValueError
        If parameters of guide or model are missing; if a site depends on rows that the
        batch does not name, or on the rows of an unseen plate by anything but latents;
        if a site that is returned would bring padding back, or depends on the batch
        without being in its plates, or its axis of rows cannot be told; if batches
        have different sites; if names, rows or counts do not fit the model.

    See Also
    --------
    numpyro.infer.Predictive : The same for draws that one has.

    Notes
    -----
    All draws of one number go together: latents outside of the batch's plates, and
    all latents of a joint guide, are the same ones in all batches. What stands in the
    batch's plates is drawn anew in each batch, with one latent for a row that is in
    the batch twice.

    Model and guide are traced in each call, once for each shape of batch. A call that
    computes what an earlier one did compiles nothing. Draws are made in blocks of some
    16 MiB.

    A deterministic site is taken to hold the rows of a plate along the one axis that
    is as long. What a model computes across rows inside of their plate, as a mean,
    includes padded rows.

    Examples
    --------
    >>> result = svi.fit(key, batches, epochs)
    >>> batch = minibatch(X[rows], rows={"n": rows})
    >>> y = svi.predict(key, result, batch)["y"]  # shape (1000, len(rows))
    >>> new = minibatch(X_new, rows={"n": None})
    >>> y_new = svi.predict(key, result, new, unseen=["n"])["y"]
    """
    request = _Request(
        unseen=tuple(unseen),
        return_sites=None if return_sites is None else tuple(return_sites),
        infer_discrete=infer_discrete,
    )
    return _computed(self, rng_key, fitted, batches, num_samples, progress_bar, request)


def log_likelihood(
    self: SubsampleSVI,
    rng_key: jax.Array,
    fitted: Any,
    batches: Minibatch | Iterable[Any],
    num_samples: int = 1000,
    unseen: Sequence[str] = (),
    progress_bar: bool = True,
) -> dict[str, np.ndarray]:
    """Return the log likelihood of each row of batches, for draws of the latents.

    Enumerated latents are summed out. With the same key, the latents are those of
    ``predict``.

    Parameters
    ----------
    rng_key, fitted, batches, num_samples, progress_bar
        As for ``predict``. The batches bring the data.
    unseen : sequence of str, optional
        Plates whose latents are drawn from the model, given the other latents, instead
        of from the guide. Leave-one-out cross-validation needs it for each plate with
        latents of its own for each row: those of the guide have seen the very row.

    Returns
    -------
    dict of str to numpy.ndarray
        By observed site, log densities of shape ``(num_samples, rows, ...)``, without
        the scale of plates, in the order of the batches.

    Raises
    ------
    ValueError
        As for ``predict``; if the model observes nothing; if enumerated latents are
        shared by rows, or by several observed sites.

    Examples
    --------
    >>> svi.log_likelihood(key, result, batches, unseen=["people"])["y"]
    """
    request = _Request(unseen=tuple(unseen), log_likelihood=True)
    return _computed(self, rng_key, fitted, batches, num_samples, progress_bar, request)


@dataclass(frozen=True)
class _Request:
    """What to compute for each draw."""

    unseen: tuple[str, ...] = ()
    return_sites: tuple[str, ...] | None = None
    infer_discrete: bool = False
    log_likelihood: bool = False


def _computed(
    svi: SubsampleSVI,
    rng_key: jax.Array,
    fitted: Any,
    batches: Minibatch | Iterable[Any],
    num_samples: int,
    progress_bar: bool,
    request: _Request,
) -> dict[str, np.ndarray]:
    """Compute a request for each batch, and concatenate the rows of all batches."""
    if isinstance(batches, Minibatch):
        batches, progress_bar = [batches], False
    elif isinstance(batches, np.ndarray | jax.Array | Mapping | str):
        raise ValueError(
            f"batches must be one Minibatch or an iterable of them, not "
            f"{type(batches).__name__}: give minibatch(data, rows={{'plate': rows}})."
        )
    params = _params(svi, fitted)
    posteriors = _posteriors(svi, params)
    keys = jax.random.split(rng_key, num_samples)
    # Of this call alone: what model and guide close over may be another one later.
    programs: list[_Program] = []
    parts: list[dict[str, np.ndarray]] = []
    for number, item in enumerate(tqdm(batches, disable=not progress_bar)):
        batch = _Batch(svi, item, request.unseen)
        arrays = batch.leaves, batch.rows, batch.first
        given = _Given(params, posteriors, np.uint32(number), *arrays)
        program = next((own for own in programs if own.fits(batch, given)), None)
        if program is None:
            program = _Program(svi, request, batch, keys, given)
            programs.append(program)
        parts.append(program(batch, keys, given))
        if parts[0].keys() != parts[-1].keys():
            differ = sorted(parts[0].keys() ^ parts[-1].keys())
            raise ValueError(
                f"Batch {number} gives the sites {sorted(parts[-1])}, and the first "
                f"batch {sorted(parts[0])}. Give all batches the same arguments, or "
                f"leave {differ} out by return_sites."
            )
    if not parts:
        raise ValueError("There is no batch to predict.")
    if len(parts) == 1:
        return parts[0]
    draws = [program.draw for program in programs]
    return {
        name: _concatenated(name, [part[name] for part in parts], draws)
        for name in parts[0]
    }


def _concatenated(name: str, parts: list[np.ndarray], draws: list[_Draw]) -> np.ndarray:
    """Concatenate the rows of one site."""
    site, plates = draws[0].sites[name], draws[0].plates
    # What one shape of batch leaves open, another may tell.
    known = {p: axis for d in draws for p, axis in d.sites[name].axes.items() if axis}
    of_batch = sorted(plates.intersection(site.axes))
    unknown = sorted(site.axes.keys() - plates - draws[0].of_guide)
    if len(of_batch) > 1:
        why = (
            f"has rows of the plates {of_batch}, each of which has other rows in every "
            "batch, so batches do not line up. Predict them one by one"
        )
    elif of_batch and of_batch[0] in known:
        return np.concatenate(parts, axis=known[of_batch[0]])
    elif of_batch:
        why = (
            f"has several axes as long as plate '{of_batch[0]}' takes rows. Give "
            "batches of another size"
        )
    elif unknown and not draws[0].says_plates:
        why = (
            f"has the rows of plate '{unknown[0]}', and nothing says whether they are "
            "those of the batch or the same in all batches. Make the batches by "
            "minibatch(...), which names their plates"
        )
    elif all(_equal(part, parts[0]) for part in parts[1:]):
        return parts[0]
    else:
        why = (
            "stands outside of the plates of the batch, but depends on what the batch "
            "holds. Move it into a plate"
        )
    raise ValueError(f"Site '{name}' {why}, or leave it out of return_sites.")


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    same = one.shape == other.shape
    return same and np.allclose(one, other, rtol=1e-4, equal_nan=True)


# ------------------------------------------------------------------ what is given


def _params(svi: SubsampleSVI, fitted: Any) -> dict[str, Any]:
    """Return parameters and mutable state of whatever a fit has returned."""
    state = fitted if isinstance(fitted, SVIState) else getattr(fitted, "state", None)
    params = fitted
    if isinstance(state, SVIState):
        params = getattr(fitted, "params", None) or svi.get_params(state)
        params = params | (state.mutable_state or {})
    if not isinstance(params, Mapping):
        raise ValueError(
            f"fitted must be what fit or run has returned, a state, or a dict of "
            f"parameters, not {type(fitted).__name__}."
        )
    return jax.tree.map(jnp.asarray, dict(params))


def _missing(names: Iterable[str]) -> ValueError:
    return ValueError(
        f"The parameters lack {sorted(names)}, which guide or model have. Give what "
        "fit or run has returned, a state, or parameters as get_params returns them "
        "(these lack mutable state)."
    )


def _posteriors(svi: SubsampleSVI, params: dict[str, Any]) -> list[Any]:
    """Return the posteriors of the guides that are called for their mode alone."""
    posteriors = []
    for part in autoguides_in(svi.guide):
        if part.prototype_trace is None:
            raise ValueError(
                f"The {type(part).__name__} has not met its model yet. Call "
                "svi.init(rng_key, batch) first."
            )
    for part in _called_for_mode(svi.guide):
        try:
            with dynamic_subsample():
                posteriors.append(part.get_posterior(params))
        except KeyError as error:
            raise _missing(error.args) from error
    return posteriors


def _called_for_mode(guide: Any) -> list[AutoLaplaceApproximation]:
    parts = autoguides_in(guide)
    return [part for part in parts if isinstance(part, AutoLaplaceApproximation)]


def _on(svi: SubsampleSVI, rows: dict[str, jax.Array]) -> Any:
    return svi._batch(rows, {})


class _Given(NamedTuple):
    """The arrays that a compiled program is given."""

    params: dict[str, Any]
    posteriors: list[Any]
    number: np.uint32 | jax.Array  # of the batch
    leaves: list[jax.Array | None]  # of the model's arguments
    rows: dict[str, jax.Array]
    first: dict[str, jax.Array]  # for each row, where it is met first in the batch


_ARRAYS = np.ndarray | np.generic | jax.Array
_CONSTANTS = bool | int | float | complex | str | bytes


class _Batch:
    """A batch, its arrays apart from all else."""

    def __init__(self, svi: SubsampleSVI, item: Any, unseen: Collection[str]) -> None:
        batch = as_minibatch(item)
        args, kwargs, rows, counts = svi._unpacked((batch,), {}, None, None)
        leaves, self.structure = jax.tree.flatten((args, kwargs | svi.static_kwargs))
        self.constants = [None if isinstance(a, _ARRAYS) else a for a in leaves]
        self.leaves = [_array(a) if isinstance(a, _ARRAYS) else None for a in leaves]
        self.known = {name: np.asarray(own) for name, own in rows.items()}
        self.known = {n: own for n, own in self.known.items() if n not in unseen}
        self.rows = {name: _array(rows[name]) for name in self.known}
        self.counts = {name: int(count) for name, count in counts.items()}
        self.plates = {*batch.rows, *batch.counts, *rows, *counts, *unseen}
        self.says_plates = bool(batch.rows or batch.counts)
        self.first = {}
        for name, own in self.known.items():
            count = self.counts.get(name, len(own))
            _, index, inverse = np.unique(
                own[:count], return_index=True, return_inverse=True
            )
            if len(index) < count:
                padding = np.arange(count, len(own))
                first = np.concatenate([index[inverse], padding])
                self.first[name] = _array(first)

    def arguments(self, leaves: list[jax.Array | None]) -> tuple[tuple, dict]:
        given = zip(leaves, self.constants, strict=True)
        merged = [constant if leaf is None else leaf for leaf, constant in given]
        return jax.tree.unflatten(self.structure, merged)

    def is_like(self, other: _Batch) -> bool:
        """Tell whether two batches differ in the values of their arrays only."""
        return (
            self.structure == other.structure
            and self.plates == other.plates
            and self.says_plates == other.says_plates
            and all(map(_same, self.constants, other.constants))
        )


def _array(array: Any) -> Any:
    """Give an array the type that JAX would."""
    # To make it JAX's own array takes as long as the draws of some rows.
    if isinstance(array, jax.Array):
        return array
    array = np.asarray(array)
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)


def _same(one: Any, other: Any) -> bool:
    known = type(one) is type(other) and isinstance(one, _CONSTANTS)
    return one is other or (known and one == other)


# ------------------------------------------------------------------ one draw


class _AnyRows(Handler):
    """Gives made-up rows to plates of which nobody says which rows they take.

    Parameters
    ----------
    rows : dict of str to jax.Array
        The rows.

    Attributes
    ----------
    made_up : dict of str to int
        How many rows such plates take.
    sizes, taken : dict of str to int
        How many rows each plate has and takes.
    unseen : collection of str
        The plates whose rows are new ones: such a plate is as large as the batch.
    """

    def __init__(self, rows: dict[str, jax.Array]) -> None:
        super().__init__()
        self._rows = rows
        self.made_up: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.taken: dict[str, int] = {}
        self.unseen: Collection[str] = ()

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "plate":
            return
        name, (size, count) = msg["name"], msg["args"]
        self.sizes.setdefault(name, size)
        if name in self.unseen:
            count = size if count is None else count
            msg["args"], msg["value"] = (count, count), None
        if msg["value"] is None:
            self.made_up[name] = count
            msg["value"] = self._rows.get(name, jnp.arange(count))
        self.taken[name] = len(msg["value"])


class _KnownParams(Handler):
    """Refuses parameters that nobody gives, which would start anew."""

    def __init__(self) -> None:
        super().__init__()
        self._missing: set[str] = set()

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] in ("param", "mutable") and msg["value"] is None:
            self._missing.add(msg["name"])

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if self._missing:
            raise _missing(self._missing) from exc_value


def _giving(values: Mapping[str, Any]) -> substitute:
    """Give values of the batch to latents, in the body of a scan too."""

    def give(msg: dict[str, Any]) -> Any:
        if msg["type"] != "sample" or msg["is_observed"]:
            return None
        return values.get(msg["name"])

    return substitute(substitute_fn=give)


def _is_latent(site: dict[str, Any]) -> bool:
    return site["type"] == "sample" and not site["is_observed"]


def _plates_of(site: dict[str, Any]) -> set[str]:
    return {frame.name for frame in site.get("cond_indep_stack", ())}


class _Site(NamedTuple):
    """Where a site that is returned holds the rows of its plates.

    An axis is counted from the right; None if several can be the plate's.
    """

    plates: set[str]
    axes: dict[str, int | None]


class _Draw:
    """Makes one draw for a batch; JAX traces it, and then it knows its sites."""

    any_rows: _AnyRows

    def __init__(self, svi: SubsampleSVI, request: _Request, batch: _Batch) -> None:
        self._svi, self._request, self._batch = svi, request, batch
        self.plates, self.says_plates = set(batch.plates), batch.says_plates
        self.of_guide: set[str] = set()
        self.sites: dict[str, _Site] = {}

    def __call__(self, key: jax.Array, given: _Given, rows: dict) -> dict[str, Any]:
        given = jax.tree.map(jnp.asarray, given)
        with _on(self._svi, given.rows):
            return self._run(key, given, rows)

    def _run(self, key: jax.Array, given: _Given, rows: dict) -> dict[str, Any]:
        request, unseen = self._request, self._request.unseen
        args, kwargs = self._batch.arguments(given.leaves)
        self.any_rows = _AnyRows(rows)

        def guide() -> None:
            with self._around(given), self._posteriors(given), substitute(data=pins):
                self._svi.guide(*args, **kwargs)

        def model() -> None:
            new = internals.replaced(self.any_rows, unseen=unseen)
            with self._around(given), new, replay(trace=latents):
                self._svi.model(*args, **kwargs)

        latents: OrderedDict[str, Any] = OrderedDict()
        pins = self._pins_of_guide(model)
        keys = jax.random.split(key, 8)
        of_guide, of_model, of_data, of_enumerated = (
            (own, jax.random.fold_in(of_batches, given.number))
            for own, of_batches in zip(keys[::2], keys[1::2], strict=True)
        )
        _, drawn = self._two_draws(guide, of_guide, joint=self._joint())
        self.of_guide = set().union(*map(_plates_of, drawn.values()))
        for name, site in drawn.items():
            if _is_latent(site) and _plates_of(site).isdisjoint(unseen):
                value = self._one_a_row(site, given.first)
                # Without records of its plates, of which unseen ones differ.
                latents[name] = site | {"value": value, "plates": {}}
        outside, sites = self._two_draws(model, of_model)
        check_names("unseen", dict.fromkeys(unseen), self.any_rows.sizes)
        enumerated = [
            name
            for name, site in sites.items()
            if _is_latent(site) and name not in latents and is_enumerated(site)
        ]
        if request.log_likelihood:
            run = self._given(model, outside, of_model)
            return self._log_likelihoods(run, sites, enumerated)
        if request.infer_discrete and enumerated:
            self._check_in_rows(sites, enumerated)
            values = {n: s["value"] for n, s in sites.items() if n not in enumerated}
            run = self._given(model, values, of_model)
            outside |= assignments(run, of_enumerated[1], sites, enumerated, latents)
            with trace() as sites:
                self._given(model, outside, of_model)()
            enumerated = []
        return self._values(sites, latents, enumerated, outside, of_data)

    @contextmanager
    def _around(self, given: _Given) -> Generator[None]:
        """Give rows and parameters, also where a ``block`` stands further out."""
        pins, params = substitute(data=given.rows), substitute(data=given.params)
        with _KnownParams(), self.any_rows, pins, params:
            yield

    @contextmanager
    def _posteriors(self, given: _Given) -> Generator[None]:
        """Let guides that are called for their mode draw from their posterior."""
        with ExitStack() as changes:
            parts = _called_for_mode(self._svi.guide)
            for part, posterior in zip(parts, given.posteriors, strict=True):
                changes.enter_context(internals.with_posterior(part, posterior))
            yield

    def _pins_of_guide(self, model: Callable[[], None]) -> dict[str, jax.Array]:
        """Return rows for the guide to take in place of those that it has not."""
        unseen, parts = self._request.unseen, list(autoguides_in(self._svi.guide))
        local = [part for part in parts if isinstance(part, AutoSemiDAIS)]
        if not (unseen or local):
            return {}
        with block(), seed(rng_seed=0), trace() as sites:
            model()
        check_names("unseen", dict.fromkeys(unseen), self.any_rows.sizes)
        sizes, counts = dict(self.any_rows.sizes), self.any_rows.made_up
        for part in parts:
            sizes |= internals.full_sizes(part)
        for part in local:
            _check_local_model(part, sites, {n: counts[n] for n in unseen}, sizes)
        return {name: jnp.arange(min(counts[name], sizes[name])) for name in unseen}

    def _joint(self) -> set[str]:
        """Return the latents that are drawn at once for all rows."""
        return {
            name
            for part in autoguides_in(self._svi.guide)
            if isinstance(part, AutoContinuous)
            for name in internals.initial_values(part)
        }

    def _two_draws(
        self,
        run: Callable[[], None],
        keys: tuple[jax.Array, jax.Array],
        joint: Collection[str] = (),
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the latents outside of the batch's plates, and all sites."""
        with seed(rng_seed=keys[0]), trace() as sites:
            run()
        taken, sizes = self.any_rows.taken, self.any_rows.sizes
        self.plates |= {name for name in sizes if taken[name] != sizes[name]}
        outside = {
            name: site["value"]
            for name, site in sites.items()
            if _is_latent(site)
            and (name in joint or _plates_of(site).isdisjoint(self.plates))
        }
        with trace() as sites:
            self._given(run, outside, keys)()
        return outside, dict(sites)

    def _given(
        self, run: Callable[[], None], values: Mapping[str, Any], keys: tuple
    ) -> Callable[[], None]:
        """Return the second run: all but these values is drawn by the batch's key."""

        def given() -> None:
            # Sites get their keys before they get values, so that all runs that are
            # given more values or less have the same draws of the others.
            with _giving(values), seed(rng_seed=keys[1]):
                run()

        return given

    def _one_a_row(self, site: dict[str, Any], first: dict[str, jax.Array]) -> Any:
        """Return a latent; a row that is in the batch twice has one."""
        value = site["value"]
        for frame in site["cond_indep_stack"]:
            if frame.name in first:
                axis = frame.dim - site["fn"].event_dim
                value = jnp.take(value, first[frame.name], axis)
        return value

    def _check_in_rows(self, sites: dict[str, Any], enumerated: list[str]) -> None:
        """Refuse to infer from some rows what depends on all of them."""
        taken, sizes = self.any_rows.taken, self.any_rows.sizes
        some = sorted(name for name in sizes if taken[name] != sizes[name])
        for name in enumerated:
            if some and _plates_of(sites[name]).isdisjoint(self.plates):
                raise ValueError(
                    f"Enumerated site '{name}' stands outside of the plates {some}, so "
                    "it depends on all of their rows, and the batch has some. Give one "
                    "batch of all rows."
                )

    def _values(
        self,
        sites: dict[str, Any],
        latents: Collection[str],
        enumerated: Collection[str],
        outside: Mapping[str, Any],
        keys: tuple[jax.Array, jax.Array],
    ) -> dict[str, jax.Array]:
        possible = [
            name
            for name, site in sites.items()
            if site["type"] in ("sample", "deterministic")
            and not isinstance(site.get("fn"), Unit)
        ]
        names: Any = self._request.return_sites
        if names is None:
            names = [n for n in possible if n not in latents and n not in enumerated]
        values = {}
        for number, name in enumerate(names):
            if name in enumerated:
                raise ValueError(
                    f"Site '{name}' is enumerated, so nobody has drawn it. Draw it "
                    "given the data: infer_discrete=True."
                )
            if name not in possible:
                raise ValueError(
                    f"return_sites names '{name}', but the sites of the model are "
                    f"{sorted(possible)}."
                )
            site = sites[name]
            value = outside.get(name, site["value"])
            if site["type"] == "sample" and site["is_observed"]:
                in_batch = not _plates_of(site).isdisjoint(self.plates)
                value = site["fn"](rng_key=jax.random.fold_in(keys[in_batch], number))
            values[name] = value = jnp.asarray(value)
            self.sites[name] = _site(site, value, site["type"] == "deterministic")
        return values

    def _log_likelihoods(
        self, model: Callable, sites: dict[str, Any], enumerated: list[str]
    ) -> dict[str, jax.Array]:
        if enumerated:
            found = log_likelihoods(model, sites, enumerated, self.plates)
        else:
            found = {
                name: (site, site["fn"].log_prob(site["value"]))
                for name, site in sites.items()
                if site["type"] == "sample" and site["is_observed"]
            }
        if not found:
            raise ValueError(
                "The model observes nothing with these arguments, so there is no "
                "likelihood. Give the batch its data."
            )
        for name, (site, value) in found.items():
            self.sites[name] = _site({**site, "fn": None}, value, False)
        return {name: value for name, (_, value) in found.items()}


def _check_local_model(
    guide: AutoSemiDAIS, sites: dict, unseen: dict[str, int], sizes: dict[str, int]
) -> None:
    """Refuse a batch on which the guide cannot run its local model."""
    prototype: Any = guide.prototype_trace
    missing = [
        name
        for name, site in sites.items()
        if _is_latent(site) and prototype.get(name, {}).get("is_observed")
    ]
    if missing:
        raise ValueError(
            "AutoSemiDAIS makes the latents of rows from their data, and the batch "
            f"lacks those of the sites {missing}. Give the batch all that the model "
            "was trained with; for rows without data, use unseen."
        )
    for name, count in unseen.items():
        if count > sizes[name]:
            raise ValueError(
                f"AutoSemiDAIS runs its local model on the batch, and cannot take "
                f"{count} unseen rows at once for plate '{name}' (size "
                f"{sizes[name]}). Give smaller batches."
            )


def _site(site: dict[str, Any], value: jax.Array, deterministic: bool) -> _Site:
    """Find the axes of a site's plates."""
    axes: dict[str, int | None] = {}
    event_dim = getattr(site.get("fn"), "event_dim", 0)
    for frame in site["cond_indep_stack"]:
        # Those of a deterministic site may be any that are as long.
        at = range(-value.ndim, 0) if deterministic else [frame.dim - event_dim]
        found = [i for i in at if -i <= value.ndim and value.shape[i] == frame.size]
        if found:
            axes[frame.name] = found[0] if len(found) == 1 else None
    return _Site(_plates_of(site), axes)


# ------------------------------------------------------------------ all draws


class _Program:
    """The compiled draws of batches that differ in the values of their arrays only."""

    def __init__(
        self,
        svi: SubsampleSVI,
        request: _Request,
        batch: _Batch,
        keys: jax.Array,
        given: _Given,
    ) -> None:
        self._like, self._types = batch, _types(given)
        self.draw = draw = _Draw(svi, request, batch)
        one, run = _traced(draw, keys[0], given, {})
        rows = {n: jnp.arange(count) for n, count in draw.any_rows.made_up.items()}
        if rows:
            one, run = _traced(draw, keys[0], given, rows)
            made_from = internals.eval_provenance(
                lambda **rows: run(keys[0], given, rows), **rows
            )
            _check_independent(made_from, draw.any_rows.sizes, request.unseen)
        most = max(_BLOCK // (_AT_ONCE * _largest(one.jaxpr, 1)), 1)
        blocks = -(-len(keys) // most)
        size = -(-len(keys) // blocks)

        def all_draws(keys: jax.Array, given: _Given, rows: dict) -> Any:
            # Blocks of one size, as a smaller one would be compiled apart.
            places = jnp.minimum(jnp.arange(blocks * size), len(keys) - 1)
            made = jax.lax.map(
                lambda key: run(key, given, rows), keys[places], batch_size=size
            )
            return jax.tree.map(lambda draws: draws[: len(keys)], made)

        self._run = internals.compiled(all_draws, keys, given, rows, quickly=False)
        self._rows = rows
        self._given = given
        self._one = lambda **some: run(keys[0], given._replace(**some), rows)

    def fits(self, batch: _Batch, given: _Given) -> bool:
        return self._like.is_like(batch) and self._types == _types(given)

    def __call__(
        self, batch: _Batch, keys: jax.Array, given: _Given
    ) -> dict[str, np.ndarray]:
        taken, sizes = self.draw.any_rows.taken, self.draw.any_rows.sizes
        for name, own in batch.known.items():
            check_rows(name, sizes[name], own)
        check_names("valid", batch.counts, sizes)
        for plate, count in batch.counts.items():
            check_count(plate, count, taken[plate])
        padded = {n: own for n, own in batch.counts.items() if own < taken[n]}
        if padded:
            self._check_padding(padded)
        values = jax.device_get(self._run(keys, given, self._rows))
        for plate, count in padded.items():
            for name, site in self.draw.sites.items():
                axis = site.axes.get(plate)
                if axis is not None:
                    rest = (slice(None),) * (-axis - 1)
                    values[name] = values[name][(..., slice(count), *rest)]
        return values

    def _check_padding(self, padded: Collection[str]) -> None:
        """Refuse sites that would bring padding back."""
        for name, site in self.draw.sites.items():
            why = None
            if found := [p for p in sorted(padded) if site.axes.get(p, 0) is None]:
                why = f"has several axes that are as long as plate '{found[0]}' is"
            elif (
                site.axes.keys().isdisjoint(self.draw.plates)
                and self._depends_on_rows[name]
            ):
                why = "depends on its rows, and has no axis for them"
            if why:
                raise ValueError(
                    f"The batch is padded, and site '{name}' of the plates "
                    f"{sorted(site.plates)} {why}, so padding cannot be removed. Leave "
                    "it out of return_sites, or give the batch without a capacity."
                )

    @cached_property
    def _depends_on_rows(self) -> dict[str, frozenset[str]]:
        """For each site, of what that may be padded it is made."""
        given, taken = self._given, self.draw.any_rows.taken
        capacities = [taken[plate] for plate in self._like.counts]
        # Arguments that are as long as a capacity are taken to be padded to it.
        padded = {
            str(place): leaf
            for place, leaf in enumerate(given.leaves)
            if leaf is not None and leaf.ndim and len(leaf) in capacities
        }

        def one(number: Any, rows: dict, padded: dict) -> Any:
            leaves = [padded.get(str(n), own) for n, own in enumerate(given.leaves)]
            return self._one(number=number, rows=rows, leaves=leaves)

        # What is drawn in the plates of the batch is drawn by its number.
        return internals.eval_provenance(
            one, number=given.number, rows=given.rows, padded=padded
        )


def _check_independent(
    made_from: dict[str, frozenset[str]], sizes: dict[str, int], unseen: Collection[str]
) -> None:
    """Refuse sites that depend on which rows a plate has, where nothing says it."""
    for site, plates in made_from.items():
        for plate in sorted(plates):
            if plate in unseen:
                why = "which are none of those that the plate has"
                remedy = "Let the model take the data of its rows as an argument."
            else:
                why = "which nobody has named"
                remedy = (
                    f"Say which they are: minibatch(..., rows={{'{plate}': rows}})."
                )
            raise ValueError(
                f"Site '{site}' depends on the rows of plate '{plate}' (size "
                f"{sizes[plate]}), {why}. {remedy}"
            )


def _types(given: _Given) -> Any:
    leaves, structure = jax.tree.flatten(given)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _traced(function: Callable, *args: Any) -> tuple[Any, Callable]:
    """Return what JAX has traced, and a function that computes it."""
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*args)

    def run(*args: Any) -> Any:
        leaves = jaxpr_as_fun(traced)(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return traced, run


def _largest(jaxpr: Any, keys: int) -> int:
    """Return how many bytes the largest value takes that is another one in each draw.

    The first `keys` inputs are those that differ.
    """
    differ, largest = set(jaxpr.invars[:keys]), 1
    for eqn in jaxpr.eqns:
        if any(not isinstance(var, Literal) and var in differ for var in eqn.invars):
            differ.update(eqn.outvars)
            avals = [var.aval for var in eqn.outvars]
            sizes = [own.size * own.dtype.itemsize for own in avals]
            largest = max(largest, *sizes)
    return largest
