"""Predict the rows of batches, and compute the log likelihoods of their data.

JAX traces one draw for each shape of batch; here it is compiled for all draws, run for
one batch after another, and the rows are put together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxpr_as_fun
from jax.tree_util import keystr, tree_flatten_with_path
from numpyro.infer.autoguide import AutoLaplaceApproximation
from numpyro.infer.svi import SVIState
from tqdm.auto import tqdm

from ..batches.minibatch import Minibatch, as_minibatch
from ..batches.padding import check_count
from ..effect import internals
from ..effect.dynamic_subsample import dynamic_subsample
from ..effect.guides import autoguides_in
from ..effect.rows import check_rows
from .draw import Draw, Given, Request
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
    sites = None if return_sites is None else tuple(return_sites)
    request = Request(_names(unseen), sites, infer_discrete)
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

    The density of rows for latents from their prior, which have not seen the rows;
    globals have:

    >>> found = svi.log_likelihood(
    ...     key, state, batches, 50, unseen=["people"], progress_bar=False
    ... )
    """
    request = Request(_names(unseen), log_likelihood=True)
    return _computed(self, rng_key, fitted, batches, num_samples, progress_bar, request)


def _names(unseen: Sequence[str]) -> tuple[str, ...]:
    if isinstance(unseen, str):
        raise ValueError(f"unseen is a list of plates: unseen=[{unseen!r}].")
    return tuple(unseen)


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
    params = _params_of(svi, fitted)
    keys = jax.random.split(rng_key, num_samples)
    # Of this call alone: what model and guide close over may be another one later.
    programs: dict[Any, _Program] = {}
    parts: list[dict[str, np.ndarray]] = []
    with _drawing_from_posteriors(svi, params):
        for number, item in enumerate(tqdm(batches, disable=not progress_bar)):
            given = _given(params, number, as_minibatch(item), request.unseen)
            kind = _kind(given)
            if kind not in programs:
                programs[kind] = _Program(svi, request, keys, given)
            parts.append(programs[kind](given))
            if parts[0].keys() != parts[-1].keys():
                differ = sorted(parts[0].keys() ^ parts[-1].keys())
                raise ValueError(
                    f"Batch {number} gives the sites {sorted(parts[-1])}, and the "
                    f"first batch {sorted(parts[0])}. Give all batches the same "
                    f"arguments, or leave {differ} out by return_sites."
                )
    if not parts:
        raise ValueError("There is no batch to predict.")
    if len(parts) == 1:
        return parts[0]
    draws = [program.draw for program in programs.values()]
    return {
        name: _concatenated(name, [part[name] for part in parts], draws)
        for name in parts[0]
    }


def _concatenated(name: str, parts: list[np.ndarray], draws: list[Draw]) -> np.ndarray:
    """Concatenate the rows of one site."""
    first = draws[0]
    plates = first.axes[name].keys()
    # What one shape of batch leaves open, another may tell.
    known = {p: axis for draw in draws for p, axis in draw.axes[name].items() if axis}
    of_batch = sorted(plates & first.plates)
    unknown = sorted(plates - first.plates - first.of_guide)
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
    elif unknown and not first.names_plates:
        why = (
            f"has the rows of plate '{unknown[0]}', and nothing says whether they are "
            "those of the batch or the same in all batches. Make the batches by "
            "minibatch(...), which names their plates"
        )
    elif all(
        part.shape == parts[0].shape
        and np.allclose(part, parts[0], rtol=1e-4, equal_nan=True)
        for part in parts[1:]
    ):
        return parts[0]
    else:
        why = (
            "stands outside of the plates of the batch, but depends on what the batch "
            "holds. Move it into a plate"
        )
    raise ValueError(f"Site '{name}' {why}, or leave it out of return_sites.")


# ------------------------------------------------------------------ what is given


def _params_of(svi: SubsampleSVI, fitted: Any) -> dict[str, Any]:
    """Return parameters and mutable state of whatever a fit has returned."""
    state = fitted if isinstance(fitted, SVIState) else getattr(fitted, "state", None)
    params = fitted
    if isinstance(state, SVIState):
        params = getattr(fitted, "params", None) or svi.get_params(state)
        params = params | (state.mutable_state or {})
    if not isinstance(params, Mapping):
        raise ValueError(
            "The second argument must be what fit or run has returned, a state, or a "
            f"dict of parameters, not {type(fitted).__name__}."
        )
    return jax.tree.map(jnp.asarray, dict(params))


@contextmanager
def _drawing_from_posteriors(
    svi: SubsampleSVI, params: dict[str, Any]
) -> Generator[None]:
    """Let guides that a call gives the mode of draw from their posterior."""
    with ExitStack() as changes:
        for part in autoguides_in(svi.guide):
            if part.prototype_trace is None:
                raise ValueError(
                    f"The {type(part).__name__} has not met its model yet. Call "
                    "svi.init(rng_key, batch) first."
                )
            if isinstance(part, AutoLaplaceApproximation):
                # The call itself says which parameters are missing.
                with suppress(KeyError):
                    with dynamic_subsample():
                        posterior = part.get_posterior(params)
                    changes.enter_context(internals.with_posterior(part, posterior))
        yield


def _given(
    params: dict[str, Any], number: int, batch: Minibatch, unseen: Collection[str]
) -> Given:
    """Return what draws for a batch are made from."""
    rows = {n: None if n in unseen else own for n, own in batch.rows.items()}
    batch, first = replace(batch, rows=rows), {}
    for name, own in batch.pinned.items():
        count = int(batch.valid.get(name, len(own)))
        _, index, inverse = np.unique(
            np.asarray(own)[:count], return_index=True, return_inverse=True
        )
        if len(index) < count:
            first[name] = np.append(index[inverse], np.arange(count, len(own)))
    return Given(params, np.uint32(number), batch, first, made_up={})


