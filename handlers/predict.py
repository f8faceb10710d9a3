"""Predict the rows of batches, and tell how likely their data are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Unit
from numpyro.handlers import replay, seed, substitute, trace, uncondition
from numpyro.infer.autoguide import AutoSemiDAIS
from numpyro.infer.svi import SVIState
from tqdm.auto import tqdm

from . import internals
from .guide_call import GuideCall
from .guides import autoguides_in
from .internals import Handler
from .minibatch import as_minibatch
from .padding import check_names, valid_rows
from .plates import PlateRows, check_rows, read_plates


@dataclass(frozen=True)
class Question:
    """What is asked of batches.

    Attributes
    ----------
    num_samples : int
        How many draws to make.
    unseen : tuple of str
        The plates whose rows are none of those that the plate has.
    return_sites : tuple of str or None
        The sites to return; None for those that the guide does not draw.
    log_likelihood : bool
        Whether to return log likelihoods of observed sites, instead of draws.
    """

    num_samples: int
    unseen: tuple[str, ...] = ()
    return_sites: tuple[str, ...] | None = None
    log_likelihood: bool = False

    def __call__(
        self,
        svi: Any,
        rng_key: jax.Array,
        state_or_params: Any,
        args: tuple,
        kwargs: dict[str, Any],
        indices: Mapping[str, Any] | None,
        valid: Mapping[str, Any] | None,
    ) -> dict[str, np.ndarray]:
        """Ask it of one batch."""
        given = _params(svi, state_or_params)
        batch = args, kwargs, indices, valid
        return self._ask(svi, rng_key, 0, given, *batch)[0]

    def of_batches(
        self,
        svi: Any,
        rng_key: jax.Array,
        state_or_params: Any,
        batches: Iterable,
        *,
        progress_bar: bool,
    ) -> dict[str, np.ndarray]:
        """Ask it of one batch after another, and put the rows together."""
        given = _params(svi, state_or_params)
        answers, program = [], None
        for number, item in enumerate(tqdm(batches, disable=not progress_bar)):
            batch = svi._unpacked((as_minibatch(item),), {}, None, None)
            answer, program = self._ask(svi, rng_key, number, given, *batch)
            answers.append(answer)
        if program is None:
            raise ValueError("There is no batch to predict.")
        return {
            name: _joined(name, [answer[name] for answer in answers], program)
            for name in answers[0]
        }

    def _ask(
        self,
        svi: Any,
        rng_key: jax.Array,
        number: int,
        given: dict[str, Any],
        args: tuple,
        kwargs: dict[str, Any],
        indices: Mapping[str, Any] | None,
        valid: Mapping[str, Any] | None,
    ) -> tuple[dict[str, np.ndarray], _Program]:
        indices = {n: r for n, r in (indices or {}).items() if n not in self.unseen}
        counts: dict[str, Any] = jax.tree.map(int, valid_rows(valid or {}).counts)
        leaves, structure = jax.tree.flatten((args, kwargs | svi.static_kwargs))
        arrays = {
            i: leaf
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, np.ndarray | np.generic | jax.Array)
        }
        others = {i: leaf for i, leaf in enumerate(leaves) if i not in arrays}
        compiled_for = (
            self,
            id(svi),  # a copy of it has another guide
            structure,
            tuple(others.items()),
            *((i, jnp.shape(leaf), leaf.dtype) for i, leaf in arrays.items()),
            *((name, jnp.shape(rows)) for name, rows in sorted(indices.items())),
            *sorted(counts),
        )
        # What handlers around hold would be constants of the compiled program.
        known = {} if internals.handlers_around() else svi._programs
        program = known.get(compiled_for)
        if program is None:
            program = _Program(svi, self, structure, others, {*indices, *counts})
            known[compiled_for] = program
        answer = jax.device_get(
            program.run(rng_key, number, given, arrays, dict(indices))
        )
        for name, rows in indices.items():
            check_rows(name, program.sizes[name], rows)
        check_names("valid", counts, program.sizes)
        for plate, count in counts.items():
            rows = program.taken.get(plate, count)
            if not 1 <= count <= rows:
                raise ValueError(
                    f"The valid count of plate '{plate}' is {count}, but must be "
                    f"between 1 and {rows}, the rows that the plate takes."
                )
            for name, axes in program.axes.items():
                if plate in axes:
                    real = (..., slice(count)) + (slice(None),) * (-axes[plate] - 1)
                    answer[name] = answer[name][real]
        return answer, program


def _params(svi: Any, state_or_params: Any) -> dict[str, Any]:
    """Return all that steps keep: parameters and mutable state."""
    if not isinstance(state_or_params, SVIState):
        return state_or_params
    return svi.get_params(state_or_params) | (state_or_params.mutable_state or {})


def _joined(name: str, parts: list[np.ndarray], program: _Program) -> np.ndarray:
    """Put together what batches have for one site."""
    if len(parts) == 1:
        return parts[0]
    axes = program.axes[name]
    of_batch = sorted(axes.keys() & program.of_batch)
    unknown = sorted(axes.keys() - program.of_batch - program.of_guide)
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


class _Program:
    """Draws for batches of one shape, compiled once.

    Attributes
    ----------
    run : callable
        The compiled function.
    sizes, taken : dict of str to int
        For each plate, how many rows it has, and how many the batch has.
    of_batch : set of str
        The plates whose rows are other ones in every batch.
    of_guide : set of str
        The plates of the guide's latents.
    axes : dict of str to dict
        For each site of the answer, the axes, counted from the right, of its plates.
    """

    def __init__(
        self,
        svi: Any,
        question: Question,
        structure: Any,
        others: dict[int, Any],
        named: set[str],
    ) -> None:
        self._svi = svi
        self._question = question
        self._structure = structure
        self._others = others
        self.sizes: dict[str, int] = {}
        self.taken: dict[str, int] = {}
        self.of_batch = named.union(question.unseen)
        self.of_guide: set[str] = set()
        self.axes: dict[str, dict[str, int]] = {}
        self.run = jax.jit(self._run)

    def _run(
        self,
        rng_key: jax.Array,
        number: Any,
        given: dict[str, Any],
        arrays: dict[int, Any],
        indices: dict[str, Any],
    ) -> dict[str, jax.Array]:
        leaves = arrays | self._others
        args, kwargs = jax.tree.unflatten(
            self._structure, [leaves[i] for i in range(len(leaves))]
        )
        with self._svi._batch(indices, {}):
            # Draws follow each other, so that the memory is that of one and of the
            # answer.
            return jax.lax.map(
                lambda key: self._draw(key, number, given, args, kwargs),
                jax.random.split(rng_key, self._question.num_samples),
            )

    def _draw(
        self,
        key: jax.Array,
        number: Any,
        given: dict[str, Any],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> dict[str, jax.Array]:
        of_guide, of_model = jax.random.split(key)
        unseen = _Unseen(self._svi, self._question.unseen, args, kwargs)
        anew = uncondition() if not self._question.log_likelihood else Handler()

        def answer(rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
            keys = partial(_KeysOfBatch, self, number, rows)
            with (
                trace() as latents,
                keys(of_guide),
                substitute(data=given),
                seed(rng_seed=of_guide),
            ):
                unseen.run_guide()
            self.of_guide |= {
                frame.name
                for site in latents.values()
                if site["type"] == "sample"
                for frame in site["cond_indep_stack"]
            }
            latents = unseen.forgotten(latents)
            with (
                trace() as sites,
                keys(of_model, model=True),
                substitute(data=given),
                seed(rng_seed=of_model),
                anew,
                replay(trace=latents),
            ):
                unseen.run_model(rows)
            if self._question.log_likelihood:
                return self._log_likelihoods(sites)
            return self._values(sites, latents)

        rows: dict[str, jax.Array] = {}
        values = answer(rows)
        rows |= unseen.any_rows()
        if rows:
            self._check_independent(
                internals.eval_provenance(lambda **rows: answer(rows), **rows)
            )
        return values

    def _check_independent(self, made_from: dict[str, frozenset[str]]) -> None:
        """Refuse sites that depend on which rows it are that nobody named."""
        for site, plates in made_from.items():
            for plate in sorted(plates):
                if plate in self._question.unseen:
                    why = "which are none of those that the plate has"
                    remedy = "Let the model take the data of its rows as an argument."
                else:
                    why = "which nobody has named"
                    remedy = f"Say which they are: indices={{'{plate}': rows}}."
                raise ValueError(
                    f"Site '{site}' depends on the rows of plate '{plate}' (size "
                    f"{self.sizes[plate]}), {why}. {remedy}"
                )

    def _log_likelihoods(self, sites: dict[str, Any]) -> dict[str, jax.Array]:
        answer = {}
        for name, site in sites.items():
            if site["type"] == "sample" and site["is_observed"]:
                answer[name] = site["fn"].log_prob(site["value"])
                self._note(site, answer[name], 0)
        if not answer:
            raise ValueError(
                "The model observes nothing with these arguments, so there is no "
                "likelihood. Give the batch its data."
            )
        return answer

    def _values(
        self, sites: dict[str, Any], latents: dict[str, Any]
    ) -> dict[str, jax.Array]:
        possible = {
            name: site
            for name, site in sites.items()
            if site["type"] == "deterministic"
            or (site["type"] == "sample" and not isinstance(site["fn"], Unit))
        }
        names = self._question.return_sites
        if names is None:
            names = [
                name
                for name, site in possible.items()
                if site["type"] == "deterministic" or name not in latents
            ]
        answer = {}
        for name in names:
            if name not in possible:
                raise ValueError(
                    f"return_sites names '{name}', but the sites of the model are "
                    f"{sorted(possible)}."
                )
            site = possible[name]
            answer[name] = jnp.asarray(site["value"])
            event_dim = site["fn"].event_dim if site["type"] == "sample" else None
            self._note(site, answer[name], event_dim)
        return answer

    def _note(self, site: dict[str, Any], value: Any, event_dim: int | None) -> None:
        frames, shape = site["cond_indep_stack"], jnp.shape(value)
        if event_dim is None:
            # A deterministic site does not say. Its value has the shape of its plates
            # in front, if it has their rows at all.
            batch_dim = max((-frame.dim for frame in frames), default=0)
            event_dim = max(len(shape) - batch_dim, 0)
        self.axes[site["name"]] = {
            frame.name: axis
            for frame in frames
            if len(shape) >= -(axis := frame.dim - event_dim)
            and shape[axis] == frame.size
        }


class _KeysOfBatch(Handler):
    """Lets each batch draw its own rows, with what is outside of them in common.

    A site's key is made from its name: a plate takes a key or not, depending on the
    batch, and would move those of the sites after it. Besides, it notes the plates, and
    keeps the rows that they would draw: those of an amortised guide do not matter.
    """

    def __init__(
        self,
        program: _Program,
        number: Any,
        rows: dict[str, jax.Array],
        key: jax.Array,
        *,
        model: bool = False,
    ) -> None:
        super().__init__()
        self._rows = rows
        self._program = program
        self._number = number
        self._key = key
        self._model = model

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate" and msg["value"] is None:
            msg["fn"] = partial(self._any_rows, msg["name"])
            return
        if msg["type"] not in ("sample", "control_flow"):
            return
        if msg["kwargs"].get("rng_key") is None:
            return
        if msg["type"] == "sample":
            key = jax.random.fold_in(self._key, crc32(msg["name"].encode()))
            msg["kwargs"]["rng_key"] = key
            names = {frame.name for frame in msg["cond_indep_stack"]}
            observed = self._model and msg["infer"].get("was_observed", False)
            own = names if observed else names & self._program.of_batch
        else:
            own = self._model
        if own:
            key = jax.random.fold_in(msg["kwargs"]["rng_key"], self._number)
            msg["kwargs"]["rng_key"] = key

    def _any_rows(
        self, name: str, size: int, taken: int, rng_key: Any = None
    ) -> jax.Array:
        return self._rows.setdefault(name, jnp.arange(taken))

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "plate":
            return
        name, size, taken = msg["name"], msg["args"][0], len(msg["value"])
        self._program.sizes[name] = size
        self._program.taken[name] = taken
        if taken != size:
            self._program.of_batch.add(name)


class _Unseen:
    """Runs guide and model on rows that some plates do not have.

    In the model such a plate is as large as the batch. In the guide it takes rows that
    it has, whatever they are, and its latents are forgotten.
    """

    def __init__(
        self, svi: Any, unseen: tuple[str, ...], args: tuple, kwargs: dict[str, Any]
    ) -> None:
        self._svi = svi
        self._call = args, kwargs
        self._plates = unseen
        self._sizes: dict[str, int] = {}
        self._rows: dict[str, jax.Array] = {}
        self._counts: dict[str, int] = {}
        if unseen:
            around = internals.handlers_around()
            read = read_plates(self._model, args, kwargs, around)
            check_names("unseen", dict.fromkeys(unseen), read)
            self._counts = {name: read[name].size for name in unseen}
        for guide in autoguides_in(svi.guide):
            sizes = internals.full_sizes(guide)
            self._sizes |= {n: sizes[n] for n in unseen if n in sizes}
            for name in unseen if isinstance(guide, AutoSemiDAIS) else ():
                if self._counts[name] > self._sizes[name]:
                    raise ValueError(
                        f"AutoSemiDAIS runs its local model on the batch, and cannot "
                        f"take {self._counts[name]} unseen rows at once for plate "
                        f"'{name}' (size {self._sizes[name]}). Give smaller batches."
                    )

    def _model(self, *args: Any, **kwargs: Any) -> Any:
        def make(
            subsample: Callable,
            name: str,
            size: int,
            subsample_size: int | None,
            dim: int | None,
        ) -> tuple[int, jax.Array]:
            if name not in self._plates:
                return subsample(name, size, subsample_size, dim)
            self._sizes.setdefault(name, size)
            count = size if subsample_size is None else subsample_size
            dim, rows = subsample(name, count, None, dim)
            return dim, self._rows.get(name, rows)

        with internals.plates_made_by(make):
            return self._svi.model(*args, **kwargs)

    def run_guide(self) -> None:
        """Run the guide."""
        args, kwargs = self._call
        if not self._plates:
            self._svi.guide(*args, **kwargs)
            return
        plates = {}
        for name, count in self._counts.items():
            size = self._sizes[name]
            rows = jnp.arange(min(count, size))
            plates[name] = PlateRows(name, size, len(rows), rows, "model")
        with GuideCall(self._model, args, kwargs, plates=plates):
            self._svi.guide(*args, **kwargs)

    def run_model(self, rows: dict[str, jax.Array]) -> None:
        """Run the model, with these for the rows of unseen plates."""
        args, kwargs = self._call
        self._rows = rows
        self._model(*args, **kwargs)

    def forgotten(self, latents: Mapping[str, Any]) -> OrderedDict[str, dict[str, Any]]:
        """Leave the unseen plates, and the latents in them, out of a guide's trace."""

        def stays(name: str, site: dict[str, Any]) -> bool:
            frames = {frame.name for frame in site.get("cond_indep_stack", ())}
            return name not in self._plates and not frames.intersection(self._plates)

        def without(plates: dict[str, PlateRows]) -> dict[str, PlateRows]:
            return {k: p for k, p in plates.items() if p.name not in self._plates}

        return OrderedDict(
            (name, site | {"plates": without(site.get("plates", {}))})
            for name, site in latents.items()
            if stays(name, site)
        )

    def any_rows(self) -> dict[str, jax.Array]:
        """Return rows of the unseen plates, to see whether the model uses them."""
        return {name: jnp.arange(count) for name, count in self._counts.items()}
