"""Predict the rows of batches, and compute the log likelihoods of their data.

JAX traces one draw for each shape of batch; here it is compiled for all draws, run for
one batch after another, and the rows are put together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxpr_as_fun
from tqdm.auto import tqdm

from ..batches.minibatch import Minibatch
from ..batches.padding import check_count, check_names
from ..effect import internals
from ..effect.rows import check_rows
from .draw import Draw, Request
from .inputs import Batch, Given, params_of, posteriors_of
from .programs import compiled
from .start import check_key

if TYPE_CHECKING:
    from .subsample_svi import SubsampleSVI

# What the draws that are made at once may take, in bytes.
_BLOCK = 2**24
# About how many values as large as the largest are there at the same time.
_AT_ONCE = 8
_NO_BATCHES = np.ndarray | jax.Array | Mapping | str


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
        One batch, or a list or a loader of batches. They are taken one at a time, so
        they need not fit into memory together; their draws have to.
    num_samples : int, default 1000
        The number of draws.
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
    Draw number i of all batches has the same latents outside of the batch's plates,
    and, of a joint guide, the same latents of all rows. Other latents in the batch's
    plates are drawn anew in each batch. A row that is in a batch twice has one latent.

    Model and guide are traced in each call, once for each shape of batch. A call that
    computes what an earlier one did compiles nothing. Draws are made in blocks of some
    16 MiB. Effects of the model, such as ``jax.debug.callback``, happen twice a draw.

    A deterministic site is taken to hold the rows of a plate along the one axis that
    is as long. What a model computes across rows inside of their plate, as a mean,
    includes padded rows.

    Examples
    --------
    >>> result = svi.fit(key, batches, epochs=2, progress_bar=False)
    >>> rows = np.array([7, 3])
    >>> batch = minibatch(X[rows], rows={"people": rows})
    >>> svi.predict(key, result, batch)["y"].shape
    (1000, 2)

    Rows that the plate does not have, with latents from their prior given the others:

    >>> new = minibatch(X_new, rows={"people": None})
    >>> y_new = svi.predict(key, result, new, unseen=["people"])["y"]
    >>> y_new.shape == (1000, len(X_new))
    True
    """
    request = Request(
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
    rng_key : array
        The random key.
    fitted : FitResult, SVIRunResult, SVIState or dict
        What ``fit`` or ``run`` has returned, a state, or parameters as ``get_params``
        gives them, which lack mutable state.
    batches : Minibatch or iterable
        One batch, or a list or a loader of batches, with the data that are observed.
    num_samples : int, default 1000
        The number of draws of the latents.
    unseen : sequence of str, optional
        Plates whose latents are drawn from the model, given the other latents, instead
        of from the guide. Leave-one-out cross-validation needs it for each plate with
        latents of its own for each row: those of the guide have seen the very row.
    progress_bar : bool, default True
        Show a progress bar, if there are many batches.

    Returns
    -------
    dict of str to numpy.ndarray
        By observed site, log densities of shape ``(num_samples, rows, ...)``, without
        the scale of plates. Rows stand in the order of the batches, and those of
        padding are left out.

    Raises
    ------
    ValueError
        If parameters of guide or model are missing; if the model observes nothing; if
        enumerated latents are shared by rows, or by several observed sites; if a site
        depends on rows that the batch does not name, or on the rows of an unseen plate
        by anything but latents; if batches have different sites; if names, rows or
        counts do not fit the model.

    Examples
    --------
    >>> found = svi.log_likelihood(key, state, batches, 50, progress_bar=False)
    >>> found["y"].shape == (50, N)
    True

    For leave-one-out cross-validation, without what the latents of a row have seen:

    >>> found = svi.log_likelihood(
    ...     key, state, batches, 50, unseen=["people"], progress_bar=False
    ... )
    """
    request = Request(unseen=tuple(unseen), log_likelihood=True)
    return _computed(self, rng_key, fitted, batches, num_samples, progress_bar, request)


def _computed(
    svi: SubsampleSVI,
    rng_key: jax.Array,
    fitted: Any,
    batches: Minibatch | Iterable[Any],
    num_samples: int,
    progress_bar: bool,
    request: Request,
) -> dict[str, np.ndarray]:
    """Compute a request for each batch, and concatenate the rows of all batches."""
    check_key(rng_key)
    if not isinstance(num_samples, int | np.integer) or num_samples < 1:
        raise ValueError(
            f"num_samples must be a whole number of at least 1, not {num_samples!r}."
        )
    if isinstance(batches, Minibatch):
        batches, progress_bar = [batches], False
    elif isinstance(batches, _NO_BATCHES) or not isinstance(batches, Iterable):
        raise ValueError(
            f"batches must be one Minibatch or an iterable of them, not "
            f"{type(batches).__name__}: give minibatch(data, rows={{'plate': rows}})."
        )
    params = params_of(svi, fitted)
    posteriors = posteriors_of(svi, params)
    keys = jax.random.split(rng_key, num_samples)
    # Of this call alone: what model and guide close over may be another one later.
    programs: list[_Program] = []
    parts: list[dict[str, np.ndarray]] = []
    for number, item in enumerate(tqdm(batches, disable=not progress_bar)):
        batch = Batch(svi, item, request.unseen)
        arrays = batch.leaves, batch.rows, batch.first
        given = Given(params, posteriors, np.uint32(number), *arrays)
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


def _concatenated(name: str, parts: list[np.ndarray], draws: list[Draw]) -> np.ndarray:
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


# ------------------------------------------------------------------ all draws


class _Program:
    """The compiled draws of batches that differ in the values of their arrays only."""

    def __init__(
        self,
        svi: SubsampleSVI,
        request: Request,
        batch: Batch,
        keys: jax.Array,
        given: Given,
    ) -> None:
        self._like, self._types = batch, _types(given)
        self.draw = draw = Draw(svi, request, batch)
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

        def all_draws(keys: jax.Array, given: Given, rows: dict) -> Any:
            # Blocks of one size, as a smaller one would be compiled apart.
            places = jnp.minimum(jnp.arange(blocks * size), len(keys) - 1)
            made = jax.lax.map(
                lambda key: run(key, given, rows), keys[places], batch_size=size
            )
            return jax.tree.map(lambda draws: draws[: len(keys)], made)

        self._run = compiled(all_draws, keys, given, rows, options={})
        self._rows = rows
        self._given = given
        self._one = lambda **some: run(keys[0], given._replace(**some), rows)

    def fits(self, batch: Batch, given: Given) -> bool:
        return self._like.is_like(batch) and self._types == _types(given)

    def __call__(
        self, batch: Batch, keys: jax.Array, given: Given
    ) -> dict[str, np.ndarray]:
        taken, sizes = self.draw.any_rows.taken, self.draw.any_rows.sizes
        for name, own in batch.known.items():
            check_rows(name, sizes[name], own)
        check_names("The batch", batch.counts, sizes)
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
                why = f"has several axes that are as long as '{found[0]}' is"
            elif (
                site.axes.keys().isdisjoint(self.draw.plates)
                and self._depends_on_rows[name]
            ):
                why = "depends on their rows, and has no axis for them"
            if why:
                raise ValueError(
                    f"Plates {sorted(padded)} are padded, and site '{name}' {why}, so "
                    "padding cannot be removed. Leave the site out of return_sites, or "
                    "give the batch without a capacity."
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


def _types(given: Given) -> Any:
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
            largest = max([largest, *sizes])
    return largest