def _kind(given: Given) -> Any:
    """Return what is the same for batches that differ in the values of arrays only."""
    leaves, structure = jax.tree.flatten((given.batch, given.first))
    return structure, *((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


# ------------------------------------------------------------------ all draws


class _Program:
    """The compiled draws of batches that differ in the values of their arrays only."""

    def __init__(
        self, svi: SubsampleSVI, request: Request, keys: jax.Array, given: Given
    ) -> None:
        self.draw = draw = Draw(svi, request, given.batch)
        one, run = _traced(draw, keys[0], given)
        if draw.met.made_up:
            rows = {n: jnp.arange(count) for n, count in draw.met.made_up.items()}
            given = given._replace(made_up=rows)
            one, run = _traced(draw, keys[0], given)
        self._run_one, self._keys, self._given = run, keys, given
        self._check_independent(request.unseen)
        most = max(_BLOCK // (_AT_ONCE * _largest(one)), 1)
        blocks = -(-len(keys) // most)
        size = -(-len(keys) // blocks)

        def all_draws(keys: jax.Array, given: Given) -> Any:
            # Blocks of one size, as a smaller one would be compiled apart.
            places = jnp.minimum(jnp.arange(blocks * size), len(keys) - 1)
            made = jax.lax.map(
                lambda key: run(key, given), keys[places], batch_size=size
            )
            return jax.tree.map(lambda draws: draws[: len(keys)], made)

        self._run = compiled(all_draws, keys, given, options={})

    def __call__(self, given: Given) -> dict[str, np.ndarray]:
        batch, met = given.batch, self.draw.met
        for name, rows in batch.pinned.items():
            check_rows(name, met.sizes[name], rows)
        padded = {}
        for plate, count in batch.valid.items():
            check_count(plate, int(count), met.taken[plate])
            if count < met.taken[plate]:
                padded[plate] = int(count)
        if padded:
            self._check_padding(padded)
        given = given._replace(made_up=self._given.made_up)
        values = jax.device_get(self._run(self._keys, given))
        for plate, count in padded.items():
            for name, axes in self.draw.axes.items():
                axis = axes.get(plate)
                if axis is not None:
                    values[name] = np.split(values[name], [count], axis)[0]
        return values

    @cached_property
    def _made_from(self) -> dict[str, frozenset[str]]:
        """Return the arrays that each site is made from, by their places in `Given`."""
        leaves, structure = tree_flatten_with_path(self._given)
        places = {keystr(path): leaf for path, leaf in leaves}

        def one(**leaves: Any) -> dict[str, Any]:
            given = structure.unflatten(leaves[place] for place in places)
            return self._run_one(self._keys[0], given)

        return internals.eval_provenance(one, **places)

    def _check_independent(self, unseen: Collection[str]) -> None:
        """Refuse sites that depend on which rows a plate has, if nothing says it."""
        for plate in sorted(self._given.made_up):
            why = (
                "which does not have the unseen rows of the batch. Let the model take "
                "the data of its rows as an argument."
                if plate in unseen
                else "and the batch does not say which they are. Name them: "
                f"minibatch(..., rows={{'{plate}': rows}})."
            )
            for site, places in self._made_from.items():
                if f".made_up[{plate!r}]" in places:
                    raise ValueError(
                        f"Site '{site}' depends on the rows of plate '{plate}' (size "
                        f"{self.draw.met.sizes[plate]}), {why}"
                    )

    @cached_property
    def _made_from_rows(self) -> set[str]:
        """Return the sites that are made from what may be padded."""
        given, taken = self._given._replace(params={}), self.draw.met.taken
        # What is as long as a padded plate is taken to be padded, too. What is drawn in
        # the plates of the batch is drawn by its number.
        lengths = {taken[plate] for plate in given.batch.padded}
        of_batch = {".number"} | {
            keystr(path)
            for path, leaf in tree_flatten_with_path(given)[0]
            if not lengths.isdisjoint(np.shape(leaf)[:1])
        }
        return {name for name, own in self._made_from.items() if own & of_batch}

    def _check_padding(self, padded: Collection[str]) -> None:
        """Refuse sites that would bring padding back."""
        for name, axes in self.draw.axes.items():
            why = None
            if found := [p for p in sorted(padded) if axes.get(p, 0) is None]:
                why = f"has several axes that are as long as '{found[0]}' is"
            elif self.draw.plates.isdisjoint(axes) and name in self._made_from_rows:
                why = "depends on their rows, and has no axis for them"
            if why:
                raise ValueError(
                    f"Plates {sorted(padded)} are padded, and site '{name}' {why}, so "
                    "padding cannot be removed. Leave the site out of return_sites, or "
                    "give the batch without a capacity."
                )


def _traced(function: Callable, *args: Any) -> tuple[Any, Callable]:
    """Return what JAX has traced, and a function that computes it."""
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*args)

    def run(*args: Any) -> Any:
        leaves = jaxpr_as_fun(traced)(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    return traced.jaxpr, run


def _largest(draw: Any) -> int:
    """Return how many bytes the largest value takes that is another one in each draw.

    The first input of `draw`, its key, is another one.
    """
    differ, largest = {draw.invars[0]}, 1
    for eqn in draw.eqns:
        if any(not isinstance(var, Literal) and var in differ for var in eqn.invars):
            differ.update(eqn.outvars)
            sizes = [v.aval.size * v.aval.dtype.itemsize for v in eqn.outvars]
            largest = max([largest, *sizes])
    return largest
