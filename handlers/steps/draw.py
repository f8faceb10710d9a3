"""One draw for a batch: from the guide, and with it from the model.

Both draw twice: first what stands outside of the batch's plates, with a key of the draw
alone, then, given this, what stands in them, with a key of draw and batch. So what is
global is the same in all batches, and rows of different batches have no randomness in
common, whoever makes the keys.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro.distributions import Unit
from numpyro.handlers import block, replay, seed, substitute, trace
from numpyro.infer.autoguide import AutoContinuous, AutoSemiDAIS

from ..batches.padding import check_names
from ..effect import internals
from ..effect.guides import autoguides_in
from ..effect.internals import Handler
from .enumerated import assignments, is_enumerated, log_likelihoods
from .inputs import Batch, Given, called_for_mode, missing_params, on_batch

if TYPE_CHECKING:
    from .subsample_svi import SubsampleSVI


@dataclass(frozen=True)
class Request:
    """What to compute for each draw."""

    unseen: tuple[str, ...] = ()
    return_sites: tuple[str, ...] | None = None
    infer_discrete: bool = False
    log_likelihood: bool = False


class _AnyRows(Handler):
    """Gives made-up rows to plates of which nobody says which rows they take.

    Parameters
    ----------
    rows : dict of str to jax.Array
        The rows.
    counts : dict of str to int
        How many rows unseen plates take that ask for no number.

    Attributes
    ----------
    made_up : dict of str to int
        How many rows such plates take.
    sizes, taken : dict of str to int
        How many rows each plate has and takes.
    unseen : collection of str
        The plates whose rows are new ones: such a plate is as large as the batch.
    """

    def __init__(self, rows: dict[str, jax.Array], counts: dict[str, int]) -> None:
        super().__init__()
        self._rows, self._counts = rows, counts
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
            count = self._counts.get(name, size) if count is None else count
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
            raise missing_params(self._missing) from exc_value


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


class Draw:
    """Makes one draw for a batch; JAX traces it, and then it knows its sites."""

    any_rows: _AnyRows

    def __init__(self, svi: SubsampleSVI, request: Request, batch: Batch) -> None:
        self._svi, self._request, self._batch = svi, request, batch
        self.plates, self.says_plates = set(batch.plates), batch.says_plates
        self.of_guide: set[str] = set()
        self.sites: dict[str, _Site] = {}

    def __call__(self, key: jax.Array, given: Given, rows: dict) -> dict[str, Any]:
        given = jax.tree.map(jnp.asarray, given)
        with on_batch(self._svi, given.rows):
            return self._run(key, given, rows)

    def _run(self, key: jax.Array, given: Given, rows: dict) -> dict[str, Any]:
        request, unseen = self._request, self._request.unseen
        args, kwargs = self._batch.arguments(given.leaves)
        self.any_rows = _AnyRows(rows, self._batch.lengths)

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
        check_names("unseen", unseen, self.any_rows.sizes)
        check_names("The batch", self._batch.named, self.any_rows.sizes)
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
    def _around(self, given: Given) -> Generator[None]:
        """Give rows and parameters, also where a ``block`` stands further out."""
        pins, params = substitute(data=given.rows), substitute(data=given.params)
        with _KnownParams(), self.any_rows, pins, params:
            yield

    @contextmanager
    def _posteriors(self, given: Given) -> Generator[None]:
        """Let guides that are called for their mode draw from their posterior."""
        with ExitStack() as changes:
            parts = called_for_mode(self._svi.guide)
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
        check_names("unseen", unseen, self.any_rows.sizes)
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
