"""Predict the rows of batches, and compute the log likelihoods of their data.

One function is compiled for each shape of batch: it runs guide and model for all
draws. Padding is removed, and batches are concatenated, outside of it.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_static
from numpyro.distributions import Unit
from numpyro.handlers import replay, seed, substitute, trace, uncondition
from numpyro.infer.autoguide import AutoSemiDAIS
from numpyro.infer.svi import SVIState
from tqdm.auto import tqdm

from ..batches.minibatch import as_minibatch
from ..batches.padding import check_count, check_names, valid_rows
from ..effect import internals
from ..effect.guide_call import GuideCall
from ..effect.guides import autoguides_in
from ..effect.PLATES import PlateRows, check_rows, read_plates


@dataclass(frozen=True)
class Request:
    """What to compute for each batch.

    Attributes
    ----------
    num_samples : int
        The number of draws.
    unseen : tuple of str
        The plates that do not have the rows of the batch yet.
    return_sites : tuple of str or None
        The sites to return. None means all deterministic sites, and all sample sites
        that the guide does not draw.
    log_likelihood : bool
        Whether to return log likelihoods of the observed sites instead of draws.
    """

    num_samples: int
    unseen: tuple[str, ...] = ()
    return_sites: tuple[str, ...] | None = None
    log_likelihood: bool = False


@register_static
@dataclass(frozen=True, eq=False)
class _Layout:
    """The plates of guide and model, and where sites hold their rows.

    Known once JAX has traced the compiled function, which returns it as a static part
    of its result.

    Attributes
    ----------
    sizes, subsample_sizes : dict of str to int
        The sizes of each plate.
    of_batch : set of str
        The plates that have other rows in each batch.
    of_guide : set of str
        The plates of the guide's latents.
    axes : dict of str to dict
        For each site, the axis of each of its plates, counted from the right.
    """

    sizes: dict[str, int]
    subsample_sizes: dict[str, int]
    of_batch: set[str]
    of_guide: set[str]
    axes: dict[str, dict[str, int]]


_ARRAYS = np.ndarray | np.generic | jax.Array


def unpacked(svi: Any, batches: Iterable, progress_bar: bool) -> Iterator[tuple]:
    """Unpack the batches of a loader for ``predict``."""
    for item in tqdm(batches, disable=not progress_bar):
        yield svi._unpacked((as_minibatch(item),), {}, None, None)


def predict(
    svi: Any,
    rng_key: jax.Array,
    state_or_params: Any,
    batches: Iterable[tuple],
    request: Request,
) -> dict[str, np.ndarray]:
    """Compute a request for each batch, and concatenate the rows of all batches.

    Parameters
    ----------
    svi : SubsampleSVI
        Has the model and the guide.
    rng_key : jax.Array
        The random key.
    state_or_params : SVIState or dict
        The state, or the parameters.
    batches : iterable of tuple
        For each batch: args and kwargs of the model, indices, valid counts.
    request : Request
        What to compute.

    Returns
    -------
    dict of str to numpy.ndarray
        The draws of each site, or its log likelihoods.

    Raises
    ------
    ValueError
        If the batches do not fit the plates, or the sites of different batches cannot
        be concatenated.
    """
    params = state_or_params
    if isinstance(params, SVIState):
        params = svi.get_params(params) | (params.mutable_state or {})
    # Values from handlers around become constants of a compiled function.
    programs = {} if internals.handlers_around() else svi._programs
    # A copy of an SVI shares the dict, and may have another guide.
    program = programs.setdefault(
        id(svi), jax.jit(partial(_draws, svi), static_argnums=0)
    )
    parts, layout = [], None
    for number, (args, kwargs, indices, valid) in enumerate(batches):
        leaves, structure = jax.tree.flatten((args, kwargs | svi.static_kwargs))
        arrays = [leaf if isinstance(leaf, _ARRAYS) else None for leaf in leaves]
        constants = tuple(None if isinstance(a, _ARRAYS) else a for a in leaves)
        indices = {n: rows for n, rows in indices.items() if n not in request.unseen}
        counts = jax.tree.map(int, valid_rows(valid).counts)
        static, batch = (request, structure, constants), (arrays, indices, counts)
        part, layout = program(static, rng_key, params, number, batch)
        for name, rows in indices.items():
            check_rows(name, layout.sizes[name], rows)
        check_names("valid", counts, layout.sizes)
        part = jax.device_get(part)
        for plate, count in counts.items():
            check_count(plate, count, layout.subsample_sizes[plate])
            for name, axes in layout.axes.items():
                if plate in axes:
                    part[name] = np.split(part[name], [count], axes[plate])[0]
        parts.append(part)
    if layout is None:
        raise ValueError("There is no batch to predict.")
    return {
        name: _concatenated(name, [part[name] for part in parts], layout)
        for name in layout.axes
    }


def _concatenated(name: str, parts: list[np.ndarray], layout: _Layout) -> np.ndarray:
    """Concatenate the rows of one site."""
    if len(parts) == 1:
        return parts[0]
    axes = layout.axes[name]
    of_batch = sorted(axes.keys() & layout.of_batch)
    unknown = sorted(axes.keys() - layout.of_batch - layout.of_guide)
    if len(of_batch) == 1:
        return np.concatenate(parts, axis=axes[of_batch[0]])
    if of_batch:
        raise ValueError(
            f"Site '{name}' has rows of the plates {of_batch}, each of which has other "
            "rows in every batch, so batches do not line up. Predict them one by one, "
            "or leave the site out of return_sites."
        )
    if unknown:
        raise ValueError(
            f"Site '{name}' has the rows of plate '{unknown[0]}', and nothing says "
            "whether they are those of the batch or the same in all batches. If they "
            "are the batch's, give its indices or its valid count."
        )
    for part in parts[1:]:
        if part.shape != parts[0].shape or not np.allclose(
            part, parts[0], rtol=1e-4, equal_nan=True
        ):
            raise ValueError(
                f"Site '{name}' stands outside of the plates of the batch, but depends "
                "on what the batch holds. Move it into a plate, or leave it out of "
                "return_sites."
            )
    return parts[0]


# ------------------------------------------------------------------ what is compiled


def _draws(
    svi: Any, static: tuple, rng_key: jax.Array, params: Any, number: Any, batch: tuple
) -> tuple[dict[str, jax.Array], _Layout]:
    """Compute a request for one batch, in a compiled function."""
    request, structure, constants = static
    arrays, indices, counts = batch
    leaves = [c if a is None else a for a, c in zip(arrays, constants, strict=True)]
    args, kwargs = jax.tree.unflatten(structure, leaves)
    unseen = request.unseen
    named = {*indices, *counts, *unseen}

    def draw(key: jax.Array, rows: dict[str, jax.Array]) -> Any:
        keys = _KeysBySite(key, number, named, rows)
        with keys, trace() as latents:
            guide(*args, **kwargs)
        seen: Any = {
            name: site
            for name, site in latents.items()
            if _plates_of(site).union([name]).isdisjoint(unseen)
        }
        anew = nullcontext() if request.log_likelihood else uncondition()
        pins = substitute(data=rows)
        with keys, trace() as sites, pins, anew, replay(trace=seen):
            model(*args, **kwargs)
        if request.log_likelihood:
            values = _log_likelihoods(sites)
        else:
            values = _values(sites, seen, request.return_sites)
        return values, _layout(latents, sites, values, named, request.log_likelihood)

    def draw_checked(key: jax.Array) -> Any:
        rows = {name: jnp.arange(count) for name, count in new.items()}
        values, layout = draw(key, rows)
        if rows:
            made_from = internals.eval_provenance(
                lambda **rows: draw(key, rows)[0], **rows
            )
            _check_independent(made_from, layout.sizes, unseen)
        return values, layout

    with svi._batch(indices, {}), substitute(data=params):
        model, guide, new = svi.model, svi.guide, {}
        if unseen:
            model, guide, new = _on_new_rows(svi, unseen, args, kwargs)
        # One draw after another needs the memory of one draw, and of the result.
        return jax.lax.map(draw_checked, jax.random.split(rng_key, request.num_samples))


def _plates_of(site: dict[str, Any]) -> set[str]:
    return {frame.name for frame in site.get("cond_indep_stack", ())}


def _log_likelihoods(sites: dict[str, Any]) -> dict[str, jax.Array]:
    values = {
        name: site["fn"].log_prob(site["value"])
        for name, site in sites.items()
        if site["type"] == "sample" and site["is_observed"]
    }
    if not values:
        raise ValueError(
            "The model observes nothing with these arguments, so there is no "
            "likelihood. Give the batch its data."
        )
    return values


def _values(
    sites: dict[str, Any], latents: Collection[str], names: Iterable[str] | None
) -> dict[str, jax.Array]:
    possible = {
        name: site["type"] == "deterministic" or name not in latents
        for name, site in sites.items()
        if site["type"] in ("sample", "deterministic")
        and not isinstance(site.get("fn"), Unit)
    }
    if names is None:
        names = [name for name, by_default in possible.items() if by_default]
    for name in sorted({*names} - possible.keys()):
        raise ValueError(
            f"return_sites names '{name}', but the sites of the model are "
            f"{sorted(possible)}."
        )
    return {name: jnp.asarray(sites[name]["value"]) for name in names}


def _layout(
    latents: dict, sites: dict, values: dict, named: set[str], log_likelihood: bool
) -> _Layout:
    sizes, subsample_sizes, of_guide, axes = {}, {}, set(), {}
    for site in (*latents.values(), *sites.values()):
        if site["type"] == "plate":
            # In the model, an unseen plate has the size of the batch.
            sizes.setdefault(site["name"], site["args"][0])
            subsample_sizes[site["name"]] = len(site["value"])
    for site in latents.values():
        if site["type"] == "sample":
            of_guide |= _plates_of(site)
    for name, value in values.items():
        frames = sites[name]["cond_indep_stack"]
        # The leading axes of a deterministic site are those of its plates.
        batch_dim = max((-frame.dim for frame in frames), default=0)
        fn, event_dim = sites[name].get("fn"), max(value.ndim - batch_dim, 0)
        event_dim = 0 if log_likelihood else getattr(fn, "event_dim", event_dim)
        axes[name] = {
            frame.name: axis
            for frame in frames
            if value.ndim >= -(axis := frame.dim - event_dim)
            and value.shape[axis] == frame.size
        }
    of_batch = named.union(n for n in sizes if subsample_sizes[n] != sizes[n])
    return _Layout(sizes, subsample_sizes, of_batch, of_guide, axes)


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
                remedy = f"Say which they are: indices={{'{plate}': rows}}."
            raise ValueError(
                f"Site '{site}' depends on the rows of plate '{plate}' (size "
                f"{sizes[plate]}), {why}. {remedy}"
            )


class _KeysBySite(seed):
    """Makes the key of a site from its name, and the number of the batch.

    The number counts only for sites in plates of the batch, so the other sites have
    the same draws in all batches. `seed` makes each key from those before it, and it
    depends on the rows of a plate whether it takes one.

    Parameters
    ----------
    key : jax.Array
        The key of the draw.
    number : int
        The number of the batch.
    named : set of str
        The plates that have other rows in each batch, besides those that take a
        subsample.
    rows : dict of str to jax.Array
        Rows for the plates that would draw some; this handler adds them.
    """

    def __init__(
        self, key: jax.Array, number: Any, named: set[str], rows: dict[str, jax.Array]
    ) -> None:
        super().__init__(rng_seed=key)
        self._key, self._number = key, number
        self._named, self._rows = named, rows

    def process_message(self, msg: dict[str, Any]) -> None:
        super().process_message(msg)
        if msg["type"] == "plate" and msg["value"] is None:
            msg["fn"] = partial(self._any_rows, msg["name"])
        key = msg.get("kwargs", {}).get("rng_key")
        if key is None or msg["type"] not in ("sample", "control_flow"):
            return
        # Sites inside a control flow are not seen here. In the model, they may be in
        # plates of the batch.
        of_batch = internals.replayed() is not None
        if msg["type"] == "sample":
            key = jax.random.fold_in(self._key, crc32(msg["name"].encode()))
            of_batch = not _plates_of(msg).isdisjoint(self._named) or any(
                plate.subsample_size != plate.size
                for plate in internals.plates_around()
            )
        if of_batch:
            key = jax.random.fold_in(key, self._number)
        msg["kwargs"]["rng_key"] = key

    def _any_rows(self, name: str, size: int, count: int, rng_key: Any = None) -> Any:
        return self._rows.setdefault(name, jnp.arange(count))


# ------------------------------------------------------------------ unseen rows


def _on_new_rows(
    svi: Any, unseen: tuple[str, ...], args: tuple, kwargs: dict[str, Any]
) -> tuple[Callable, Callable, dict[str, int]]:
    """Return model and guide for rows that plates do not have, and their counts.

    In the model, such a plate is as large as the batch. In the guide, it takes the
    first rows that it has; the caller drops their latents.
    """
    guides = list(autoguides_in(svi.guide))
    sizes: dict[str, int] = dict(ChainMap(*map(internals.full_sizes, guides)))

    def make(subsample: Callable, name: str, size: int, count: Any, dim: Any) -> Any:
        if name in unseen:
            sizes.setdefault(name, size)
            size, count = size if count is None else count, None
        return subsample(name, size, count, dim)

    def model(*args: Any, **kwargs: Any) -> None:
        with internals.plates_made_by(make):
            svi.model(*args, **kwargs)

    def guide(*args: Any, **kwargs: Any) -> None:
        with GuideCall(model, args, kwargs, plates=records) as call:
            svi.guide(*args, **kwargs)
        # Without their records, the model need not take the guide's rows.
        for name in unseen:
            call.plates.pop(name)

    plates = read_plates(model, args, kwargs, internals.handlers_around())
    check_names("unseen", dict.fromkeys(unseen), plates)
    counts, records = {}, {}
    for name in unseen:
        count, size = plates[name].size, sizes[name]
        if count > size and any(isinstance(own, AutoSemiDAIS) for own in guides):
            raise ValueError(
                f"AutoSemiDAIS runs its local model on the batch, and cannot take "
                f"{count} unseen rows at once for plate '{name}' (size {size}). Give "
                "smaller batches."
            )
        rows = jnp.arange(min(count, size))
        records[name] = PlateRows(name, size, len(rows), rows, "model")
        counts[name] = count
    return model, guide, counts
