"""One draw for a batch: from the guide, and with it from the model.

Both draw twice: first what stands outside of the batch's plates, with a key of the draw
alone, then, given this, what stands in them, with a key of draw and batch. So what is
global is the same in all batches, and rows of different batches have no randomness in
common, whoever makes the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.distributions import Unit
from numpyro.handlers import block, replay, seed, substitute, trace
from numpyro.infer.autoguide import AutoContinuous, AutoSemiDAIS

from ..batches.minibatch import Minibatch
from ..batches.padding import check_names
from ..effect import internals
from ..effect.guides import autoguides_in
from ..effect.internals import Handler
from .enumerated import assignments, is_enumerated, log_likelihoods

if TYPE_CHECKING:
    from .subsample_svi import SubsampleSVI


class Request(NamedTuple):
    """What to compute for each draw."""

    unseen: tuple[str, ...]
    return_sites: Iterable[str] | None = None
    infer_discrete: bool = False
    log_likelihood: bool = False


class Given(NamedTuple):
    """The arrays that one draw is made from, besides its key."""

    params: dict[str, Any]
    number: Any  # of the batch
    batch: Minibatch  # without the rows of unseen plates
    first: dict[str, Any]  # by plate: for each row of the batch, where it is met first
    made_up: dict[str, Any]  # rows of plates of which nobody says which they take


class _complete(Handler):
    """Makes up rows that nobody names, and refuses parameters that nobody gives.

    Parameters
    ----------
    rows : dict of str to jax.Array
        The rows to give; by default the first ones.
    unseen : collection of str
        The plates whose rows are new ones: in the model, such a plate is as large as
        the batch.
    counts : dict of str to int
        How many rows unseen plates take that ask for no number.

    Attributes
    ----------
    made_up : dict of str to int
        How many rows the plates take whose rows are made up.
    sizes, taken : dict of str to int
        How many rows each plate has and takes.
    """

    def __init__(
        self, rows: Mapping[str, Any], unseen: Collection[str], counts: dict[str, int]
    ) -> None:
        super().__init__()
        self._rows, self._unseen, self._counts = rows, unseen, counts
        self._missing: set[str] = set()
        self.made_up: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.taken: dict[str, int] = {}

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] in ("param", "mutable") and msg["value"] is None:
            # It would start anew.
            self._missing.add(msg["name"])
        if msg["type"] != "plate":
            return
        name, (size, count) = msg["name"], msg["args"]
        self.sizes.setdefault(name, size)
        # The guide's plates, which have records, have no new rows.
        if name in self._unseen and "plates" not in msg:
            count = self._counts.get(name, size) if count is None else count
            msg["args"], msg["value"] = (count, count), None
        if msg["value"] is None:
            self.made_up[name] = count
            msg["value"] = self._rows.get(name, jnp.arange(count))
        self.taken[name] = len(msg["value"])

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if self._missing:
            raise ValueError(
                f"The parameters lack {sorted(self._missing)}, which guide or model "
                "have. Give what fit or run has returned, a state, or parameters as "
                "get_params returns them (these lack mutable state)."
            ) from exc_value


class Draw:
    """Makes one draw for a batch; JAX traces it, and then it knows its sites.

    Attributes
    ----------
    plates : set of str
        The plates of the batch: those that it names, and those that take some rows.
    names_plates : bool
        Whether the batch names any.
    of_guide : set of str
        The plates of the guide.
    met : _complete
        What has been met of all plates.
    axes : dict of str to dict
        For each site that is returned, the axes that hold the rows of its plates,
        counted from the right; None where several can be the plate's.
    """

    met: _complete
    of_guide: set[str]

    def __init__(self, svi: SubsampleSVI, request: Request, batch: Minibatch) -> None:
        self._svi, self._request = svi, request
        # Of an unseen plate that is padded, nothing says how long it is.
        self._counts = {
            name: int(count)
            for name, count in batch.counts.items()
            if name not in batch.padded
        }
        self.plates = {*batch.rows, *batch.counts, *request.unseen}
        self.names_plates = bool(batch.rows or batch.counts)
        self.axes: dict[str, dict[str, int | None]] = {}
        self._parts = list(autoguides_in(svi.guide))

    def __call__(self, key: jax.Array, given: Given) -> dict[str, jax.Array]:
        given = jax.tree.map(jnp.asarray, given)
        # Padded rows are drawn like others, and are cut off later.
        with self._svi._on(replace(given.batch, padded=())):
            return self._run(key, given)

    def _run(self, key: jax.Array, given: Given) -> dict[str, jax.Array]:
        svi, request, batch = self._svi, self._request, given.batch
        kwargs = batch.kwargs | svi.static_kwargs
        self.met = _complete(given.made_up, request.unseen, self._counts)

        def sites_of(
            function: Callable, last: Any, rng_key: jax.Array, values: Mapping[str, Any]
        ) -> dict[str, Any]:
            """Run guide or model, and give `values` to latents."""

            def give(msg: dict[str, Any]) -> Any:
                return values.get(msg["name"]) if _is_latent(msg) else None

            with (
                trace() as sites,
                # Values of the batch, which a dict of values would not be taken for.
                substitute(substitute_fn=give),
                # Sites get keys before they get values, so that all runs that are given
                # more values or less have the same draws of the others.
                seed(rng_seed=rng_key),
                # The rest is close to the sites, as a block may stand further out.
                self.met,
                substitute(data=batch.pinned),
                substitute(data=given.params),
                last,
            ):
                function(*batch.args, **kwargs)
            return dict(sites)

        latents: Any = {}
        model = partial(sites_of, svi.model, replay(trace=latents))
        rows = substitute(data=self._rows_of_unseen(model))
        guide = partial(sites_of, svi.guide, rows)
        keys = jax.random.split(key, 8)
        of_guide, of_model, of_data, of_enumerated = (
            (own, jax.random.fold_in(of_batches, given.number))
            for own, of_batches in zip(keys[::2], keys[1::2], strict=True)
        )
        joint = {
            name
            for part in self._parts
            if isinstance(part, AutoContinuous)
            for name in internals.initial_values(part)
        }
        _, drawn = self._two_draws(guide, of_guide, joint)
        self.of_guide = set().union(*map(_plates_of, drawn.values()))
        for name, site in drawn.items():
            if _is_latent(site) and _plates_of(site).isdisjoint(request.unseen):
                value = _one_a_row(site, given.first)
                # Without records of its plates, of which unseen ones differ.
                latents[name] = site | {"value": value, "plates": {}}
        outside, sites = self._two_draws(model, of_model)
        check_names("The batch", {*batch.rows, *batch.padded}, self.met.sizes)
        enumerated = [
            name
            for name, site in sites.items()
            if _is_latent(site) and name not in latents and is_enumerated(site)
        ]
        model = partial(model, of_model[1])
        if request.log_likelihood:
            run = partial(model, outside)
            found = log_likelihoods(run, sites, enumerated, self.plates)
            if not found:
                raise ValueError(
                    "The model observes nothing with these arguments, so there is no "
                    "likelihood. Give the batch its data."
                )
            self.axes = {n: _axes(*own, event_dim=0) for n, own in found.items()}
            return {name: value for name, (_, value) in found.items()}
        if request.infer_discrete and enumerated:
            some = sorted(self._taking_some())
            for name in enumerated:
                if some and _plates_of(sites[name]).isdisjoint(self.plates):
                    raise ValueError(
                        f"Enumerated site '{name}' stands outside of the plates "
                        f"{some}, so it depends on all of their rows, and the batch "
                        "has some. Give one batch of all rows."
                    )
            values = {n: s["value"] for n, s in sites.items() if n not in enumerated}
            run = partial(model, values)
            found = assignments(run, of_enumerated[1], sites, enumerated, latents)
            sites, enumerated = model(outside | found), []
        return self._values(sites, latents, enumerated, of_data)

    def _rows_of_unseen(self, model: Callable) -> dict[str, jax.Array]:
        """Return rows for the guide to take in place of those that it has not."""
        unseen = self._request.unseen
        local = [part for part in self._parts if isinstance(part, AutoSemiDAIS)]
        if not (unseen or local):
            return {}
        with block():
            sites = model(jax.random.key(0), {})
        check_names("unseen", unseen, self.met.sizes)
        sizes, counts = dict(self.met.sizes), self.met.made_up
        for part in self._parts:
            sizes |= internals.full_sizes(part)
        for part in local:
            prototype: Any = part.prototype_trace
            missing = [
                name
                for name, site in sites.items()
                if _is_latent(site) and prototype.get(name, {}).get("is_observed")
            ]
            if missing:
                raise ValueError(
                    "AutoSemiDAIS makes the latents of rows from their data, and the "
                    f"batch lacks those of the sites {missing}. Give the batch all "
                    "that the model was trained with; for rows without data, use "
                    "unseen."
                )
        for name in unseen:
            if local and counts[name] > sizes[name]:
                raise ValueError(
                    "AutoSemiDAIS runs its local model on the batch, and cannot take "
                    f"{counts[name]} unseen rows at once for plate '{name}' (size "
                    f"{sizes[name]}). Give smaller batches."
                )
        return {name: jnp.arange(min(counts[name], sizes[name])) for name in unseen}

    def _two_draws(
        self, run: Callable, keys: tuple, joint: Collection[str] = ()
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the latents outside of the batch's plates, and all sites.

        Latents with a `joint` distribution over all rows are outside of them, too.
        """
        sites = run(keys[0], {})
        self.plates |= self._taking_some()
        outside = {
            name: site["value"]
            for name, site in sites.items()
            if _is_latent(site)
            and (name in joint or _plates_of(site).isdisjoint(self.plates))
        }
        return outside, run(keys[1], outside)

    def _taking_some(self) -> set[str]:
        sizes, taken = self.met.sizes, self.met.taken
        return {name for name in sizes if taken[name] != sizes[name]}

    def _values(
        self,
        sites: dict[str, Any],
        latents: Collection[str],
        enumerated: Collection[str],
        keys: tuple[jax.Array, jax.Array],
    ) -> dict[str, jax.Array]:
        possible = [
            name
            for name, site in sites.items()
            if site["type"] in ("sample", "deterministic")
            and not isinstance(site.get("fn"), Unit)
        ]
        names = self._request.return_sites
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
            value = site["value"]
            if site["type"] == "sample" and site["is_observed"]:
                in_batch = not _plates_of(site).isdisjoint(self.plates)
                value = site["fn"](rng_key=jax.random.fold_in(keys[in_batch], number))
            values[name] = jnp.asarray(value)
            # A deterministic site may have its rows along any axis.
            event_dim = site["fn"].event_dim if site["type"] == "sample" else None
            self.axes[name] = _axes(site, values[name], event_dim)
        return values


def _is_latent(site: dict[str, Any]) -> bool:
    return site["type"] == "sample" and not site["is_observed"]


def _plates_of(site: dict[str, Any]) -> set[str]:
    return {frame.name for frame in site.get("cond_indep_stack", ())}


def _one_a_row(site: dict[str, Any], first: dict[str, jax.Array]) -> Any:
    """Return the value of a latent; a row that is in the batch twice has one."""
    value = site["value"]
    for frame in site["cond_indep_stack"]:
        if frame.name in first:
            value = jnp.take(value, first[frame.name], frame.dim - site["fn"].event_dim)
    return value


def _axes(
    site: dict[str, Any], value: jax.Array, event_dim: int | None
) -> dict[str, int | None]:
    """Find the axes of a site's plates; without `event_dim`, any that are as long."""
    axes: dict[str, int | None] = {}
    for frame in site["cond_indep_stack"]:
        at = range(-value.ndim, 0) if event_dim is None else [frame.dim - event_dim]
        found = [i for i in at if -i <= value.ndim and value.shape[i] == frame.size]
        if found:
            axes[frame.name] = found[0] if len(found) == 1 else None
    return axes
